//! Root-mean-square normalisation.

pub(crate) mod autodiff;
pub(crate) mod cpu;
#[cfg(feature = "gpu")]
pub(crate) mod gpu;
pub(crate) mod reference;
#[cfg(test)]
mod tests;

use burn::backend::Dispatch;
use burn::tensor::{DType, Tensor};

use self::autodiff::NormOps;

/// Root-mean-square normalisation over the last axis: `x / sqrt(mean(x²) + eps) · weight` (Zhang & Sennrich,
/// arXiv 1910.07467, eq. 4).
///
/// # Shapes
/// `x [..., d]`, `weight [d]` → `[..., d]`.
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    if x.dtype() != DType::F32 {
        return reference::rms_norm(x, weight, eps);
    }
    Tensor::from_dispatch(Dispatch::rms_norm(x.into_dispatch(), weight.into_dispatch(), eps))
}
