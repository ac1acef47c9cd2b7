//! On GPUs: the forward pass is that of any linear map.

use burn_cubecl::{CubeBackend, tensor::CubeTensor};

use super::autodiff::{Recall, RecalledOps};
use crate::linear::autodiff::LinearOps;
use crate::precision::Precision;

impl RecalledOps for CubeBackend {
    fn project_recalled(x: CubeTensor, _: Recall<Self>, weight: CubeTensor, precision: Precision) -> CubeTensor {
        Self::project(x, weight, precision)
    }
}
