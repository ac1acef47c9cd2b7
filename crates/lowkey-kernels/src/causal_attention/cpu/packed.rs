//! The products of an attention's blocks in bf16: operands packed for [`Core`], in place of those laid out for tiles of vectors.

use super::{KEYS, QUERIES, Sight};
use crate::cpu::bf16::{BLOCK, Core, Packed, Side, Window};
use crate::cpu::gemm::View;

/// What a forward pass packs.
pub(super) struct ForwardRoom {
    /// `[qk, keys]`
    keys: Packed,
    /// `[keys, value]`
    values: Packed,
    /// `[QUERIES, qk]`
    queries: Packed,
    /// `[QUERIES, KEYS]`
    weights: Packed,
}

impl ForwardRoom {
    pub(super) fn new() -> Self {
        let [keys, values] = [Side::Right; 2].map(Packed::new);
        let [queries, weights] = [Side::Left; 2].map(Packed::new);
        Self { keys, values, queries, weights }
    }

    /// Packs `count` keys of width `qk`, row by row, and as many values in rows of `stride`.
    pub(super) fn take_keys(&mut self, core: &Core, keys: &[f32], values: (&[f32], usize), sizes: [usize; 3]) {
        let [count, qk, value] = sizes;
        core.pack(View::new(keys, qk).t(), [count, qk], &mut self.keys);
        core.pack(View::new(values.0, values.1), [value, count], &mut self.values);
    }

    /// Scores of a block of queries, `[count, qk]`, with one of keys.
    pub(super) fn scores(
        &mut self,
        core: &Core,
        queries: &[f32],
        [count, qk]: [usize; 2],
        sight: Sight,
        out: &mut [f32],
    ) {
        core.pack(View::new(queries, qk), [count, qk], &mut self.queries);
        scores(core, [&self.queries, &self.keys], qk, count, sight, out);
    }

    /// Adds weighted sums of values to rows of `out`, `stride` apart. Weights beyond what a query sees are zero.
    pub(super) fn sums(
        &mut self,
        core: &Core,
        weights: &[f32],
        [count, value]: [usize; 2],
        sight: Sight,
        out: (&mut [f32], usize),
    ) {
        core.pack(View::new(weights, KEYS), [count, KEYS], &mut self.weights);
        over_keys(core, [&self.weights, &self.values], [count, value], sight, out);
    }
}

/// `out [count, KEYS]` of queries with the keys of a block, as far as a block of queries sees any.
fn scores(core: &Core, operands: [&Packed; 2], inner: usize, count: usize, sight: Sight, out: &mut [f32]) {
    for row in (0..count).step_by(BLOCK) {
        let (_, to) = sight.of_rows(row, BLOCK);
        let window =
            Window { from: [row, sight.k0], count: [BLOCK, to.next_multiple_of(BLOCK)], inner: [0, inner], behind: 0 };
        core.multiply(operands, window, &mut out[row * KEYS..], KEYS, false);
    }
}

/// Adds sums over the keys of a block, row by row of queries.
fn over_keys(core: &Core, operands: [&Packed; 2], [count, width]: [usize; 2], sight: Sight, out: (&mut [f32], usize)) {
    let (out, stride) = out;
    for row in (0..count).step_by(BLOCK) {
        let (from, to) = sight.of_rows(row, BLOCK);
        let rows = BLOCK.min(count - row);
        let window = Window { from: [row, 0], count: [rows, width], inner: [from, to], behind: sight.k0 };
        core.multiply(operands, window, &mut out[row * stride..], stride, true);
    }
}

/// What a backward pass packs.
pub(super) struct BackwardRoom {
    /// `[qk, keys]` and `[value, keys]`
    keys: Packed,
    values: Packed,
    /// `[keys, qk]`
    keys_down: Packed,
    /// `[QUERIES, qk]` and `[QUERIES, value]`, for sums along a query and over queries.
    queries: [Packed; 2],
    d_out: [Packed; 2],
    /// `[QUERIES, KEYS]`, `[KEYS, QUERIES]`
    d_scores: [Packed; 2],
    /// `[KEYS, QUERIES]`
    weights: Packed,
}

impl BackwardRoom {
    pub(super) fn new() -> Self {
        let both = || [Side::Left, Side::Right].map(Packed::new);
        let [keys, values, keys_down] = [Side::Right; 3].map(Packed::new);
        let [weights, along, across] = [Side::Left; 3].map(Packed::new);
        Self { keys, values, keys_down, queries: both(), d_out: both(), d_scores: [along, across], weights }
    }

    /// Packs `count` keys in rows of the first distance, and as many values in rows of the second.
    pub(super) fn take_keys(&mut self, core: &Core, keys: (&[f32], usize), values: (&[f32], usize), sizes: [usize; 3]) {
        let [count, qk, value] = sizes;
        let keys = View::new(keys.0, keys.1);
        core.pack(keys.t(), [count, qk], &mut self.keys);
        core.pack(keys, [qk, count], &mut self.keys_down);
        core.pack(View::new(values.0, values.1).t(), [count, value], &mut self.values);
    }

    /// Packs a block of queries and the gradient of what they got.
    pub(super) fn take_queries(
        &mut self,
        core: &Core,
        queries: (&[f32], usize),
        d_out: (&[f32], usize),
        sizes: [usize; 3],
    ) {
        let [count, qk, value] = sizes;
        for (rows, width, [along, down]) in [(queries, qk, &mut self.queries), (d_out, value, &mut self.d_out)] {
            let rows = View::new(rows.0, rows.1);
            core.pack(rows, [count, width], along);
            core.pack(rows, [width, count], down);
        }
    }

    /// The scores of a block, and the gradients of its weights.
    pub(super) fn scores(&self, core: &Core, sizes: [usize; 3], sight: Sight, [scores_out, d_out]: [&mut [f32]; 2]) {
        let [count, qk, value] = sizes;
        scores(core, [&self.queries[0], &self.keys], qk, count, sight, scores_out);
        scores(core, [&self.d_out[0], &self.values], value, count, sight, d_out);
    }

    /// Adds to the gradients of queries, keys and values, each in rows of some distance, what a block's weights and the gradients of
    /// its scores bring. Both are zero where a query does not see a key.
    pub(super) fn sums(
        &mut self,
        core: &Core,
        [weights, d_scores]: [&[f32]; 2],
        sizes: [usize; 3],
        sight: Sight,
        [d_queries, d_keys, d_values]: [(&mut [f32], usize); 3],
    ) {
        let [count, qk, value] = sizes;
        let [along, across] = &mut self.d_scores;
        let keys = KEYS.min(sight.q0 + count - sight.k0);
        core.pack(View::new(d_scores, KEYS), [count, KEYS], along);
        core.pack(View::new(d_scores, KEYS).t(), [keys, count], across);
        core.pack(View::new(weights, KEYS).t(), [keys, count], &mut self.weights);
        over_keys(core, [along, &self.keys_down], [count, qk], sight, d_queries);
        let across: &Packed = across;
        let of_keys = [(across, &self.queries[1], qk, d_keys), (&self.weights, &self.d_out[1], value, d_values)];
        for (left, right, width, (out, stride)) in of_keys {
            for row in (0..keys).step_by(BLOCK) {
                // The first query that sees the first of these keys.
                let from = (sight.k0 + row).saturating_sub(sight.q0).min(count);
                let rows = BLOCK.min(keys - row);
                let window = Window { from: [row, 0], count: [rows, width], inner: [from, count], behind: 0 };
                core.multiply([left, right], window, &mut out[row * stride..], stride, true);
            }
        }
    }
}

const _: () = assert!(QUERIES.is_multiple_of(BLOCK) && KEYS.is_multiple_of(BLOCK), "blocks are whole");
