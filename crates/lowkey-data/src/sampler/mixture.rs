//! Rows of several datasets in fixed shares.

use lowkey_batch::Batch;

use super::{Sampler, mix};
use crate::error::{Error, Result};

/// Fractions are counted in these parts of one: exact whole numbers, on every machine the same.
const ONE: u128 = 1 << 32;

/// Cuts training batches from several datasets.
///
/// Which one a row comes from, and which of its rows that is, is computed from the seed and the row's number alone. Of any number of first
/// rows a dataset has its share, give or take a row or two, and its own rows come one after the other, none left out.
pub struct Mixture {
    parts: Vec<Sampler>,
    shares: Shares,
    /// Rows that belong together: 2 of pairs, else 1.
    unit: u64,
}

/// Deals numbers 0, 1, … to several, in fixed shares.
#[derive(Debug)]
struct Shares {
    /// For each but the first: its share of what is left to it and those before it, and where its count begins, both in parts of
    /// [`ONE`].
    levels: Vec<(u128, u128)>,
}

impl Shares {
    fn new(weights: &[f64], seed: u64) -> Self {
        let mut sum = weights.first().copied().unwrap_or(0.0);
        let levels = (1u64..).zip(weights.iter().skip(1)).map(|(level, weight)| {
            sum += weight;
            let share = (weight / sum * ONE as f64).round() as u128;
            (share.min(ONE), u128::from(mix(mix(seed) ^ level)) % ONE)
        });
        Self { levels: levels.collect() }
    }

    /// Whose a number is, and how many before it are of the same.
    fn deal(&self, number: u64) -> (usize, u64) {
        let mut left = u128::from(number);
        for (i, (share, phase)) in self.levels.iter().enumerate().rev() {
            // The first `n` numbers have this many of it: steps of a line that rises by its share.
            let count = |n: u128| (share * n + phase) / ONE;
            let before = count(left);
            if count(left + 1) > before {
                return (i + 1, before as u64);
            }
            left -= before;
        }
        (0, left as u64)
    }

    /// How many of the first `number` numbers each has.
    fn counts(&self, number: u64) -> Vec<u64> {
        let mut left = u128::from(number);
        let mut counts: Vec<u64> = self
            .levels
            .iter()
            .rev()
            .map(|(share, phase)| {
                let count = (share * left + phase) / ONE;
                left -= count;
                count as u64
            })
            .collect();
        counts.push(left as u64);
        counts.reverse();
        counts
    }
}

impl Mixture {
    /// A mixture of `parts`, all for rows of one length and for batches of one size, with the weight of each.
    ///
    /// # Errors
    /// [`Error::Sampler`] where some rows are pairs and others are not.
    pub fn new(parts: Vec<Sampler>, weights: &[f64], seed: u64) -> Result<Self> {
        let pairs = parts.first().is_some_and(Sampler::is_pairs);
        if let Some(other) = parts.iter().find(|part| part.is_pairs() != pairs) {
            let message = "pairs of answers cannot be mixed with anything else".to_owned();
            return Err(Error::Sampler { path: other.shard.path().to_path_buf(), message });
        }
        Ok(Self { shares: Shares::new(weights, seed), unit: if pairs { 2 } else { 1 }, parts })
    }

    /// The batch of a step: rows `step * batch_size` and on.
    ///
    /// # Errors
    /// As [`Sampler::batch`].
    pub fn batch(&self, step: u64) -> Result<Batch> {
        let size = self.batch_size();
        self.rows(step.saturating_mul(size as u64), size)
    }

    /// `count` consecutive rows from number `first` on.
    ///
    /// # Errors
    /// As [`Sampler::batch`].
    pub fn rows(&self, first: u64, count: usize) -> Result<Batch> {
        let seq_len = self.parts.first().map_or(0, |part| part.seq_len);
        let mut batch = Batch { pairs: self.unit == 2, ..Batch::with_capacity(seq_len, count) };
        for row in (0..count as u64).map(|i| first.saturating_add(i)) {
            let (part, own) = self.deal(row);
            self.parts[part].append(own, &mut batch)?;
        }
        Ok(batch)
    }

    /// Which dataset a row comes from, and which of its rows that is.
    pub fn deal(&self, row: u64) -> (usize, u64) {
        let (part, own) = self.shares.deal(row / self.unit);
        (part, own * self.unit + row % self.unit)
    }

    /// How many epochs of the dataset that has been seen most often have been seen before `step`.
    pub fn epoch(&self, step: u64) -> f64 {
        let rows = step.saturating_mul(self.batch_size() as u64);
        let seen = self.shares.counts(rows / self.unit);
        let epochs = self.parts.iter().zip(seen).map(|(part, seen)| part.epoch_at(seen * self.unit));
        epochs.fold(0.0, f64::max)
    }

    /// The samplers of the datasets.
    pub fn parts(&self) -> &[Sampler] {
        &self.parts
    }

    fn batch_size(&self) -> usize {
        self.parts.first().map_or(0, |part| part.batch_size)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::{Packing, TooLong};
    use super::*;
    use crate::shard::tests::{masked_shard, shard_of};

    #[test]
    fn shares_are_exact_over_any_number_of_rows() {
        for weights in [&[0.7, 0.3][..], &[1.0, 1.0, 2.0], &[0.01, 0.5, 0.25, 0.24], &[3.0]] {
            let shares = Shares::new(weights, 5);
            let sum: f64 = weights.iter().sum();
            let mut counts = vec![0u64; weights.len()];
            for number in 0..20_000u64 {
                assert_eq!(shares.counts(number), counts);
                let (part, own) = shares.deal(number);
                assert_eq!(own, counts[part], "the rows of a dataset come one after the other");
                counts[part] += 1;
                for (weight, count) in weights.iter().zip(&counts) {
                    let expected = weight / sum * (number + 1) as f64;
                    assert!((*count as f64 - expected).abs() < 2.0, "{weights:?}: {counts:?} of {}", number + 1);
                }
            }
        }
        let far = Shares::new(&[0.7, 0.3], 5).deal(1 << 60);
        assert!((far.1 as f64 / (1u64 << 60) as f64 - [0.7, 0.3][far.0]).abs() < 1e-8);
    }

    fn parts() -> (Vec<tempfile::TempDir>, Vec<Sampler>) {
        let plain = shard_of(&(0..9).map(|i| vec![100 + i; 7]).collect::<Vec<_>>(), 1000);
        let records: Vec<_> =
            (0..5u32).map(|i| (vec![200 + i; 6], vec![false, false, false, true, true, true])).collect();
        let records = masked_shard(&records, false);
        let first = Sampler::new(Arc::new(plain.1), 12, 4, 1, Packing::Documents, true).unwrap();
        let second = Sampler::of_records(Arc::new(records.1), 12, 4, 2, TooLong::Drop, true).unwrap();
        (vec![plain.0, records.0], vec![first, second])
    }

    #[test]
    fn a_mixture_is_a_pure_function_of_the_row_and_goes_on_where_it_was() {
        let (_dirs, first) = parts();
        let (_other_dirs, second) = parts();
        let (first, second) =
            (Mixture::new(first, &[0.5, 0.5], 3).unwrap(), Mixture::new(second, &[0.5, 0.5], 3).unwrap());
        let forward: Vec<Batch> = (0..20).map(|step| first.batch(step).unwrap()).collect();
        let mut backward: Vec<Batch> = (0..20).rev().map(|step| second.batch(step).unwrap()).collect();
        backward.reverse();
        assert!(forward == backward);
        let rows: Vec<u32> = forward.iter().flat_map(|batch| batch.input_ids.chunks(12).map(|row| row[0])).collect();
        let records = rows.iter().filter(|id| **id >= 200).count();
        assert!((39..=41).contains(&records), "{records} of 80");
        assert!(rows.chunks(4).all(|batch| batch.iter().filter(|id| **id >= 200).count() == 2));
        assert!(first.epoch(20) > 5.0 && first.epoch(0) == 0.0);
    }

    #[test]
    fn pairs_stay_together_in_a_mixture_and_are_mixed_with_nothing_else() {
        let pairs = |base: u32| {
            let documents: Vec<_> = (0..6u32).map(|i| (vec![base + i; 4], vec![false, false, true, true])).collect();
            let (dir, shard) = masked_shard(&documents, true);
            (dir, Sampler::of_records(Arc::new(shard), 8, 6, 1, TooLong::Drop, true).unwrap())
        };
        let ((_a, first), (_b, second)) = (pairs(100), pairs(200));
        let mixture = Mixture::new(vec![first, second], &[2.0, 1.0], 3).unwrap();
        for step in 0..10 {
            let batch = mixture.batch(step).unwrap();
            assert!(batch.pairs);
            for pair in batch.input_ids.chunks(16) {
                assert_eq!((pair[0] % 2, pair[8]), (0, pair[0] + 1));
            }
        }
        let (_dirs, mut other) = parts();
        other.push(pairs(100).1);
        assert!(Mixture::new(other, &[1.0; 3], 0).map(|_| ()).unwrap_err().to_string().contains("cannot be mixed"));
    }
}
