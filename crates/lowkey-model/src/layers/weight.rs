//! The matrix of a linear map: whole, or frozen and packed.

use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor};

use lowkey_kernels::adapted::FrozenMatrix;
use lowkey_kernels::add_linear;
use lowkey_kernels::quantized_linear::QuantizedMatrix;

use super::replace;
use crate::input::Input;

/// W `[d_out, d_in]`, without what an adapter adds to it.
#[derive(Module, Debug)]
#[expect(clippy::large_enum_variant, reason = "one per map; a box would stand between every use and the tensors")]
pub(crate) enum Weight {
    /// A parameter.
    Whole(Param<Tensor<2>>),
    /// Few bits to a number, which are no parameter: nothing trains or saves them.
    Packed(QuantizedMatrix),
}

impl Weight {
    /// As f32 numbers: of a packed matrix a copy.
    pub(crate) fn matrix(&self) -> Tensor<2> {
        match self {
            Self::Whole(weight) => weight.val(),
            Self::Packed(packed) => packed.unpack(),
        }
    }

    /// Puts another matrix in its place, trained or frozen as this one is.
    pub(crate) fn set(&mut self, matrix: Tensor<2>) {
        match self {
            Self::Whole(weight) => replace(weight, matrix),
            Self::Packed(_) => {
                let (recorded, whole) = (matrix.is_autodiff(), Param::from_tensor(matrix.detach()));
                *self = Self::Whole(if recorded { whole.set_require_grad(false) } else { whole });
            }
        }
    }

    /// The matrix where it lies, if it is frozen.
    pub(crate) fn frozen(&self) -> Option<FrozenMatrix> {
        match self {
            Self::Whole(weight) => (!weight.is_require_grad()).then(|| FrozenMatrix::Whole(self.matrix())),
            Self::Packed(packed) => Some(FrozenMatrix::Packed(packed.clone())),
        }
    }

    pub(crate) fn is_packed(&self) -> bool {
        matches!(self, Self::Packed(_))
    }

    pub(crate) fn dims(&self) -> [usize; 2] {
        match self {
            Self::Whole(weight) => weight.dims(),
            Self::Packed(packed) => packed.dims(),
        }
    }

    /// The format of the numbers that it is multiplied as.
    pub(crate) fn dtype(&self) -> DType {
        match self {
            Self::Whole(weight) => weight.dtype(),
            Self::Packed(_) => DType::F32,
        }
    }

    /// `x Wᵀ (+ b)`.
    pub(crate) fn linear(&self, x: Input, bias: Option<Tensor<1>>) -> Tensor<3> {
        match self {
            Self::Whole(weight) => x.by(weight.val(), bias),
            Self::Packed(packed) => packed.linear(x.value, bias),
        }
    }

    /// `residual + x Wᵀ (+ b)`.
    pub(crate) fn add_linear(&self, residual: Tensor<3>, x: Tensor<3>, bias: Option<Tensor<1>>) -> Tensor<3> {
        match self {
            Self::Whole(weight) => add_linear(residual, x, weight.val(), bias),
            Self::Packed(packed) => packed.add_linear(residual, x, bias),
        }
    }
}
