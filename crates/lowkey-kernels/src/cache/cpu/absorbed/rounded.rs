//! The same over latents that are stored in bf16, by a unit that multiplies bf16.
//!
//! Queries and weights are rounded, too, as GPUs have it; sums, the softmax and what is between them stay f32. A block of slots is packed
//! twice, as rows for the scores and as pairs of rows for the sums, which is moving bits alone.

use half::bf16;
use half::slice::HalfFloatSliceExt;
use pulp::{Arch, Simd, WithSimd, bytemuck};

use super::{Call, Group, Partial};
use crate::cpu::bf16::{BLOCK, Core, Packed, Side, Unit, Window};
use crate::cpu::gemm::View;
use crate::cpu::tile::Aligned;
use crate::cpu::vector::{Ahead, Aside, LANES, exps, scale};

/// Slots at a time: few enough that their scores and both their packed forms stay in a core's second cache.
const SLOTS: usize = 256;

/// What stands for the score of a slot that a query does not see: a number, so that a difference of two is one.
const UNSEEN: f32 = -1e30;

/// Queries of a group, row by row, as [`attend`] reads them.
pub(super) fn queries(unit: Unit, rows: &[f32], [count, width]: [usize; 2]) -> Packed {
    let mut packed = Packed::new(Side::Right);
    Core::of(unit).pack(View::new(rows, width).t(), [count, width], &mut packed);
    packed
}

/// What a group's queries gather from some of the slots.
pub(super) fn attend(
    unit: Unit,
    call: &Call,
    group: &Group,
    (queries, latents): (&Packed, &[bf16]),
    slots: std::ops::Range<usize>,
) -> Partial {
    let core = &Core::of(unit);
    let (width, rank) = (call.shape.width(), call.shape.rank);
    let (count, rank_width) = (group.count(), rank.next_multiple_of(BLOCK));
    // Queries beyond the last are zero, and what they get is not used.
    let columns = count.next_multiple_of(LANES);
    let [mut keys, mut values, mut weights] = [Side::Left, Side::Right, Side::Left].map(Packed::new);
    let mut scores = Aligned::zeros(SLOTS * columns);
    let mut sums = Aligned::zeros(columns * rank_width);
    let mut state =
        State { top: vec![f32::NEG_INFINITY; columns], mass: vec![0.0; columns], shrink: vec![0.0; columns] };
    let sees = call.offsets[group.row] as usize + group.first + 1;
    let end = group.row * call.slots.row + slots.end;
    for k0 in slots.clone().step_by(SLOTS) {
        let some = SLOTS.min(slots.end - k0);
        let first = group.row * call.slots.row + k0;
        let block = &latents[first * width..(first + some) * width];
        let next = &latents[(first + some) * width..(first + some + SLOTS).min(end) * width];
        // Those of packing both ways, and of the pass over the scores where vectors have all lanes.
        let turns = keys.turns([some, width]) + values.turns([rank, some]) + some * columns / LANES;
        let ahead = &mut Ahead::new(bytemuck::cast_slice(next.reinterpret_cast()), turns);
        core.take((block, width), [some, width], &mut keys, ahead);
        let window =
            Window { from: [0, 0], count: [some.next_multiple_of(BLOCK), columns], inner: [0, width], behind: 0 };
        core.multiply([&keys, queries], window, &mut scores, columns, false);
        let seen = |i: usize| (sees + i.min(count - 1) / group.heads).saturating_sub(k0).min(some);
        let all = sees >= k0 + some;
        if !all {
            hide(&mut scores, [some, columns], seen, UNSEEN);
        }
        Arch::new().dispatch(Weigh {
            scores: &mut scores,
            sizes: [some, columns],
            state: &mut state,
            ahead: &mut *ahead,
        });
        if !all {
            // Beside the highest that a query sees they have counted for nothing.
            hide(&mut scores, [some, columns], seen, 0.0);
        }
        for (i, shrink) in state.shrink.iter().enumerate().take(count).filter(|(_, shrink)| **shrink != 1.0) {
            scale(&mut sums[i * rank_width..][..rank_width], *shrink);
        }
        core.pack(View::new(&scores, columns).t(), [columns, some], &mut weights);
        core.take((block, width), [rank, some], &mut values, ahead);
        let window = Window { from: [0, 0], count: [columns, rank_width], inner: [0, some], behind: 0 };
        core.multiply([&weights, &values], window, &mut sums, rank_width, true);
    }
    let State { top, mass, .. } = state;
    // Who has seen nothing at all must not look as if he had.
    let top = top.into_iter().map(|top| if top == UNSEEN { f32::NEG_INFINITY } else { top }).collect();
    Partial { top, mass, sums, stride: rank_width }
}

/// Of each query the largest score, the sum of e^(score − top), and by what the last block made earlier sums shrink.
struct State {
    top: Vec<f32>,
    mass: Vec<f32>,
    shrink: Vec<f32>,
}

/// Writes `what` in place of what a query does not see; it sees the first `seen(query)` slots.
fn hide(scores: &mut [f32], [some, columns]: [usize; 2], seen: impl Fn(usize) -> usize, what: f32) {
    for i in 0..columns {
        for slot in seen(i)..some {
            scores[slot * columns + i] = what;
        }
    }
}

/// Turns scores `[some, columns]` into weights e^(score − top).
struct Weigh<'a, 'b> {
    scores: &'a mut [f32],
    sizes: [usize; 2],
    state: &'a mut State,
    ahead: &'a mut Ahead<'b>,
}

impl WithSimd for Weigh<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { scores, sizes: [some, columns], state, ahead } = self;
        let (scores, _) = S::as_mut_simd_f32s(&mut scores[..some * columns]);
        let State { top, mass, shrink } = state;
        let [tops, masses, shrinks] = [top, mass, shrink].map(|numbers| S::as_mut_simd_f32s(numbers).0);
        let each = columns / S::F32_LANES;
        for at in 0..each {
            let column = |slot: usize| slot * each + at;
            let highest = (0..some).fold(tops[at], |highest, slot| simd.max_f32s(scores[column(slot)], highest));
            shrinks[at] = exps(simd, simd.sub_f32s(tops[at], highest));
            tops[at] = highest;
            let mut sum = simd.splat_f32s(0.0);
            for slot in 0..some {
                ahead.turn();
                let x = &mut scores[column(slot)];
                *x = exps(simd, simd.sub_f32s(*x, highest));
                sum = simd.add_f32s(sum, *x);
            }
            masses[at] = simd.mul_add_e_f32s(masses[at], shrinks[at], sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::numbers::{Numbers, Vectors};
    use super::super::{Shape, Slots, forward};
    use super::*;

    /// Numbers from −2 to 2 that bf16 has, others for each seed.
    fn numbers(seed: usize, count: usize) -> Vec<bf16> {
        let mut state = seed as u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 22) as f32 - 2.0
        };
        (0..count).map(|_| bf16::from_f32(next())).collect()
    }

    #[test]
    fn every_unit_attends_as_f32_does_to_the_rounding_of_weights() {
        for (seq, heads, [rope, rank]) in
            [(1, 1, [0, 1]), (1, 16, [16, 128]), (1, 3, [12, 20]), (5, 3, [2, 33]), (1, 70, [3, 64]), (13, 8, [16, 48])]
        {
            for (offsets, capacity) in [(vec![0], 40), (vec![63], 90), (vec![200, 3, 511], 600), (vec![1400], 1500)] {
                let (batch, width) = (offsets.len(), rank + rope);
                let keys = *offsets.iter().max().unwrap() as usize + seq;
                let mut cache = numbers(31 + rank, batch * capacity * width);
                // What nobody sees may be anything.
                for (row, offset) in offsets.iter().enumerate() {
                    let unseen = (row * capacity + *offset as usize + seq) * width..(row + 1) * capacity * width;
                    cache[unseen].fill(bf16::NAN);
                }
                let q: Vec<f32> = numbers(32 + heads, batch * seq * heads * width).iter().map(|x| x.to_f32()).collect();
                let shape = Shape { seq, heads, nope: 0, rope, value: 0, rank, scale: 0.25 };
                let vectors = Vectors { numbers: Numbers::Bf16(&cache), width };
                let slots = Slots { vectors, keys, row: capacity };
                let run = |unit: Option<Unit>, threads: usize| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    let mut out = vec![f32::NAN; batch * seq * heads * rank];
                    pool.install(|| forward(shape, &q, slots, None, &offsets, unit, &mut out));
                    out
                };
                let expected = run(None, 1);
                for unit in Unit::all() {
                    for threads in [1, 2, 5] {
                        for (found, expected) in run(Some(unit), threads).iter().zip(&expected) {
                            // Half a unit of 8 bits of each weight, of numbers below 2.
                            let off = (found - expected).abs();
                            assert!(off <= 4.1e-3, "{unit:?}, {threads}, {seq} {heads} {rank} {offsets:?}: {off}");
                        }
                    }
                }
            }
        }
    }
}
