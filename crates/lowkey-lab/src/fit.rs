//! The curve of a loss over a rank, L(r) = L∞ + a·r^−α, with what seeds leave uncertain of it.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

/// Resamples of the seeds.
const RESAMPLES: usize = 400;

/// Fewer seeds than this, drawn anew, say next to nothing of what others would do.
const LEAST_SEEDS: usize = 3;

/// Exponents that are tried, from this to 2^6 times it, in steps of 2^(1/16).
const LEAST_EXPONENT: f64 = 0.0625;
const EXPONENTS: i32 = 6 * 16;

/// A fitted power law, with 95 % intervals from a bootstrap over three seeds or more.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PowerLaw {
    /// L∞, the loss that no rank goes below.
    pub floor: f64,
    /// a, what rank 1 costs above it.
    pub factor: f64,
    /// α.
    pub exponent: f64,
    /// Seeds that it was fitted to.
    pub seeds: usize,
    /// Interval of L∞; absent for fewer than three seeds, and where many a resample follows no law.
    pub floor_interval: Option<(f64, f64)>,
    /// Interval of α, where that of L∞ is there.
    pub exponent_interval: Option<(f64, f64)>,
}

impl PowerLaw {
    /// Fits the means over seeds by least squares; `losses[seed][i]` belongs to `ranks[i]`, the same seeds at all ranks. `None` for
    /// fewer than four ranks, which three parameters fit exactly, where the loss does not fall with the rank, or where the best
    /// exponent is the first or the last of those that are tried, so that better ones may lie beyond.
    pub fn of(ranks: &[f64], losses: &[Vec<f64>]) -> Option<Self> {
        if ranks.len() < 4 || losses.is_empty() || ranks.iter().any(|rank| *rank <= 0.0) {
            return None;
        }
        let mean = |chosen: &[usize]| -> Vec<f64> {
            let sum = |i: usize| chosen.iter().filter_map(|seed| losses.get(*seed)?.get(i)).sum::<f64>();
            (0..ranks.len()).map(|i| sum(i) / chosen.len() as f64).collect()
        };
        let all: Vec<usize> = (0..losses.len()).collect();
        let [floor, factor, exponent] = fit(ranks, &mean(&all))?;
        if exponent <= tried(0) || exponent >= tried(EXPONENTS) {
            return None;
        }
        let law = |floor_interval, exponent_interval| Self {
            floor,
            factor,
            exponent,
            seeds: losses.len(),
            floor_interval,
            exponent_interval,
        };
        if losses.len() < LEAST_SEEDS {
            return Some(law(None, None));
        }
        let mut random = ChaCha8Rng::seed_from_u64(0);
        let resampled: Vec<[f64; 3]> = (0..RESAMPLES)
            .filter_map(|_| {
                let chosen: Vec<usize> = all.iter().map(|_| random.random_range(0..losses.len())).collect();
                fit(ranks, &mean(&chosen))
            })
            .collect();
        let interval = |part: usize| {
            // What follows no law lies outside of any interval, and nobody knows on which side.
            if (resampled.len() as f64) < 0.95 * RESAMPLES as f64 {
                return None;
            }
            let mut values: Vec<f64> = resampled.iter().map(|found| found[part]).collect();
            values.sort_by(f64::total_cmp);
            let at = |share: f64| values.get((values.len() as f64 * share) as usize).copied();
            Some((at(0.025)?, at(0.975)?))
        };
        Some(law(interval(0), interval(2)))
    }

    /// L(r).
    pub fn at(&self, rank: f64) -> f64 {
        self.floor + self.factor * rank.powf(-self.exponent)
    }
}

/// An exponent of those that are tried.
fn tried(step: i32) -> f64 {
    LEAST_EXPONENT * 2f64.powf(f64::from(step) / 16.0)
}

/// L∞, a and α of least squares: for each α the other two are a straight line's.
fn fit(ranks: &[f64], losses: &[f64]) -> Option<[f64; 3]> {
    let n = ranks.len() as f64;
    let mean_loss = losses.iter().sum::<f64>() / n;
    let mut best: Option<(f64, [f64; 3])> = None;
    for step in 0..=EXPONENTS {
        let exponent = tried(step);
        let powers: Vec<f64> = ranks.iter().map(|rank| rank.powf(-exponent)).collect();
        let mean_power = powers.iter().sum::<f64>() / n;
        let (mut both, mut square) = (0.0, 0.0);
        for (power, loss) in powers.iter().zip(losses) {
            both += (power - mean_power) * (loss - mean_loss);
            square += (power - mean_power).powi(2);
        }
        let factor = both / square;
        let floor = mean_loss - factor * mean_power;
        let error: f64 = powers.iter().zip(losses).map(|(power, loss)| (floor + factor * power - loss).powi(2)).sum();
        if factor > 0.0 && error.is_finite() && best.is_none_or(|(least, _)| error < least) {
            best = Some((error, [floor, factor, exponent]));
        }
    }
    best.map(|(_, found)| found)
}

#[cfg(test)]
mod tests {
    use rand_distr::{Distribution, Normal};

    use super::*;

    #[test]
    fn a_planted_law_is_found_and_its_interval_holds_it() {
        let ranks = [4.0, 8.0, 16.0, 32.0, 64.0];
        let law = |rank: f64| 0.3 + 0.5 * rank.powf(-0.5);
        let exact: Vec<f64> = ranks.iter().map(|rank| law(*rank)).collect();
        let found = PowerLaw::of(&ranks, &[exact]).unwrap();
        assert!((found.exponent - 0.5).abs() < 0.011 && (found.floor - 0.3).abs() < 0.003, "{found:?}");
        assert!(ranks.iter().all(|rank| (found.at(*rank) - law(*rank)).abs() < 1e-3));

        let noise = Normal::new(0.0, 2e-3).unwrap();
        let mut random = ChaCha8Rng::seed_from_u64(5);
        let held = (0..60)
            .filter(|_| {
                let mut seed = || ranks.iter().map(|rank| law(*rank) + noise.sample(&mut random)).collect::<Vec<f64>>();
                let losses: Vec<Vec<f64>> = (0..8).map(|_| seed()).collect();
                let (low, high) = PowerLaw::of(&ranks, &losses).unwrap().exponent_interval.unwrap();
                low <= 0.5 + 0.01 && 0.5 - 0.01 <= high
            })
            .count();
        // A bootstrap over eight seeds holds somewhat less than 95 %.
        assert!(held >= 48, "{held} of 60");
    }

    #[test]
    fn one_seed_gives_no_interval() {
        let ranks = [4.0, 8.0, 16.0, 32.0];
        let losses =
            |seed: u64| -> Vec<f64> { ranks.iter().map(|r: &f64| 0.3 + r.powf(-0.5) + 1e-3 * seed as f64).collect() };
        for seeds in 1..=2 {
            let law = PowerLaw::of(&ranks, &(0..seeds).map(losses).collect::<Vec<_>>()).unwrap();
            assert_eq!((law.seeds, law.floor_interval, law.exponent_interval), (seeds as usize, None, None));
        }
        let law = PowerLaw::of(&ranks, &(0..3).map(losses).collect::<Vec<_>>()).unwrap();
        assert!(law.floor_interval.is_some_and(|(low, high)| low < law.floor && law.floor < high), "{law:?}");
    }

    #[test]
    fn what_does_not_fall_or_is_too_short_has_no_law() {
        assert_eq!(PowerLaw::of(&[1.0, 2.0, 3.0], &[vec![3.0, 2.0, 1.0]]), None);
        assert_eq!(PowerLaw::of(&[1.0, 2.0, 3.0, 4.0], &[]), None);
        assert_eq!(PowerLaw::of(&[1.0, 2.0, 4.0, 8.0], &[vec![1.0, 2.0, 3.0, 4.0]]), None);
        // A cliff, which the steepest exponent that is tried fits best and no exponent well.
        assert_eq!(PowerLaw::of(&[8.0, 12.0, 16.0, 20.0], &[vec![0.34, 0.001, 0.0009, 0.0008]]), None);
    }
}
