//! What the kernels on matrix units share.

use cubecl::cmma::{self, Matrix, MatrixIdent, MatrixLayout};
use cubecl::prelude::*;

use super::geometry::Geometry;

/// Copies rows that are `step` numbers apart into shared memory; what lies beyond the rows or the width is 0.
#[cube]
pub(super) fn stage<E: Float>(
    source: &[f32],
    to: &mut Shared<[E]>,
    first: usize,
    step: usize,
    rows: usize,
    #[comptime] count: usize,
    #[comptime] width: usize,
    #[comptime] geometry: Geometry,
) {
    let whole = comptime!(geometry.whole(width));
    let pitch = comptime!(geometry.pitch(width));
    let mut i = UNIT_POS as usize;
    while i < comptime!(count * whole) {
        let (row, at) = (i / whole, i % whole);
        let mut value = 0.0f32;
        if row < rows && at < width {
            value = source[first + row * step + at];
        }
        to[row * pitch + at] = E::cast_from(value);
        i += CUBE_DIM as usize;
    }
}

/// The same for keys, whose last `rope` numbers stand in another tensor, once for all heads.
#[cube]
pub(super) fn stage_keys<E: Float>(
    kv: &[f32],
    k_pe: &[f32],
    to: &mut Shared<[E]>,
    first: usize,
    step: usize,
    first_pe: usize,
    rows: usize,
    #[comptime] count: usize,
    #[comptime] nope: usize,
    #[comptime] rope: usize,
    #[comptime] geometry: Geometry,
) {
    let whole = comptime!(geometry.whole(nope + rope));
    let pitch = comptime!(geometry.pitch(nope + rope));
    let mut i = UNIT_POS as usize;
    while i < comptime!(count * whole) {
        let (row, at) = (i / whole, i % whole);
        let mut value = 0.0f32;
        if row < rows {
            if at < nope {
                value = kv[first + row * step + at];
            } else if at < nope + rope {
                value = k_pe[first_pe + row * rope + at - nope];
            }
        }
        to[row * pitch + at] = E::cast_from(value);
        i += CUBE_DIM as usize;
    }
}

/// So many sums, all 0.
#[cube]
pub(super) fn zeros(#[comptime] count: usize, #[comptime] geometry: Geometry) -> Sequence<Matrix<f32>> {
    let mut sums = Sequence::new();
    #[unroll]
    for _ in 0..count {
        sums.push(Matrix::<f32>::from_value(
            MatrixIdent::Accumulator,
            geometry.m,
            geometry.n,
            geometry.k,
            MatrixLayout::Undefined,
            0.0,
        ));
    }
    sums
}

/// `sums[j] += a b` for each `n` columns of `b`: rows of `a` from `from` on, `depth` terms. With `across`, `b` is `[depth, columns]`;
/// without, its transpose.
#[cube]
pub(super) fn accumulate<E: Float>(
    a: &Shared<[E]>,
    from: usize,
    #[comptime] a_pitch: usize,
    b: &Shared<[E]>,
    #[comptime] b_pitch: usize,
    sums: &mut Sequence<Matrix<f32>>,
    #[comptime] depth: usize,
    #[comptime] across: bool,
    #[comptime] geometry: Geometry,
) {
    for step in 0..comptime!(depth / geometry.k) {
        let term = step * comptime!(geometry.k);
        let left = Matrix::<E>::from_slice(
            MatrixIdent::A,
            geometry.m,
            geometry.n,
            geometry.k,
            MatrixLayout::RowMajor,
            &a[from + term..a.len()],
            comptime!(a_pitch as u32),
        );
        #[unroll]
        for j in 0..sums.len() {
            let column = comptime!(j * geometry.n);
            if comptime!(across) {
                let right = Matrix::<E>::from_slice(
                    MatrixIdent::B,
                    geometry.m,
                    geometry.n,
                    geometry.k,
                    MatrixLayout::RowMajor,
                    &b[term * b_pitch + column..b.len()],
                    comptime!(b_pitch as u32),
                );
                cmma::execute(&left, &right, sums.index(j), sums.index(j));
            } else {
                let right = Matrix::<E>::from_slice(
                    MatrixIdent::B,
                    geometry.m,
                    geometry.n,
                    geometry.k,
                    MatrixLayout::ColMajor,
                    &b[column * b_pitch + term..b.len()],
                    comptime!(b_pitch as u32),
                );
                cmma::execute(&left, &right, sums.index(j), sums.index(j));
            }
        }
    }
}

/// Puts the sums from `first` on, as many as fit a block, into shared memory as rows of this plane.
#[cube]
pub(super) fn put(
    sums: &Sequence<Matrix<f32>>,
    to: &mut Shared<[f32]>,
    from: usize,
    #[comptime] first: usize,
    #[comptime] geometry: Geometry,
) {
    #[unroll]
    for j in 0..comptime!(geometry.block / geometry.n) {
        if comptime!(first + j < sums.len()) {
            let at = from + comptime!(j * geometry.n);
            let end = to.len();
            cmma::store(
                &mut to[at..end],
                sums.index(comptime!(first + j)),
                comptime!(geometry.score_pitch() as u32),
                MatrixLayout::RowMajor,
            );
        }
    }
}

/// Takes them back.
#[cube]
pub(super) fn take(
    sums: &mut Sequence<Matrix<f32>>,
    from_memory: &Shared<[f32]>,
    from: usize,
    #[comptime] first: usize,
    #[comptime] geometry: Geometry,
) {
    #[unroll]
    for j in 0..comptime!(geometry.block / geometry.n) {
        if comptime!(first + j < sums.len()) {
            let at = from + comptime!(j * geometry.n);
            cmma::load_with_layout(
                sums.index_mut(comptime!(first + j)),
                &from_memory[at..from_memory.len()],
                comptime!(geometry.score_pitch() as u32),
                MatrixLayout::RowMajor,
            );
        }
    }
}
