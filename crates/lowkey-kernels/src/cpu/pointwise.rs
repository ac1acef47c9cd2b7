//! SwiGLU, RMSNorm and the rotation.

use pulp::Arch;
use rayon::prelude::*;

use super::vector::{dot, exp};

/// Elements per parallel piece: large enough to hide the cost of handing it out.
const PIECE: usize = 1 << 14;

/// `out = silu(gate) · up`
pub(crate) fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    let arch = Arch::new();
    out.par_chunks_mut(PIECE).zip(gate.par_chunks(PIECE).zip(up.par_chunks(PIECE))).for_each(|(out, (gate, up))| {
        arch.dispatch(|| {
            for (o, (g, u)) in out.iter_mut().zip(gate.iter().zip(up)) {
                *o = g / (1.0 + exp(-g)) * u;
            }
        });
    });
}

/// `(d gate, d up)` from the gradient of the output.
pub(crate) fn swiglu_grad(gate: &[f32], up: &[f32], grad: &[f32], d_gate: &mut [f32], d_up: &mut [f32]) {
    let arch = Arch::new();
    let inputs = gate.par_chunks(PIECE).zip(up.par_chunks(PIECE)).zip(grad.par_chunks(PIECE));
    let outputs = d_gate.par_chunks_mut(PIECE).zip(d_up.par_chunks_mut(PIECE));
    outputs.zip(inputs).for_each(|((d_gate, d_up), ((gate, up), grad))| {
        arch.dispatch(|| {
            let outputs = d_gate.iter_mut().zip(d_up.iter_mut());
            for ((dg, du), ((g, u), d)) in outputs.zip(gate.iter().zip(up).zip(grad)) {
                let s = 1.0 / (1.0 + exp(-g));
                *du = d * g * s;
                *dg = d * u * s * (1.0 + g * (1.0 - s));
            }
        });
    });
}

/// `out = x / sqrt(mean(x²) + eps) · weight`, row by row.
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let arch = Arch::new();
    let width = weight.len();
    let rows = (PIECE / width).max(1) * width;
    out.par_chunks_mut(rows).zip(x.par_chunks(rows)).for_each(|(out, x)| {
        arch.dispatch(|| {
            for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                let inv = 1.0 / (dot(x, x) / width as f32 + eps).sqrt();
                for (o, (x, w)) in out.iter_mut().zip(x.iter().zip(weight)) {
                    *o = x * inv * w;
                }
            }
        });
    });
}

/// `(d x, d weight)`. With n = x·inv: `d x = inv · (w·g − n · mean(w·g·n))`, `d weight = Σ_rows g·n`.
pub(crate) fn rms_norm_grad(x: &[f32], weight: &[f32], grad: &[f32], eps: f32, d_x: &mut [f32], d_weight: &mut [f32]) {
    let arch = Arch::new();
    let width = weight.len();
    let rows = (PIECE / width).max(1) * width;
    let pieces = d_x.par_chunks_mut(rows).zip(x.par_chunks(rows)).zip(grad.par_chunks(rows));
    // Partial sums per piece, added in order afterwards: the result does not depend on which thread was first.
    let partial: Vec<Vec<f32>> = pieces
        .map(|((d_x, x), grad)| {
            let mut sum = vec![0.0; width];
            arch.dispatch(|| {
                let rows = d_x.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(grad.chunks_exact(width));
                for ((d_x, x), grad) in rows {
                    let inv = 1.0 / (dot(x, x) / width as f32 + eps).sqrt();
                    for (d, (g, w)) in d_x.iter_mut().zip(grad.iter().zip(weight)) {
                        *d = g * w;
                    }
                    let pull = dot(d_x, x) * inv * inv / width as f32;
                    for ((d, x), (g, sum)) in d_x.iter_mut().zip(x).zip(grad.iter().zip(sum.iter_mut())) {
                        *sum += g * x * inv;
                        *d = inv * (*d - x * pull);
                    }
                }
            });
            sum
        })
        .collect();
    d_weight.fill(0.0);
    for sum in partial {
        for (d, s) in d_weight.iter_mut().zip(sum) {
            *d += s;
        }
    }
}

/// Which way [`rotate`] turns, and in which order the components lie before and after.
#[derive(Clone, Copy)]
pub(crate) enum Turn {
    /// From halves to halves.
    Halves,
    /// From adjacent pairs to halves.
    Pairs,
    /// Back: the transposed map of [`Turn::Halves`].
    HalvesBack,
    /// Back: the transposed map of [`Turn::Pairs`].
    PairsBack,
}

/// Rotates `2·half` components of each head from component `from` on; copies the others.
///
/// `x` and `out [tokens, heads, width]`; `cos` and `sin [table rows, half]`, token `t` using row `t % table rows`.
pub(crate) fn rotate(
    x: &[f32],
    cos: &[f32],
    sin: &[f32],
    [heads, width, half, from]: [usize; 4],
    turn: Turn,
    out: &mut [f32],
) {
    let arch = Arch::new();
    let token = heads * width;
    let table_rows = cos.len() / half;
    let per_piece = (PIECE / token).max(1);
    let pieces = out.par_chunks_mut(per_piece * token).zip(x.par_chunks(per_piece * token)).enumerate();
    pieces.for_each(|(piece, (out, x))| {
        arch.dispatch(|| {
            let tokens = out.chunks_exact_mut(token).zip(x.chunks_exact(token)).enumerate();
            for (i, (out, x)) in tokens {
                let row = (piece * per_piece + i) % table_rows * half;
                let (cos, sin) = (&cos[row..row + half], &sin[row..row + half]);
                for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                    out[..from].copy_from_slice(&x[..from]);
                    out[from + 2 * half..].copy_from_slice(&x[from + 2 * half..]);
                    let part = from..from + 2 * half;
                    turn_pairs(&x[part.clone()], cos, sin, turn, &mut out[part]);
                }
            }
        });
    });
}

#[inline(always)]
fn turn_pairs(x: &[f32], cos: &[f32], sin: &[f32], turn: Turn, out: &mut [f32]) {
    let half = cos.len();
    match turn {
        Turn::Halves | Turn::HalvesBack => {
            let sign = if matches!(turn, Turn::Halves) { 1.0 } else { -1.0 };
            let (a, b) = x.split_at(half);
            let (out_a, out_b) = out.split_at_mut(half);
            for i in 0..half {
                let s = sin[i] * sign;
                out_a[i] = a[i] * cos[i] - b[i] * s;
                out_b[i] = a[i] * s + b[i] * cos[i];
            }
        }
        Turn::Pairs => {
            let (out_a, out_b) = out.split_at_mut(half);
            for i in 0..half {
                let (a, b) = (x[2 * i], x[2 * i + 1]);
                out_a[i] = a * cos[i] - b * sin[i];
                out_b[i] = a * sin[i] + b * cos[i];
            }
        }
        Turn::PairsBack => {
            let (a, b) = x.split_at(half);
            for i in 0..half {
                out[2 * i] = a[i] * cos[i] + b[i] * sin[i];
                out[2 * i + 1] = b[i] * cos[i] - a[i] * sin[i];
            }
        }
    }
}
