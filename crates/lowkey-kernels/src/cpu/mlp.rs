//! The second half of a decoder block, `x + down(silu(gate n) · up n)` with `n = RMSNorm(x)`, as one operation.
//!
//! Of what lies between, only the two inner activations are kept for the backward pass; the norm and their product
//! are computed again there, while the data passes through anyway.

use pulp::Arch;
use rayon::prelude::*;

use super::linear::{Tokens, input_gradient, project, weight_gradient};
use super::pointwise::{self, PIECE};
use super::vector::exp;

/// Weights of the half-block: `norm [d]`, `gate` and `up [f, d]`, `down [d, f]`.
#[derive(Clone, Copy)]
pub(crate) struct Weights<'a> {
    pub(crate) norm: &'a [f32],
    pub(crate) gate: &'a [f32],
    pub(crate) up: &'a [f32],
    pub(crate) down: &'a [f32],
    pub(crate) eps: f32,
}

impl Weights<'_> {
    fn widths(self) -> [usize; 2] {
        let d = self.norm.len();
        [d, self.gate.len() / d]
    }
}

/// Writes `out [n, d]`, and `gate` and `up [n, f]`, which [`backward`] wants.
pub(crate) fn forward(x: &[f32], weights: Weights, gate: &mut [f32], up: &mut [f32], out: &mut [f32]) {
    let [d, f] = weights.widths();
    let mut normed = vec![0.0; x.len()];
    pointwise::rms_norm(Tokens::dense(x, d), weights.norm, weights.eps, 1.0, &mut normed, d);
    project(Tokens::dense(&normed, d), weights.gate, d, gate, false);
    project(Tokens::dense(&normed, d), weights.up, d, up, false);
    drop(normed);
    let mut inner = vec![0.0; gate.len()];
    pointwise::swiglu(gate, up, &mut inner);
    out.copy_from_slice(x);
    project(Tokens::dense(&inner, f), weights.down, f, out, true);
}

/// Gradients of [`forward`], those of matrices where they are wanted.
pub(crate) struct Gradients<'a> {
    pub(crate) x: &'a mut [f32],
    pub(crate) norm: &'a mut [f32],
    pub(crate) gate: Option<&'a mut [f32]>,
    pub(crate) up: Option<&'a mut [f32]>,
    pub(crate) down: Option<&'a mut [f32]>,
}

/// Fills `gradients` from that of the output; overwrites `gate` and `up`, the activations that [`forward`] left.
pub(crate) fn backward(
    x: &[f32],
    weights: Weights,
    gate: &mut [f32],
    up: &mut [f32],
    d_out: &[f32],
    gradients: Gradients,
) {
    let [d, f] = weights.widths();
    // First the gradient of the inner activation, then in its place the activation itself, formed anew.
    let mut inner = vec![0.0; gate.len()];
    input_gradient(d_out, weights.down, f, &mut inner, false);
    swiglu_in_place(gate, up, &mut inner);
    if let Some(down) = gradients.down {
        weight_gradient(d_out, Tokens::dense(&inner, f), f, down);
    }
    drop(inner);
    let mut normed = vec![0.0; x.len()];
    if gradients.gate.is_some() || gradients.up.is_some() {
        pointwise::rms_norm(Tokens::dense(x, d), weights.norm, weights.eps, 1.0, &mut normed, d);
    }
    for (d_y, gradient) in [(&*gate, gradients.gate), (&*up, gradients.up)] {
        if let Some(gradient) = gradient {
            weight_gradient(d_y, Tokens::dense(&normed, d), d, gradient);
        }
    }
    let d_normed = &mut normed;
    input_gradient(gate, weights.gate, d, d_normed, false);
    input_gradient(up, weights.up, d, d_normed, true);
    gradients.x.copy_from_slice(d_out);
    let d_x = pointwise::Target { data: gradients.x, stride: d, accumulate: true };
    let x = Tokens::dense(x, d);
    pointwise::rms_norm_grad(x, weights.norm, d_normed, weights.eps, 1.0, d_x, gradients.norm);
}

/// `(gate, up, d_inner)` → `(d_gate, d_up, inner)` for `inner = silu(gate) · up`.
fn swiglu_in_place(gate: &mut [f32], up: &mut [f32], inner: &mut [f32]) {
    let arch = Arch::new();
    let pieces = gate.par_chunks_mut(PIECE).zip(up.par_chunks_mut(PIECE)).zip(inner.par_chunks_mut(PIECE));
    pieces.for_each(|((gate, up), inner)| {
        arch.dispatch(|| {
            for ((gate, up), inner) in gate.iter_mut().zip(up.iter_mut()).zip(inner.iter_mut()) {
                let (g, u, d) = (*gate, *up, *inner);
                let s = 1.0 / (1.0 + exp(-g));
                let silu = g * s;
                *inner = silu * u;
                *up = d * silu;
                *gate = d * u * s * (1.0 + g * (1.0 - s));
            }
        });
    });
}
