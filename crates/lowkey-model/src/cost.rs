//! What a configuration costs, before a byte is allocated: parameters, FLOPs and cache bytes.

use crate::attention::AttentionSizes;
use crate::config::ModelConfig;
pub use crate::decode_cost::{AttentionCost, DecodeCosts};
use crate::gradients::Recompute;
use crate::layer_config::{LayerConfig, MlpConfig};

/// Parameter counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParameterCount {
    /// All parameters; a tied head counts once.
    pub total: usize,
    /// Without the embedding and the output head.
    pub blocks: usize,
    /// Of the attentions alone.
    pub attention: usize,
}

/// What a run of training does, as far as its memory depends on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Training {
    /// Sequences of a pass.
    pub micro_batch: usize,
    /// Their length.
    pub seq: usize,
    /// Threads that share a pass.
    pub threads: usize,
    /// What the backward pass computes again.
    pub recompute: Recompute,
    /// Sequences that each thread evaluates at a time.
    pub evaluated: usize,
    /// The most that a step minimises.
    pub terms: usize,
    /// Numbers of the model that are not trained: no gradient is formed of them, and the optimiser keeps nothing for them.
    pub frozen: usize,
    /// Numbers of adapters, which are trained beside those of the model.
    pub added: usize,
    /// Whether an average of what is trained is kept.
    pub averaged: bool,
}

/// What a cache stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheWidth {
    /// Numbers per token and layer with full keys and values: H(N+R+V), or 2·G·D.
    pub expanded: usize,
    /// Numbers per token and layer of the latent cache: L+R, where nothing was cut. Without MLA the same as `expanded`.
    pub latent: usize,
}

impl ModelConfig {
    fn attention_sizes(&self) -> AttentionSizes {
        self.attention().sizes(self.hidden_size, self.num_attention_heads)
    }

    /// Counts parameters.
    pub fn parameter_count(&self) -> ParameterCount {
        let d = self.hidden_size;
        let attention: usize = self.layers.iter().map(|layer| self.attention_parameters(layer)).sum();
        let rest = |LayerConfig { mlp, .. }: &LayerConfig| mlp.matrices(d) + mlp.biases(d) + 2 * d;
        let blocks = attention + self.layers.iter().map(rest).sum::<usize>() + d;
        let tables = self.vocab_size * d * if self.tie_word_embeddings { 1 } else { 2 };
        ParameterCount { total: blocks + tables, blocks, attention }
    }

    /// Of one layer's attention, without the columns of `kv_b_proj` that are not there because its latent was cut.
    fn attention_parameters(&self, layer: &LayerConfig) -> usize {
        let heads = self.num_attention_heads;
        let sizes = layer.attention.sizes(self.hidden_size, heads);
        let cut = layer
            .attention
            .latent()
            .map_or(0, |mla| (mla.kv_lora_rank - mla.kv_rank()) * heads * (mla.qk_nope_head_dim + mla.v_head_dim));
        sizes.matrices + sizes.vectors - cut
    }

    /// Floating-point operations of one training pass over one token at sequence length `seq`: forward and backward (3×) of every
    /// matrix product, the output head included, two operations per multiply-add. Attention counts `seq` keys per query, although
    /// the causal half is masked: the convention of published MFU figures (PaLM, arXiv 2204.02311, appendix B).
    ///
    /// How many passes a step takes is the run's to say: where prefixes of the latent are trained, too, each of theirs counts as
    /// much as the whole width's.
    pub fn pass_flops_per_token(&self, seq: usize) -> f64 {
        6.0 * (self.matrix_weights() + self.attention_products(seq)) as f64
    }

    /// The same with only the half of the attention that causality leaves: each of `seq` queries sees (seq + 1)/2 keys on
    /// average, counted as seq/2. What a kernel that skips the masked half has to compute, and what measurements of speed are
    /// reported in; [`ModelConfig::pass_flops_per_token`] counts the full square and is larger.
    pub fn causal_pass_flops_per_token(&self, seq: usize) -> f64 {
        6.0 * (self.matrix_weights() as f64 + self.attention_products(seq) as f64 / 2.0)
    }

    /// Floating-point operations of one forward pass per token at `context` keys.
    pub fn forward_flops_per_token(&self, context: usize) -> f64 {
        2.0 * (self.matrix_weights() + self.attention_products(context)) as f64
    }

    /// Weights that take part in a matrix product once per token: neither norms nor biases, nor an embedding that is only
    /// looked up.
    pub fn matrix_weights(&self) -> usize {
        self.parameter_count().blocks - self.vector_weights() + self.vocab_size * self.hidden_size
    }

    /// Parameters of norms and biases.
    fn vector_weights(&self) -> usize {
        let d = self.hidden_size;
        self.layers.len() * (self.attention_sizes().vectors + self.mlp().biases(d) + 2 * d) + d
    }

    /// Multiply-adds per token between one query and `keys` keys, all layers and heads, expanded form.
    fn attention_products(&self, keys: usize) -> usize {
        self.layers.len() * self.attention_sizes().pair * keys
    }

    /// Numbers per token and layer that a cache stores.
    pub fn cache_width(&self) -> CacheWidth {
        let sizes = self.attention_sizes();
        CacheWidth { expanded: sizes.expanded, latent: sizes.cached }
    }

    /// Numbers per token that a cache stores for all layers together: Σ(r + R) over layers, of whose latents r ≤ L are kept.
    pub fn cache_numbers(&self) -> usize {
        let buffers = self.layers.iter().flat_map(|layer| layer.attention.cache_buffers());
        buffers.map(|buffer| buffer.heads * buffer.width).sum()
    }

    /// Bytes of the largest single f32 tensor of training: a matrix of weights, or the widest activation of one micro-batch.
    pub fn largest_tensor_bytes(&self, micro_batch: usize, seq: usize) -> usize {
        let f = self.mlp().intermediate_size;
        let widest = self.hidden_size.max(f).max(self.attention_sizes().widest);
        let rows = self.vocab_size.max(f);
        let numbers = (rows * self.hidden_size).max(micro_batch.saturating_mul(seq).saturating_mul(widest));
        numbers.saturating_mul(4)
    }

    /// Estimated peak bytes of f32 training, as the system counts them.
    ///
    /// The process; weights; two moments of what is trained; and the most of three that follow on each other, so that the memory of one
    /// is used by the next: what layers keep for the backward pass of a micro-batch, the gradients of each thread, and the widest layer of
    /// an evaluation. The factors are fitted to runs of 0.03 to 32 million parameters, all trained, whose peaks they give to within 10 %.
    pub fn train_bytes(&self, training: Training) -> usize {
        let Training { micro_batch, seq, threads, recompute, evaluated, terms, frozen, added, averaged } = training;
        const MIB: f64 = (1u64 << 20) as f64;
        const PROCESS: f64 = 32.0 * MIB;
        /// Its stack, blocks of logits and scores.
        const THREAD: f64 = 15.0 * MIB;
        const MOMENTS: f64 = 2.2;
        /// More of them where a step has several terms, and the gradients of their passes meet.
        const PASSES: f64 = 1.2;
        const KEPT: f64 = 0.94;
        /// What is kept where nothing but norms is trained, of what is kept otherwise: of a map whose matrix is frozen, and has nothing
        /// beside it, the backward pass reads no input.
        const FROZEN: f64 = 0.6;
        const EVALUATED: f64 = 0.5;
        // The stream before each half; gate and up.
        let MlpConfig { intermediate_size: f, bias } = *self.mlp();
        let block = self.attention_sizes().kept + 2 * self.hidden_size + 2 * f;
        // With biases the steps of the feed-forward layer run one by one, and each keeps its arguments.
        let block = block + if bias { 3 * f } else { 0 };
        let kept = match recompute {
            Recompute::None => self.layers.len() * block,
            Recompute::Block => self.layers.len() * self.hidden_size + block,
        };
        // What one layer needs while it runs: keys and values or an inner activation, with gradients.
        let passing = 3 * f + 4 * self.hidden_size;
        let (threads, computing) = (threads as f64, threads.min(micro_batch) as f64);
        let total = self.parameter_count().total;
        let parameters = 4.0 * (total + added) as f64;
        let trained = 4.0 * (total.saturating_sub(frozen) + added) as f64;
        let learning = if added > 0 { 1.0 } else { trained / parameters };
        let kept = (FROZEN + (1.0 - FROZEN) * learning) * kept as f64;
        let activations = 4.0 * micro_batch as f64 * seq as f64 * (kept + passing as f64);
        let evaluation = 4.0 * threads * evaluated as f64 * seq as f64 * passing as f64;
        let passes = if terms > 1 { PASSES * computing } else { 0.0 };
        let most = (KEPT * activations).max(computing * trained).max(EVALUATED * evaluation);
        let moments = MOMENTS + passes + if averaged { 1.0 } else { 0.0 };
        // What is more than a machine can address becomes the largest number there is.
        (PROCESS + THREAD * threads + parameters + moments * trained + most) as usize
    }
}

#[cfg(test)]
mod tests;
