//! Kernels in which each unit has one number of the result.

use cubecl::prelude::*;

/// Units of a cube.
pub(super) const UNITS: u32 = 256;

/// Rotates, or rotates back, `2 · half` components from `from` on of `x [rows, heads, width]`; tables are `[table_rows, half]`, read
/// again from their beginning where there are more rows.
#[cube(launch)]
pub(super) fn rotate(
    x: &[f32],
    cos: &[f32],
    sin: &[f32],
    out: &mut [f32],
    count: usize,
    heads: usize,
    width: usize,
    table_rows: usize,
    #[comptime] from: usize,
    #[comptime] half: usize,
    #[comptime] interleaved: bool,
    #[comptime] back: bool,
) {
    let at = ABSOLUTE_POS;
    if at < count {
        let component = at % width;
        let head = at - component;
        if component < from || component >= from + 2 * half {
            out[at] = x[at];
        } else {
            // The side whose pairs may lie interleaved is the unrotated one: the result of turning, the source of turning back.
            let place = component - from;
            let mut pair = place % half;
            let mut second = place / half;
            if comptime!(interleaved && back) {
                pair = place / 2;
                second = place % 2;
            }
            let mut a = head + from + pair;
            let mut b = head + from + half + pair;
            if comptime!(interleaved && !back) {
                a = head + from + 2 * pair;
                b = a + 1;
            }
            let turn = (at / (width * heads)) % table_rows * half + pair;
            let (c, s) = (cos[turn], sin[turn]);
            if comptime!(back) {
                if second == 0 {
                    out[at] = x[a] * c + x[b] * s;
                } else {
                    out[at] = x[b] * c - x[a] * s;
                }
            } else if second == 0 {
                out[at] = x[a] * c - x[b] * s;
            } else {
                out[at] = x[a] * s + x[b] * c;
            }
        }
    }
}

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
