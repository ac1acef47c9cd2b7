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

/// `silu(gate) · up`
#[cube(launch)]
pub(super) fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32], count: usize) {
    let at = ABSOLUTE_POS;
    if at < count {
        let g = gate[at];
        out[at] = g / (1.0f32 + (-g).exp()) * up[at];
    }
}

/// The activation of [`swiglu`] anew, and the gradients of its arguments, which take their places.
#[cube(launch)]
pub(super) fn swiglu_grad(gate: &mut [f32], up: &mut [f32], grad: &[f32], act: &mut [f32], count: usize) {
    let at = ABSOLUTE_POS;
    if at < count {
        let (g, u, d) = (gate[at], up[at], grad[at]);
        let sigmoid = 1.0f32 / (1.0f32 + (-g).exp());
        let silu = g * sigmoid;
        act[at] = silu * u;
        up[at] = d * silu;
        gate[at] = d * u * sigmoid * (1.0f32 + g * (1.0f32 - sigmoid));
    }
}

/// One step of AdamW in place, in the order of operations of [`crate::optim::adamw`].
#[cube(launch)]
pub(super) fn adamw(
    value: &mut [f32],
    gradient: &[f32],
    m: &mut [f32],
    v: &mut [f32],
    count: usize,
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
    let at = ABSOLUTE_POS;
    if at < count {
        let g = gradient[at] * clip;
        let first = m[at] * beta1 + g * rest1;
        let second = v[at] * beta2 + g * g * rest2;
        m[at] = first;
        v[at] = second;
        value[at] = value[at] * keep - rate * (first / (second.sqrt() / correction + eps));
    }
}
