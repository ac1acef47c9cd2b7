//! Rows that are read or written after the products under way: asked for while these are computed.
//!
//! A head's numbers of a token are a few lines of memory, and those of the next token lie a kilobyte or two further on, which no processor
//! guesses. Products of blocks that a core holds leave memory idle, so that asking costs nothing.

use std::ops::Range;

use super::forward::{Keys, Reads, Sizes};
use super::{Dims, Inputs, QUERIES, Rows, Saved};
use crate::cpu::parts::Parts;
use crate::cpu::vector::{Aside, LINE, ask_for};

/// Turns of a product for each line. A turn is some twelve cycles of a core, so that all cores together stay below what memory gives.
const TURNS: usize = 2;

/// Tensors of which rows are asked for at a time, at most.
const TENSORS: usize = 6;

/// Lines of rows of some tensors, one after the other.
pub(super) struct RowsAhead {
    tensors: [Lines; TENSORS],
    /// Tensors that there are, and the one whose turn it is.
    count: usize,
    current: usize,
    /// Turns until a line is asked for; where there is none, more than will ever pass.
    wait: usize,
}

/// Lines of rows of one tensor, in bytes.
#[derive(Clone, Copy)]
struct Lines {
    row: *const u8,
    stride: usize,
    width: usize,
    /// Rows that are left, and how far the line whose turn it is lies behind the first of its row.
    left: usize,
    next: usize,
}

impl RowsAhead {
    pub(super) fn nothing() -> Self {
        let none = Lines { row: std::ptr::null(), stride: 0, width: 0, left: 0, next: 0 };
        Self { tensors: [none; TENSORS], count: 0, current: 0, wait: usize::MAX }
    }

    /// What a forward pass needs once a head's queries `some` of `from..to` are done with: the next queries, where this block's outputs
    /// belong, and a share of the next head's keys and values.
    pub(super) fn forward(
        sizes: Sizes,
        reads: Reads,
        out: &Parts,
        [row, head]: [usize; 2],
        some: Range<usize>,
        to: usize,
    ) -> Self {
        let Sizes { batch, seq, keys, heads, groups, own, value, .. } = sizes;
        let mut ahead = Self::nothing();
        let Keys::Given { own: given, values, .. } = reads.keys else {
            return ahead;
        };
        let next = following([row, head], [batch, heads]);
        if let Some((place, first)) = queries_after([row, head], some.end, to, next) {
            ahead.read(reads.q.rows(place, sizes.qk(), seq), first..(first + QUERIES).min(seq));
        }
        ahead.written(out, ((row * seq + some.start) * heads + head) * value, [some.len(), value], heads * value);
        if let Some([row, head]) = next {
            let place = [row, head / (heads / groups)];
            ahead.read(given.rows(place, own, keys), some.clone());
            ahead.read(values.rows(place, value, keys), some);
        }
        ahead
    }

    /// What a backward pass needs once a head's queries `some` are done with: the next queries, with what belongs to them, where the
    /// gradients `d_q` of these belong, and, beside the last head of a group, a share of where `d_kv` belongs and of the next group's
    /// keys and values.
    pub(super) fn backward(
        dims: Dims,
        inputs: Inputs,
        saved: Saved,
        [d_q, d_kv]: [&Parts; 2],
        [row, head]: [usize; 2],
        some: Range<usize>,
    ) -> Self {
        let ([q, kv, _], [q_stride, kv_stride, _]) = (dims.offsets(row, head), dims.strides());
        let mut ahead = Self::nothing();
        let next = following([row, head], [dims.batch, dims.heads]);
        if let Some((place, first)) = queries_after([row, head], some.end, dims.seq, next) {
            for rows in dims.of_queries(inputs, saved, place) {
                ahead.read(rows, first..(first + QUERIES).min(dims.seq));
            }
        }
        ahead.written(d_q, q + some.start * q_stride, [some.len(), dims.qk()], q_stride);
        if (head + 1).is_multiple_of(dims.heads / dims.groups) {
            let own = dims.nope + dims.value;
            ahead.written(d_kv, kv + some.start * kv_stride, [some.len(), own], kv_stride);
            if let Some(next) = next {
                ahead.read(dims.own(inputs, next, 0..own), some);
            }
        }
        ahead
    }

    fn read(&mut self, rows: Rows, some: Range<usize>) {
        let some = some.start.min(rows.count)..some.end.min(rows.count);
        self.add(rows.data.as_ptr().wrapping_add(some.start * rows.stride), [some.len(), rows.width], rows.stride);
    }

    fn written(&mut self, out: &Parts, at: usize, sizes: [usize; 2], stride: usize) {
        self.add(out.rows(at, sizes, stride), sizes, stride);
    }

    /// Nothing is read there.
    fn add(&mut self, first: *const f32, [count, width]: [usize; 2], stride: usize) {
        if count > 0 && width > 0 {
            let [stride, width] = [stride, width].map(|numbers| numbers * size_of::<f32>());
            self.tensors[self.count] = Lines { row: first.cast(), stride, width, left: count, next: 0 };
            self.count += 1;
            self.wait = TURNS;
        }
    }

    #[inline(always)]
    fn next_line(&mut self) -> Option<*const u8> {
        let lines = self.tensors[..self.count].get_mut(self.current)?;
        let before = lines.row.addr() % LINE;
        let line = lines.row.wrapping_sub(before).wrapping_add(lines.next);
        lines.next += LINE;
        if lines.next >= before + lines.width {
            (lines.row, lines.next) = (lines.row.wrapping_add(lines.stride), 0);
            lines.left -= 1;
            self.current += usize::from(lines.left == 0);
        }
        Some(line)
    }
}

impl Aside for RowsAhead {
    #[inline(always)]
    fn turn(&mut self) {
        self.wait -= 1;
        if self.wait == 0 {
            self.wait = self.next_line().map_or(usize::MAX, |line| {
                ask_for(line);
                TURNS
            });
        }
    }
}

/// The head that is computed after one, most often by the same thread.
fn following([row, head]: [usize; 2], [batch, heads]: [usize; 2]) -> Option<[usize; 2]> {
    match head + 1 {
        next if next < heads => Some([row, next]),
        _ if row + 1 < batch => Some([row + 1, 0]),
        _ => None,
    }
}

/// Head and first query of the block that is computed after one that ends at `end`, where the head's queries end at `to`.
fn queries_after(place: [usize; 2], end: usize, to: usize, next: Option<[usize; 2]>) -> Option<([usize; 2], usize)> {
    if end < to { Some((place, end)) } else { next.map(|next| (next, 0)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_line_of_the_rows_is_asked_for_once_and_no_other() {
        let data = vec![0.0f32; 4000];
        for (at, stride, width, some) in [(0, 64, 16, 0..5), (3, 100, 37, 2..9), (5, 17, 17, 0..1), (1, 48, 0, 0..4)] {
            let rows = Rows { data: &data[at..], stride, width, count: 8 };
            let mut ahead = RowsAhead::nothing();
            ahead.read(rows, some.clone());
            ahead.read(rows, 0..0);
            ahead.add(data[3000..].as_ptr(), [3, 20], 200);
            let numbers = (some.start..some.end.min(8)).flat_map(|row| (0..width).map(move |i| at + row * stride + i));
            let numbers = numbers.chain((0..3).flat_map(|row| (0..20).map(move |i| 3000 + row * 200 + i)));
            let expected: BTreeSet<usize> = numbers.map(|i| (&raw const data[i]).addr() / LINE).collect();
            let found: Vec<usize> = std::iter::from_fn(|| ahead.next_line()).map(|line| line.addr() / LINE).collect();
            assert_eq!(found.iter().copied().collect::<BTreeSet<_>>(), expected, "{at} {stride} {width}");
            // Rows that follow one another may share a line.
            assert!(found.len() <= expected.len() + some.len());
        }
    }

    #[test]
    fn heads_follow_one_another_through_all_rows() {
        let all: Vec<_> = std::iter::successors(Some([0, 0]), |place| following(*place, [2, 3])).collect();
        assert_eq!(all, [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]);
    }
}
