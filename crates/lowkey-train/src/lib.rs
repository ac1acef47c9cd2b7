//! Training: one loop of steps, from a run file to checkpoints that are Hugging Face directories.
//!
//! **Purpose.** Everything between a TOML file and a trained model: the run file's schema, the optimiser, the schedule,
//! gradients over threads and micro-batches, evaluation against the true entropy where it is known, checkpoints that
//! survive a kill at any moment, and the metrics that tools read.
//!
//! **Main types.** [`RunConfig`] (the run file), [`setup()`] and [`train()`] (the loop), [`Event`] (what a watcher is told),
//! [`optimizer::Optimizer`], [`workers::Workers`] (threads), [`evaluate::Evaluation`], [`checkpoint::Checkpoints`], [`metrics::Metrics`], [`plan::Plan`], [`run_dir::RunDir`].
//!
//! **Flow.** [`RunConfig::load`] → [`setup()`] opens the corpus and resolves the model → each step: the sampler's batch for
//! (seed, step), [`workers::Workers::gradients`], a check that all is finite, clipping to the global norm, [`optimizer::Optimizer::step`] → every so
//! many steps an [`evaluate()`], samples, a line of metrics, a checkpoint. On a GPU the check and the clipping are the device's, and
//! steps are queued ahead; several devices have a replica each and add up their gradients, and so have several processes ([`ranks`]).
//!
//! **Invariants.** The batch is a pure function of (seed, step), so is the noise on its embeddings, and nothing else is random: a run
//! that was killed and resumed ends with the same bits as one that was not, for the same number of threads or the same devices. Weights
//! change only by a finite step. Replicas are equal to the last bit. A checkpoint is either whole or absent.
//!
//! **What this crate does not know.** The command line, the terminal, how a model computes.
//!
//! # Example
//!
//! What a run would cost, before it starts:
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::path::Path;
//!
//! use lowkey_train::{RunConfig, plan::Plan};
//!
//! let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/quickstart.toml");
//! let config = RunConfig::load(&file, &["training.steps=100".into()])?;
//! let model = config.model.as_ref().ok_or("the run file has a [model]")?;
//! let (model, _notes) = model.resolve(257, config.data.seq_len)?;
//!
//! // On a machine whose matrix products reach 100 GFLOP/s.
//! let plan = Plan::new(&config, &model, 1e11);
//! assert_eq!(plan.tokens, 100 * 16 * 256);
//! // In bf16: 32 numbers of the latent and 16 of the rotated key, for each of 4 layers.
//! assert_eq!(plan.cache_bytes_latent, 2 * 4 * (32 + 16));
//! # Ok(())
//! # }
//! ```

mod average;
pub mod bench;
mod buckets;
pub mod checkpoint;
mod error;
pub mod evaluate;
mod event;
mod first_model;
#[cfg(test)]
mod fixtures;
mod kept;
mod loss_scale;
pub mod metrics;
#[cfg(test)]
mod objective_runs;
pub mod optimizer;
mod other_model;
pub mod passes;
pub mod plan;
mod prefetch;
mod prompts;
pub mod ranks;
mod resume;
pub mod run_config;
pub mod run_data;
pub mod run_dir;
mod schedule;
pub mod setup;
mod start;
mod step;
#[cfg(test)]
mod task_runs;
mod tensorboard;
mod train;
pub mod workers;
mod world;

pub use error::{Error, Result};
pub use evaluate::evaluate;
pub use event::{Event, Outcome, RunOptions};
pub use run_config::RunConfig;
pub use setup::setup;
pub use train::{train, train_on};
