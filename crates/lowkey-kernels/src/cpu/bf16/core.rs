//! One thread that multiplies packed operands.

use half::bf16;

use super::kernels::{BLOCK, Block, Registers, by_pairs, by_tiles, half_by_tiles, plainly};
use super::pack::{DEPTH, Packed, STRIP, Side};
use super::unit::Unit;
use crate::cpu::gemm::View;
use crate::cpu::vector::Ahead;

/// The unit of this thread.
pub(crate) struct Core {
    unit: Unit,
    /// Where the unit has registers of its own.
    _registers: Option<Registers>,
}

/// What of two packed operands is multiplied: whole blocks of rows and columns, whole tiles of the inner dimension.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    /// The first row and the first column, each a multiple of [`BLOCK`].
    pub(crate) from: [usize; 2],
    /// Rows and columns.
    pub(crate) count: [usize; 2],
    /// From and to of the inner dimension of the left operand; widened to whole tiles.
    pub(crate) inner: [usize; 2],
    /// How far the same numbers lie behind those in the right operand: a multiple of the depth of a tile.
    pub(crate) behind: usize,
}

impl Core {
    /// The fastest unit that there is here.
    pub(crate) fn here() -> Self {
        Self::of(Unit::here())
    }

    /// One of [`Unit::all`].
    pub(crate) fn of(unit: Unit) -> Self {
        assert!(unit.is_here(), "{unit:?} is not there");
        // SAFETY: the unit is there.
        let registers = (unit == Unit::Tiles).then(|| unsafe { Registers::take() });
        Self { unit, _registers: registers }
    }

    /// Packs `count` rows of a left operand `[count, depth]`, or columns of a right one `[depth, count]`.
    pub(crate) fn pack(&self, matrix: View, [count, depth]: [usize; 2], to: &mut Packed) {
        let matrix = if to.side() == Side::Left { matrix } else { matrix.t() };
        to.pack(self.unit, matrix, [count, depth]);
    }

    /// Packs numbers that are bf16 already, in rows `stride` apart: `[count, depth]` of a left operand, `[depth, count]` of a right one.
    /// `ahead` has its [turns](Packed::turns) meanwhile.
    pub(crate) fn take(&self, rows: (&[bf16], usize), sizes: [usize; 2], to: &mut Packed, ahead: &mut Ahead) {
        to.take(self.unit, rows, sizes, ahead);
    }

    /// `out (+)= a b`, of which `out` has the rows of the window, `stride` apart.
    ///
    /// # Panics
    /// Where the window is not within what was packed, or its rows not within `out`.
    pub(crate) fn multiply(&self, [a, b]: [&Packed; 2], window: Window, out: &mut [f32], stride: usize, add: bool) {
        let Window { count: [rows, columns], .. } = window;
        assert!(rows == 0 || (rows - 1) * stride + columns <= out.len(), "product exceeds its slice");
        // SAFETY: the assertion above keeps every access within `out`, which is borrowed mutably.
        unsafe { self.multiply_at([a, b], window, out.as_mut_ptr(), stride, add) }
    }

    /// The same at an address.
    ///
    /// # Safety
    /// The rows at `out`, `stride` apart, may be read and written, by nobody else meanwhile.
    pub(super) unsafe fn multiply_at(
        &self,
        [a, b]: [&Packed; 2],
        window: Window,
        out: *mut f32,
        stride: usize,
        add: bool,
    ) {
        let Window { from: [first_row, first_column], count: [rows, columns], inner: [from, to], behind } = window;
        assert!(a.side() == Side::Left && b.side() == Side::Right && behind.is_multiple_of(DEPTH));
        let tiles = [from / DEPTH, to.div_ceil(DEPTH)];
        if tiles[0] >= tiles[1] && add {
            return;
        }
        for row in (0..rows).step_by(BLOCK) {
            let left = a.strips(first_row + row, tiles);
            for column in (0..columns).step_by(BLOCK) {
                let right = b.strips(first_column + column, tiles.map(|tile| tile + behind / DEPTH));
                let (height, width) = (BLOCK.min(rows - row), BLOCK.min(columns - column));
                // SAFETY: a block that is not whole is made beside the result, and what belongs to it copied.
                unsafe {
                    let at = out.add(row * stride + column);
                    if height == BLOCK && width == BLOCK {
                        self.block(Block { a: left, b: right, out: at, stride, add });
                        continue;
                    }
                    let half = [[BLOCK, STRIP], [STRIP, BLOCK]].contains(&[height, width]);
                    if half && self.unit == Unit::Tiles {
                        half_by_tiles(Block { a: left, b: right, out: at, stride, add }, height == BLOCK);
                        continue;
                    }
                    let mut whole = [0.0f32; BLOCK * BLOCK];
                    self.block(Block { a: left, b: right, out: whole.as_mut_ptr(), stride: BLOCK, add: false });
                    for (i, whole) in whole.chunks_exact(BLOCK).enumerate().take(height) {
                        let row = std::slice::from_raw_parts_mut(at.add(i * stride), width);
                        row.iter_mut().zip(whole).for_each(|(sum, x)| *sum = if add { *sum + x } else { *x });
                    }
                }
            }
        }
    }

    /// # Safety
    /// The result may be read and written.
    unsafe fn block(&self, block: Block) {
        // SAFETY: the unit is there, and a core of tiles has its registers; the caller answers for the result.
        unsafe {
            match self.unit {
                Unit::Tiles => by_tiles(block),
                Unit::Pairs => by_pairs(block),
                Unit::Emulated => plainly(block),
            }
        }
    }
}
