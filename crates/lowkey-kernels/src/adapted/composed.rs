//! Adapted maps composed of others' operations: what a backend computes that knows no better.

use burn::backend::tensor::FloatTensor;

use super::autodiff::{AdaptedState, Map};
use super::mlp::{AdaptedMlpState, Between};
use crate::autodiff::Wanted;
use crate::linear::autodiff::{LinearGradients, ProjectState};
use crate::norm::autodiff::NormGradients;
use crate::precision::Precision;
use crate::quantized_linear::autodiff::QuantizedLinearOps;
use crate::recalled::autodiff::{Forms, Recall};
use crate::swiglu::autodiff::SwigluGradients;

/// See [`super::autodiff::AdaptedGradients::adapted_saving`].
pub(super) fn saving<B: LinearGradients + QuantizedLinearOps + Forms>(
    residual: Option<FloatTensor<B>>,
    x: FloatTensor<B>,
    map: Map<B>,
    precision: Precision,
) -> [FloatTensor<B>; 2] {
    let Map { weight, a, b, scale } = map;
    let weight = B::rounded(weight.whole(), precision);
    let low = B::project(x.clone(), a, precision);
    let y = match residual {
        Some(residual) => B::add_project(residual, x, weight, precision),
        None => B::project(x, weight, precision),
    };
    let scaled = B::rounded(B::float_mul_scalar(low.clone(), scale.into()), precision);
    [B::add_project(y, scaled, b, precision), low]
}

/// See [`super::autodiff::AdaptedGradients::adapted_grad`].
pub(super) fn grad<B: LinearGradients + QuantizedLinearOps + Forms>(
    saved: AdaptedState<B>,
    grad: FloatTensor<B>,
    precision: Precision,
    [of_x, of_a, of_b]: Wanted<3>,
) -> [Option<FloatTensor<B>>; 3] {
    let AdaptedState { input, map: Map { weight, a, b, scale }, low } = saved;
    let times = |x: FloatTensor<B>| B::float_mul_scalar(x, scale.into());
    let scaled = of_b.then(|| B::rounded(times(low), precision));
    let beside = ProjectState { x: scaled, weight: (of_x || of_a).then_some(b) };
    let [d_scaled, d_b] = B::project_grad(beside, grad.clone(), precision);
    let [beside, d_a] = match d_scaled {
        None => [None, None],
        Some(d_scaled) => {
            let x = input.filter(|_| of_a).map(|input| input.form(precision));
            B::project_grad(ProjectState { x, weight: of_x.then_some(a) }, times(d_scaled), precision)
        }
    };
    let weight = of_x.then(|| B::rounded(weight.whole(), precision));
    let [whole, _] = B::project_grad(ProjectState { x: None, weight }, grad, precision);
    let d_x = whole.zip(beside).map(|(whole, beside)| B::float_add(whole, beside));
    [d_x, d_a, d_b]
}

/// See [`super::mlp::AdaptedMlpGradients::adapted_mlp_saving`].
pub(super) fn mlp_saving<B: LinearGradients + QuantizedLinearOps + Forms>(
    x: FloatTensor<B>,
    norm: FloatTensor<B>,
    [gate, up, down]: [Map<B>; 3],
    eps: f64,
    precision: Precision,
) -> (FloatTensor<B>, Between<B>) {
    let normed = B::rounded(B::rms_norm(x.clone(), norm, eps), precision);
    let [gate, gate_low] = saving::<B>(None, normed.clone(), gate, precision);
    let [up, up_low] = saving::<B>(None, normed, up, precision);
    let inner = B::rounded(B::swiglu(gate.clone(), up.clone()), precision);
    let [out, down_low] = saving::<B>(Some(x), inner, down, precision);
    (out, ([gate_low, up_low, down_low], [gate, up]))
}

/// See [`super::mlp::AdaptedMlpGradients::adapted_mlp_grad`].
pub(super) fn mlp_grad<B: LinearGradients + QuantizedLinearOps + Forms + NormGradients + SwigluGradients>(
    saved: AdaptedMlpState<B>,
    d_out: FloatTensor<B>,
    eps: f64,
    precision: Precision,
    [of_x, of_norm, of_gate_a, of_gate_b, of_up_a, of_up_b, of_down_a, of_down_b]: Wanted<8>,
) -> [Option<FloatTensor<B>>; 8] {
    let AdaptedMlpState { x, norm, maps: [gate_map, up_map, down_map], between } = saved;
    let ([gate_low, up_low, down_low], [gate, up]) = between;
    let input = Some(Recall::Swiglu { gate: gate.clone(), up: up.clone() });
    let state = AdaptedState { input, map: down_map, low: down_low };
    let [d_inner, d_down_a, d_down_b] = grad(state, d_out.clone(), precision, [true, of_down_a, of_down_b]);
    let Some(d_inner) = d_inner else { unreachable!("it was wanted") };
    let [d_gate, d_up] = B::swiglu_grad(gate, up, d_inner);
    let (below, input) = (of_x || of_norm, || Some(Recall::Norm { x: x.clone(), gain: norm.clone(), eps }));
    let state = AdaptedState { input: input(), map: gate_map, low: gate_low };
    let [by_gate, d_gate_a, d_gate_b] = grad(state, d_gate, precision, [below, of_gate_a, of_gate_b]);
    let state = AdaptedState { input: input(), map: up_map, low: up_low };
    let [by_up, d_up_a, d_up_b] = grad(state, d_up, precision, [below, of_up_a, of_up_b]);
    let (d_x, d_norm) = match by_gate.zip(by_up) {
        None => (None, None),
        Some((by_gate, by_up)) => {
            let (d_x, d_norm) = B::rms_norm_grad(x, norm, B::float_add(by_gate, by_up), eps, of_norm);
            (of_x.then(|| B::float_add(d_x, d_out)), d_norm)
        }
    };
    [d_x, d_norm, d_gate_a, d_gate_b, d_up_a, d_up_b, d_down_a, d_down_b]
}
