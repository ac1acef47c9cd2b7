//! What a run is asked, what it tells on its way, and how it ends.

use std::path::{Path, PathBuf};

use crate::evaluate::Evaluation;
use crate::metrics::Metrics;
use crate::plan::Plan;

/// Where a run writes, and how it starts.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// The run file, for paths that are relative to it.
    pub run_file: PathBuf,
    /// The run's folder.
    pub out: PathBuf,
    /// Go on from the newest checkpoint.
    pub resume: bool,
    /// Replace a run that is already there.
    pub overwrite: bool,
    /// Which of the jobs that take this machine's GPUs in turn it is, from 0.
    pub turn: usize,
    /// Facts for `environment.json`: version, commit.
    pub environment: serde_json::Map<String, serde_json::Value>,
}

/// What a run tells whoever watches it.
#[derive(Debug)]
pub enum Event<'a> {
    /// The corpus is being read.
    Preparing(lowkey_data::prepare::Progress),
    /// Something worth a line.
    Note(String),
    /// The first training record of a run that begins, with what is learnt of it.
    Example(&'a [lowkey_data::tokenizer::Part]),
    /// All is set; `step` is where it starts.
    Ready {
        /// What it will cost.
        plan: &'a Plan,
        /// Steps already taken.
        step: u64,
    },
    /// A GPU's kernels are compiled, and the fastest were found.
    WarmedUp {
        /// What it took.
        seconds: f64,
    },
    /// A step was taken.
    Step(&'a Metrics),
    /// An evaluation ended.
    Evaluated {
        /// Steps taken.
        step: u64,
        /// Its figures, on the same part of the held-out split each time.
        evaluation: &'a Evaluation,
    },
    /// All steps are taken; the model as it now is.
    Finished {
        /// Its figures.
        evaluation: &'a Evaluation,
        /// What of the held-out split was measured.
        on: &'a str,
    },
    /// A prompt was continued, or a message answered.
    Sample {
        /// The prompt, or the message.
        prompt: &'a str,
        /// Its continuation, or the answer.
        text: &'a str,
        /// Whether it is an answer.
        chat: bool,
    },
    /// A checkpoint was written.
    Saved {
        /// Its folder.
        path: &'a Path,
        /// Whether it has the lowest held-out loss so far.
        best: bool,
    },
}

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    /// Steps taken.
    pub step: u64,
    /// Whether all steps of the run file are taken; otherwise it was interrupted.
    pub finished: bool,
    /// The model on the whole held-out split, where all steps are taken and something is held out.
    pub evaluation: Option<Evaluation>,
}
