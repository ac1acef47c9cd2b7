//! What a trained model's latent holds, how to make it narrower without training, how to make one of full keys and values, and full keys
//! and values of one.
//!
//! **Purpose.** Multi-head Latent Attention caches a latent whose width L was chosen before training. This crate measures how much of
//! it a trained model uses ([`health`]), turns it so that its directions come in the order of their use without changing the model
//! ([`Rotated`]), and cuts it layer by layer to a budget ([`Rotated::cut_to`]). A model of MHA, GQA or MQA becomes one with latents
//! ([`to_mla`]), which are then cut in the same way.
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
//! **Why full keys and values have a latent form.** Values, and the part of keys that does not turn with its position, are linear in
//! the hidden state: a latent as wide as their joint rank holds them, if it is not normalised (`latent_norm = false`). Rotated keys are
//! cached as they are: those of all heads side by side are one shared key in which each frequency comes once per head (`rope_pairs`),
//! and a query has zeros where other heads' numbers lie. So [`to_mla::exact`] computes the same, from a cache that is as wide as before,
//! or narrower where the rank is less. That is all that can be had for nothing: a rotation mixes with no matrix but those that are
//! complex multiples within one frequency. [`to_mla::narrowed`] takes of each frequency the complex directions that scores miss most
//! and leaves only those turning; the others go into the latent with the rotation's mean in place of the rotation. Then the latent is
//! cut. [`to_mla::fit`] does all this for a budget, and finds how many numbers should turn by trying.
//!
//! **And back.** What a latent without a norm makes is affine in the hidden state, as full keys and values are: [`to_mha::exact`]
//! multiplies the maps out, for programs that know no latents.
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
//!
//! Grouped-query attention as latent attention, with the same logits:
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use lowkey_model::{CausalLm, config::ModelSection, ids_tensor};
//!
//! let section: ModelSection = serde_json::from_value(serde_json::json!({
//!     "attention": "gqa", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
//!     "intermediate_size": 32,
//! }))?;
//! let device = burn::tensor::Device::flex();
//! let grouped = CausalLm::init(&section.resolve(32, 8)?.0, 1, &device);
//! let latent = lowkey_convert::to_mla::exact(&grouped, &device)?;
//!
//! assert_eq!(latent.config.attention_name(), "MLA");
//! assert_eq!(latent.config.cache_numbers(), grouped.config.cache_numbers());
//! let logits = |model: &CausalLm| model.forward(ids_tensor(&[1, 2, 3, 4], 1, 4, &device));
//! let apart = (logits(&grouped) - logits(&latent)).abs().max().into_scalar::<f32>();
//! assert!(apart < 1e-5, "{apart}");
//! # Ok(())
//! # }
//! ```

mod allocation;
mod assemble;
mod basis;
mod cut;
mod error;
mod health;
mod importance;
mod matrix;
mod moments;
mod stream;
pub mod to_mha;
pub mod to_mla;
mod trim;

pub use allocation::Curve;
pub use cut::{Reduction, Rotated, loss};
pub use error::{Error, Result};
pub use health::{LayerHealth, Spectrum, effective_rank, health, latent_spectra};
pub use importance::Importance;
pub use matrix::check_finite;
pub use trim::trimmed;

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
