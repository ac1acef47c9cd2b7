//! Small matrix products inside one core: a tile of the result stays in registers while the inner dimension runs.
//!
//! The `gemm` crate packs both operands anew for every product. That pays for weights; it costs more than the product itself for
//! the blocks of an attention, whose inner dimension is a head's width and whose operands are used again at once.

use pulp::Simd;

use super::vector::Aside;

/// Rows of a tile. Every row count is rounded up to a multiple of it: buffers must have that many rows.
pub(crate) const ROWS: usize = 6;

/// Widths are multiples of this many numbers, whatever the processor's vectors hold.
pub(crate) use super::vector::LANES;

/// A buffer of zeros that begins at a cache line.
pub(crate) struct Aligned {
    data: Vec<f32>,
    start: usize,
}

impl Aligned {
    pub(crate) fn zeros(len: usize) -> Self {
        let data = vec![0.0f32; len + LANES];
        // A failed alignment only costs speed.
        let start = data.as_ptr().align_offset(64).min(LANES);
        Self { data, start }
    }
}

impl std::ops::Deref for Aligned {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.data[self.start..]
    }
}

impl std::ops::DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.data[self.start..]
    }
}

/// The left factor: number `(row, k)` lies at `row · rows + k · inner`.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) rows: usize,
    pub(crate) inner: usize,
}

/// Which part of a tile row to compute, and over which part of the inner dimension.
#[derive(Clone, Copy)]
pub(crate) struct Extent {
    /// Inner dimension `from..to`.
    pub(crate) inner: (usize, usize),
    /// Columns to compute from column 0, rounded up to [`LANES`].
    pub(crate) columns: usize,
}

/// `out = A B` or `out += A B` for rows `0..rows` (rounded up to [`ROWS`]), with `B [inner, columns]` in rows `b.1` apart and
/// `out` in rows `out.1` apart. `extent(first row)` says for each [`ROWS`] rows what of them is wanted. `aside` has a turn at each inner
/// index of a tile.
#[allow(clippy::too_many_arguments, reason = "a product, and what is done beside it")]
#[inline(always)]
pub(crate) fn multiply<S: Simd>(
    simd: S,
    rows: usize,
    a: Left,
    b: (&[f32], usize),
    out: (&mut [f32], usize),
    accumulate: bool,
    extent: impl Fn(usize) -> Extent,
    aside: &mut impl Aside,
) {
    let most = if S::REGISTER_COUNT >= 32 { 4 } else { 2 };
    multiply_by::<S, ROWS>(simd, rows, a, b, out, accumulate, extent, most, aside);
}

/// [`multiply`], added to what is there, in tiles of 8 or [`ROWS`] rows, whichever wastes fewer: buffers must have room for both, and an
/// extent must hold for 8 rows. `aside` has a turn at each inner index of a tile, see [`turns_of_either`].
#[inline(always)]
pub(crate) fn add_either<S: Simd>(
    simd: S,
    rows: usize,
    a: Left,
    b: (&[f32], usize),
    out: (&mut [f32], usize),
    extent: impl Fn(usize) -> Extent,
    aside: &mut impl Aside,
) {
    if in_eights::<S>(rows) {
        multiply_by::<S, 8>(simd, rows, a, b, out, true, extent, 2, aside);
    } else {
        multiply(simd, rows, a, b, out, true, extent, aside);
    }
}

fn in_eights<S: Simd>(rows: usize) -> bool {
    S::REGISTER_COUNT >= 32 && rows.next_multiple_of(8) <= rows.next_multiple_of(ROWS)
}

/// Turns of [`add_either`] for `[rows, inner, columns]`.
pub(crate) fn turns_of_either<S: Simd>([rows, inner, columns]: [usize; 3]) -> usize {
    let vectors = columns.next_multiple_of(LANES) / S::F32_LANES;
    match (in_eights::<S>(rows), S::REGISTER_COUNT >= 32) {
        (true, _) => rows.div_ceil(8) * vectors.div_ceil(2) * inner,
        (false, tall) => rows.div_ceil(ROWS) * vectors.div_ceil(if tall { 4 } else { 2 }) * inner,
    }
}

/// [`multiply`] of any number of rows, with no buffer longer than they are: whole tiles first, then row by row. An extent must hold for 8
/// rows.
#[inline(always)]
pub(crate) fn multiply_by_lanes<S: Simd>(
    simd: S,
    rows: usize,
    a: Left,
    b: (&[f32], usize),
    out: (&mut [f32], usize),
    accumulate: bool,
    extent: impl Fn(usize) -> Extent,
) {
    let tall = S::REGISTER_COUNT >= 32;
    let whole = rows / if tall { 8 } else { 4 } * if tall { 8 } else { 4 };
    let (data, stride) = out;
    match tall {
        true => multiply_by::<S, 8>(simd, whole, a, b, (&mut *data, stride), accumulate, &extent, 2, &mut ()),
        false => multiply_by::<S, 4>(simd, whole, a, b, (&mut *data, stride), accumulate, &extent, 2, &mut ()),
    }
    if whole < rows {
        let a = Left { data: &a.data[whole * a.rows..], ..a };
        let rest = (&mut data[whole * stride..], stride);
        multiply_by::<S, 1>(simd, rows - whole, a, b, rest, accumulate, &extent, 2, &mut ());
    }
}

/// The product in tiles of `M` rows and at most `most` vectors.
#[allow(clippy::too_many_arguments, reason = "two more than the function it is the body of")]
#[inline(always)]
fn multiply_by<S: Simd, const M: usize>(
    simd: S,
    rows: usize,
    a: Left,
    b: (&[f32], usize),
    out: (&mut [f32], usize),
    accumulate: bool,
    extent: impl Fn(usize) -> Extent,
    most: usize,
    aside: &mut impl Aside,
) {
    for row in (0..rows).step_by(M) {
        let Extent { inner: (from, to), columns } = extent(row);
        if from >= to && accumulate || columns == 0 {
            continue;
        }
        let width = columns.next_multiple_of(LANES);
        let last_row = row + M - 1;
        assert!(
            from <= to
                && (from == to
                    || last_row * a.rows + (to - 1) * a.inner < a.data.len() && (to - 1) * b.1 + width <= b.0.len())
                && last_row * out.1 + width <= out.0.len(),
            "tile exceeds its buffers"
        );
        let vectors = width / S::F32_LANES;
        let mut at = 0;
        while at < vectors {
            let count = (vectors - at).min(most);
            // SAFETY: the assertion above covers rows `row..row+M`, the inner range and all columns of the tile.
            unsafe {
                let a_at = a.data.as_ptr().add(row * a.rows + from * a.inner);
                let column = at * S::F32_LANES;
                let place = Place {
                    a: a_at,
                    a_row: a.rows,
                    a_inner: a.inner,
                    b: b.0.as_ptr().add(if from == to { 0 } else { from * b.1 + column }),
                    b_row: b.1,
                    out: out.0.as_mut_ptr().add(row * out.1 + column),
                    out_row: out.1,
                    inner: to - from,
                };
                match count {
                    1 => tile::<S, M, 1>(simd, place, accumulate, aside),
                    2 => tile::<S, M, 2>(simd, place, accumulate, aside),
                    3 => tile::<S, M, 3>(simd, place, accumulate, aside),
                    _ => tile::<S, M, 4>(simd, place, accumulate, aside),
                }
            }
            at += count;
        }
    }
}

/// Where a tile's operands and its result lie.
#[derive(Clone, Copy)]
struct Place {
    a: *const f32,
    a_row: usize,
    a_inner: usize,
    b: *const f32,
    b_row: usize,
    out: *mut f32,
    out_row: usize,
    inner: usize,
}

/// One tile of `M` rows and `N` vectors.
///
/// # Safety
/// For all rows below `M` and inner indices below `p.inner`, the numbers of `a`, the `N` vectors of each row of `b` and
/// of `out` must lie within their buffers.
#[inline(always)]
unsafe fn tile<S: Simd, const M: usize, const N: usize>(simd: S, p: Place, accumulate: bool, aside: &mut impl Aside) {
    let mut sums = [[simd.splat_f32s(0.0); N]; M];
    for k in 0..p.inner {
        aside.turn();
        // SAFETY: by the caller's promise; vectors are read as plain numbers without alignment.
        unsafe {
            let b_row = p.b.add(k * p.b_row);
            let mut b = [simd.splat_f32s(0.0); N];
            for (n, b) in b.iter_mut().enumerate() {
                *b = b_row.add(n * S::F32_LANES).cast::<S::f32s>().read_unaligned();
            }
            for (m, sums) in sums.iter_mut().enumerate() {
                let a = simd.splat_f32s(*p.a.add(m * p.a_row + k * p.a_inner));
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = simd.mul_add_e_f32s(a, b, *sum);
                }
            }
        }
    }
    for (m, sums) in sums.into_iter().enumerate() {
        for (n, sum) in sums.into_iter().enumerate() {
            // SAFETY: by the caller's promise.
            unsafe {
                let out = p.out.add(m * p.out_row + n * S::F32_LANES).cast::<S::f32s>();
                let sum = if accumulate { simd.add_f32s(out.read_unaligned(), sum) } else { sum };
                out.write_unaligned(sum);
            }
        }
    }
}

/// Products of rows with a few columns, in two lanes per column: `out[row][2c] + out[row][2c + 1]` is the scalar product of row
/// `row` of `a` and column `c`.
///
/// Rows come in `a.1` apart, `[rows, lanes, pairs]` sizes, and columns paired: `b[k · lanes + 2c + i]` is number `2k + i` of column
/// `c`. Two numbers of a row are one broadcast, so that 8 columns fill vectors of 16 lanes and no sum runs across lanes. `aside` has a turn
/// at each pair of a tile, see [`turns_of_pairs`].
#[inline(always)]
pub(crate) fn paired_products<S: Simd>(
    simd: S,
    [rows, lanes, pairs]: [usize; 3],
    a: (&[f32], usize),
    b: &[f32],
    out: &mut [f32],
    aside: &mut impl Aside,
) {
    assert!(
        lanes.is_multiple_of(LANES)
            && pairs * lanes <= b.len()
            && rows * lanes <= out.len()
            && (rows == 0 || (rows - 1) * a.1 + 2 * pairs <= a.0.len()),
        "paired product exceeds its buffers"
    );
    if size_of::<S::f32s>() != size_of::<S::f64s>() {
        // Without vectors there are no pairs.
        for (row, out) in out.chunks_exact_mut(lanes).take(rows).enumerate() {
            let a = &a.0[row * a.1..][..2 * pairs];
            for (lane, out) in out.iter_mut().enumerate() {
                *out = (0..pairs).map(|k| a[2 * k + lane % 2] * b[k * lanes + lane]).sum();
            }
        }
        return;
    }
    let (vectors, tall) = (lanes / S::F32_LANES, S::REGISTER_COUNT >= 32);
    let mut at = 0;
    while at < vectors {
        let wide = vectors - at >= 2;
        let mut row = 0;
        while row < rows {
            let left = rows - row;
            // SAFETY: the assertion above covers all rows, pairs and lanes.
            row += unsafe {
                let place = Place {
                    a: a.0.as_ptr().add(row * a.1),
                    a_row: a.1,
                    a_inner: 2,
                    b: b.as_ptr().add(at * S::F32_LANES),
                    b_row: lanes,
                    out: out.as_mut_ptr().add(row * lanes + at * S::F32_LANES),
                    out_row: lanes,
                    inner: pairs,
                };
                match (wide, tall) {
                    (true, true) if left >= 8 => paired_tile::<S, 8, 2>(simd, place, aside),
                    (true, _) if left >= 4 => paired_tile::<S, 4, 2>(simd, place, aside),
                    (true, _) => paired_tile::<S, 1, 2>(simd, place, aside),
                    (false, true) if left >= 16 => paired_tile::<S, 16, 1>(simd, place, aside),
                    (false, _) if left >= 8 => paired_tile::<S, 8, 1>(simd, place, aside),
                    (false, _) => paired_tile::<S, 1, 1>(simd, place, aside),
                }
            };
        }
        at += if wide { 2 } else { 1 };
    }
}

/// Turns of [`paired_products`] for `[rows, lanes, pairs]`, where no row is left over.
pub(crate) fn turns_of_pairs<S: Simd>([rows, lanes, pairs]: [usize; 3]) -> usize {
    let (vectors, tall) = (lanes / S::F32_LANES, S::REGISTER_COUNT >= 32);
    let turns = |most: usize| rows.div_ceil(if tall { most } else { most / 2 }) * pairs;
    vectors / 2 * turns(8) + vectors % 2 * turns(16)
}

/// One tile of `M` rows and `N` vectors of paired lanes; returns `M`.
///
/// # Safety
/// For all rows below `M` and pairs below `p.inner`, the two numbers of `a`, the `N` vectors of each row of `b` and of `out` must
/// lie within their buffers, and the vectors of f32 and f64 be of one size.
#[inline(always)]
unsafe fn paired_tile<S: Simd, const M: usize, const N: usize>(simd: S, p: Place, aside: &mut impl Aside) -> usize {
    let mut sums = [[simd.splat_f32s(0.0); N]; M];
    for k in 0..p.inner {
        aside.turn();
        // SAFETY: by the caller's promise; numbers are read without alignment.
        unsafe {
            let b_row = p.b.add(k * p.b_row);
            let b: [S::f32s; N] =
                std::array::from_fn(|n| b_row.add(n * S::F32_LANES).cast::<S::f32s>().read_unaligned());
            for (m, sums) in sums.iter_mut().enumerate() {
                // The bits of two numbers, moved as those of one.
                let pair = p.a.add(m * p.a_row + k * p.a_inner).cast::<f64>().read_unaligned();
                let a: S::f32s = pulp::bytemuck::cast(simd.splat_f64s(pair));
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = simd.mul_add_e_f32s(a, b, *sum);
                }
            }
        }
    }
    for (m, sums) in sums.into_iter().enumerate() {
        for (n, sum) in sums.into_iter().enumerate() {
            // SAFETY: by the caller's promise.
            unsafe { p.out.add(m * p.out_row + n * S::F32_LANES).cast::<S::f32s>().write_unaligned(sum) };
        }
    }
    M
}

#[cfg(test)]
mod tests {
    use super::*;
    use pulp::{Arch, WithSimd};

    struct Product<'a> {
        rows: usize,
        inner: usize,
        columns: usize,
        a: &'a [f32],
        transposed: bool,
        b: &'a [f32],
        out: &'a mut [f32],
    }

    impl WithSimd for Product<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Self { rows, inner, columns, a, transposed, b, out } = self;
            let width = columns.next_multiple_of(LANES);
            let (row, step) = if transposed { (1, rows.next_multiple_of(ROWS)) } else { (inner, 1) };
            let a = Left { data: a, rows: row, inner: step };
            multiply(simd, rows, a, (b, width), (out, width), true, |_| Extent { inner: (0, inner), columns }, &mut ());
        }
    }

    #[test]
    fn a_tiled_product_is_the_product() {
        for (rows, inner, columns) in [(1usize, 1, 1usize), (6, 5, 16), (7, 48, 33), (48, 3, 100), (13, 17, 64)] {
            let (padded, width) = (rows.next_multiple_of(ROWS), columns.next_multiple_of(LANES));
            let a: Vec<f32> = (0..padded * inner).map(|i| ((i * 37 % 19) as f32) - 9.0).collect();
            let b: Vec<f32> = (0..inner * width).map(|i| ((i * 53 % 23) as f32) - 11.0).collect();
            for transposed in [false, true] {
                let mut out = vec![1.0; padded * width];
                Arch::new().dispatch(Product { rows, inner, columns, a: &a, transposed, b: &b, out: &mut out });
                for i in 0..rows {
                    for j in 0..columns {
                        let a = |k: usize| if transposed { a[k * padded + i] } else { a[i * inner + k] };
                        let expected: f32 = 1.0 + (0..inner).map(|k| a(k) * b[k * width + j]).sum::<f32>();
                        assert_eq!(out[i * width + j], expected, "{rows} {inner} {columns} at {i}, {j}");
                    }
                }
            }
        }
    }

    struct Paired<'a> {
        sizes: [usize; 3],
        a: (&'a [f32], usize),
        b: &'a [f32],
        out: &'a mut [f32],
    }

    impl WithSimd for Paired<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            paired_products(simd, self.sizes, self.a, self.b, self.out, &mut ());
        }
    }

    #[test]
    fn paired_products_are_the_products_with_vectors_and_without() {
        for (rows, columns, pairs) in [(1, 8, 1), (33, 8, 5), (21, 16, 40), (13, 24, 3)] {
            let (stride, lanes) = (2 * pairs + 3, 2 * columns);
            let a: Vec<f32> = (0..rows * stride).map(|i| ((i * 37 % 19) as f32) - 9.0).collect();
            let b: Vec<f32> = (0..pairs * lanes).map(|i| ((i * 53 % 23) as f32) - 11.0).collect();
            for scalar in [false, true] {
                let mut out = vec![f32::NAN; rows * lanes];
                let call = Paired { sizes: [rows, lanes, pairs], a: (&a, stride), b: &b, out: &mut out };
                if scalar {
                    call.with_simd(pulp::Scalar::new());
                } else {
                    Arch::new().dispatch(call);
                }
                for row in 0..rows {
                    for c in 0..columns {
                        let found = out[row * lanes + 2 * c] + out[row * lanes + 2 * c + 1];
                        let number = |k: usize| a[row * stride + k] * b[k / 2 * lanes + 2 * c + k % 2];
                        let expected: f32 = (0..2 * pairs).map(number).sum();
                        assert_eq!(found, expected, "{rows} {columns} {pairs} at {row}, {c}");
                    }
                }
            }
        }
    }

    #[test]
    fn buffers_begin_at_a_cache_line() {
        for len in [1, 100, 4096] {
            let buffer = Aligned::zeros(len);
            assert!(buffer.as_ptr().addr().is_multiple_of(64) && buffer.len() >= len);
        }
    }
}
