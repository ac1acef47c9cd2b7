//! What a run in a folder that is not empty may do.

use std::fs::{File, TryLockError};
use std::path::Path;

use crate::checkpoint;
use crate::error::{Error, Result};
use crate::run_config::RunConfig;
use crate::train::RunOptions;
use crate::workers::available_threads;

/// Keeps a second process out of a run's folder until the returned file is dropped: two would remove each other's
/// unfinished checkpoints and mix their metrics.
///
/// # Errors
/// [`Error::File`] where another process trains here, [`Error::Io`] where the folder cannot be written.
pub(crate) fn lock(out: &Path) -> Result<File> {
    let path = out.join(".lock");
    let file = File::create(&path).map_err(|e| Error::io(&path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::file(
            out,
            "another process is training in this folder; wait for it, or choose another --out DIR",
        )),
        Err(TryLockError::Error(e)) => Err(Error::io(path, e)),
    }
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
    config.run.devices = Vec::new();
    config.run.name = String::new();
    let mut table: toml::Table = toml::from_str(&config.to_toml()?)
        .map_err(|e| Error::RunFile { path: "run.toml".into(), why: e.to_string() })?;
    for section in ["eval", "checkpoint", "metrics"] {
        table.remove(section);
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_takes_one_process_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let held = lock(dir.path()).unwrap();
        let refused = lock(dir.path()).unwrap_err().to_string();
        assert!(refused.contains("another process"), "{refused}");
        drop(held);
        lock(dir.path()).unwrap();
    }
}
