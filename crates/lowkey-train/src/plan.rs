//! What a run will cost, said before it starts.

mod ranks;

use lowkey_model::{
    ModelConfig, Recompute,
    cost::{ParameterCount, Training},
};
use serde::Serialize;

use crate::passes::Passes;
use crate::run_config::{RunConfig, Weights};
pub use ranks::{Link, RanksPlan};

/// The figures of a run, from the configuration alone but for the measured matrix-product rate.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// `MLA`, `MHA`, `GQA-2`, `MQA`.
    pub attention: String,
    /// All parameters.
    pub parameters: usize,
    /// Without embedding and output head.
    pub block_parameters: usize,
    /// Of the attentions alone.
    pub attention_parameters: usize,
    /// Floating-point operations to train on one token, at all widths that a step trains, as a mean over the steps of the run.
    pub train_flops_per_token: f64,
    /// Bytes per cached token in bf16 with full keys and values.
    pub cache_bytes_expanded: usize,
    /// Bytes per cached token in bf16 as the attention allows: the latent for MLA.
    pub cache_bytes_latent: usize,
    /// Tokens per optimiser step.
    pub tokens_per_step: usize,
    /// Tokens of the whole run.
    pub tokens: u64,
    /// Estimated peak memory of training.
    pub train_bytes: usize,
    /// Floating-point operations of the whole run.
    pub flops: f64,
    /// Measured matrix-product rate of this machine, operations per second.
    pub matmul_flops_per_s: f64,
    /// Estimated duration at [`EXPECTED_MFU`] of that rate.
    pub seconds: f64,
}

/// The fraction of the matrix-product rate that a training run reaches, for the estimate of its duration.
pub const EXPECTED_MFU: f64 = 0.65;

/// Bytes of a number in a bf16 cache.
const CACHE_BYTES: usize = 2;

impl Plan {
    /// The plan of a run with the given model.
    pub fn new(config: &RunConfig, model: &ModelConfig, matmul_flops_per_s: f64) -> Self {
        let ParameterCount { total, blocks, attention } = model.parameter_count();
        let expanded = model.cache_width().expanded;
        let seq = config.data.seq_len;
        let tokens_per_step = config.training.batch_size * seq;
        let tokens = config.training.steps.saturating_mul(tokens_per_step as u64);
        let passes = Passes::new(config, model);
        let flops = passes.flops();
        Self {
            attention: model.attention_name(),
            parameters: total,
            block_parameters: blocks,
            attention_parameters: attention,
            train_flops_per_token: passes.mean_flops_per_token(),
            cache_bytes_expanded: expanded * model.layers.len() * CACHE_BYTES,
            cache_bytes_latent: model.cache_numbers() * CACHE_BYTES,
            tokens_per_step,
            tokens,
            train_bytes: train_bytes(config, model, config.threads()),
            flops,
            matmul_flops_per_s,
            seconds: flops / (matmul_flops_per_s * EXPECTED_MFU),
        }
    }
}

/// Estimated peak bytes of a run on `threads` threads of one device.
pub(crate) fn train_bytes(config: &RunConfig, model: &ModelConfig, threads: usize) -> usize {
    let Weights { frozen, added, spared } = config.weights(model);
    let training = Training {
        micro_batch: config.rows_of_a_pass(),
        seq: config.data.seq_len,
        threads,
        recompute: config.training.recompute,
        evaluated: config.micro_batch_size(),
        terms: Passes::new(config, model).most_terms(),
        frozen,
        added,
        averaged: config.training.ema_decay.is_some(),
    };
    // What the attention of each layer gives, of the other model and, unless it is computed again, of this one.
    let outputs = match (config.learns_attention(), config.training.recompute) {
        (false, _) => 0,
        (true, Recompute::Block) => 1,
        (true, Recompute::None) => 2,
    };
    let tokens = config.rows_of_a_pass() * config.data.seq_len;
    let outputs = outputs * model.layers.len() * model.hidden_size * tokens * size_of::<f32>();
    (model.train_bytes(training) + config.other_bytes() + outputs).saturating_sub(spared)
}
