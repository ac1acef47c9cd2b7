//! `metrics.jsonl`: one JSON object per line, the only thing that tools read of a run.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::evaluate::Evaluation;

/// One line of `metrics.jsonl`: a training step, with the evaluation that followed it, if one did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Optimiser steps taken so far.
    pub step: u64,
    /// Training targets seen so far.
    pub tokens: u64,
    /// Seconds of the run so far, evaluations and checkpoints included, earlier sessions too.
    pub time_s: f64,
    /// Mean loss of the step's batch before the step: nats per token, or the squared error per number.
    pub train_loss: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Training targets per second of the step.
    pub tokens_per_s: f64,
    /// Model FLOPs per second over the measured matrix-product ceiling.
    pub mfu: f64,
    /// Epochs of the data seen.
    pub epoch: f64,
    /// Held-out loss, as `train_loss`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub val_loss: Option<f64>,
    /// The same with the average of the weights in their place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ema_val_loss: Option<f64>,
    /// Held-out bits per byte.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits_per_byte: Option<f64>,
    /// Held-out loss above the true entropy, nats per token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gap: Option<f64>,
    /// The same by class of token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class_gap: Option<serde_json::Map<String, serde_json::Value>>,
    /// Held-out loss of each dataset of a mixture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dataset_loss: Option<serde_json::Map<String, serde_json::Value>>,
    /// Held-out loss at each narrower rank that the model is trained at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank_loss: Option<serde_json::Map<String, serde_json::Value>>,
    /// Task: fraction of held-out answers that are the model's most likely token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// Task of vectors: held-out mean squared error per number; an answer of 0 has 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mse: Option<f64>,
    /// MLA: effective rank of each layer's latents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latent_effective_rank: Option<Vec<f64>>,
    /// Largest attention logit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_attention_logit: Option<f64>,
    /// What the terms of the step tell beside their loss ([`lowkey_model::objective::Figures`]), by name, and the same after `eval_` held
    /// out. Of pairs of answers by the names that TRL gives these figures: `rewards/chosen`, `rewards/rejected`, `rewards/margins`,
    /// `rewards/accuracies`, `logps/chosen` and `logps/rejected`.
    #[serde(flatten)]
    pub figures: BTreeMap<String, f64>,
}

impl Metrics {
    /// Adds an evaluation's figures.
    pub(crate) fn with_evaluation(mut self, evaluation: &Evaluation) -> Self {
        self.val_loss = Some(evaluation.loss);
        self.ema_val_loss = evaluation.ema.as_ref().map(|ema| ema.loss);
        self.bits_per_byte = evaluation.bits_per_byte;
        self.accuracy = evaluation.accuracy;
        self.mse = evaluation.mse;
        self.figures.extend(evaluation.pairs.iter().map(|(name, value)| (format!("eval_{name}"), *value)));
        self.gap = evaluation.gap;
        self.max_attention_logit = Some(evaluation.max_logit);
        if !evaluation.latents.is_empty() {
            self.latent_effective_rank = Some(evaluation.latents.iter().map(|latent| latent.effective_rank).collect());
        }
        if !evaluation.ranks.is_empty() {
            let losses = evaluation.ranks.iter().map(|at| (at.rank.to_string(), serde_json::json!(at.loss)));
            self.rank_loss = Some(losses.collect());
        }
        if !evaluation.datasets.is_empty() {
            let losses = evaluation.datasets.iter().map(|at| (at.dataset.clone(), serde_json::json!(at.loss)));
            self.dataset_loss = Some(losses.collect());
        }
        if !evaluation.classes.is_empty() {
            let gaps = evaluation.classes.iter().map(|c| (c.class.clone(), serde_json::json!(c.gap)));
            self.class_gap = Some(gaps.collect());
        }
        self
    }

    /// The scalars with their TensorBoard tags.
    pub fn scalars(&self) -> Vec<(String, f64)> {
        let mut out = vec![
            ("train/loss", self.train_loss),
            ("train/lr", self.lr),
            ("train/grad_norm", self.grad_norm),
            ("train/tokens_per_s", self.tokens_per_s),
            ("train/mfu", self.mfu),
        ];
        let mean = |ranks: &Vec<f64>| ranks.iter().sum::<f64>() / ranks.len().max(1) as f64;
        let evaluated = [
            ("val/loss", self.val_loss),
            ("val/ema_loss", self.ema_val_loss),
            ("val/bits_per_byte", self.bits_per_byte),
            ("val/gap", self.gap),
            ("val/accuracy", self.accuracy),
            ("val/mse", self.mse),
            ("health/max_attention_logit", self.max_attention_logit),
            ("health/latent_effective_rank", self.latent_effective_rank.as_ref().map(mean)),
        ];
        out.extend(evaluated.into_iter().filter_map(|(tag, value)| value.map(|value| (tag, value))));
        let mut out: Vec<_> = out.into_iter().map(|(tag, value)| (tag.to_owned(), value)).collect();
        // Beneath `val/loss`: TensorBoard shows them in one group.
        let of_datasets = self.dataset_loss.iter().flatten();
        out.extend(of_datasets.filter_map(|(name, loss)| Some((format!("val/loss/{name}"), loss.as_f64()?))));
        out.extend(self.figures.iter().map(|(name, value)| match name.strip_prefix("eval_") {
            Some(name) => (format!("eval/{name}"), *value),
            None => (format!("train/{name}"), *value),
        }));
        out
    }
}

/// An open `metrics.jsonl`.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    /// Opens the file for a run that continues at `step`: lines of later steps, which a killed process wrote after its
    /// last checkpoint, and what is no line of metrics (cut short, or damaged) are dropped.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::File`] where the file cannot be read or written.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        let is_kept = |line: &[u8]| serde_json::from_slice::<Metrics>(line).is_ok_and(|metrics| metrics.step <= step);
        Ok(Self { path: path.to_path_buf(), file: reopen(path, is_kept)? })
    }

    /// Appends a line.
    ///
    /// # Errors
    /// [`Error::Io`] where the file cannot be written.
    pub fn write(&mut self, metrics: &Metrics) -> Result<()> {
        let mut line =
            serde_json::to_string(metrics).map_err(|e| Error::file(&self.path, format!("cannot be encoded: {e}")))?;
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(|e| Error::io(&self.path, e))
    }
}

/// Opens a file of lines to append to it, without the lines that are not to be kept.
pub(crate) fn reopen(path: &Path, is_kept: impl Fn(&[u8]) -> bool) -> Result<File> {
    let old = read(path)?.unwrap_or_default();
    let lines = old.split(|byte| *byte == b'\n').filter(|line| is_kept(line));
    let kept: Vec<u8> = lines.flat_map(|line| [line, b"\n"]).flatten().copied().collect();
    if kept != old || old.is_empty() {
        lowkey_files::write(path, &kept)?;
    }
    Ok(lowkey_files::write::append(path)?)
}

/// The lines of a file that are metrics.
fn lines(bytes: &[u8]) -> impl Iterator<Item = (&[u8], Metrics)> {
    bytes.split(|byte| *byte == b'\n').filter_map(|line| Some((line, serde_json::from_slice(line).ok()?)))
}

/// The file, of whatever length; none where there is none.
fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    match lowkey_files::read(path, u64::MAX) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.is_missing() => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// What a `metrics.jsonl` tells of the run that wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    /// The last step.
    pub(crate) last: u64,
    /// The first step that was followed by an evaluation.
    pub(crate) measured: Option<u64>,
}

/// What a `metrics.jsonl` tells; none where there is no such file, or no step in it.
///
/// # Errors
/// [`Error::Io`] or [`Error::File`] where the file cannot be read.
pub(crate) fn told(path: &Path) -> Result<Option<Told>> {
    let Some(bytes) = read(path)? else { return Ok(None) };
    let measured =
        lines(&bytes).filter(|(_, metrics)| metrics.val_loss.is_some()).map(|(_, metrics)| metrics.step).min();
    let last = lines(&bytes).map(|(_, metrics)| metrics.step).max();
    Ok(last.map(|last| Told { last, measured }))
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use lowkey_model::objective::{Figures, preference::PairFigures};

    use super::*;

    #[test]
    fn reopening_drops_later_lines_and_what_is_no_line_of_metrics() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut file = MetricsFile::open(&path, 0).unwrap();
        for step in 1..=5 {
            file.write(&Metrics { step, train_loss: step as f64, ..Metrics::default() }).unwrap();
        }
        drop(file);
        let mut raw = OpenOptions::new().append(true).open(&path).unwrap();
        raw.write_all(b"\xff\xfe no text\n{\"step\":6,\"tok").unwrap();
        assert_eq!(told(&path).unwrap(), Some(Told { last: 5, measured: None }));
        let mut file = MetricsFile::open(&path, 3).unwrap();
        file.write(&Metrics { step: 4, train_loss: 40.0, ..Metrics::default() }).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let read: Vec<Metrics> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(read.iter().map(|m| m.train_loss).collect::<Vec<_>>(), vec![1.0, 2.0, 3.0, 40.0]);
    }

    #[test]
    fn figures_of_pairs_have_the_names_that_dashboards_look_for() {
        let figures = PairFigures { pairs: 2, loss: 1.0, rewards: [3.0, 1.0], preferred: 1, log_p: [-4.0, -6.0] };
        let figures = Figures::from(figures).means(&[], 2);
        let mut metrics = Metrics { step: 3, val_loss: Some(0.5), figures, ..Metrics::default() };
        metrics.figures.insert("eval_rewards/accuracies".into(), 0.25);
        let line = serde_json::to_string(&metrics).unwrap();
        assert!(line.contains("\"rewards/margins\":1.0") && line.contains("\"logps/rejected\":-3.0"), "{line}");
        assert_eq!(serde_json::from_str::<Metrics>(&line).unwrap(), metrics);
        let scalars = metrics.scalars();
        let scalar = |name: &str| scalars.iter().find(|(tag, _)| tag == name).map(|(_, value)| *value);
        for (tag, value) in [
            ("train/rewards/chosen", 1.5),
            ("train/rewards/rejected", 0.5),
            ("train/rewards/accuracies", 0.5),
            ("train/rewards/margins", 1.0),
            ("train/logps/chosen", -2.0),
            ("eval/rewards/accuracies", 0.25),
        ] {
            assert_eq!(scalar(tag), Some(value), "{tag}");
        }
        // Those of a mixture's datasets come beside the mean of all.
        let losses = serde_json::json!({ "talk": 1.5, "stories": 2.5, "none": null });
        metrics.dataset_loss = losses.as_object().cloned();
        let scalars = metrics.scalars();
        let of_datasets: Vec<_> = scalars.iter().filter(|(tag, _)| tag.starts_with("val/loss")).cloned().collect();
        let expected = [("val/loss", 0.5), ("val/loss/stories", 2.5), ("val/loss/talk", 1.5)];
        let sorted = |mut all: Vec<(String, f64)>| {
            all.sort_by(|a, b| a.0.cmp(&b.0));
            all
        };
        assert_eq!(sorted(of_datasets), expected.map(|(tag, value)| (tag.to_owned(), value)));
        // A line without them is what it was.
        let plain = serde_json::to_string(&Metrics::default()).unwrap();
        assert!(plain.ends_with("\"epoch\":0.0}"), "{plain}");
    }
}
