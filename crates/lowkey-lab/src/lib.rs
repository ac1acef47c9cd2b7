//! Experiments: many runs of one question, and an answer with error bars.
//!
//! **Purpose.** An ablation that a reviewer accepts has several seeds, arms that are equal in what is not asked about, and a rule that
//! was written before the runs. Here that is one TOML file.
//!
//! **Main types.** [`Experiment`] (the file), [`Expanded`] (its arms, matched to the baseline, and their runs), [`sweep`] (running
//! what is not finished), [`Study`] (what was measured).
//!
//! **Flow.** [`Experiment::load`] → [`Expanded::new`] solves for the widths (or steps, or groups) that match the arms → [`sweep`] runs
//! them through the one training loop of `lowkey-train`, several at a time in this process, so that a killed sweep leaves no run
//! behind → [`Expanded::collect`] reads the finished runs → [`report`] writes `results.csv`, `table.md` and `report.html`, a page of its own with plots.
//!
//! **An experiment file.**
//!
//! ```toml
//! name = "rank"
//! question = "How few latent dimensions are as good as full attention?"
//! base = "run.toml"                       # a run file, relative to this one
//! seeds = [1, 2, 3, 4, 5]                 # of weights and data order, the same for all arms: compared in pairs
//! metric = "gap"                          # or val_loss, accuracy, mse, class.NAME.gap, …
//! better = "lower"
//! baseline = "mha"
//! x = "model.kv_lora_rank"                # the plots' axis
//! threads = 1                             # of each run
//! quantised = true                        # also evaluate with int8 and int4 caches
//!
//! [match]                                 # arms are made equal to the baseline …
//! by = "parameters"                       # parameters | training_flops | cache_bytes
//! with = "model.intermediate_size"        # … by changing this
//! multiple_of = 4
//!
//! [budget]
//! runs = 60
//! hours = 3.0
//!
//! [rule]                                  # margin | knee | theory | elastic
//! kind = "margin"
//! margin = 0.01
//! confidence = 0.95
//!
//! [[arms]]
//! name = "mha"
//! set = { "model.attention" = "mha" }
//!
//! [[axes]]                                # all combinations of all axes are arms, too
//! key = "model.kv_lora_rank"
//! values = [8, 16, 32]
//! ```
//!
//! **A page about runs.** [`run_page`] draws single runs, or several one upon the other, from their folders, studies or not.
//!
//! **What this crate does not know.** The command line and the terminal; how a run is trained.
//!
//! # Example
//!
//! An experiment is read, or refused with a reason:
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::path::Path;
//!
//! use lowkey_lab::Experiment;
//!
//! let dir = tempfile::tempdir()?;
//! let file = dir.path().join("experiment.toml");
//! std::fs::write(&file, r#"
//!     name = "rank"
//!     question = "How few latent dimensions suffice?"
//!     base = "run.toml"
//!     seeds = [1, 2, 3]
//!     baseline = "kv_lora_rank-8"
//!
//!     [rule]
//!     kind = "margin"
//!     margin = 0.01
//!
//!     [[axes]]
//!     key = "model.kv_lora_rank"
//!     values = [8, 16, 32]
//! "#)?;
//! let experiment = Experiment::load(&file)?;
//! assert_eq!((experiment.seeds.len(), experiment.axes[0].values.len()), (3, 3));
//!
//! // What decides is written before the first run.
//! let undecided = std::fs::read_to_string(&file)?.replace("margin = 0.01", "");
//! std::fs::write(&file, undecided)?;
//! assert!(Experiment::load(Path::new(&file)).is_err());
//! # Ok(())
//! # }
//! ```

mod axis;
mod collect;
mod decode;
mod error;
pub mod expand;
pub mod experiment;
pub mod fit;
#[cfg(test)]
mod fixtures;
mod html;
mod kept;
mod looks;
mod markup;
mod page;
mod plot;
mod quantised;
mod report;
mod run;
pub mod run_page;
mod stats;
pub mod study;
pub mod summary;
pub mod units;
mod verdict;

pub use error::{Error, Result};
pub use expand::{Expanded, Run};
pub use experiment::Experiment;
pub use report::report;
pub use run::{Event, Outcome, SweepOptions, sweep};
pub use stats::Mean;
pub use study::Study;
pub use summary::Summary;
