//! The kernel that decides whether a step may be taken.

use cubecl::prelude::*;

use crate::gpu::rows::{UNITS, add_up, largest};
use crate::optim::judgement::{LOSS, NO_FAULT};

/// Whether a number is finite, by its bits: compilers of shaders may take every number for one.
#[cube]
fn finite(x: f32) -> bool {
    (u32::reinterpret(x) & 0x7f80_0000u32) != 0x7f80_0000u32
}

/// Writes a [`crate::optim::Gate`]. `parts [count, UNITS]` are the sums of squares of the gradients in parts; `limit` below 0: none.
///
/// One cube: a few hundred gradients are as many reads of each unit.
#[cube(launch)]
pub(super) fn judge(
    parts: &[f32],
    losses: &[f32],
    before: &[f32],
    out: &mut [f32],
    count: usize,
    passes: usize,
    mean: f32,
    scale: f32,
    limit: f32,
) {
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(UNITS as usize));
    let unit = UNIT_POS as usize;
    let mut sum = 0.0f32;
    // Minus the first gradient that is at fault: `count` where there is none.
    let mut first = -(f32::cast_from(count));
    let mut i = 0usize;
    while i < count {
        let x = parts[i * comptime!(UNITS as usize) + unit];
        sum += x;
        if !finite(x) && first < -f32::cast_from(i) {
            first = -f32::cast_from(i);
        }
        i += 1;
    }
    let total = add_up(sum, &mut scratch);
    let first = -largest(first, &mut scratch);
    if UNIT_POS == 0 {
        let mut loss = 0.0f32;
        let mut pass = 0usize;
        while pass < passes {
            loss += losses[pass];
            pass += 1;
        }
        let loss = loss * mean;
        let norm = total.sqrt() / scale;
        let mut clip = 1.0f32;
        if limit >= 0.0f32 {
            let wanted = limit / (norm + 1e-6f32);
            if wanted < 1.0f32 {
                clip = wanted;
            }
        }
        let mut fault = comptime!(NO_FAULT).runtime();
        if !finite(loss) {
            fault = comptime!(LOSS).runtime();
        } else if first < f32::cast_from(count) || !finite(total) {
            fault = first;
        }
        let mut stopped = before[1];
        if fault != comptime!(NO_FAULT) {
            stopped = 1.0f32;
        }
        out[0] = clip / scale;
        out[1] = stopped;
        out[2] = loss;
        out[3] = norm;
        out[4] = fault;
    }
}
