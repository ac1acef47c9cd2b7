//! Attention of a few new queries over cached latents, in latent space.
//!
//! Bounded by reading the cache, so a thread reads each block of it once for all of its heads: scores against the block, running
//! maximum and sum (Dao et al., arXiv 2205.14135), and the weighted sum of the block's latents while it is still in the
//! core's own cache.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::linear::{Tokens, project};
use super::parts::Parts;
use super::tile::{Aligned, Extent, LANES, Left, ROWS, multiply};
use super::vector::{exp_shifted, max, scale};

/// Cached tokens per block.
const KEYS: usize = 128;

/// Queries (of all heads and positions) per task at most.
const QUERIES: usize = 8 * ROWS;

/// Sizes of one absorbed attention.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    /// New tokens per row.
    pub(crate) seq: usize,
    pub(crate) heads: usize,
    pub(crate) nope: usize,
    pub(crate) rope: usize,
    pub(crate) value: usize,
    pub(crate) rank: usize,
    pub(crate) scale: f32,
}

impl Shape {
    fn width(self) -> usize {
        self.rank + self.rope
    }
}

/// The filled part of a cache: `keys` slots of L+R numbers in each row, rows `row` apart.
#[derive(Clone, Copy)]
pub(crate) struct Slots<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) keys: usize,
    pub(crate) row: usize,
}

/// Writes `out [batch, seq, heads, value]` for `q [batch, seq, heads, nope+rope]`, `kv_b [heads(nope+value), rank]`, or
/// `out [batch, seq, heads, rank]` for `q [batch, seq, heads, rank+rope]` without `kv_b`; query `t` of row `b` sees the slots
/// `0..=offsets[b] + t` that are filled.
pub(crate) fn forward(shape: Shape, q: &[f32], slots: Slots, kv_b: Option<&[f32]>, offsets: &[i32], out: &mut [f32]) {
    let arch = Arch::new();
    let Shape { seq, heads, .. } = shape;
    let work = shape.width() * slots.keys * heads * seq * offsets.len();
    // Heads per task: all of them where there is little to do, else enough tasks for all threads and no more than a tile holds.
    let threads = if work > 1 << 16 { rayon::current_num_threads() } else { 1 };
    let share = heads.div_ceil(threads.div_ceil(offsets.len())).clamp(1, QUERIES);
    let positions = (QUERIES / share).clamp(1, seq);
    let tasks: Vec<Task> = (0..offsets.len())
        .flat_map(|row| (0..seq).step_by(positions).map(move |t| (row, t)))
        .flat_map(|(row, t)| {
            (0..heads).step_by(share).map(move |head| Task {
                row,
                first: t,
                positions: positions.min(seq - t),
                head,
                heads: share.min(heads - head),
            })
        })
        .collect();
    debug_assert_eq!(out.len(), offsets.len() * seq * heads * if kv_b.is_some() { shape.value } else { shape.rank });
    let out = &Parts::new(out);
    let run = |task: Task| arch.dispatch(Heads { shape, q, slots, kv_b, offsets, task, out });
    if threads == 1 { tasks.into_iter().for_each(run) } else { tasks.into_par_iter().for_each(run) }
}

/// Some heads at some consecutive positions of a row.
#[derive(Clone, Copy)]
struct Task {
    row: usize,
    first: usize,
    positions: usize,
    head: usize,
    heads: usize,
}

struct Heads<'a> {
    shape: Shape,
    q: &'a [f32],
    slots: Slots<'a>,
    kv_b: Option<&'a [f32]>,
    offsets: &'a [i32],
    task: Task,
    out: &'a Parts<'a>,
}

impl WithSimd for Heads<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { shape, slots, task, out, .. } = self;
        let Shape { seq, heads, nope, value, rank, .. } = shape;
        let (width, rank_width) = (shape.width(), rank.next_multiple_of(LANES));
        let count = task.positions * task.heads;
        let queries = self.map_queries();
        let mut scores = Aligned::zeros(count.next_multiple_of(ROWS) * KEYS);
        let mut sums = Aligned::zeros(count.next_multiple_of(ROWS) * rank_width);
        let mut latents = Aligned::zeros(if rank_width == rank { 0 } else { KEYS * rank_width });
        let (mut top, mut mass) = (vec![f32::NEG_INFINITY; count], vec![0.0f32; count]);
        let cache = &slots.data[task.row * slots.row..][..slots.keys * width];
        // What the last query of the task sees.
        let visible = (self.offsets[task.row] as usize + task.first + task.positions).min(slots.keys);
        for k0 in (0..visible).step_by(KEYS) {
            let keys = KEYS.min(visible - k0);
            let block = &cache[k0 * width..(k0 + keys) * width];
            // A query's scores lie `keys` apart, as the product leaves them.
            let rows = Tokens::dense(&queries, width);
            project(rows, block, width, &mut scores[..count * keys], false);
            for (i, row) in scores.chunks_exact_mut(keys).take(count).enumerate() {
                let t = self.offsets[task.row] as usize + task.first + i / task.heads;
                let to = (t + 1).saturating_sub(k0).min(keys);
                if to > 0 {
                    let highest = max(&row[..to]).max(top[i]);
                    let shrink = if top[i] == f32::NEG_INFINITY { 0.0 } else { (top[i] - highest).exp() };
                    mass[i] = mass[i] * shrink + exp_shifted(&mut row[..to], highest);
                    top[i] = highest;
                    scale(&mut sums[i * rank_width..(i + 1) * rank_width], shrink);
                }
                row[to..].fill(0.0);
            }
            // The weighted sum reads whole vectors: the shared key's numbers beside a latent must not be among them.
            let (block, stride): (&[f32], usize) = if rank_width == rank {
                (block, width)
            } else {
                for (latent, slot) in latents.chunks_exact_mut(rank_width).zip(block.chunks_exact(width)) {
                    latent[..rank].copy_from_slice(&slot[..rank]);
                }
                (&latents, rank_width)
            };
            // Rows beyond `count` read what lies there and are not used.
            let p = Left { data: &scores, rows: keys, inner: 1 };
            let extent = |_| Extent { inner: (0, keys), columns: rank };
            multiply(simd, count, p, (block, stride), (&mut sums, rank_width), true, extent);
        }
        for (i, sums) in sums.chunks_exact_mut(rank_width).take(count).enumerate() {
            let (t, head) = (task.first + i / task.heads, task.head + i % task.heads);
            scale(sums, 1.0 / mass[i]);
            let place = (task.row * seq + t) * heads + head;
            let Some(kv_b) = self.kv_b else {
                // SAFETY: one head of one token, which only this task writes, one at a time.
                unsafe { out.range(place * rank, rank) }.copy_from_slice(&sums[..rank]);
                continue;
            };
            // SAFETY: as above.
            let out = unsafe { out.range(place * value, value) };
            let w_uv = &kv_b[(head * (nope + value) + nope) * rank..][..value * rank];
            project(Tokens::dense(&sums[..rank], rank), w_uv, rank, out, false);
        }
    }
}

impl Heads<'_> {
    /// `[q̃ | q_pe]` times the scale, a row per position and head.
    #[inline(always)]
    fn map_queries(&self) -> Vec<f32> {
        let Shape { seq, heads, nope, rope, value, rank, scale } = self.shape;
        let (task, width) = (self.task, self.shape.width());
        let qk = if self.kv_b.is_some() { nope + rope } else { width };
        let mut queries = vec![0.0; task.positions * task.heads * width];
        for (i, mapped) in queries.chunks_exact_mut(width).enumerate() {
            let (t, head) = (task.first + i / task.heads, task.head + i % task.heads);
            let q = &self.q[((task.row * seq + t) * heads + head) * qk..][..qk];
            let Some(kv_b) = self.kv_b else {
                mapped.iter_mut().zip(q).for_each(|(m, q)| *m = q * scale);
                continue;
            };
            let w_uk = &kv_b[head * (nope + value) * rank..][..nope * rank];
            for (q, w) in q.iter().zip(w_uk.chunks_exact(rank)) {
                let q = q * scale;
                for (m, w) in mapped.iter_mut().zip(w) {
                    *m += q * w;
                }
            }
            for (m, q) in mapped[rank..].iter_mut().zip(&q[nope..]) {
                *m = q * scale;
            }
        }
        queries
    }
}
