//! Every operation as a composition of ordinary tensor operations.
//!
//! It runs on every backend and in every floating-point dtype, and it is what the fused implementations are held to. Slow
//! and hungry: whole score and logit matrices exist.
//!
//! Each lies with its operation, in `reference.rs` of its folder.

pub use crate::adapted::reference::{adapted_linear, adapted_mlp};
pub use crate::cache::reference::{absorbed_attention, quantise, widen};
pub use crate::causal_attention::reference::causal_attention;
pub use crate::embedding::reference::embed;
pub use crate::latent_attention::reference::latent_attention;
pub use crate::linear::reference::linear;
pub use crate::loss::reference::{cross_entropy_each, cross_entropy_sum, distill_sum, diverge_sum};
pub use crate::mlp::reference::gated_mlp;
pub use crate::norm::reference::rms_norm;
pub use crate::quantized_linear::reference::quantized_linear;
pub use crate::rotary::reference::rotate;
pub use crate::swiglu::reference::swiglu;

use burn::tensor::Tensor;

use crate::device::facts::is_cpu;

/// `a · b`, of matrices or of as many each. On a GPU from products and sums of single numbers: Burn's `matmul` rounds f32 to TF32 there,
/// where the device has it, and what other kernels are held to must not be rounded to ten bits.
pub(crate) fn product<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> Tensor<D> {
    if is_cpu(&a.device()) {
        return a.matmul(b);
    }
    let (mut shape, n) = (a.dims(), b.dims()[D - 1]);
    let [m, k] = [shape[D - 2], shape[D - 1]];
    let each = shape[..D - 2].iter().product::<usize>();
    shape[D - 1] = n;
    let (a, b) = (a.reshape([each, m, k, 1]), b.reshape([each, 1, k, n]));
    (a * b).sum_dim(2).reshape(shape)
}
