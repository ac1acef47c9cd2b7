//! The adapted feed-forward layer on the CPU.

use burn::backend::Flex;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::{AdaptedMlpGradients, AdaptedMlpOps, AdaptedMlpState, Between};
use crate::adapted::autodiff::Map;
use crate::adapted::cpu::{Dense, Matrices, SHARE, Sums};
use crate::autodiff::Wanted;
use crate::cpu::linear::{Tokens, input_gradient, project};
use crate::cpu::narrow::TOKENS;
use crate::cpu::tensors::{dims, like, new, numbers, room, wanted_like};
use crate::norm::cpu::{Target, rms_norm, rms_norm_grad};
use crate::precision::Precision;
use crate::swiglu::cpu::{swiglu, swiglu_in_place};

/// Weights of the half-block.
#[derive(Clone, Copy)]
struct Weights<'a> {
    norm: &'a [f32],
    eps: f32,
    gate: Matrices<'a>,
    up: Matrices<'a>,
    down: Matrices<'a>,
}

/// Writes the numbers between A and B of each map, `gate` and `up [n, f]`, and `out [n, d]`.
fn forward(x: &[f32], weights: Weights, lows: [&mut [f32]; 3], [gate, up]: [&mut [f32]; 2], out: &mut [f32]) {
    let Weights { norm, eps, .. } = weights;
    let [d, f] = [weights.gate.d_in, weights.gate.d_out];
    let [gate_low, up_low, down_low] = lows;
    let [gate_r, up_r, down_r] = [weights.gate.r, weights.up.r, weights.down.r];
    let mut normed = room(x.len());
    rms_norm(Tokens::dense(x, d), norm, eps, 1.0, &mut normed, d);
    project(weights.gate.precision, Tokens::dense(&normed, d), weights.gate.weight, d, gate, false);
    project(weights.up.precision, Tokens::dense(&normed, d), weights.up.weight, d, up, false);
    let mut inner = room(gate.len());
    let [by_gate, by_up, by_down] = [weights.gate, weights.up, weights.down].map(Matrices::forth);
    let of_gate = gate.par_chunks_mut(SHARE * f).zip(gate_low.par_chunks_mut(SHARE * gate_r));
    let of_up = up.par_chunks_mut(SHARE * f).zip(up_low.par_chunks_mut(SHARE * up_r));
    let of_down = inner.par_chunks_mut(SHARE * f).zip(down_low.par_chunks_mut(SHARE * down_r));
    let rows = out.par_chunks_mut(SHARE * d).zip(x.par_chunks(SHARE * d).zip(normed.par_chunks(SHARE * d)));
    of_gate.zip(of_up).zip(of_down.zip(rows)).for_each(
        |(((gate, gate_low), (up, up_low)), ((inner, down_low), (out, (x, normed))))| {
            let (mut gate_room, mut up_room, mut down_room) = (by_gate.room(), by_up.room(), by_down.room());
            let of_gate = gate.chunks_mut(TOKENS * f).zip(gate_low.chunks_mut(TOKENS * gate_r));
            let of_up = up.chunks_mut(TOKENS * f).zip(up_low.chunks_mut(TOKENS * up_r));
            let of_down = inner.chunks_mut(TOKENS * f).zip(down_low.chunks_mut(TOKENS * down_r));
            let rows = out.chunks_mut(TOKENS * d).zip(x.chunks(TOKENS * d).zip(normed.chunks(TOKENS * d)));
            for (((gate, gate_low), (up, up_low)), ((inner, down_low), (out, (x, normed)))) in
                of_gate.zip(of_up).zip(of_down.zip(rows))
            {
                by_gate.pass(normed, gate_low, gate, true, &mut gate_room);
                by_up.pass(normed, up_low, up, true, &mut up_room);
                swiglu(gate, up, inner);
                out.copy_from_slice(x);
                by_down.pass(inner, down_low, out, true, &mut down_room);
            }
        },
    );
    drop(normed);
    project(weights.down.precision, Tokens::dense(&inner, f), weights.down.weight, f, out, true);
}

/// From the gradient of the output that of the norm's, where it is wanted `below`, and those of the factors; overwrites `gate` and `up`,
/// the activations that [`forward`] left.
fn backward(
    x: &[f32],
    weights: Weights,
    lows: [&[f32]; 3],
    [gate, up]: [&mut [f32]; 2],
    d_out: &[f32],
    below: bool,
) -> (Vec<f32>, Option<[Sums; 3]>) {
    let Weights { norm, eps, .. } = weights;
    let [d, f] = [weights.gate.d_in, weights.gate.d_out];
    let (count, [gate_low, up_low, down_low]) = (x.len() / d, lows);
    let [gate_r, up_r, down_r] = [weights.gate.r, weights.up.r, weights.down.r];
    // The gradient of the inner activation, and of what lies between the factors of `down`.
    let by_down = weights.down.back();
    let padded = by_down.padded();
    let mut d_down_low = vec![0.0; count * padded];
    let sources = d_out.par_chunks(SHARE * d).zip(down_low.par_chunks(SHARE * down_r));
    let of_down: Vec<Sums> = d_down_low
        .par_chunks_mut(SHARE * padded)
        .zip(sources)
        .map(|(d_low, (d_out, low))| {
            let (mut sums, mut room) = (by_down.sums(), by_down.room());
            let sources = d_out.chunks(TOKENS * d).zip(low.chunks(TOKENS * down_r));
            for (kept, (d_out, low)) in d_low.chunks_mut(TOKENS * padded).zip(sources) {
                kept.copy_from_slice(by_down.gather(d_out, low, &mut sums, &mut room));
            }
            sums
        })
        .collect();
    let mut inner = room(gate.len());
    input_gradient(weights.down.precision, d_out, weights.down.weight, f, &mut inner, false);
    let (by_gate, by_up) = (weights.gate.back(), weights.up.back());
    let mut d_normed = room(x.len());
    let activations =
        gate.par_chunks_mut(SHARE * f).zip(up.par_chunks_mut(SHARE * f)).zip(inner.par_chunks_mut(SHARE * f));
    let rows = d_normed.par_chunks_mut(SHARE * d).zip(x.par_chunks(SHARE * d));
    let between = gate_low.par_chunks(SHARE * gate_r).zip(up_low.par_chunks(SHARE * up_r));
    let between = between.zip(d_down_low.par_chunks(SHARE * padded));
    let parts: Vec<[Sums; 3]> = activations
        .zip(rows)
        .zip(between.zip(of_down))
        .map(|((((gate, up), inner), (d_normed, x)), (((gate_low, up_low), d_down_low), mut of_down))| {
            let (mut of_gate, mut gate_room) = (by_gate.sums(), by_gate.room());
            let (mut of_up, mut up_room) = (by_up.sums(), by_up.room());
            let mut normed = vec![0.0; TOKENS * d];
            let activations =
                gate.chunks_mut(TOKENS * f).zip(up.chunks_mut(TOKENS * f)).zip(inner.chunks_mut(TOKENS * f));
            let rows = d_normed.chunks_mut(TOKENS * d).zip(x.chunks(TOKENS * d));
            let between = gate_low.chunks(TOKENS * gate_r).zip(up_low.chunks(TOKENS * up_r));
            let between = between.zip(d_down_low.chunks(TOKENS * padded));
            for ((((gate, up), inner), (d_normed, x)), ((gate_low, up_low), d_down_low)) in
                activations.zip(rows).zip(between)
            {
                by_down.spread(d_down_low, inner, true);
                // The gradient of the activation gives way to it, and they to theirs.
                swiglu_in_place(gate, up, inner);
                by_down.collect(d_down_low, inner, &mut of_down);
                let normed = &mut normed[..x.len()];
                rms_norm(Tokens::dense(x, d), norm, eps, 1.0, normed, d);
                let d_low = by_gate.gather(gate, gate_low, &mut of_gate, &mut gate_room);
                by_gate.collect(d_low, normed, &mut of_gate);
                by_gate.spread(d_low, d_normed, false);
                let d_low = by_up.gather(up, up_low, &mut of_up, &mut up_room);
                by_up.collect(d_low, normed, &mut of_up);
                by_up.spread(d_low, d_normed, true);
            }
            [of_gate, of_up, of_down]
        })
        .collect();
    drop(inner);
    if below {
        input_gradient(weights.gate.precision, gate, weights.gate.weight, d, &mut d_normed, true);
        input_gradient(weights.up.precision, up, weights.up.weight, d, &mut d_normed, true);
    }
    let mut of_maps: [Vec<Sums>; 3] = Default::default();
    for part in parts {
        of_maps.iter_mut().zip(part).for_each(|(sums, part)| sums.push(part));
    }
    let sums = match of_maps.map(Sums::all) {
        [Some(of_gate), Some(of_up), Some(of_down)] => Some([of_gate, of_up, of_down]),
        _ => None,
    };
    (d_normed, sums)
}

impl AdaptedMlpOps for Flex {
    fn adapted_mlp(
        x: FlexTensor,
        norm: FlexTensor,
        gate: Map<Self>,
        up: Map<Self>,
        down: Map<Self>,
        eps: f64,
        precision: Precision,
    ) -> FlexTensor {
        Self::adapted_mlp_saving(x, norm, [gate, up, down], eps, precision).0
    }
}

fn weights<'a>(norm: &'a FlexTensor, [gate, up, down]: &'a [Dense; 3], eps: f64, precision: Precision) -> Weights<'a> {
    let [gate, up, down] = [gate, up, down].map(|map| Matrices::of(map, precision));
    Weights { norm: norm.storage(), eps: eps as f32, gate, up, down }
}

impl AdaptedMlpGradients for Flex {
    fn adapted_mlp_saving(
        x: FlexTensor,
        norm: FlexTensor,
        maps: [Map<Self>; 3],
        eps: f64,
        precision: Precision,
    ) -> (FlexTensor, Between<Self>) {
        let (x, norm, maps) = (x.to_contiguous(), norm.to_contiguous(), maps.map(Dense::of));
        let [batch, seq, _] = dims::<3>(&x);
        let [f, _] = dims::<2>(&maps[0].weight);
        let mut lows = maps.each_ref().map(|map| new([batch, seq, dims::<2>(&map.a)[0]]));
        let (mut out, mut inner) = (like(&x), [(); 2].map(|()| new([batch, seq, f])));
        forward(
            x.storage(),
            weights(&norm, &maps, eps, precision),
            lows.each_mut().map(FlexTensor::storage_mut),
            inner.each_mut().map(FlexTensor::storage_mut),
            out.storage_mut(),
        );
        (out, (lows, inner))
    }

    fn adapted_mlp_grad(
        saved: AdaptedMlpState<Self>,
        grad: FlexTensor,
        eps: f64,
        precision: Precision,
        [of_x, of_norm, of_factors @ ..]: Wanted<8>,
    ) -> [Option<FlexTensor>; 8] {
        let AdaptedMlpState { x, norm, maps, between: (lows, mut inner) } = saved;
        let (x, norm, maps) = (x.to_contiguous(), norm.to_contiguous(), maps.map(Dense::of));
        let mut d_x = grad.to_contiguous();
        drop(grad);
        let [mut d_norm] = wanted_like([&norm], [of_norm]);
        let [gate, up, down] = &maps;
        let factors = [&gate.a, &gate.b, &up.a, &up.b, &down.a, &down.b];
        let mut d_factors = wanted_like(factors, of_factors);
        let weights = weights(&norm, &maps, eps, precision);
        let (d_normed, sums) = backward(
            x.storage(),
            weights,
            lows.each_ref().map(|low| low.storage()),
            inner.each_mut().map(FlexTensor::storage_mut),
            d_x.storage(),
            of_x || of_norm,
        );
        if let Some([of_gate, of_up, of_down]) = sums {
            let [gate_a, gate_b, up_a, up_b, down_a, down_b] = d_factors.each_mut().map(numbers);
            weights.gate.write(of_gate, [gate_a, gate_b]);
            weights.up.write(of_up, [up_a, up_b]);
            weights.down.write(of_down, [down_a, down_b]);
        }
        // What flows past the layer is where the gradient of its input is added up.
        if of_x || of_norm {
            let (rows, target) = (Tokens::dense(x.storage(), weights.gate.d_in), d_x.storage_mut());
            let target = Target { data: target, stride: weights.gate.d_in, accumulate: true };
            rms_norm_grad(rows, weights.norm, &d_normed, weights.eps, 1.0, target, numbers(&mut d_norm));
        }
        let [gate_a, gate_b, up_a, up_b, down_a, down_b] = d_factors;
        [of_x.then_some(d_x), d_norm, gate_a, gate_b, up_a, up_b, down_a, down_b]
    }
}
