//! What a run costs on several ranks, of a link between them.

use lowkey_model::ModelConfig;
use serde::Serialize;

use super::{EXPECTED_MFU, Plan, train_bytes};
use crate::buckets::BUCKET;
use crate::error::{Error, Result};
use crate::run_config::{RunConfig, Weights};

/// The link of each rank to the others.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Link {
    /// Bytes per second that leave a rank, while as many reach it.
    pub bytes_per_s: f64,
    /// Seconds until the first byte of a message is there.
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
        // Of each bucket the slices, and their sums.
        let transfers = trained.div_ceil(BUCKET) as f64 * 2.0 + f64::from(u8::from(divided)) + SMALL;
        let compute_s = self.flops / steps / n / (self.matmul_flops_per_s * EXPECTED_MFU);
        let link_s = if ranks == 1 { 0.0 } else { bytes_per_step / link.bytes_per_s + transfers * link.latency_s };
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
        assert!((four.link_s - (four.bytes_per_step / 1e6 + 5e-3)).abs() < 1e-12);
        assert!(four.rank_bytes <= one.rank_bytes);
        let divided = run.config(&["ranks.zero=1"]);
        let divided = plan.on_ranks(&divided, &model, 4, link).unwrap();
        assert_eq!(divided.bytes_per_step, 2.25 * 4.0 * parameters);
        assert!(divided.rank_bytes < four.rank_bytes);
        let refused = plan.on_ranks(&config, &model, 3, link).unwrap_err().to_string();
        assert!(refused.contains("training.batch_size = 8: must be a multiple of 3"), "{refused}");
    }
}
