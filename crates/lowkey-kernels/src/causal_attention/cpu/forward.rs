//! The forward pass: of queries over all keys up to their own, in training; over keys that lie before them too, from a cache.

use std::sync::{Mutex, PoisonError};

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{KEYS, QUERIES, Rows, Sight, key_blocks};
use crate::cpu::parts::Parts;
use crate::cpu::tile::{Aligned, LANES, Left, multiply};
use crate::cpu::vector::{exp_shifted, max, scale};

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
    fn rows(self, [row, head]: [usize; 2], width: usize, count: usize) -> Rows<'a> {
        let data = if width == 0 { &[] } else { &self.data[row * self.row + head * self.head..] };
        Rows { data, stride: if width == 0 { 0 } else { self.token }, width, count }
    }
}

/// What a forward pass reads: queries of `own + shared` numbers, keys in two parts, values.
#[derive(Clone, Copy)]
pub(crate) struct Reads<'a> {
    pub(crate) q: Vectors<'a>,
    pub(crate) own: Vectors<'a>,
    /// One for all heads.
    pub(crate) shared: Vectors<'a>,
    pub(crate) values: Vectors<'a>,
    /// `[batch, seq]`: the first key that each query sees. They never fall along a row.
    pub(crate) starts: &'a [i32],
    /// Keys before each row's first query; none at all: 0 for every row. Query `i` sees keys up to its offset plus `i`, as far as there
    /// are any.
    pub(crate) offsets: &'a [i32],
}

impl Sizes {
    fn qk(self) -> usize {
        self.own + self.shared
    }
}

/// Writes `out [batch, seq, heads, value]` and `told [batch, heads, seq]`, the log-sum-exp of each query's scores. Without `out`, the
/// largest of each query's scores instead, and nothing more is computed.
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
        let mut scratch = taken.unwrap_or_else(|| Scratch::new(sizes));
        let place = [head / heads, head % heads];
        arch.dispatch(Head { sizes, reads, place, queries, scratch: &mut scratch, out: out.as_ref(), told });
        idle.lock().unwrap_or_else(PoisonError::into_inner).push(scratch);
    });
}

struct Scratch {
    /// `[blocks, own+shared, KEYS]`
    keys_t: Aligned,
    /// `[keys, value]`
    values: Aligned,
    /// `[QUERIES, own+shared]`, times the scale.
    queries: Aligned,
    /// `[QUERIES, KEYS]`
    scores: Aligned,
    /// `[QUERIES, value]`
    sums: Aligned,
}

impl Scratch {
    fn new(sizes: Sizes) -> Self {
        let (keys, value) = (sizes.keys.next_multiple_of(KEYS), sizes.value.next_multiple_of(LANES));
        Self {
            keys_t: Aligned::zeros(keys * sizes.qk()),
            values: Aligned::zeros(keys * value),
            queries: Aligned::zeros(QUERIES * sizes.qk()),
            scores: Aligned::zeros(QUERIES * KEYS),
            sums: Aligned::zeros(QUERIES * value),
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
        let Scratch { keys_t, values, queries, scores, sums } = scratch;
        let blocks = &mut keys_t[..visible.next_multiple_of(KEYS) * qk];
        reads.own.rows([row, group], own, visible).transpose_to(blocks, 0, qk);
        reads.shared.rows([row, 0], shared, visible).transpose_to(blocks, own, qk);
        if out.is_some() {
            reads.values.rows([row, group], value, visible).copy_to(0..visible, values, width, 0, 1.0);
        }
        let starts = &reads.starts[row * seq..(row + 1) * seq];
        let rows = reads.q.rows([row, head], qk, seq);
        for q0 in (from..to).step_by(QUERIES) {
            let count = QUERIES.min(to - q0);
            rows.copy_to(q0..q0 + count, queries, qk, 0, sizes.scale);
            let mut top = [f32::NEG_INFINITY; QUERIES];
            let mut mass = [0.0f32; QUERIES];
            sums.fill(0.0);
            for k0 in key_blocks(starts[q0], (offset + q0 + count).min(visible)) {
                // Beyond what is visible lies what another task left.
                let sight = Sight { starts, offset, keys: visible, q0, k0 };
                let q = Left { data: queries, rows: qk, inner: 1 };
                multiply(simd, count, q, (&keys_t[k0 * qk..], KEYS), (scores, KEYS), false, sight.scores(qk));
                for (i, row) in scores.chunks_exact_mut(KEYS).take(count).enumerate() {
                    let (from, to) = sight.of_query(i);
                    if from == to {
                        row.fill(0.0);
                        continue;
                    }
                    // Whole vectors: what is masked is −∞ for the maximum and 0 for the sum.
                    let whole = to.next_multiple_of(LANES);
                    row[..from].fill(f32::NEG_INFINITY);
                    row[to..whole].fill(f32::NEG_INFINITY);
                    let highest = max(&row[..whole]).max(top[i]);
                    if out.is_some() {
                        let shrink = if top[i] == f32::NEG_INFINITY { 0.0 } else { (top[i] - highest).exp() };
                        mass[i] = mass[i] * shrink + exp_shifted(&mut row[..whole], highest);
                        row[..from].fill(0.0);
                        row[to..].fill(0.0);
                        scale(&mut sums[i * width..(i + 1) * width], shrink);
                    }
                    top[i] = highest;
                }
                if out.is_some() {
                    let p = Left { data: scores, rows: KEYS, inner: 1 };
                    let v = (&values[k0 * width..], width);
                    multiply(simd, count, p, v, (sums, width), true, sight.over_keys(value));
                }
            }
            // SAFETY: one head's queries of this block, which only this task writes, one block at a time.
            let told = unsafe { told.range((row * heads + head) * seq + q0, count) };
            let Some(out) = out else {
                told.copy_from_slice(&top[..count]);
                continue;
            };
            for (i, sums) in sums.chunks_exact(width).take(count).enumerate() {
                // A query that sees nothing gets zeros.
                let inv = if mass[i] > 0.0 { 1.0 / mass[i] } else { 0.0 };
                // SAFETY: one head's columns of one token, which only this task writes, one at a time.
                let out = unsafe { out.range(((row * seq + q0 + i) * heads + head) * value, value) };
                for (o, sum) in out.iter_mut().zip(sums) {
                    *o = sum * inv;
                }
                told[i] = top[i] + mass[i].ln();
            }
        }
    }
}
