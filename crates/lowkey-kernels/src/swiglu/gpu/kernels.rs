//! Kernels of the activation between the products.

use cubecl::prelude::*;

/// `silu(gate) · up`, in f32 whatever the numbers are kept in.
#[cube(launch)]
pub(super) fn swiglu<E: Float>(gate: &[E], up: &[E], out: &mut [E], count: usize) {
    let at = ABSOLUTE_POS;
    if at < count {
        let g = f32::cast_from(gate[at]);
        out[at] = E::cast_from(g / (1.0f32 + (-g).exp()) * f32::cast_from(up[at]));
    }
}

/// The activation of [`swiglu`] anew, and the gradients of its arguments, which take their places.
#[cube(launch)]
pub(super) fn swiglu_grad<E: Float>(gate: &mut [E], up: &mut [E], grad: &[E], act: &mut [E], count: usize) {
    let at = ABSOLUTE_POS;
    if at < count {
        let (g, u, d) = (f32::cast_from(gate[at]), f32::cast_from(up[at]), f32::cast_from(grad[at]));
        let sigmoid = 1.0f32 / (1.0f32 + (-g).exp());
        let silu = g * sigmoid;
        act[at] = E::cast_from(silu * u);
        up[at] = E::cast_from(d * silu);
        gate[at] = E::cast_from(d * u * sigmoid * (1.0f32 + g * (1.0f32 - sigmoid)));
    }
}
