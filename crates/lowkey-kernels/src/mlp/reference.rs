//! The feed-forward layer in plain tensor operations.

use burn::tensor::Tensor;

use super::weights::MlpWeights;
use crate::linear::reference::linear;
use crate::norm::reference::rms_norm;
use crate::swiglu::reference::swiglu;

/// See [`crate::mlp::gated_mlp`].
pub fn gated_mlp(x: Tensor<3>, weights: MlpWeights, eps: f64) -> Tensor<3> {
    let normed = rms_norm(x.clone(), weights.norm, eps);
    let (gate, up) = (linear(normed.clone(), weights.gate), linear(normed, weights.up));
    x + linear(swiglu(gate, up), weights.down)
}
