//! What a decoded token costs in one layer's attention, in each of the forms.

use crate::attention::AttentionConfig;
use crate::config::ModelConfig;

/// What one token takes of one layer's attention, with a context in the cache. Numbers, not bytes: weights and cache may differ in
/// format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionCost {
    /// Weights of matrices that are read, and in all but the expanded form multiplied once.
    pub weights: usize,
    /// Cached numbers that are read.
    pub cached: usize,
    /// Keys and values that are made of the cached latents, for this token alone, and then read.
    pub rebuilt: usize,
    /// Multiply-adds.
    pub products: usize,
}

/// The costs in the forms that an attention has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeCosts {
    /// With keys and values of every head: those that MHA, GQA and MQA cache, or those that are rebuilt from the latents.
    pub expanded: AttentionCost,
    /// MLA with queries mapped into the latent space.
    pub absorbed: Option<AttentionCost>,
    /// MLA with W_UKᵀ·W_UQ and W_O·W_UV multiplied out, where they can be.
    pub fused: Option<AttentionCost>,
}

impl ModelConfig {
    /// What a token costs in the attention of layer `layer` with `context` tokens in the cache, at batch 1.
    ///
    /// # Panics
    /// Where there is no such layer.
    pub fn decode_costs(&self, layer: usize, context: usize) -> DecodeCosts {
        let (d, heads) = (self.hidden_size, self.num_attention_heads);
        match &self.layers[layer].attention {
            AttentionConfig::Mla(mla) => mla.decode_costs(d, heads, context),
            AttentionConfig::Grouped(grouped) => grouped.decode_costs(d, heads, context),
        }
    }
}
