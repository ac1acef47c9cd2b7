//! The sizes of an attention, whatever its kind: what is cached, counted and multiplied.

use super::{GroupedConfig, MlaConfig};

/// The attention of a block, with its sizes.
#[derive(Clone, Debug, PartialEq)]
pub enum AttentionConfig {
    /// Multi-head Latent Attention.
    Mla(MlaConfig),
    /// MHA, GQA or MQA: what differs is the number of key and value heads.
    Grouped(GroupedConfig),
}

/// What one layer's attention is made of, in numbers: the terms of the counts of parameters, operations and memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AttentionSizes {
    /// Parameters of matrices.
    pub(crate) matrices: usize,
    /// Parameters of norms and biases.
    pub(crate) vectors: usize,
    /// Multiply-adds between one query and one key, of all heads, expanded form.
    pub(crate) pair: usize,
    /// Numbers that a cache of full keys and values stores per token.
    pub(crate) expanded: usize,
    /// Numbers that the cache stores per token, before any cut.
    pub(crate) cached: usize,
    /// Numbers per token of its widest activation.
    pub(crate) widest: usize,
    /// Numbers per token that a backward pass needs of the forward pass.
    pub(crate) kept: usize,
}

/// One buffer of a layer's cache: `heads` vectors of `width` numbers per token, of which the first `split` are scaled apart from the
/// rest where numbers are stored in eight bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheBuffer {
    /// Vectors per token.
    pub heads: usize,
    /// Numbers of each.
    pub width: usize,
    /// Those that share the first scale.
    pub split: usize,
}

impl AttentionConfig {
    /// The sizes of latent attention, where it is one.
    pub fn latent(&self) -> Option<&MlaConfig> {
        match self {
            Self::Mla(mla) => Some(mla),
            Self::Grouped(_) => None,
        }
    }

    /// [`AttentionConfig::latent`], to be changed.
    pub fn latent_mut(&mut self) -> Option<&mut MlaConfig> {
        match self {
            Self::Mla(mla) => Some(mla),
            Self::Grouped(_) => None,
        }
    }

    /// Whether it has a fused form ([`FusedMla`](super::FusedMla)).
    pub fn fuses(&self) -> bool {
        self.latent().is_some_and(MlaConfig::fuses)
    }

    /// The buffers of a layer's cache, in the order in which they are appended to.
    pub fn cache_buffers(&self) -> Vec<CacheBuffer> {
        match self {
            Self::Mla(mla) => mla.cache_buffers(),
            Self::Grouped(grouped) => grouped.cache_buffers(),
        }
    }

    /// Of `heads` query heads in a stream of width `d`.
    pub(crate) fn sizes(&self, d: usize, heads: usize) -> AttentionSizes {
        match self {
            Self::Mla(mla) => mla.sizes(d, heads),
            Self::Grouped(grouped) => grouped.sizes(d, heads),
        }
    }
}
