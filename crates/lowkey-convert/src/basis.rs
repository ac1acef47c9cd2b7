//! The basis of a latent in which cutting loses least, and the rotation into it, which changes nothing.

use burn::tensor::{Device, Tensor};
use faer::Mat;
use lowkey_model::{CausalLm, attention::MlaDims};

use crate::error::{Error, Result};
use crate::matrix::{Origin, eigen, to_mat, to_tensor, trace};
use crate::moments::attentions;

/// Share of the mean variance that is added to every direction of a latent, so that one which no token uses has an inverse.
const RIDGE: f64 = 1e-7;

/// An orthogonal basis of a latent.
#[derive(Clone, Debug)]
pub(crate) struct Basis {
    /// Columns, the most read first, `[L, L]`.
    pub(crate) vectors: Mat<f64>,
    /// What the readers lose with each one, when those behind it are gone.
    pub(crate) readout: Vec<f64>,
}

impl Basis {
    /// Of the readers' Gram matrix G and the latent's second moment C.
    ///
    /// What a reader W loses when it may use only r linear functions A c of the latent is least, among all A and for all r at once,
    /// where A's rows are u_iᵀ C^(−1/2) for the first eigenvectors u_i of C^(1/2) G C^(1/2), G = Σ WᵀW (the rank-reduced regression
    /// of Wc on c); it is then the sum of the remaining eigenvalues. Only the span of the rows matters, as a reader can be fitted to
    /// any basis of it, so Gram–Schmidt, which keeps the span of every prefix, makes of them an orthogonal basis whose prefixes are
    /// all optimal: one rotation serves every cut.
    pub(crate) fn of(readers: &Mat<f64>, latent: &Mat<f64>, layer: usize) -> Result<Self> {
        let n = latent.nrows();
        let ridge = RIDGE * trace(latent) / n.max(1) as f64;
        let (variances, directions) = eigen(latent, Origin { layer, what: "the latent's second moment" })?;
        let power = |exponent: f64| {
            let scaled = Mat::from_fn(n, n, |i, j| {
                directions[(i, j)] * (variances[j] + ridge).max(f64::MIN_POSITIVE).powf(exponent)
            });
            scaled * directions.transpose()
        };
        let root = power(0.5);
        let (readout, found) = eigen(&(&root * readers * &root), Origin { layer, what: "the readout" })?;
        let functions = power(-0.5) * found;
        let norms: Vec<f64> = (0..n).map(|j| (0..n).map(|i| functions[(i, j)].powi(2)).sum::<f64>().sqrt()).collect();
        let functions = Mat::from_fn(n, n, |i, j| functions[(i, j)] / norms[j].max(f64::MIN_POSITIVE));
        let vectors = functions.qr().compute_Q();
        if (0..n).any(|j| (0..n).any(|i| !vectors[(i, j)].is_finite())) {
            return Err(Error::Decomposition { layer, what: "the latent's basis" });
        }
        Ok(Self { vectors, readout })
    }
}

/// Moves the gain of every latent norm into `kv_b_proj`, which reads what it scales: the same function, and a norm that commutes with
/// rotations.
///
/// # Errors
/// [`Error::Unsupported`] for a model without latents, or with one that is cut already.
pub(crate) fn fold(model: &CausalLm) -> Result<CausalLm> {
    attentions(model, "rotating a latent")?;
    if model.config.kv_cache_ranks().is_some() {
        let why = "its latents are cut already, and their order is fixed; convert the model that it was made of".into();
        return Err(Error::Unsupported { what: "rotating a latent", why });
    }
    let mut model = model.clone();
    for block in &mut model.model.layers {
        let Some(mla) = block.self_attn.latent_mut() else { continue };
        let gain = mla.kv_a_layernorm.gain();
        let scaled = mla.kv_b_proj.matrix() * gain.clone().unsqueeze_dim::<2>(0);
        mla.kv_b_proj.set_matrix(scaled);
        mla.kv_a_layernorm.set_gain(gain.ones_like());
    }
    Ok(model)
}

/// Rotates the latents of a [`fold`]ed model: W_DKV to QᵀW_DKV and `kv_b_proj` to `kv_b_proj`·Q. An RMSNorm without gain sees only the
/// length of its input, which Q keeps, so nothing else changes.
pub(crate) fn rotate(model: &CausalLm, bases: &[Basis], device: &Device) -> Result<CausalLm> {
    let mut model = model.clone();
    for (block, basis) in model.model.layers.iter_mut().zip(bases) {
        let Some(mla) = block.self_attn.latent_mut() else { continue };
        let MlaDims { rank, .. } = mla.dims;
        let turned = basis.vectors.transpose();
        let turn = |weight: Tensor<2>, what| -> Result<Tensor<2>> {
            let (matrix, dtype) = (to_mat(weight, what)?, mla.kv_b_proj.dtype());
            // The rows behind the latent are those of the shared key.
            let mut out = matrix.clone();
            out.subrows_mut(0, rank).copy_from(turned * matrix.subrows(0, rank));
            Ok(to_tensor(&out, dtype, device))
        };
        let down = turn(mla.kv_a_proj_with_mqa.matrix(), "kv_a_proj_with_mqa")?;
        let bias = match mla.kv_a_proj_with_mqa.bias() {
            Some(bias) => Some(turn(bias.unsqueeze_dim::<2>(1), "kv_a_proj_with_mqa.bias")?.squeeze_dim::<1>(1)),
            None => None,
        };
        let up = to_mat(mla.kv_b_proj.matrix(), "kv_b_proj")? * &basis.vectors;
        let up = to_tensor(&up, mla.kv_b_proj.dtype(), device);
        mla.kv_a_proj_with_mqa.set_matrix(down);
        mla.kv_a_proj_with_mqa.set_bias(bias);
        mla.kv_b_proj.set_matrix(up);
    }
    // The prefixes that it was trained at are no longer its first numbers.
    model.config.kv_elastic_ranks = None;
    Ok(model)
}
