//! Passes over parameters, gradients and moments: one read and one write of each number.

use pulp::{Arch, Simd};
use rayon::prelude::*;

use crate::cpu::vector::LANES;

/// Elements per parallel piece: four arrays of it fit the second-level cache, and a sum per piece does not depend on how many
/// threads there are.
pub(super) const PIECE: usize = 1 << 14;

/// Factors of an AdamW step, rounded once.
#[derive(Clone, Copy)]
pub(crate) struct AdamW {
    /// On the gradient.
    pub(crate) clip: f32,
    /// On the parameter: 1 − lr·decay.
    pub(crate) keep: f32,
    /// β₁, 1 − β₁, β₂, 1 − β₂
    pub(crate) betas: [f32; 4],
    /// √(1 − β₂ᵗ)
    pub(crate) correction: f32,
    /// Beside the root of the second moment.
    pub(crate) eps: f32,
    /// lr / (1 − β₁ᵗ)
    pub(crate) rate: f32,
}

/// Updates parameter and moments in place.
pub(crate) fn adamw(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], step: AdamW) {
    let moments = m.par_chunks_mut(PIECE).zip(v.par_chunks_mut(PIECE));
    let pieces = p.par_chunks_mut(PIECE).zip(g.par_chunks(PIECE)).zip(moments);
    pieces.for_each(|((p, g), (m, v))| adamw_piece(p, g, m, v, step));
}

#[pulp::with_simd(adamw_piece = Arch::new())]
#[inline(always)]
fn adamw_piece_with<'a, S: Simd>(
    _simd: S,
    p: &'a mut [f32],
    g: &'a [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
    step: AdamW,
) {
    let AdamW { clip, keep, betas: [beta1, rest1, beta2, rest2], correction, eps, rate } = step;
    for ((p, g), (m, v)) in p.iter_mut().zip(g).zip(m.iter_mut().zip(v.iter_mut())) {
        let g = g * clip;
        *m = *m * beta1 + g * rest1;
        *v = *v * beta2 + g * g * rest2;
        *p = *p * keep - *m / (v.sqrt() / correction + eps) * rate;
    }
}

/// `sum += Σ others`, in the order of `others`.
pub(crate) fn accumulate(sum: &mut [f32], others: &[&[f32]]) {
    let pieces = sum.par_chunks_mut(PIECE).enumerate();
    pieces.for_each(|(piece, sum)| accumulate_piece(sum, others, piece * PIECE));
}

#[pulp::with_simd(accumulate_piece = Arch::new())]
#[inline(always)]
fn accumulate_piece_with<'a, S: Simd>(_simd: S, sum: &'a mut [f32], others: &'a [&'a [f32]], at: usize) {
    // The piece stays in the cache meanwhile.
    for other in others {
        for (s, x) in sum.iter_mut().zip(&other[at..]) {
            *s += x;
        }
    }
}

/// Σ x², in f64: no overflow, and as exact as its numbers.
pub(crate) fn sum_of_squares(x: &[f32]) -> f64 {
    // Collected, then added in order: whichever thread was first.
    let pieces: Vec<f64> = x.par_chunks(PIECE).map(squares).collect();
    pieces.iter().sum()
}

#[pulp::with_simd(squares = Arch::new())]
#[inline(always)]
fn squares_with<S: Simd>(_simd: S, x: &[f32]) -> f64 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0.0f64; LANES];
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            let x = f64::from(*x);
            *lane += x * x;
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>()
}
