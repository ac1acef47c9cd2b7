//! How much of its latent a model uses.

use burn::tensor::{Device, Tensor};
use faer::Mat;
use lowkey_model::{CausalLm, attention::MlaDims};
use serde::Serialize;

use crate::basis::{Basis, fold};
use crate::error::{Error, Result};
use crate::importance::readers;
use crate::matrix::{Origin, check_finite, eigen, rows, singular_values, to_mat};
use crate::moments::{Moments, attentions, measure};
use crate::{Observer, Progress};

/// The spectrum of a matrix, and two ranks that need no threshold.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Spectrum {
    /// Singular values, largest first.
    pub values: Vec<f64>,
    /// ‖W‖_F² / ‖W‖₂²: the energy in units of the strongest direction's.
    pub stable_rank: f64,
    /// exp of the entropy of σ²/Σσ² (Roy & Vetterli, EUSIPCO 2007, on energies): the number of equally strong directions that are as
    /// uncertain.
    pub effective_rank: f64,
}

impl Spectrum {
    /// Of singular values.
    pub fn of(values: Vec<f64>) -> Self {
        let energies: Vec<f64> = values.iter().map(|value| value * value).collect();
        let (all, most) = (energies.iter().sum::<f64>(), energies.first().copied().unwrap_or(0.0));
        let stable_rank = if most > 0.0 { all / most } else { 0.0 };
        Self { stable_rank, effective_rank: effective_rank(&energies), values }
    }
}

/// exp of the entropy of energies, in directions.
pub fn effective_rank(energies: &[f64]) -> f64 {
    let all: f64 = energies.iter().sum();
    if all <= 0.0 {
        return 0.0;
    }
    let shares = energies.iter().map(|energy| energy / all).filter(|share| *share > 0.0);
    (-shares.map(|share| share * share.ln()).sum::<f64>()).exp()
}

/// A layer's latent, from its weights and from a text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerHealth {
    /// Index of the layer.
    pub layer: usize,
    /// Width L of the latent.
    pub kv_lora_rank: usize,
    /// W_DKV, `[L, d]`.
    pub w_dkv: Spectrum,
    /// W_UK of all heads, with the latent norm's gain, `[H·N, L]`.
    pub w_uk: Spectrum,
    /// W_UV of all heads, with the latent norm's gain, `[H·V, L]`.
    pub w_uv: Spectrum,
    /// Eigenvalues of the covariance of the normalised latent, largest first.
    pub covariance: Vec<f64>,
    /// (Σλ)² / Σλ² of the covariance: its participation ratio.
    pub participation_ratio: f64,
    /// [`effective_rank`] of the covariance.
    pub effective_rank: f64,
    /// Share of the logits' variance over the keys of a query that the rotated part makes; the rest is content.
    pub rope_share: f64,
    /// What the readers W_UK and W_UV (by way of queries and W_O) see of the latent, direction by direction of the basis that loses
    /// least when cut, as shares of all that they see.
    pub readout: Vec<f64>,
    /// The fewest directions that carry the demanded share of the readout.
    pub recommended_rank: usize,
}

/// Looks at every layer; `energy` is the share of the readout that a recommended rank has to carry, below 1.
///
/// # Errors
/// [`Error::Unsupported`] for a model without latents, [`Error::Text`] for a text that it cannot read, [`Error::Setting`] for an
/// `energy` outside (0, 1), [`Error::NotFinite`] for a weight that is no number.
pub fn health(
    model: &CausalLm,
    text: &[Vec<u32>],
    energy: f64,
    device: &Device,
    observe: Observer,
) -> Result<Vec<LayerHealth>> {
    if !(energy > 0.0 && energy < 1.0) {
        let why = "a share of the readout: above 0 and below 1".into();
        return Err(Error::Setting { field: "energy", value: energy.to_string(), why });
    }
    check_finite(model)?;
    let model = fold(model)?;
    let moments = measure(&model, text, device, observe)?;
    let layers = attentions(&model, "a spectrum")?;
    let of = layers.len();
    let each = layers.into_iter().zip(&moments).enumerate().map(|(layer, (mla, moments))| {
        observe(Progress { doing: "spectra", done: layer, of });
        let MlaDims { heads, nope, value, rank, .. } = mla.dims;
        let spectrum =
            |matrix: &Mat<f64>, what| Ok::<_, Error>(Spectrum::of(singular_values(matrix, Origin { layer, what })?));
        let down = rows(&to_mat(mla.kv_a_proj_with_mqa.matrix(), "kv_a_proj_with_mqa")?, 0, rank);
        let kv_b = to_mat(mla.kv_b_proj.matrix(), "kv_b_proj")?;
        let pick = |skip: usize, width: usize| {
            Mat::from_fn(heads * width, rank, |i, j| kv_b[(i / width * (nope + value) + skip + i % width, j)])
        };
        let (covariance, _) = eigen(&covariance(moments), Origin { layer, what: "the latent's covariance" })?;
        let basis = Basis::of(&readers(mla, moments)?, &moments.latent, layer)?;
        let all: f64 = basis.readout.iter().sum();
        let readout: Vec<f64> = basis.readout.iter().map(|seen| if all > 0.0 { seen / all } else { 0.0 }).collect();
        let (sum, squares) = covariance.iter().fold((0.0, 0.0), |(s, q), v| (s + v, q + v * v));
        Ok(LayerHealth {
            layer,
            kv_lora_rank: rank,
            w_dkv: spectrum(&down, "W_DKV")?,
            w_uk: spectrum(&pick(0, nope), "W_UK")?,
            w_uv: spectrum(&pick(nope, value), "W_UV")?,
            participation_ratio: if squares > 0.0 { sum * sum / squares } else { 0.0 },
            effective_rank: effective_rank(&covariance),
            covariance,
            rope_share: moments.rope_share,
            recommended_rank: carries(&readout, energy),
            readout,
        })
    });
    each.collect()
}

/// Eigenvalues of the covariance of each layer's latents over the positions of one pass, largest first: what
/// [`LayerHealth::covariance`] is, from a trace that a training run has at hand anyway.
///
/// # Shapes
/// Each `[batch, seq, L]`.
///
/// # Errors
/// [`Error::Overflow`] for latents that are not finite.
pub fn latent_spectra(latents: Vec<Tensor<3>>) -> Result<Vec<Vec<f64>>> {
    let spectra = latents.into_iter().enumerate().map(|(layer, latent)| {
        let [batch, seq, width] = latent.dims();
        let latent = latent.reshape([batch * seq, width]);
        let centred = latent.clone() - latent.mean_dim(0);
        let covariance = centred.clone().transpose().matmul(centred) / (batch * seq) as f64;
        let what = "the latent's covariance";
        Ok(eigen(&to_mat(covariance, what)?, Origin { layer, what })?.0)
    });
    spectra.collect()
}

fn covariance(moments: &Moments) -> Mat<f64> {
    let (n, mean) = (moments.latent.nrows(), &moments.mean);
    Mat::from_fn(n, n, |i, j| moments.latent[(i, j)] - mean[i] * mean[j])
}

/// The fewest first shares whose sum reaches `energy`; at least 1.
fn carries(shares: &[f64], energy: f64) -> usize {
    let mut sum = 0.0;
    let reached = shares.iter().position(|share| {
        sum += share;
        sum >= energy
    });
    reached.map_or(shares.len(), |at| at + 1).max(1)
}
