//! Random draws of one example, the same on every machine.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

/// Which stream an example comes from. No seed makes one the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// Examples of a run, by the run's seed.
    Train(u64),
    /// The fixed held-out examples.
    Validation,
}

/// The random stream of one example.
pub(super) struct Draw(ChaCha8Rng);

impl Draw {
    /// Example `index` of a corpus with the given seed.
    pub(super) fn new(seed: u64, side: Side, index: u64) -> Self {
        let (label, run) = match side {
            Side::Train(run) => (b"lk-train", run),
            Side::Validation => (b"lk-valid", 0),
        };
        let mut key = [0; 32];
        key[..8].copy_from_slice(label);
        key[8..16].copy_from_slice(&seed.to_le_bytes());
        key[16..24].copy_from_slice(&run.to_le_bytes());
        key[24..].copy_from_slice(&index.to_le_bytes());
        Self(ChaCha8Rng::from_seed(key))
    }

    /// Uniform below `n`. Multiply and shift: off from exact by less than n / 2^64.
    pub(super) fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.0.next_u64()) * n as u128) >> 64) as usize
    }

    /// Uniform in 0 ≤ u < 1.
    pub(super) fn unit(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// `count` different numbers below `n` in random order; all of them where there are fewer.
    pub(super) fn distinct(&mut self, n: usize, count: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..n).collect();
        let count = count.min(n);
        for i in 0..count {
            let j = i + self.below(n - i);
            all.swap(i, j);
        }
        all.truncate(count);
        all
    }

    /// `count` independent standard normal numbers.
    pub(super) fn normals(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| Distribution::<f64>::sample(&StandardNormal, &mut self.0) as f32).collect()
    }
}
