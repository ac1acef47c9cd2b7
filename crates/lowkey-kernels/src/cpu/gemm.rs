//! Strided matrix products through the `gemm` crate.

use gemm::Parallelism;

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
    a.check(m, k);
    b.check(k, n);
    assert!(m == 0 || n == 0 || (m - 1) * stride + n <= out.len() && n <= stride, "product exceeds its slice");
    let threads = rayon::current_num_threads();
    let large = m * n * k > 1 << 21;
    let parallelism = if threads > 1 && large { Parallelism::Rayon(threads) } else { Parallelism::None };
    // SAFETY: the three checks above keep every access within the slices, whose lengths the borrow guarantees; `out` is
    // borrowed mutably, so nothing else reads or writes it.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
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
