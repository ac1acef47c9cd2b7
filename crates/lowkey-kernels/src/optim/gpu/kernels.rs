//! Kernels of the passes.

use cubecl::prelude::*;

use crate::gpu::rows::{UNITS, add_up};

/// One step of AdamW of several tensors in place, a row of cubes for each, in the order of operations of [`crate::optim::adamw`]; nothing
/// where the gate `[factor, stopped, ..]` is shut.
#[cube(launch)]
pub(super) fn adamw(
    values: &mut Sequence<Box<[f32]>>,
    gradients: &Sequence<Box<[f32]>>,
    firsts: &mut Sequence<Box<[f32]>>,
    seconds: &mut Sequence<Box<[f32]>>,
    counts: &Sequence<usize>,
    gate: &[f32],
    clip: f32,
    keep: f32,
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    correction: f32,
    eps: f32,
    rate: f32,
) {
    if gate[1] == 0.0f32 {
        let factor = clip * gate[0];
        #[unroll]
        for tensor in 0..values.len() {
            if CUBE_POS_Y as usize == tensor {
                let (value, gradient) = (values.index_mut(tensor), gradients.index(tensor));
                let (m, v) = (firsts.index_mut(tensor), seconds.index_mut(tensor));
                let count = *counts.index(tensor);
                let mut at = (CUBE_POS_X * CUBE_DIM + UNIT_POS) as usize;
                while at < count {
                    let g = gradient[at] * factor;
                    let first = m[at] * beta1 + g * rest1;
                    let second = v[at] * beta2 + g * g * rest2;
                    m[at] = first;
                    v[at] = second;
                    value[at] = value[at] * keep - rate * (first / (second.sqrt() / correction + eps));
                    at += (CUBE_DIM * CUBE_COUNT_X) as usize;
                }
            }
        }
    }
}

/// Muon's momentum in place, and where it will be after one more step of the same gradient: what is orthogonalised. Where the gate is
/// shut, the momentum stays and the rest is zero.
#[cube(launch)]
pub(super) fn momentum(
    gradient: &[f32],
    buffer: &mut [f32],
    ahead: &mut [f32],
    gate: &[f32],
    count: usize,
    clip: f32,
    decay: f32,
) {
    let at = ABSOLUTE_POS;
    if at < count {
        if gate[1] == 0.0f32 {
            let g = gradient[at] * (clip * gate[0]);
            let new = buffer[at] * decay + g;
            buffer[at] = new;
            ahead[at] = new * decay + g;
        } else {
            ahead[at] = 0.0f32;
        }
    }
}

/// `value ← value · keep − rate · update` in place from `from` on; nothing where the gate is shut.
#[cube(launch)]
pub(super) fn descend(
    value: &mut [f32],
    update: &[f32],
    gate: &[f32],
    count: usize,
    from: usize,
    keep: f32,
    rate: f32,
) {
    let at = ABSOLUTE_POS;
    if at < count && gate[1] == 0.0f32 {
        value[from + at] = value[from + at] * keep - rate * update[at];
    }
}

/// `Σ x²` of several tensors, a row of cubes for each and a part by each cube, written from `at` on.
#[cube(launch)]
pub(super) fn sums_of_squares(tensors: &Sequence<Box<[f32]>>, counts: &Sequence<usize>, out: &mut [f32], at: usize) {
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(UNITS as usize));
    let mut sum = 0.0f32;
    #[unroll]
    for tensor in 0..tensors.len() {
        if CUBE_POS_Y as usize == tensor {
            let x = tensors.index(tensor);
            let count = *counts.index(tensor);
            let mut i = (CUBE_POS_X * CUBE_DIM + UNIT_POS) as usize;
            while i < count {
                sum += x[i] * x[i];
                i += (CUBE_DIM * CUBE_COUNT_X) as usize;
            }
        }
    }
    let total = add_up(sum, &mut scratch);
    if UNIT_POS == 0 {
        out[at + (CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X) as usize] = total;
    }
}
