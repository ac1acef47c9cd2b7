//! The feed-forward half of a decoder block, as one operation.

pub(crate) mod autodiff;
pub(crate) mod cpu;
#[cfg(feature = "gpu")]
pub(crate) mod gpu;
pub(crate) mod reference;
#[cfg(test)]
mod tests;
mod weights;

use burn::backend::Dispatch;
use burn::tensor::{DType, Tensor};

use self::autodiff::MlpOps;
pub use self::weights::MlpWeights;
use crate::precision;

/// The second half of a pre-norm block with SwiGLU (Shazeer, arXiv 2002.05202): `x + down(silu(gate n) · up n)` with
/// `n = RMSNorm(x)` and `silu(x) = x · sigmoid(x)`.
///
/// Keeps `gate n` and `up n` for the backward pass, which forms the rest anew.
///
/// # Shapes
/// `x [batch, seq, d]` → `[batch, seq, d]`.
pub fn gated_mlp(x: Tensor<3>, weights: MlpWeights, eps: f64) -> Tensor<3> {
    if x.dtype() != DType::F32 {
        return reference::gated_mlp(x, weights, eps);
    }
    let MlpWeights { norm, gate, up, down } = weights;
    let (norm, gate) = (norm.into_dispatch(), gate.into_dispatch());
    let (up, down) = (up.into_dispatch(), down.into_dispatch());
    Tensor::from_dispatch(Dispatch::gated_mlp(x.into_dispatch(), norm, gate, up, down, eps, precision::current()))
}
