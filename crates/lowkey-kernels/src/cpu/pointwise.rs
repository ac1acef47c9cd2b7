//! SwiGLU, RMSNorm and the rotation.

use pulp::Arch;
use rayon::prelude::*;

use super::linear::Tokens;
use super::vector::{dot, dot_weighted, exp};

/// Elements per parallel piece: large enough to hide the cost of handing it out.
pub(super) const PIECE: usize = 1 << 14;

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

/// `out = x / sqrt(mean(x²) + eps) · weight · factor`, row by row; rows of `out` are `stride` apart.
pub(crate) fn rms_norm(x: Tokens, weight: &[f32], eps: f32, factor: f32, out: &mut [f32], stride: usize) {
    let arch = Arch::new();
    let width = weight.len();
    let rows = (PIECE / width).max(1);
    out.par_chunks_mut(rows * stride).enumerate().for_each(|(piece, out)| {
        arch.dispatch(|| {
            for (i, out) in out.chunks_mut(stride).enumerate() {
                let x = x.row(piece * rows + i, width);
                let inv = factor / (dot(x, x) / width as f32 + eps).sqrt();
                for (o, (x, w)) in out.iter_mut().zip(x.iter().zip(weight)) {
                    *o = x * inv * w;
                }
            }
        });
    });
}

/// Rows that receive a gradient, `stride` apart.
pub(crate) struct Target<'a> {
    pub(crate) data: &'a mut [f32],
    pub(crate) stride: usize,
    /// Add to what is there.
    pub(crate) accumulate: bool,
}

/// `(d x, d weight)` of [`rms_norm`] from the gradient of its output, whose rows lie side by side. With n = x·inv:
/// `d x = inv · (w·g − n · mean(w·g·n))`, `d weight = Σ_rows g·n`.
pub(crate) fn rms_norm_grad(
    x: Tokens,
    weight: &[f32],
    grad: &[f32],
    eps: f32,
    factor: f32,
    d_x: Target,
    d_weight: &mut [f32],
) {
    let arch = Arch::new();
    let width = weight.len();
    let rows = (PIECE / width).max(1);
    let Target { data, stride, accumulate } = d_x;
    // Partial sums per piece, added in order afterwards: the result does not depend on which thread was first.
    let partial: Vec<Vec<f32>> = data
        .par_chunks_mut(rows * stride)
        .zip(grad.par_chunks(rows * width))
        .enumerate()
        .map(|(piece, (d_x, grad))| {
            let mut sum = vec![0.0; width];
            arch.dispatch(|| {
                for (i, (d_x, grad)) in d_x.chunks_mut(stride).zip(grad.chunks_exact(width)).enumerate() {
                    let x = x.row(piece * rows + i, width);
                    let inv = 1.0 / (dot(x, x) / width as f32 + eps).sqrt();
                    let pull = dot_weighted(grad, x, weight) * inv * inv / width as f32;
                    let inv = inv * factor;
                    let inputs = x.iter().zip(grad.iter().zip(weight));
                    for ((d, sum), (x, (g, w))) in d_x.iter_mut().zip(sum.iter_mut()).zip(inputs) {
                        *sum += g * x * inv;
                        let new = inv * (g * w - x * pull);
                        *d = if accumulate { *d + new } else { new };
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

/// Cosines and sines, `[table rows, half]`; token `t` uses row `t % table rows`.
#[derive(Clone, Copy)]
pub(crate) struct Table<'a> {
    pub(crate) cos: &'a [f32],
    pub(crate) sin: &'a [f32],
    /// Pairs that are rotated.
    pub(crate) half: usize,
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

impl Turn {
    /// The turn from adjacent pairs (`interleaved`) or halves, or the map back.
    pub(crate) fn new(interleaved: bool, back: bool) -> Self {
        match (interleaved, back) {
            (false, false) => Self::Halves,
            (true, false) => Self::Pairs,
            (false, true) => Self::HalvesBack,
            (true, true) => Self::PairsBack,
        }
    }
}

/// Rotates `2·half` components of each head from component `from` on; copies the others.
///
/// `x` and `out [tokens, heads, width]`.
pub(crate) fn rotate(x: &[f32], table: Table, [heads, width, from]: [usize; 3], turn: Turn, out: &mut [f32]) {
    let Table { cos, sin, half } = table;
    if half == 0 {
        out.copy_from_slice(x);
        return;
    }
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
