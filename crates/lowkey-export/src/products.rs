//! The products of an attention's projections, formed in f64.

use burn::tensor::{DType, Tensor};
use lowkey_model::{
    attention::{Mla, MlaDims},
    model::Linear,
};

use crate::error::{Error, Result};
use crate::side::Exact;

/// Name prefix of a layer's tensors.
pub(crate) fn prefix(layer: usize) -> String {
    format!("model.layers.{layer}.self_attn")
}

/// `kv_b_proj` cut into `w_uk` (H, N, L) and `w_uv` (H, V, L). No arithmetic: the numbers are those of the checkpoint.
pub(crate) fn split(layer: usize, mla: &Mla) -> Result<[Exact; 2]> {
    let MlaDims { heads, nope, value, rank, .. } = mla.dims;
    let (w_uk, w_uv) = up_projections(mla);
    Ok([
        exact(format!("{}.w_uk", prefix(layer)), vec![heads, nope, rank], w_uk)?,
        exact(format!("{}.w_uv", prefix(layer)), vec![heads, value, rank], w_uv)?,
    ])
}

/// The fused weights of a layer, named as in the side file: per head `W_UKᵀ·W_UQ` over the rows of `W_QR`
/// (`[H(L+R), Q]`, Q the width of the query latent or d), and `W_O·W_UV` of all heads side by side (`[d, H·L]`).
pub(crate) fn fuse(layer: usize, mla: &Mla) -> Result<[Exact; 2]> {
    let MlaDims { heads, nope, rope, value, rank, .. } = mla.dims;
    let (w_uk, w_uv) = up_projections(mla);
    let up = query_up(mla)?;
    let [_, width] = up.dims();
    let query = up.matrix().cast(DType::F64).reshape([heads, nope + rope, width]);
    let absorbed = w_uk.swap_dims(1, 2).matmul(query.clone().narrow(1, 0, nope));
    let query = match rope {
        0 => absorbed,
        _ => Tensor::cat(vec![absorbed, query.narrow(1, nope, rope)], 1),
    };
    let [d, _] = mla.o_proj.dims();
    let out = mla.o_proj.matrix().cast(DType::F64).reshape([d, heads, value]).swap_dims(0, 1);
    let output = out.matmul(w_uv).swap_dims(0, 1);
    Ok([
        exact(format!("{}.q_fused.weight", prefix(layer)), vec![heads * (rank + rope), width], query)?,
        exact(format!("{}.o_fused.weight", prefix(layer)), vec![d, heads * rank], output)?,
    ])
}

/// The projection that makes the heads' queries.
///
/// # Errors
/// [`Error::Unsupported`] where a layer has neither or both of `q_proj` and `q_b_proj`.
pub(crate) fn query_up(mla: &Mla) -> Result<&Linear> {
    match (&mla.q_b_proj, &mla.q_proj) {
        (Some(up), None) | (None, Some(up)) => Ok(up),
        _ => Err(Error::unsupported("fused", "a layer has neither q_proj nor q_b_proj; load the model again")),
    }
}

/// W_UK `[H, N, L]` and W_UV `[H, V, L]` in f64.
fn up_projections(mla: &Mla) -> (Tensor<3>, Tensor<3>) {
    let MlaDims { heads, nope, value, rank, .. } = mla.dims;
    let kv_b = mla.kv_b_proj.matrix().cast(DType::F64).reshape([heads, nope + value, rank]);
    (kv_b.clone().narrow(1, 0, nope), kv_b.narrow(1, nope, value))
}

fn exact(name: String, shape: Vec<usize>, tensor: Tensor<3>) -> Result<Exact> {
    let values = tensor
        .into_data()
        .try_into_vec_as::<f64>()
        .map_err(|e| Error::Device { what: name.clone(), why: format!("{e:?}") })?;
    Ok(Exact { name, shape, values })
}
