//! What makes one direction of a latent count more than another.

use faer::Mat;
use lowkey_model::attention::{Mla, MlaDims};
use serde::Serialize;

use crate::error::Result;
use crate::matrix::{rows, to_mat, trace};
use crate::moments::Moments;

/// What decides the order of a latent's directions, and what its readers are fitted to after a cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Importance {
    /// The weights alone: the singular values of what is rebuilt from the latent, as a function of the hidden state.
    Weights,
    /// What latents of a text make of the rebuilt keys and values, each counted as much as the other (SVD-LLM's whitening, TransMLA's
    /// balance).
    Activations,
    /// What a text's logits and the residual stream see of them: keys by way of its queries, values by way of W_O (as CARE, arXiv
    /// 2603.17946, with both sides).
    #[default]
    Readers,
}

impl Importance {
    /// The readers' Gram matrix and the latent's second moment, both `[L, L]`, by which [`Basis::of`](crate::basis::Basis::of) orders.
    pub(crate) fn of(self, mla: &Mla, moments: &Moments) -> Result<(Mat<f64>, Mat<f64>)> {
        match self {
            Self::Readers => Ok((readers(mla, moments)?, moments.latent.clone())),
            Self::Activations => {
                let [keys, values] = rebuilt(mla)?;
                Ok((balanced(&keys, &moments.latent) + balanced(&values, &moments.latent), moments.latent.clone()))
            }
            Self::Weights => {
                let [keys, values] = rebuilt(mla)?;
                let rank = mla.dims.rank;
                let w_dkv = rows(&to_mat(mla.kv_a_proj_with_mqa.matrix(), "kv_a_proj_with_mqa")?, 0, rank);
                Ok((keys + values, &w_dkv * w_dkv.transpose()))
            }
        }
    }
}

/// Σ_h W_UK,hᵀ W_UK,h and Σ_h W_UV,hᵀ W_UV,h.
fn rebuilt(mla: &Mla) -> Result<[Mat<f64>; 2]> {
    let MlaDims { heads, nope, value, rank, .. } = mla.dims;
    let kv_b = to_mat(mla.kv_b_proj.matrix(), "kv_b_proj")?;
    let (mut keys, mut values) = (Mat::zeros(rank, rank), Mat::zeros(rank, rank));
    for head in 0..heads {
        let first = head * (nope + value);
        let (w_uk, w_uv) = (kv_b.subrows(first, nope), kv_b.subrows(first + nope, value));
        keys += w_uk.transpose() * w_uk;
        values += w_uv.transpose() * w_uv;
    }
    Ok([keys, values])
}

/// Σ_h W_UK,hᵀ E\[q qᵀ\] W_UK,h and Σ_h W_UV,hᵀ W_O,hᵀ W_O,h W_UV,h, each scaled so that it reads 1 of the given latents: what the
/// logits and the residual stream see of a latent, `[L, L]`. The two have no common unit; each counts as much as the other.
pub(crate) fn readers(mla: &Mla, moments: &Moments) -> Result<Mat<f64>> {
    let MlaDims { heads, nope, value, rank, .. } = mla.dims;
    let kv_b = to_mat(mla.kv_b_proj.matrix(), "kv_b_proj")?;
    let w_o = to_mat(mla.o_proj.matrix(), "o_proj")?;
    let (mut keys, mut values) = (Mat::zeros(rank, rank), Mat::zeros(rank, rank));
    for (head, queries) in (0..heads).zip(&moments.queries) {
        let first = head * (nope + value);
        let (w_uk, w_uv) = (kv_b.subrows(first, nope), kv_b.subrows(first + nope, value));
        keys += w_uk.transpose() * queries * w_uk;
        let out = w_o.subcols(head * value, value) * w_uv;
        values += out.transpose() * &out;
    }
    Ok(balanced(&keys, &moments.latent) + balanced(&values, &moments.latent))
}

/// The Gram matrix, scaled so that it reads 1 of latents of the given moment.
fn balanced(gram: &Mat<f64>, latent: &Mat<f64>) -> Mat<f64> {
    let read = trace(&(gram * latent));
    faer::Scale(if read > 0.0 { 1.0 / read } else { 0.0 }) * gram
}
