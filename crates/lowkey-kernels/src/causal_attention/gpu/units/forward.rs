//! Output and log-sum-exp.

use cubecl::prelude::*;

use super::geometry::{Geometry, Widths};
use super::parts::{ALIGN, accumulate, put, stage, stage_keys, take, zeros};
use crate::causal_attention::gpu::tiles::HIDDEN;

/// How much a row's scores may outgrow the maximum that its exponentials refer to: e⁸ lies far within the range of f16.
const SLACK: f32 = 8.0;

/// `q [B, T, H, N+R]`, `kv [B, T, G, N+V]`, `k_pe [B, T, R]`, `starts [B, T]` → `out [B, T, H, V]`, `lse [B, H, T]`. Cubes: blocks of
/// queries, H, B.
#[cube(launch)]
pub(in crate::causal_attention::gpu) fn forward<E: Float, N: Size>(
    q: &[Vector<E, N>],
    kv: &[Vector<E, N>],
    k_pe: &[Vector<E, N>],
    starts: &[i32],
    out: &mut [f32],
    lse: &mut [f32],
    seq: usize,
    scale: f32,
    #[comptime] widths: Widths,
    #[comptime] geometry: Geometry,
) {
    let block = comptime!(geometry.block);
    let rows = comptime!(geometry.rows());
    let spread = comptime!(geometry.spread);
    let (width, kv_width) = comptime!((widths.key(), widths.kv()));
    let (heads, groups, value) = comptime!((widths.heads, widths.groups, widths.value));
    let (keys_layout, values_layout) = comptime!((geometry.layout(width), geometry.layout(value)));
    let (score_pitch, shares_layout) = comptime!((geometry.score_pitch(), geometry.scalars(block)));
    let vector = comptime!(geometry.vector);
    let tiles = comptime!(geometry.whole(value) / geometry.n);
    let per_chunk = comptime!(block / geometry.n);

    // The last blocks see most keys: they begin first.
    let cube = seq.div_ceil(rows) - 1 - CUBE_POS_X as usize;
    let (head, row_of_batch) = (CUBE_POS_Y as usize, CUBE_POS_Z as usize);
    let group = head / comptime!(heads / groups);
    let first = cube * rows;
    let mut queries = seq - first;
    if queries > rows {
        queries = rows.runtime();
    }
    let own = UNIT_POS_Y as usize * comptime!(geometry.m);

    let mut q_half = Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(rows * keys_layout.pitch / vector), ALIGN);
    let mut k_half = Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(block * keys_layout.pitch / vector), ALIGN);
    let mut v_half =
        Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(block * values_layout.pitch / vector), ALIGN);
    let mut shares = Shared::<[E]>::new_aligned_slice(comptime!(rows * shares_layout.pitch), ALIGN);
    let mut scores = Shared::<[f32]>::new_aligned_slice(comptime!(rows * score_pitch), ALIGN);
    let mut parts = Shared::<[f32]>::new_slice(comptime!(rows * spread));
    let mut totals = Shared::<[f32]>::new_slice(comptime!(rows * spread));
    let mut highest = Shared::<[f32]>::new_slice(rows);
    let mut next = Shared::<[f32]>::new_slice(rows);
    let mut factor = Shared::<[f32]>::new_slice(rows);
    let mut total = Shared::<[f32]>::new_slice(rows);
    let mut outgrown = Shared::<[f32]>::new_slice(1usize);

    let mut row = UNIT_POS as usize;
    while row < rows {
        highest[row] = HIDDEN;
        total[row] = 0.0;
        row += CUBE_DIM as usize;
    }
    let q_from = ((row_of_batch * seq + first) * heads + head) * width;
    stage::<E, N>(q, &mut q_half, q_from, heads * width, queries, rows, width, geometry);
    let mut sums = zeros(tiles, geometry);

    let last_key = first + queries;
    let mut first_key = starts[row_of_batch * seq + first] as usize / block * block;
    while first_key < last_key {
        let mut keys = seq - first_key;
        if keys > block {
            keys = block.runtime();
        }
        let from = ((row_of_batch * seq + first_key) * groups + group) * kv_width;
        let from_pe = (row_of_batch * seq + first_key) * widths.rope;
        sync_cube();
        let step = comptime!(groups * kv_width);
        stage_keys::<E, N>(kv, k_pe, &mut k_half, from, step, from_pe, keys, block, widths.nope, widths.rope, geometry);
        stage::<E, N>(kv, &mut v_half, from + widths.nope, step, keys, block, value, geometry);
        if UNIT_POS == 0 {
            outgrown[0] = 0.0;
        }
        sync_cube();
        let mut products = zeros(per_chunk, geometry);
        accumulate::<E, Vector<E, N>, Vector<E, N>>(
            &q_half,
            own * comptime!(keys_layout.pitch),
            keys_layout,
            &k_half,
            keys_layout,
            &mut products,
            comptime!(geometry.whole(width)),
            false,
            geometry,
        );
        put(&products, &mut scores, own * score_pitch, 0usize, geometry);
        sync_cube();
        let mut item = UNIT_POS as usize;
        while item < comptime!(rows * spread) {
            let (row, part) = (item / spread, item % spread);
            let mut start = seq;
            if row < queries {
                start = starts[row_of_batch * seq + first + row] as usize;
            }
            let mut now = HIDDEN.runtime();
            for i in 0..comptime!(block / spread) {
                let column = i * spread + part;
                let key = first_key + column;
                let mut s = HIDDEN.runtime();
                if key <= first + row && key >= start {
                    s = scores[row * score_pitch + column] * scale;
                }
                scores[row * score_pitch + column] = s;
                if s > now {
                    now = s;
                }
            }
            parts[item] = now;
            item += CUBE_DIM as usize;
        }
        sync_cube();
        let mut item = UNIT_POS as usize;
        while item < comptime!(rows * spread) {
            let (row, part) = (item / spread, item % spread);
            let before = highest[row];
            let mut now = before;
            for i in 0..spread {
                if parts[row * spread + i] > now {
                    now = parts[row * spread + i];
                }
            }
            if now - before <= SLACK {
                now = before;
            }
            let mut sum = 0.0f32;
            for i in 0..comptime!(block / spread) {
                let column = i * spread + part;
                let s = scores[row * score_pitch + column];
                // Hidden ones are set to 0, rather than seen ones to theirs: a score that is no number must not vanish.
                let mut e = (s - now).exp();
                if s <= HIDDEN {
                    e = 0.0;
                }
                shares[row * comptime!(shares_layout.pitch) + column] = E::cast_from(e);
                sum += e;
            }
            totals[item] = sum;
            if part == 0 {
                next[row] = now;
            }
            item += CUBE_DIM as usize;
        }
        sync_cube();
        let mut row = UNIT_POS as usize;
        while row < rows {
            let (before, now) = (highest[row], next[row]);
            let shrink = (before - now).exp();
            let mut sum = total[row] * shrink;
            for i in 0..spread {
                sum += totals[row * spread + i];
            }
            highest[row] = now;
            factor[row] = shrink;
            total[row] = sum;
            if now > before {
                outgrown[0] = 1.0;
            }
            row += CUBE_DIM as usize;
        }
        sync_cube();
        if outgrown[0] > 0.0 {
            #[unroll]
            for chunk in 0..comptime!(tiles.div_ceil(per_chunk)) {
                put(&sums, &mut scores, own * score_pitch, comptime!(chunk * per_chunk), geometry);
                sync_cube();
                let mut i = UNIT_POS as usize;
                while i < comptime!(rows * block) {
                    let (row, column) = (i / block, i % block);
                    scores[row * score_pitch + column] *= factor[row];
                    i += CUBE_DIM as usize;
                }
                sync_cube();
                take(&mut sums, &scores, own * score_pitch, comptime!(chunk * per_chunk), geometry);
                sync_cube();
            }
        }
        accumulate::<E, E, Vector<E, N>>(
            &shares,
            own * comptime!(shares_layout.pitch),
            shares_layout,
            &v_half,
            values_layout,
            &mut sums,
            block,
            true,
            geometry,
        );
        first_key += block;
    }
    #[unroll]
    for chunk in 0..comptime!(tiles.div_ceil(per_chunk)) {
        sync_cube();
        put(&sums, &mut scores, own * score_pitch, comptime!(chunk * per_chunk), geometry);
        sync_cube();
        let mut i = UNIT_POS as usize;
        while i < comptime!(rows * block) {
            let (row, at) = (i / block, i % block);
            let column = at + comptime!(chunk * block);
            if row < queries && column < value {
                let to = ((row_of_batch * seq + first + row) * heads + head) * value;
                out[to + column] = scores[row * score_pitch + at] / total[row];
            }
            i += CUBE_DIM as usize;
        }
    }
    let mut row = UNIT_POS as usize;
    while row < queries {
        lse[(row_of_batch * heads + head) * seq + first + row] = highest[row] + total[row].ln();
        row += CUBE_DIM as usize;
    }
}
