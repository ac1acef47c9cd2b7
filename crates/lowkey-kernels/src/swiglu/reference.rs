//! The activation in plain tensor operations.

use burn::tensor::Tensor;
use burn::tensor::activation::sigmoid;

/// See [`crate::recalled::swiglu`].
pub fn swiglu(gate: Tensor<3>, up: Tensor<3>) -> Tensor<3> {
    gate.clone() * sigmoid(gate) * up
}
