//! The forward pass: of queries over all keys up to their own, in training; over keys that lie before them too, from a cache, where
//! a head's keys and values may have to be made of latents.

use std::sync::{Mutex, PoisonError};

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::ahead::RowsAhead;
use super::packed::ForwardRoom;
use super::{KEYS, QUERIES, Rows, Sight, key_blocks};
use crate::cpu::bf16::Core;
use crate::cpu::parts::Parts;
use crate::cpu::tile::{Aligned, Extent, LANES, Left, ROWS, multiply};
use crate::cpu::vector::{exp, exp_shifted, max_of_few, max_of_finite, scale};
use crate::precision::Precision;

/// Queries that a block of keys is made for at once: as many as leave their sums in a core's second cache beside it.
const SPAN: usize = 12 * QUERIES;

/// Sizes of one forward pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) batch: usize,
    /// Queries of a row.
    pub(crate) seq: usize,
    /// Keys of a row.
    pub(crate) keys: usize,
    /// Query heads.
    pub(crate) heads: usize,
    /// Key and value heads; divides `heads`.
    pub(crate) groups: usize,
    /// Width of the part of a key that a head has to itself.
    pub(crate) own: usize,
    /// Width of the part that all heads share.
    pub(crate) shared: usize,
    /// Width of a value.
    pub(crate) value: usize,
    pub(crate) scale: f32,
    /// Of products with keys and values that are given.
    pub(crate) precision: Precision,
}

/// Vectors where they lie: of token `t` of head `h` of row `b` from number `b · row + h · head + t · token` on.
#[derive(Clone, Copy)]
pub(crate) struct Vectors<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) row: usize,
    pub(crate) head: usize,
    pub(crate) token: usize,
}

impl<'a> Vectors<'a> {
    pub(super) fn rows(self, [row, head]: [usize; 2], width: usize, count: usize) -> Rows<'a> {
        let data = if width == 0 { &[] } else { &self.data[row * self.row + head * self.head..] };
        Rows { data, stride: if width == 0 { 0 } else { self.token }, width, count }
    }
}

/// What a forward pass reads: queries of `own + shared` numbers, keys and values.
#[derive(Clone, Copy)]
pub(crate) struct Reads<'a> {
    pub(crate) q: Vectors<'a>,
    pub(crate) keys: Keys<'a>,
    /// `[batch, seq]`: the first key that each query sees. They never fall along a row.
    pub(crate) starts: &'a [i32],
    /// Keys before each row's first query; none at all: 0 for every row. Query `i` sees keys up to its offset plus `i`, as far as there
    /// are any.
    pub(crate) offsets: &'a [i32],
}

/// Where keys and values come from.
#[derive(Clone, Copy)]
pub(crate) enum Keys<'a> {
    /// They lie somewhere.
    Given {
        own: Vectors<'a>,
        /// One for all heads.
        shared: Vectors<'a>,
        values: Vectors<'a>,
    },
    /// A head's own keys and its values are made of latents while they are read. Of all heads together they would be wider than the
    /// latents by an order of magnitude, and lie apart where one head reads them.
    Made(&'a Latents<'a>),
}

/// Latents, laid out once for all heads.
pub(crate) struct Latents<'a> {
    /// L
    rank: usize,
    /// `[batch, keys, L]`, keys rounded up to whole blocks.
    along: Aligned,
    /// The same and the shared keys, `[batch, blocks, L+R, KEYS]`.
    across: Aligned,
    /// W_UK and W_UV, `[heads(own+value), L]`.
    kv_b: &'a [f32],
}

/// A block of latents: all of each as columns, and the first `rank` numbers as rows.
#[pulp::with_simd(lay_out = Arch::new())]
#[inline(always)]
fn lay_out_with<'a, S: Simd>(simd: S, rows: Rows<'a>, rank: usize, across: &'a mut [f32], along: &'a mut [f32]) {
    rows.transpose_to(across, 0, rows.width);
    Rows { width: rank, ..rows }.copy_to(simd, 0..rows.count, (along, rank), 0, 1.0);
}

impl<'a> Latents<'a> {
    /// Of latents with the shared key behind them.
    pub(crate) fn new(sizes: Sizes, latents: Vectors, rank: usize, kv_b: &'a [f32]) -> Self {
        let (blocks, width) = (sizes.keys.div_ceil(KEYS), rank + sizes.shared);
        let mut along = Aligned::zeros(sizes.batch * blocks * KEYS * rank);
        let mut across = Aligned::zeros(sizes.batch * blocks * KEYS * width);
        let parts = across.par_chunks_exact_mut(KEYS * width).zip(along.par_chunks_exact_mut(KEYS * rank));
        // The buffers are longer than what is asked for by a part of a block.
        parts.take(sizes.batch * blocks).enumerate().for_each(|(i, (across, along))| {
            let (row, block) = (i / blocks, i % blocks);
            let whole = latents.rows([row, 0], width, sizes.keys);
            let count = KEYS.min(sizes.keys - block * KEYS);
            let rows = Rows { data: &whole.data[block * KEYS * whole.stride..], count, ..whole };
            lay_out(rows, rank, across, along);
        });
        Self { rank, along, across, kv_b }
    }

    /// A head's maps as [`Latents::expand`] reads them.
    fn lay_out_maps(&self, sizes: Sizes, head: usize, scratch: &mut Scratch) {
        let Sizes { own, value, .. } = sizes;
        let (rank, width) = (self.rank, value.next_multiple_of(LANES));
        let maps = &self.kv_b[head * (own + value) * rank..][..(own + value) * rank];
        scratch.w_uk[..own * rank].copy_from_slice(&maps[..own * rank]);
        for (v, map) in maps[own * rank..].chunks_exact(rank).enumerate() {
            for (l, x) in map.iter().enumerate() {
                scratch.w_uv[l * width + v] = *x;
            }
        }
    }

    /// Writes the keys and values of the block at `k0` of a row, of which `count` are read, to where the only block lies.
    #[inline(always)]
    fn expand<S: Simd>(&self, simd: S, sizes: Sizes, row: usize, [k0, count]: [usize; 2], scratch: &mut Scratch) {
        let Sizes { own, shared, value, keys, .. } = sizes;
        let (rank, qk, width) = (self.rank, sizes.qk(), value.next_multiple_of(LANES));
        let at = row * keys.next_multiple_of(KEYS) + k0;
        let Scratch { keys_t, values, w_uk, w_uv, .. } = scratch;
        let from = &self.across[at * (rank + shared)..][..KEYS * (rank + shared)];
        let (maps, extent) =
            (Left { data: w_uk, rows: rank, inner: 1 }, |_| Extent { inner: (0, rank), columns: count });
        multiply(simd, own, maps, (from, KEYS), (keys_t, KEYS), false, extent, &mut ());
        // Rows beyond `own` have been written to, as a tile is a whole one.
        keys_t[own * KEYS..qk * KEYS].copy_from_slice(&from[rank * KEYS..]);
        let along = Left { data: &self.along[at * rank..], rows: rank, inner: 1 };
        let extent = |_| Extent { inner: (0, rank), columns: value };
        multiply(simd, count, along, (w_uv, width), (values, width), false, extent, &mut ());
    }
}

impl Sizes {
    pub(super) fn qk(self) -> usize {
        self.own + self.shared
    }

    /// Whether products are of packed operands.
    fn packs(self, keys: Keys) -> bool {
        self.precision == Precision::Bf16 && matches!(keys, Keys::Given { .. })
    }
}

/// Writes `out [batch, seq, heads, value]` and `told [batch, heads, seq]`, the log-sum-exp of each query's scores. Without `out`, the
/// largest of each query's scores instead, or NaN where one of them is not finite, and nothing more is computed.
pub(crate) fn forward(sizes: Sizes, reads: Reads, out: Option<&mut [f32]>, told: &mut [f32]) {
    let Sizes { batch, seq, heads, .. } = sizes;
    let arch = Arch::new();
    let (out, told) = (out.map(Parts::new), &Parts::new(told));
    let blocks = seq.div_ceil(QUERIES);
    // Few heads on many threads: a head's queries are shared out, too. Each block of them is computed as ever.
    let parts = rayon::current_num_threads().div_ceil((batch * heads).max(1)).clamp(1, blocks.max(1));
    // As many as run at once, each filled with zeros once, whatever the number of tasks.
    let idle: Mutex<Vec<Scratch>> = Mutex::new(Vec::new());
    (0..batch * heads * parts).into_par_iter().for_each(|task| {
        let (head, part) = (task / parts, task % parts);
        let queries = [part, part + 1].map(|part| (blocks * part / parts * QUERIES).min(seq));
        let taken = idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut scratch = taken.unwrap_or_else(|| Scratch::new(sizes, reads.keys));
        let place = [head / heads, head % heads];
        arch.dispatch(Head { sizes, reads, place, queries, scratch: &mut scratch, out: out.as_ref(), told });
        idle.lock().unwrap_or_else(PoisonError::into_inner).push(scratch);
    });
}

struct Scratch {
    /// `[blocks, own+shared, KEYS]`; one block where keys are made.
    keys_t: Aligned,
    /// `[keys, value]`, likewise.
    values: Aligned,
    /// `[span, own+shared]`, times the scale.
    queries: Aligned,
    /// `[QUERIES, KEYS]`
    scores: Aligned,
    /// `[span, value]`
    sums: Aligned,
    /// Of each query of the span the largest score so far, and the sum of e^(score − largest).
    top: Vec<f32>,
    mass: Vec<f32>,
    /// A head's W_UK, `[own, L]`, and W_UV, `[L, value]`, where keys and values are made.
    w_uk: Aligned,
    w_uv: Aligned,
    /// What is packed where products are in bf16; `keys_t` has the keys as rows then.
    packed: ForwardRoom,
}

impl Scratch {
    fn new(sizes: Sizes, from: Keys) -> Self {
        let value = sizes.value.next_multiple_of(LANES);
        let (keys, rank) = match from {
            Keys::Given { .. } => (sizes.keys.next_multiple_of(KEYS), 0),
            Keys::Made(latents) => (KEYS, latents.rank),
        };
        let span = from.span(sizes.seq);
        Self {
            // A tile writes whole rows of itself.
            keys_t: Aligned::zeros(keys * sizes.qk() + ROWS * KEYS),
            values: Aligned::zeros(keys * value),
            queries: Aligned::zeros(span * sizes.qk()),
            scores: Aligned::zeros(QUERIES * KEYS),
            sums: Aligned::zeros(span * value),
            top: vec![0.0; span],
            mass: vec![0.0; span],
            w_uk: Aligned::zeros(sizes.own.next_multiple_of(ROWS) * rank),
            w_uv: Aligned::zeros(rank * value),
            packed: ForwardRoom::new(),
        }
    }
}

impl Keys<'_> {
    /// Queries that go through the keys together. Keys that are given have been laid out, and a block of queries is enough.
    fn span(self, seq: usize) -> usize {
        match self {
            Self::Given { .. } => QUERIES,
            Self::Made(_) => SPAN.min(seq.next_multiple_of(QUERIES)),
        }
    }
}

/// Some blocks of queries of one head of one row.
struct Head<'a> {
    sizes: Sizes,
    reads: Reads<'a>,
    /// Row and head.
    place: [usize; 2],
    /// From and to.
    queries: [usize; 2],
    scratch: &'a mut Scratch,
    out: Option<&'a Parts<'a>>,
    told: &'a Parts<'a>,
}

impl WithSimd for Head<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { sizes, reads, place: [row, head], queries: [from, to], scratch, out, told } = self;
        let Sizes { seq, keys, heads, groups, own, shared, value, .. } = sizes;
        let (qk, width) = (sizes.qk(), value.next_multiple_of(LANES));
        let group = head / (heads / groups);
        let offset = reads.offsets.get(row).map_or(0, |offset| *offset as usize);
        // Keys that the last of these queries sees.
        let visible = (offset + to).min(keys);
        let core = (out.is_some() && sizes.packs(reads.keys)).then(Core::here);
        match reads.keys {
            Keys::Given { own: given, shared: of_all, values } if let Some(core) = &core => {
                let rows = &mut scratch.keys_t[..visible * qk];
                given.rows([row, group], own, visible).copy_to(simd, 0..visible, (rows, qk), 0, 1.0);
                of_all.rows([row, 0], shared, visible).copy_to(simd, 0..visible, (rows, qk), own, 1.0);
                let values = values.rows([row, group], value, visible);
                scratch.packed.take_keys(core, rows, (values.data, values.stride), [visible, qk, value]);
            }
            Keys::Made(latents) => latents.lay_out_maps(sizes, head, scratch),
            Keys::Given { own: given, shared: of_all, values } => {
                let blocks = &mut scratch.keys_t[..visible.next_multiple_of(KEYS) * qk];
                given.rows([row, group], own, visible).transpose_to(blocks, 0, qk);
                of_all.rows([row, 0], shared, visible).transpose_to(blocks, own, qk);
                if out.is_some() {
                    let values = values.rows([row, group], value, visible);
                    values.copy_to(simd, 0..visible, (&mut scratch.values, width), 0, 1.0);
                }
            }
        }
        let starts = &reads.starts[row * seq..(row + 1) * seq];
        let rows = reads.q.rows([row, head], qk, seq);
        let span = reads.keys.span(seq);
        for first in (from..to).step_by(span) {
            let last = (first + span).min(to);
            rows.copy_to(simd, first..last, (&mut scratch.queries, qk), 0, sizes.scale);
            scratch.sums.fill(0.0);
            scratch.top.fill(f32::NEG_INFINITY);
            scratch.mass.fill(0.0);
            let ahead = &mut match (out, &core) {
                (Some(out), None) => RowsAhead::forward(sizes, reads, out, [row, head], first..last, to),
                _ => RowsAhead::nothing(),
            };
            for k0 in key_blocks(starts[first], (offset + last).min(visible)) {
                let at = match reads.keys {
                    Keys::Given { .. } => k0,
                    Keys::Made(latents) => {
                        latents.expand(simd, sizes, row, [k0, KEYS.min(visible - k0)], scratch);
                        0
                    }
                };
                let Scratch { keys_t, values, queries, scores, sums, top, mass, packed, .. } = &mut *scratch;
                for q0 in (first..last).step_by(QUERIES) {
                    let count = QUERIES.min(last - q0);
                    // Beyond what is visible lies what another task left.
                    let sight = Sight { starts, offset, keys: visible, q0, k0 };
                    if sight.sees_nothing(count) {
                        continue;
                    }
                    let of_block = q0 - first;
                    let (queries, sums) = (&queries[of_block * qk..], &mut sums[of_block * width..]);
                    let (top, mass) = (&mut top[of_block..], &mut mass[of_block..]);
                    if let Some(core) = &core {
                        packed.scores(core, queries, [count, qk], sight, scores);
                    } else {
                        let q = Left { data: queries, rows: qk, inner: 1 };
                        multiply(
                            simd,
                            count,
                            q,
                            (&keys_t[at * qk..], KEYS),
                            (scores, KEYS),
                            false,
                            sight.scores(qk),
                            ahead,
                        );
                    }
                    for (i, row) in scores.chunks_exact_mut(KEYS).take(count).enumerate() {
                        let (from, to) = sight.of_query(i);
                        if from == to {
                            row.fill(0.0);
                            continue;
                        }
                        if out.is_none() {
                            let largest = max_of_finite(&row[from..to]);
                            // What is none stays none.
                            top[i] = if top[i].is_nan() || largest < top[i] { top[i] } else { largest };
                            continue;
                        }
                        // Whole vectors: what is masked is −∞ for the maximum and 0 for the sum.
                        let whole = to.next_multiple_of(LANES);
                        row[..from].fill(f32::NEG_INFINITY);
                        row[to..whole].fill(f32::NEG_INFINITY);
                        let highest = max_of_few(simd, &row[..whole]).max(top[i]);
                        // Most blocks of keys raise no maximum.
                        let shrink = match top[i] {
                            before if before == highest => 1.0,
                            f32::NEG_INFINITY => 0.0,
                            before => exp(before - highest),
                        };
                        mass[i] = mass[i] * shrink + exp_shifted(simd, &mut row[..whole], highest);
                        row[..from].fill(0.0);
                        // The sum below reads a tile's keys up to the last that its last query sees; a packed one all of them.
                        row[to..if core.is_some() { KEYS } else { (to + ROWS).min(KEYS) }].fill(0.0);
                        if shrink != 1.0 {
                            scale(&mut sums[i * width..(i + 1) * width], shrink);
                        }
                        top[i] = highest;
                    }
                    if let Some(core) = &core {
                        packed.sums(core, scores, [count, value], sight, (sums, width));
                    } else if out.is_some() {
                        let p = Left { data: scores, rows: KEYS, inner: 1 };
                        let v = (&values[at * width..], width);
                        multiply(simd, count, p, v, (sums, width), true, sight.over_keys(value), ahead);
                    }
                }
            }
            let (count, Scratch { sums, top, mass, .. }) = (last - first, &*scratch);
            // SAFETY: one head's queries of this span, which only this task writes, one span at a time.
            let told = unsafe { told.range((row * heads + head) * seq + first, count) };
            let Some(out) = out else {
                told.copy_from_slice(&top[..count]);
                continue;
            };
            for (i, sums) in sums.chunks_exact(width).take(count).enumerate() {
                // A query that sees nothing gets zeros.
                let inv = if mass[i] > 0.0 { 1.0 / mass[i] } else { 0.0 };
                // SAFETY: one head's columns of one token, which only this task writes, one at a time.
                let out = unsafe { out.range(((row * seq + first + i) * heads + head) * value, value) };
                for (o, sum) in out.iter_mut().zip(sums) {
                    *o = sum * inv;
                }
                told[i] = top[i] + mass[i].ln();
            }
        }
    }
}
