//! On GPUs: the forward pass is that of any linear map.

use burn_cubecl::{CubeBackend, tensor::CubeTensor};

use super::autodiff::RecalledOps;
use crate::linear::autodiff::LinearOps;
use crate::precision::Precision;

impl RecalledOps for CubeBackend {
    fn project_normed(
        normed: CubeTensor,
        _: CubeTensor,
        _: CubeTensor,
        weight: CubeTensor,
        _: f64,
        precision: Precision,
    ) -> CubeTensor {
        Self::project(normed, weight, precision)
    }

    fn project_swiglu(
        inner: CubeTensor,
        _: CubeTensor,
        _: CubeTensor,
        weight: CubeTensor,
        precision: Precision,
    ) -> CubeTensor {
        Self::project(inner, weight, precision)
    }
}
