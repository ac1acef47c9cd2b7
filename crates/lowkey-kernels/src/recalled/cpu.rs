//! On the CPU: the forward pass is that of any linear map.

use burn::backend::Flex;
use burn_flex::FlexTensor;

use super::autodiff::{Recall, RecalledOps};
use crate::linear::autodiff::LinearOps;
use crate::precision::Precision;

impl RecalledOps for Flex {
    fn project_recalled(x: FlexTensor, _: Recall<Self>, weight: FlexTensor, precision: Precision) -> FlexTensor {
        Self::project(x, weight, precision)
    }
}
