//! Token embedding on GPUs: the gradients of a token's places are summed without a sort or an atomic addition.

mod kernels;

use burn::backend::ops::{FloatTensorOps, ModuleOps};
use burn::tensor::{DType, FloatDType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use cubecl::prelude::{CubeCount, CubeDim};

use super::autodiff::{EmbeddingGradients, EmbeddingOps};
use crate::gpu::rows;
use crate::gpu::tensors::{count, dims, new_of};

impl EmbeddingOps for CubeBackend {
    fn embed(weight: CubeTensor, ids: CubeTensor) -> CubeTensor {
        Self::embedding(weight, ids)
    }
}

impl EmbeddingGradients for CubeBackend {
    fn embed_grad(weight: CubeTensor, ids: CubeTensor, grad: CubeTensor) -> CubeTensor {
        let [vocab, width] = dims::<2>(&weight);
        let (ids, grad) = (into_contiguous(ids), into_contiguous(grad));
        let tokens = count(&ids);
        let out = Self::float_zeros(Shape::from(vec![vocab, width]), &weight.device, FloatDType::F32);
        let chain = new_of(&grad, [tokens], DType::I32);
        kernels::chain::launch(
            &out.client,
            CubeCount::Static(tokens.div_ceil(rows::UNITS as usize).min(rows::CUBES) as u32, 1, 1),
            CubeDim::new_1d(rows::UNITS),
            ids.clone().into_buffer_arg(),
            chain.clone().into_buffer_arg(),
            tokens,
        );
        kernels::embed_grad::launch(
            &out.client,
            CubeCount::Static(tokens.min(rows::CUBES) as u32, 1, 1),
            CubeDim::new_1d(rows::UNITS),
            ids.into_buffer_arg(),
            chain.into_buffer_arg(),
            grad.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            tokens,
            width,
        );
        out
    }
}
