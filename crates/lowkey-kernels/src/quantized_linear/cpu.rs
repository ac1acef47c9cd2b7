//! The packed linear map on the CPU: a tile of the matrix is unpacked, multiplied while it lies in the cache, and forgotten.

use std::ops::Range;

use burn::backend::Flex;
use burn_flex::FlexTensor;
use pulp::bytemuck;
use rayon::prelude::*;

use super::autodiff::{Matrix, QuantizedLinearGradients, QuantizedLinearOps};
#[cfg(target_arch = "x86_64")]
use super::codes;
use super::format::{Layout, Quantization};
use super::halves;
use super::packed::View;
use crate::cpu::gemm::{self, product_of_part};
use crate::cpu::linear::{FEW, Rows, Tokens, project_few};
use crate::cpu::parts::Parts;
use crate::cpu::tensors::{dims, new};
use crate::linear::cpu::{rows, tokens};
use crate::precision::Precision;

/// Rows and columns of a tile: a quarter of a MiB, which the second cache of a core holds. Large enough that unpacking a number costs
/// little beside what is done with it, and that the tokens need not be read too often.
const TILE: usize = 256;

/// Tokens that are worth unpacking the matrix once more for another thread.
const TOKENS: usize = 256;

/// A matrix of the backend as slices; calls `job` with it.
fn with_view<R>((words, scales): &Matrix<Flex>, layout: Layout, job: impl FnOnce(View) -> R) -> R {
    let (words, scales) = (words.to_contiguous(), scales.to_contiguous());
    job(View { codes: bytemuck::cast_slice(words.storage::<i32>()), scales: scales.storage(), layout })
}

/// Runs `job` for each tile of an output of so many tokens and columns, with room for an unpacked tile of the matrix.
fn tiles(count: usize, columns: usize, job: impl Fn(Range<usize>, Range<usize>, &mut [f32]) + Sync) {
    let (threads, across) = (rayon::current_num_threads(), columns.div_ceil(TILE));
    // Where a matrix has fewer tiles than there are threads, tokens are shared, too.
    let shares = (2 * threads).div_ceil(across.max(1)).min(count.div_ceil(TOKENS)).max(1);
    let share = if threads == 1 { count } else { count.div_ceil(shares).next_multiple_of(TILE) };
    let down = count.div_ceil(share.max(1));
    let part = |i: usize, size: usize, most: usize| i * size..((i + 1) * size).min(most);
    let room = || vec![0.0; TILE * TILE];
    let one =
        |tile: &mut Vec<f32>, i: usize| job(part(i / across, share, count), part(i % across, TILE, columns), tile);
    if threads == 1 {
        let mut tile = room();
        (0..down * across).for_each(|i| one(&mut tile, i));
    } else {
        (0..down * across).into_par_iter().for_each_init(room, one);
    }
}

/// A part of the matrix as numbers.
fn unpacked<'a>(matrix: &'a View, rows: Range<usize>, columns: Range<usize>, tile: &'a mut [f32]) -> gemm::View<'a> {
    let (part, apart) = matrix.part(rows, columns, tile);
    gemm::View::new(part, apart)
}

/// Stretches of [`TILE`] that cover so many numbers.
fn stretches(count: usize) -> impl Iterator<Item = Range<usize>> {
    (0..count).step_by(TILE).map(move |from| from..(from + TILE).min(count))
}

impl Rows for View<'_> {
    const PACKED: bool = true;

    #[inline(always)]
    fn sizes(self) -> [usize; 2] {
        [self.layout.d_out, self.layout.d_in]
    }

    fn bytes(self) -> usize {
        match self.layout.quantization {
            // What takes as long as finding out what they stand for.
            Quantization::Int4 | Quantization::Nf4 => 4 * self.codes.len(),
            Quantization::Int8 | Quantization::Bf16 => self.codes.len(),
        }
    }

    #[inline(always)]
    fn part<'b>(&'b self, rows: Range<usize>, columns: Range<usize>, room: &'b mut [f32]) -> (&'b [f32], usize) {
        let width = columns.len();
        for (row, out) in rows.zip(room.chunks_exact_mut(width.max(1))) {
            self.unpack(row, columns.clone(), out);
        }
        (room, width)
    }
}

/// `out (+)= x Wᵀ`, `out` in rows of `d_out`.
fn project(precision: Precision, x: Tokens, matrix: View, out: &mut [f32], accumulate: bool) {
    match matrix.words() {
        // Also where operands may be rounded: reading W takes all of the time.
        Some(words) if x.count <= FEW => return halves::project(x, matrix, words, out, accumulate),
        #[cfg(target_arch = "x86_64")]
        None if codes::project(x, matrix, out, accumulate) => return,
        _ if project_few(precision, x, matrix, out, accumulate) => return,
        _ => {}
    }
    let Layout { d_out, d_in, .. } = matrix.layout;
    let out = &Parts::new(out);
    tiles(x.count, d_out, |tokens, rows, tile| {
        for columns in stretches(d_in) {
            let (add, width) = (accumulate || columns.start > 0, columns.len());
            let from = gemm::View::new(&x.data[tokens.start * x.stride + columns.start..], x.stride);
            let shape = [tokens.len(), rows.len(), width];
            let weight = unpacked(&matrix, rows.clone(), columns, tile).t();
            let at = tokens.start * d_out + rows.start;
            // SAFETY: these rows of W belong to this task alone for these tokens, and so do their numbers of the output.
            unsafe { product_of_part(precision, shape, out, at, d_out, add, from, weight) };
        }
    });
}

/// `d_x = d_y W`, both side by side.
fn input_gradient(precision: Precision, d_y: &[f32], matrix: View, d_x: &mut [f32]) {
    let Layout { d_out, d_in, .. } = matrix.layout;
    let count = d_x.len() / d_in.max(1);
    let d_x = &Parts::new(d_x);
    tiles(count, d_in, |tokens, columns, tile| {
        for rows in stretches(d_out) {
            let (add, height) = (rows.start > 0, rows.len());
            let from = gemm::View::new(&d_y[tokens.start * d_out + rows.start..], d_out);
            let shape = [tokens.len(), columns.len(), height];
            let weight = unpacked(&matrix, rows, columns.clone(), tile);
            let at = tokens.start * d_in + columns.start;
            // SAFETY: these columns of W belong to this task alone for these tokens, and so do their numbers of the gradient.
            unsafe { product_of_part(precision, shape, d_x, at, d_in, add, from, weight) };
        }
    });
}

fn projected(
    precision: Precision,
    x: &FlexTensor,
    matrix: &Matrix<Flex>,
    layout: Layout,
    mut out: FlexTensor,
    accumulate: bool,
) -> FlexTensor {
    let x = rows(x);
    with_view(matrix, layout, |matrix| project(precision, tokens(&x), matrix, out.storage_mut(), accumulate));
    out
}

impl QuantizedLinearOps for Flex {
    fn unpack(words: FlexTensor, scales: FlexTensor, layout: Layout) -> FlexTensor {
        let mut out = new([layout.d_out, layout.d_in]);
        with_view(&(words, scales), layout, |matrix| matrix.unpack_rows(out.storage_mut()));
        out
    }

    fn project_quantized(
        x: FlexTensor,
        words: FlexTensor,
        scales: FlexTensor,
        layout: Layout,
        precision: Precision,
    ) -> FlexTensor {
        let [batch, seq, _] = dims::<3>(&x);
        projected(precision, &x, &(words, scales), layout, new([batch, seq, layout.d_out]), false)
    }

    fn add_project_quantized(
        residual: FlexTensor,
        x: FlexTensor,
        words: FlexTensor,
        scales: FlexTensor,
        layout: Layout,
        precision: Precision,
    ) -> FlexTensor {
        // Where nobody else holds the residual, the sum takes its place.
        let out = residual.to_contiguous();
        drop(residual);
        projected(precision, &x, &(words, scales), layout, out, true)
    }
}

impl QuantizedLinearGradients for Flex {
    fn input_grad_quantized(
        matrix: Matrix<Self>,
        grad: FlexTensor,
        layout: Layout,
        precision: Precision,
    ) -> FlexTensor {
        let grad = grad.to_contiguous();
        let [batch, seq, _] = dims::<3>(&grad);
        let mut d_x = new([batch, seq, layout.d_in]);
        with_view(&matrix, layout, |matrix| input_gradient(precision, grad.storage(), matrix, d_x.storage_mut()));
        d_x
    }
}
