//! A block of sums from packed strips, by each unit.

use pulp::{Arch, Simd};

use super::pack::{DEPTH, STRIP, Tile};

/// Rows and columns of a block: two strips of each operand, so that a tile which was read serves twice.
pub(crate) const BLOCK: usize = 2 * STRIP;

/// `out (+)= a b` of two strips of each operand, [`BLOCK`] × [`BLOCK`] numbers in rows `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Block<'a> {
    pub(super) a: [&'a [Tile]; 2],
    pub(super) b: [&'a [Tile]; 2],
    pub(super) out: *mut f32,
    pub(super) stride: usize,
    pub(super) add: bool,
}

impl Block<'_> {
    /// Tiles of each strip: of all four as many.
    fn tiles(&self) -> usize {
        let [a, b] = self.a;
        let [c, d] = self.b;
        a.len().min(b.len()).min(c.len()).min(d.len())
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Registers, by_pairs, by_tiles, half_by_tiles};

#[cfg(not(target_arch = "x86_64"))]
pub(super) use elsewhere::{Registers, by_pairs, by_tiles, half_by_tiles};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::{
        __m512, __m512bh, _mm512_dpbf16_ps, _mm512_load_si512, _mm512_loadu_ps, _mm512_set1_epi32, _mm512_setzero_ps,
        _mm512_storeu_ps,
    };

    use super::{BLOCK, Block, DEPTH, STRIP};

    thread_local! {
        /// How many hold this thread's registers.
        static HOLDERS: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
    }

    /// While one lives, this thread's tile registers are eight of 16 rows by 64 bytes. What they hold is nobody's between two blocks.
    pub(in super::super) struct Registers {
        /// They are this thread's.
        _here: std::marker::PhantomData<*const ()>,
    }

    impl Registers {
        /// Takes them.
        ///
        /// # Safety
        /// The processor has AMX, and the system has granted its state ([`super::super::Unit::Tiles`] is there).
        pub(in super::super) unsafe fn take() -> Self {
            let holders = HOLDERS.replace(HOLDERS.get() + 1);
            if holders > 0 {
                return Self { _here: std::marker::PhantomData };
            }
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
            Self { _here: std::marker::PhantomData }
        }
    }

    impl Drop for Registers {
        fn drop(&mut self) {
            let holders = HOLDERS.replace(HOLDERS.get() - 1);
            if holders == 1 {
                // SAFETY: they could be taken, so they can be given back. A thread without tiles is cheaper to switch to.
                unsafe { asm!("tilerelease", options(nostack, nomem)) };
            }
        }
    }

    /// With tiles.
    ///
    /// # Safety
    /// The block's rows may be read and written, by nobody else meanwhile, and this thread has [`Registers`].
    pub(in super::super) unsafe fn by_tiles(block: Block) {
        let Block { a: [a, a2], b: [b, b2], out, stride, add } = block;
        let tiles = block.tiles();
        // SAFETY: addresses run over the strips, of which each has so many tiles of 1,024 bytes, and the rows that the caller vouches
        // for; tile registers are used by nothing else.
        unsafe {
            asm!(
                "test {add}, {add}",
                "jz 3f",
                "tileloadd tmm0, [{c}+{stride}*1]",
                "tileloadd tmm1, [{c}+{stride}*1+64]",
                "tileloadd tmm2, [{d}+{stride}*1]",
                "tileloadd tmm3, [{d}+{stride}*1+64]",
                "jmp 4f",
                "3:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "4:",
                "test {tiles}, {tiles}",
                "jz 5f",
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
                "5:",
                "tilestored [{c}+{stride}*1], tmm0",
                "tilestored [{c}+{stride}*1+64], tmm1",
                "tilestored [{d}+{stride}*1], tmm2",
                "tilestored [{d}+{stride}*1+64], tmm3",
                a = inout(reg) a.as_ptr() => _,
                a2 = inout(reg) a2.as_ptr() => _,
                b = inout(reg) b.as_ptr() => _,
                b2 = inout(reg) b2.as_ptr() => _,
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

    /// Half of a block: its first strip of columns alone where it is `tall`, else its first strip of rows.
    ///
    /// # Safety
    /// As of [`by_tiles`], for the rows and columns of that half.
    pub(in super::super) unsafe fn half_by_tiles(block: Block, tall: bool) {
        let Block { a, b, out, stride, add } = block;
        let tiles = block.tiles();
        // One strip meets both of the other operand, and gives two tiles of sums.
        let (once, [first, second], second_out) = if tall { (b[0], a, STRIP * stride) } else { (a[0], b, STRIP) };
        // SAFETY: as of a whole block.
        unsafe {
            asm!(
                "test {add}, {add}",
                "jz 3f",
                "tileloadd tmm0, [{c}+{stride}*1]",
                "tileloadd tmm1, [{d}+{stride}*1]",
                "jmp 4f",
                "3:",
                "tilezero tmm0",
                "tilezero tmm1",
                "4:",
                "test {tiles}, {tiles}",
                "jz 5f",
                "test {tall}, {tall}",
                "jz 6f",
                "2:",
                "tileloadd tmm4, [{once}+{row}*1]",
                "tileloadd tmm5, [{first}+{row}*1]",
                "tileloadd tmm6, [{second}+{row}*1]",
                "tdpbf16ps tmm0, tmm5, tmm4",
                "tdpbf16ps tmm1, tmm6, tmm4",
                "add {once}, 1024",
                "add {first}, 1024",
                "add {second}, 1024",
                "dec {tiles}",
                "jnz 2b",
                "jmp 5f",
                "6:",
                "tileloadd tmm4, [{once}+{row}*1]",
                "tileloadd tmm5, [{first}+{row}*1]",
                "tileloadd tmm6, [{second}+{row}*1]",
                "tdpbf16ps tmm0, tmm4, tmm5",
                "tdpbf16ps tmm1, tmm4, tmm6",
                "add {once}, 1024",
                "add {first}, 1024",
                "add {second}, 1024",
                "dec {tiles}",
                "jnz 6b",
                "5:",
                "tilestored [{c}+{stride}*1], tmm0",
                "tilestored [{d}+{stride}*1], tmm1",
                once = inout(reg) once.as_ptr() => _,
                first = inout(reg) first.as_ptr() => _,
                second = inout(reg) second.as_ptr() => _,
                tiles = inout(reg) tiles => _,
                row = in(reg) 64usize,
                c = in(reg) out,
                d = in(reg) out.add(second_out),
                stride = in(reg) 4 * stride,
                add = in(reg) usize::from(add),
                tall = in(reg) usize::from(tall),
                out("tmm0") _,
                out("tmm1") _,
                out("tmm4") _,
                out("tmm5") _,
                out("tmm6") _,
                options(nostack),
            );
        }
    }

    /// With vectors of pairs.
    ///
    /// # Safety
    /// The block's rows may be read and written, by nobody else meanwhile, and the processor has AVX512-BF16.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(in super::super) unsafe fn by_pairs(block: Block) {
        /// Rows at a time: 16 sums, two vectors of the right operand and what is spread from the left one fit into the registers.
        const ROWS: usize = 8;
        let Block { a, b, out, stride, add } = block;
        for from in (0..BLOCK).step_by(ROWS) {
            let (strip, first) = (a[from / STRIP], from % STRIP);
            // SAFETY: of strips of as many tiles as are read, and of the block's rows, which the caller vouches for.
            unsafe {
                let at = |row: usize, half: usize| out.add((from + row) * stride + half * STRIP);
                let mut sums: [[__m512; 2]; ROWS] = std::array::from_fn(|row| {
                    std::array::from_fn(|half| if add { _mm512_loadu_ps(at(row, half)) } else { _mm512_setzero_ps() })
                });
                for tile in 0..block.tiles() {
                    let left: *const i32 = strip.as_ptr().add(tile).cast();
                    let right: [*const i32; 2] = b.map(|strip| strip.as_ptr().add(tile).cast());
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
}

#[cfg(not(target_arch = "x86_64"))]
mod elsewhere {
    use super::{Block, plainly};

    /// There are none.
    pub(in super::super) struct Registers(());

    impl Registers {
        /// # Safety
        /// None is needed.
        pub(in super::super) unsafe fn take() -> Self {
            Self(())
        }
    }

    /// # Safety
    /// As of [`plainly`].
    pub(in super::super) unsafe fn by_tiles(block: Block) {
        // SAFETY: as the caller promises.
        unsafe { plainly(block) }
    }

    pub(in super::super) use by_tiles as by_pairs;

    /// # Safety
    /// As of [`plainly`].
    pub(in super::super) unsafe fn half_by_tiles(block: Block, _tall: bool) {
        // SAFETY: as the caller promises.
        unsafe { plainly(block) }
    }
}

/// The two numbers of an element.
pub(super) fn pair(element: u32) -> [f32; 2] {
    [f32::from_bits(element << 16), f32::from_bits(element & 0xffff_0000)]
}

/// In f32, with whatever vectors there are.
///
/// # Safety
/// The block's rows may be read and written, by nobody else meanwhile.
pub(super) unsafe fn plainly(block: Block) {
    let Block { a, b, out, stride, add } = block;
    for (i, row) in (0..BLOCK).enumerate() {
        // SAFETY: a row of the block, which the caller vouches for.
        let out = unsafe { std::slice::from_raw_parts_mut(out.add(row * stride), BLOCK) };
        if !add {
            out.fill(0.0);
        }
        let (left, right) = out.split_at_mut(STRIP);
        for (out, strip) in [left, right].into_iter().zip(b) {
            add_row(&a[i / STRIP][..block.tiles()], i % STRIP, strip, out);
        }
    }
}

/// Adds one row's products with one strip.
#[pulp::with_simd(add_row = Arch::new())]
#[inline(always)]
fn add_row_with<'a, S: Simd>(_simd: S, a: &'a [Tile], row: usize, b: &'a [Tile], out: &'a mut [f32]) {
    let mut sums = [0.0f32; STRIP];
    sums.copy_from_slice(out);
    for (a, b) in a.iter().zip(b) {
        for (left, right) in a.row(row).iter().zip((0..DEPTH / 2).map(|pair| b.row(pair))) {
            let [low, high] = pair(*left);
            for (sum, right) in sums.iter_mut().zip(right) {
                let [first, second] = pair(*right);
                *sum += low * first + high * second;
            }
        }
    }
    out.copy_from_slice(&sums);
}
