//! What a run in a folder that is not empty may do.

use std::path::Path;

use crate::checkpoint;
use crate::error::{Error, Result};
use crate::run_config::RunConfig;
use crate::train::RunOptions;
use crate::workers::available_threads;

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

/// Fixes the number of threads: that of the run file, else of the run being resumed, else one per core. Refuses to resume
/// with a run file that describes another run.
pub(crate) fn with_threads(config: &RunConfig, options: &RunOptions, resuming: bool) -> Result<RunConfig> {
    let mut config = config.clone();
    let path = options.out.join("run.toml");
    let earlier = match resuming {
        true => Some(RunConfig::load(&path, &[])?),
        false => None,
    };
    if config.training.threads.is_none() {
        config.training.threads = match &earlier {
            Some(earlier) => earlier.training.threads,
            None => Some(available_threads()),
        };
    }
    if let Some(earlier) = earlier {
        let (now, then) = (comparable(&config)?, comparable(&earlier)?);
        if let Some(section) = now.keys().chain(then.keys()).find(|key| now.get(*key) != then.get(*key)) {
            let why = format!(
                "[{section}] is not what the run began with; resume with the same run file (only eval, checkpoint, metrics \
                 and training.steps may change), or start a new run with --out DIR"
            );
            return Err(Error::file(path, why));
        }
    }
    Ok(config)
}

/// The parts of a run file that decide the weights.
fn comparable(config: &RunConfig) -> Result<toml::Table> {
    let mut config = config.clone();
    config.training.steps = 1;
    config.run.device = String::new();
    config.run.name = String::new();
    let mut table: toml::Table = toml::from_str(&config.to_toml()?)
        .map_err(|e| Error::RunFile { path: "run.toml".into(), why: e.to_string() })?;
    for section in ["eval", "checkpoint", "metrics"] {
        table.remove(section);
    }
    Ok(table)
}
