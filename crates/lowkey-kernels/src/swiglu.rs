//! The activation between the products of a feed-forward layer.

pub(crate) mod autodiff;
pub(crate) mod cpu;
#[cfg(feature = "gpu")]
pub(crate) mod gpu;
pub(crate) mod reference;
#[cfg(test)]
mod tests;

use burn::backend::Dispatch;
use burn::tensor::{DType, Tensor};

use self::autodiff::SwigluOps;

/// `silu(gate) · up` with `silu(x) = x · sigmoid(x)` (Shazeer, arXiv 2002.05202). Where nothing stands beside the products around it,
/// [`crate::mlp::gated_mlp`] does all at once.
///
/// # Shapes
/// `gate`, `up [batch, seq, f]` → `[batch, seq, f]`.
pub fn swiglu(gate: Tensor<3>, up: Tensor<3>) -> Tensor<3> {
    if gate.dtype() != DType::F32 {
        return reference::swiglu(gate, up);
    }
    Tensor::from_dispatch(Dispatch::swiglu(gate.into_dispatch(), up.into_dispatch()))
}
