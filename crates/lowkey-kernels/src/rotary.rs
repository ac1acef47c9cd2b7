//! Rotary position embedding.

pub(crate) mod autodiff;
pub(crate) mod cpu;
#[cfg(feature = "gpu")]
pub(crate) mod gpu;
pub(crate) mod reference;
#[cfg(test)]
mod tests;

use burn::backend::Dispatch;
use burn::tensor::{DType, Tensor};

use self::autodiff::RotaryOps;

/// Rotary position embedding (Su et al., arXiv 2104.09864) of R components of each head, from component `from` on; the others
/// are copied.
///
/// With `interleaved` the rotated pairs are `(x[2i], x[2i+1])` of those R, else `(x[i], x[i + R/2])`. The result is always in
/// half-split order (all first components, then all second ones): dot products between two rotated tensors do not depend
/// on the order, and one order for the cache serves both conventions.
///
/// # Shapes
/// `x [batch, seq, heads, width ≥ from + R]`, `cos` and `sin [batch or 1, seq, 1, R/2]` → `[batch, seq, heads, width]`.
pub fn rotate(x: Tensor<4>, cos: Tensor<4>, sin: Tensor<4>, from: usize, interleaved: bool) -> Tensor<4> {
    if x.dtype() != DType::F32 {
        return reference::rotate(x, cos, sin, from, interleaved);
    }
    let (x, cos, sin) = (x.into_dispatch(), cos.into_dispatch(), sin.into_dispatch());
    Tensor::from_dispatch(Dispatch::rotate(x, cos, sin, from, interleaved))
}
