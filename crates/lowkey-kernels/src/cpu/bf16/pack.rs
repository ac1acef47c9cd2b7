//! Operands rounded to bf16 and laid out as the units of [`super`] read them.

use std::arch::x86_64::{
    __m512i, __mmask16, _mm512_castsi512_ps, _mm512_cvtne2ps_pbh, _mm512_loadu_si512, _mm512_maskz_loadu_ps,
    _mm512_permutexvar_epi16, _mm512_set_epi16, _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_storeu_si512,
    _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

use crate::cpu::gemm::View;

/// Rows of the left operand, or columns of the right one, that lie in one tile.
pub(super) const STRIP: usize = 16;
/// Numbers of the inner dimension in one tile.
pub(super) const DEPTH: usize = 32;

/// [`STRIP`] rows or columns by [`DEPTH`] numbers of the inner dimension, in bf16, two of them in each element: of the left operand
/// row by row, of the right one pair by pair, each with its 16 columns.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Tile([u32; STRIP * DEPTH / 2]);

impl Tile {
    pub(super) const ZERO: Self = Self([0; STRIP * DEPTH / 2]);
}

/// Which operand a tile is of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Left,
    Right,
}

/// Part of an operand: strips of rows (of columns, on the right) by numbers of the inner dimension, `index · across + inner · along`.
#[derive(Clone, Copy)]
pub(super) struct Part<'a> {
    side: Side,
    data: &'a [f32],
    across: usize,
    along: usize,
    /// Rows, or columns.
    count: usize,
    /// Numbers of the inner dimension.
    depth: usize,
}

impl<'a> Part<'a> {
    /// Rows `from..from + count` of the left operand.
    pub(super) fn left(a: View<'a>, [from, count]: [usize; 2], [inner, depth]: [usize; 2]) -> Self {
        let data = &a.data[from * a.rows + inner * a.columns..];
        Self { side: Side::Left, data, across: a.rows, along: a.columns, count, depth }
    }

    /// Columns `from..from + count` of the right operand.
    pub(super) fn right(b: View<'a>, [from, count]: [usize; 2], [inner, depth]: [usize; 2]) -> Self {
        Self { side: Side::Right, ..Self::left(b.t(), [from, count], [inner, depth]) }
    }

    /// The same without the first rows, or columns.
    pub(super) fn from(self, first: usize) -> Self {
        let count = self.count.saturating_sub(first);
        Self { data: if count == 0 { &[] } else { &self.data[first * self.across..] }, count, ..self }
    }

    /// Tiles of each strip.
    pub(super) fn tiles(self) -> usize {
        self.depth.div_ceil(DEPTH)
    }

    /// Writes whole strips, one after the other, each with its tiles along the inner dimension. Strips beyond the last row are zero.
    ///
    /// # Safety
    /// The processor has AVX512-BF16, with BW.
    pub(super) unsafe fn pack(self, strips: &mut [Tile]) {
        let tiles = self.tiles();
        let count = strips.len() / tiles;
        // A number of each row after the other: rows of 16 numbers that lie together in memory are read as such.
        for tile in 0..tiles {
            for strip in 0..count {
                let out = &mut strips[strip * tiles + tile];
                // SAFETY: by the caller's promise.
                unsafe { self.tile(strip * STRIP, tile * DEPTH, out) };
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn tile(self, from: usize, inner: usize, out: &mut Tile) {
        let count = self.count.saturating_sub(from).min(STRIP);
        let depth = (self.depth - inner).min(DEPTH);
        if count == 0 {
            *out = Tile::ZERO;
            return;
        }
        let data = &self.data[from * self.across + inner * self.along..];
        // A view has its rows or its columns side by side.
        let by_rows = self.along == 1;
        if by_rows {
            rows(data, self.across, [count, depth], out);
        } else {
            pairs(data, self.along, [count, depth], out);
        }
        if by_rows != (self.side == Side::Left) {
            transpose(out);
        }
    }
}

/// The first `count` numbers of a vector.
#[target_feature(enable = "avx512f")]
#[inline]
fn load(data: &[f32]) -> __m512i {
    let count = data.len().min(STRIP);
    let mask = ((1u32 << count) - 1) as __mmask16;
    // SAFETY: the mask lets no more than the slice be read.
    unsafe { std::mem::transmute(_mm512_maskz_loadu_ps(mask, data.as_ptr())) }
}

#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn rounded([low, high]: [__m512i; 2]) -> __m512i {
    // SAFETY: both types are 512 bits of plain numbers.
    unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(_mm512_castsi512_ps(high), _mm512_castsi512_ps(low))) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn store(v: __m512i, tile: &mut Tile, row: usize) {
    let out: &mut [u32] = &mut tile.0[row * STRIP..][..STRIP];
    // SAFETY: 16 numbers of 32 bits are what the slice has.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), v) };
}

/// Rows whose numbers of the inner dimension lie side by side.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn rows(data: &[f32], stride: usize, [count, depth]: [usize; 2], out: &mut Tile) {
    for row in 0..STRIP {
        let v = if row < count {
            let numbers = &data[row * stride..row * stride + depth];
            let (low, high) = numbers.split_at(depth.min(STRIP));
            rounded([load(low), load(high)])
        } else {
            _mm512_setzero_si512()
        };
        store(v, out, row);
    }
}

/// Rows whose numbers lie side by side for one number of the inner dimension: two of these are interleaved.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn pairs(data: &[f32], stride: usize, [count, depth]: [usize; 2], out: &mut Tile) {
    #[rustfmt::skip]
    let interleave = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0,
    );
    for pair in 0..DEPTH / 2 {
        let of = |inner: usize| if inner < depth { &data[inner * stride..inner * stride + count] } else { &[] };
        let v = rounded([load(of(2 * pair)), load(of(2 * pair + 1))]);
        store(_mm512_permutexvar_epi16(interleave, v), out, pair);
    }
}

/// The 16 × 16 elements of a tile, transposed: from rows to pairs, or back.
#[target_feature(enable = "avx512f")]
fn transpose(tile: &mut Tile) {
    let r: [__m512i; STRIP] = std::array::from_fn(|row| {
        // SAFETY: each row is 16 numbers of 32 bits inside the tile.
        unsafe { _mm512_loadu_si512(tile.0[row * STRIP..].as_ptr().cast()) }
    });
    // Within groups of four lanes, first of two rows, then of four.
    let twos: [__m512i; STRIP] = std::array::from_fn(|i| {
        let (a, b) = (r[i / 2 * 2], r[i / 2 * 2 + 1]);
        if i % 2 == 0 { _mm512_unpacklo_epi32(a, b) } else { _mm512_unpackhi_epi32(a, b) }
    });
    let fours: [__m512i; STRIP] = std::array::from_fn(|i| {
        let (a, b) = (twos[i / 4 * 4 + i % 4 / 2], twos[i / 4 * 4 + i % 4 / 2 + 2]);
        if i % 2 == 0 { _mm512_unpacklo_epi64(a, b) } else { _mm512_unpackhi_epi64(a, b) }
    });
    // Then the groups themselves: fours[4 g + j] holds, of rows 4 g to 4 g + 3, columns j, 4 + j, 8 + j and 12 + j.
    for j in 0..4 {
        let [a, b, c, d] = [fours[j], fours[4 + j], fours[8 + j], fours[12 + j]];
        let (even_ab, odd_ab) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
        let (even_cd, odd_cd) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
        store(_mm512_shuffle_i32x4::<0x88>(even_ab, even_cd), tile, j);
        store(_mm512_shuffle_i32x4::<0x88>(odd_ab, odd_cd), tile, 4 + j);
        store(_mm512_shuffle_i32x4::<0xdd>(even_ab, even_cd), tile, 8 + j);
        store(_mm512_shuffle_i32x4::<0xdd>(odd_ab, odd_cd), tile, 12 + j);
    }
}
