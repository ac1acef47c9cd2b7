//! What the runs left behind, as figures.

use std::collections::BTreeMap;
use std::path::Path;

use lowkey_train::{Metrics, checkpoint};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::expand::Expanded;
use crate::experiment::{Better, Experiment};
use crate::quantised::QUANTISED;
use crate::study::{RunResult, Study};

/// Figures of a finished run, by the training loop.
const EVALUATION: &str = "evaluation.json";

/// Whether all steps of the run in a folder are taken.
pub(crate) fn finished(out: &Path) -> bool {
    out.join(EVALUATION).is_file()
}

impl Expanded {
    /// Gathers the finished runs under `out`.
    ///
    /// # Errors
    /// [`Error::File`] for a run's file that is not what it should be.
    pub fn collect(&self, out: &Path) -> Result<Study> {
        let experiment = &self.experiment;
        let mut runs = Vec::new();
        for run in self.runs(out, None)? {
            if finished(&run.out) {
                let evaluation = read_json(&run.out.join(EVALUATION))?;
                let (metrics, spectra) = (metrics(&run.out, &evaluation)?, spectra(&evaluation));
                let curve = curve(&run.out.join("metrics.jsonl"))?;
                runs.push(RunResult { arm: run.arm, seed: run.seed, metrics, curve, spectra });
            }
        }
        Ok(Study {
            name: experiment.name.clone(),
            question: experiment.question.clone(),
            rule: experiment.rule.clone(),
            baseline: self.baseline,
            metric: experiment.metric.clone(),
            lower_is_better: experiment.better == Better::Lower,
            x: experiment.x.clone(),
            theory: experiment.theory.clone(),
            arms: self.arms.clone(),
            runs,
            seeds: experiment.seeds.clone(),
            rule_changed: rule_changed(out, experiment)?,
        })
    }
}

/// What decides, as it stood when the first run of a folder began.
const RULE: &str = "rule.json";

/// Keeps the rule beside the runs, where none is kept yet: what is written before the runs can then be told from what is written after.
pub(crate) fn keep_rule(out: &Path, experiment: &Experiment) -> Result<()> {
    let path = out.join(RULE);
    if path.exists() {
        return Ok(());
    }
    std::fs::create_dir_all(out).map_err(|e| Error::file(out, e.to_string()))?;
    Ok(checkpoint::write_file(&path, rule_text(experiment).as_bytes())?)
}

fn rule_text(experiment: &Experiment) -> String {
    let what =
        serde_json::json!({ "rule": experiment.rule, "metric": experiment.metric, "baseline": experiment.baseline });
    what.to_string() + "\n"
}

fn rule_changed(out: &Path, experiment: &Experiment) -> Result<bool> {
    let path = out.join(RULE);
    if !path.is_file() {
        return Ok(false);
    }
    let kept = std::fs::read_to_string(&path).map_err(|e| Error::file(&path, e.to_string()))?;
    Ok(kept != rule_text(experiment))
}

pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e.to_string()))?;
    serde_json::from_str(&text).map_err(|e| Error::file(path, format!("{e}; remove it to run this again")))
}

/// Eigenvalues of each layer's latent covariance.
fn spectra(evaluation: &Value) -> Vec<Vec<f64>> {
    let latents = evaluation.get("latents").and_then(Value::as_array).into_iter().flatten();
    let spectrum =
        |latent: &Value| Some(latent.get("covariance")?.as_array()?.iter().filter_map(Value::as_f64).collect());
    latents.filter_map(spectrum).collect()
}

/// The figures of the finished model, flat.
fn metrics(out: &Path, evaluation: &Value) -> Result<BTreeMap<String, f64>> {
    let mut found = BTreeMap::new();
    let mut put = |name: String, value: Option<&Value>| {
        if let Some(value) = value.and_then(Value::as_f64) {
            found.insert(name, value);
        }
    };
    put("val_loss".into(), evaluation.get("loss"));
    for key in ["gap", "accuracy", "mse", "bits_per_byte", "max_logit"] {
        put(key.into(), evaluation.get(key));
    }
    for class in evaluation.get("classes").and_then(Value::as_array).into_iter().flatten() {
        let Some(name) = class.get("class").and_then(Value::as_str) else { continue };
        for key in ["loss", "gap", "accuracy"] {
            put(format!("class.{name}.{key}"), class.get(key));
        }
    }
    for rank in evaluation.get("ranks").and_then(Value::as_array).into_iter().flatten() {
        let Some(width) = rank.get("rank").and_then(Value::as_u64) else { continue };
        for (name, key) in [("val_loss", "loss"), ("gap", "gap"), ("accuracy", "accuracy")] {
            put(format!("rank.{width}.{name}"), rank.get(key));
        }
    }
    let quantised = out.join(QUANTISED);
    if quantised.is_file() {
        let quantised = read_json(&quantised)?;
        put("int8.val_loss".into(), quantised.get("int8"));
        put("int4.val_loss".into(), quantised.get("int4"));
    }
    let latents = evaluation.get("latents").and_then(Value::as_array).into_iter().flatten();
    let effective: Vec<f64> = latents.filter_map(|latent| latent.get("effective_rank")?.as_f64()).collect();
    if !effective.is_empty() {
        found.insert("latent_effective_rank".into(), effective.iter().sum::<f64>() / effective.len() as f64);
    }
    Ok(found)
}

/// Steps and held-out losses of `metrics.jsonl`.
fn curve(path: &Path) -> Result<Vec<(u64, f64)>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e.to_string()))?;
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Metrics>(line).ok());
    Ok(lines.filter_map(|line| Some((line.step, line.val_loss?))).collect())
}
