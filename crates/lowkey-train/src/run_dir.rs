//! A run's folder, for whoever looks at runs: what lies in it, how the run stands, and its figures, while it goes and afterwards.
//!
//! A folder may come from anybody: reading is bounded, and what cannot be read is left out where something can be said without it.

mod curves;
mod lines;
mod outcome;
mod samples;
mod standing;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::checkpoint;
use crate::error::{Error, Result};
pub use curves::{Curve, Curves, Point};
pub(crate) use outcome::Ended;
pub use outcome::{State, settle_finished};
pub use samples::Samples;
pub(crate) use samples::SamplesFile;
pub use standing::Standing;

/// The run file as resolved.
pub(crate) const RUN_FILE: &str = "run.toml";
/// What the run was made with.
pub(crate) const ENVIRONMENT: &str = "environment.json";
/// A line for each step.
pub(crate) const METRICS: &str = "metrics.jsonl";
/// What the model wrote at evaluations.
pub(crate) const SAMPLES: &str = "samples.jsonl";
/// The last evaluation.
pub(crate) const EVALUATION: &str = "evaluation.json";
/// How the last session ended.
pub(crate) const OUTCOME: &str = "outcome.json";
/// The page about the run, which `lowkey report` writes.
pub const REPORT: &str = "report.html";
/// Where checkpoints lie.
pub(crate) const CHECKPOINTS: &str = "checkpoints";
/// How far packed matrices are off, where the run has some.
pub(crate) const QUANTIZATION: &str = "quantization.json";
/// Events for TensorBoard.
pub(crate) const TENSORBOARD: &str = "tensorboard";

/// What a run writes in its folder. The tokens of a text file, in `data`, are marked by who prepares them.
pub(crate) const NAMES: [&str; 10] =
    [RUN_FILE, ENVIRONMENT, METRICS, SAMPLES, EVALUATION, OUTCOME, REPORT, CHECKPOINTS, QUANTIZATION, TENSORBOARD];

/// Bytes of a file about the whole run that are read.
const LARGEST: u64 = 16 << 20;

/// Characters of the longest name, and of the longest reason, that are told.
const LONGEST_NAME: usize = 100;
const LONGEST_REASON: usize = 1000;

/// The folder of a run.
#[derive(Clone, Debug)]
pub struct RunDir {
    /// Where it is.
    pub path: PathBuf,
    /// `run.name` of its run file, else the folder's name.
    pub name: String,
    /// Its `run.toml`. What another version of lowkey wrote is read, too.
    pub config: toml::Table,
    /// Its `environment.json`; null where that cannot be read.
    pub environment: Value,
    /// Its `evaluation.json`; null where there is none.
    pub evaluation: Value,
    /// How it stands.
    pub state: State,
    /// Why it failed, where it did.
    pub why: Option<String>,
}

/// A checkpoint as a list shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Saved {
    /// Its step.
    pub step: u64,
    /// Bytes of its files.
    pub bytes: u64,
    /// Whether `best` points to it.
    pub best: bool,
}

impl RunDir {
    /// Opens the folder of a run.
    ///
    /// # Errors
    /// [`Error::File`] and [`Error::Io`] where it holds no `run.toml` that is TOML.
    pub fn open(path: &Path) -> Result<Self> {
        let file = path.join(RUN_FILE);
        let text = lowkey_files::read_text(&file, LARGEST).map_err(|e| match e.is_missing() {
            true => Error::file(path, format!("is no folder of a run: it holds no {RUN_FILE}")),
            false => e.into(),
        })?;
        let config: toml::Table =
            toml::from_str(&text).map_err(|e| Error::file(&file, format!("not a run file: {}", e.message())))?;
        let name = config.get("run").and_then(|run| run.get("name")?.as_str()).map(str::to_string);
        let own =
            || path.canonicalize().unwrap_or_else(|_| path.into()).file_name().map(|n| n.to_string_lossy().into());
        let mut run = Self {
            name: cut(&name.or_else(own).unwrap_or_default(), LONGEST_NAME),
            path: path.to_path_buf(),
            config,
            environment: json(&path.join(ENVIRONMENT)),
            evaluation: json(&path.join(EVALUATION)),
            state: State::Stopped,
            why: None,
        };
        (run.state, run.why) = outcome::state(&run);
        run.why = run.why.map(|why| cut(&why, LONGEST_REASON));
        Ok(run)
    }

    /// The folders of runs in `dir` and in the folders below it, in the order of their names; `dir` itself where it is one.
    ///
    /// # Errors
    /// [`Error::Io`] where `dir` cannot be read.
    pub fn list(dir: &Path) -> Result<Vec<PathBuf>> {
        /// A study has arms, an arm has seeds; a folder of studies may lie in another.
        const DEEPEST: usize = 5;
        /// Entries that are looked at.
        const MOST: usize = 200_000;
        fn walk(dir: &Path, depth: usize, seen: &mut usize, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
            if is_run(dir) {
                found.push(dir.to_path_buf());
                return Ok(());
            }
            if depth == 0 {
                return Ok(());
            }
            let mut below = Vec::new();
            for entry in fs::read_dir(dir)? {
                let Ok(entry) = entry else { continue };
                *seen += 1;
                let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
                if !hidden && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    below.push(entry.path());
                }
            }
            below.sort();
            for dir in below {
                if *seen < MOST {
                    // What cannot be read holds no run that could be told of.
                    let _ = walk(&dir, depth - 1, seen, found);
                }
            }
            Ok(())
        }
        let mut found = Vec::new();
        walk(dir, DEEPEST, &mut 0, &mut found).map_err(|e| Error::io(dir, e))?;
        Ok(found)
    }

    /// A value of the run file, by the keys on the way to it.
    pub fn value(&self, section: &str, key: &str) -> Option<&toml::Value> {
        self.config.get(section)?.get(key)
    }

    /// Steps that the run is to take.
    pub fn steps(&self) -> Option<u64> {
        self.value("training", "steps").and_then(toml::Value::as_integer).and_then(|steps| steps.try_into().ok())
    }

    /// A figure of the plan that the run was begun with.
    pub fn planned(&self, key: &str) -> Option<f64> {
        self.environment.get("plan")?.get(key)?.as_f64().filter(|figure| figure.is_finite())
    }

    /// Its figures so far.
    ///
    /// # Errors
    /// As [`Curves::read`].
    pub fn curves(&self) -> Result<Curves> {
        Curves::read(&self.path.join(METRICS))
    }

    /// What the model wrote at evaluations.
    ///
    /// # Errors
    /// As [`Samples::read`].
    pub fn samples(&self) -> Result<Samples> {
        Samples::read(&self.path.join(SAMPLES))
    }

    /// Its checkpoints, oldest first; none where they cannot be read.
    pub fn checkpoints(&self) -> Vec<Saved> {
        let dir = self.path.join(CHECKPOINTS);
        let best = fs::read_link(dir.join(checkpoint::BEST)).ok();
        let steps = checkpoint::steps(&dir).unwrap_or_default().into_iter();
        let saved = steps.map(|(step, path)| {
            let files = fs::read_dir(&path).into_iter().flatten().flatten();
            let bytes =
                files.filter_map(|file| file.metadata().ok()).filter(fs::Metadata::is_file).map(|m| m.len()).sum();
            Saved { step, bytes, best: best.as_deref().is_some_and(|best| Some(best.as_os_str()) == path.file_name()) }
        });
        saved.collect()
    }
}

/// The beginning of a text that is longer than `most` characters.
fn cut(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_string(),
    }
}

fn is_run(dir: &Path) -> bool {
    dir.join(RUN_FILE).is_file() && [METRICS, ENVIRONMENT].iter().any(|name| dir.join(name).is_file())
}

fn json(path: &Path) -> Value {
    let bytes = lowkey_files::read(path, LARGEST).ok();
    bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests;
