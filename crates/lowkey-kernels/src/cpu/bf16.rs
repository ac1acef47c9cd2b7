//! Products of operands rounded to bf16, with sums in f32.
//!
//! Intel's AMX multiplies tiles: 16 rows of 32 numbers by 32 rows of 16, added to 16 × 16 sums in f32 that stay in a register, which
//! is some ten times what its vectors of f32 do in that time. AVX512-BF16, which AMD has from Zen 4 on, adds two products to each sum of a
//! vector. Both read pairs of neighbours along the inner dimension, so that both operands are packed first, and rounded while they
//! are; a block of the right operand once for all rows, some rows of the left one for all columns of that block. What is read again
//! for each column lies in the first cache then, the block of columns in the second.
//!
//! Each sum runs over the inner dimension in one order, however the rest is cut: any number of threads gives the same bits. The
//! units differ in how they add a pair (and both take numbers below 1e-38 for 0), so that two kinds of processors agree to the
//! rounding of an f32 sum.

#[cfg(target_arch = "x86_64")]
mod kernels;
#[cfg(target_arch = "x86_64")]
mod pack;
#[cfg(test)]
mod tests;
mod unit;

pub(crate) use self::unit::Unit;

use super::gemm::View;

/// A product of one matrix with another, both as they lie in memory.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    /// Rows and columns of the result, and the inner dimension, each at least 1.
    pub(crate) sizes: [usize; 3],
    pub(crate) a: View<'a>,
    pub(crate) b: View<'a>,
    /// Whether the result is added to what is there.
    pub(crate) accumulate: bool,
    pub(crate) threads: usize,
}

impl Product<'_> {
    /// Computes it, with the given unit.
    ///
    /// # Safety
    /// The rows of `out`, `stride` apart, must be valid for reading and writing, and nothing else may use them meanwhile. The unit is
    /// one that there is here.
    pub(crate) unsafe fn run(self, unit: Unit, out: *mut f32, stride: usize) {
        // SAFETY: as the caller promises.
        unsafe {
            match unit {
                #[cfg(target_arch = "x86_64")]
                Unit::Tiles | Unit::Pairs => packed::run(self, unit, out, stride),
                _ => self.emulate(out, stride),
            }
        }
    }

    /// Rounds both operands and multiplies them in f32.
    ///
    /// # Safety
    /// As of [`Product::run`].
    unsafe fn emulate(self, out: *mut f32, stride: usize) {
        let Self { sizes: [m, n, k], a, b, accumulate, threads } = self;
        let (a, b) = (rounded(a, [m, k]), rounded(b.t(), [n, k]));
        let (a, b) = (View::new(&a, k), View::new(&b, k).t());
        // SAFETY: as the caller promises.
        unsafe { super::gemm::multiply_f32([m, n, k], out, stride, accumulate, a, b, 1.0, threads) }
    }
}

/// A dense copy, rounded to bf16.
fn rounded(matrix: View, [rows, columns]: [usize; 2]) -> Vec<f32> {
    let numbers = (0..rows).flat_map(|row| (0..columns).map(move |column| row * matrix.rows + column * matrix.columns));
    numbers.map(|at| half::bf16::from_f32(matrix.data[at]).to_f32()).collect()
}

#[cfg(target_arch = "x86_64")]
mod packed {
    use std::cell::Cell;

    use rayon::prelude::*;

    use super::kernels::{BLOCK, Registers, by_pairs, by_tiles};
    use super::pack::{Part, STRIP, Tile};
    use super::{Product, Unit};

    /// Numbers of the inner dimension at a time: two strips of so many (32 KiB) leave room for the other operand's in the first cache.
    const INNER: usize = 512;
    /// Columns at a time: 1 MiB of the right operand.
    const COLUMNS: usize = 1024;
    /// Rows of a task, at most.
    const ROWS: usize = 128;
    /// Columns that one task packs.
    const SHARE: usize = 8 * STRIP;

    thread_local! {
        // What was packed, of the right and of the left operand. Fresh pages would cost as much as small products.
        static ROOM: [Cell<Vec<Tile>>; 2] = const { [Cell::new(Vec::new()), Cell::new(Vec::new())] };
    }

    /// Room for so many tiles. It is taken away meanwhile: a thread that waits for others may begin another product.
    fn with_room<R>(side: usize, tiles: usize, work: impl FnOnce(&mut [Tile]) -> R) -> R {
        let mut room = ROOM.with(|room| room[side].take());
        if room.len() < tiles {
            room.resize(tiles, Tile::ZERO);
        }
        let done = work(&mut room[..tiles]);
        ROOM.with(|all| all[side].set(room));
        done
    }

    /// # Safety
    /// As of [`Product::run`], with a unit that packs.
    pub(super) unsafe fn run(product: Product, unit: Unit, out: *mut f32, stride: usize) {
        let Product { sizes: [_, n, k], b, accumulate, .. } = product;
        for (inner, depth) in parts(k, INNER) {
            for (column, width) in parts(n, COLUMNS) {
                let right = Part::right(b, [column, width], [inner, depth]);
                with_room(0, strips(width) * right.tiles(), |packed| {
                    pack(product, right, packed);
                    // SAFETY: these columns are among those that the caller vouches for.
                    unsafe {
                        let out = Columns { start: out.add(column), stride, width, add: accumulate || inner > 0 };
                        multiply(product, unit, [inner, depth], packed, out);
                    }
                });
            }
        }
    }

    /// Packs columns of the right operand, some strips a task.
    fn pack(product: Product, right: Part, packed: &mut [Tile]) {
        let share = SHARE / STRIP * right.tiles();
        let pack = |(i, strips): (usize, &mut [Tile])| {
            // SAFETY: units that pack have these instructions.
            unsafe { right.from(i * SHARE).pack(strips) };
        };
        if product.threads > 1 {
            packed.par_chunks_mut(share).enumerate().for_each(pack);
        } else {
            packed.chunks_mut(share).enumerate().for_each(pack);
        }
    }

    /// Columns of the result, which several tasks write, each its own rows.
    #[derive(Clone, Copy)]
    struct Columns {
        start: *mut f32,
        stride: usize,
        width: usize,
        add: bool,
    }

    // SAFETY: no two tasks write the same rows.
    unsafe impl Sync for Columns {}

    /// All rows of the left operand with these columns of the right one.
    ///
    /// # Safety
    /// As of [`Product::run`], for these columns.
    unsafe fn multiply(product: Product, unit: Unit, inner: [usize; 2], packed: &[Tile], out: Columns) {
        let Product { sizes: [m, ..], a, threads, .. } = product;
        let rows = m.div_ceil(2 * threads).next_multiple_of(BLOCK).min(ROWS);
        let out = &out;
        let task = |i: usize| {
            let (from, count) = (i * rows, rows.min(m - i * rows));
            let left = Part::left(a, [from, count], inner);
            with_room(1, strips(count) * left.tiles(), |strips| {
                // SAFETY: units that pack have these instructions; these rows are this task's, and within what the caller vouches for.
                unsafe {
                    left.pack(strips);
                    let at = out.start.add(from * out.stride);
                    blocks(unit, [strips, packed], left.tiles(), [count, out.width], Columns { start: at, ..*out });
                }
            });
        };
        let tasks = m.div_ceil(rows);
        if threads > 1 {
            (0..tasks).into_par_iter().for_each(task);
        } else {
            (0..tasks).for_each(task);
        }
    }

    /// The sums of packed rows with packed columns, block by block.
    ///
    /// # Safety
    /// The unit is there, and `out` may be written, by nobody else meanwhile.
    unsafe fn blocks(unit: Unit, [a, b]: [&[Tile]; 2], tiles: usize, [rows, columns]: [usize; 2], out: Columns) {
        // SAFETY: the caller's promise.
        let _registers = (unit == Unit::Tiles).then(|| unsafe { Registers::take() });
        let kernel = if unit == Unit::Tiles { by_tiles } else { by_pairs };
        let strips = 2 * tiles;
        for (row, a) in (0..rows).step_by(BLOCK).zip(a.chunks_exact(strips)) {
            for (column, b) in (0..columns).step_by(BLOCK).zip(b.chunks_exact(strips)) {
                let (height, width) = (BLOCK.min(rows - row), BLOCK.min(columns - column));
                // SAFETY: two strips of each; a block that is not whole is made beside the result, and what belongs to it copied.
                unsafe {
                    let at = out.start.add(row * out.stride + column);
                    if height == BLOCK && width == BLOCK {
                        kernel(a.as_ptr(), b.as_ptr(), tiles, at, out.stride, out.add);
                        continue;
                    }
                    let mut whole = [0.0f32; BLOCK * BLOCK];
                    kernel(a.as_ptr(), b.as_ptr(), tiles, whole.as_mut_ptr(), BLOCK, false);
                    for (i, whole) in whole.chunks_exact(BLOCK).enumerate().take(height) {
                        let row = std::slice::from_raw_parts_mut(at.add(i * out.stride), width);
                        for (sum, x) in row.iter_mut().zip(whole) {
                            *sum = if out.add { *sum + x } else { *x };
                        }
                    }
                }
            }
        }
    }

    /// Parts of at most `most` of something, each with where it begins.
    fn parts(of: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
        (0..of).step_by(most).map(move |from| (from, most.min(of - from)))
    }

    /// Strips of so many rows or columns: whole blocks of them.
    fn strips(count: usize) -> usize {
        count.div_ceil(BLOCK) * (BLOCK / STRIP)
    }
}
