//! What a linear map reads.

use burn::tensor::Tensor;
use lowkey_kernels::linear;
use lowkey_kernels::recalled::{MadeOf, linear_of, swiglu};

use crate::layers::RmsNorm;

/// The input of a linear map, `[batch, seq, d]`, with what it was made of where that is known: the map, or an adapter beside it, then need
/// not keep it for its backward pass.
#[derive(Clone, Debug)]
pub struct Input {
    pub(crate) value: Tensor<3>,
    pub(crate) made: Option<MadeOf>,
}

impl From<Tensor<3>> for Input {
    fn from(value: Tensor<3>) -> Self {
        Self { value, made: None }
    }
}

impl Input {
    /// What the norm makes of `x [batch, seq, d]`.
    pub(crate) fn normed(norm: &RmsNorm, x: Tensor<3>) -> Self {
        let made = MadeOf::Norm { x: x.clone(), gain: norm.gain(), eps: norm.eps };
        Self { value: norm.forward(x), made: Some(made) }
    }

    /// `silu(gate) · up`, `[batch, seq, f]`.
    pub(crate) fn swiglu(gate: Tensor<3>, up: Tensor<3>) -> Self {
        let made = MadeOf::Swiglu { gate: gate.clone(), up: up.clone() };
        Self { value: swiglu(gate, up), made: Some(made) }
    }

    /// `x · Wᵀ (+ b)` with a matrix `[d_out, d]`, and a bias `[d_out]`.
    pub(crate) fn by(self, matrix: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<3> {
        match self.made {
            None => linear(self.value, matrix, bias),
            Some(made) => linear_of(self.value, made, matrix, bias),
        }
    }
}
