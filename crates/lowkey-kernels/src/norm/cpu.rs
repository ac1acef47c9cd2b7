//! The norm on the CPU, row by row.

use burn::backend::Flex;
use burn_flex::FlexTensor;
use pulp::{Arch, Simd};
use rayon::prelude::*;

use super::autodiff::{NormGradients, NormOps};
use crate::cpu::linear::Tokens;
use crate::cpu::parts::PIECE;
use crate::cpu::tensors::{dims, like, numbers, wanted_like};
use crate::cpu::vector::{dot, dot_weighted};

/// `out = x / sqrt(mean(x²) + eps) · weight · factor`, row by row; rows of `out` are `stride` apart.
pub(crate) fn rms_norm(x: Tokens, weight: &[f32], eps: f32, factor: f32, out: &mut [f32], stride: usize) {
    let rows = (PIECE / weight.len()).max(1);
    let norm = Norm { x, weight, eps, factor };
    let pieces = out.par_chunks_mut(rows * stride).enumerate();
    pieces.for_each(|(piece, out)| norm_rows(norm, piece * rows, out, stride));
}

/// What is normalised, and how.
#[derive(Clone, Copy)]
struct Norm<'a> {
    x: Tokens<'a>,
    weight: &'a [f32],
    eps: f32,
    factor: f32,
}

/// The rows from `first` on, into as many as `out` has.
#[pulp::with_simd(norm_rows = Arch::new())]
#[inline(always)]
fn norm_rows_with<'a, S: Simd>(simd: S, norm: Norm<'a>, first: usize, out: &'a mut [f32], stride: usize) {
    let Norm { x, weight, eps, factor } = norm;
    let width = weight.len();
    for (i, out) in out.chunks_mut(stride).enumerate() {
        let x = x.row(first + i, width);
        let inv = factor / (dot(simd, x, x) / width as f32 + eps).sqrt();
        for (o, (x, w)) in out.iter_mut().zip(x.iter().zip(weight)) {
            *o = x * inv * w;
        }
    }
}

/// Rows that receive a gradient, `stride` apart.
pub(crate) struct Target<'a> {
    pub(crate) data: &'a mut [f32],
    pub(crate) stride: usize,
    /// Add to what is there.
    pub(crate) accumulate: bool,
}

/// `(d x, d weight)` of [`rms_norm`], the second where it is wanted, from the gradient of its output, whose rows lie side by side. With
/// n = x·inv: `d x = inv · (w·g − n · mean(w·g·n))`, `d weight = Σ_rows g·n`.
pub(crate) fn rms_norm_grad(
    x: Tokens,
    weight: &[f32],
    grad: &[f32],
    eps: f32,
    factor: f32,
    d_x: Target,
    d_weight: Option<&mut [f32]>,
) {
    let width = weight.len();
    let rows = (PIECE / width).max(1);
    let norm = Norm { x, weight, eps, factor };
    let Target { data, stride, accumulate } = d_x;
    // Partial sums per piece, added in order afterwards: the result does not depend on which thread was first.
    let of_weight = d_weight.is_some();
    let partial: Vec<Vec<f32>> = data
        .par_chunks_mut(rows * stride)
        .zip(grad.par_chunks(rows * width))
        .enumerate()
        .map(|(piece, (d_x, grad))| {
            let mut sum = vec![0.0; if of_weight { width } else { 0 }];
            let d_x = Target { data: d_x, stride, accumulate };
            norm_rows_grad(norm, piece * rows, grad, d_x, &mut sum);
            sum
        })
        .collect();
    let Some(d_weight) = d_weight else { return };
    d_weight.fill(0.0);
    for sum in partial {
        for (d, s) in d_weight.iter_mut().zip(sum) {
            *d += s;
        }
    }
}

/// Of the rows from `first` on; adds to `sum`, the gradient of the weights, unless it is empty.
#[pulp::with_simd(norm_rows_grad = Arch::new())]
#[inline(always)]
fn norm_rows_grad_with<'a, S: Simd>(
    simd: S,
    norm: Norm<'a>,
    first: usize,
    grad: &'a [f32],
    d_x: Target<'a>,
    sum: &'a mut [f32],
) {
    let Norm { x, weight, eps, factor } = norm;
    let Target { data, stride, accumulate } = d_x;
    let width = weight.len();
    for (i, (d_x, grad)) in data.chunks_mut(stride).zip(grad.chunks_exact(width)).enumerate() {
        let x = x.row(first + i, width);
        let inv = 1.0 / (dot(simd, x, x) / width as f32 + eps).sqrt();
        let pull = dot_weighted(simd, grad, x, weight) * inv * inv / width as f32;
        let inv = inv * factor;
        for (sum, (x, g)) in sum.iter_mut().zip(x.iter().zip(grad)) {
            *sum += g * x * inv;
        }
        for (d, (x, (g, w))) in d_x.iter_mut().zip(x.iter().zip(grad.iter().zip(weight))) {
            let new = inv * (g * w - x * pull);
            *d = if accumulate { *d + new } else { new };
        }
    }
}

impl NormOps for Flex {
    fn rms_norm(x: FlexTensor, weight: FlexTensor, eps: f64) -> FlexTensor {
        let (x, weight) = (x.to_contiguous(), weight.to_contiguous());
        let mut out = like(&x);
        let [width] = dims::<1>(&weight);
        let rows = Tokens::dense(x.storage(), width);
        rms_norm(rows, weight.storage(), eps as f32, 1.0, out.storage_mut(), width);
        out
    }
}

impl NormGradients for Flex {
    fn rms_norm_grad(
        x: FlexTensor,
        weight: FlexTensor,
        grad: FlexTensor,
        eps: f64,
        of_weight: bool,
    ) -> (FlexTensor, Option<FlexTensor>) {
        let (x, weight, grad) = (x.to_contiguous(), weight.to_contiguous(), grad.to_contiguous());
        let (mut d_x, [mut d_weight]) = (like(&x), wanted_like([&weight], [of_weight]));
        let [width] = dims::<1>(&weight);
        let rows = Tokens::dense(x.storage(), width);
        let target = Target { data: d_x.storage_mut(), stride: width, accumulate: false };
        let into = numbers(&mut d_weight);
        rms_norm_grad(rows, weight.storage(), grad.storage(), eps as f32, 1.0, target, into);
        (d_x, d_weight)
    }
}
