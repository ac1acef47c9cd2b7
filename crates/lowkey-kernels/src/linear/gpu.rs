//! The linear map on GPUs.

use burn::backend::ops::FloatTensorOps;
use burn_cubecl::{CubeBackend, tensor::CubeTensor};

use super::autodiff::{LinearGradients, LinearOps, ProjectState};
use crate::gpu::product::{operand, product, projected, transposed};
use crate::gpu::tensors::{dims, reshaped, tall};
use crate::precision::Precision;

impl LinearOps for CubeBackend {
    fn project(x: CubeTensor, weight: CubeTensor, precision: Precision) -> CubeTensor {
        let [batch, seq, _] = dims::<3>(&x);
        let [d_out, _] = dims::<2>(&weight);
        reshaped(projected(tall(x), weight, precision), [batch, seq, d_out])
    }

    fn add_project(residual: CubeTensor, x: CubeTensor, weight: CubeTensor, precision: Precision) -> CubeTensor {
        Self::float_add(Self::project(x, weight, precision), residual)
    }
}

impl LinearGradients for CubeBackend {
    fn project_grad(saved: ProjectState<Self>, grad: CubeTensor, precision: Precision) -> [Option<CubeTensor>; 2] {
        let [batch, seq, _] = dims::<3>(&grad);
        let grad = operand(tall(grad), precision);
        let d_x = saved.weight.map(|weight| {
            let [_, d_in] = dims::<2>(&weight);
            reshaped(product(grad.clone(), operand(weight, precision), precision), [batch, seq, d_in])
        });
        let d_weight = saved.x.map(|x| product(transposed(grad), operand(tall(x), precision), precision));
        [d_x, d_weight]
    }
}
