//! What the runs left behind, as figures.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Int, Tensor, TensorData};
use lowkey_infer::{CacheDtype, Decoder, Form};
use lowkey_model::{AttentionConfig, CausalLm};
use lowkey_train::{Held, Metrics, RunConfig, RunOptions, checkpoint};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::expand::Expanded;
use crate::experiment::{Better, Experiment};
use crate::study::{RunResult, Study};

/// Figures of a finished run, by the training loop.
const EVALUATION: &str = "evaluation.json";

/// Held-out loss with a quantised cache, by the lab.
const QUANTISED: &str = "quantised.json";

/// Documents at a time in an evaluation over caches.
const DOCUMENTS: usize = 16;

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

fn read_json(path: &Path) -> Result<Value> {
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
        put("int8.val_loss".into(), read_json(&quantised)?.get("int8"));
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

/// Evaluates a finished run's model with its cache in int8 and writes the figure down, where that has not been done; whether there
/// is such a figure now, or can be none.
pub(crate) fn quantise(out: &Path, config: &RunConfig, expanded: &Expanded) -> Result<bool> {
    let path = out.join(QUANTISED);
    if path.is_file() {
        return Ok(true);
    }
    let Some(dir) = checkpoint::newest(&out.join("checkpoints"))? else { return Ok(false) };
    let options = RunOptions {
        run_file: expanded.experiment.base_path(),
        out: out.to_path_buf(),
        resume: true,
        overwrite: false,
        environment: serde_json::Map::new(),
    };
    let data = lowkey_train::setup(config, &options, &mut |_| {})?.data;
    let Held::Documents(documents) = &data.held else { return Ok(true) };
    let device = Device::flex();
    let model = CausalLm::load(&dir, &device).map_err(lowkey_train::Error::from)?;
    let form = match model.config.attention {
        AttentionConfig::Mla(_) => Form::Absorbed,
        AttentionConfig::Grouped(_) => Form::Expanded,
    };
    let (mut nats, mut tokens) = (0.0, 0);
    for documents in documents.chunks(DOCUMENTS) {
        let rows: Vec<&[u32]> = documents
            .iter()
            .map(|document| &document.ids[..document.ids.len().saturating_sub(1)])
            .filter(|ids| !ids.is_empty())
            .collect();
        let next: Vec<&[u32]> =
            documents.iter().filter(|document| document.ids.len() > 1).map(|document| &document.ids[1..]).collect();
        let Some(longest) = rows.iter().map(|row| row.len()).max() else { continue };
        let decoder = Decoder::with_cache(&model, [rows.len(), longest], CacheDtype::Int8, form, &device);
        let logits = decoder.and_then(|mut decoder| decoder.forward(&rows)).map_err(lowkey_train::Error::from)?;
        // Padding is given token 0 to predict, and not counted.
        let padded = |ids: &&[u32]| {
            let ids = ids.iter().map(|id| *id as i32).chain(std::iter::repeat(0)).take(longest);
            ids.collect::<Vec<i32>>()
        };
        let targets: Vec<i32> = next.iter().flat_map(padded).collect();
        let targets = Tensor::<3, Int>::from_data(TensorData::new(targets, [rows.len(), longest, 1]), &device);
        let losses = log_softmax(logits, 2).gather(2, targets).try_into_vec_as::<f32>();
        let losses = losses.map_err(|e| Error::file(&dir, format!("the losses cannot be read back: {e:?}")))?;
        for (row, losses) in next.iter().zip(losses.chunks(longest)) {
            nats -= losses.iter().take(row.len()).map(|loss| f64::from(*loss)).sum::<f64>();
            tokens += row.len();
        }
    }
    let figure = serde_json::json!({ "int8": nats / f64::from(u32::try_from(tokens.max(1)).unwrap_or(u32::MAX)) });
    checkpoint::write_file(&path, figure.to_string().as_bytes())?;
    Ok(true)
}
