//! Which ranks a step trains besides the whole one.
//!
//! The sandwich rule of slimmable networks (Yu & Huang, arXiv 1903.05134, section 3.1): every step trains the widest and the
//! narrowest, which bound all others, and draws from those between. A step costs as many passes however many ranks there are
//! ([`lowkey_model::ModelConfig::train_passes`]).

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The ranks of a step's further passes: of `ranks`, ascending, the first and one of the others. The same for the same seed and
/// step, so that a resumed run draws what the uninterrupted one does.
pub(crate) fn narrow_ranks(ranks: &[usize], seed: u64, step: u64) -> Vec<usize> {
    let Some((narrowest, between)) = ranks.split_first() else { return Vec::new() };
    let mut drawn = vec![*narrowest];
    if !between.is_empty() {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        random.set_stream(step);
        drawn.push(between[random.random_range(0..between.len())]);
    }
    drawn
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_has_its_turn_and_the_narrowest_each() {
        assert!(narrow_ranks(&[], 3, 0).is_empty());
        assert_eq!(narrow_ranks(&[4], 3, 9), [4]);
        assert_eq!(narrow_ranks(&[4, 8], 3, 9), [4, 8]);
        let ranks = [2, 4, 8, 16];
        let mut counts = [0; 3];
        for step in 0..600 {
            let drawn = narrow_ranks(&ranks, 7, step);
            assert_eq!((drawn.len(), drawn[0]), (2, 2));
            assert_eq!(drawn, narrow_ranks(&ranks, 7, step));
            counts[ranks.iter().position(|rank| *rank == drawn[1]).unwrap() - 1] += 1;
        }
        // Four standard deviations of a third of 600.
        assert!(counts.iter().all(|count| (154..=246).contains(count)), "{counts:?}");
    }
}
