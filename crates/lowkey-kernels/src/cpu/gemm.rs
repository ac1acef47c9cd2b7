//! Strided matrix products: in f32 through the `gemm` crate, in bf16 by [`super::bf16`].
//!
//! That crate computes a tile of six rows of the left factor at a time, of which it reads one number after the other. On x86 it packs them
//! first, number by number, which takes up to a sixth of a product of the sizes that models train with; rows whose numbers lie side by side
//! are as fast to read where they lie. So it is told to leave them there, and a left factor that lies the other way, as in the gradient of a
//! weight, is turned beforehand, square by square, in blocks that stay in a core's second cache.

use std::cell::Cell;
use std::sync::Once;

use gemm::Parallelism;

use super::bf16::{self, Product, Unit};
use super::parts::{Parts, parts, with_kept};
use super::tile::Aligned;
use super::transpose::transpose;
use crate::precision::Precision;

/// Rows and depth of a left factor that are turned at a time.
const BLOCK: [usize; 2] = [1024, 256];
/// Numbers between the rows of what was turned: rows 1 or 2 KiB apart share their place in a core's first cache.
const APART: usize = 16;
/// Columns of the result from which on turning pays.
const MANY: usize = 64;

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

/// `out (+)= alpha · a b` in f32. What is turned first depends on sizes and layout alone, so that threads change no number.
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
    thread_local!(static TURNED: Cell<Option<Aligned>> = const { Cell::new(None) });
    static TUNED: Once = Once::new();
    // The most that there is. On other processors packing serves the registers.
    TUNED.call_once(|| {
        if cfg!(target_arch = "x86_64") {
            gemm::set_rhs_packing_threshold(256);
        }
    });
    a.check(m, k);
    b.check(k, n);
    let parallelism = if threads > 1 { Parallelism::Rayon(threads) } else { Parallelism::None };
    let by_gemm = |[m, n, k]: [usize; 3], out: *mut f32, accumulate: bool, a: View, b: View| {
        // SAFETY: the checks above keep every reading access within the slices, whose lengths the borrow guarantees, and what is turned
        // fills its room; rows of `out` are some of those that the caller answers for.
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
    };
    if !(a.rows == 1 && a.columns > 1 && n >= MANY) {
        return by_gemm([m, n, k], out, accumulate, a, b);
    }
    let room = || Aligned::zeros(BLOCK[0] * (BLOCK[1] + APART));
    with_kept(&TURNED, room, |room| {
        for (inner, depth) in parts(k, BLOCK[1]) {
            let b = View { data: &b.data[inner * b.rows..], ..b };
            for (row, rows) in parts(m, BLOCK[0]) {
                let from = a.data.get(inner * a.columns + row..).unwrap_or_default();
                transpose([depth, rows], (from, a.columns), (room, depth + APART));
                let turned = View::new(room, depth + APART);
                by_gemm([rows, n, depth], out.wrapping_add(row * stride), accumulate || inner > 0, turned, b);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of few digits, so that no sum of these products is rounded.
    fn numbers(count: usize, step: usize) -> Vec<f32> {
        (0..count).map(|i| (i * step % 13) as f32 - 6.0).collect()
    }

    #[test]
    fn a_product_is_one_whatever_way_its_factors_lie_and_on_any_number_of_threads() {
        for [m, n, k] in
            [[1030, 70, 300], [7, 64, 513], [5, 63, 40], [1, 200, 257], [70, 65, 1], [0, 64, 3], [3, 64, 0]]
        {
            for (turned_a, turned_b, accumulate) in [(true, false, false), (true, true, true), (false, true, false)] {
                // Rows further apart than they are long.
                let layout = |turned, rows, columns| match turned {
                    true => (rows + 3, columns),
                    false => (columns + 3, rows),
                };
                let ((a_stride, a_rows), (b_stride, b_rows)) = (layout(turned_a, m, k), layout(turned_b, k, n));
                let (a, b) = (numbers(a_stride * a_rows, 5), numbers(b_stride * b_rows, 7));
                let view = |data, stride, turned| match turned {
                    true => View::new(data, stride).t(),
                    false => View::new(data, stride),
                };
                let (a, b) = (view(&a, a_stride, turned_a), view(&b, b_stride, turned_b));
                let stride = n + 2;
                for threads in [1, 3] {
                    let mut out = vec![1.0; m * stride];
                    let place = out.as_mut_ptr();
                    // SAFETY: `out` has `m` rows of that stride, and is used by nothing else.
                    unsafe { multiply_f32([m, n, k], place, stride, accumulate, a, b, 2.0, threads) };
                    for (i, row) in out.chunks_exact(stride).enumerate() {
                        let product = |j: usize| -> f32 {
                            (0..k)
                                .map(|l| a.data[i * a.rows + l * a.columns] * b.data[l * b.rows + j * b.columns])
                                .sum()
                        };
                        for (j, found) in row.iter().enumerate() {
                            let before = if j >= n || accumulate { 1.0 } else { 0.0 };
                            let expected = if j < n { before + 2.0 * product(j) } else { 1.0 };
                            assert_eq!(*found, expected, "{m} × {n} × {k}, {threads} threads, at {i}, {j}");
                        }
                    }
                }
            }
        }
    }
}
