//! Studies of planted figures.

use std::collections::BTreeMap;

use crate::study::{Arm, Rule, RunResult, Study, Theory};

/// A study with the metric `gap` of planted figures: each arm's name, x, and one figure a seed.
pub(crate) fn study(rule: Rule, figures: &[(&str, Option<f64>, &[f64])]) -> Study {
    let arm = |(name, x, _): &(&str, Option<f64>, &[f64])| Arm {
        name: (*name).into(),
        settings: BTreeMap::from([("model.note".into(), "a, \"b\"".into())]),
        x: *x,
        parameters: 10,
        train_flops_per_token: 1.5,
        training_flops: 90.0,
        elastic_ranks: Vec::new(),
        cache_bytes_per_token: 8,
        int8_bytes_per_token: 4,
        decode_bytes: Vec::new(),
        decode_tokens_per_s: Vec::new(),
        steps: 3,
        mismatch: Some(0.01),
    };
    let seeds = figures.iter().map(|(_, _, values)| values.len()).max().unwrap_or(0) as u64;
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
        seeds: (0..seeds).collect(),
        objections: Vec::new(),
        notes: Vec::new(),
    }
}
