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
    pub fn interval(&self) -> Option<(f64, f64)> {
        self.half.map(|half| (self.mean - half, self.mean + half))
    }
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
