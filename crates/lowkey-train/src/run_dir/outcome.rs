//! `outcome.json`: how the last session of a run ended, for who looks at it later.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{OUTCOME, RunDir};
use crate::checkpoint;
use crate::error::{Error, Result};
use crate::event::Outcome;

/// How a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// A process trains it.
    Running,
    /// All its steps are taken.
    Finished,
    /// It was interrupted, or its process was killed.
    Stopped,
    /// It ended with an error.
    Failed,
}

impl State {
    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Finished => "finished",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        }
    }
}

/// The file's content. There is none while a session goes on, and none after one that was killed.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Ended {
    state: State,
    /// Optimiser steps taken.
    step: u64,
    /// The error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    why: Option<String>,
}

impl Ended {
    /// Forgets how the session before ended.
    ///
    /// # Errors
    /// [`Error::Io`] where the file cannot be removed.
    pub(crate) fn forget(out: &Path) -> Result<()> {
        Ok(lowkey_files::write::remove(&out.join(OUTCOME))?)
    }

    /// Keeps how a session ended.
    ///
    /// # Errors
    /// The session's own; else that of writing the file.
    pub(crate) fn keep(out: &Path, step: u64, result: Result<Outcome>) -> Result<Outcome> {
        let ended = match &result {
            Ok(outcome) if outcome.finished => Self { state: State::Finished, step: outcome.step, why: None },
            Ok(outcome) => Self { state: State::Stopped, step: outcome.step, why: None },
            Err(e) => Self { state: State::Failed, step, why: Some(e.to_string()) },
        };
        let written = lowkey_files::write_json(&out.join(OUTCOME), &ended).map_err(Error::from);
        // What stopped the run matters more than that it could not be written down.
        result.and_then(|outcome| written.map(|()| outcome))
    }
}

/// Writes down that a run is over, where its process was stopped after its last result and before it could. `steps` are those that it was
/// to take.
///
/// # Errors
/// [`Error::Io`] where the file cannot be written.
pub fn settle_finished(out: &Path, steps: u64) -> Result<()> {
    let known = serde_json::from_value::<Ended>(super::json(&out.join(OUTCOME)));
    if known.is_ok_and(|ended| ended.state == State::Finished) {
        return Ok(());
    }
    let saved = checkpoint::steps(&out.join(super::CHECKPOINTS)).unwrap_or_default().last().map(|(step, _)| *step);
    let ended = Ended { state: State::Finished, step: saved.unwrap_or(steps), why: None };
    Ok(lowkey_files::write_json(&out.join(OUTCOME), &ended)?)
}

/// How a run stands, and why it failed.
pub(super) fn state(run: &RunDir) -> (State, Option<String>) {
    let (out, steps) = (&run.path, run.steps());
    if lowkey_files::is_claimed(out) {
        return (State::Running, None);
    }
    match serde_json::from_value::<Ended>(super::json(&out.join(OUTCOME))) {
        Ok(ended) if ended.state != State::Running => return (ended.state, ended.why),
        _ => {}
    }
    // Runs of a lowkey that did not write it.
    let measured = run.evaluation.get("loss").and_then(Value::as_f64).is_some_and(f64::is_finite);
    let saved = checkpoint::steps(&out.join(super::CHECKPOINTS)).unwrap_or_default().last().map(|(step, _)| *step);
    let taken = saved.zip(steps).is_some_and(|(saved, steps)| saved >= steps);
    (if measured || taken { State::Finished } else { State::Stopped }, None)
}
