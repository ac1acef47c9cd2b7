//! Causal attention within documents without a T×T tensor, forward and backward, in f32.
//!
//! A cube of 8 × 8 units owns 32 queries (or, for the gradients of keys and values, 32 keys) of one head and goes over the
//! blocks of 32 on the other side that its rows see (FlashAttention-2, arXiv 2307.08691, with the log-sum-exp saved). Each unit
//! keeps 4 × 4 numbers of a product in registers; operands pass through shared memory in pieces of 32 × 32, so that widths of
//! keys and values need not be equal, nor multiples of anything. No atomics: a repetition gives the same bits.

use cubecl::prelude::*;

/// Queries, keys and columns of a piece.
pub(super) const TILE: usize = 32;

/// Units along each side of a cube.
pub(super) const SIDE: usize = 8;

/// Rows, and columns, of a product that one unit keeps.
const EACH: usize = TILE / SIDE;

/// Numbers of a product that one unit keeps.
const KEPT: usize = EACH * EACH;

/// Distance of a piece's rows in shared memory: one more than a power of two, against bank conflicts.
const PITCH: usize = TILE + 1;

/// Numbers of a piece in shared memory.
const PIECE: usize = TILE * PITCH;

/// The score of a pair that does not see each other.
pub(super) const HIDDEN: f32 = -1e30;

/// Copies a piece of rows that are `step` numbers apart; what lies beyond the rows or the width is 0.
#[cube]
fn load(source: &[f32], tile: &mut Shared<[f32]>, first: usize, step: usize, rows: usize, column: usize, width: usize) {
    let mut i = UNIT_POS as usize;
    while i < TILE * TILE {
        let (row, at) = (i / TILE, i % TILE);
        let mut value = 0.0f32;
        if row < rows && column + at < width {
            value = source[first + row * step + column + at];
        }
        tile[row * PITCH + at] = value;
        i += CUBE_DIM as usize;
    }
}

/// The same for keys, whose last `rope` numbers stand in another tensor, once for all heads.
#[cube]
fn load_keys(
    kv: &[f32],
    k_pe: &[f32],
    tile: &mut Shared<[f32]>,
    first: usize,
    step: usize,
    first_pe: usize,
    rows: usize,
    column: usize,
    #[comptime] nope: usize,
    #[comptime] rope: usize,
) {
    let mut i = UNIT_POS as usize;
    while i < TILE * TILE {
        let (row, at) = (i / TILE, column + i % TILE);
        let mut value = 0.0f32;
        if row < rows {
            if at < nope {
                value = kv[first + row * step + at];
            } else if at < nope + rope {
                value = k_pe[first_pe + row * rope + at - nope];
            }
        }
        tile[row * PITCH + i % TILE] = value;
        i += CUBE_DIM as usize;
    }
}

/// `sum[r, c] += Σ_k a[r, k] · b[c, k]` into the numbers from `at` on; with `across`, `b[k, c]`.
#[cube]
fn multiply(
    a: &Shared<[f32]>,
    b: &Shared<[f32]>,
    sum: &mut Array<f32>,
    #[comptime] at: usize,
    #[comptime] across: bool,
) {
    let (y, x) = (UNIT_POS_Y as usize, UNIT_POS_X as usize);
    let mut column = Array::<f32>::new(EACH);
    for k in 0..TILE {
        #[unroll]
        for j in 0..EACH {
            if comptime!(across) {
                column[j] = b[k * PITCH + x + SIDE * j];
            } else {
                column[j] = b[(x + SIDE * j) * PITCH + k];
            }
        }
        #[unroll]
        for i in 0..EACH {
            let row = a[(y + SIDE * i) * PITCH + k];
            #[unroll]
            for j in 0..EACH {
                sum[at + i * EACH + j] += row * column[j];
            }
        }
    }
}

/// Sets all of a unit's numbers to 0.
#[cube]
fn clear(sum: &mut Array<f32>, #[comptime] count: usize) {
    #[unroll]
    for i in 0..count {
        sum[i] = 0.0;
    }
}

/// Output and log-sum-exp of the queries: `q [B, T, H, N+R]`, `kv [B, T, G, N+V]`, `k_pe [B, T, R]`, `starts [B, T]` →
/// `out [B, T, H, V]`, `lse [B, H, T]`. Cubes: blocks of queries, H, B.
#[cube(launch)]
pub(super) fn forward(
    q: &[f32],
    kv: &[f32],
    k_pe: &[f32],
    starts: &[i32],
    out: &mut [f32],
    lse: &mut [f32],
    seq: usize,
    scale: f32,
    #[comptime] heads: usize,
    #[comptime] groups: usize,
    #[comptime] nope: usize,
    #[comptime] rope: usize,
    #[comptime] value: usize,
) {
    // The last blocks see most keys: they begin first.
    let block = seq.div_ceil(TILE) - 1 - CUBE_POS_X as usize;
    let (head, row) = (CUBE_POS_Y as usize, CUBE_POS_Z as usize);
    let group = head / comptime!(heads / groups);
    let width = comptime!(nope + rope);
    let kv_width = comptime!(nope + value);
    let value_pieces = comptime!(value.div_ceil(TILE));
    let (y, x) = (UNIT_POS_Y as usize, UNIT_POS_X as usize);

    let first = block * TILE;
    let mut queries = seq - first;
    if queries > TILE {
        queries = TILE.runtime();
    }

    let mut a = Shared::<[f32]>::new_slice(PIECE);
    let mut b = Shared::<[f32]>::new_slice(PIECE);
    let mut p = Shared::<[f32]>::new_slice(PIECE);
    let mut highest = Shared::<[f32]>::new_slice(TILE);
    let mut total = Shared::<[f32]>::new_slice(TILE);
    let mut factor = Shared::<[f32]>::new_slice(TILE);
    if UNIT_POS < TILE as u32 {
        highest[UNIT_POS as usize] = HIDDEN;
        total[UNIT_POS as usize] = 0.0;
    }
    let mut sum = Array::<f32>::new(comptime!(value_pieces * KEPT));
    clear(&mut sum, comptime!(value_pieces * KEPT));
    let mut score = Array::<f32>::new(KEPT);

    let mut key_block = starts[row * seq + first] as usize / TILE;
    while key_block <= block {
        let first_key = key_block * TILE;
        let mut keys = seq - first_key;
        if keys > TILE {
            keys = TILE.runtime();
        }
        let from = ((row * seq + first_key) * groups + group) * kv_width;
        clear(&mut score, KEPT);
        for piece in 0..comptime!(width.div_ceil(TILE)) {
            let column = piece * TILE;
            sync_cube();
            load(q, &mut a, ((row * seq + first) * heads + head) * width, heads * width, queries, column, width);
            let from_pe = (row * seq + first_key) * rope;
            load_keys(kv, k_pe, &mut b, from, groups * kv_width, from_pe, keys, column, nope, rope);
            sync_cube();
            multiply(&a, &b, &mut score, 0usize, false);
        }
        #[unroll]
        for i in 0..EACH {
            let at = y + SIDE * i;
            let mut start = seq;
            if at < queries {
                start = starts[row * seq + first + at] as usize;
            }
            #[unroll]
            for j in 0..EACH {
                let key = first_key + x + SIDE * j;
                let mut s = HIDDEN.runtime();
                if key <= first + at && key >= start {
                    s = score[i * EACH + j] * scale;
                }
                p[at * PITCH + x + SIDE * j] = s;
            }
        }
        sync_cube();
        if UNIT_POS < TILE as u32 {
            let at = UNIT_POS as usize;
            let before = highest[at];
            let mut now = before;
            for k in 0..TILE {
                if p[at * PITCH + k] > now {
                    now = p[at * PITCH + k];
                }
            }
            let mut sum_of_row = 0.0f32;
            for k in 0..TILE {
                let s = p[at * PITCH + k];
                // Hidden ones are set to 0, rather than seen ones to theirs: a score that is no number must not vanish.
                let mut e = (s - now).exp();
                if s <= HIDDEN {
                    e = 0.0;
                }
                p[at * PITCH + k] = e;
                sum_of_row += e;
            }
            let shrink = (before - now).exp();
            highest[at] = now;
            factor[at] = shrink;
            total[at] = total[at] * shrink + sum_of_row;
        }
        sync_cube();
        #[unroll]
        for i in 0..EACH {
            let shrink = factor[y + SIDE * i];
            #[unroll]
            for piece in 0..value_pieces {
                #[unroll]
                for j in 0..EACH {
                    sum[piece * KEPT + i * EACH + j] *= shrink;
                }
            }
        }
        #[unroll]
        for piece in 0..value_pieces {
            sync_cube();
            load(kv, &mut b, from + nope, groups * kv_width, keys, piece * TILE, value);
            sync_cube();
            multiply(&p, &b, &mut sum, piece * KEPT, true);
        }
        key_block += 1;
    }
    #[unroll]
    for i in 0..EACH {
        let at = y + SIDE * i;
        if at < queries {
            let share = 1.0f32 / total[at];
            let to = ((row * seq + first + at) * heads + head) * value;
            #[unroll]
            for piece in 0..value_pieces {
                #[unroll]
                for j in 0..EACH {
                    let column = piece * TILE + x + SIDE * j;
                    if column < value {
                        out[to + column] = sum[piece * KEPT + i * EACH + j] * share;
                    }
                }
            }
            if x == 0 {
                lse[(row * heads + head) * seq + first + at] = highest[at] + total[at].ln();
            }
        }
    }
}

/// What the gradients need of each query, `rows [B, H, T, 3]`: the log-sum-exp, `Σ out · d_out`, and its document's start. In one
/// tensor, because some graphics APIs bind no more than eight.
#[cube(launch)]
pub(super) fn prepare(
    out: &[f32],
    d_out: &[f32],
    lse: &[f32],
    starts: &[i32],
    rows: &mut [f32],
    count: usize,
    seq: usize,
    heads: usize,
    value: usize,
) {
    let at = ABSOLUTE_POS;
    if at < count {
        let query = at % seq;
        let head = at / seq % heads;
        let row = at / seq / heads;
        let from = ((row * seq + query) * heads + head) * value;
        let mut sum = 0.0f32;
        for i in 0..value {
            sum += out[from + i] * d_out[from + i];
        }
        rows[at * 3] = lse[at];
        rows[at * 3 + 1] = sum;
        // Exact: positions are far below 2²⁴.
        rows[at * 3 + 2] = f32::cast_from(starts[row * seq + query]);
    }
}

/// The gradient of the queries. Cubes as in [`forward`].
#[cube(launch)]
pub(super) fn query_gradient(
    q: &[f32],
    kv: &[f32],
    k_pe: &[f32],
    d_out: &[f32],
    rows: &[f32],
    d_q: &mut [f32],
    seq: usize,
    scale: f32,
    #[comptime] heads: usize,
    #[comptime] groups: usize,
    #[comptime] nope: usize,
    #[comptime] rope: usize,
    #[comptime] value: usize,
) {
    let block = seq.div_ceil(TILE) - 1 - CUBE_POS_X as usize;
    let (head, row) = (CUBE_POS_Y as usize, CUBE_POS_Z as usize);
    let group = head / comptime!(heads / groups);
    let width = comptime!(nope + rope);
    let kv_width = comptime!(nope + value);
    let pieces = comptime!(width.div_ceil(TILE));
    let (y, x) = (UNIT_POS_Y as usize, UNIT_POS_X as usize);

    let first = block * TILE;
    let mut queries = seq - first;
    if queries > TILE {
        queries = TILE.runtime();
    }
    let of_head = (row * heads + head) * seq;
    let q_from = ((row * seq + first) * heads + head) * width;
    let out_from = ((row * seq + first) * heads + head) * value;

    let mut a = Shared::<[f32]>::new_slice(PIECE);
    let mut b = Shared::<[f32]>::new_slice(PIECE);
    let mut p = Shared::<[f32]>::new_slice(PIECE);
    let mut sum = Array::<f32>::new(comptime!(pieces * KEPT));
    clear(&mut sum, comptime!(pieces * KEPT));
    let mut score = Array::<f32>::new(KEPT);
    let mut upstream = Array::<f32>::new(KEPT);

    let mut key_block = u32::cast_from(rows[(of_head + first) * 3 + 2]) as usize / TILE;
    while key_block <= block {
        let first_key = key_block * TILE;
        let mut keys = seq - first_key;
        if keys > TILE {
            keys = TILE.runtime();
        }
        let from = ((row * seq + first_key) * groups + group) * kv_width;
        let from_pe = (row * seq + first_key) * rope;
        clear(&mut score, KEPT);
        clear(&mut upstream, KEPT);
        for piece in 0..pieces {
            let column = piece * TILE;
            sync_cube();
            load(q, &mut a, q_from, heads * width, queries, column, width);
            load_keys(kv, k_pe, &mut b, from, groups * kv_width, from_pe, keys, column, nope, rope);
            sync_cube();
            multiply(&a, &b, &mut score, 0usize, false);
        }
        for piece in 0..comptime!(value.div_ceil(TILE)) {
            sync_cube();
            load(d_out, &mut a, out_from, heads * value, queries, piece * TILE, value);
            load(kv, &mut b, from + nope, groups * kv_width, keys, piece * TILE, value);
            sync_cube();
            multiply(&a, &b, &mut upstream, 0usize, false);
        }
        #[unroll]
        for i in 0..EACH {
            let at = y + SIDE * i;
            let mut start = seq;
            let mut lse = 0.0f32;
            let mut inner = 0.0f32;
            if at < queries {
                let of_query = (of_head + first + at) * 3;
                lse = rows[of_query];
                inner = rows[of_query + 1];
                start = u32::cast_from(rows[of_query + 2]) as usize;
            }
            #[unroll]
            for j in 0..EACH {
                let key = first_key + x + SIDE * j;
                let mut slope = 0.0f32;
                if key <= first + at && key >= start {
                    let share = (score[i * EACH + j] * scale - lse).exp();
                    slope = share * (upstream[i * EACH + j] - inner) * scale;
                }
                p[at * PITCH + x + SIDE * j] = slope;
            }
        }
        #[unroll]
        for piece in 0..pieces {
            sync_cube();
            load_keys(kv, k_pe, &mut b, from, groups * kv_width, from_pe, keys, piece * TILE, nope, rope);
            sync_cube();
            multiply(&p, &b, &mut sum, piece * KEPT, true);
        }
        key_block += 1;
    }
    #[unroll]
    for i in 0..EACH {
        let at = y + SIDE * i;
        if at < queries {
            #[unroll]
            for piece in 0..pieces {
                #[unroll]
                for j in 0..EACH {
                    let column = piece * TILE + x + SIDE * j;
                    if column < width {
                        d_q[q_from + at * heads * width + column] = sum[piece * KEPT + i * EACH + j];
                    }
                }
            }
        }
    }
}

/// The gradients of keys and values, `d_kv [B, T, G, N+V]`, and of the shared part by group, `d_pe [B, T, G, R]`, to be summed. Cubes:
/// blocks of keys, G, B.
#[cube(launch)]
pub(super) fn key_gradient(
    q: &[f32],
    kv: &[f32],
    k_pe: &[f32],
    d_out: &[f32],
    rows: &[f32],
    d_kv: &mut [f32],
    d_pe: &mut [f32],
    seq: usize,
    scale: f32,
    #[comptime] heads: usize,
    #[comptime] groups: usize,
    #[comptime] nope: usize,
    #[comptime] rope: usize,
    #[comptime] value: usize,
) {
    let block = CUBE_POS_X as usize;
    let (group, row) = (CUBE_POS_Y as usize, CUBE_POS_Z as usize);
    let width = comptime!(nope + rope);
    let kv_width = comptime!(nope + value);
    let pieces = comptime!(width.div_ceil(TILE));
    let value_pieces = comptime!(value.div_ceil(TILE));
    let (y, x) = (UNIT_POS_Y as usize, UNIT_POS_X as usize);

    let first_key = block * TILE;
    let mut keys = seq - first_key;
    if keys > TILE {
        keys = TILE.runtime();
    }
    let from = ((row * seq + first_key) * groups + group) * kv_width;
    let from_pe = (row * seq + first_key) * rope;

    let mut a = Shared::<[f32]>::new_slice(PIECE);
    let mut b = Shared::<[f32]>::new_slice(PIECE);
    let mut p = Shared::<[f32]>::new_slice(PIECE);
    let mut of_keys = Array::<f32>::new(comptime!(pieces * KEPT));
    clear(&mut of_keys, comptime!(pieces * KEPT));
    let mut of_values = Array::<f32>::new(comptime!(value_pieces * KEPT));
    clear(&mut of_values, comptime!(value_pieces * KEPT));
    let mut score = Array::<f32>::new(KEPT);
    let mut upstream = Array::<f32>::new(KEPT);

    for member in 0..comptime!(heads / groups) {
        let head = group * comptime!(heads / groups) + member;
        let of_head = (row * heads + head) * seq;
        let mut first = first_key;
        while first < seq {
            // Where even the first query's document begins behind these keys, no later one sees them.
            let document = u32::cast_from(rows[(of_head + first) * 3 + 2]) as usize;
            if document >= first_key + TILE {
                first = seq;
            } else {
                let mut queries = seq - first;
                if queries > TILE {
                    queries = TILE.runtime();
                }
                let q_from = ((row * seq + first) * heads + head) * width;
                let out_from = ((row * seq + first) * heads + head) * value;
                clear(&mut score, KEPT);
                clear(&mut upstream, KEPT);
                for piece in 0..pieces {
                    let column = piece * TILE;
                    sync_cube();
                    load_keys(kv, k_pe, &mut a, from, groups * kv_width, from_pe, keys, column, nope, rope);
                    load(q, &mut b, q_from, heads * width, queries, column, width);
                    sync_cube();
                    multiply(&a, &b, &mut score, 0usize, false);
                }
                for piece in 0..value_pieces {
                    sync_cube();
                    load(kv, &mut a, from + nope, groups * kv_width, keys, piece * TILE, value);
                    load(d_out, &mut b, out_from, heads * value, queries, piece * TILE, value);
                    sync_cube();
                    multiply(&a, &b, &mut upstream, 0usize, false);
                }
                // Shares first; the slopes take their place once the values have had them.
                #[unroll]
                for j in 0..EACH {
                    let at = x + SIDE * j;
                    let mut start = seq;
                    let mut lse = 0.0f32;
                    let mut inner = 0.0f32;
                    if at < queries {
                        let of_query = (of_head + first + at) * 3;
                        lse = rows[of_query];
                        inner = rows[of_query + 1];
                        start = u32::cast_from(rows[of_query + 2]) as usize;
                    }
                    #[unroll]
                    for i in 0..EACH {
                        let key = first_key + y + SIDE * i;
                        let mut share = 0.0f32;
                        if key <= first + at && key >= start {
                            share = (score[i * EACH + j] * scale - lse).exp();
                        }
                        p[(y + SIDE * i) * PITCH + at] = share;
                        upstream[i * EACH + j] = share * (upstream[i * EACH + j] - inner) * scale;
                    }
                }
                #[unroll]
                for piece in 0..value_pieces {
                    sync_cube();
                    load(d_out, &mut b, out_from, heads * value, queries, piece * TILE, value);
                    sync_cube();
                    multiply(&p, &b, &mut of_values, piece * KEPT, true);
                }
                sync_cube();
                #[unroll]
                for i in 0..EACH {
                    #[unroll]
                    for j in 0..EACH {
                        p[(y + SIDE * i) * PITCH + x + SIDE * j] = upstream[i * EACH + j];
                    }
                }
                #[unroll]
                for piece in 0..pieces {
                    sync_cube();
                    load(q, &mut b, q_from, heads * width, queries, piece * TILE, width);
                    sync_cube();
                    multiply(&p, &b, &mut of_keys, piece * KEPT, true);
                }
                first += TILE;
            }
        }
    }
    #[unroll]
    for i in 0..EACH {
        let at = y + SIDE * i;
        if at < keys {
            let token = (row * seq + first_key + at) * groups + group;
            #[unroll]
            for piece in 0..pieces {
                #[unroll]
                for j in 0..EACH {
                    let column = piece * TILE + x + SIDE * j;
                    if column < nope {
                        d_kv[token * kv_width + column] = of_keys[piece * KEPT + i * EACH + j];
                    } else if column < width {
                        d_pe[token * rope + column - nope] = of_keys[piece * KEPT + i * EACH + j];
                    }
                }
            }
            #[unroll]
            for piece in 0..value_pieces {
                #[unroll]
                for j in 0..EACH {
                    let column = piece * TILE + x + SIDE * j;
                    if column < value {
                        d_kv[token * kv_width + nope + column] = of_values[piece * KEPT + i * EACH + j];
                    }
                }
            }
        }
    }
}
