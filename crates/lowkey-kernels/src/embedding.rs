//! Token embedding.

pub(crate) mod autodiff;
mod cpu;
#[cfg(feature = "gpu")]
mod gpu;
pub(crate) mod reference;
#[cfg(test)]
mod tests;

use burn::backend::Dispatch;
use burn::tensor::{DType, Int, Tensor};

use self::autodiff::EmbeddingOps;

/// Token embedding: the rows of `weight` that the ids name.
///
/// # Shapes
/// `weight [vocab, d]`, `ids [batch, seq]` → `[batch, seq, d]`.
pub fn embed(weight: Tensor<2>, ids: Tensor<2, Int>) -> Tensor<3> {
    if weight.dtype() != DType::F32 {
        return reference::embed(weight, ids);
    }
    Tensor::from_dispatch(Dispatch::embed(weight.into_dispatch(), ids.into_dispatch()))
}
