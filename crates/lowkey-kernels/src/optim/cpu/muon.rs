//! Muon on slices: momentum, orthogonalisation, update.

use pulp::{Arch, Simd};
use rayon::prelude::*;

use super::passes::{PIECE, sum_of_squares};
use crate::cpu::gemm::{View, scaled_product};
use crate::cpu::vector::copy_scaled;

/// The quintic of the Newton-Schulz iteration and how often it is applied (Jordan et al. 2024,
/// <https://kellerjordan.github.io/posts/muon/>): steep at 0, and singular values end between 0.7 and 1.2.
const COEFFICIENTS: [f32; 3] = [3.4445, -4.7750, 2.0315];
const ITERATIONS: usize = 5;

/// A matrix whose Frobenius norm is no more than this counts as zero: f32 has few digits left there.
const NOTHING: f64 = 1e-30;

/// Factors of a Muon step, rounded once.
#[derive(Clone, Copy)]
pub(crate) struct Muon {
    /// On the gradient.
    pub(crate) clip: f32,
    /// On the momentum buffer.
    pub(crate) momentum: f32,
    /// On the parameter: 1 − lr·decay.
    pub(crate) keep: f32,
    /// On an update whose numbers have a mean square of 1.
    pub(crate) rate: f32,
}

/// Updates a parameter of matrices `heights[i] × width`, one below the other, and its momentum buffer, in place.
pub(crate) fn muon(p: &mut [f32], g: &[f32], buffer: &mut [f32], width: usize, heights: &[usize], step: Muon) {
    let mut update = vec![0.0; p.len()];
    look_ahead(g, buffer, &mut update, step);
    let mut blocks = Vec::with_capacity(heights.len());
    let (mut values, mut updates) = (p, &mut update[..]);
    for height in heights {
        let (value, rest) = values.split_at_mut(height * width);
        let (update, rest_of_update) = updates.split_at_mut(height * width);
        blocks.push((value, update, *height));
        (values, updates) = (rest, rest_of_update);
    }
    blocks.into_par_iter().with_max_len(1).for_each(|(value, update, height)| {
        orthogonalise(update, height, width);
        // The numbers of an orthogonal matrix have a mean square of 1 / max(rows, columns).
        let rate = step.rate * (height.max(width) as f32).sqrt();
        descend(value, update, step.keep, rate);
    });
}

/// `buffer ← μ·buffer + g`, `update = g + μ·buffer` with the clipped gradient g: Nesterov's form.
fn look_ahead(g: &[f32], buffer: &mut [f32], update: &mut [f32], step: Muon) {
    let pieces = buffer.par_chunks_mut(PIECE).zip(update.par_chunks_mut(PIECE)).zip(g.par_chunks(PIECE));
    pieces.for_each(|((buffer, update), g)| look_ahead_piece(g, buffer, update, step));
}

#[pulp::with_simd(look_ahead_piece = Arch::new())]
#[inline(always)]
fn look_ahead_piece_with<'a, S: Simd>(
    _simd: S,
    g: &'a [f32],
    buffer: &'a mut [f32],
    update: &'a mut [f32],
    step: Muon,
) {
    let Muon { clip, momentum, .. } = step;
    for ((b, u), g) in buffer.iter_mut().zip(update.iter_mut()).zip(g) {
        let g = g * clip;
        *b = *b * momentum + g;
        *u = *b * momentum + g;
    }
}

/// `p ← keep·p − rate·update`
fn descend(p: &mut [f32], update: &[f32], keep: f32, rate: f32) {
    let pieces = p.par_chunks_mut(PIECE).zip(update.par_chunks(PIECE));
    pieces.for_each(|(p, update)| descend_piece(p, update, keep, rate));
}

#[pulp::with_simd(descend_piece = Arch::new())]
#[inline(always)]
fn descend_piece_with<'a, S: Simd>(_simd: S, p: &'a mut [f32], update: &'a [f32], keep: f32, rate: f32) {
    p.iter_mut().zip(update).for_each(|(p, u)| *p = *p * keep - u * rate);
}

/// `to ← factor·from`
#[pulp::with_simd(copy_times = Arch::new())]
#[inline(always)]
fn copy_times_with<'a, S: Simd>(simd: S, from: &'a [f32], to: &'a mut [f32], factor: f32) {
    copy_scaled(simd, from, to, factor);
}

/// Replaces `x [rows, columns]` by about `U Vᵀ` of its singular value decomposition `U S Vᵀ`; zero stays zero.
///
/// Each iteration is `x ← a·x + (b·G + c·G²) x` with `G = x xᵀ`, or the same from the right where there are more rows than
/// columns: G has the smaller side.
pub(crate) fn orthogonalise(x: &mut [f32], rows: usize, columns: usize) {
    let norm = sum_of_squares(x).sqrt();
    if norm <= NOTHING {
        x.fill(0.0);
        return;
    }
    let [a, b, c] = COEFFICIENTS;
    // In f64: the reciprocal of a small norm exceeds f32.
    x.iter_mut().for_each(|x| *x = (f64::from(*x) / norm) as f32);
    let wide = rows <= columns;
    let side = rows.min(columns);
    let (mut gram, mut poly, mut other) = (vec![0.0; side * side], vec![0.0; side * side], vec![0.0; x.len()]);
    let (mut from, mut to) = (&mut *x, &mut other[..]);
    for _ in 0..ITERATIONS {
        let matrix = View::new(from, columns);
        let (left, right, inner) = if wide { (matrix, matrix.t(), columns) } else { (matrix.t(), matrix, rows) };
        scaled_product([side, side, inner], &mut gram, side, false, left, right, 1.0);
        copy_times(&gram, &mut poly, b);
        copy_times(from, to, a);
        let square = View::new(&gram, side);
        scaled_product([side, side, side], &mut poly, side, true, square, square, c);
        let poly = View::new(&poly, side);
        let (left, right) = if wide { (poly, matrix) } else { (matrix, poly) };
        scaled_product([rows, columns, side], to, columns, true, left, right, 1.0);
        (from, to) = (to, from);
    }
    // After an odd number of iterations the result lies in the other one.
    if ITERATIONS % 2 == 1 {
        to.copy_from_slice(from);
    }
}
