//! The rotation on the CPU.

use burn::backend::Flex;
use burn_flex::FlexTensor;
use pulp::{Arch, Simd};
use rayon::prelude::*;

use super::autodiff::{RotaryGradients, RotaryOps};
use crate::cpu::parts::PIECE;
use crate::cpu::tensors::dims;

/// Cosines and sines, `[table rows, half]`; token `t` uses row `t % table rows`.
#[derive(Clone, Copy)]
pub(crate) struct Table<'a> {
    pub(crate) cos: &'a [f32],
    pub(crate) sin: &'a [f32],
    /// Pairs that are rotated.
    pub(crate) half: usize,
}

impl<'a> Table<'a> {
    /// Cosines and sines of a token.
    #[inline(always)]
    fn row(self, token: usize) -> (&'a [f32], &'a [f32]) {
        let row = token % (self.cos.len() / self.half) * self.half;
        (&self.cos[row..row + self.half], &self.sin[row..row + self.half])
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
    if table.half == 0 {
        out.copy_from_slice(x);
        return;
    }
    let token = heads * width;
    let per_piece = (PIECE / token).max(1);
    let pieces = out.par_chunks_mut(per_piece * token).zip(x.par_chunks(per_piece * token)).enumerate();
    pieces.for_each(|(piece, (out, x))| {
        rotate_tokens(table, piece * per_piece, [heads, width, from], turn, x, out);
    });
}

#[pulp::with_simd(rotate_tokens = Arch::new())]
#[inline(always)]
fn rotate_tokens_with<'a, S: Simd>(
    _simd: S,
    table: Table<'a>,
    first: usize,
    sizes: [usize; 3],
    turn: Turn,
    x: &'a [f32],
    out: &'a mut [f32],
) {
    let [heads, width, from] = sizes;
    let part = from..from + 2 * table.half;
    for (i, (out, x)) in out.chunks_exact_mut(heads * width).zip(x.chunks_exact(heads * width)).enumerate() {
        let (cos, sin) = table.row(first + i);
        for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            out[..part.start].copy_from_slice(&x[..part.start]);
            out[part.end..].copy_from_slice(&x[part.end..]);
            turn_pairs(&x[part.clone()], cos, sin, turn, &mut out[part.clone()]);
        }
    }
}

/// The same where `x` lies.
fn rotate_in_place(x: &mut [f32], table: Table, [heads, width, from]: [usize; 3], turn: Turn) {
    if table.half == 0 {
        return;
    }
    let token = heads * width;
    let per_piece = (PIECE / token).max(1);
    let pieces = x.par_chunks_mut(per_piece * token).enumerate();
    pieces.for_each(|(piece, x)| rotate_tokens_in_place(table, piece * per_piece, [heads, width, from], turn, x));
}

#[pulp::with_simd(rotate_tokens_in_place = Arch::new())]
#[inline(always)]
fn rotate_tokens_in_place_with<'a, S: Simd>(
    _simd: S,
    table: Table<'a>,
    first: usize,
    sizes: [usize; 3],
    turn: Turn,
    x: &'a mut [f32],
) {
    let [heads, width, from] = sizes;
    let mut before = vec![0.0; 2 * table.half];
    for (i, x) in x.chunks_exact_mut(heads * width).enumerate() {
        let (cos, sin) = table.row(first + i);
        for x in x.chunks_exact_mut(width) {
            let part = &mut x[from..from + 2 * table.half];
            before.iter_mut().zip(part.iter()).for_each(|(before, x)| *before = *x);
            turn_pairs(&before, cos, sin, turn, part);
        }
    }
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

fn rotated(x: FlexTensor, cos: FlexTensor, sin: FlexTensor, from: usize, turn: Turn) -> FlexTensor {
    let (mut out, cos, sin) = (x.to_contiguous(), cos.to_contiguous(), sin.to_contiguous());
    // Where nobody else holds them, the numbers are turned where they lie.
    drop(x);
    let [.., heads, width] = dims::<4>(&out);
    let [.., half] = dims::<4>(&cos);
    let table = Table { cos: cos.storage(), sin: sin.storage(), half };
    rotate_in_place(out.storage_mut(), table, [heads, width, from], turn);
    out
}

impl RotaryOps for Flex {
    fn rotate(x: FlexTensor, cos: FlexTensor, sin: FlexTensor, from: usize, interleaved: bool) -> FlexTensor {
        rotated(x, cos, sin, from, Turn::new(interleaved, false))
    }
}

impl RotaryGradients for Flex {
    fn rotate_back(grad: FlexTensor, cos: FlexTensor, sin: FlexTensor, from: usize, interleaved: bool) -> FlexTensor {
        rotated(grad, cos, sin, from, Turn::new(interleaved, true))
    }
}
