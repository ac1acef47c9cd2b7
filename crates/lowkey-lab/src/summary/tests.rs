use super::*;
use crate::study::{RunResult, Theory};

fn study(rule: Rule, figures: &[(&str, Option<f64>, &[f64])]) -> Study {
    let arm = |(name, x, _): &(&str, Option<f64>, &[f64])| Arm {
        name: (*name).into(),
        settings: BTreeMap::from([("model.note".into(), "a, \"b\"".into())]),
        x: *x,
        parameters: 10,
        train_flops_per_token: 1.5,
        cache_bytes_per_token: 8,
        int8_bytes_per_token: 4,
        decode_bytes: Vec::new(),
        decode_tokens_per_s: Vec::new(),
        steps: 3,
        mismatch: Some(0.01),
    };
    let runs = figures.iter().enumerate().flat_map(|(arm, (_, _, values))| {
        values.iter().enumerate().map(move |(seed, value)| RunResult {
            arm,
            seed: seed as u64,
            metrics: BTreeMap::from([("gap".to_string(), *value)]),
            curve: Vec::new(),
            spectra: Vec::new(),
        })
    });
    Study {
        name: "planted".into(),
        question: "Is it found?".into(),
        rule,
        baseline: 0,
        metric: "gap".into(),
        lower_is_better: true,
        x: None,
        theory: vec![Theory { name: "line".into(), points: vec![(0.0, 1.0), (10.0, 0.0)] }],
        arms: figures.iter().map(arm).collect(),
        runs: runs.collect(),
        seeds: vec![0, 1, 2, 3],
        rule_changed: false,
    }
}

#[test]
fn the_margin_rule_tells_better_worse_equal_and_undecided_apart() {
    let rule = Rule::Margin { margin: 0.05, confidence: 0.95 };
    let study = study(
        rule,
        &[
            ("base", None, &[1.0, 2.0, 3.0, 4.0]),
            ("better", None, &[0.80, 1.81, 2.79, 3.80]),
            ("worse", None, &[1.20, 2.21, 3.19, 4.20]),
            ("equal", None, &[1.01, 1.99, 3.0, 4.01]),
            ("noisy", None, &[0.5, 2.5, 3.5, 3.6]),
        ],
    );
    let verdict = study.summary().verdict;
    let words = ["better (", "worse (", "equal within the margin (", "undecided ("];
    assert_eq!(verdict.len(), words.len(), "{verdict:?}");
    for (sentence, word) in verdict.iter().zip(words) {
        assert!(sentence.contains(word), "{sentence}");
    }
}

/// Where seeds differ far more than arms, pairs still tell the arms apart; unpaired means could not.
#[test]
fn differences_are_taken_in_pairs() {
    let rule = Rule::Margin { margin: 0.0, confidence: 0.95 };
    let summary =
        study(rule, &[("base", None, &[1.0, 2.0, 3.0, 4.0]), ("other", None, &[0.9, 1.91, 2.89, 3.9])]).summary();
    let difference = summary.arms[1].difference.unwrap();
    assert!((difference.mean + 0.1).abs() < 1e-9 && difference.half.unwrap() < 0.02, "{difference:?}");
    assert!(summary.arms[1].metric.unwrap().half.unwrap() > 1.0);
    assert!(summary.arms[0].difference.is_none());
}

#[test]
fn a_knee_is_the_smallest_that_is_near_the_best() {
    let rule = Rule::Knee { percent: 5.0, confidence: 0.95 };
    let arms: &[(&str, Option<f64>, &[f64])] =
        &[("base", None, &[0.5]), ("r4", Some(4.0), &[2.0]), ("r8", Some(8.0), &[1.03]), ("r16", Some(16.0), &[1.0])];
    let summary = study(rule, arms).summary();
    assert!(summary.verdict[0].starts_with("Preliminary: 4 of 16"), "{:?}", summary.verdict);
    assert!(summary.verdict[1].contains("is 8 (r8: 1.0300); the best is 16"), "{:?}", summary.verdict);
}

#[test]
fn a_theory_holds_or_names_where_it_does_not() {
    let rule = || Rule::Theory { name: "line".into(), percent: 5.0, confidence: 0.95 };
    let close = study(rule(), &[("r2", Some(2.0), &[0.81]), ("r5", Some(5.0), &[0.49])]).summary().verdict;
    assert!(close.iter().any(|sentence| sentence == "line holds within 5 % at 2 points."), "{close:?}");
    let far = study(rule(), &[("r2", Some(2.0), &[0.81]), ("r5", Some(5.0), &[0.6])]).summary().verdict;
    assert!(far.iter().any(|sentence| sentence.starts_with("line does not hold")), "{far:?}");
    assert!(far.iter().any(|sentence| sentence.contains("r5") && sentence.contains("NOT within")), "{far:?}");
    let outside = study(rule(), &[("r20", Some(20.0), &[0.81])]).summary().verdict;
    assert!(outside.iter().any(|sentence| sentence.ends_with("at 0 points.")), "{outside:?}");
}

#[test]
fn tables_are_the_study_alone_and_quote_what_must_be() {
    let rule = Rule::Margin { margin: 0.05, confidence: 0.95 };
    let study = study(rule, &[("base", None, &[1.0, 2.0]), ("r4", Some(4.0), &[1.5])]);
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    report(&study, one.path()).unwrap();
    report(&study, two.path()).unwrap();
    for file in ["results.csv", "table.md"] {
        let read = |dir: &tempfile::TempDir| std::fs::read_to_string(dir.path().join(file)).unwrap();
        assert_eq!(read(&one), read(&two));
        assert!(!read(&one).contains("NaN"));
    }
    let csv = std::fs::read_to_string(one.path().join("results.csv")).unwrap();
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(lines.len(), 4);
    assert!(lines[0].ends_with("mismatch,model.note,gap"), "{}", lines[0]);
    assert_eq!(lines[3], "r4,0,4,10,1.5,8,3,0.01,\"a, \"\"b\"\"\",1.5");
}
