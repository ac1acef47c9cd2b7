//! The gradients.

use cubecl::prelude::*;

use super::geometry::{Geometry, Widths};
use super::parts::{ALIGN, accumulate, put, stage, stage_keys, zeros};

/// The gradient of the queries. `rows` as [`crate::causal_attention::gpu::tiles::prepare`] leaves them; cubes as in [`super::forward`].
#[cube(launch)]
pub(in crate::causal_attention::gpu) fn query_gradient<E: Float, N: Size>(
    q: &[Vector<E, N>],
    kv: &[Vector<E, N>],
    k_pe: &[Vector<E, N>],
    d_out: &[Vector<E, N>],
    of_rows: &[f32],
    d_q: &mut [f32],
    seq: usize,
    scale: f32,
    #[comptime] widths: Widths,
    #[comptime] geometry: Geometry,
) {
    let block = comptime!(geometry.block);
    let rows = comptime!(geometry.rows());
    let (width, kv_width) = comptime!((widths.key(), widths.kv()));
    let (heads, groups, value) = comptime!((widths.heads, widths.groups, widths.value));
    let (keys_layout, values_layout) = comptime!((geometry.layout(width), geometry.layout(value)));
    let (score_pitch, shares_layout) = comptime!((geometry.score_pitch(), geometry.scalars(block)));
    let vector = comptime!(geometry.vector);
    let tiles = comptime!(geometry.whole(width) / geometry.n);
    let per_chunk = comptime!(block / geometry.n);

    let cube = seq.div_ceil(rows) - 1 - CUBE_POS_X as usize;
    let (head, row_of_batch) = (CUBE_POS_Y as usize, CUBE_POS_Z as usize);
    let group = head / comptime!(heads / groups);
    let first = cube * rows;
    let mut queries = seq - first;
    if queries > rows {
        queries = rows.runtime();
    }
    let own = UNIT_POS_Y as usize * comptime!(geometry.m);
    let of_head = (row_of_batch * heads + head) * seq;
    let q_from = ((row_of_batch * seq + first) * heads + head) * width;
    let out_from = ((row_of_batch * seq + first) * heads + head) * value;

    let mut q_half = Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(rows * keys_layout.pitch / vector), ALIGN);
    let mut d_half = Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(rows * values_layout.pitch / vector), ALIGN);
    let mut k_half = Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(block * keys_layout.pitch / vector), ALIGN);
    let mut v_half =
        Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(block * values_layout.pitch / vector), ALIGN);
    let mut slopes = Shared::<[E]>::new_aligned_slice(comptime!(rows * shares_layout.pitch), ALIGN);
    let mut scores = Shared::<[f32]>::new_aligned_slice(comptime!(rows * score_pitch), ALIGN);
    let mut upstream = Shared::<[f32]>::new_aligned_slice(comptime!(rows * score_pitch), ALIGN);

    stage::<E, N>(q, &mut q_half, q_from, heads * width, queries, rows, width, geometry);
    stage::<E, N>(d_out, &mut d_half, out_from, heads * value, queries, rows, value, geometry);
    let mut sums = zeros(tiles, geometry);

    let last_key = first + queries;
    let mut first_key = u32::cast_from(of_rows[(of_head + first) * 3 + 2]) as usize / block * block;
    while first_key < last_key {
        let mut keys = seq - first_key;
        if keys > block {
            keys = block.runtime();
        }
        let from = ((row_of_batch * seq + first_key) * groups + group) * kv_width;
        let from_pe = (row_of_batch * seq + first_key) * widths.rope;
        let step = comptime!(groups * kv_width);
        sync_cube();
        stage_keys::<E, N>(kv, k_pe, &mut k_half, from, step, from_pe, keys, block, widths.nope, widths.rope, geometry);
        stage::<E, N>(kv, &mut v_half, from + widths.nope, step, keys, block, value, geometry);
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
        let mut products = zeros(per_chunk, geometry);
        accumulate::<E, Vector<E, N>, Vector<E, N>>(
            &d_half,
            own * comptime!(values_layout.pitch),
            values_layout,
            &v_half,
            values_layout,
            &mut products,
            comptime!(geometry.whole(value)),
            false,
            geometry,
        );
        put(&products, &mut upstream, own * score_pitch, 0usize, geometry);
        sync_cube();
        let mut i = UNIT_POS as usize;
        while i < comptime!(rows * block) {
            let (row, column) = (i / block, i % block);
            let key = first_key + column;
            let mut slope = 0.0f32;
            if row < queries && key <= first + row {
                let of_query = (of_head + first + row) * 3;
                if key >= u32::cast_from(of_rows[of_query + 2]) as usize {
                    let share = (scores[row * score_pitch + column] * scale - of_rows[of_query]).exp();
                    slope = share * (upstream[row * score_pitch + column] - of_rows[of_query + 1]) * scale;
                }
            }
            slopes[row * comptime!(shares_layout.pitch) + column] = E::cast_from(slope);
            i += CUBE_DIM as usize;
        }
        sync_cube();
        accumulate::<E, E, Vector<E, N>>(
            &slopes,
            own * comptime!(shares_layout.pitch),
            shares_layout,
            &k_half,
            keys_layout,
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
            if row < queries && column < width {
                d_q[q_from + row * heads * width + column] = scores[row * score_pitch + at];
            }
            i += CUBE_DIM as usize;
        }
    }
}

/// The gradients of keys and values, `d_kv [B, T, G, N+V]`, and of the shared part by group, `d_pe [B, T, G, R]`, to be summed. Cubes:
/// blocks of keys, G, B.
#[cube(launch)]
pub(in crate::causal_attention::gpu) fn key_gradient<E: Float, N: Size>(
    q: &[Vector<E, N>],
    kv: &[Vector<E, N>],
    k_pe: &[Vector<E, N>],
    d_out: &[Vector<E, N>],
    of_rows: &[f32],
    d_kv: &mut [E],
    d_pe: &mut [f32],
    seq: usize,
    scale: f32,
    #[comptime] widths: Widths,
    #[comptime] geometry: Geometry,
) {
    let block = comptime!(geometry.block);
    let rows = comptime!(geometry.rows());
    let (nope, rope) = comptime!((widths.nope, widths.rope));
    let (width, kv_width) = comptime!((widths.key(), widths.kv()));
    let (heads, groups, value) = comptime!((widths.heads, widths.groups, widths.value));
    let (keys_layout, values_layout) = comptime!((geometry.layout(width), geometry.layout(value)));
    let (score_pitch, shares_layout) = comptime!((geometry.score_pitch(), geometry.scalars(block)));
    let vector = comptime!(geometry.vector);
    let key_tiles = comptime!(geometry.whole(width) / geometry.n);
    let value_tiles = comptime!(geometry.whole(value) / geometry.n);
    let per_chunk = comptime!(block / geometry.n);

    let (group, row_of_batch) = (CUBE_POS_Y as usize, CUBE_POS_Z as usize);
    let first_key = CUBE_POS_X as usize * rows;
    let mut keys = seq - first_key;
    if keys > rows {
        keys = rows.runtime();
    }
    let own = UNIT_POS_Y as usize * comptime!(geometry.m);
    let from = ((row_of_batch * seq + first_key) * groups + group) * kv_width;
    let from_pe = (row_of_batch * seq + first_key) * rope;
    let step = comptime!(groups * kv_width);

    let mut k_half = Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(rows * keys_layout.pitch / vector), ALIGN);
    let mut v_half = Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(rows * values_layout.pitch / vector), ALIGN);
    let mut q_half = Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(block * keys_layout.pitch / vector), ALIGN);
    let mut d_half =
        Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(block * values_layout.pitch / vector), ALIGN);
    let mut shares = Shared::<[E]>::new_aligned_slice(comptime!(rows * shares_layout.pitch), ALIGN);
    let mut slopes = Shared::<[E]>::new_aligned_slice(comptime!(rows * shares_layout.pitch), ALIGN);
    let mut scores = Shared::<[f32]>::new_aligned_slice(comptime!(rows * score_pitch), ALIGN);
    let mut upstream = Shared::<[f32]>::new_aligned_slice(comptime!(rows * score_pitch), ALIGN);
    let mut of_block = Shared::<[f32]>::new_slice(comptime!(3 * block));

    stage_keys::<E, N>(kv, k_pe, &mut k_half, from, step, from_pe, keys, rows, nope, rope, geometry);
    stage::<E, N>(kv, &mut v_half, from + nope, step, keys, rows, value, geometry);
    let mut of_keys = zeros(key_tiles, geometry);
    let mut of_values = zeros(value_tiles, geometry);

    for member in 0..comptime!(heads / groups) {
        let head = group * comptime!(heads / groups) + member;
        let of_head = (row_of_batch * heads + head) * seq;
        let mut first = first_key / block * block;
        while first < seq {
            // Where even the first query's document begins behind these keys, no later one sees them.
            let document = u32::cast_from(of_rows[(of_head + first) * 3 + 2]) as usize;
            if document >= first_key + rows {
                first = seq;
            } else {
                let mut queries = seq - first;
                if queries > block {
                    queries = block.runtime();
                }
                let q_from = ((row_of_batch * seq + first) * heads + head) * width;
                let out_from = ((row_of_batch * seq + first) * heads + head) * value;
                sync_cube();
                stage::<E, N>(q, &mut q_half, q_from, heads * width, queries, block, width, geometry);
                stage::<E, N>(d_out, &mut d_half, out_from, heads * value, queries, block, value, geometry);
                let mut i = UNIT_POS as usize;
                while i < queries * 3 {
                    of_block[i] = of_rows[(of_head + first) * 3 + i];
                    i += CUBE_DIM as usize;
                }
                sync_cube();
                let mut products = zeros(per_chunk, geometry);
                accumulate::<E, Vector<E, N>, Vector<E, N>>(
                    &k_half,
                    own * comptime!(keys_layout.pitch),
                    keys_layout,
                    &q_half,
                    keys_layout,
                    &mut products,
                    comptime!(geometry.whole(width)),
                    false,
                    geometry,
                );
                put(&products, &mut scores, own * score_pitch, 0usize, geometry);
                let mut products = zeros(per_chunk, geometry);
                accumulate::<E, Vector<E, N>, Vector<E, N>>(
                    &v_half,
                    own * comptime!(values_layout.pitch),
                    values_layout,
                    &d_half,
                    values_layout,
                    &mut products,
                    comptime!(geometry.whole(value)),
                    false,
                    geometry,
                );
                put(&products, &mut upstream, own * score_pitch, 0usize, geometry);
                sync_cube();
                let mut i = UNIT_POS as usize;
                while i < comptime!(rows * block) {
                    let (row, column) = (i / block, i % block);
                    let key = first_key + row;
                    let mut share = 0.0f32;
                    let mut slope = 0.0f32;
                    if column < queries && key <= first + column {
                        let start = u32::cast_from(of_block[column * 3 + 2]) as usize;
                        if key >= start {
                            share = (scores[row * score_pitch + column] * scale - of_block[column * 3]).exp();
                            slope = share * (upstream[row * score_pitch + column] - of_block[column * 3 + 1]) * scale;
                        }
                    }
                    shares[row * comptime!(shares_layout.pitch) + column] = E::cast_from(share);
                    slopes[row * comptime!(shares_layout.pitch) + column] = E::cast_from(slope);
                    i += CUBE_DIM as usize;
                }
                sync_cube();
                accumulate::<E, E, Vector<E, N>>(
                    &shares,
                    own * comptime!(shares_layout.pitch),
                    shares_layout,
                    &d_half,
                    values_layout,
                    &mut of_values,
                    block,
                    true,
                    geometry,
                );
                accumulate::<E, E, Vector<E, N>>(
                    &slopes,
                    own * comptime!(shares_layout.pitch),
                    shares_layout,
                    &q_half,
                    keys_layout,
                    &mut of_keys,
                    block,
                    true,
                    geometry,
                );
                first += block;
            }
        }
    }
    #[unroll]
    for chunk in 0..comptime!(key_tiles.div_ceil(per_chunk)) {
        sync_cube();
        put(&of_keys, &mut scores, own * score_pitch, comptime!(chunk * per_chunk), geometry);
        sync_cube();
        let mut i = UNIT_POS as usize;
        while i < comptime!(rows * block) {
            let (row, at) = (i / block, i % block);
            let column = at + comptime!(chunk * block);
            if row < keys {
                let token = (row_of_batch * seq + first_key + row) * groups + group;
                if column < nope {
                    d_kv[token * kv_width + column] = E::cast_from(scores[row * score_pitch + at]);
                } else if column < width {
                    d_pe[token * rope + column - nope] = scores[row * score_pitch + at];
                }
            }
            i += CUBE_DIM as usize;
        }
    }
    #[unroll]
    for chunk in 0..comptime!(value_tiles.div_ceil(per_chunk)) {
        sync_cube();
        put(&of_values, &mut scores, own * score_pitch, comptime!(chunk * per_chunk), geometry);
        sync_cube();
        let mut i = UNIT_POS as usize;
        while i < comptime!(rows * block) {
            let (row, at) = (i / block, i % block);
            let column = at + comptime!(chunk * block);
            if row < keys && column < value {
                let token = (row_of_batch * seq + first_key + row) * groups + group;
                d_kv[token * kv_width + nope + column] = E::cast_from(scores[row * score_pitch + at]);
            }
            i += CUBE_DIM as usize;
        }
    }
}
