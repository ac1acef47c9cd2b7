//! The run file: one TOML file is one whole run.

mod check;
mod history;
mod load;
mod trainable;

use std::path::PathBuf;

pub(crate) use check::at_least_one;
pub use history::EarlierPlan;
use lowkey_data::Packing;
use lowkey_kernels::Precision;
use lowkey_model::{Recompute, config::ModelSection, objective::Term};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::workers::PassSettings;

/// A run file, as written and as resolved.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Name, seed, device.
    pub run: RunSection,
    /// Where the weights come from, if not from a random start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<InitSection>,
    /// The model; absent: that of `init.from`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelSection>,
    /// The corpus.
    pub data: DataSection,
    /// The optimiser.
    pub optimizer: OptimizerSection,
    /// The learning rate over the run.
    #[serde(default)]
    pub lr_scheduler: SchedulerSection,
    /// Steps and batches.
    pub training: TrainingSection,
    /// Evaluation and samples.
    #[serde(default)]
    pub eval: EvalSection,
    /// Checkpoints.
    #[serde(default)]
    pub checkpoint: CheckpointSection,
    /// Metrics.
    #[serde(default)]
    pub metrics: MetricsSection,
    /// What the run was planned for before it was made longer or shorter; written by a resumed run, so that its `run.toml` trained
    /// anew gives the same bits.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<EarlierPlan>,
}

/// `[run]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunSection {
    /// Name of the run; its folder is `runs/NAME`.
    pub name: String,
    /// Seed of the weights, the order of the data and the samples.
    #[serde(default)]
    pub seed: u64,
    /// `auto`, `cpu`, or the name of a GPU backend.
    #[serde(default = "auto")]
    pub device: String,
    /// Several devices of one kind, `["cuda:0", "cuda:1"]`, that share the rows of every batch; empty: `device` alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<String>,
}

impl RunSection {
    /// The names of the run's devices, as a user reads them.
    pub(crate) fn device_names(&self) -> String {
        if self.devices.is_empty() { self.device.clone() } else { self.devices.join(", ") }
    }
}

fn auto() -> String {
    "auto".into()
}

/// `[init]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InitSection {
    /// A model directory whose weights, configuration and tokenizer the run starts from.
    pub from: PathBuf,
}

/// `[data]`: exactly one of `dataset` and `path`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSection {
    /// A dataset file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dataset: Option<PathBuf>,
    /// A text file as it is: byte tokens, the last tenth held out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Tokens per sequence.
    pub seq_len: usize,
    /// How documents fill a sequence; absent: whole documents where there are several, a stream where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packing: Option<Packing>,
    /// Whether documents and prompts get the special tokens that the tokenizer puts around a text, such as `<s>`; absent: as the
    /// dataset file says, else they do, unless the model of `[init]` was trained without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub add_special_tokens: Option<bool>,
    /// Whether attention stops at document bounds.
    #[serde(default = "yes")]
    pub mask_documents: bool,
}

fn yes() -> bool {
    true
}

/// `[optimizer]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerSection {
    /// Which optimiser.
    #[serde(default)]
    pub kind: OptimizerKind,
    /// Peak learning rate.
    pub lr: f64,
    /// `muon`: decay of its momentum; absent: 0.95.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub momentum: Option<f64>,
    /// AdamW's decay of the first and second moment.
    #[serde(default = "default_betas")]
    pub betas: [f64; 2],
    /// AdamW's ε beside the root of the second moment.
    #[serde(default = "default_adam_eps")]
    pub eps: f64,
    /// Decoupled decay of matrices; norms and biases are not decayed.
    #[serde(default)]
    pub weight_decay: f64,
    /// Largest global norm of the gradient; absent: no clipping.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grad_clip: Option<f64>,
}

fn default_betas() -> [f64; 2] {
    [0.9, 0.95]
}

fn default_adam_eps() -> f64 {
    1e-8
}

impl OptimizerSection {
    /// Decay of Muon's momentum.
    pub fn momentum(&self) -> f64 {
        self.momentum.unwrap_or(0.95)
    }
}

/// The optimisers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Adam with decoupled weight decay (arXiv 1711.05101).
    #[default]
    AdamW,
    /// Momentum orthogonalised (Jordan et al. 2024) for the matrices between hidden states, with an update as large as
    /// AdamW's (arXiv 2502.16982); AdamW for embedding, output head, norms and biases.
    Muon,
}

/// `[lr_scheduler]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SchedulerSection {
    /// Shape after the warm-up.
    #[serde(default)]
    pub kind: SchedulerKind,
    /// Steps over which the rate rises from 0 to its peak.
    #[serde(default)]
    pub warmup_steps: u64,
    /// `wsd`: the last fraction of the steps, over which the rate falls.
    #[serde(default = "default_decay_fraction")]
    pub decay_fraction: f64,
    /// The last rate as a fraction of the peak.
    #[serde(default)]
    pub min_lr_ratio: f64,
}

fn default_decay_fraction() -> f64 {
    0.2
}

impl Default for SchedulerSection {
    fn default() -> Self {
        Self { kind: SchedulerKind::Constant, warmup_steps: 0, decay_fraction: 0.2, min_lr_ratio: 0.0 }
    }
}

/// Shapes of the learning rate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SchedulerKind {
    /// The peak throughout.
    #[default]
    Constant,
    /// A straight line from the peak to `min_lr_ratio`.
    Linear,
    /// Half a cosine from the peak to `min_lr_ratio` (arXiv 1608.03983).
    Cosine,
    /// Warm-up, stable, decay (arXiv 2404.06395): the peak, then a straight line over the last `decay_fraction`.
    Wsd,
}

/// `[training]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainingSection {
    /// Optimiser steps.
    pub steps: u64,
    /// Sequences per optimiser step.
    pub batch_size: usize,
    /// Sequences per forward and backward pass; smaller than `batch_size`: gradients are accumulated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micro_batch_size: Option<usize>,
    /// What the backward pass computes again to save memory: `none`, or `block` for all within a decoder block.
    #[serde(default)]
    pub recompute: Recompute,
    /// Factor on the square of each position's log-partition, added to the loss that is minimised but not to the one that is
    /// reported (PaLM, arXiv 2204.02311, section 5: 1e-4); 0: none. Of the pass at the whole width alone, where there are others.
    #[serde(default)]
    pub z_loss: f64,
    /// A model with `[model.elastic]` ranks: how much of the loss at a narrower rank is its distance to the whole width's
    /// predictions; the rest is its own. Tasks of vectors learn from their answers alone.
    #[serde(default = "default_distillation")]
    pub distillation: f64,
    /// A model with `[model.elastic]` ranks: the fraction of the steps that train the whole width alone, before the narrower ranks
    /// join: what is to be told to them has to be known first.
    #[serde(default = "default_elastic_start")]
    pub elastic_start: f64,
    /// Names of the tensors that are trained, as patterns with `*`, such as `["*norm.weight"]`; absent: all. The others are frozen:
    /// they keep the values that they have and cost no gradient, no memory of the optimiser and no place on disk for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trainable: Option<Vec<String>>,
    /// What products with weights are computed in: `f32`, or on a GPU `bf16`, or `f16` with dynamic loss scaling. Parameters, their
    /// gradients, norms, softmax, loss and evaluation are f32 in any case.
    #[serde(default)]
    pub dtype: Precision,
    /// Threads that share a micro-batch on the CPU; absent: one per core. Part of the run: gradients are summed in a fixed
    /// order for a given number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
}

fn default_distillation() -> f64 {
    0.5
}

fn default_elastic_start() -> f64 {
    0.3
}

/// `[eval]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalSection {
    /// Steps between evaluations; 0: only at the end.
    #[serde(default)]
    pub every: u64,
    /// Batches of the held-out split per evaluation, always the same ones; the last evaluation of a run covers the split.
    #[serde(default = "default_eval_batches")]
    pub batches: usize,
    /// Prompts that are continued at each evaluation.
    #[serde(default)]
    pub prompts: Vec<String>,
    /// Tokens per continuation.
    #[serde(default = "default_sample_tokens")]
    pub sample_tokens: usize,
    /// Temperature of the continuations.
    #[serde(default = "default_temperature")]
    pub temperature: f64,
}

fn default_eval_batches() -> usize {
    16
}

fn default_sample_tokens() -> usize {
    200
}

fn default_temperature() -> f64 {
    0.8
}

impl Default for EvalSection {
    fn default() -> Self {
        Self {
            every: 0,
            batches: default_eval_batches(),
            prompts: Vec::new(),
            sample_tokens: default_sample_tokens(),
            temperature: default_temperature(),
        }
    }
}

/// `[checkpoint]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointSection {
    /// Steps between checkpoints; 0: only at the end.
    #[serde(default)]
    pub every: u64,
    /// How many of the latest to keep; the best is kept besides.
    #[serde(default = "default_keep")]
    pub keep: usize,
}

fn default_keep() -> usize {
    2
}

impl Default for CheckpointSection {
    fn default() -> Self {
        Self { every: 0, keep: default_keep() }
    }
}

/// `[metrics]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricsSection {
    /// Also write TensorBoard event files.
    #[serde(default)]
    pub tensorboard: bool,
    /// Steps between lines of `metrics.jsonl`.
    #[serde(default = "one")]
    pub every: u64,
}

fn one() -> u64 {
    1
}

impl Default for MetricsSection {
    fn default() -> Self {
        Self { tensorboard: false, every: 1 }
    }
}

impl RunConfig {
    /// The run file's text, every key written out.
    ///
    /// # Errors
    /// [`Error::RunFile`] where a value cannot be written as TOML.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self)
            .map_err(|e| Error::RunFile { path: "run.toml".into(), why: format!("cannot be written: {e}") })
    }

    /// Threads that share a pass: those of the run file, else one per core.
    pub fn threads(&self) -> usize {
        self.training.threads.unwrap_or_else(crate::workers::available_threads)
    }

    /// How the gradients of a step that minimises `terms` are computed.
    pub(crate) fn passes<'a>(&self, terms: &'a [Term]) -> PassSettings<'a> {
        let TrainingSection { recompute, dtype, .. } = self.training;
        PassSettings { micro_batch: self.micro_batch_size(), recompute, terms, precision: dtype, loss_scale: 1.0 }
    }

    /// Sequences that a device has in a pass: a share of the batch, where several share it.
    pub(crate) fn rows_of_a_pass(&self) -> usize {
        self.micro_batch_size().min(self.training.batch_size / self.run.devices.len().max(1))
    }

    /// Sequences per forward and backward pass.
    pub fn micro_batch_size(&self) -> usize {
        self.training.micro_batch_size.unwrap_or(self.training.batch_size).min(self.training.batch_size)
    }
}

#[cfg(test)]
mod tests;
