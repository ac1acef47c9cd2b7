use super::*;
use crate::study::{Arm, Rule, RunResult, Theory};

fn study() -> Study {
    let arm = |name: &str, x: Option<f64>, bytes: usize| Arm {
        name: name.into(),
        settings: BTreeMap::new(),
        x,
        parameters: 1000,
        train_flops_per_token: 6000.0,
        training_flops: 6e7,
        elastic_ranks: Vec::new(),
        cache_bytes_per_token: bytes,
        int8_bytes_per_token: bytes / 4 + 8,
        decode_tokens_per_s: vec![(512, 1234.5)],
        decode_bytes: vec![(128, 2e6), (512, 3e6)],
        steps: 10,
        mismatch: Some(0.001),
    };
    let arms = vec![
        arm("mha <b>", None, 512),
        arm("kv_lora_rank-4", Some(4.0), 32),
        arm("kv_lora_rank-8", Some(8.0), 64),
        arm("kv_lora_rank-16", Some(16.0), 128),
        arm("kv_lora_rank-32", Some(32.0), 256),
    ];
    let runs = (0..5).flat_map(|arm| {
        (1..=3).map(move |seed| {
            // A power law over the rank, which doubles from arm to arm.
            let rank = 2f64.powi(arm as i32 + 1);
            let loss = if arm == 0 { 0.4 } else { 0.2 + 0.4 * rank.powf(-0.5) } + 0.001 * seed as f64;
            let metrics = [
                ("gap", loss),
                ("val_loss", loss + 1.0),
                ("int8.val_loss", loss + 1.01),
                ("int4.val_loss", loss + 1.05),
                ("class.syntax.gap", 0.01),
                ("class.answer.gap", 0.3 - 0.02 * arm as f64),
                ("latent_effective_rank", 3.0),
            ];
            RunResult {
                arm,
                seed,
                metrics: metrics.iter().map(|(name, value)| ((*name).to_string(), *value)).collect(),
                curve: vec![(5, 2.0), (10, 1.0)],
                spectra: if arm == 0 { Vec::new() } else { vec![vec![1.0, 0.1, 0.01], vec![1.0, 0.5, 0.0]] },
            }
        })
    });
    Study {
        name: "planted".into(),
        question: "Is <this> escaped & shown?".into(),
        rule: Rule::Margin { margin: 0.02, confidence: 0.95 },
        baseline: 0,
        metric: "gap".into(),
        lower_is_better: true,
        x: Some("model.kv_lora_rank".into()),
        theory: Vec::new(),
        arms,
        runs: runs.collect(),
        seeds: vec![1, 2, 3],
        objections: Vec::new(),
        notes: Vec::new(),
    }
}

#[test]
fn a_page_answers_first_and_stands_alone() {
    let study = study();
    let page = page(&study, &study.summary());
    let verdict = page.find("class=\"verdict\"").unwrap();
    assert!(verdict < page.find("<table>").unwrap() && verdict < page.find("<svg").unwrap());
    for text in [
        "Is &lt;this&gt; escaped &amp; shown?",
        "mha &lt;b&gt;",
        "kv_lora_rank-8 against mha &lt;b&gt;: better",
        "Fit: L∞",
        "cache in int8",
        "cache in int4",
        "1234",
        "smallest x within",
    ] {
        assert!(page.contains(text), "{text}");
    }
    assert!(!page.contains("Is <this>") && !page.contains("<script") && !page.contains("href=\"http"));
    // The curve, the front, learning curves and spectra.
    assert_eq!(page.matches("<svg").count(), 4);
    assert_eq!(page.matches("<h2>").count(), 7);
    for tag in ["table", "figure", "h2", "ul", "li", "div"] {
        let opened = page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
        assert_eq!(opened, page.matches(&format!("</{tag}>")).count(), "{tag}");
    }
}

#[test]
fn a_page_of_nothing_yet_says_so() {
    let mut study = study();
    study.runs.clear();
    study.theory = vec![Theory { name: "line".into(), points: vec![(0.0, 1.0), (40.0, 0.0)] }];
    let page = page(&study, &study.summary());
    assert!(page.contains("Preliminary: 0 of 15") && page.contains("</html>"), "{page}");
    // Drawn from the first rank to the last, although its corners lie outside.
    assert!(page.contains(">line</text>") || page.contains(">\nline\n</text>"), "{page}");
}

#[test]
fn a_fit_of_one_seed_gives_no_interval() {
    let mut study = study();
    let whole = page(&study, &study.summary());
    assert!(whole.contains("95 % by resampling seeds") && !whole.contains("no interval"), "{whole}");
    study.seeds.truncate(1);
    study.runs.retain(|run| run.seed == 1);
    let page = page(&study, &study.summary());
    assert!(page.contains("no interval from one seed") && !page.contains("by resampling seeds"), "{page}");
}
