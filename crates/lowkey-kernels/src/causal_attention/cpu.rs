//! Causal attention within documents, blocked over queries and keys: no score survives its block.
//!
//! Dao et al., arXiv 2205.14135 (running maximum and sum; backward from the log-sum-exp), for keys of which the last R
//! components are shared by all heads, and for values of another width than the keys. A head's keys and values are laid out
//! once for the tiles of [`multiply`] (with the other index running fastest for scores, as they are for the
//! weighted sums), and every tile stops at the diagonal.

mod ahead;
pub(crate) mod forward;
mod packed;

use std::ops::Range;

use burn::backend::Flex;
use burn_flex::FlexTensor;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use self::ahead::RowsAhead;
use self::forward::{Keys, Reads, Sizes, Vectors};
use self::packed::BackwardRoom;
use super::autodiff::{AttentionShape, AttentionState, CausalAttentionGradients, CausalAttentionOps};
use crate::cpu::bf16::Core;
use crate::cpu::parts::Parts;
use crate::cpu::tensors::{dims, integers, like, new, room};
use crate::cpu::tile::{Aligned, Extent, LANES, Left, ROWS, multiply};
use crate::cpu::transpose::transpose;
use crate::cpu::vector::{copy_scaled, dot, exp};
use crate::precision::Precision;

/// Queries per block: a multiple of the rows of a tile.
const QUERIES: usize = 16 * ROWS;
/// Keys per block: a multiple of the rows of a tile and of its lanes.
const KEYS: usize = 192;

/// Sizes of one attention.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dims {
    pub(crate) batch: usize,
    pub(crate) seq: usize,
    /// Query heads.
    pub(crate) heads: usize,
    /// Key and value heads; divides `heads`.
    pub(crate) groups: usize,
    /// Width of the part of a key that a head has to itself.
    pub(crate) nope: usize,
    /// Width of the part that all heads share.
    pub(crate) rope: usize,
    /// Width of a value.
    pub(crate) value: usize,
    pub(crate) scale: f32,
    /// Of its products.
    pub(crate) precision: Precision,
}

/// `q [batch, seq, heads, nope+rope]`, `kv [batch, seq, groups, nope+value]`, `k_pe [batch, seq, rope]` in rows
/// `k_pe_stride` apart, `starts [batch, seq]`.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub(crate) q: &'a [f32],
    pub(crate) kv: &'a [f32],
    pub(crate) k_pe: &'a [f32],
    /// Distance between the shared keys of two tokens.
    pub(crate) k_pe_stride: usize,
    pub(crate) starts: &'a [i32],
}

impl Dims {
    fn qk(self) -> usize {
        self.nope + self.rope
    }

    fn group_of(self, head: usize) -> usize {
        head / (self.heads / self.groups)
    }

    /// Distance between the same head of two tokens, in `q`, `kv` and the output.
    fn strides(self) -> [usize; 3] {
        [self.heads * self.qk(), self.groups * (self.nope + self.value), self.heads * self.value]
    }

    /// Where a head's numbers of token 0 of a row begin, in `q`, in `kv`, and in the output.
    fn offsets(self, row: usize, head: usize) -> [usize; 3] {
        let [q, kv, out] = self.strides();
        let own = self.group_of(head) * (self.nope + self.value);
        [row * self.seq * q + head * self.qk(), row * self.seq * kv + own, row * self.seq * out + head * self.value]
    }

    /// `seq` rounded up to whole blocks of keys.
    fn padded_seq(self) -> usize {
        self.seq.next_multiple_of(KEYS)
    }

    /// A part of a head's keys or values: its rows in their tensor, one per token of `row`.
    fn own<'a>(self, inputs: Inputs<'a>, [row, head]: [usize; 2], part: Range<usize>) -> Rows<'a> {
        let at = self.offsets(row, head)[1] + part.start;
        Rows { data: &inputs.kv[at..], stride: self.strides()[1], width: part.len(), count: self.seq }
    }

    /// A head's queries, the gradients of what they got, and what they got.
    fn of_queries<'a>(self, inputs: Inputs<'a>, saved: Saved<'a>, [row, head]: [usize; 2]) -> [Rows<'a>; 3] {
        let ([q, _, out], [q_stride, _, out_stride]) = (self.offsets(row, head), self.strides());
        let queries = Rows { data: &inputs.q[q..], stride: q_stride, width: self.qk(), count: self.seq };
        let d_out = Rows { data: &saved.d_out[out..], stride: out_stride, width: self.value, count: self.seq };
        [queries, d_out, Rows { data: &saved.out[out..], ..d_out }]
    }

    fn shared<'a>(self, inputs: Inputs<'a>, row: usize) -> Rows<'a> {
        let stride = inputs.k_pe_stride;
        let data = if self.rope == 0 { &[] } else { &inputs.k_pe[row * self.seq * stride..] };
        Rows { data, stride: if self.rope == 0 { 0 } else { stride }, width: self.rope, count: self.seq }
    }
}

/// Rows of `width` numbers, `stride` apart.
#[derive(Clone, Copy)]
struct Rows<'a> {
    data: &'a [f32],
    stride: usize,
    width: usize,
    count: usize,
}

impl<'a> Rows<'a> {
    #[inline(always)]
    fn row(self, i: usize) -> &'a [f32] {
        &self.data[i * self.stride..i * self.stride + self.width]
    }

    /// Copies the rows into `out`, which lie as far apart as stands beside it, from column `column` on, times `factor`.
    #[inline(always)]
    fn copy_to<S: Simd>(self, simd: S, rows: Range<usize>, out: (&mut [f32], usize), column: usize, factor: f32) {
        let (out, stride) = out;
        for (i, out) in rows.zip(out.chunks_mut(stride)) {
            copy_scaled(simd, self.row(i), &mut out[column..column + self.width], factor);
        }
    }

    /// Writes the rows as columns of blocks of [`KEYS`]: number `c` of row `i` goes to `[i / KEYS][first + c][i % KEYS]`,
    /// with `height` numbers per row in all.
    #[inline(always)]
    fn transpose_to(self, out: &mut [f32], first: usize, height: usize) {
        for (block, out) in out.chunks_exact_mut(height * KEYS).enumerate() {
            let rows = self.count.saturating_sub(block * KEYS).min(KEYS);
            if rows > 0 && self.width > 0 {
                let from = (&self.data[block * KEYS * self.stride..], self.stride);
                transpose([rows, self.width], from, (&mut out[first * KEYS..], KEYS));
            }
        }
    }
}

/// The keys `from..to` of the block at `k0` that a query at `t` sees, relative to `k0`.
#[inline(always)]
fn seen(start: i32, t: usize, k0: usize) -> (usize, usize) {
    let from = (start.max(0) as usize).saturating_sub(k0).min(KEYS);
    let to = (t + 1).saturating_sub(k0).min(KEYS);
    (from.min(to), to)
}

/// Blocks of keys that queries can see of which the first sees keys from `start` on and the last all before `end`. Document starts
/// never fall along a row, so the first query's is the least.
fn key_blocks(start: i32, end: usize) -> impl Iterator<Item = usize> {
    let first = start.max(0) as usize / KEYS * KEYS;
    (first..end).step_by(KEYS)
}

/// The keys of a block that a tile of queries sees: from the first that its first query does to the last that its last does.
#[derive(Clone, Copy)]
struct Sight<'a> {
    starts: &'a [i32],
    /// Keys before the first query of the row.
    offset: usize,
    /// Keys that there are.
    keys: usize,
    q0: usize,
    k0: usize,
}

impl Sight<'_> {
    /// The keys that query `i` of the block sees, relative to `k0`.
    #[inline(always)]
    fn of_query(self, i: usize) -> (usize, usize) {
        let t = (self.offset + self.q0 + i).min(self.keys - 1);
        seen(self.starts[self.q0 + i], t, self.k0)
    }

    /// Whether none of the block's `count` queries sees a key of this block.
    #[inline(always)]
    fn sees_nothing(self, count: usize) -> bool {
        self.k0 > self.offset + self.q0 + count - 1 || (self.starts[self.q0].max(0) as usize) >= self.k0 + KEYS
    }

    #[inline(always)]
    fn of_tile(self, row: usize) -> (usize, usize) {
        self.of_rows(row, ROWS)
    }

    /// The keys that `count` queries from `row` on see, relative to `k0`.
    #[inline(always)]
    fn of_rows(self, row: usize, count: usize) -> (usize, usize) {
        let t = self.offset + self.q0 + row;
        let (from, _) = seen(self.starts[self.q0 + row], t, self.k0);
        let (_, to) = seen(0, (t + count - 1).min(self.keys - 1), self.k0);
        (from.min(to), to)
    }

    /// For scores: all components of the keys that any query of the tile sees.
    #[inline(always)]
    fn scores(self, width: usize) -> impl Fn(usize) -> Extent {
        move |row| Extent { inner: (0, width), columns: self.of_tile(row).1 }
    }

    /// For sums over keys, row by row of queries.
    #[inline(always)]
    fn over_keys(self, width: usize) -> impl Fn(usize) -> Extent {
        move |row| Extent { inner: self.of_tile(row), columns: width }
    }

    /// For sums over queries, row by row of keys, where no keys come before the queries: from the first query that sees the tile's
    /// first key.
    #[inline(always)]
    fn over_queries(self, queries: usize, width: usize) -> impl Fn(usize) -> Extent {
        move |row| {
            let from = (self.k0 + row).saturating_sub(self.q0).min(queries);
            Extent { inner: (from, queries), columns: width }
        }
    }
}

/// Writes `out [batch, seq, heads, value]` and `lse [batch, heads, seq]`, the log-sum-exp of each query's scores.
pub(crate) fn forward(dims: Dims, inputs: Inputs, out: &mut [f32], lse: &mut [f32]) {
    let Dims { batch, seq, heads, groups, nope, rope, value, scale, precision } = dims;
    let sizes = Sizes { batch, seq, keys: seq, heads, groups, own: nope, shared: rope, value, scale, precision };
    let [q_stride, kv_stride, _] = dims.strides();
    let kv = Vectors { data: inputs.kv, row: seq * kv_stride, head: nope + value, token: kv_stride };
    let vectors = Reads {
        q: Vectors { data: inputs.q, row: seq * q_stride, head: dims.qk(), token: q_stride },
        keys: Keys::Given {
            own: kv,
            shared: Vectors { data: inputs.k_pe, row: seq * inputs.k_pe_stride, head: 0, token: inputs.k_pe_stride },
            values: Vectors { data: &inputs.kv[nope..], ..kv },
        },
        starts: inputs.starts,
        offsets: &[],
    };
    forward::forward(sizes, vectors, Some(out), lse);
}

/// Gradients of [`forward`]: `d_q`, `d_kv`, and `d_k_pe`, laid out as the inputs.
pub(crate) struct Gradients<'a> {
    pub(crate) d_q: &'a mut [f32],
    pub(crate) d_kv: &'a mut [f32],
    pub(crate) d_k_pe: &'a mut [f32],
}

/// What the forward pass left, and the gradient of its output.
#[derive(Clone, Copy)]
pub(crate) struct Saved<'a> {
    pub(crate) out: &'a [f32],
    pub(crate) lse: &'a [f32],
    pub(crate) d_out: &'a [f32],
}

struct BackwardScratch {
    /// `[blocks, qk, KEYS]`
    keys_t: Aligned,
    /// `[keys, qk]`
    keys: Aligned,
    /// `[blocks, value, KEYS]`
    values_t: Aligned,
    /// `[QUERIES, qk]`, times the scale.
    queries: Aligned,
    /// `[QUERIES, value]`
    d_out: Aligned,
    /// `[QUERIES, KEYS]` each.
    scores: Aligned,
    d_scores: Aligned,
    /// `[QUERIES, qk]`
    d_queries: Aligned,
    /// `[keys, qk]`
    d_keys: Aligned,
    /// `[keys, value]`
    d_values: Aligned,
    /// What is packed where products are in bf16, in place of `keys_t` and `values_t`.
    packed: BackwardRoom,
}

impl BackwardScratch {
    fn new(dims: Dims) -> Self {
        let keys = dims.padded_seq();
        let (qk, value) = (dims.qk().next_multiple_of(LANES), dims.value.next_multiple_of(LANES));
        let across = if dims.precision == Precision::Bf16 { 0 } else { keys };
        Self {
            keys_t: Aligned::zeros(across * dims.qk()),
            keys: Aligned::zeros(keys * qk),
            values_t: Aligned::zeros(across * dims.value),
            queries: Aligned::zeros(QUERIES * qk),
            d_out: Aligned::zeros(QUERIES * value),
            scores: Aligned::zeros(QUERIES * KEYS),
            d_scores: Aligned::zeros(QUERIES * KEYS),
            d_queries: Aligned::zeros(QUERIES * qk),
            d_keys: Aligned::zeros(keys * qk),
            d_values: Aligned::zeros(keys * value),
            packed: BackwardRoom::new(),
        }
    }
}

/// Recomputes each block's probabilities from the log-sum-exp and adds up the three gradients.
pub(crate) fn backward(dims: Dims, inputs: Inputs, saved: Saved, gradients: Gradients) {
    let arch = Arch::new();
    let Dims { batch, seq, groups, rope, .. } = dims;
    // The shared key's gradient per key head, summed in order afterwards so that threads do not race.
    let mut d_pe = room(batch * groups * seq * rope);
    let (d_q, d_kv) = (&Parts::new(gradients.d_q), &Parts::new(gradients.d_kv));
    let share = |scratch: &mut BackwardScratch, task: usize, d_pe: &mut [f32]| {
        let place = [task / groups, task % groups];
        arch.dispatch(GroupBackward { dims, inputs, saved, place, scratch, d_q, d_kv, d_pe });
    };
    let scratch = || BackwardScratch::new(dims);
    if rope == 0 {
        (0..batch * groups).into_par_iter().for_each_init(scratch, |s, task| share(s, task, &mut []));
        return;
    }
    d_pe.par_chunks_mut(seq * rope).enumerate().for_each_init(scratch, |s, (task, d_pe)| share(s, task, d_pe));
    let rows = gradients.d_k_pe.chunks_exact_mut(seq * rope).zip(d_pe.chunks_exact(groups * seq * rope));
    for (sum, parts) in rows {
        sum.fill(0.0);
        for part in parts.chunks_exact(seq * rope) {
            for (s, p) in sum.iter_mut().zip(part) {
                *s += p;
            }
        }
    }
}

/// One key head of one row, with the query heads that read it.
struct GroupBackward<'a> {
    dims: Dims,
    inputs: Inputs<'a>,
    saved: Saved<'a>,
    /// Row and key head.
    place: [usize; 2],
    scratch: &'a mut BackwardScratch,
    d_q: &'a Parts<'a>,
    d_kv: &'a Parts<'a>,
    d_pe: &'a mut [f32],
}

impl WithSimd for GroupBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { dims, inputs, saved, place: [row, group], scratch: s, d_q, d_kv, d_pe } = self;
        let Dims { seq, heads, groups, nope, rope, value, .. } = dims;
        let (qk, width, v_width) = (dims.qk(), dims.qk().next_multiple_of(LANES), value.next_multiple_of(LANES));
        let per_group = heads / groups;
        let first = group * per_group;
        let (own, shared) = (dims.own(inputs, [row, first], 0..nope), dims.shared(inputs, row));
        let values = dims.own(inputs, [row, first], nope..nope + value);
        own.copy_to(simd, 0..seq, (&mut s.keys, width), 0, 1.0);
        shared.copy_to(simd, 0..seq, (&mut s.keys, width), nope, 1.0);
        let core = (dims.precision == Precision::Bf16).then(Core::here);
        if let Some(core) = &core {
            s.packed.take_keys(core, (&s.keys, width), (values.data, values.stride), [seq, qk, value]);
        } else {
            own.transpose_to(&mut s.keys_t, 0, qk);
            shared.transpose_to(&mut s.keys_t, nope, qk);
            values.transpose_to(&mut s.values_t, 0, value);
        }
        s.d_keys.fill(0.0);
        s.d_values.fill(0.0);
        for head in first..first + per_group {
            head_backward(simd, core.as_ref(), dims, inputs, saved, [row, head], s, [d_q, d_kv]);
        }
        let [kv_at, kv_stride] = [dims.offsets(row, first)[1], dims.strides()[1]];
        for t in 0..seq {
            // SAFETY: one key head's columns of one token, which only this task writes, one at a time.
            let out = unsafe { d_kv.range(kv_at + t * kv_stride, nope + value) };
            out[..nope].copy_from_slice(&s.d_keys[t * width..t * width + nope]);
            out[nope..].copy_from_slice(&s.d_values[t * v_width..t * v_width + value]);
            d_pe[t * rope..(t + 1) * rope].copy_from_slice(&s.d_keys[t * width + nope..t * width + qk]);
        }
    }
}

#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "one more than where it is from")]
fn head_backward<S: Simd>(
    simd: S,
    core: Option<&Core>,
    dims: Dims,
    inputs: Inputs,
    saved: Saved,
    [row, head]: [usize; 2],
    s: &mut BackwardScratch,
    [d_q, d_kv]: [&Parts<'_>; 2],
) {
    let Dims { seq, heads, value, .. } = dims;
    let (qk, width, v_width) = (dims.qk(), dims.qk().next_multiple_of(LANES), value.next_multiple_of(LANES));
    let (q_at, q_stride) = (dims.offsets(row, head)[0], dims.strides()[0]);
    let starts = &inputs.starts[row * seq..(row + 1) * seq];
    let lse = &saved.lse[(row * heads + head) * seq..][..seq];
    let [queries, d_out, out] = dims.of_queries(inputs, saved, [row, head]);
    for q0 in (0..seq).step_by(QUERIES) {
        let count = QUERIES.min(seq - q0);
        queries.copy_to(simd, q0..q0 + count, (&mut s.queries, width), 0, dims.scale);
        d_out.copy_to(simd, q0..q0 + count, (&mut s.d_out, v_width), 0, 1.0);
        // Σ_j p_j · dp_j of each query equals dO·O.
        let mut pull = [0.0; QUERIES];
        for (i, pull) in pull.iter_mut().enumerate().take(count) {
            *pull = dot(simd, d_out.row(q0 + i), out.row(q0 + i));
        }
        s.d_queries.fill(0.0);
        if let Some(core) = core {
            s.packed.take_queries(core, (&s.queries, width), (&s.d_out, v_width), [count, qk, value]);
        }
        let ahead = &mut match core {
            Some(_) => RowsAhead::nothing(),
            None => RowsAhead::backward(dims, inputs, saved, [d_q, d_kv], [row, head], q0..q0 + count),
        };
        for k0 in key_blocks(starts[q0], q0 + count) {
            let sight = Sight { starts, offset: 0, keys: seq, q0, k0 };
            if let Some(core) = core {
                s.packed.scores(core, [count, qk, value], sight, [&mut s.scores, &mut s.d_scores]);
            } else {
                let q = Left { data: &s.queries, rows: width, inner: 1 };
                let d = Left { data: &s.d_out, rows: v_width, inner: 1 };
                let (keys_t, values_t) = (&s.keys_t[k0 * qk..], &s.values_t[k0 * value..]);
                multiply(simd, count, q, (keys_t, KEYS), (&mut s.scores, KEYS), false, sight.scores(qk), ahead);
                multiply(simd, count, d, (values_t, KEYS), (&mut s.d_scores, KEYS), false, sight.scores(value), ahead);
            }
            let rows = s.scores.chunks_exact_mut(KEYS).zip(s.d_scores.chunks_exact_mut(KEYS)).take(count);
            for (i, (p, d)) in rows.enumerate() {
                let (from, to) = seen(starts[q0 + i], q0 + i, k0);
                if from < to {
                    let (lse, pull) = (lse[q0 + i], pull[i]);
                    let whole = to.next_multiple_of(LANES);
                    for (p, d) in p[..whole].iter_mut().zip(&mut d[..whole]) {
                        *p = exp(*p - lse);
                        *d = *p * (*d - pull);
                    }
                }
                // The products below read a tile's keys up to the last that its last query sees; packed ones all of them.
                let end = if core.is_some() { KEYS } else { (to + ROWS).min(KEYS) };
                for masked in [0..from, to..end] {
                    p[masked.clone()].fill(0.0);
                    d[masked].fill(0.0);
                }
            }
            let (d_keys, d_values) = (&mut s.d_keys[k0 * width..], &mut s.d_values[k0 * v_width..]);
            if let Some(core) = core {
                let sums = [(&mut s.d_queries[..], width), (d_keys, width), (d_values, v_width)];
                s.packed.sums(core, [&s.scores, &s.d_scores], [count, qk, value], sight, sums);
                continue;
            }
            let keys = (&s.keys[k0 * width..], width);
            let d = Left { data: &s.d_scores, rows: KEYS, inner: 1 };
            multiply(simd, count, d, keys, (&mut s.d_queries, width), true, sight.over_keys(qk), ahead);
            // The same blocks, read across: row by row of keys.
            let keys = KEYS.min(q0 + count - k0);
            let (of_keys, of_values) = (sight.over_queries(count, qk), sight.over_queries(count, value));
            let (p, d) = (Left { data: &s.scores, rows: 1, inner: KEYS }, Left { rows: 1, inner: KEYS, ..d });
            multiply(simd, keys, d, (&s.queries, width), (d_keys, width), true, of_keys, ahead);
            multiply(simd, keys, p, (&s.d_out, v_width), (d_values, v_width), true, of_values, ahead);
        }
        for (i, gradient) in s.d_queries.chunks_exact(width).take(count).enumerate() {
            // SAFETY: one head's columns of one query, which only this task writes, one at a time.
            let out = unsafe { d_q.range(q_at + (q0 + i) * q_stride, qk) };
            for (o, g) in out.iter_mut().zip(gradient) {
                *o = g * dims.scale;
            }
        }
    }
}

fn attention_dims(q: &FlexTensor, kv: &FlexTensor, shape: AttentionShape) -> Dims {
    let [batch, seq, heads, _] = dims::<4>(q);
    let [_, _, groups, width] = dims::<4>(kv);
    let AttentionShape { nope, rope, scale, precision } = shape;
    Dims { batch, seq, heads, groups, nope, rope, value: width - nope, scale: scale as f32, precision }
}

impl CausalAttentionOps for Flex {
    fn causal_attention(
        q: FlexTensor,
        kv: FlexTensor,
        k_pe: FlexTensor,
        starts: FlexTensor,
        shape: AttentionShape,
    ) -> FlexTensor {
        Self::causal_attention_saving(q, kv, k_pe, starts, shape).0
    }
}

impl CausalAttentionGradients for Flex {
    fn causal_attention_saving(
        q: FlexTensor,
        kv: FlexTensor,
        k_pe: FlexTensor,
        starts: FlexTensor,
        shape: AttentionShape,
    ) -> (FlexTensor, FlexTensor) {
        let (q, kv, k_pe) = (q.to_contiguous(), kv.to_contiguous(), k_pe.to_contiguous());
        let dims = attention_dims(&q, &kv, shape);
        let starts = &integers(&starts);
        let inputs = Inputs { q: q.storage(), kv: kv.storage(), k_pe: k_pe.storage(), k_pe_stride: shape.rope, starts };
        let mut out = new([dims.batch, dims.seq, dims.heads * dims.value]);
        let mut lse = new([dims.batch, dims.heads, dims.seq]);
        forward(dims, inputs, out.storage_mut(), lse.storage_mut());
        (out, lse)
    }

    fn causal_attention_grad(saved: AttentionState<Self>, grad: FlexTensor) -> (FlexTensor, FlexTensor, FlexTensor) {
        let AttentionState { q, kv, k_pe, starts, out, lse, shape } = saved;
        let (q, kv, k_pe, grad) = (q.to_contiguous(), kv.to_contiguous(), k_pe.to_contiguous(), grad.to_contiguous());
        let dims = attention_dims(&q, &kv, shape);
        let starts = &integers(&starts);
        let inputs = Inputs { q: q.storage(), kv: kv.storage(), k_pe: k_pe.storage(), k_pe_stride: shape.rope, starts };
        let saved = Saved { out: out.storage(), lse: lse.storage(), d_out: grad.storage() };
        let (mut d_q, mut d_kv) = (like(&q), like(&kv));
        let mut d_k_pe = like(&k_pe);
        let gradients = Gradients { d_q: d_q.storage_mut(), d_kv: d_kv.storage_mut(), d_k_pe: d_k_pe.storage_mut() };
        backward(dims, inputs, saved, gradients);
        (d_q, d_kv, d_k_pe)
    }
}
