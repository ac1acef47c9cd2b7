//! Operands that are bf16 already, as a cache has them: laid out for the units by moving bits alone.

use half::bf16;
use half::slice::HalfFloatSliceExt;

use super::pack::{DEPTH, Packed, STRIP, Side, Tile};
use super::unit::Unit;
use crate::cpu::vector::{Ahead, Aside};

impl Packed {
    /// Packs numbers that are bf16 already, in rows `stride` apart: `[count, depth]` of a left operand, `[depth, count]` of a right one.
    /// `ahead` has its [turns](Packed::turns).
    pub(super) fn take(
        &mut self,
        unit: Unit,
        (data, stride): (&[bf16], usize),
        [count, depth]: [usize; 2],
        ahead: &mut Ahead,
    ) {
        let [rows, columns] = if self.side() == Side::Left { [count, depth] } else { [depth, count] };
        assert!(rows == 0 || (rows - 1) * stride + columns <= data.len(), "operand exceeds its slice");
        let (side, data) = (self.side(), data.reinterpret_cast());
        let halves = Halves { data, stride, rows, columns, along: depth.div_ceil(DEPTH).max(1) };
        let tiles = self.room([count, depth]);
        match (unit, side) {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: both units have these instructions, and the unit is there.
            (Unit::Tiles | Unit::Pairs, Side::Left) => unsafe { x86::take_rows(halves, tiles, ahead) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            (Unit::Tiles | Unit::Pairs, Side::Right) => unsafe { x86::take_pairs(halves, tiles, ahead) },
            (_, Side::Left) => halves.each_row(tiles, ahead, |part, out| {
                *out = std::array::from_fn(|i| word(part, 2 * i, part, 2 * i + 1));
            }),
            (_, Side::Right) => halves.each_pair(tiles, ahead, |[first, second], out| {
                *out = std::array::from_fn(|i| word(first, i, second, i));
            }),
        }
    }

    /// Turns of [`Packed::take`] for `[count, depth]`.
    pub(crate) fn turns(&self, [count, depth]: [usize; 2]) -> usize {
        match self.side() {
            Side::Left => count.next_multiple_of(2 * STRIP),
            Side::Right => depth.next_multiple_of(DEPTH) / 2,
        }
    }
}

/// Numbers of 16 bits, in rows.
#[derive(Clone, Copy)]
struct Halves<'a> {
    data: &'a [u16],
    stride: usize,
    rows: usize,
    columns: usize,
    /// Tiles of a strip.
    along: usize,
}

impl<'a> Halves<'a> {
    /// A row; nothing where there is none.
    #[inline(always)]
    fn row(self, row: usize) -> &'a [u16] {
        if row < self.rows { &self.data[row * self.stride..][..self.columns] } else { &[] }
    }

    /// Calls `write` for each row of each tile of a left operand, with up to 32 numbers.
    #[inline(always)]
    fn each_row(self, tiles: &mut [Tile], ahead: &mut Ahead, write: impl Fn(&[u16], &mut [u32; STRIP])) {
        for (strip, tiles) in tiles.chunks_exact_mut(self.along).enumerate() {
            for row in 0..STRIP {
                ahead.turn();
                let numbers = self.row(strip * STRIP + row);
                let (whole, rest) = numbers.as_chunks::<DEPTH>();
                let (filled, others) = tiles.split_at_mut(whole.len());
                filled.iter_mut().zip(whole).for_each(|(tile, part)| write(part, tile.row_mut(row)));
                let mut rest = rest;
                for tile in others {
                    write(rest, tile.row_mut(row));
                    rest = &[];
                }
            }
        }
    }

    /// Calls `write` for each pair of each tile of a right operand, with up to 16 numbers of both rows.
    #[inline(always)]
    fn each_pair(self, tiles: &mut [Tile], ahead: &mut Ahead, write: impl Fn([&[u16]; 2], &mut [u32; STRIP])) {
        for pair in 0..self.along * STRIP {
            ahead.turn();
            let both = [2 * pair, 2 * pair + 1].map(|row| self.row(row).as_chunks::<STRIP>());
            let [(first, first_rest), (second, second_rest)] = both;
            // Of the last pair the second may be none.
            let mut rest = [first_rest, second_rest];
            let mut column = tiles[pair / STRIP..].iter_mut().step_by(self.along);
            let mut written = 0;
            for ((first, second), tile) in first.iter().zip(second).zip(&mut column) {
                write([first, second], tile.row_mut(pair % STRIP));
                written += 1;
            }
            if second.len() < first.len() {
                for (first, tile) in first[written..].iter().zip(&mut column) {
                    write([first, &[]], tile.row_mut(pair % STRIP));
                }
            }
            for tile in column {
                write(rest, tile.row_mut(pair % STRIP));
                rest = [&[]; 2];
            }
        }
    }
}

/// Two numbers as an element, zero where there is none.
fn word(low: &[u16], i: usize, high: &[u16], j: usize) -> u32 {
    let number = |of: &[u16], i: usize| u32::from(of.get(i).copied().unwrap_or(0));
    number(low, i) | number(high, j) << 16
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256i, __mmask16, __mmask32, _mm256_maskz_loadu_epi16, _mm512_castsi256_si512, _mm512_inserti64x4,
        _mm512_maskz_loadu_epi16, _mm512_permutexvar_epi16, _mm512_storeu_si512,
    };

    use super::super::pack::x86::interleave;
    use super::{DEPTH, Halves, STRIP, Tile};
    use crate::cpu::vector::Ahead;

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) fn take_rows(halves: Halves, tiles: &mut [Tile], ahead: &mut Ahead) {
        halves.each_row(tiles, ahead, |part, out| {
            let mask = ((1u64 << part.len().min(DEPTH)) - 1) as __mmask32;
            // SAFETY: the mask lets no more than the slice be read, and 16 numbers of 32 bits are what the row has.
            unsafe {
                _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_maskz_loadu_epi16(mask, part.as_ptr().cast()));
            }
        });
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) fn take_pairs(halves: Halves, tiles: &mut [Tile], ahead: &mut Ahead) {
        let interleave = interleave();
        halves.each_pair(tiles, ahead, |parts, out| {
            let [low, high] = parts.map(|part| load_halves(part));
            let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
            // SAFETY: 16 numbers of 32 bits are what the row has.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_permutexvar_epi16(interleave, both)) };
        });
    }

    /// Up to 16 numbers of 16 bits.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    fn load_halves(part: &[u16]) -> __m256i {
        let mask = ((1u32 << part.len().min(STRIP)) - 1) as __mmask16;
        // SAFETY: the mask lets no more than the slice be read.
        unsafe { _mm256_maskz_loadu_epi16(mask, part.as_ptr().cast()) }
    }
}
