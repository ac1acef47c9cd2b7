//! What the kernels on matrix units share.

use cubecl::cmma::{self, Matrix, MatrixIdent, MatrixLayout};
use cubecl::prelude::*;

use super::geometry::{Geometry, Layout};

/// Alignment, in bytes, of shared memory that matrix units read: that of the largest fragment.
pub(super) const ALIGN: usize = 32;

/// Copies rows that are `step` numbers apart into shared memory; what lies beyond the rows or the width is 0.
#[cube]
pub(super) fn stage<E: Float, N: Size>(
    source: &[Vector<E, N>],
    to: &mut Shared<[Vector<E, N>]>,
    first: usize,
    step: usize,
    rows: usize,
    #[comptime] count: usize,
    #[comptime] width: usize,
    #[comptime] geometry: Geometry,
) {
    let vector = comptime!(geometry.vector);
    let whole = comptime!(geometry.whole(width) / vector);
    let pitch = comptime!(geometry.pitch(width) / vector);
    let mut i = UNIT_POS as usize;
    while i < comptime!(count * whole) {
        let (row, at) = (i / whole, i % whole);
        let mut value = Vector::<E, N>::new(E::new(0.0));
        if row < rows && at < comptime!(width / vector) {
            value = source[(first + row * step) / vector + at];
        }
        to[row * pitch + at] = value;
        i += CUBE_DIM as usize;
    }
}

/// The same for keys, whose last `rope` numbers stand in another tensor, once for all heads.
#[cube]
pub(super) fn stage_keys<E: Float, N: Size>(
    kv: &[Vector<E, N>],
    k_pe: &[Vector<E, N>],
    to: &mut Shared<[Vector<E, N>]>,
    first: usize,
    step: usize,
    first_pe: usize,
    rows: usize,
    #[comptime] count: usize,
    #[comptime] nope: usize,
    #[comptime] rope: usize,
    #[comptime] geometry: Geometry,
) {
    let vector = comptime!(geometry.vector);
    let whole = comptime!(geometry.whole(nope + rope) / vector);
    let pitch = comptime!(geometry.pitch(nope + rope) / vector);
    let own = comptime!(nope / vector);
    let mut i = UNIT_POS as usize;
    while i < comptime!(count * whole) {
        let (row, at) = (i / whole, i % whole);
        let mut value = Vector::<E, N>::new(E::new(0.0));
        if row < rows {
            if at < own {
                value = kv[(first + row * step) / vector + at];
            } else if at < comptime!((nope + rope) / vector) {
                value = k_pe[(first_pe + row * rope) / vector + at - own];
            }
        }
        to[row * pitch + at] = value;
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
pub(super) fn accumulate<E: Float, A: CubePrimitive, B: CubePrimitive>(
    a: &Shared<[A]>,
    from: usize,
    #[comptime] of_a: Layout,
    b: &Shared<[B]>,
    #[comptime] of_b: Layout,
    sums: &mut Sequence<Matrix<f32>>,
    #[comptime] depth: usize,
    #[comptime] across: bool,
    #[comptime] geometry: Geometry,
) {
    let (m, n, k) = comptime!((geometry.m, geometry.n, geometry.k));
    let layout = comptime!(if across { MatrixLayout::RowMajor } else { MatrixLayout::ColMajor });
    // Distance of what one product's columns, and one step's terms, begin with.
    let column = comptime!((if across { n } else { n * of_b.pitch }) / of_b.vector);
    let term = comptime!((if across { k * of_b.pitch } else { k }) / of_b.vector);
    for step in 0..comptime!(depth / k) {
        let at = (from + step * k) / comptime!(of_a.vector);
        let mut left = unsafe { Matrix::<E>::uninitialized(MatrixIdent::A, m, n, k, MatrixLayout::RowMajor) };
        cmma::load(&mut left, &a[at..a.len()], comptime!(of_a.pitch as u32));
        #[unroll]
        for j in 0..sums.len() {
            let at = step * term + comptime!(j * column);
            let mut right = unsafe { Matrix::<E>::uninitialized(MatrixIdent::B, m, n, k, layout) };
            cmma::load(&mut right, &b[at..b.len()], comptime!(of_b.pitch as u32));
            cmma::execute(&left, &right, sums.index(j), sums.index(j));
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
