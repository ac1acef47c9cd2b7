//! The run file: one TOML file is one whole run.

mod adapter;
mod check;
mod history;
mod load;
mod objective;
mod trainable;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

pub(crate) use check::at_least_one;
pub use history::EarlierPlan;
use lowkey_data::{Packing, dataset::TrainOn, sampler::TooLong};
use lowkey_kernels::Precision;
use lowkey_kernels::quantized_linear::Quantization;
use lowkey_model::{
    Recompute,
    adapter::AdapterConfig,
    config::ModelSection,
    objective::{EmbeddingNoise, Term},
    rope::RopeChange,
};
pub(crate) use objective::{Asked, OtherModel};
pub use objective::{LossTypes, ObjectiveSection};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};
pub(crate) use trainable::{Weights, flops_beside};

use crate::error::{Error, Result};
use crate::workers::PassSettings;

/// A run file: one TOML file is one whole run.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// The run's name, its seed and what it computes on.
    pub run: RunSection,
    /// A model to start from, for fine-tuning. It brings its own sizes, so that `[model]` must be left out. Absent: random weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<InitSection>,
    /// Low-rank matrices that are trained beside the frozen ones of the model of `[init]`. The keys are PEFT's. Absent: the model itself
    /// is trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterConfig>,
    /// The sizes of the model. The keys have the names that Hugging Face gives them. Needed unless `[init]` is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelSection>,
    /// What the model is trained on: exactly one of `dataset`, `path` and `mixture`.
    pub data: DataSection,
    /// How gradients change the weights.
    pub optimizer: OptimizerSection,
    /// How the learning rate changes during the run.
    #[serde(default)]
    pub lr_scheduler: SchedulerSection,
    /// How long the run is, what one step takes in, and how it is computed.
    pub training: TrainingSection,
    /// What is minimised, as `[[objective]]`. Absent: the loss on the next token.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub objective: Vec<ObjectiveSection>,
    /// When the model is measured on the held-out split, and texts that it writes then.
    #[serde(default)]
    pub eval: EvalSection,
    /// When the model is saved, and how many of these states are kept.
    #[serde(default)]
    pub checkpoint: CheckpointSection,
    /// What is recorded while the run goes.
    #[serde(default)]
    pub metrics: MetricsSection,
    /// How processes that share a run (`mpirun -n N lowkey train`) work together. No effect on a process by itself.
    #[serde(default, skip_serializing_if = "RanksSection::is_usual")]
    pub ranks: RanksSection,
    /// Earlier values of `training.steps`, if the run was made longer or shorter when it was resumed. Written by lowkey into the run's
    /// `run.toml`, so that this file trained anew gives the same weights; not meant to be written by hand.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<EarlierPlan>,
}

/// `[run]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RunSection {
    /// Name of the run: letters, digits, `-`, `_` and `.`. Its folder is `runs/NAME`.
    pub name: String,
    /// Seed of the random weights, of the order of the data and of the texts written at evaluations.
    #[serde(default)]
    pub seed: u64,
    /// What to compute on: `auto`, `cpu`, `wgpu`, `vulkan`, `metal` or `cuda`; the last four with `:1` for the second of their kind.
    /// `auto` takes the first GPU that this build can use, else the CPU.
    #[serde(default = "auto")]
    pub device: String,
    /// Several devices of one kind that share every batch, such as `["cuda:0", "cuda:1"]`. Instead of `device`, and `batch_size` must
    /// be a multiple of their number. Absent: `device` alone.
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
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InitSection {
    /// A Hugging Face model directory, such as a checkpoint. Weights, sizes and tokenizer are taken from it.
    pub from: PathBuf,
    /// The directory of an adapter to go on with, in PEFT's form, such as a checkpoint of a run with `[adapter]`. It brings its own keys,
    /// so that `[adapter]` must be left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<PathBuf>,
    /// Hold the frozen matrices of the model in few bits beside the run's adapter, new or gone on with (QLoRA, arXiv 2305.14314): all but
    /// `kv_b_proj`, the output head, and what is trained whole. They then take half of the memory of f32 (`bf16`), a quarter, or a
    /// seventh. The directory of an adapter does not record it. Absent: f32.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<Quantization>,
    /// Special tokens that the tokenizer is to have, such as `["[USER]", "[BOT]"]`, for templates and prompts. Those that it has
    /// not are added behind all others; their rows in the embedding and the output head begin as the mean of the rows that are there. With
    /// `[adapter]` both must stand in `modules_to_save`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub new_tokens: Vec<String>,
    /// Most tokens that the model is to read at once, at least `data.seq_len`. Absent: as the model says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16_777_216))]
    pub max_position_embeddings: Option<usize>,
    /// How positions are told, in place of what the model says, such as `{ rope_type = "yarn", factor = 4.0 }`. The original length is
    /// that of the model where it is not written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_parameters: Option<RopeChange>,
    /// The keys of `adapter`, once it has been opened.
    #[serde(skip)]
    pub(crate) keys: OnceLock<AdapterConfig>,
    /// Whether `quantization` stood in `[adapter]`.
    #[serde(skip)]
    pub(crate) packed_by_adapter: bool,
}

/// A dataset of a mixture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MixturePart {
    /// A dataset file (TOML); not that of a task.
    pub dataset: PathBuf,
    /// Its share of the training sequences is this number over the sum of all weights.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub weight: f64,
}

/// `[data]`: exactly one of `dataset`, `path` and `mixture`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DataSection {
    /// A dataset file (TOML).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dataset: Option<PathBuf>,
    /// A plain text file, read as bytes; its last tenth is held out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Several datasets in fixed shares, such as `[{ dataset = "a.toml", weight = 0.7 }, { dataset = "b.toml", weight = 0.3 }]`. They need
    /// the same tokenizer. Each is measured by itself; the held-out loss of all is the mean by weights.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mixture: Vec<MixturePart>,
    /// For datasets of records: the chat template, a built-in one by its name, or a file. Absent: as the dataset file says, else that of
    /// the model of `[init]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<String>,
    /// For datasets of records: which tokens are learnt. Absent: as the dataset file says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train_on: Option<TrainOn>,
    /// For datasets of records: what happens to one that is longer than a training sequence. It is counted and said. Absent: `drop`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub too_long: Option<TooLong>,
    /// Length of a training sequence, in tokens.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub seq_len: usize,
    /// How documents fill a sequence. Absent: `documents` if there are several, `stream` if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packing: Option<Packing>,
    /// Whether documents and prompts get the special tokens that the tokenizer puts around a text, such as `<s>`. Absent: as the
    /// dataset file says; if it says nothing they do, unless the model of `[init]` was trained without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub add_special_tokens: Option<bool>,
    /// Whether a token sees only its own document. With `false` it also sees those that stand before it in the sequence.
    #[serde(default = "yes")]
    pub mask_documents: bool,
}

impl DataSection {
    /// The dataset files, with the weight of each; none of a plain text file.
    pub fn dataset_files(&self) -> Vec<(&Path, f64)> {
        let one = self.dataset.iter().map(|dataset| (dataset.as_path(), 1.0));
        one.chain(self.mixture.iter().map(|part| (part.dataset.as_path(), part.weight))).collect()
    }
}

fn yes() -> bool {
    true
}

/// `[optimizer]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OptimizerSection {
    /// The optimiser.
    #[serde(default)]
    pub kind: OptimizerKind,
    /// The highest learning rate of the run, above 0.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub lr: f64,
    /// `kind = "muon"` alone: how much of its momentum stays from one step to the next, from 0 to below 1. Absent: 0.95.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub momentum: Option<f64>,
    /// AdamW's two decay rates, from 0 to below 1: of the mean of the gradient and of the mean of its square. With Muon they hold for
    /// the weights that are left to AdamW.
    #[serde(default = "default_betas", deserialize_with = "two")]
    #[schemars(extend("items" = { "type": "number", "minimum": 0, "exclusiveMaximum": 1 }))]
    pub betas: [f64; 2],
    /// A small number above 0 that keeps AdamW from dividing by zero.
    #[serde(default = "default_adam_eps")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub eps: f64,
    /// How much each step shrinks matrices: by this number times the learning rate. Norms and biases are left alone.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub weight_decay: f64,
    /// A gradient of all weights that is longer than this is shortened to it. Absent: gradients are taken as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub grad_clip: Option<f64>,
    /// What the learning rate of a layer is of the rate of the layer above it, above 0 and at most 1 (usual for fine-tuning: 0.8 to 0.95).
    /// Of L layers, counted from 0, layer i has this number to the power L − 1 − i as its share of the rate, the embedding one to the power
    /// L, also where it is the output head, too; an output head of its own and the last norm have the whole rate. Adapters have the rate
    /// of their layer. Absent: all have the whole rate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1), extend("exclusiveMinimum" = 0))]
    pub layer_lr_decay: Option<f64>,
    /// LoRA+ (arXiv 2402.12354): what the learning rate of an adapter's B is of the rate of its A, above 0 (the paper's usual: 16, with a
    /// lower rate for both). Absent: both have the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub loraplus_lr_ratio: Option<f64>,
}

fn default_betas() -> [f64; 2] {
    [0.9, 0.95]
}

/// Two numbers; of an array the parser would drop what is too much.
fn two<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<[f64; 2], D::Error> {
    let numbers = Vec::<f64>::deserialize(from)?;
    let len = numbers.len();
    numbers.try_into().map_err(|_| D::Error::invalid_length(len, &"an array of length 2"))
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SchedulerSection {
    /// What the learning rate does after the warm-up.
    #[serde(default)]
    pub kind: SchedulerKind,
    /// Steps over which the learning rate rises to `optimizer.lr`; at most `training.steps`.
    #[serde(default)]
    pub warmup_steps: u64,
    /// `kind = "wsd"` alone: the share of all steps, at the end, over which the learning rate falls.
    #[serde(default = "default_decay_fraction")]
    #[schemars(range(min = 0, max = 1))]
    pub decay_fraction: f64,
    /// The last learning rate as a share of `optimizer.lr`. No effect with `kind = "constant"`.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1))]
    pub min_lr_ratio: f64,
}

fn default_decay_fraction() -> f64 {
    0.2
}

impl Default for SchedulerSection {
    fn default() -> Self {
        Self {
            kind: SchedulerKind::Constant,
            warmup_steps: 0,
            decay_fraction: default_decay_fraction(),
            min_lr_ratio: 0.0,
        }
    }
}

/// Shapes of the learning rate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SchedulerKind {
    /// It stays at `optimizer.lr`.
    #[default]
    Constant,
    /// It falls along a straight line to `min_lr_ratio`.
    Linear,
    /// It falls along half a cosine to `min_lr_ratio` (arXiv 1608.03983).
    Cosine,
    /// Warm-up, stable, decay (arXiv 2404.06395): it stays, then falls along a straight line to `min_lr_ratio` over the last
    /// `decay_fraction` of the steps.
    Wsd,
}

/// `[training]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainingSection {
    /// Number of optimiser steps.
    #[schemars(range(min = 1, max = 1_099_511_627_776_u64))]
    pub steps: u64,
    /// Sequences in one optimiser step. `batch_size` times `data.seq_len` may be at most 67108864 tokens.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub batch_size: usize,
    /// Sequences in one forward and backward pass. If smaller than `batch_size`, a step sums the gradients of several passes: less
    /// memory, the same step. Absent: `batch_size`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_048_576))]
    pub micro_batch_size: Option<usize>,
    /// What the backward pass computes again instead of keeping it, to save memory.
    #[serde(default)]
    pub recompute: Recompute,
    /// Factor on the squared log-partition, added to the loss that is minimised but not to the one that is reported (PaLM, arXiv
    /// 2204.02311, section 5; usual: 1e-4). 0: nothing is added. Must be 0 for tasks of vectors.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1))]
    pub z_loss: f64,
    /// With `[model.elastic]` alone: the share of a narrower rank's loss that is its distance to what the whole width predicts; the rest
    /// is its distance to the text. No effect on tasks of vectors.
    #[serde(default = "default_distillation")]
    #[schemars(range(min = 0, max = 1))]
    pub distillation: f64,
    /// With `[model.elastic]` alone: the share of all steps, at the beginning, that train the whole width alone before the narrower
    /// ranks join.
    #[serde(default = "default_elastic_start")]
    #[schemars(range(min = 0, max = 1))]
    pub elastic_start: f64,
    /// Names of the tensors that are trained, as patterns with `*`, such as `["*norm.weight"]`. The others are frozen: they keep their
    /// values and cost no gradient, no memory of the optimiser and no place on disk for it. Absent: all are trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub trainable: Option<Vec<String>>,
    /// Noise on the embeddings of training sequences, which makes fine-tuned models answer less by heart (NEFTune, arXiv 2310.05914;
    /// usual: 5 to 15): each number gets an even one between −α/√(L·d) and α/√(L·d), where d is `hidden_size` and L the length of the
    /// document or record, also where several share a sequence (with `data.mask_documents = false` it is `data.seq_len`). Nothing that is
    /// measured or written has any; the training loss is that of the noisy pass. Absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub neftune_noise_alpha: Option<f64>,
    /// Keep a moving average of what is trained: after each step it is moved to the new weights by 1 less this number, which is above 0
    /// and below 1 (usual: 0.99 to 0.9999). After step t no more than (1 + t)/(10 + t) of it stays, so that it soon forgets the weights
    /// that the run began with. Evaluations tell the loss of both; checkpoints hold the averaged model in their folder `ema`, a model
    /// directory like any other. `best`, `eval.patience` and samples go by the weights themselves. Absent: no average is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0, "exclusiveMaximum" = 1))]
    pub ema_decay: Option<f64>,
    /// What products with weights are computed in, and of an attention where the device has units for it; `tf32` and `f16` on a GPU alone, `bf16` also on CPUs that have instructions for it (AMX,
    /// AVX512-BF16). Weights, gradients, norms, softmax, loss and evaluation are f32 in any case.
    #[serde(default)]
    pub dtype: Precision,
    /// Let a CPU without such instructions compute in `bf16` all the same: with the same rounding, and slower than in `f32`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub emulate_dtype: bool,
    /// Threads of the CPU that share a pass. Sums are taken in an order that depends on their number, so that other numbers give
    /// other last bits. Absent: one per core.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1024))]
    pub threads: Option<usize>,
}

fn default_distillation() -> f64 {
    0.5
}

fn default_elastic_start() -> f64 {
    0.3
}

/// `[eval]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EvalSection {
    /// Steps from one evaluation to the next. 0: only at the end.
    #[serde(default)]
    pub every: u64,
    /// Batches of the held-out split that an evaluation measures, always the same ones. The last evaluation of a run measures the whole
    /// split.
    #[serde(default = "default_eval_batches")]
    #[schemars(range(min = 1))]
    pub batches: usize,
    /// End the run after so many evaluations without a lower held-out loss than the lowest (early stopping). Absent: all steps are taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub patience: Option<u64>,
    /// Texts that the model continues at each evaluation. Tasks take none.
    #[serde(default)]
    pub prompts: Vec<String>,
    /// Messages of a user that the model answers at each evaluation, each put into the chat template that the data are written in, or
    /// that the model of `[init]` brings. An answer ends with what ends a turn. Tasks take none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub chat: Vec<String>,
    /// Length of a continuation or answer at most, in tokens.
    #[serde(default = "default_sample_tokens")]
    #[schemars(range(min = 1, max = 1_048_576))]
    pub sample_tokens: usize,
    /// Temperature of continuations and answers: 0 takes the most likely token each time, more is more varied.
    #[serde(default = "default_temperature")]
    #[schemars(range(min = 0))]
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
            patience: None,
            batches: default_eval_batches(),
            prompts: Vec::new(),
            chat: Vec::new(),
            sample_tokens: default_sample_tokens(),
            temperature: default_temperature(),
        }
    }
}

/// `[checkpoint]`
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointSection {
    /// Steps from one checkpoint to the next. 0: only at the end.
    #[serde(default)]
    pub every: u64,
    /// How many of the latest checkpoints to keep. The best one is kept besides.
    #[serde(default = "default_keep")]
    #[schemars(range(min = 1))]
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
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MetricsSection {
    /// Whether to write event files for TensorBoard as well, into the run's folder `tensorboard`.
    #[serde(default)]
    pub tensorboard: bool,
    /// Steps from one line of `metrics.jsonl` to the next.
    #[serde(default = "one")]
    #[schemars(range(min = 1))]
    pub every: u64,
}

fn one() -> u64 {
    1
}

impl Default for MetricsSection {
    fn default() -> Self {
        Self { tensorboard: false, every: one() }
    }
}

/// `[ranks]`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RanksSection {
    /// How the gradients of all ranks become one.
    #[serde(default)]
    pub sum: RankSum,
    /// What the gradients of GPUs travel through, where MPI has started the ranks. Those that `torchrun` has started have NCCL alone.
    #[serde(default)]
    pub transport: RankTransport,
    /// 1: the optimiser's memory is divided among the ranks (ZeRO's first stage, arXiv 1910.02054); each of them updates its part of the
    /// parameters and sends it to the others. The same bits and the same checkpoints for less memory, and half as much more to send in
    /// a step. 0: each rank has all of it.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1))]
    pub zero: u8,
    /// Seconds that ranks wait for one that does not answer, once the steps have begun; then it is named and all end. Longer than the
    /// longest that rank 0 writes or samples at once.
    #[serde(default = "default_patience_s")]
    #[schemars(range(min = 1, max = 86_400))]
    pub patience_s: u64,
}

fn default_patience_s() -> u64 {
    1800
}

impl Default for RanksSection {
    fn default() -> Self {
        Self { sum: RankSum::default(), transport: RankTransport::default(), zero: 0, patience_s: default_patience_s() }
    }
}

impl RanksSection {
    /// Whether it says nothing that is not so without it.
    pub(crate) fn is_usual(&self) -> bool {
        *self == Self::default()
    }
}

/// Ways to add up the gradients of all ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RankSum {
    /// In the order of the ranks, each of which adds up a part: n ranks then give the bits of one process that takes a step in n passes.
    #[default]
    Ordered,
    /// As `MPI_Allreduce` of the MPI at hand or NCCL does it, in an order of its own: other last bits, also from one machine to another.
    /// Fewer than four ranks of MPI do it as `ordered`, which sends no more and uses both ways of a link at once.
    Fastest,
}

/// What the gradients of ranks travel through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RankTransport {
    /// MPI, through the memory of the hosts.
    #[default]
    Mpi,
    /// NCCL, from GPU to GPU: NVIDIA's, one for each rank, in a build with `--features cuda,mpi`. The same bits.
    Nccl,
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

    /// How the gradients of step `step`, counted from 0, are computed, which minimises `terms`.
    pub(crate) fn passes<'a>(&self, terms: &'a [Term], step: u64) -> PassSettings<'a> {
        let TrainingSection { recompute, dtype, neftune_noise_alpha, .. } = self.training;
        let seed = self.run.seed;
        PassSettings {
            micro_batch: self.micro_batch_size(),
            recompute,
            terms,
            precision: dtype,
            loss_scale: 1.0,
            seed,
            step,
            noise: neftune_noise_alpha.map(|alpha| EmbeddingNoise { alpha, seed, step, first_row: 0 }),
            other: None,
        }
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
