//! The linear map, alone and added to a residual.

pub(crate) mod autodiff;
pub(crate) mod cpu;
#[cfg(feature = "gpu")]
mod gpu;
pub(crate) mod reference;
#[cfg(test)]
mod tests;

use burn::backend::Dispatch;
use burn::tensor::{DType, Tensor};

use self::autodiff::LinearOps;
use crate::precision;

/// `x · Wᵀ (+ b)` with the weight as Hugging Face stores it.
///
/// # Shapes
/// `x [batch, seq, d_in]`, `weight [d_out, d_in]`, `bias [d_out]` → `[batch, seq, d_out]`.
pub fn linear(x: Tensor<3>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<3> {
    let y = if x.dtype() == DType::F32 {
        Tensor::from_dispatch(Dispatch::project(x.into_dispatch(), weight.into_dispatch(), precision::current()))
    } else {
        reference::linear(x, weight)
    };
    match bias {
        Some(bias) => y + bias.unsqueeze::<3>(),
        None => y,
    }
}

/// `residual + x · Wᵀ (+ b)`, in one pass over the result.
///
/// # Shapes
/// As [`linear`]; `residual [batch, seq, d_out]`.
pub fn add_linear(residual: Tensor<3>, x: Tensor<3>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<3> {
    let y = if x.dtype() == DType::F32 {
        let (residual, x) = (residual.into_dispatch(), x.into_dispatch());
        Tensor::from_dispatch(Dispatch::add_project(residual, x, weight.into_dispatch(), precision::current()))
    } else {
        residual + reference::linear(x, weight)
    };
    match bias {
        Some(bias) => y + bias.unsqueeze::<3>(),
        None => y,
    }
}
