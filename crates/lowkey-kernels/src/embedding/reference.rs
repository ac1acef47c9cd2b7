//! Token embedding in plain tensor operations.

use burn::tensor::module::embedding;
use burn::tensor::{Int, Tensor};

/// See [`crate::embed`].
pub fn embed(weight: Tensor<2>, ids: Tensor<2, Int>) -> Tensor<3> {
    embedding(weight, ids)
}
