//! Training: one loop of steps, from a run file to checkpoints that are Hugging Face directories.
//!
//! **Purpose.** Everything between a TOML file and a trained model: the run file's schema, the optimiser, the schedule,
//! gradients over threads and micro-batches, evaluation against the true entropy where it is known, checkpoints that
//! survive a kill at any moment, and the metrics that tools read.
//!
//! **Main types.** [`RunConfig`] (the run file), [`setup`] and [`train`] (the loop), [`Event`] (what a watcher is told),
//! [`Optimizer`], [`Workers`] (threads), [`Evaluation`], [`Checkpoints`], [`Metrics`], [`Plan`].
//!
//! **Flow.** [`RunConfig::load`] → [`setup`] opens the corpus and resolves the model → each step: the sampler's batch for
//! (seed, step), [`Workers::gradients`], a check that all is finite, clipping to the global norm, [`Optimizer::step`] → every so
//! many steps an [`evaluate`], samples, a line of metrics, a checkpoint. On a GPU the check and the clipping are the device's, and
//! steps are queued ahead; several devices have a replica each and add up their gradients.
//!
//! **Invariants.** The batch is a pure function of (seed, step), and nothing random happens elsewhere: a run that was killed
//! and resumed ends with the same bits as one that was not, for the same number of threads or the same devices. Weights change only
//! by a finite step. Replicas are equal to the last bit. A checkpoint is either whole or absent.
//!
//! **What this crate does not know.** The command line, the terminal, how a model computes.

pub mod bench;
mod buckets;
pub mod checkpoint;
mod elastic;
mod error;
mod evaluate;
mod event;
#[cfg(test)]
mod fixtures;
mod loss_scale;
mod metrics;
mod optimizer;
mod plan;
mod prefetch;
mod resume;
mod run_config;
pub mod run_data;
mod schedule;
mod setup;
mod step;
#[cfg(test)]
mod task_runs;
mod tensorboard;
mod train;
mod workers;
mod world;

pub use checkpoint::{Checkpoints, TrainerState};
pub use elastic::Passes;
pub use error::{Error, Result};
pub use evaluate::{ClassEvaluation, Evaluation, Held, LatentHealth, RankEvaluation, evaluate};
pub use event::{Event, Outcome, RunOptions};
pub use loss_scale::LossScale;
pub use lowkey_kernels::optim::clip_factor;
pub use metrics::{Metrics, MetricsFile};
pub use optimizer::{Optimizer, ParameterState, Update, global_norm};
pub use plan::{EXPECTED_MFU, Plan};
pub use run_config::{
    CheckpointSection, DataSection, EarlierPlan, EvalSection, InitSection, MetricsSection, OptimizerKind,
    OptimizerSection, RunConfig, RunSection, SchedulerKind, SchedulerSection, TrainingSection,
};
pub use run_data::RunData;
pub use setup::{Setup, device, devices, planned_model, setup, special_tokens_note};
pub use tensorboard::EventWriter;
pub use train::train;
pub use workers::{StepGradients, Workers, available_threads, ceiling, check_threads, matmul_ceiling, memory};
