//! Strided matrix products through the `gemm` crate.

use gemm::Parallelism;

use super::parts::Parts;

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

/// `out (+)= alpha · a b` for `a [m, k]`, `b [k, n]`, `out [m, n]` with rows `stride` apart.
///
/// Uses the threads of the current rayon pool where the product is large enough to be worth it.
pub(crate) fn product(
    [m, n, k]: [usize; 3],
    out: &mut [f32],
    stride: usize,
    accumulate: bool,
    a: View,
    b: View,
    alpha: f32,
) {
    assert!(m == 0 || n == 0 || (m - 1) * stride + n <= out.len() && n <= stride, "product exceeds its slice");
    let threads = rayon::current_num_threads();
    let large = m * n * k > 1 << 21;
    let parallelism = if threads > 1 && large { Parallelism::Rayon(threads) } else { Parallelism::None };
    // SAFETY: the check above keeps every access within `out`, which is borrowed mutably, so nothing else reads or writes it.
    unsafe { multiply([m, n, k], out.as_mut_ptr(), stride, accumulate, a, b, alpha, parallelism) }
}

/// `out (+)= a b` of a buffer whose other columns other tasks write: `[m, n]` from `at` on, rows `stride` apart. On this thread alone.
///
/// # Safety
/// Until it returns, no other task may read or write these numbers.
pub(crate) unsafe fn product_of_part(
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
    unsafe { multiply([m, n, k], out, stride, accumulate, a, b, 1.0, Parallelism::None) }
}

/// `out (+)= alpha · a b`.
///
/// # Safety
/// The rows of `out`, `n` numbers `stride` apart, must be valid for writing, and nothing else may use them meanwhile.
#[expect(clippy::too_many_arguments, reason = "what a product is told")]
unsafe fn multiply(
    [m, n, k]: [usize; 3],
    out: *mut f32,
    stride: usize,
    accumulate: bool,
    a: View,
    b: View,
    alpha: f32,
    parallelism: Parallelism,
) {
    a.check(m, k);
    b.check(k, n);
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
