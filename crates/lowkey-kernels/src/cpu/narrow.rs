//! Products of tokens with matrices of few rows, such as those of an adapter, on a few tokens at a time.
//!
//! They do little arithmetic on each number, so that a product that packs its operands, and reads them once for each use, is bound by
//! memory. Here the tokens are those that the cache holds: what is read of them once serves all products that there are.

use pulp::{Arch, Simd, WithSimd};

use super::tile::{Aligned, Extent, LANES, Left, multiply_by_lanes};

/// Tokens at a time: with the widest activation beside its gradient they stay in the second cache of a core.
pub(crate) const TOKENS: usize = 64;

/// A matrix of few rows, `[rows, width]` where it lies or `[width, rows]`.
#[derive(Clone, Copy)]
pub(crate) struct Few {
    rows: usize,
    /// Rows with those of zeros that fill vectors.
    padded: usize,
}

impl Few {
    /// Of so many rows.
    pub(crate) fn new(rows: usize) -> Self {
        Self { rows, padded: rows.next_multiple_of(LANES) }
    }

    /// Rows with those of zeros that fill vectors.
    pub(crate) fn padded(self) -> usize {
        self.padded
    }

    /// Room for `x Mᵀ` of a few tokens.
    pub(crate) fn room(self) -> Aligned {
        Aligned::zeros(TOKENS * self.padded)
    }

    /// `[rows, width]` or, `across`, `[width, rows]`, times the factor, as `[padded, width]`: what [`Few::spread`] reads.
    pub(crate) fn rows(self, matrix: &[f32], across: bool, factor: f32) -> Aligned {
        let width = matrix.len() / self.rows;
        let mut out = Aligned::zeros(self.padded * width);
        if across {
            for (column, numbers) in matrix.chunks_exact(self.rows).enumerate() {
                numbers.iter().enumerate().for_each(|(row, x)| out[row * width + column] = x * factor);
            }
        } else {
            out.iter_mut().zip(matrix).for_each(|(out, x)| *out = x * factor);
        }
        out
    }

    /// The same as `[width, padded]`: what [`Few::gather`] reads.
    pub(crate) fn columns(self, matrix: &[f32], across: bool, factor: f32) -> Aligned {
        let width = matrix.len() / self.rows;
        let mut out = Aligned::zeros(self.padded * width);
        if across {
            for (out, numbers) in out.chunks_exact_mut(self.padded).zip(matrix.chunks_exact(self.rows)) {
                out.iter_mut().zip(numbers).for_each(|(out, x)| *out = x * factor);
            }
        } else {
            for (row, numbers) in matrix.chunks_exact(width).enumerate() {
                numbers.iter().enumerate().for_each(|(column, x)| out[column * self.padded + row] = x * factor);
            }
        }
        out
    }

    /// `out = x Mᵀ` for `x [count, width]`, `columns [width, padded]`, `out [count, padded]`.
    pub(crate) fn gather(self, x: &[f32], width: usize, columns: &[f32], out: &mut [f32]) {
        let (a, shape) = (Left { data: x, rows: width, inner: 1 }, [x.len() / width, width, self.padded]);
        Product { shape, a, b: (columns, self.padded), out: (out, self.padded), add: false }.run();
    }

    /// `y (+)= low M` for `low [count, padded]`, `rows [padded, width]`, `y [count, width]`.
    pub(crate) fn spread(self, low: &[f32], rows: &[f32], y: &mut [f32], width: usize, add: bool) {
        let (a, whole) = (Left { data: low, rows: self.padded, inner: 1 }, width / LANES * LANES);
        let shape = [y.len() / width, self.rows, whole];
        Product { shape, a, b: (rows, width), out: (&mut *y, width), add }.run();
        for (y, low) in y.chunks_exact_mut(width).zip(low.chunks_exact(self.padded)).filter(|_| whole < width) {
            for (column, y) in y.iter_mut().enumerate().skip(whole) {
                let sum: f32 = low[..self.rows].iter().enumerate().map(|(row, x)| x * rows[row * width + column]).sum();
                *y = if add { *y + sum } else { sum };
            }
        }
    }

    /// `sum += lowᵀ x` for `low [count, padded]`, `x [count, width]`, `sum [padded, width]`.
    pub(crate) fn collect(self, low: &[f32], x: &[f32], width: usize, sum: &mut [f32]) {
        let (a, whole) = (Left { data: low, rows: 1, inner: self.padded }, width / LANES * LANES);
        let shape = [self.padded, x.len() / width, whole];
        Product { shape, a, b: (x, width), out: (&mut *sum, width), add: true }.run();
        for (x, low) in x.chunks_exact(width).zip(low.chunks_exact(self.padded)).filter(|_| whole < width) {
            for (low, sum) in low[..self.rows].iter().zip(sum.chunks_exact_mut(width)) {
                sum[whole..].iter_mut().zip(&x[whole..]).for_each(|(sum, x)| *sum += low * x);
            }
        }
    }

    /// Writes a sum of [`Few::collect`] into a gradient, `[rows, width]` or, `across`, `[width, rows]`, times the factor.
    pub(crate) fn write(self, sum: &[f32], across: bool, factor: f32, out: &mut [f32]) {
        let width = out.len() / self.rows;
        if across {
            for (column, out) in out.chunks_exact_mut(self.rows).enumerate() {
                out.iter_mut().enumerate().for_each(|(row, out)| *out = sum[row * width + column] * factor);
            }
        } else {
            out.iter_mut().zip(sum).for_each(|(out, x)| *out = x * factor);
        }
    }
}

/// `out (+)= a b` of `[rows, inner, columns]`, columns that fill vectors.
struct Product<'a> {
    shape: [usize; 3],
    a: Left<'a>,
    b: (&'a [f32], usize),
    out: (&'a mut [f32], usize),
    add: bool,
}

impl Product<'_> {
    fn run(self) {
        Arch::new().dispatch(self);
    }
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { shape: [rows, inner, columns], a, b, out, add } = self;
        multiply_by_lanes(simd, rows, a, b, out, add, |_| Extent { inner: (0, inner), columns });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, step: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * step % 19) as f32) - 9.0).collect()
    }

    #[test]
    fn products_with_few_rows_are_the_products() {
        for (rows, width, count) in [(1, 1, 1), (3, 16, 8), (16, 37, 13), (5, 50, 3), (33, 64, 41)] {
            let few = Few::new(rows);
            let (matrix, x) = (numbers(rows * width, 37), numbers(count * width, 53));
            let turned: Vec<f32> = (0..width * rows).map(|i| matrix[i % rows * width + i / rows]).collect();
            for across in [false, true] {
                let matrix_there = if across { &turned } else { &matrix };
                let (as_rows, columns) = (few.rows(matrix_there, across, 2.0), few.columns(matrix_there, across, 2.0));
                let mut low = few.room();
                few.gather(&x, width, &columns, &mut low);
                let dot = |t: usize, row: usize| -> f32 {
                    (0..width).map(|i| x[t * width + i] * matrix[row * width + i] * 2.0).sum()
                };
                for (t, low) in low.chunks_exact(few.padded()).take(count).enumerate() {
                    let expected: Vec<f32> = (0..rows).map(|row| dot(t, row)).collect();
                    assert!(low[..rows] == expected && low[rows..].iter().all(|x| *x == 0.0), "{rows} {width} {count}");
                }
                let low = &low[..count * few.padded()];
                for add in [false, true] {
                    let mut y = vec![if add { 7.0 } else { f32::NAN }; count * width];
                    few.spread(low, &as_rows, &mut y, width, add);
                    for (i, y) in y.iter().enumerate() {
                        let (t, column) = (i / width, i % width);
                        let sum: f32 = (0..rows).map(|row| dot(t, row) * matrix[row * width + column] * 2.0).sum();
                        assert_eq!(*y, sum + if add { 7.0 } else { 0.0 }, "{rows} {width} {count}");
                    }
                }
                let mut sum = vec![0.0; few.padded() * width];
                few.collect(low, &x, width, &mut sum);
                let mut found = vec![0.0; rows * width];
                few.write(&sum, across, 0.5, &mut found);
                for row in 0..rows {
                    for column in 0..width {
                        let expected: f32 = (0..count).map(|t| dot(t, row) * x[t * width + column]).sum();
                        let at = if across { column * rows + row } else { row * width + column };
                        assert_eq!(found[at], 0.5 * expected, "{rows} {width} {count}");
                    }
                }
            }
        }
    }
}
