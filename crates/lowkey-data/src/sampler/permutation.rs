//! A keyed permutation of 0..n without a table.
//!
//! A Feistel network permutes the smallest even-sized power of two that holds n; a result past n is fed back until it
//! falls inside (cycle walking), which keeps it a bijection. Any index costs a few mixes, so an epoch of a billion
//! windows needs no memory and no shuffle, and nothing about it depends on the version of a random number crate.

/// Enough rounds that a handful of elements already looks shuffled.
const ROUNDS: usize = 8;

/// A permutation of `0..size` chosen by a key.
#[derive(Debug, Clone)]
pub(super) struct Permutation {
    size: u64,
    half_bits: u32,
    keys: [u64; ROUNDS],
}

impl Permutation {
    pub(super) fn new(size: u64, key: u64) -> Self {
        let bits = u64::BITS - size.saturating_sub(1).leading_zeros();
        let mut keys = [0; ROUNDS];
        for (round, slot) in (0u64..).zip(&mut keys) {
            *slot = mix(key ^ mix(round));
        }
        Self { size, half_bits: bits.div_ceil(2).max(1), keys }
    }

    /// The image of `index`, which must be below `size`.
    pub(super) fn apply(&self, index: u64) -> u64 {
        let mut value = index;
        loop {
            value = self.network(value);
            // An index outside has no cycle through the inside to be sure of: let it out.
            if value < self.size || index >= self.size {
                return value;
            }
        }
    }

    fn network(&self, value: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        (left << self.half_bits) | right
    }
}

/// SplitMix64's finaliser: every input bit reaches every output bit.
pub(crate) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_bijection_for_every_size() {
        for size in (1..130).chain([255, 256, 257, 1000, 4097]) {
            for key in [0, 1, 0xDEAD_BEEF] {
                let permutation = Permutation::new(size, key);
                let mut seen: Vec<u64> = (0..size).map(|i| permutation.apply(i)).collect();
                seen.sort_unstable();
                assert!(seen.into_iter().eq(0..size), "size {size}, key {key}");
            }
        }
    }

    #[test]
    fn keys_give_different_orders_and_positions_spread() {
        let order = |key| -> Vec<u64> {
            let permutation = Permutation::new(1000, key);
            (0..1000).map(|i| permutation.apply(i)).collect()
        };
        assert_eq!(order(7), order(7));
        let agree = order(1).iter().zip(order(2)).filter(|(a, b)| *a == b).count();
        assert!(agree < 12, "{agree} of 1000 positions agree, where chance gives about 1");
        // Where element 0 lands over many keys is uniform: chi-square over 10 bins of 100 expected each.
        let mut bins = [0f64; 10];
        for key in 0..1000 {
            bins[(Permutation::new(50, mix(key)).apply(0) / 5) as usize] += 1.0;
        }
        let chi: f64 = bins.iter().map(|n| (n - 100.0).powi(2) / 100.0).sum();
        assert!(chi < 27.9, "chi-square {chi} has a chance below 0.001");
    }

    #[test]
    fn large_sizes_do_not_overflow() {
        for size in [u64::from(u32::MAX) + 5, 1 << 62, (1 << 62) + 1, u64::MAX] {
            let permutation = Permutation::new(size, 3);
            let image: Vec<u64> = [0, 1, size / 2, size - 1].iter().map(|&i| permutation.apply(i)).collect();
            assert!(image.iter().all(|&i| i < size));
            assert!(image.iter().enumerate().all(|(i, a)| !image[..i].contains(a)), "{image:?}");
        }
    }
}
