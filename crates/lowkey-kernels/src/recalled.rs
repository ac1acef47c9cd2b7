//! Linear maps of what can be formed anew: they keep what it was made of, which is kept anyway, and not it.
//!
//! The matrix A of a low-rank adapter is trained, and its gradient takes the input of the map beside which it stands. Those inputs are
//! a norm or an activation, wide and soon computed; kept, they would be half of what a step with adapters keeps.

mod autodiff;
mod cpu;
#[cfg(feature = "gpu")]
mod gpu;
#[cfg(test)]
mod tests;

use burn::backend::Dispatch;
use burn::tensor::{DType, Tensor};

use self::autodiff::RecalledOps;
use crate::linear::reference::linear;
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
/// `x [batch, seq, d_in]`, `weight [d_out, d_in]` → `[batch, seq, d_out]`.
pub fn linear_of(x: Tensor<3>, made: MadeOf, weight: Tensor<2>) -> Tensor<3> {
    if x.dtype() != DType::F32 {
        return linear(x, weight);
    }
    let (x, weight, precision) = (x.into_dispatch(), weight.into_dispatch(), precision::current());
    Tensor::from_dispatch(match made {
        MadeOf::Norm { x: of, gain, eps } => {
            Dispatch::project_normed(x, of.into_dispatch(), gain.into_dispatch(), weight, eps, precision)
        }
        MadeOf::Swiglu { gate, up } => {
            Dispatch::project_swiglu(x, gate.into_dispatch(), up.into_dispatch(), weight, precision)
        }
    })
}
