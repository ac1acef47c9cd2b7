//! Attention of a few new queries over cached latents, in latent space.
//!
//! Bounded by reading the cache, so one thread reads each block of it, once, for all heads: scores against the block, running maximum
//! and sum (Dao et al., arXiv 2205.14135), and the weighted sum of the block's latents while it is still in the core's own
//! cache. Where there are fewer groups of queries than threads, threads share out the slots, and their parts are merged
//! ("flash-decoding", Dao et al. 2023).

mod rounded;

use pulp::{Arch, Simd, WithSimd, bytemuck};
use rayon::prelude::*;

use super::numbers::{Numbers, Vectors};
use crate::cpu::bf16::{Packed, Unit};
use crate::cpu::linear::{Tokens, project};
use crate::cpu::parts::Parts;
use crate::cpu::tile::{
    Aligned, Extent, LANES, Left, ROWS, add_either, paired_products, turns_of_either, turns_of_pairs,
};
use crate::cpu::vector::{Ahead, exp, exps, scale};
use crate::precision::Precision;

/// Queries that one instruction's lanes hold: two lanes each.
const COLUMNS: usize = LANES / 2;

/// Queries (of all heads and positions) per group at most.
const QUERIES: usize = 6 * COLUMNS;

/// Cached tokens of a thread, at least: less is not worth waking it.
const SHARE: usize = 256;

/// Multiply-adds that are worth waking a thread for.
const WORK: usize = 1 << 17;

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

/// The filled part of a cache: `keys` slots of L+R numbers in each row, rows `row` slots apart.
#[derive(Clone, Copy)]
pub(crate) struct Slots<'a> {
    pub(crate) vectors: Vectors<'a>,
    pub(crate) keys: usize,
    pub(crate) row: usize,
}

/// Writes `out [batch, seq, heads, value]` for `q [batch, seq, heads, nope+rope]`, `kv_b [heads(nope+value), rank]`, or
/// `out [batch, seq, heads, rank]` for `q [batch, seq, heads, rank+rope]` without `kv_b`; query `t` of row `b` sees the slots
/// `0..=offsets[b] + t` that are filled. With a unit, products with latents that are stored in bf16 are its work, and their operands rounded.
pub(crate) fn forward(
    shape: Shape,
    q: &[f32],
    slots: Slots,
    kv_b: Option<&[f32]>,
    offsets: &[i32],
    unit: Option<Unit>,
    out: &mut [f32],
) {
    let Shape { seq, heads, value, rank, .. } = shape;
    debug_assert_eq!(out.len(), offsets.len() * seq * heads * if kv_b.is_some() { value } else { rank });
    let unit = unit.filter(|_| matches!(slots.vectors.numbers, Numbers::Bf16(_)));
    let call = &Call { shape, q, slots, kv_b, offsets, unit, out: &Parts::new(out) };
    let groups = call.groups();
    let work = shape.width() * slots.keys * heads * seq * offsets.len();
    let threads = if work > WORK { rayon::current_num_threads() } else { 1 };
    if threads == 1 || groups.len() >= threads {
        let whole = |group: &Group| {
            let mapped = call.map(group, false);
            let part = call.attend(group, &mapped, 0..group.visible);
            call.finish(group, &[part], false);
        };
        if threads == 1 {
            groups.iter().for_each(whole);
        } else {
            groups.par_iter().for_each(whole);
        }
        return;
    }
    let mapped: Vec<Queries> = groups.iter().map(|group| call.map(group, true)).collect();
    let pieces: Vec<(usize, std::ops::Range<usize>)> = (0..groups.len())
        .flat_map(|i| {
            let visible = groups[i].visible;
            let parts = threads.div_ceil(groups.len()).min(visible / SHARE).max(1);
            // Whole vectors of queries' weights do not care, but a part begins where a block of the whole would.
            let share = visible.div_ceil(parts).next_multiple_of(LANES);
            (0..visible).step_by(share).map(move |from| (i, from..(from + share).min(visible)))
        })
        .collect();
    let attend = |(i, slots): &(usize, std::ops::Range<usize>)| call.attend(&groups[*i], &mapped[*i], slots.clone());
    let parts: Vec<Partial> =
        if pieces.len() == 1 { pieces.iter().map(attend).collect() } else { pieces.par_iter().map(attend).collect() };
    let mut at = 0;
    for (i, group) in groups.iter().enumerate() {
        let count = pieces[at..].iter().take_while(|(of, _)| *of == i).count();
        call.finish(group, &parts[at..at + count], true);
        at += count;
    }
}

/// Some heads at some consecutive positions of a row, which read the cache together.
struct Group {
    row: usize,
    first: usize,
    positions: usize,
    head: usize,
    heads: usize,
    /// Slots that the last of its queries sees.
    visible: usize,
}

impl Group {
    fn count(&self) -> usize {
        self.positions * self.heads
    }

    /// Queries, rounded up to whole vectors.
    fn columns(&self) -> usize {
        self.count().next_multiple_of(COLUMNS)
    }
}

/// What a group's queries have gathered from some of the slots.
struct Partial {
    /// Largest score of each query.
    top: Vec<f32>,
    /// Sum of e^(score − top).
    mass: Vec<f32>,
    /// Sums of latents with those weights, rows of L numbers `stride` apart.
    sums: Aligned,
    stride: usize,
}

/// A group's queries in latent space, as its products read them.
enum Queries {
    /// Numbers 2k and 2k+1 of each query side by side, see [`paired_products`].
    Paired(Aligned),
    /// In bf16.
    Rounded(Packed),
}

struct Call<'a> {
    shape: Shape,
    q: &'a [f32],
    slots: Slots<'a>,
    kv_b: Option<&'a [f32]>,
    offsets: &'a [i32],
    unit: Option<Unit>,
    out: &'a Parts<'a>,
}

impl Call<'_> {
    fn groups(&self) -> Vec<Group> {
        let Shape { seq, heads, .. } = self.shape;
        let share = heads.min(QUERIES);
        let positions = (QUERIES / share).clamp(1, seq);
        (0..self.offsets.len())
            .flat_map(|row| (0..seq).step_by(positions).map(move |first| (row, first)))
            .flat_map(|(row, first)| {
                let positions = positions.min(seq - first);
                let visible = (self.offsets[row] as usize + first + positions).min(self.slots.keys);
                (0..heads).step_by(share).map(move |head| {
                    let heads = share.min(heads - head);
                    Group { row, first, positions, head, heads, visible }
                })
            })
            .collect()
    }

    /// Place of a group's query among all of `[batch, seq, heads]`, and its head.
    fn place(&self, group: &Group, i: usize) -> (usize, usize) {
        let (t, head) = (group.first + i / group.heads, group.head + i % group.heads);
        ((group.row * self.shape.seq + t) * self.shape.heads + head, head)
    }

    /// `[q̃ | q_pe]` times the scale.
    fn map(&self, group: &Group, alone: bool) -> Queries {
        let Shape { nope, rope, value, rank, scale, .. } = self.shape;
        let (width, columns) = (self.shape.width(), group.columns());
        let mut rows = vec![0.0f32; group.count() * width];
        let map = |(i, mapped): (usize, &mut [f32])| {
            let (place, head) = self.place(group, i);
            let Some(kv_b) = self.kv_b else {
                let q = &self.q[place * width..][..width];
                mapped.iter_mut().zip(q).for_each(|(m, q)| *m = q * scale);
                return;
            };
            let q = &self.q[place * (nope + rope)..][..nope + rope];
            let w_uk = &kv_b[head * (nope + value) * rank..][..nope * rank];
            Arch::new().dispatch(WeightedRows { weights: q, rows: w_uk, factor: scale, out: &mut mapped[..rank] });
            mapped[rank..].iter_mut().zip(&q[nope..]).for_each(|(m, q)| *m = q * scale);
        };
        if alone && self.kv_b.is_some() && rows.len() * nope > WORK {
            rows.par_chunks_mut(width).enumerate().for_each(map);
        } else {
            rows.chunks_mut(width).enumerate().for_each(map);
        }
        if let Some(unit) = self.unit {
            return Queries::Rounded(rounded::queries(unit, &rows, [group.count(), width]));
        }
        let mut paired = Aligned::zeros(width.next_multiple_of(2) * columns);
        for (i, row) in rows.chunks_exact(width).enumerate() {
            for (k, x) in row.iter().enumerate() {
                paired[(k / 2 * columns + i) * 2 + k % 2] = *x;
            }
        }
        Queries::Paired(paired)
    }

    fn attend(&self, group: &Group, mapped: &Queries, slots: std::ops::Range<usize>) -> Partial {
        match (mapped, self.slots.vectors.numbers, self.unit) {
            (Queries::Rounded(queries), Numbers::Bf16(latents), Some(unit)) => {
                rounded::attend(unit, self, group, (queries, latents), slots)
            }
            (Queries::Paired(mapped), ..) => Arch::new().dispatch(Attend { call: self, group, mapped, slots }),
            (Queries::Rounded(_), ..) => unreachable!("queries are rounded for latents in bf16 alone"),
        }
    }

    /// Merges a group's parts, divides by the mass, and maps by W_UV where it has been given.
    fn finish(&self, group: &Group, parts: &[Partial], alone: bool) {
        let Shape { nope, value, rank, .. } = self.shape;
        let finish = |i: usize| {
            let top = parts.iter().fold(f32::NEG_INFINITY, |top, part| top.max(part.top[i]));
            let weights = parts.iter().map(|part| {
                // A part whose slots the query does not see counts for nothing; a sum that is no number stays none.
                if part.top[i] == f32::NEG_INFINITY { 0.0 } else { (part.top[i] - top).exp() }
            });
            let weights: Vec<f32> = weights.collect();
            let mass: f32 = parts.iter().zip(&weights).map(|(part, weight)| part.mass[i] * weight).sum();
            let mut sums = vec![0.0f32; rank];
            for (part, weight) in parts.iter().zip(&weights) {
                let weight = weight / mass;
                sums.iter_mut().zip(&part.sums[i * part.stride..]).for_each(|(sum, x)| *sum += x * weight);
            }
            let (place, head) = self.place(group, i);
            let Some(kv_b) = self.kv_b else {
                // SAFETY: one head of one token, which only this call of this closure writes.
                unsafe { self.out.range(place * rank, rank) }.copy_from_slice(&sums);
                return;
            };
            // SAFETY: as above.
            let out = unsafe { self.out.range(place * value, value) };
            let w_uv = &kv_b[(head * (nope + value) + nope) * rank..][..value * rank];
            project(Precision::F32, Tokens::dense(&sums, rank), w_uv, rank, out, false);
        };
        if alone && self.kv_b.is_some() && group.count() * value * rank > WORK {
            (0..group.count()).into_par_iter().for_each(finish);
        } else {
            (0..group.count()).for_each(finish);
        }
    }
}

/// `out += factor · Σ weight · row`
struct WeightedRows<'a> {
    weights: &'a [f32],
    rows: &'a [f32],
    factor: f32,
    out: &'a mut [f32],
}

impl WithSimd for WeightedRows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { weights, rows, factor, out } = self;
        for (weight, row) in weights.iter().zip(rows.chunks_exact(out.len())) {
            let weight = weight * factor;
            out.iter_mut().zip(row).for_each(|(out, x)| *out += weight * x);
        }
    }
}

struct Attend<'a> {
    call: &'a Call<'a>,
    group: &'a Group,
    mapped: &'a [f32],
    slots: std::ops::Range<usize>,
}

/// Slots per block: as many as stay in a core's first cache, and never so few that a block's fixed costs show.
fn block_of(stride: usize) -> usize {
    /// Bytes of a block.
    const BLOCK: usize = 1 << 15;
    (BLOCK / (stride * size_of::<f32>())).clamp(32, 256) / LANES * LANES
}

impl WithSimd for Attend<'_> {
    type Output = Partial;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Partial {
        let Self { call, group, mapped, slots } = self;
        let Shape { rank, .. } = call.shape;
        let (width, rank_width) = (call.shape.width(), rank.next_multiple_of(LANES));
        let (count, columns) = (group.count(), group.columns());
        // Whole vectors are read of the latents, and pairs of all numbers: what lies beyond is not used, but must be there.
        let stride = width.next_multiple_of(2).max(rank_width);
        let Slots { vectors, row, .. } = call.slots;
        let in_place = match vectors.numbers {
            Numbers::F32(x) if stride == width => Some(x),
            _ => None,
        };
        let most = block_of(stride);
        let mut block = Aligned::zeros(if in_place.is_some() { 0 } else { most * stride });
        let mut products = Aligned::zeros(most * columns * 2);
        // Tiles of the weighted sum read whole rows of queries.
        let mut scores = Aligned::zeros(most * columns + 2 * ROWS);
        let mut sums = Aligned::zeros((count + 8) * rank_width);
        let (mut top, mut mass, mut shrink) =
            (vec![f32::NEG_INFINITY; columns], vec![0.0f32; columns], vec![0.0f32; columns]);
        let sees = call.offsets[group.row] as usize + group.first + 1;
        for k0 in slots.clone().step_by(most) {
            let keys = most.min(slots.end - k0);
            let first = group.row * row + k0;
            let latents: &[f32] = match in_place {
                Some(x) => &x[first * width..(first + keys) * width],
                None => {
                    vectors.widen(first, &mut block[..keys * stride], stride);
                    &block[..keys * stride]
                }
            };
            let sizes = [keys, 2 * columns, width.div_ceil(2)];
            // What is read where it lies comes from memory, too late unless it is asked for a block ahead.
            let next = in_place.map_or(&[][..], |x| {
                let end = (first + keys + most).min(group.row * row + slots.end) * width;
                &x[(first + keys) * width..end]
            });
            let turns = turns_of_pairs::<S>(sizes) + turns_of_either::<S>([count, keys, rank]);
            let mut ahead = Ahead::new(bytemuck::cast_slice(next), turns);
            paired_products(simd, sizes, (latents, stride), mapped, &mut products, &mut ahead);
            if sees >= k0 + keys {
                let state = [&mut top[..], &mut mass[..], &mut shrink[..]];
                weigh(simd, &products, &mut scores, [keys, columns], state);
                for (i, shrink) in shrink.iter().enumerate().take(count).filter(|(_, shrink)| **shrink != 1.0) {
                    scale(&mut sums[i * rank_width..][..rank_width], *shrink);
                }
            } else {
                for i in 0..count {
                    let to = (sees + i / group.heads).saturating_sub(k0).min(keys);
                    let state = (&mut top[i], &mut mass[i]);
                    let shrink = weigh_some(&products, &mut scores, [keys, columns, i], to, state);
                    scale(&mut sums[i * rank_width..][..rank_width], shrink);
                }
            }
            // Rows beyond `count` read what lies there and are not used.
            let weights = Left { data: &scores, rows: 1, inner: columns };
            let extent = |_| Extent { inner: (0, keys), columns: rank };
            add_either(simd, count, weights, (latents, stride), (&mut sums, rank_width), extent, &mut ahead);
        }
        Partial { top, mass, sums, stride: rank_width }
    }
}

/// The score of a key and a query from the two lanes of their product.
#[inline(always)]
fn score(products: &[f32], columns: usize, key: usize, i: usize) -> f32 {
    let at = (key * columns + i) * 2;
    products[at] + products[at + 1]
}

/// Turns products with all queries into weights e^(score − top); `shrink` is by what their earlier sums shrink.
#[inline(always)]
fn weigh<S: Simd>(
    simd: S,
    products: &[f32],
    scores: &mut [f32],
    [keys, columns]: [usize; 2],
    [top, mass, shrink]: [&mut [f32]; 3],
) {
    let (pairs, _) = products[..keys * columns * 2].as_chunks::<LANES>();
    let (sums, _) = scores.as_chunks_mut::<COLUMNS>();
    for (sums, pairs) in sums.iter_mut().zip(pairs) {
        *sums = std::array::from_fn(|i| pairs[2 * i] + pairs[2 * i + 1]);
    }
    // One row of scores is whole vectors, or else two are, of which the second may be one of no key.
    let rows = if columns.is_multiple_of(S::F32_LANES) { 1 } else { 2 };
    let filled = keys.next_multiple_of(rows);
    scores[keys * columns..filled * columns].fill(f32::NEG_INFINITY);
    let (all, _) = S::as_mut_simd_f32s(&mut scores[..filled * columns]);
    let each = rows * columns / S::F32_LANES;
    // What has been found for each place of those rows, and what belongs to the same query.
    let mut found = [0.0; 2 * QUERIES];
    let mut highest = |i: usize, found: &mut [f32]| {
        let highest = found[..rows * columns].iter().skip(i).step_by(columns).fold(top[i], |a, x| a.max(*x));
        shrink[i] = if top[i] == f32::NEG_INFINITY { 0.0 } else { (top[i] - highest).exp() };
        top[i] = highest;
        found[..rows * columns].iter_mut().skip(i).step_by(columns).for_each(|x| *x = highest);
    };
    for at in 0..each {
        let column = all[at..].iter().step_by(each);
        S::as_mut_simd_f32s(&mut found).0[at] =
            column.fold(simd.splat_f32s(f32::NEG_INFINITY), |a, x| simd.max_f32s(*x, a));
    }
    (0..columns).for_each(|i| highest(i, &mut found));
    for at in 0..each {
        let shift = S::as_simd_f32s(&found).0[at];
        let mut sum = simd.splat_f32s(0.0);
        for x in all[at..].iter_mut().step_by(each) {
            *x = exps(simd, simd.sub_f32s(*x, shift));
            sum = simd.add_f32s(sum, *x);
        }
        S::as_mut_simd_f32s(&mut found).0[at] = sum;
    }
    for i in 0..columns {
        mass[i] = mass[i] * shrink[i] + found[..rows * columns].iter().skip(i).step_by(columns).sum::<f32>();
    }
}

/// [`weigh`] for one query that sees the first `to` of the keys.
#[inline(always)]
fn weigh_some(
    products: &[f32],
    scores: &mut [f32],
    [keys, columns, i]: [usize; 3],
    to: usize,
    (top, mass): (&mut f32, &mut f32),
) -> f32 {
    let before = *top;
    for key in 0..to {
        let score = score(products, columns, key, i);
        scores[key * columns + i] = score;
        *top = if score > *top { score } else { *top };
    }
    let shrink = if before == f32::NEG_INFINITY { 0.0 } else { (before - *top).exp() };
    let mut sum = 0.0;
    for key in 0..keys {
        let x = &mut scores[key * columns + i];
        *x = if key < to { exp(*x - *top) } else { 0.0 };
        sum += *x;
    }
    *mass = *mass * shrink + sum;
    shrink
}
