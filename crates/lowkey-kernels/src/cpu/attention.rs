//! Causal attention within documents, blocked over queries and keys: no score survives its block.
//!
//! Dao et al., arXiv 2205.14135 (running maximum and sum; backward from the log-sum-exp), for keys of which the last R
//! components are shared by all heads, and for values of another width than the keys.

use pulp::Arch;
use rayon::prelude::*;

use super::gemm::{View, product};
use super::vector::{dot, exp, exp_shifted, max, scale};

/// Queries per block.
const QUERIES: usize = 64;
/// Keys per block.
const KEYS: usize = 256;

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
}

/// `q [batch, seq, heads, nope+rope]`, `kv [batch, seq, groups, nope+value]`, `k_pe [batch, seq, rope]`,
/// `starts [batch, seq]`.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub(crate) q: &'a [f32],
    pub(crate) kv: &'a [f32],
    pub(crate) k_pe: &'a [f32],
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

    /// Keys of one head, its own part and the shared part side by side, `[seq, nope+rope]`.
    fn pack_keys(self, inputs: Inputs, row: usize, head: usize, keys: &mut [f32]) {
        let stride = self.strides()[1];
        let at = self.group_of(head) * (self.nope + self.value);
        for (t, key) in keys.chunks_exact_mut(self.qk()).enumerate() {
            let token = row * self.seq + t;
            let own = token * stride + at;
            key[..self.nope].copy_from_slice(&inputs.kv[own..own + self.nope]);
            key[self.nope..].copy_from_slice(&inputs.k_pe[token * self.rope..(token + 1) * self.rope]);
        }
    }

    /// Where a head's numbers of token 0 of a row begin, in `q`, in the values of `kv`, and in the output.
    fn offsets(self, row: usize, head: usize) -> [usize; 3] {
        let [q, kv, out] = self.strides();
        let value = self.group_of(head) * (self.nope + self.value) + self.nope;
        [row * self.seq * q + head * self.qk(), row * self.seq * kv + value, row * self.seq * out + head * self.value]
    }
}

/// The keys `from..to` that a query at `t` sees within the block that starts at `k0`, relative to `k0`.
#[inline(always)]
fn seen(start: i32, t: usize, k0: usize, keys: usize) -> (usize, usize) {
    let from = (start.max(0) as usize).saturating_sub(k0).min(keys);
    let to = (t + 1).saturating_sub(k0).min(keys);
    (from.min(to), to)
}

/// Blocks of keys that queries `q0..q0+queries` can see. Document starts never fall along a row, so the first query's is the
/// least.
fn key_blocks(starts: &[i32], q0: usize, queries: usize) -> impl Iterator<Item = (usize, usize)> {
    let first = starts[q0].max(0) as usize;
    let end = q0 + queries;
    (first..end).step_by(KEYS).map(move |k0| (k0, KEYS.min(end - k0)))
}

/// Scores of a block of queries against a block of keys, `[queries, keys]`.
fn block_scores(dims: Dims, q: &[f32], keys: &[f32], [queries, count]: [usize; 2], scores: &mut [f32]) {
    let qk = dims.qk();
    let q = View::new(q, dims.strides()[0]);
    product([queries, count, qk], scores, count, false, q, View::new(keys, qk).t(), dims.scale);
}

/// A buffer whose rows are written by several tasks, each its own ranges.
struct Parts<'a> {
    start: *mut f32,
    len: usize,
    buffer: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: a `Parts` only hands out ranges through `Parts::range`, whose callers promise that no two of them overlap.
unsafe impl Sync for Parts<'_> {}

impl<'a> Parts<'a> {
    fn new(buffer: &'a mut [f32]) -> Self {
        Self { start: buffer.as_mut_ptr(), len: buffer.len(), buffer: std::marker::PhantomData }
    }

    /// `len` elements from `at` on.
    ///
    /// # Safety
    /// While the returned slice lives, no other range that overlaps it may be asked for.
    #[expect(clippy::mut_from_ref, reason = "tasks write disjoint ranges of one buffer")]
    unsafe fn range(&self, at: usize, len: usize) -> &mut [f32] {
        assert!(at <= self.len && len <= self.len - at, "range exceeds its buffer");
        // SAFETY: in bounds by the assertion, of a buffer borrowed mutably for longer than `self`, and unaliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }
}

/// Writes `out [batch, seq, heads, value]` and `lse [batch, heads, seq]`, the log-sum-exp of each query's scores.
pub(crate) fn forward(dims: Dims, inputs: Inputs, out: &mut [f32], lse: &mut [f32]) {
    let arch = Arch::new();
    let Dims { seq, heads, value, .. } = dims;
    let [q_stride, kv_stride, out_stride] = dims.strides();
    let out = Parts::new(out);
    let scratch = || (vec![0.0; seq * dims.qk()], vec![0.0; QUERIES * KEYS], vec![0.0; QUERIES * value]);
    lse.par_chunks_mut(seq).enumerate().for_each_init(scratch, |(keys, scores, sums), (task, lse)| {
        let (row, head) = (task / heads, task % heads);
        let starts = &inputs.starts[row * seq..(row + 1) * seq];
        let [q_at, v_at, out_at] = dims.offsets(row, head);
        dims.pack_keys(inputs, row, head, keys);
        for q0 in (0..seq).step_by(QUERIES) {
            let queries = QUERIES.min(seq - q0);
            let mut top = [f32::NEG_INFINITY; QUERIES];
            let mut mass = [0.0f32; QUERIES];
            sums[..queries * value].fill(0.0);
            for (k0, count) in key_blocks(starts, q0, queries) {
                let q = &inputs.q[q_at + q0 * q_stride..];
                block_scores(dims, q, &keys[k0 * dims.qk()..], [queries, count], scores);
                arch.dispatch(|| {
                    for (i, scores) in scores.chunks_exact_mut(count).take(queries).enumerate() {
                        let (from, to) = seen(starts[q0 + i], q0 + i, k0, count);
                        scores[..from].fill(0.0);
                        scores[to..].fill(0.0);
                        if from == to {
                            continue;
                        }
                        let highest = max(&scores[from..to]).max(top[i]);
                        let shrink = if top[i] == f32::NEG_INFINITY { 0.0 } else { (top[i] - highest).exp() };
                        mass[i] = mass[i] * shrink + exp_shifted(&mut scores[from..to], highest);
                        top[i] = highest;
                        scale(&mut sums[i * value..(i + 1) * value], shrink);
                    }
                });
                let v = View::new(&inputs.kv[v_at + k0 * kv_stride..], kv_stride);
                product([queries, value, count], sums, value, true, View::new(scores, count), v, 1.0);
            }
            for (i, sums) in sums.chunks_exact(value).take(queries).enumerate() {
                // A query that sees nothing gets zeros.
                let inv = if mass[i] > 0.0 { 1.0 / mass[i] } else { 0.0 };
                // SAFETY: one head's columns of one token, which only this task writes, one at a time.
                let out = unsafe { out.range(out_at + (q0 + i) * out_stride, value) };
                for (o, sum) in out.iter_mut().zip(sums) {
                    *o = sum * inv;
                }
                lse[q0 + i] = top[i] + mass[i].ln();
            }
        }
    });
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

/// Scratch of one thread.
struct Scratch {
    keys: Vec<f32>,
    d_keys: Vec<f32>,
    d_values: Vec<f32>,
    scores: Vec<f32>,
    d_scores: Vec<f32>,
    d_queries: Vec<f32>,
}

/// Recomputes each block's probabilities from the log-sum-exp and adds up the three gradients.
pub(crate) fn backward(dims: Dims, inputs: Inputs, saved: Saved, gradients: Gradients) {
    let Dims { batch, seq, heads, groups, nope, rope, value, .. } = dims;
    let qk = dims.qk();
    let kv_stride = dims.strides()[1];
    // The shared key's gradient per key head, summed in order afterwards so that threads do not race.
    let mut d_pe = vec![0.0; batch * groups * seq * rope];
    let d_q = Parts::new(gradients.d_q);
    let d_kv = Parts::new(gradients.d_kv);
    let scratch = || Scratch {
        keys: vec![0.0; seq * qk],
        d_keys: vec![0.0; seq * qk],
        d_values: vec![0.0; seq * value],
        scores: vec![0.0; QUERIES * KEYS],
        d_scores: vec![0.0; QUERIES * KEYS],
        d_queries: vec![0.0; QUERIES * qk],
    };
    let share = |s: &mut Scratch, task: usize, d_pe: &mut [f32]| {
        let (row, group) = (task / groups, task % groups);
        s.d_keys.fill(0.0);
        s.d_values.fill(0.0);
        let per_group = heads / groups;
        for head in group * per_group..(group + 1) * per_group {
            head_backward(dims, inputs, saved, [row, head], s, &d_q);
        }
        for t in 0..seq {
            // SAFETY: one key head's columns of one token, which only this task writes, one at a time.
            let out = unsafe { d_kv.range((row * seq + t) * kv_stride + group * (nope + value), nope + value) };
            out[..nope].copy_from_slice(&s.d_keys[t * qk..t * qk + nope]);
            out[nope..].copy_from_slice(&s.d_values[t * value..(t + 1) * value]);
            d_pe[t * rope..(t + 1) * rope].copy_from_slice(&s.d_keys[t * qk + nope..(t + 1) * qk]);
        }
    };
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

fn head_backward(dims: Dims, inputs: Inputs, saved: Saved, [row, head]: [usize; 2], s: &mut Scratch, d_q: &Parts<'_>) {
    let arch = Arch::new();
    let Dims { seq, heads, value, .. } = dims;
    let qk = dims.qk();
    let [q_stride, kv_stride, out_stride] = dims.strides();
    let starts = &inputs.starts[row * seq..(row + 1) * seq];
    let [q_at, v_at, out_at] = dims.offsets(row, head);
    let lse = &saved.lse[(row * heads + head) * seq..][..seq];
    dims.pack_keys(inputs, row, head, &mut s.keys);
    for q0 in (0..seq).step_by(QUERIES) {
        let queries = QUERIES.min(seq - q0);
        let q = &inputs.q[q_at + q0 * q_stride..];
        let d_out = &saved.d_out[out_at + q0 * out_stride..];
        // Σ_j p_j · dp_j of each query equals dO·O.
        let mut pull = [0.0; QUERIES];
        for (i, pull) in pull.iter_mut().enumerate().take(queries) {
            let at = out_at + (q0 + i) * out_stride;
            *pull = dot(&saved.d_out[at..at + value], &saved.out[at..at + value]);
        }
        s.d_queries.fill(0.0);
        for (k0, count) in key_blocks(starts, q0, queries) {
            let keys = &s.keys[k0 * qk..];
            block_scores(dims, q, keys, [queries, count], &mut s.scores);
            let v = View::new(&inputs.kv[v_at + k0 * kv_stride..], kv_stride);
            let size = [queries, count, value];
            product(size, &mut s.d_scores, count, false, View::new(d_out, out_stride), v.t(), 1.0);
            arch.dispatch(|| {
                let rows = s.scores.chunks_exact_mut(count).zip(s.d_scores.chunks_exact_mut(count)).take(queries);
                for (i, (p, d)) in rows.enumerate() {
                    let (from, to) = seen(starts[q0 + i], q0 + i, k0, count);
                    for masked in [0..from, to..count] {
                        p[masked.clone()].fill(0.0);
                        d[masked].fill(0.0);
                    }
                    let (lse, pull) = (lse[q0 + i], pull[i]);
                    for (p, d) in p[from..to].iter_mut().zip(&mut d[from..to]) {
                        *p = exp(*p - lse);
                        *d = *p * (*d - pull);
                    }
                }
            });
            let (p, d) = (View::new(&s.scores, count), View::new(&s.d_scores, count));
            product([queries, qk, count], &mut s.d_queries, qk, true, d, View::new(keys, qk), dims.scale);
            let q = View::new(q, q_stride);
            product([count, qk, queries], &mut s.d_keys[k0 * qk..], qk, true, d.t(), q, dims.scale);
            let d_out = View::new(d_out, out_stride);
            product([count, value, queries], &mut s.d_values[k0 * value..], value, true, p.t(), d_out, 1.0);
        }
        for (i, gradient) in s.d_queries.chunks_exact(qk).take(queries).enumerate() {
            // SAFETY: one head's columns of one query, which only this task writes, one at a time.
            unsafe { d_q.range(q_at + (q0 + i) * q_stride, qk) }.copy_from_slice(gradient);
        }
    }
}
