//! What a run costs on several ranks, of a link between them.

use lowkey_model::ModelConfig;
use serde::Serialize;

use super::{EXPECTED_MFU, Plan, train_bytes};
use crate::buckets::BUCKET;
use crate::error::{Error, Result};
use crate::ranks::LEFT_TO_MPI;
use crate::run_config::{RankSum, RunConfig, Weights};

/// The link of each rank to the others.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Link {
    /// Bytes per second that leave a rank, while as many reach it; those of headers and of gaps between frames are among them.
    pub bytes_per_s: f64,
    /// Seconds until the first byte of a message is there, one way.
    pub latency_s: f64,
}

/// A step on several ranks, each of which is a machine as the one that the plan was made on.
///
/// Time is that of the passes over a rank's rows and of the transfers behind them, one after the other: gradients do not travel during
/// the backward pass.
#[derive(Clone, Debug, Serialize)]
pub struct RanksPlan {
    /// How many.
    pub ranks: usize,
    /// The link.
    pub link: Link,
    /// Bytes that leave each rank in a step, and as many reach it: 2(n − 1)/n times those of the gradients, and with a divided
    /// optimiser (n − 1)/n times those of the parameters.
    pub bytes_per_step: f64,
    /// Seconds of a step in which a rank computes.
    pub compute_s: f64,
    /// Seconds of a step in which it waits for the link.
    pub link_s: f64,
    /// Steps per second over those of as many ranks with an infinitely fast link.
    pub efficiency: f64,
    /// Estimated peak memory of a rank.
    pub rank_bytes: usize,
    /// Estimated duration of the run.
    pub seconds: f64,
}

/// Transfers of a step beside those of the gradients: whether it is taken, whether all have their gradients, the losses.
const SMALL: f64 = 3.0;

/// What messages have of the bytes of a link, over TCP: 1448 of the 1538 that an Ethernet frame takes, with its gap.
const PAYLOAD: f64 = 1448.0 / 1538.0;

/// The longest message that is sent unasked, in bytes (of Open MPI over TCP; others ask at less, where it matters as little).
const UNASKED: f64 = 65536.0;

/// How often the way of a message has to be gone before it is there: one that is long is announced, asked for, and sent.
fn ways(bytes: f64) -> f64 {
    if bytes > UNASKED { 3.0 } else { 1.0 }
}

impl Plan {
    /// The same run on several ranks.
    ///
    /// # Errors
    /// [`Error::Config`] where they do not divide the batch.
    pub fn on_ranks(&self, config: &RunConfig, model: &ModelConfig, ranks: usize, link: Link) -> Result<RanksPlan> {
        let batch = config.training.batch_size;
        if ranks == 0 || !batch.is_multiple_of(ranks) {
            let why = format!("must be a multiple of {ranks}, the number of ranks: each has as many rows");
            return Err(Error::config("training.batch_size", batch, why));
        }
        let (n, steps) = (ranks as f64, config.training.steps as f64);
        let Weights { frozen, added, .. } = config.weights(model);
        let trained = model.parameter_count().total.saturating_sub(frozen) + added;
        let (gradients, divided) = (4.0 * trained as f64, config.ranks.zero == 1 && ranks > 1);
        let others = (n - 1.0) / n;
        let bytes_per_step = others * gradients * if divided { 3.0 } else { 2.0 };
        // Of each bucket the slices, and their sums; where MPI chooses, it halves what is left to send, and then doubles it.
        let of_a_bucket = match config.ranks.sum {
            RankSum::Fastest if ranks >= LEFT_TO_MPI => 2.0 * n.log2().ceil(),
            RankSum::Ordered | RankSum::Fastest => 2.0,
        };
        let buckets = (0..trained).step_by(BUCKET).map(|at| BUCKET.min(trained - at) as f64);
        let summed: f64 = buckets.map(|numbers| of_a_bucket * ways(4.0 * numbers / n)).sum();
        let latencies = SMALL + summed + if divided { ways(gradients / n) } else { 0.0 };
        let compute_s = self.flops / steps / n / (self.matmul_flops_per_s * EXPECTED_MFU);
        let sent_s = bytes_per_step / (link.bytes_per_s * PAYLOAD);
        let link_s = if ranks == 1 { 0.0 } else { sent_s + latencies * link.latency_s };
        // Two numbers of the optimiser for each that is trained, all but a part of which lie elsewhere.
        let spared = if divided { (2.0 * gradients * others) as usize } else { 0 };
        // A rank has fewer rows than the whole batch.
        let mut own = config.clone();
        own.training.micro_batch_size = Some(config.micro_batch_size().min(batch / ranks));
        Ok(RanksPlan {
            ranks,
            link,
            bytes_per_step,
            compute_s,
            link_s,
            efficiency: compute_s / (compute_s + link_s),
            rank_bytes: train_bytes(&own, model, config.threads()).saturating_sub(spared),
            seconds: steps * (compute_s + link_s),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{TinyRun, model_config};

    #[test]
    fn a_step_is_what_is_computed_and_what_is_sent() {
        let run = TinyRun::new();
        let (config, model) = (run.config(&[]), model_config(257, 24));
        let plan = Plan::new(&config, &model, 1e9);
        let parameters = model.parameter_count().total as f64;
        let link = Link { bytes_per_s: 1e6, latency_s: 1e-3 };
        let one = plan.on_ranks(&config, &model, 1, link).unwrap();
        assert_eq!((one.bytes_per_step, one.link_s, one.efficiency), (0.0, 0.0, 1.0));
        assert!((one.seconds / plan.seconds - 1.0).abs() < 1e-12);
        let four = plan.on_ranks(&config, &model, 4, link).unwrap();
        assert_eq!(four.bytes_per_step, 1.5 * 4.0 * parameters);
        assert!((four.compute_s / (one.compute_s / 4.0) - 1.0).abs() < 1e-12);
        assert!((four.link_s - (four.bytes_per_step / PAYLOAD / 1e6 + 5e-3)).abs() < 1e-12);
        assert!(four.rank_bytes <= one.rank_bytes);
        let divided = run.config(&["ranks.zero=1"]);
        let divided = plan.on_ranks(&divided, &model, 4, link).unwrap();
        assert_eq!(divided.bytes_per_step, 2.25 * 4.0 * parameters);
        assert!(divided.rank_bytes < four.rank_bytes);
        // A rank's slice is announced, asked for, and sent; so are the sums.
        let wide = model_config(100_000, 24);
        let (plan, bytes) = (Plan::new(&config, &wide, 1e9), 4.0 * wide.parameter_count().total as f64);
        assert!(bytes / 4.0 > UNASKED && wide.parameter_count().total < BUCKET);
        let four = plan.on_ranks(&config, &wide, 4, link).unwrap();
        assert!((four.link_s - (four.bytes_per_step / PAYLOAD / 1e6 + 9e-3)).abs() < 1e-12);
        let fastest = run.config(&["ranks.sum=fastest"]);
        let fastest = plan.on_ranks(&fastest, &wide, 4, link).unwrap();
        assert!((fastest.link_s - four.link_s - 6e-3).abs() < 1e-12);
        let refused = plan.on_ranks(&config, &model, 3, link).unwrap_err().to_string();
        assert!(refused.contains("training.batch_size = 8: must be a multiple of 3"), "{refused}");
    }
}
