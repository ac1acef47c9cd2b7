//! The second half of a decoder block, `x + down(silu(gate n) · up n)` with `n = RMSNorm(x)`, as one operation.
//!
//! Of what lies between, only the two inner activations are kept for the backward pass; the norm and their product
//! are computed again there, while the data passes through anyway.

use burn::backend::Flex;
use burn_flex::FlexTensor;

use super::autodiff::{MlpGradients, MlpOps, MlpState, MlpWeights};
use crate::autodiff::Wanted;
use crate::cpu::linear::{Tokens, input_gradient, project, weight_gradient};
use crate::cpu::tensors::{dims, like, new, numbers, room, wanted_like};
use crate::norm::cpu::{Target, rms_norm, rms_norm_grad};
use crate::precision::Precision;
use crate::swiglu::cpu::{swiglu, swiglu_in_place};

/// Weights of the half-block: `norm [d]`, `gate` and `up [f, d]`, `down [d, f]`.
#[derive(Clone, Copy)]
pub(crate) struct Weights<'a> {
    pub(crate) norm: &'a [f32],
    pub(crate) gate: &'a [f32],
    pub(crate) up: &'a [f32],
    pub(crate) down: &'a [f32],
    pub(crate) eps: f32,
    pub(crate) precision: Precision,
}

impl Weights<'_> {
    fn widths(self) -> [usize; 2] {
        let d = self.norm.len();
        [d, self.gate.len() / d]
    }
}

/// Writes `out [n, d]`, and `gate` and `up [n, f]`, which [`backward`] wants.
pub(crate) fn forward(x: &[f32], weights: Weights, gate: &mut [f32], up: &mut [f32], out: &mut [f32]) {
    let ([d, f], precision) = (weights.widths(), weights.precision);
    let mut normed = room(x.len());
    rms_norm(Tokens::dense(x, d), weights.norm, weights.eps, 1.0, &mut normed, d);
    project(precision, Tokens::dense(&normed, d), weights.gate, d, gate, false);
    project(precision, Tokens::dense(&normed, d), weights.up, d, up, false);
    drop(normed);
    let mut inner = room(gate.len());
    swiglu(gate, up, &mut inner);
    out.copy_from_slice(x);
    project(precision, Tokens::dense(&inner, f), weights.down, f, out, true);
}

/// Gradients of [`forward`], those of weights where they are wanted.
pub(crate) struct Gradients<'a> {
    pub(crate) x: &'a mut [f32],
    pub(crate) norm: Option<&'a mut [f32]>,
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
    let ([d, f], precision) = (weights.widths(), weights.precision);
    // First the gradient of the inner activation, then in its place the activation itself, formed anew.
    let mut inner = room(gate.len());
    input_gradient(precision, d_out, weights.down, f, &mut inner, false);
    swiglu_in_place(gate, up, &mut inner);
    if let Some(down) = gradients.down {
        weight_gradient(precision, d_out, Tokens::dense(&inner, f), f, down);
    }
    drop(inner);
    let mut normed = room(x.len());
    if gradients.gate.is_some() || gradients.up.is_some() {
        rms_norm(Tokens::dense(x, d), weights.norm, weights.eps, 1.0, &mut normed, d);
    }
    for (d_y, gradient) in [(&*gate, gradients.gate), (&*up, gradients.up)] {
        if let Some(gradient) = gradient {
            weight_gradient(precision, d_y, Tokens::dense(&normed, d), d, gradient);
        }
    }
    let d_normed = &mut normed;
    input_gradient(precision, gate, weights.gate, d, d_normed, false);
    input_gradient(precision, up, weights.up, d, d_normed, true);
    gradients.x.copy_from_slice(d_out);
    let d_x = Target { data: gradients.x, stride: d, accumulate: true };
    let x = Tokens::dense(x, d);
    rms_norm_grad(x, weights.norm, d_normed, weights.eps, 1.0, d_x, gradients.norm);
}

fn mlp_weights<'a>(weights: &'a [FlexTensor; 4], eps: f64, precision: Precision) -> Weights<'a> {
    let [norm, gate, up, down] = weights.each_ref().map(|weight| weight.storage());
    Weights { norm, gate, up, down, eps: eps as f32, precision }
}

impl MlpOps for Flex {
    fn gated_mlp(
        x: FlexTensor,
        norm: FlexTensor,
        gate: FlexTensor,
        up: FlexTensor,
        down: FlexTensor,
        eps: f64,
        precision: Precision,
    ) -> FlexTensor {
        let [out, ..] = Self::gated_mlp_saving(x, [norm, gate, up, down], eps, precision);
        out
    }
}

impl MlpGradients for Flex {
    fn gated_mlp_saving(x: FlexTensor, weights: MlpWeights<Self>, eps: f64, precision: Precision) -> [FlexTensor; 3] {
        let (x, weights) = (x.to_contiguous(), weights.map(|weight| weight.to_contiguous()));
        let [batch, seq, _] = dims::<3>(&x);
        let [inner, _] = dims::<2>(&weights[1]);
        let (mut out, mut gate, mut up) = (like(&x), new([batch, seq, inner]), new([batch, seq, inner]));
        let (gate_data, up_data) = (gate.storage_mut(), up.storage_mut());
        forward(x.storage(), mlp_weights(&weights, eps, precision), gate_data, up_data, out.storage_mut());
        [out, gate, up]
    }

    fn gated_mlp_grad(
        saved: MlpState<Self>,
        grad: FlexTensor,
        eps: f64,
        precision: Precision,
        wanted: Wanted<5>,
    ) -> [Option<FlexTensor>; 5] {
        let MlpState { x, weights, inner: [mut gate, mut up] } = saved;
        let (x, grad) = (x.to_contiguous(), grad.to_contiguous());
        let weights = weights.map(|weight| weight.to_contiguous());
        let [of_x, of_weights @ ..] = wanted;
        let (mut d_x, mut d_weights) = (like(&x), wanted_like(weights.each_ref(), of_weights));
        let [d_norm, d_gate, d_up, d_down] = &mut d_weights;
        let gradients = Gradients {
            x: d_x.storage_mut(),
            norm: numbers(d_norm),
            gate: numbers(d_gate),
            up: numbers(d_up),
            down: numbers(d_down),
        };
        let (gate, up) = (gate.storage_mut(), up.storage_mut());
        backward(x.storage(), mlp_weights(&weights, eps, precision), gate, up, grad.storage(), gradients);
        let [d_norm, d_gate, d_up, d_down] = d_weights;
        [of_x.then_some(d_x), d_norm, d_gate, d_up, d_down]
    }
}
