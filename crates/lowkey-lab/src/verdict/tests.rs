use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};

use super::*;
use crate::fixtures::study;

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
    let words = ["better (", "worse (", "equal within the margin (", "undecided (", "Holm's over 4 comparisons"];
    assert_eq!(verdict.len(), words.len(), "{verdict:?}");
    for (sentence, word) in verdict.iter().zip(words) {
        assert!(sentence.contains(word), "{sentence}");
    }
}

#[test]
fn a_knee_is_the_smallest_that_is_near_the_best() {
    let rule = Rule::Knee { percent: 5.0, confidence: 0.95 };
    let arms: &[(&str, Option<f64>, &[f64])] =
        &[("base", None, &[0.5]), ("r4", Some(4.0), &[2.0]), ("r8", Some(8.0), &[1.03]), ("r16", Some(16.0), &[1.0])];
    let mut study = study(rule, arms);
    let verdict = study.summary().verdict;
    assert!(verdict[0].contains("is 8 (r8: 1.0300); the best is 16"), "{verdict:?}");
    study.seeds = vec![0, 1, 2, 3];
    let verdict = study.summary().verdict;
    let expected = ["Preliminary: 4 of 16 runs are finished.", "Undecided: 0 of 3 arms with an x are finished."];
    assert_eq!(verdict, expected);
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
    assert_eq!(outside, ["Undecided whether line holds within 5 %: 0 of 0 points are finished."]);
}

/// A rule that speaks of all points says nothing while there are none.
#[test]
fn a_report_without_runs_is_undecided() {
    let margin = Rule::Margin { margin: 0.05, confidence: 0.95 };
    let knee = Rule::Knee { percent: 5.0, confidence: 0.95 };
    let theory = Rule::Theory { name: "line".into(), percent: 5.0, confidence: 0.95 };
    let elastic = Rule::Elastic { arm: "wide".into(), percent: 1.0, confidence: 0.95 };
    for rule in [margin, knee, theory, elastic] {
        let mut study = planted_elastic(rule, 3);
        study.runs.clear();
        let verdict = study.summary().verdict;
        assert!(verdict[0].starts_with("Preliminary: 0 of 9"), "{verdict:?}");
        assert!(verdict.iter().any(|sentence| sentence.to_lowercase().contains("undecided")), "{verdict:?}");
        for word in ["is within", "holds within 5 % at", "better (", "worse (", "equal within", "smallest x"] {
            assert!(
                verdict.iter().all(|sentence| !sentence.contains(word) || sentence.contains("whether")),
                "{verdict:?}"
            );
        }
    }
}

/// An elastic arm of whole width 8 with a prefix of 4, and an arm for each width.
fn planted_elastic(rule: Rule, seeds: usize) -> Study {
    let figures: Vec<f64> = (0..seeds).map(|seed| 1.0 + 0.01 * seed as f64).collect();
    let mut study =
        study(rule, &[("wide", Some(8.0), &figures), ("r4", Some(4.0), &figures), ("r8", Some(8.0), &figures)]);
    study.arms[0].elastic_ranks = vec![4];
    for run in study.runs.iter_mut().filter(|run| run.arm == 0) {
        let at_4 = run.metrics["gap"] + 0.001;
        run.metrics.insert("rank.4.gap".into(), at_4);
    }
    study
}

#[test]
fn an_elastic_arm_is_judged_where_every_rank_is_finished() {
    let rule = || Rule::Elastic { arm: "wide".into(), percent: 1.0, confidence: 0.95 };
    let mut study = planted_elastic(rule(), 3);
    let verdict = study.summary().verdict;
    assert!(verdict[0].starts_with("wide is within 1 % or one standard deviation"), "{verdict:?}");
    assert_eq!(verdict.iter().filter(|sentence| sentence.ends_with("holds.")).count(), 2, "{verdict:?}");
    // Without one seed of the arm for rank 4 nothing is known of it.
    study.runs.retain(|run| !(run.arm == 1 && run.seed == 2));
    let verdict = study.summary().verdict;
    assert!(
        verdict[1].starts_with("Undecided whether wide is within")
            && verdict[1].ends_with("1 of 2 ranks are finished.")
    );
    assert!(verdict[2].contains("rank 4: undecided, 2 of 3 seeds are finished"), "{verdict:?}");
    // A miss at the other decides, whatever rank 4 will say.
    for run in study.runs.iter_mut().filter(|run| run.arm == 0) {
        run.metrics.insert("gap".into(), 3.0);
    }
    let verdict = study.summary().verdict;
    assert!(verdict[1].starts_with("wide is not within") && verdict[1].contains("1 of 2 ranks"), "{verdict:?}");
    // A rank that no arm was trained at is not passed over.
    let mut study = planted_elastic(rule(), 3);
    study.arms[0].elastic_ranks = vec![2, 4];
    let verdict = study.summary().verdict;
    assert!(verdict[0].starts_with("Undecided whether") && verdict[0].contains("2 of 3 ranks"), "{verdict:?}");
}

#[test]
fn what_is_not_finished_is_not_decided() {
    let rule = Rule::Margin { margin: 0.05, confidence: 0.95 };
    let mut study = study(
        rule,
        &[("base", None, &[1.0, 2.0, 3.0]), ("done", None, &[1.5, 2.51, 3.5]), ("part", None, &[1.5, 2.5])],
    );
    let verdict = study.summary().verdict;
    assert!(verdict[0].starts_with("Preliminary: 8 of 9"), "{verdict:?}");
    assert!(verdict[1].contains("done against base: worse ("), "{verdict:?}");
    assert_eq!(verdict[2], "part against base: undecided, 2 of 3 seeds are finished.");
    study.seeds.push(9);
    let verdict = study.summary().verdict;
    assert!(verdict[1].contains("undecided, 3 of 4 seeds"), "{verdict:?}");

    let rule = Rule::Theory { name: "line".into(), percent: 5.0, confidence: 0.95 };
    let figures: &[(&str, Option<f64>, &[f64])] = &[("r2", Some(2.0), &[0.8, 0.8]), ("r5", Some(5.0), &[0.5])];
    let verdict = crate::fixtures::study(rule, figures).summary().verdict;
    assert_eq!(verdict[1], "Undecided whether line holds within 5 %: 1 of 2 points are finished.");
}

#[test]
fn one_seed_decides_nothing_by_a_margin() {
    let rule = Rule::Margin { margin: 0.05, confidence: 0.95 };
    let verdict = study(rule, &[("base", None, &[1.0]), ("other", None, &[2.0])]).summary().verdict;
    assert_eq!(verdict[0], "other: one seed only, which decides nothing.");
}

#[test]
fn what_speaks_against_a_verdict_stands_in_its_place() {
    let rule = Rule::Margin { margin: 0.05, confidence: 0.95 };
    let mut study = study(rule, &[("base", None, &[1.0, 2.0]), ("other", None, &[2.0, 3.0])]);
    study.objections.push("rule.margin was 0.01, is 0.05".into());
    study.notes.push("Runs were made by two versions.".into());
    let summary = study.summary();
    let expected = ["No verdict: rule.margin was 0.01, is 0.05.", "Runs were made by two versions."];
    assert_eq!(summary.verdict, expected);
    assert_eq!(summary.objections, study.objections);
}

/// Arms that are as good as the baseline, or just at the margin from it: some study in twenty may claim anything wrong of any arm,
/// however many there are. Without the correction far more do.
#[test]
fn many_arms_are_corrected_for_their_number() {
    const ARMS: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
    let noise = Normal::new(0.0, 0.05).unwrap();
    let draws = 600;
    // At no margin any difference is wrong; at the margin itself, equality is.
    for (margin, truth, wrong) in [(0.0, 0.0, &["better (", "worse ("][..]), (0.1, 0.1, &["equal within"][..])] {
        let mut random = ChaCha8Rng::seed_from_u64(11);
        let (mut corrected, mut uncorrected) = (0, 0);
        for _ in 0..draws {
            let mut seeds = |mean: f64| (0..5).map(|_| mean + noise.sample(&mut random)).collect::<Vec<f64>>();
            let base = seeds(1.0);
            let others: Vec<Vec<f64>> = ARMS.iter().map(|_| seeds(1.0 + truth)).collect();
            let mut figures: Vec<(&str, Option<f64>, &[f64])> = vec![("base", None, &base)];
            figures.extend(ARMS.iter().zip(&others).map(|(name, values)| (*name, None, &values[..])));
            let study = study(Rule::Margin { margin, confidence: 0.95 }, &figures);
            let summary = study.summary();
            let is_wrong = |sentence: &String| wrong.iter().any(|word| sentence.contains(word));
            corrected += usize::from(summary.verdict[..ARMS.len()].iter().any(is_wrong));
            let claims = |arm: &ArmSummary| {
                let of = |p: fn(&Mean, f64) -> Option<f64>| p(&arm.difference?, margin).filter(|p| *p <= 0.05);
                if truth == 0.0 { of(Mean::p_outside) } else { of(Mean::p_within) }
            };
            uncorrected += usize::from(summary.arms.iter().any(|arm| claims(arm).is_some()));
        }
        let (corrected, uncorrected) = (corrected as f64 / draws as f64, uncorrected as f64 / draws as f64);
        // Three standard errors of a share of 5 %.
        assert!(corrected < 0.05 + 3.0 * (0.05f64 * 0.95 / draws as f64).sqrt(), "{corrected}");
        assert!(uncorrected > 0.12, "{uncorrected}: without a correction nothing would be seen");
    }
}
