//! Operands rounded to bf16 and laid out as the units of [`super`] read them.

use half::bf16;

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

    pub(super) fn row_mut(&mut self, row: usize) -> &mut [u32; STRIP] {
        &mut self.0.as_chunks_mut::<STRIP>().0[row]
    }

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
    /// Strips that were packed.
    strips: usize,
}

impl Packed {
    /// An empty one.
    pub(crate) fn new(side: Side) -> Self {
        Self { side, tiles: Vec::new(), along: 1, strips: 0 }
    }

    pub(super) fn side(&self) -> Side {
        self.side
    }

    /// Makes room for so many rows or columns, and returns the strips.
    pub(super) fn room(&mut self, [count, depth]: [usize; 2]) -> &mut [Tile] {
        self.along = depth.div_ceil(DEPTH).max(1);
        self.strips = count.next_multiple_of(2 * STRIP) / STRIP;
        let tiles = self.strips * self.along;
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
        let whole = from.is_multiple_of(2 * STRIP) && first <= last;
        assert!(whole && last <= self.along && from / STRIP + 2 <= self.strips, "no block that was packed");
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
    /// Writes whole strips, one after the other; those beyond the last row are zero. The unit is one that there is.
    pub(super) fn pack(self, unit: Unit, strips: &mut [Tile]) {
        let View { rows, columns, .. } = self.rows;
        assert!(unit.is_here() && (rows == 1 || columns == 1), "no unit, or no view of rows");
        match unit {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: both units have these instructions, and the unit is there.
            Unit::Tiles | Unit::Pairs => unsafe { x86::pack(self, strips) },
            _ => self.each_tile(strips, |rows, sizes, out| plainly(rows, sizes, self.side, out)),
        }
    }

    /// Calls `pack` for each tile with what it has of the matrix, and how much of it there is.
    #[inline(always)]
    fn each_tile(self, strips: &mut [Tile], mut pack: impl FnMut(View, [usize; 2], &mut Tile)) {
        let along = self.depth.div_ceil(DEPTH).max(1);
        let View { data, rows, columns } = self.rows;
        let count_of_strips = strips.len() / along;
        let mut one = |strip: usize, tile: usize| {
            let count = self.count.saturating_sub(strip * STRIP).min(STRIP);
            let depth = self.depth.saturating_sub(tile * DEPTH).min(DEPTH);
            let out = &mut strips[strip * along + tile];
            if count == 0 || depth == 0 {
                *out = Tile::ZERO;
                return;
            }
            let data = &data[strip * STRIP * rows + tile * DEPTH * columns..];
            pack(View { data, rows, columns }, [count, depth], out);
        };
        // As the numbers lie in memory: along the rows, or across them.
        if columns == 1 {
            (0..count_of_strips).for_each(|strip| (0..along).for_each(|tile| one(strip, tile)));
        } else {
            (0..along).for_each(|tile| (0..count_of_strips).for_each(|strip| one(strip, tile)));
        }
    }
}

/// Number by number.
fn plainly(rows: View, [count, depth]: [usize; 2], side: Side, out: &mut Tile) {
    let number = |row: usize, inner: usize| {
        let inside = row < count && inner < depth;
        let x = if inside { rows.data[row * rows.rows + inner * rows.columns] } else { 0.0 };
        u32::from(bf16::from_f32(x).to_bits())
    };
    for (i, element) in out.0.iter_mut().enumerate() {
        let (row, pair) = if side == Side::Left { (i / STRIP, i % STRIP) } else { (i % STRIP, i / STRIP) };
        *element = number(row, 2 * pair) | number(row, 2 * pair + 1) << 16;
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use std::arch::x86_64::{
        __m512i, __mmask16, _mm512_castps_si512, _mm512_castsi512_ps, _mm512_cvtne2ps_pbh, _mm512_loadu_ps,
        _mm512_maskz_loadu_ps, _mm512_permutexvar_epi16, _mm512_set_epi16, _mm512_setzero_si512, _mm512_shuffle_i32x4,
        _mm512_storeu_si512, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32,
        _mm512_unpacklo_epi64,
    };

    use super::{DEPTH, Part, STRIP, Side, Tile};
    use crate::cpu::gemm::View;

    /// The elements of a tile in registers.
    type Rows = [__m512i; STRIP];

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(super) fn pack(part: Part, strips: &mut [Tile]) {
        // A view has its rows or its columns side by side.
        let by_rows = part.rows.columns == 1;
        let left = part.side == Side::Left;
        part.each_tile(strips, |view, sizes, out| {
            let View { data, rows, columns } = view;
            let packed = match (by_rows, left) {
                (true, true) => by_row(data, rows, sizes),
                (true, false) => transposed(by_row(data, rows, sizes)),
                (false, true) => transposed(by_pair(data, columns, sizes)),
                (false, false) => by_pair(data, columns, sizes),
            };
            for (out, row) in out.0.as_chunks_mut::<STRIP>().0.iter_mut().zip(packed) {
                // SAFETY: 16 numbers of 32 bits are what the row has.
                unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), row) };
            }
        });
    }

    /// Numbers of 16 bits of the lower half before those of the upper one, one by one.
    #[target_feature(enable = "avx512f,avx512bw")]
    #[inline]
    pub(in super::super) fn interleave() -> __m512i {
        #[rustfmt::skip]
        let interleave = _mm512_set_epi16(
            31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0,
        );
        interleave
    }

    /// Up to 16 numbers.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn load(data: &[f32]) -> __m512i {
        let count = data.len().min(STRIP);
        let mask = ((1u32 << count) - 1) as __mmask16;
        // SAFETY: the mask lets no more than the slice be read.
        _mm512_castps_si512(unsafe { _mm512_maskz_loadu_ps(mask, data.as_ptr()) })
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    fn load_whole(data: &[f32; STRIP]) -> __m512i {
        // SAFETY: 16 numbers are what it has.
        _mm512_castps_si512(unsafe { _mm512_loadu_ps(data.as_ptr()) })
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    #[inline]
    fn rounded(low: __m512i, high: __m512i) -> __m512i {
        // SAFETY: both types are 512 bits of plain numbers.
        unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(_mm512_castsi512_ps(high), _mm512_castsi512_ps(low))) }
    }

    /// Rows whose numbers of the inner dimension lie side by side.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    #[inline]
    fn by_row(data: &[f32], stride: usize, [count, depth]: [usize; 2]) -> Rows {
        let mut out = [_mm512_setzero_si512(); STRIP];
        if depth == DEPTH {
            for (row, out) in out.iter_mut().enumerate().take(count) {
                if let (halves @ [_, _], _) = data[row * stride..row * stride + DEPTH].as_chunks::<STRIP>() {
                    *out = rounded(load_whole(&halves[0]), load_whole(&halves[1]));
                }
            }
            return out;
        }
        for (row, out) in out.iter_mut().enumerate().take(count) {
            let (low, high) = data[row * stride..row * stride + depth].split_at(depth.min(STRIP));
            *out = rounded(load(low), load(high));
        }
        out
    }

    /// Rows whose numbers lie side by side for one number of the inner dimension: two of these are interleaved.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    #[inline]
    fn by_pair(data: &[f32], stride: usize, [count, depth]: [usize; 2]) -> Rows {
        let interleave = interleave();
        let mut out = [_mm512_setzero_si512(); STRIP];
        if count == STRIP && depth == DEPTH {
            assert!((DEPTH - 1) * stride + STRIP <= data.len(), "tile exceeds its slice");
            for (pair, out) in out.iter_mut().enumerate() {
                let [first, second] =
                    [2 * pair, 2 * pair + 1].map(|inner| data[inner * stride..].first_chunk::<STRIP>());
                if let (Some(first), Some(second)) = (first, second) {
                    *out = _mm512_permutexvar_epi16(interleave, rounded(load_whole(first), load_whole(second)));
                }
            }
            return out;
        }
        for (pair, out) in out.iter_mut().enumerate() {
            let of = |inner: usize| if inner < depth { &data[inner * stride..inner * stride + count] } else { &[] };
            *out = _mm512_permutexvar_epi16(interleave, rounded(load(of(2 * pair)), load(of(2 * pair + 1))));
        }
        out
    }

    /// From rows to pairs, or back.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn transposed(r: Rows) -> Rows {
        // Within groups of four lanes, first of two rows, then of four.
        let twos: Rows = std::array::from_fn(|i| {
            let (a, b) = (r[i / 2 * 2], r[i / 2 * 2 + 1]);
            if i % 2 == 0 { _mm512_unpacklo_epi32(a, b) } else { _mm512_unpackhi_epi32(a, b) }
        });
        let fours: Rows = std::array::from_fn(|i| {
            let (a, b) = (twos[i / 4 * 4 + i % 4 / 2], twos[i / 4 * 4 + i % 4 / 2 + 2]);
            if i % 2 == 0 { _mm512_unpacklo_epi64(a, b) } else { _mm512_unpackhi_epi64(a, b) }
        });
        // Then the groups themselves: fours[4 g + j] holds, of rows 4 g to 4 g + 3, columns j, 4 + j, 8 + j and 12 + j.
        let mut out = r;
        for j in 0..4 {
            let [a, b, c, d] = [fours[j], fours[4 + j], fours[8 + j], fours[12 + j]];
            let (even_ab, odd_ab) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
            let (even_cd, odd_cd) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
            out[j] = _mm512_shuffle_i32x4::<0x88>(even_ab, even_cd);
            out[4 + j] = _mm512_shuffle_i32x4::<0x88>(odd_ab, odd_cd);
            out[8 + j] = _mm512_shuffle_i32x4::<0xdd>(even_ab, even_cd);
            out[12 + j] = _mm512_shuffle_i32x4::<0xdd>(odd_ab, odd_cd);
        }
        out
    }
}
