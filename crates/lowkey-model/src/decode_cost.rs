//! What a decoded token costs in one layer's attention, in each of the forms.

use crate::config::{AttentionConfig, MlaConfig, ModelConfig};

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
    /// MLA with W_UKᵀ·W_UQ and W_O·W_UV multiplied out.
    pub fused: Option<AttentionCost>,
}

impl ModelConfig {
    /// What a token costs in the attention of layer `layer` with `context` tokens in the cache, at batch 1.
    pub fn decode_costs(&self, layer: usize, context: usize) -> DecodeCosts {
        match &self.attention {
            AttentionConfig::Mla(mla) => mla.decode_costs(self, layer, context),
            AttentionConfig::Grouped(g) => {
                let (d, heads) = (self.hidden_size, self.num_attention_heads);
                let weights = 2 * d * g.head_dim * (heads + g.num_key_value_heads);
                let cached = context * 2 * g.num_key_value_heads * g.head_dim;
                let products = weights + context * 2 * heads * g.head_dim;
                let expanded = AttentionCost { weights, cached, rebuilt: 0, products };
                DecodeCosts { expanded, absorbed: None, fused: None }
            }
        }
    }
}

impl MlaConfig {
    fn decode_costs(&self, config: &ModelConfig, layer: usize, context: usize) -> DecodeCosts {
        let (d, heads) = (config.hidden_size, config.num_attention_heads);
        let (nope, rope, value, whole) =
            (self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim, self.kv_lora_rank);
        let rank = self.kv_cache_ranks.as_ref().and_then(|ranks| ranks.get(layer)).copied().unwrap_or(whole);
        // What every form does: the latent, the shared key and the query latent.
        let shared = d * (whole + rope) + self.q_lora_rank.map_or(0, |q| d * q);
        let width = self.q_lora_rank.unwrap_or(d);
        let up = rank * heads * (nope + value);
        let split = shared + width * heads * (nope + rope) + up + heads * value * d;
        let fused = shared + width * heads * (rank + rope) + heads * rank * d;
        let keys_and_values = heads * (nope + rope + value);
        let cached = context * (rank + rope);
        let in_latent_space = |weights: usize| AttentionCost {
            weights,
            cached,
            rebuilt: 0,
            products: weights + context * heads * (2 * rank + rope),
        };
        DecodeCosts {
            expanded: AttentionCost {
                weights: split,
                cached,
                rebuilt: context * keys_and_values,
                // W_UK and W_UV meet every cached token, the new one among them.
                products: split - up + context * (up + keys_and_values),
            },
            absorbed: Some(in_latent_space(split)),
            fused: Some(in_latent_space(fused)),
        }
    }
}
