//! What a feed-forward layer multiplies with.

use burn::tensor::Tensor;

/// The weights of [`crate::mlp::gated_mlp`].
#[derive(Clone, Debug)]
pub struct MlpWeights {
    /// Gain of the norm, `[d]`.
    pub norm: Tensor<1>,
    /// `[f, d]`
    pub gate: Tensor<2>,
    /// `[f, d]`
    pub up: Tensor<2>,
    /// `[d, f]`
    pub down: Tensor<2>,
}
