//! Dropout of adapters (arXiv 1207.0580): in training an adapter reads each number of a token with a chance of 1 − p, and then 1/(1 − p)
//! times as large.
//!
//! What is left out is a function of seed, step, map, row of the step's batch and position, and of nothing else: a resumed run, another
//! share of rows or threads and a block that is computed twice leave out the same.

use burn::tensor::{DType, Device, Tensor, TensorData};
use rand::RngExt;

use crate::init::stream;

/// What tells the draws of one pass from those of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draws {
    /// Seed of the run.
    pub seed: u64,
    /// Steps before this one.
    pub step: u64,
    /// Where in the step's batch the rows of the pass begin.
    pub first_row: usize,
}

/// The dropout of one map, in force while a pass trains.
#[derive(Clone, Debug)]
pub(super) struct Dropout {
    /// Of 2¹⁶ draws so many leave a number out.
    out_of: u32,
    /// The map's own.
    key: u64,
    /// The pass's; none where nothing is trained.
    draws: Option<Draws>,
}

impl Dropout {
    /// With a chance of `p` below 1, for the map of that name.
    pub(super) fn new(p: f64, module: &str) -> Self {
        let all = f64::from(1u32 << 16);
        // A chance that rounds to all would divide by nothing.
        let out_of = (p * all).round().min(all - 1.0) as u32;
        Self { out_of, key: stream(0, module).random(), draws: None }
    }

    /// From now on the numbers that `draws` says are left out; with none, nothing is.
    pub(super) fn set(&mut self, draws: Option<Draws>) {
        self.draws = draws.filter(|_| self.out_of > 0);
    }

    /// Whether something is left out now.
    pub(super) fn is_on(&self) -> bool {
        self.draws.is_some()
    }

    /// `[batch, seq, d]` with what is left out as zeros.
    pub(super) fn of_tokens(&self, x: Tensor<3>) -> Tensor<3> {
        let Some(Draws { seed, step, first_row }) = self.draws else { return x };
        let ([batch, seq, width], base) = (x.dims(), self.base(seed, step));
        let places = (0..batch).flat_map(|row| (0..seq).map(move |at| (first_row + row, at)));
        let factors = places.flat_map(|(row, at)| self.factors(mixed(mixed(base ^ row as u64) ^ at as u64), width));
        let factors = TensorData::new(factors.collect(), [batch, seq, width]);
        x.clone() * of_data(factors, &x.device(), x.dtype())
    }

    /// A matrix `[d_out, d_in]` with the columns of what is left out of every token as zeros.
    pub(super) fn of_columns(&self, matrix: Tensor<2>) -> Tensor<2> {
        let Some(Draws { seed, step, .. }) = self.draws else { return matrix };
        let [_, width] = matrix.dims();
        let factors = self.factors(mixed(!self.base(seed, step)), width).collect();
        matrix.clone() * of_data(TensorData::new(factors, [1, width]), &matrix.device(), matrix.dtype())
    }

    fn base(&self, seed: u64, step: u64) -> u64 {
        mixed(mixed(self.key ^ seed) ^ step)
    }

    /// So many factors of 0 or 1/(1 − p), four of each draw.
    fn factors(&self, start: u64, width: usize) -> impl Iterator<Item = f32> + use<> {
        let out_of = self.out_of;
        let kept = (f64::from(1u32 << 16) / f64::from((1u32 << 16) - out_of)) as f32;
        (0..width.div_ceil(4) as u64)
            .flat_map(move |i| {
                let draw = mixed(start.wrapping_add((i + 1).wrapping_mul(GOLDEN)));
                [0, 16, 32, 48].map(|shift| if (draw >> shift) as u16 as u32 >= out_of { kept } else { 0.0 })
            })
            .take(width)
    }
}

fn of_data<const D: usize>(factors: TensorData, device: &Device, dtype: DType) -> Tensor<D> {
    Tensor::from_data(factors, (device, dtype))
}

/// 2⁶⁴ divided by the golden ratio.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// A number of which every bit depends on every bit of `x` (SplitMix64's finaliser; Steele, Lea and Flood 2014, section 5).
fn mixed(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::values;

    fn on(p: f64, module: &str, draws: Draws) -> Dropout {
        let mut dropout = Dropout::new(p, module);
        dropout.set(Some(draws));
        dropout
    }

    #[test]
    fn a_share_of_p_is_left_out_and_the_mean_stays() {
        let draws = Draws { seed: 5, step: 9, first_row: 0 };
        let x = Tensor::<3>::ones([8, 64, 101], &Device::flex());
        let numbers = (8 * 64 * 101) as f64;
        for p in [0.05, 0.3, 0.9] {
            let found = values(on(p, "a", draws).of_tokens(x.clone()));
            let kept = found.iter().filter(|x| **x != 0.0).count() as f64;
            let deviation = (numbers * p * (1.0 - p)).sqrt();
            assert!((kept - numbers * (1.0 - p)).abs() < 4.0 * deviation, "{p}: {kept}");
            let each = (1.0 / (1.0 - p)) as f32;
            assert!(found.iter().all(|x| *x == 0.0 || (x / each - 1.0).abs() < 1e-3), "{p}");
        }
        assert_eq!(values(on(0.0, "a", draws).of_tokens(x.clone())), values(x.clone()));
        let mut off = on(0.5, "a", draws);
        off.set(None);
        assert_eq!(values(off.of_tokens(x.clone())), values(x));
    }

    #[test]
    fn what_is_left_out_depends_on_row_position_step_seed_and_map_and_on_no_share_of_rows() {
        let draws = |seed, step, first_row| Draws { seed, step, first_row };
        let x = |rows| Tensor::<3>::ones([rows, 7, 40], &Device::flex());
        let all = values(on(0.5, "a", draws(1, 2, 0)).of_tokens(x(4)));
        let later = values(on(0.5, "a", draws(1, 2, 3)).of_tokens(x(1)));
        assert_eq!(later, all[3 * 7 * 40..]);
        for other in [on(0.5, "b", draws(1, 2, 0)), on(0.5, "a", draws(2, 2, 0)), on(0.5, "a", draws(1, 3, 0))] {
            assert_ne!(values(other.of_tokens(x(4))), all);
        }
        let places: std::collections::BTreeSet<Vec<u32>> =
            all.chunks(40).map(|place| place.iter().map(|x| x.to_bits()).collect()).collect();
        assert_eq!(places.len(), 28, "no two places draw alike");
        // A whole matrix is read by all rows.
        let matrix = Tensor::<2>::ones([3, 40], &Device::flex());
        let columns = values(on(0.5, "a", draws(1, 2, 0)).of_columns(matrix.clone()));
        assert_eq!(columns, values(on(0.5, "a", draws(1, 2, 3)).of_columns(matrix)));
        assert!(columns.contains(&0.0) && columns[..40] == columns[40..80]);
    }
}
