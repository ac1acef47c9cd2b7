//! What a trained model's latent holds, and how to make it narrower without training.
//!
//! **Purpose.** Multi-head Latent Attention caches a latent whose width L was chosen before training. This crate measures how much of
//! it a trained model uses ([`health`]), turns it so that its directions come in the order of their use without changing the model
//! ([`Rotated`]), and cuts it layer by layer to a budget ([`Rotated::cut_to`]).
//!
//! **Why it is exact.** An RMSNorm divides by the length of its input and multiplies by a gain γ. With γ moved into `kv_b_proj`, which
//! reads what γ scales, only the length is left, and an orthogonal Q keeps lengths: RMSNorm(Qᵀ W_DKV h) = Qᵀ RMSNorm(W_DKV h). So
//! W_DKV → Qᵀ W_DKV, `kv_b_proj` → `kv_b_proj`·Q is the same model. The rotated key has a part of the projection of its own and stays.
//!
//! **Why the order is the best.** What counts is not the latent's variance but what W_UK, by way of the queries, and W_UV, by way of
//! W_O, read of it. `basis` takes the solution of that rank-reduced regression (Izenman, J. Multivariate Analysis 5, 1975) and makes it
//! orthogonal, so that it is a rotation, and every prefix remains optimal. A cut keeps the norm's denominator over the full width (see
//! `kv_cache_ranks` in `lowkey-model`): it is a projection, and nothing else changes.
//!
//! **Flow.** model + calibration text → moments of latents and queries per layer → basis → [`Rotated`] → loss of each layer's cuts
//! ([`Curve`]) → ranks by water-filling → [`Reduction`].
//!
//! **What this crate does not know.** Files and text: it takes token ids and gives models.
//!
//! # Example
//!
//! How many directions a spectrum stands for:
//!
//! ```
//! use lowkey_convert::{Spectrum, effective_rank};
//!
//! // Four directions of equal energy are four; one that outweighs the rest is hardly more than one.
//! assert!((effective_rank(&[1.0; 4]) - 4.0).abs() < 1e-12);
//! let spectrum = Spectrum::of(vec![10.0, 1.0, 1.0, 1.0]);
//! assert!(spectrum.effective_rank < 1.3);
//! assert!((spectrum.stable_rank - 1.03).abs() < 1e-12);
//! ```

mod allocation;
mod basis;
mod cut;
mod error;
mod health;
mod matrix;
mod moments;

pub use allocation::Curve;
pub use cut::{Reduction, Rotated, loss};
pub use error::{Error, Result};
pub use health::{LayerHealth, Spectrum, effective_rank, health, latent_spectra};
pub use matrix::check_finite;

/// How far a long computation has come.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// What is being computed.
    pub doing: &'static str,
    /// Parts done.
    pub done: usize,
    /// Parts in all.
    pub of: usize,
}

/// Who watches.
pub type Observer<'a> = &'a mut dyn FnMut(Progress);

#[cfg(test)]
mod tests;
