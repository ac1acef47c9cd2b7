//! Means with intervals, and differences in pairs.

use serde::Serialize;
use statrs::distribution::{ContinuousCDF, StudentsT};

/// A mean over seeds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Mean {
    /// Seeds.
    pub n: usize,
    /// Mean.
    pub mean: f64,
    /// Standard deviation of the sample (n − 1); absent for one seed.
    pub sd: Option<f64>,
    /// Half of the width of Student's interval of the mean; absent for one seed.
    pub half: Option<f64>,
    /// The smallest true difference from 0 that a test at this confidence finds in four of five repetitions: (t_{1−α/2} + t_{0.8})·sd/√n
    /// with n − 1 degrees of freedom. Means something for differences; absent for one seed.
    pub detectable: Option<f64>,
}

impl Mean {
    /// Of a sample, with the interval of that confidence; `None` for an empty one.
    pub fn of(values: &[f64], confidence: f64) -> Option<Self> {
        let n = values.len();
        if n == 0 {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let mut found = Self { n, mean, sd: None, half: None, detectable: None };
        if n > 1 {
            let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
            let sd = (squares / (n - 1) as f64).sqrt();
            found.sd = Some(sd);
            if let Ok(t) = StudentsT::new(0.0, 1.0, (n - 1) as f64) {
                let error = sd / (n as f64).sqrt();
                let wide = t.inverse_cdf(0.5 + confidence / 2.0);
                found.half = Some(wide * error);
                found.detectable = Some((wide + t.inverse_cdf(0.8)) * error);
            }
        }
        Some(found)
    }

    /// The interval, where there is one.
    pub(crate) fn interval(&self) -> Option<(f64, f64)> {
        self.half.map(|half| (self.mean - half, self.mean + half))
    }

    /// The interval of another confidence, where there is one.
    pub(crate) fn interval_at(&self, confidence: f64) -> Option<(f64, f64)> {
        let half =
            StudentsT::new(0.0, 1.0, (self.n - 1) as f64).ok()?.inverse_cdf(0.5 + confidence / 2.0) * self.error()?;
        Some((self.mean - half, self.mean + half))
    }

    /// Standard error.
    fn error(&self) -> Option<f64> {
        Some(self.sd? / (self.n as f64).sqrt())
    }

    /// How probable a mean as high as this, or higher, is where the truth is `value`; absent for one seed.
    fn above(&self, value: f64) -> Option<f64> {
        let error = self.error()?;
        let apart = self.mean - value;
        if error == 0.0 {
            // All seeds agree to the last bit.
            return Some(if apart > 0.0 { 0.0 } else { 1.0 });
        }
        Some(StudentsT::new(0.0, 1.0, (self.n - 1) as f64).ok()?.sf(apart / error))
    }

    /// The same of minus the mean.
    fn mirrored(&self) -> Self {
        Self { mean: -self.mean, ..*self }
    }

    /// p-value of the claim that the truth lies outside of ±`margin`, on the side of the mean: two-sided.
    pub(crate) fn p_outside(&self, margin: f64) -> Option<f64> {
        let (above, below) = (self.above(margin)?, self.mirrored().above(margin)?);
        Some((2.0 * above.min(below)).min(1.0))
    }

    /// p-value of the claim that the truth lies within ±`margin`: two one-sided tests (Schuirmann 1987), of which both have to
    /// hold. At 1 − confidence that is the interval of 2·confidence − 1 within the margin.
    pub(crate) fn p_within(&self, margin: f64) -> Option<f64> {
        let error = self.error()?;
        if error == 0.0 {
            return Some(if self.mean.abs() <= margin { 0.0 } else { 1.0 });
        }
        let from_below = Self { mean: margin - self.mean, ..*self }.above(0.0)?;
        let from_above = Self { mean: margin + self.mean, ..*self }.above(0.0)?;
        Some(from_below.max(from_above))
    }
}

/// p-values of several claims, made larger so that each can be held against the level that *any* of them may be wrong at (Holm
/// 1979): whatever the claims have to do with each other.
pub(crate) fn holm(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|a, b| p[*a].total_cmp(&p[*b]));
    let (mut adjusted, mut largest) = (vec![1.0; p.len()], 0.0f64);
    for (before, i) in order.into_iter().enumerate() {
        largest = largest.max((p.len() - before) as f64 * p[i]).min(1.0);
        adjusted[i] = largest;
    }
    adjusted
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;
    use rand_distr::{Distribution, Normal};

    use super::*;

    fn samples(seed: u64, n: usize, mean: f64, sd: f64) -> impl Iterator<Item = Vec<f64>> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let normal = Normal::new(mean, sd).unwrap();
        std::iter::repeat_with(move || (0..n).map(|_| normal.sample(&mut random)).collect())
    }

    /// What an interval of 95 % is: it holds the truth in 95 % of all draws.
    #[test]
    fn intervals_cover_what_they_say() {
        for (n, confidence) in [(2, 0.95), (5, 0.95), (5, 0.8), (12, 0.99)] {
            let draws = 8000;
            let covered = samples(n as u64, n, 3.0, 0.7)
                .take(draws)
                .filter(|sample| {
                    let (low, high) = Mean::of(sample, confidence).unwrap().interval().unwrap();
                    low <= 3.0 && 3.0 <= high
                })
                .count() as f64;
            let share = covered / draws as f64;
            // Three standard errors of the share itself.
            let error = 3.0 * (confidence * (1.0 - confidence) / draws as f64).sqrt();
            assert!((share - confidence).abs() < error, "n = {n}: {share} for {confidence}");
        }
    }

    /// An effect of the detectable size is found in about four of five draws.
    #[test]
    fn a_detectable_effect_is_detected() {
        let (n, sd) = (8, 0.3);
        let expected = samples(1, n, 0.0, sd).take(4000).map(|s| Mean::of(&s, 0.95).unwrap().detectable.unwrap());
        let effect = expected.sum::<f64>() / 4000.0;
        let found = samples(2, n, effect, sd)
            .take(8000)
            .filter(|sample| Mean::of(sample, 0.95).unwrap().interval().unwrap().0 > 0.0)
            .count();
        let power = found as f64 / 8000.0;
        assert!((0.74..0.84).contains(&power), "{power}");
    }

    #[test]
    fn tests_agree_with_their_intervals() {
        for sample in samples(3, 6, 0.02, 0.05).take(400) {
            let mean = Mean::of(&sample, 0.95).unwrap();
            let (low, high) = mean.interval().unwrap();
            let outside = low > 0.03 || high < -0.03;
            assert_eq!(mean.p_outside(0.03).unwrap() < 0.05, outside, "{mean:?}");
            let (low, high) = mean.interval_at(0.9).unwrap();
            assert_eq!(mean.p_within(0.05).unwrap() < 0.05, low > -0.05 && high < 0.05, "{mean:?}");
        }
        let same = Mean::of(&[0.01, 0.01, 0.01], 0.95).unwrap();
        assert_eq!((same.p_within(0.02), same.p_outside(0.02)), (Some(0.0), Some(1.0)));
        assert_eq!((same.p_within(0.005), same.p_outside(0.005)), (Some(1.0), Some(0.0)));
        let one = Mean::of(&[0.01], 0.95).unwrap();
        assert_eq!((one.p_within(0.02), one.p_outside(0.02), one.interval_at(0.9)), (None, None, None));
    }

    #[test]
    fn the_steps_of_holm_are_known() {
        let close = |a: Vec<f64>, b: [f64; 4]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12);
        assert!(close(holm(&[0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02]));
        assert_eq!(holm(&[0.7]), [0.7]);
        assert!(close(holm(&[1.0, 0.0, 0.9, 1.0]), [1.0, 0.0, 1.0, 1.0]));
    }

    #[test]
    fn known_figures_come_out() {
        let mean = Mean::of(&[1.0, 2.0, 3.0, 4.0, 5.0], 0.95).unwrap();
        assert_eq!((mean.n, mean.mean), (5, 3.0));
        // t_{0.975, 4} = 2.7764, sd = √2.5.
        assert!((mean.half.unwrap() - 2.776_445 * (2.5f64 / 5.0).sqrt()).abs() < 1e-5);
        assert_eq!(Mean::of(&[], 0.95), None);
        let one = Mean::of(&[2.5], 0.95).unwrap();
        assert_eq!((one.mean, one.sd, one.half, one.interval()), (2.5, None, None, None));
    }
}
