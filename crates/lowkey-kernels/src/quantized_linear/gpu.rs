//! The packed linear map on GPUs: the matrix is unpacked for the length of one product, in plain operations, and nothing of it is kept.

use burn::tensor::{Int, Tensor};
use burn_cubecl::{CubeBackend, tensor::CubeTensor};

use super::autodiff::{Matrix, QuantizedLinearGradients, QuantizedLinearOps};
use super::format::Layout;
use super::reference;
use crate::gpu::product::{operand, product};
use crate::gpu::tensors::{dims, reshaped, tall};
use crate::linear::autodiff::LinearOps;
use crate::precision::Precision;

impl QuantizedLinearOps for CubeBackend {
    fn unpack(words: CubeTensor, scales: CubeTensor, layout: Layout) -> CubeTensor {
        let unpacked = reference::unpack(
            Tensor::<1, Int>::from_primitive::<Self>(words),
            Tensor::<1>::from_primitive::<Self>(scales),
            layout,
        );
        let primitive = unpacked.try_into_primitive::<Self>();
        primitive.unwrap_or_else(|_| unreachable!("what comes from tensors of a backend is one of its own"))
    }

    fn project_quantized(
        x: CubeTensor,
        words: CubeTensor,
        scales: CubeTensor,
        layout: Layout,
        precision: Precision,
    ) -> CubeTensor {
        Self::project(x, Self::unpack(words, scales, layout), precision)
    }

    fn add_project_quantized(
        residual: CubeTensor,
        x: CubeTensor,
        words: CubeTensor,
        scales: CubeTensor,
        layout: Layout,
        precision: Precision,
    ) -> CubeTensor {
        Self::add_project(residual, x, Self::unpack(words, scales, layout), precision)
    }
}

impl QuantizedLinearGradients for CubeBackend {
    fn input_grad_quantized(
        (words, scales): Matrix<Self>,
        grad: CubeTensor,
        layout: Layout,
        precision: Precision,
    ) -> CubeTensor {
        let [batch, seq, _] = dims::<3>(&grad);
        let weight = operand(Self::unpack(words, scales, layout), precision);
        reshaped(product(operand(tall(grad), precision), weight, precision), [batch, seq, layout.d_in])
    }
}
