//! Products of whole matrices, on several threads.

use std::cell::Cell;

use rayon::prelude::*;

use super::core::{Core, Window};
use super::kernels::BLOCK;
use super::pack::{Packed, Part, STRIP, Side, Tile};
use super::unit::Unit;
use crate::cpu::gemm::View;
use crate::cpu::parts::{parts, with_kept};

/// A product of one matrix with another, both as they lie in memory.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    /// Rows and columns of the result, and the inner dimension.
    pub(crate) sizes: [usize; 3],
    pub(crate) a: View<'a>,
    pub(crate) b: View<'a>,
    /// Whether the result is added to what is there.
    pub(crate) accumulate: bool,
    pub(crate) threads: usize,
}

/// Numbers of the inner dimension at a time: two strips of so many (32 KiB) leave room for the other operand's in the first cache.
const INNER: usize = 512;
/// Columns at a time: 1 MiB of the right operand, in the second cache.
const COLUMNS: usize = 1024;
/// Rows of a task, at most.
const ROWS: usize = 128;
/// Columns that one task packs.
const SHARE: usize = 8 * STRIP;

thread_local! {
    // What was packed. Fresh pages would cost as much as small products.
    static LEFT: Cell<Option<Packed>> = const { Cell::new(None) };
    static RIGHT: Cell<Option<Packed>> = const { Cell::new(None) };
}

/// Room for an operand.
fn with_room<R>(side: Side, work: impl FnOnce(&mut Packed) -> R) -> R {
    with_kept(if side == Side::Right { &RIGHT } else { &LEFT }, || Packed::new(side), work)
}

/// Computes a product with one of the units that there are here.
///
/// # Panics
/// Where there is no such unit.
///
/// # Safety
/// The rows of `out`, `stride` apart, must be valid for reading and writing, and nothing else may use them meanwhile.
pub(crate) unsafe fn multiply(product: Product, unit: Unit, out: *mut f32, stride: usize) {
    assert!(unit.is_here(), "{unit:?} is not there");
    let Product { sizes: [m, n, k], b, accumulate, threads, .. } = product;
    if m == 0 || n == 0 {
        return;
    }
    for (inner, depth) in parts(k, INNER) {
        for (column, width) in parts(n, COLUMNS) {
            let data = b.data.get(inner * b.rows + column * b.columns..).unwrap_or_default();
            let right = Part { side: Side::Right, rows: View { data, ..b }.t(), count: width, depth };
            with_room(Side::Right, |packed| {
                pack(right, unit, threads, packed.room([width, depth]));
                let add = accumulate || inner > 0;
                // SAFETY: these columns are among those that the caller vouches for.
                unsafe {
                    rows(product, unit, [inner, depth], packed, Columns { start: out.add(column), stride, width, add });
                };
            });
        }
    }
}

/// Packs columns of the right operand, some strips a task.
fn pack(right: Part, unit: Unit, threads: usize, strips: &mut [Tile]) {
    let share = strips.len() / right.count.div_ceil(BLOCK) / 2 * (SHARE / STRIP);
    let pack = |(i, strips): (usize, &mut [Tile])| {
        let View { data, rows, columns } = right.rows;
        let from = i * SHARE;
        let part = View { data: data.get(from * rows..).unwrap_or_default(), rows, columns };
        Part { rows: part, count: right.count.saturating_sub(from), ..right }.pack(unit, strips);
    };
    if threads > 1 {
        strips.par_chunks_mut(share).enumerate().for_each(pack);
    } else {
        strips.chunks_mut(share).enumerate().for_each(pack);
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
/// As of [`multiply`], for these columns.
unsafe fn rows(product: Product, unit: Unit, [inner, depth]: [usize; 2], right: &Packed, out: Columns) {
    let Product { sizes: [m, ..], a, threads, .. } = product;
    let rows = m.div_ceil(2 * threads).next_multiple_of(BLOCK).min(ROWS);
    let out = &out;
    let task = |i: usize| {
        let (from, count) = (i * rows, rows.min(m - i * rows));
        let data = a.data.get(from * a.rows + inner * a.columns..).unwrap_or_default();
        with_room(Side::Left, |left| {
            let core = Core::of(unit);
            core.pack(View { data, ..a }, [count, depth], left);
            let window = Window { from: [0, 0], count: [count, out.width], inner: [0, depth], behind: 0 };
            // SAFETY: these rows are this task's, and within what the caller vouches for.
            unsafe { core.multiply_at([left, right], window, out.start.add(from * out.stride), out.stride, out.add) };
        });
    };
    let tasks = m.div_ceil(rows.max(1));
    if threads > 1 {
        (0..tasks).into_par_iter().for_each(task);
    } else {
        (0..tasks).for_each(task);
    }
}
