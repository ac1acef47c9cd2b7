//! On the CPU: the forward pass is that of any linear map.

use burn::backend::Flex;
use burn_flex::FlexTensor;

use super::autodiff::RecalledOps;
use crate::linear::autodiff::LinearOps;
use crate::precision::Precision;

impl RecalledOps for Flex {
    fn project_normed(
        normed: FlexTensor,
        _: FlexTensor,
        _: FlexTensor,
        weight: FlexTensor,
        _: f64,
        precision: Precision,
    ) -> FlexTensor {
        Self::project(normed, weight, precision)
    }

    fn project_swiglu(
        inner: FlexTensor,
        _: FlexTensor,
        _: FlexTensor,
        weight: FlexTensor,
        precision: Precision,
    ) -> FlexTensor {
        Self::project(inner, weight, precision)
    }
}
