//! What a run in a folder that is not empty may do.

use std::path::{Path, PathBuf};

use lowkey_files::{
    Owned,
    mark::{Kind, MARK},
};

use crate::checkpoint::{self, TrainerState};
use crate::error::{Error, Result};
use crate::event::RunOptions;
use crate::metrics;
use crate::run_config::RunConfig;
use crate::run_dir::NAMES;

/// Keeps a second process out of a run's folder until the returned value is dropped: two would remove each other's unfinished
/// checkpoints and mix their metrics. A folder in which something bears a name that a run writes is only taken where lowkey wrote it.
///
/// # Errors
/// [`Error::Io`] or [`Error::File`] where another process trains here, where what is there is not lowkey's, or where the folder cannot be written.
pub(crate) fn claim(out: &Path) -> Result<Owned> {
    // A folder from elsewhere could have a run write over any file of its user. Folders may lie on another disk.
    let files = NAMES.iter().filter(|name| name.contains('.')).chain([&MARK]);
    if let Some(path) = files.map(|name| out.join(name)).find(|path| path.is_symlink()) {
        return Err(Error::file(path, "is a link, and a run writes its own files alone; put the file itself here"));
    }
    Ok(Owned::claim(out, Kind::Run, &NAMES, is_run(out))?)
}

/// Whether a folder without a mark is a run all the same, of a lowkey that did not mark its folders yet.
fn is_run(out: &Path) -> bool {
    const LARGEST: u64 = 16 << 20;
    let environment = lowkey_files::read(&out.join("environment.json"), LARGEST).ok();
    let environment = environment.and_then(|bytes| serde_json::from_slice::<serde_json::Value>(&bytes).ok());
    environment.is_some_and(|environment| ["data_sha256", "plan"].iter().all(|key| environment.get(key).is_some()))
        && RunConfig::load(&out.join("run.toml"), &[]).is_ok()
}

/// A folder with checkpoints is only touched when the user says what to do with them.
pub(crate) fn refuse_to_lose_a_run(checkpoints: &Path, options: &RunOptions) -> Result<()> {
    if options.resume || options.overwrite {
        return Ok(());
    }
    match checkpoint::newest(checkpoints)? {
        Some(path) => {
            let why =
                "this run is already here: --resume continues it, --overwrite replaces it, --out DIR goes elsewhere";
            Err(Error::file(path, why))
        }
        None => Ok(()),
    }
}

/// A run that starts anew forgets the figures of the one before. Where that one never came to a checkpoint, the same figures come
/// again; where its checkpoints were removed, they are all that is left of it.
pub(crate) fn refuse_to_lose_figures(options: &RunOptions) -> Result<()> {
    if options.overwrite {
        return Ok(());
    }
    let path = options.out.join("metrics.jsonl");
    let Some(told) = metrics::told(&path)? else { return Ok(()) };
    // What was measured is saved where it is the lowest loss, and the first one is.
    let first = RunConfig::load(&options.out.join("run.toml"), &[]).map_or(0, |config| {
        let every = (config.checkpoint.every > 0).then_some(config.checkpoint.every);
        [every, told.measured].into_iter().flatten().fold(config.training.steps, u64::min)
    });
    if told.last <= first && !options.out.join("evaluation.json").exists() {
        return Ok(());
    }
    let why = format!(
        "a run was trained here to step {}, and its checkpoints are gone: there is nothing to go on from; --overwrite starts \
         anew and forgets its figures, --out DIR goes elsewhere",
        told.last
    );
    Err(Error::file(path, why))
}

/// The run that a session goes on with.
#[derive(Debug)]
pub(crate) struct Earlier {
    /// Its `run.toml`.
    config: RunConfig,
    /// As its newest checkpoint has it.
    pub(crate) state: TrainerState,
}

impl Earlier {
    /// The run in `out`, as of a checkpoint.
    ///
    /// # Errors
    /// What is wrong with either file.
    pub(crate) fn load(out: &Path, checkpoint: &Path) -> Result<Self> {
        let config = RunConfig::load(&out.join("run.toml"), &[])?;
        let mut state = checkpoint::load_trainer(checkpoint)?;
        // Checkpoints did not always say it.
        state.measured.get_or_insert(config.eval.batches);
        Ok(Self { config, state })
    }
}

/// The configuration that a session trains with: with the number of threads fixed (that of the run file, else of the run that is
/// gone on with, else `threads`), and with the history of that run.
///
/// # Errors
/// [`Error::File`] for a run file that describes another run than the one to go on with, [`Error::Config`] for fewer steps than it
/// has taken.
pub(crate) fn resolve(
    config: &RunConfig,
    options: &RunOptions,
    earlier: Option<&Earlier>,
    threads: usize,
) -> Result<RunConfig> {
    let mut config = config.clone();
    if config.training.threads.is_none() {
        config.training.threads = match earlier {
            Some(earlier) => earlier.config.training.threads,
            None => Some(threads),
        };
    }
    let Some(Earlier { config: then, state }) = earlier else { return Ok(config) };
    let sections = (comparable(&config)?, comparable(then)?);
    let differs = sections.0.keys().chain(sections.1.keys()).find(|key| sections.0.get(*key) != sections.1.get(*key));
    let history = (!then.history.starts_with(&config.history)).then_some("history");
    let init = match (&config.init, &then.init) {
        (Some(now), Some(then)) => (!same_place(&now.from, &then.from)).then_some("init"),
        (None, None) => None,
        _ => Some("init"),
    };
    if let Some(section) = differs.map(String::as_str).or(init).or(history) {
        let why = format!(
            "[{section}] is not what the run began with; resume with the same run file (only eval, checkpoint, metrics, \
             ranks and training.steps may change), or start a new run with --out DIR"
        );
        return Err(Error::file(options.out.join("run.toml"), why));
    }
    if config.training.steps < state.step {
        let why = format!(
            "the run has taken {} steps already; make it at least that, or start a new run with --out DIR",
            state.step
        );
        return Err(Error::config("training.steps", config.training.steps, why));
    }
    config.continue_after(then, state.step);
    Ok(config)
}

/// What a user should know of the differences to the session before.
pub(crate) fn notes(config: &RunConfig, earlier: &Earlier, elastic: bool) -> Vec<String> {
    let (then, state) = (&earlier.config, &earlier.state);
    let (steps, taken) = (config.training.steps, state.step);
    let mut notes = Vec::new();
    if steps != then.training.steps {
        let before = taken.checked_sub(1).map_or(0.0, |step| config.rate(step));
        let rates = match (steps > taken, config.rate(taken)) {
            (true, after) if after == before => format!("the learning rate goes on at {after:.3e}"),
            (true, after) => format!(
                "the learning rate of [lr_scheduler] goes from {before:.3e} at step {taken} to {after:.3e} at step {}",
                taken + 1
            ),
            (false, _) => "all of them are taken".into(),
        };
        let joins = config.narrower_ranks_join();
        let ranks = if elastic && joins > taken && steps > joins {
            format!("; the narrower ranks join at step {}", joins + 1)
        } else {
            String::new()
        };
        notes.push(format!(
            "training.steps was {} and is {steps}: {rates}{ranks}. [[history]] of run.toml keeps what was before",
            then.training.steps
        ));
    }
    if let (Some(_), Some(measured)) = (state.best, state.measured)
        && measured != config.eval.batches
    {
        notes.push(format!(
            "eval.batches was {measured} and is {}: held-out losses before and after cannot be compared, and `best` begins anew \
             with the next evaluation",
            config.eval.batches
        ));
    }
    notes
}

/// The parts of a run file that decide the weights and can be compared as they stand. Where the data lie is not one of them: what
/// they are is told by their checksum.
fn comparable(config: &RunConfig) -> Result<toml::Table> {
    let mut config = config.clone();
    config.training.steps = 1;
    config.history = Vec::new();
    config.without_caches();
    config.run.device = String::new();
    config.run.devices = Vec::new();
    config.run.name = String::new();
    // Where the model lies is compared by itself; what was changed of it decides the weights.
    if let Some(init) = &mut config.init {
        (init.from, init.adapter) = (PathBuf::new(), None);
    }
    (config.data.dataset, config.data.path) = (None, None);
    config.data.mixture.iter_mut().for_each(|part| part.dataset.clear());
    let mut table: toml::Table = toml::from_str(&config.to_toml()?)
        .map_err(|e| Error::RunFile { path: "run.toml".into(), why: e.to_string() })?;
    for section in ["eval", "checkpoint", "metrics", "ranks"] {
        table.remove(section);
    }
    Ok(table)
}

/// Whether two paths lead to the same place, however they are written.
pub(crate) fn same_place(a: &Path, b: &Path) -> bool {
    a == b || matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

#[cfg(test)]
mod tests;
