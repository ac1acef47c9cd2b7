//! The models that are measured.

use lowkey_model::{
    ModelConfig,
    config::{AttentionKind, ModelSection},
};

use crate::error::{Error, Result};

/// An MLA model with its usual batch. Embedding and output head are not tied; queries are not compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Its name.
    pub name: &'static str,
    /// Width d of the residual stream.
    pub hidden: usize,
    /// Decoder blocks.
    pub layers: usize,
    /// Query heads H.
    pub heads: usize,
    /// Width L of the latent.
    pub rank: usize,
    /// Per-head key width N without position.
    pub nope: usize,
    /// Width R of the shared rotated key.
    pub rope: usize,
    /// Per-head value width V.
    pub value: usize,
    /// Width of the feed-forward layer.
    pub feed_forward: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Sequences per step, unless asked for otherwise.
    pub batch: usize,
    /// Tokens per sequence, unless asked for otherwise.
    pub seq: usize,
}

impl Shape {
    /// The shapes, smallest first.
    #[rustfmt::skip]
    pub const ALL: [Self; 4] = [
        Self { name: "d256", hidden: 256, layers: 6, heads: 8, rank: 64, nope: 32, rope: 16, value: 32, feed_forward: 704,
            vocab: 4096, batch: 8, seq: 256 },
        Self { name: "d512", hidden: 512, layers: 8, heads: 16, rank: 128, nope: 32, rope: 16, value: 32, feed_forward: 1408,
            vocab: 4096, batch: 4, seq: 512 },
        Self { name: "d768", hidden: 768, layers: 12, heads: 12, rank: 256, nope: 48, rope: 16, value: 64, feed_forward: 2048,
            vocab: 50304, batch: 16, seq: 1024 },
        Self { name: "d1536", hidden: 1536, layers: 24, heads: 24, rank: 384, nope: 48, rope: 16, value: 64, feed_forward: 4096,
            vocab: 50304, batch: 8, seq: 2048 },
    ];

    /// The shape of that name.
    ///
    /// # Errors
    /// [`Error::Config`] with the names that there are.
    pub fn named(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|shape| shape.name == name).ok_or_else(|| {
            let known: Vec<&str> = Self::ALL.iter().map(|shape| shape.name).collect();
            Error::config("shape", format!("{name:?}"), format!("known are {}", known.join(", ")))
        })
    }

    /// Its configuration for sequences of up to `positions` tokens.
    ///
    /// # Errors
    /// [`Error::Model`] where `positions` is out of range.
    pub fn config(&self, positions: usize) -> Result<ModelConfig> {
        let section = ModelSection {
            vocab_size: Some(self.vocab),
            max_position_embeddings: Some(positions),
            kv_lora_rank: Some(self.rank),
            qk_nope_head_dim: Some(self.nope),
            qk_rope_head_dim: Some(self.rope),
            v_head_dim: Some(self.value),
            // The convention that takes fewest instructions elsewhere, so that no comparison is about the other one.
            rope_interleave: false,
            initializer_range: Some(0.02),
            ..ModelSection::new(AttentionKind::Mla, self.layers, [self.hidden, self.heads, self.feed_forward])
        };
        Ok(section.resolve(self.vocab, positions)?.0)
    }
}
