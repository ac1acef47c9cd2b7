//! The operations that a decoder block spends its time in, as functions over Burn tensors.
//!
//! **Purpose.** One place for the arithmetic that decides speed: RMSNorm, rotary embedding, SwiGLU, causal attention, cross
//! entropy, and an optimiser's passes. Everything above this crate composes these functions and never touches a backend
//! primitive.
//!
//! **Main functions.** [`linear`], [`rms_norm`], [`swiglu`], [`rotate`], [`causal_attention`], [`cross_entropy_sum`] for
//! training; [`attention`] with a [`Mask`] for queries against a cache; [`optim`] for what an optimiser does to every
//! parameter.
//!
//! **Flow.** `lowkey-model` calls the functions from its blocks. Each fused one is an operation of its own in Burn's autodiff,
//! with a backward pass that recomputes rather than stores: neither a T×T score matrix nor a matrix of tokens × vocabulary
//! exists in training. On the CPU they run on plain slices, vectorised for whatever the processor has, in parallel on the
//! current rayon pool. Tensors that are not f32 take the [`mod@reference`].
//!
//! **What this crate does not know.** Models, parameters, names, files, text. It is the only crate that knows a backend.

mod attention;
mod block;
mod block_ops;
mod cpu;
#[cfg(test)]
mod fixtures;
mod flex;
mod fused;
mod ops;
pub mod optim;
pub mod reference;

pub use attention::{Mask, attention, scores};
pub use block::{
    LatentWeights, MlaDims, MlpWeights, absorbed_attention, add_linear, gated_mlp, latent_attention, linear,
};
pub use fused::{IGNORE, Labels, LossSum, causal_attention, cross_entropy_each, cross_entropy_sum, rms_norm, rotate};
