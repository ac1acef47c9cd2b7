//! Linear maps of what can be formed anew: they keep what it was made of, which is kept anyway, and not it.
//!
//! The gradient of a matrix takes the input of its map. Those inputs are a norm or an activation, wide and soon computed; kept, they
//! would be a tenth of what a step keeps, and half of what a step with adapters does, where the matrix A of each asks for them.

pub(crate) mod autodiff;
mod cpu;
#[cfg(feature = "gpu")]
mod gpu;
#[cfg(test)]
mod tests;

use burn::backend::Dispatch;
use burn::tensor::{DType, Tensor};

use self::autodiff::{Recall, RecalledOps};
use crate::linear;
use crate::precision;
pub use crate::swiglu::swiglu;

/// What an input was made of.
#[derive(Clone, Debug)]
pub enum MadeOf {
    /// [`crate::rms_norm`] of x `[batch, seq, d]` with a gain `[d]`.
    Norm {
        /// x
        x: Tensor<3>,
        /// The gain.
        gain: Tensor<1>,
        /// Added to the mean square.
        eps: f64,
    },
    /// [`swiglu`] of two activations `[batch, seq, f]`.
    Swiglu {
        /// The activation that goes through silu.
        gate: Tensor<3>,
        /// The other one.
        up: Tensor<3>,
    },
}

/// [`crate::linear`] of an `x` that is what `made` says: the same numbers and gradients, but `x` is not kept: the backward pass forms
/// it anew.
///
/// # Shapes
/// `x [batch, seq, d_in]`, `weight [d_out, d_in]`, `bias [d_out]` → `[batch, seq, d_out]`.
pub fn linear_of(x: Tensor<3>, made: MadeOf, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<3> {
    if x.dtype() != DType::F32 {
        return linear(x, weight, bias);
    }
    let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
    let y = Tensor::from_dispatch(Dispatch::project_recalled(x, made.recall(), weight, precision::current()));
    match bias {
        Some(bias) => y + bias.unsqueeze::<3>(),
        None => y,
    }
}

impl MadeOf {
    pub(crate) fn recall(self) -> Recall<Dispatch> {
        match self {
            Self::Norm { x, gain, eps } => Recall::Norm { x: x.into_dispatch(), gain: gain.into_dispatch(), eps },
            Self::Swiglu { gate, up } => Recall::Swiglu { gate: gate.into_dispatch(), up: up.into_dispatch() },
        }
    }
}
