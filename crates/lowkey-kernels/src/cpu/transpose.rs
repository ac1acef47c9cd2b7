//! Rows written as columns, in squares that a core turns in its registers.

/// Rows and columns of a square.
#[cfg(target_arch = "x86_64")]
const SIDE: usize = 8;

/// `to[c][r] = from[r][c]` for `[rows, columns]` numbers, with rows of `from.1` numbers apart, and of `to.1`.
#[inline(always)]
pub(crate) fn transpose([rows, columns]: [usize; 2], from: (&[f32], usize), to: (&mut [f32], usize)) {
    if rows == 0 || columns == 0 {
        return;
    }
    assert!(
        (rows - 1) * from.1 + columns <= from.0.len() && (columns - 1) * to.1 + rows <= to.0.len(),
        "transpose exceeds its buffers"
    );
    // SAFETY: the assertion above covers both sides.
    let [whole_rows, whole_columns] = unsafe { squares([rows, columns], from, (&mut *to.0, to.1)) };
    for row in 0..rows {
        let from = &from.0[row * from.1..][..columns];
        let first = if row < whole_rows { whole_columns } else { 0 };
        for (column, x) in from.iter().enumerate().skip(first) {
            to.0[column * to.1 + row] = *x;
        }
    }
}

/// Turns what fills squares, and says how many rows and columns that is.
///
/// # Safety
/// The rows must lie in `from`, and the columns in `to`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn squares([rows, columns]: [usize; 2], from: (&[f32], usize), to: (&mut [f32], usize)) -> [usize; 2] {
    if !std::is_x86_feature_detected!("avx") {
        return [0; 2];
    }
    let whole = [rows / SIDE * SIDE, columns / SIDE * SIDE];
    for row in (0..whole[0]).step_by(SIDE) {
        for column in (0..whole[1]).step_by(SIDE) {
            // SAFETY: by the caller's promise, and AVX is there.
            unsafe {
                let from = (from.0.as_ptr().add(row * from.1 + column), from.1);
                square(from, (to.0.as_mut_ptr().add(column * to.1 + row), to.1));
            }
        }
    }
    whole
}

/// Nothing: what follows turns number by number.
///
/// # Safety
/// None is needed.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn squares(_: [usize; 2], _: (&[f32], usize), _: (&mut [f32], usize)) -> [usize; 2] {
    [0; 2]
}

/// One square: pairs of rows are interleaved, then pairs of these, then halves exchanged.
///
/// # Safety
/// [`SIDE`] rows of as many numbers must lie behind both places, in the given distances.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
#[inline]
unsafe fn square(from: (*const f32, usize), to: (*mut f32, usize)) {
    use std::arch::x86_64::{
        _mm256_loadu_ps, _mm256_permute2f128_ps, _mm256_shuffle_ps, _mm256_storeu_ps, _mm256_unpackhi_ps,
        _mm256_unpacklo_ps,
    };
    // SAFETY: by the caller's promise.
    let rows: [_; SIDE] = std::array::from_fn(|i| unsafe { _mm256_loadu_ps(from.0.add(i * from.1)) });
    let low: [_; 4] = std::array::from_fn(|i| _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]));
    let high: [_; 4] = std::array::from_fn(|i| _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]));
    for half in 0..2 {
        let pairs = if half == 0 { low } else { high };
        let columns = [
            (_mm256_shuffle_ps::<0x44>(pairs[0], pairs[1]), _mm256_shuffle_ps::<0x44>(pairs[2], pairs[3])),
            (_mm256_shuffle_ps::<0xEE>(pairs[0], pairs[1]), _mm256_shuffle_ps::<0xEE>(pairs[2], pairs[3])),
        ];
        for (i, (upper, lower)) in columns.into_iter().enumerate() {
            let column = 2 * half + i;
            // SAFETY: by the caller's promise.
            unsafe {
                _mm256_storeu_ps(to.0.add(column * to.1), _mm256_permute2f128_ps::<0x20>(upper, lower));
                _mm256_storeu_ps(to.0.add((column + 4) * to.1), _mm256_permute2f128_ps::<0x31>(upper, lower));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_the_rows_whatever_the_shape_and_nothing_else_is_written() {
        for (rows, columns) in [(0, 5), (5, 0), (1, 1), (8, 8), (7, 9), (16, 24), (23, 17), (40, 3)] {
            let (from_stride, to_stride) = (columns + 3, rows + 5);
            let from: Vec<f32> = (0..rows * from_stride).map(|i| i as f32).collect();
            let mut to = vec![-1.0; columns * to_stride];
            transpose([rows, columns], (&from, from_stride), (&mut to, to_stride));
            for (i, x) in to.iter().enumerate() {
                let (column, row) = (i / to_stride, i % to_stride);
                let expected = if row < rows { from[row * from_stride + column] } else { -1.0 };
                assert_eq!(*x, expected, "{rows} × {columns} at {row}, {column}");
            }
        }
    }
}
