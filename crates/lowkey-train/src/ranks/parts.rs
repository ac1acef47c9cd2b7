//! Numbers of all ranks as parts that lie one after the other.

use std::ops::Range;

use rayon::prelude::*;

use crate::error::Result;

/// Where parts of these lengths begin when they lie one after the other.
pub(super) fn places(lengths: &[usize]) -> impl Iterator<Item = usize> {
    lengths.iter().scan(0, |at, length| {
        let here = *at;
        *at += length;
        Some(here)
    })
}

/// The sum of equal parts that lie one after the other, in their order, in the first of them.
pub(super) fn add_up(parts: &mut [f32], length: usize) {
    let (total, others) = parts.split_at_mut(length);
    for part in others.chunks_exact(length.max(1)) {
        total.par_iter_mut().with_min_len(1 << 14).zip(part).for_each(|(total, x)| *total += x);
    }
}

/// Gathers parts that may be more than `most` numbers in all: at once where they are not, else in pieces. `gather` sends its first
/// argument, and has the pieces of all ranks, whose lengths are the third, in the second. `all` is empty on a rank that receives nothing.
pub(super) fn in_rounds<T: Copy + Default>(
    rank: usize,
    own: &[T],
    all: &mut [T],
    lengths: &[usize],
    most: usize,
    gather: impl Fn(&[T], &mut [T], &[usize]) -> Result<()>,
) -> Result<()> {
    let (at, rounds): (Vec<usize>, _) = (places(lengths).collect(), rounds(lengths, most));
    if let [_] = rounds[..] {
        return gather(own, all, lengths);
    }
    for round in rounds {
        let pieces: Vec<usize> = round.iter().map(ExactSizeIterator::len).collect();
        let mut got = vec![T::default(); if all.is_empty() { 0 } else { pieces.iter().sum() }];
        gather(&own[round[rank].clone()], &mut got, &pieces)?;
        let mut rest = &got[..];
        for (at, piece) in at.iter().zip(&round).take(if all.is_empty() { 0 } else { lengths.len() }) {
            let (first, more) = rest.split_at(piece.len());
            all[at + piece.start..at + piece.end].copy_from_slice(first);
            rest = more;
        }
    }
    Ok(())
}

/// What of each part of these lengths is sent in each of several rounds, of which none has more than `most` numbers in all.
fn rounds(lengths: &[usize], most: usize) -> Vec<Vec<Range<usize>>> {
    let longest = lengths.iter().max().copied().unwrap_or_default();
    let each = if lengths.iter().sum::<usize>() <= most { longest.max(1) } else { (most / lengths.len()).max(1) };
    let round = |i: usize| {
        let piece = |length: &usize| (i * each).min(*length)..((i + 1) * each).min(*length);
        lengths.iter().map(piece).collect()
    };
    (0..longest.div_ceil(each).max(1)).map(round).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_that_are_more_than_is_sent_at_once_go_in_pieces() {
        assert_eq!(rounds(&[3, 0, 4], 7), [[0..3, 0..0, 0..4]]);
        assert_eq!(rounds(&[0, 0], 7), [[0..0, 0..0]]);
        assert_eq!(rounds(&[3, 0, 4], 6), [[0..2, 0..0, 0..2], [2..3, 0..0, 2..4]]);
        for (lengths, most) in [(&[5, 1, 9][..], 4), (&[5, 1, 9], 3), (&[5, 1, 9], 1), (&[100], 33)] {
            let rounds = rounds(lengths, most);
            for (i, length) in lengths.iter().enumerate() {
                let all: Vec<usize> = rounds.iter().flat_map(|round| round[i].clone()).collect();
                assert_eq!(all, (0..*length).collect::<Vec<_>>());
            }
            let largest = rounds.iter().map(|round| round.iter().map(ExactSizeIterator::len).sum::<usize>()).max();
            assert!(largest.unwrap() <= most.max(lengths.len()), "{lengths:?} {most}");
        }
    }

    #[test]
    fn pieces_become_the_whole_again() {
        let lengths = [5, 0, 2, 9];
        let whole: Vec<u64> = (0..16).collect();
        for most in [3, 4, 7, 16, 100] {
            let piece_of = std::cell::Cell::new(0);
            let mut all = vec![0; 16];
            let own = &whole[7..];
            in_rounds(3, own, &mut all, &lengths, most, |own, got, pieces| {
                // What every rank would have sent in this round.
                let done = piece_of.replace(piece_of.get() + pieces[3]);
                assert_eq!(own, &whole[7 + done..7 + done + pieces[3]]);
                let mut at = 0;
                for (rank, (start, length)) in places(&lengths).zip(lengths).enumerate() {
                    let from = start + done.min(length);
                    got[at..at + pieces[rank]].copy_from_slice(&whole[from..from + pieces[rank]]);
                    at += pieces[rank];
                }
                Ok(())
            })
            .unwrap();
            assert_eq!(all, whole, "{most}");
        }
    }

    #[test]
    fn sums_are_taken_in_the_order_of_the_parts() {
        let mut parts = [1e8, 1.0, 1.0, 2.0, -1e8, 3.0];
        add_up(&mut parts, 2);
        assert_eq!(parts[..2], [(1e8 + 1.0) - 1e8, 1.0 + 2.0 + 3.0]);
    }
}
