//! The operations that a decoder block spends its time in, as functions over Burn tensors.
//!
//! **Purpose.** One place for the arithmetic that decides speed: RMSNorm, rotary embedding, SwiGLU, causal attention and
//! cross entropy. Everything above this crate composes these functions and never touches a backend primitive.
//!
//! **Main functions.** [`linear`], [`rms_norm`], [`rotate`], [`swiglu`], [`attention`], [`cross_entropy`].
//!
//! **Flow.** `lowkey-model` builds a [`Mask`] once per batch and calls the functions from its blocks; gradients come from
//! Burn's autodiff, so each function is differentiable in every floating-point argument.
//!
//! **State.** All functions are compositions of ordinary tensor operations: they run on every backend, and they are the
//! reference that a fused implementation has to agree with.
//!
//! **What this crate does not know.** Models, parameters, names, files, text.

mod attention;
mod loss;
mod pointwise;

pub use attention::{Mask, attention, scores};
pub use loss::{IGNORE, LossSum, cross_entropy};
pub use pointwise::{linear, rms_norm, rotate, swiglu};
