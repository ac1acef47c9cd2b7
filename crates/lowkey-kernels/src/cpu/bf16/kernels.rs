//! A block of sums from packed strips, by each unit.

use std::arch::asm;
use std::arch::x86_64::{
    __m512, __m512bh, _mm512_dpbf16_ps, _mm512_load_si512, _mm512_loadu_ps, _mm512_set1_epi32, _mm512_setzero_ps,
    _mm512_storeu_ps,
};

use super::pack::{DEPTH, STRIP, Tile};

/// Rows and columns of a block: two strips of each operand, so that a tile which was read serves twice.
pub(super) const BLOCK: usize = 2 * STRIP;

/// While it lives, this thread's tile registers are eight of 16 rows by 64 bytes.
pub(super) struct Registers(());

impl Registers {
    /// Takes them.
    ///
    /// # Safety
    /// The processor has AMX, and the system has granted its state ([`super::Unit::Tiles`] is there).
    pub(super) unsafe fn take() -> Self {
        #[repr(C, align(64))]
        struct Configuration([u8; 64]);
        let mut configuration = Configuration([0; 64]);
        let Configuration(bytes) = &mut configuration;
        // "Palette" 1; then 16 numbers of 16 bits, the bytes of a row, and from 48 on 16 of 8 bits, the rows.
        bytes[0] = 1;
        for register in 0..8 {
            bytes[16 + 2 * register] = 64;
            bytes[48 + register] = 16;
        }
        // SAFETY: reads the 64 bytes of a valid configuration; by the caller's promise the instruction is there.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, readonly)) };
        Self(())
    }
}

impl Drop for Registers {
    fn drop(&mut self) {
        // SAFETY: they could be taken, so they can be given back. A thread without tiles is cheaper to switch to.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// `out (+)= a b` for two strips of each, [`BLOCK`] × [`BLOCK`] numbers in rows `stride` apart, with tiles.
///
/// # Safety
/// `a` and `b` point to two strips of `tiles` tiles each, and `out` to rows that may be read and written, by nobody else meanwhile.
/// This thread has [`Registers`].
pub(super) unsafe fn by_tiles(a: *const Tile, b: *const Tile, tiles: usize, out: *mut f32, stride: usize, add: bool) {
    // SAFETY: addresses run over exactly the strips and rows that the caller vouches for; tile registers are used by nothing else.
    unsafe {
        asm!(
            "test {add}, {add}",
            "jz 3f",
            "tileloadd tmm0, [{c}+{stride}*1]",
            "tileloadd tmm1, [{c}+{stride}*1+64]",
            "tileloadd tmm2, [{d}+{stride}*1]",
            "tileloadd tmm3, [{d}+{stride}*1+64]",
            "jmp 2f",
            "3:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{a}+{row}*1]",
            "tileloadd tmm6, [{b}+{row}*1]",
            "tileloadd tmm5, [{a2}+{row}*1]",
            "tileloadd tmm7, [{b2}+{row}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a}, 1024",
            "add {b}, 1024",
            "add {a2}, 1024",
            "add {b2}, 1024",
            "dec {tiles}",
            "jnz 2b",
            "tilestored [{c}+{stride}*1], tmm0",
            "tilestored [{c}+{stride}*1+64], tmm1",
            "tilestored [{d}+{stride}*1], tmm2",
            "tilestored [{d}+{stride}*1+64], tmm3",
            a = inout(reg) a => _,
            a2 = inout(reg) a.add(tiles) => _,
            b = inout(reg) b => _,
            b2 = inout(reg) b.add(tiles) => _,
            tiles = inout(reg) tiles => _,
            row = in(reg) 64usize,
            c = in(reg) out,
            d = in(reg) out.add(STRIP * stride),
            stride = in(reg) 4 * stride,
            add = in(reg) usize::from(add),
            out("tmm0") _,
            out("tmm1") _,
            out("tmm2") _,
            out("tmm3") _,
            out("tmm4") _,
            out("tmm5") _,
            out("tmm6") _,
            out("tmm7") _,
            options(nostack),
        );
    }
}

/// The same with vectors of pairs.
///
/// # Safety
/// As of [`by_tiles`], with AVX512-BF16 instead of registers of tiles.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn by_pairs(a: *const Tile, b: *const Tile, tiles: usize, out: *mut f32, stride: usize, add: bool) {
    /// Rows at a time: 16 sums, two vectors of the right operand and what is spread from the left one fit into the registers.
    const ROWS: usize = 8;
    for from in (0..BLOCK).step_by(ROWS) {
        // SAFETY: of two strips of `tiles` tiles, row `from` of the block, and its sums; all as the caller vouches for.
        unsafe {
            let (strip, first) = (a.add(from / STRIP * tiles), from % STRIP);
            let at = |row: usize, half: usize| out.add((from + row) * stride + half * STRIP);
            let mut sums: [[__m512; 2]; ROWS] = std::array::from_fn(|row| {
                std::array::from_fn(|half| if add { _mm512_loadu_ps(at(row, half)) } else { _mm512_setzero_ps() })
            });
            for tile in 0..tiles {
                let left: *const i32 = strip.add(tile).cast();
                let right: [*const i32; 2] = [b.add(tile).cast(), b.add(tiles + tile).cast()];
                for pair in 0..DEPTH / 2 {
                    let right: [__m512bh; 2] =
                        right.map(|right| std::mem::transmute(_mm512_load_si512(right.add(pair * STRIP).cast())));
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let left: __m512bh =
                            std::mem::transmute(_mm512_set1_epi32(*left.add((first + row) * STRIP + pair)));
                        for (sum, right) in sums.iter_mut().zip(right) {
                            *sum = _mm512_dpbf16_ps(*sum, left, right);
                        }
                    }
                }
            }
            for (row, sums) in sums.into_iter().enumerate() {
                for (half, sum) in sums.into_iter().enumerate() {
                    _mm512_storeu_ps(at(row, half), sum);
                }
            }
        }
    }
}
