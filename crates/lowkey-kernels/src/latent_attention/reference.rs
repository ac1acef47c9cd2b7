//! Latent attention in plain tensor operations.

use burn::tensor::Tensor;

use super::arguments::{LatentWeights, MlaDims};
use crate::causal_attention::reference::causal_attention;
use crate::linear::reference::linear;
use crate::norm::reference::rms_norm;
use crate::rotary::reference::rotate;

/// See [`crate::latent_attention`].
pub fn latent_attention(
    q: Tensor<4>,
    kv_a: Tensor<3>,
    weights: LatentWeights,
    document_starts: &[u32],
    dims: MlaDims,
) -> Tensor<3> {
    let MlaDims { heads, nope, rope, value, rank, scale, latent_scale, latent_eps, interleave } = dims;
    let [batch, seq, _] = kv_a.dims();
    let c_kv = rms_norm(kv_a.clone().narrow(2, 0, rank), weights.norm, latent_eps) * latent_scale;
    let k_pe = (rope > 0).then(|| {
        let k_pe = kv_a.narrow(2, rank, rope).unsqueeze_dim::<4>(2);
        rotate(k_pe, weights.cos, weights.sin, 0, interleave).squeeze_dim::<3>(2)
    });
    let kv = linear(c_kv, weights.kv_b).reshape([batch, seq, heads, nope + value]);
    causal_attention(q, kv, k_pe, document_starts, nope, scale)
}
