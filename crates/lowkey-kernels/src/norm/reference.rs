//! The norm in plain tensor operations.

use burn::tensor::Tensor;

/// See [`crate::rms_norm`].
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    let inv = (x.clone().square().mean_dim(D - 1) + eps).sqrt().recip();
    x * inv * weight.unsqueeze()
}
