//! Attention behind one face: what a block, a cache or a report asks of it, whatever its kind.
//!
//! A new kind of attention is a file beside `mla.rs` and `grouped.rs`, a variant here and one in [`AttentionConfig`], and its keys.

mod config;
mod fused;
mod grouped;
mod mla;

use burn::module::Module;
use burn::tensor::Tensor;
use lowkey_kernels::add_linear;

pub(crate) use config::AttentionSizes;
pub use config::{AttentionConfig, CacheBuffer};
pub use fused::{FACTORS, FusedMla};
pub use grouped::{Grouped, GroupedConfig, GroupedDims};
pub use lowkey_kernels::MlaDims;
pub use lowkey_kernels::cache::{Mask, Stored};
pub use mla::{LATENT_NORM_EPS, Latent, Mla, MlaConfig};

use crate::config::ModelConfig;
use crate::context::{Context, Trace};
use crate::input::Input;
use crate::layers::{Builder, Linear};
use crate::rope::RopeTable;

/// The attention of a block.
#[derive(Module, Debug)]
#[expect(clippy::large_enum_variant, reason = "one per layer; a box would stand between every use and the tensors")]
pub enum Attention {
    /// Multi-head Latent Attention.
    Mla(Mla),
    /// Multi-head, grouped-query or multi-query attention.
    Grouped(Grouped),
}

/// What the queries of a chunk see.
pub enum Seen<'a> {
    /// Whole rows: a query sees the keys of its document up to its own. The form for training.
    Rows(&'a Context),
    /// The same of what a cache of fewer bits would have kept: the function gives each vector, along the last axis, as it would come
    /// back. Documents are not told apart.
    Rounded(&'a Context, &'a dyn Fn(Tensor<4>) -> Tensor<4>),
    /// All that a cache holds, this chunk included.
    Cache(Cached<'a>),
}

/// A cache as attention uses it.
pub struct Cached<'a> {
    /// Cosines and sines of the chunk's positions.
    pub rope: &'a RopeTable,
    /// Appends `[batch, heads, seq, width]` to the layer's buffer of that number, and gives all that now lies there, in the format
    /// that it is stored in. [`AttentionConfig::cache_buffers`] says which buffers there are.
    pub append: &'a mut dyn FnMut(usize, Tensor<4>) -> Stored<4>,
    /// Tokens of each row before the chunk.
    pub offsets: &'a [usize],
    /// Which pairs of query and key are forbidden; made where a way asks for it.
    pub mask: &'a dyn Fn() -> Mask,
    /// How latent attention is computed; other kinds know one way only.
    pub way: Way<'a>,
}

/// The ways to compute one latent attention over a cache. All give the same numbers, to rounding.
#[derive(Clone, Copy, Debug)]
pub enum Way<'a> {
    /// Keys and values of every head are rebuilt from the latents.
    Expanded,
    /// Queries are mapped into the latent space and attend there.
    Absorbed,
    /// As absorbed, with the maps into the latent space and out of it multiplied into the weights around them.
    Fused(&'a FusedMla),
}

/// What an attention hands to its output map.
pub(crate) struct Heads<'a> {
    /// `[batch, seq, H·V]`, of the fused way sums of latents, `[batch, seq, H·L]`.
    pub values: Tensor<3>,
    /// Of the fused way the weights that the values are for, in place of W_O.
    fused: Option<&'a FusedMla>,
}

impl From<Tensor<3>> for Heads<'_> {
    fn from(values: Tensor<3>) -> Self {
        Self { values, fused: None }
    }
}

impl Attention {
    pub(crate) fn build(b: &mut Builder, name: &str, config: &ModelConfig, attention: &AttentionConfig) -> Self {
        match attention {
            AttentionConfig::Mla(mla) => Self::Mla(Mla::build(b, name, config, mla)),
            AttentionConfig::Grouped(grouped) => Self::Grouped(Grouped::build(b, name, config, grouped)),
        }
    }

    /// The latent attention, where it is one.
    pub fn latent(&self) -> Option<&Mla> {
        match self {
            Self::Mla(mla) => Some(mla),
            Self::Grouped(_) => None,
        }
    }

    /// [`Attention::latent`], to be changed.
    pub fn latent_mut(&mut self) -> Option<&mut Mla> {
        match self {
            Self::Mla(mla) => Some(mla),
            Self::Grouped(_) => None,
        }
    }

    /// W_O.
    pub fn o_proj(&self) -> &Linear {
        match self {
            Self::Mla(mla) => &mla.o_proj,
            Self::Grouped(grouped) => &grouped.o_proj,
        }
    }

    /// All its maps, to be changed.
    pub(crate) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        match self {
            Self::Mla(mla) => mla.linears_mut(),
            Self::Grouped(grouped) => grouped.linears_mut().into(),
        }
    }

    /// The outputs of all heads for a chunk `[batch, seq, d]` that has been normalised.
    pub(crate) fn attend<'a>(&self, normed: Input, seen: Seen<'a>) -> Heads<'a> {
        match self {
            Self::Mla(mla) => mla.attend(normed, seen),
            Self::Grouped(grouped) => grouped.attend(normed, seen).into(),
        }
    }

    /// `residual + W_O heads`, `[batch, seq, d]`.
    pub(crate) fn add_to(&self, residual: Tensor<3>, heads: Heads) -> Tensor<3> {
        let o_proj = self.o_proj();
        match heads.fused {
            None => o_proj.add_to(residual, heads.values),
            Some(fused) => add_linear(residual, heads.values, fused.output.clone(), o_proj.bias()),
        }
    }

    /// Records what the attention makes of whole normalised rows before it attends, and their largest score.
    pub(crate) fn report(&self, normed: &Input, context: &Context, report: &mut Trace) {
        let starts = &context.document_starts;
        match self {
            Self::Mla(mla) => {
                let latent = mla.latent(normed.clone(), &context.rope);
                report.latent.push(latent.c_kv());
                report.k_pe.extend(latent.k_pe());
                report.max_logit.push(mla.max_logit(mla.queries(normed.clone(), &context.rope), latent, starts));
            }
            Self::Grouped(grouped) => {
                let kv = grouped.key_value(normed.clone(), &context.rope);
                report.max_logit.push(grouped.max_logit(grouped.queries(normed.clone(), &context.rope), kv, starts));
            }
        }
    }
}
