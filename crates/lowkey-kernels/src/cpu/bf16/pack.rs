//! Operands rounded to bf16 and laid out as the units of [`super`] read them.

use super::unit::Unit;
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
    const ZERO: Self = Self([0; STRIP * DEPTH / 2]);

    /// Elements of a row, or of a pair.
    pub(super) fn row(&self, row: usize) -> &[u32; STRIP] {
        &self.0.as_chunks::<STRIP>().0[row]
    }
}

/// Which operand a tile is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Left,
    Right,
}

/// A packed operand: strips of rows (of columns, on the right), each with its tiles along the inner dimension. There are as many as
/// whole blocks have; what no matrix was packed into is zero.
pub(crate) struct Packed {
    side: Side,
    tiles: Vec<Tile>,
    /// Tiles of each strip.
    along: usize,
}

impl Packed {
    /// An empty one.
    pub(crate) fn new(side: Side) -> Self {
        Self { side, tiles: Vec::new(), along: 1 }
    }

    pub(super) fn side(&self) -> Side {
        self.side
    }

    /// Makes room for so many rows or columns, and returns the strips.
    pub(super) fn room(&mut self, [count, depth]: [usize; 2]) -> &mut [Tile] {
        self.along = depth.div_ceil(DEPTH).max(1);
        let tiles = count.next_multiple_of(2 * STRIP) / STRIP * self.along;
        if self.tiles.len() < tiles {
            self.tiles.resize(tiles, Tile::ZERO);
        }
        &mut self.tiles[..tiles]
    }

    /// Packs `[count, depth]` numbers.
    pub(super) fn pack(&mut self, unit: Unit, rows: View, [count, depth]: [usize; 2]) {
        let side = self.side;
        Part { side, rows, count, depth }.pack(unit, self.room([count, depth]));
    }

    /// Two strips from row (or column) `from` on, each its tiles `first..last`.
    pub(super) fn strips(&self, from: usize, [first, last]: [usize; 2]) -> [&[Tile]; 2] {
        assert!(from.is_multiple_of(2 * STRIP) && first <= last && last <= self.along, "no whole block");
        [0, 1].map(|strip| {
            let at = (from / STRIP + strip) * self.along;
            &self.tiles[at + first..at + last]
        })
    }
}

/// Part of an operand: `count` rows (of a right operand, columns) of `depth` numbers of the inner dimension.
#[derive(Clone, Copy)]
pub(super) struct Part<'a> {
    pub(super) side: Side,
    /// Row by row of a left operand, column by column of a right one.
    pub(super) rows: View<'a>,
    pub(super) count: usize,
    pub(super) depth: usize,
}

impl Part<'_> {
    /// Writes whole strips, one after the other; those beyond the last row are zero.
    pub(super) fn pack(self, unit: Unit, strips: &mut [Tile]) {
        let along = self.depth.div_ceil(DEPTH).max(1);
        // A number of each row after the other: rows of 16 numbers that lie together in memory are read as such.
        for tile in 0..along {
            for strip in 0..strips.len() / along {
                let count = self.count.saturating_sub(strip * STRIP).min(STRIP);
                let depth = self.depth.saturating_sub(tile * DEPTH).min(DEPTH);
                let out = &mut strips[strip * along + tile];
                if count == 0 || depth == 0 {
                    *out = Tile::ZERO;
                    continue;
                }
                let View { data, rows, columns } = self.rows;
                let data = &data[strip * STRIP * rows + tile * DEPTH * columns..];
                tile_of(unit, View { data, rows, columns }, [count, depth], self.side, out);
            }
        }
    }
}

/// Packs one tile.
fn tile_of(unit: Unit, rows: View, sizes: [usize; 2], side: Side, out: &mut Tile) {
    match unit {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: both units have these instructions.
        Unit::Tiles | Unit::Pairs => unsafe { x86::tile(rows, sizes, side, out) },
        _ => plainly(rows, sizes, side, out),
    }
}

/// Number by number.
fn plainly(rows: View, [count, depth]: [usize; 2], side: Side, out: &mut Tile) {
    let number = |row: usize, inner: usize| {
        let inside = row < count && inner < depth;
        let x = if inside { rows.data[row * rows.rows + inner * rows.columns] } else { 0.0 };
        u32::from(half::bf16::from_f32(x).to_bits())
    };
    for (i, element) in out.0.iter_mut().enumerate() {
        let (row, pair) = if side == Side::Left { (i / STRIP, i % STRIP) } else { (i % STRIP, i / STRIP) };
        *element = number(row, 2 * pair) | number(row, 2 * pair + 1) << 16;
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m512i, __mmask16, _mm512_castsi512_ps, _mm512_cvtne2ps_pbh, _mm512_loadu_si512, _mm512_maskz_loadu_ps,
        _mm512_permutexvar_epi16, _mm512_set_epi16, _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_storeu_si512,
        _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
    };

    use super::{DEPTH, STRIP, Side, Tile};
    use crate::cpu::gemm::View;

    /// A view has its rows or its columns side by side.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(super) fn tile(view: View, sizes: [usize; 2], side: Side, out: &mut Tile) {
        let by_rows = view.columns == 1;
        if by_rows {
            rows(view.data, view.rows, sizes, out);
        } else {
            pairs(view.data, view.columns, sizes, out);
        }
        if by_rows != (side == Side::Left) {
            transpose(out);
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
}
