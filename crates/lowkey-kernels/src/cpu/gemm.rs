//! Strided matrix products: in f32 through the `gemm` crate, in bf16 by [`super::bf16`].

use gemm::Parallelism;

use super::bf16::{self, Product, Unit};
use super::parts::Parts;
use crate::precision::Precision;

/// A matrix inside a slice: `(row, column)` lies at `row · rows + column · columns`.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) rows: usize,
    pub(crate) columns: usize,
}

impl<'a> View<'a> {
    /// Rows of the given distance, columns side by side.
    pub(crate) fn new(data: &'a [f32], stride: usize) -> Self {
        Self { data, rows: stride, columns: 1 }
    }

    /// The transposed matrix.
    pub(crate) fn t(self) -> Self {
        Self { rows: self.columns, columns: self.rows, ..self }
    }

    fn check(self, rows: usize, columns: usize) {
        let last = rows.saturating_sub(1) * self.rows + columns.saturating_sub(1) * self.columns;
        assert!(rows == 0 || columns == 0 || last < self.data.len(), "matrix exceeds its slice");
    }
}

/// `out (+)= a b` for `a [m, k]`, `b [k, n]`, `out [m, n]` with rows `stride` apart, of operands rounded as the precision says.
///
/// Uses the threads of the current rayon pool where the product is large enough to be worth it.
pub(crate) fn product(
    precision: Precision,
    sizes: [usize; 3],
    out: &mut [f32],
    stride: usize,
    accumulate: bool,
    a: View,
    b: View,
) {
    let threads = check(sizes, out, stride);
    // SAFETY: the check above keeps every access within `out`, which is borrowed mutably, so nothing else reads or writes it.
    unsafe { multiply(precision, sizes, out.as_mut_ptr(), stride, accumulate, a, b, threads) }
}

/// `out (+)= alpha · a b` in f32; else as [`product`].
pub(crate) fn scaled_product(
    sizes: [usize; 3],
    out: &mut [f32],
    stride: usize,
    accumulate: bool,
    a: View,
    b: View,
    alpha: f32,
) {
    let threads = check(sizes, out, stride);
    // SAFETY: as of `product`.
    unsafe { multiply_f32(sizes, out.as_mut_ptr(), stride, accumulate, a, b, alpha, threads) }
}

/// How many threads are worth their while.
///
/// # Panics
/// Where the result is not in its slice.
fn check([m, n, k]: [usize; 3], out: &[f32], stride: usize) -> usize {
    assert!(m == 0 || n == 0 || (m - 1) * stride + n <= out.len() && n <= stride, "product exceeds its slice");
    if m * n * k > 1 << 21 { rayon::current_num_threads() } else { 1 }
}

/// `out (+)= a b` of a buffer whose other columns other tasks write: `[m, n]` from `at` on, rows `stride` apart. On this thread alone.
///
/// # Safety
/// Until it returns, no other task may read or write these numbers.
#[expect(clippy::too_many_arguments, reason = "what a product is told")]
pub(crate) unsafe fn product_of_part(
    precision: Precision,
    [m, n, k]: [usize; 3],
    out: &Parts,
    at: usize,
    stride: usize,
    accumulate: bool,
    a: View,
    b: View,
) {
    let out = out.rows(at, [m, n], stride);
    // SAFETY: `rows` has checked that all of them lie in the buffer, and by the caller's promise they are this task's.
    unsafe { multiply(precision, [m, n, k], out, stride, accumulate, a, b, 1) }
}

/// `out (+)= a b`.
///
/// # Safety
/// The rows of `out`, `n` numbers `stride` apart, must be valid for reading and writing, and nothing else may use them meanwhile.
#[expect(clippy::too_many_arguments, reason = "what a product is told")]
unsafe fn multiply(
    precision: Precision,
    sizes: [usize; 3],
    out: *mut f32,
    stride: usize,
    accumulate: bool,
    a: View,
    b: View,
    threads: usize,
) {
    let [m, n, k] = sizes;
    a.check(m, k);
    b.check(k, n);
    // SAFETY: as the caller promises.
    unsafe {
        if precision == Precision::Bf16 {
            bf16::multiply(Product { sizes, a, b, accumulate, threads }, Unit::here(), out, stride);
        } else {
            multiply_f32(sizes, out, stride, accumulate, a, b, 1.0, threads);
        }
    }
}

/// `out (+)= alpha · a b` in f32.
///
/// # Safety
/// As of [`multiply`].
#[expect(clippy::too_many_arguments, reason = "what a product is told")]
unsafe fn multiply_f32(
    [m, n, k]: [usize; 3],
    out: *mut f32,
    stride: usize,
    accumulate: bool,
    a: View,
    b: View,
    alpha: f32,
    threads: usize,
) {
    a.check(m, k);
    b.check(k, n);
    let parallelism = if threads > 1 { Parallelism::Rayon(threads) } else { Parallelism::None };
    // SAFETY: the two checks above keep every reading access within the slices, whose lengths the borrow guarantees; the caller
    // answers for `out`.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out,
            1,
            stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.columns as isize,
            a.rows as isize,
            b.data.as_ptr(),
            b.columns as isize,
            b.rows as isize,
            1.0,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}
