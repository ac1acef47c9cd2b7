//! Folders that grow: runs, and the studies that hold them. Their files come and change one by one, so that they cannot be
//! staged; a lock keeps other processes out, and a mark tells lowkey's files from those of others.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::lock::{Lock, is_held, lock};
use crate::mark::{Kind, MARK, Mark};
use crate::write::{create_dir, sweep, write_json};

/// Name of the lock in a folder that grows.
const LOCK: &str = ".lock";

/// A folder that this process alone writes until it is dropped.
#[derive(Debug)]
pub struct Owned {
    dir: PathBuf,
    _lock: Lock,
}

impl Owned {
    /// Makes the folder if need be, keeps other processes out, clears away what a killed one left, and marks the folder as one
    /// of this kind. `names` are the entries that lowkey may write in it, later than now, too. Where the folder has no mark yet
    /// and one of them is there already, it is somebody else's and stays, unless `adopt` says that the caller knows it for
    /// lowkey's own, made before there were marks.
    ///
    /// # Errors
    /// [`Error::Refused`] where another process works here or where lowkey would replace what it did not make; [`Error::Io`].
    pub fn claim(dir: &Path, kind: Kind, names: &[&str], adopt: bool) -> Result<Self> {
        create_dir(dir)?;
        let lock = lock(&dir.join(LOCK))?;
        let mut files: BTreeMap<String, Option<String>> = match Mark::read(dir)? {
            Some(mark) if mark.kind == kind => mark.files,
            Some(mark) => {
                let why = format!("is {}, not {}: give another --out", mark.kind.name(), kind.name());
                return Err(Error::refused(dir, why));
            }
            None => BTreeMap::new(),
        };
        let foreign =
            |name: &&&str| !files.contains_key(**name) && dir.join(name).symlink_metadata().is_ok_and(|_| !adopt);
        if let Some(name) = names.iter().find(foreign) {
            let why = format!(
                "is there, and lowkey did not write it as part of {}: it would be replaced; move it away, or give \
                 another --out",
                kind.name()
            );
            return Err(Error::refused(&dir.join(name), why));
        }
        sweep(dir)?;
        let known = files.len();
        files.extend(names.iter().map(|name| ((*name).to_string(), None)));
        if known == 0 || files.len() > known {
            write_json(&dir.join(MARK), &Mark::new(kind, files))?;
        }
        Ok(Self { dir: dir.to_path_buf(), _lock: lock })
    }

    /// Clears away what a killed process left in a folder of this kind, for a command that has nothing else to do there: half-written
    /// files, in the folders of `below`, too, and the lock. Where there is no such folder, or another process works in it, nothing
    /// is touched.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn clear(dir: &Path, below: &[&str]) -> Result<()> {
        if !dir.is_dir() {
            return Ok(());
        }
        let _lock = match lock(&dir.join(LOCK)) {
            Ok(lock) => lock,
            Err(Error::Refused { .. } | Error::Held { .. }) => return Ok(()),
            Err(e) => return Err(e),
        };
        sweep(dir)?;
        below.iter().map(|name| dir.join(name)).filter(|dir| dir.is_dir()).try_for_each(|dir| sweep(&dir))
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// Whether somebody works in a folder that grows.
pub fn is_claimed(dir: &Path) -> bool {
    is_held(&dir.join(LOCK))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const NAMES: &[&str] = &["run.toml", "metrics.jsonl"];

    #[test]
    fn one_process_at_a_time_and_nothing_of_others_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("run");
        let held = Owned::claim(&out, Kind::Run, NAMES, false).unwrap();
        assert!(Owned::claim(&out, Kind::Run, NAMES, false).unwrap_err().to_string().contains("another process"));
        drop(held);
        fs::write(out.join("run.toml"), "ours").unwrap();
        fs::write(out.join(".metrics.jsonl.lowkey-new"), "half").unwrap();
        let why = Owned::claim(&out, Kind::Study, NAMES, false).unwrap_err().to_string();
        assert!(why.contains("is a run, not a study"), "{why}");
        let _held = Owned::claim(&out, Kind::Run, NAMES, false).unwrap();
        assert!(!out.join(".metrics.jsonl.lowkey-new").exists());

        let foreign = dir.path().join("mine");
        fs::create_dir(&foreign).unwrap();
        fs::write(foreign.join("notes"), "").unwrap();
        fs::write(foreign.join("run.toml"), "# my comments").unwrap();
        let why = Owned::claim(&foreign, Kind::Run, NAMES, false).unwrap_err().to_string();
        assert!(why.contains("run.toml: is there, and lowkey did not write it"), "{why}");
        assert_eq!(fs::read_dir(&foreign).unwrap().count(), 2);
        drop(Owned::claim(&foreign, Kind::Run, NAMES, true).unwrap());
        let mut left: Vec<_> = fs::read_dir(&foreign).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["lowkey.json", "notes", "run.toml"]);
    }

    #[test]
    fn what_a_killed_process_left_is_cleared_and_who_works_there_is_let_alone() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        Owned::clear(&run, &["checkpoints"]).unwrap();
        assert!(!run.exists());
        let held = Owned::claim(&run, Kind::Run, NAMES, false).unwrap();
        let half = [run.join(".run.toml.lowkey-new"), run.join("checkpoints/.step-1.lowkey-new")];
        fs::write(&half[0], "half").unwrap();
        fs::create_dir_all(&half[1]).unwrap();
        Owned::clear(&run, &["checkpoints"]).unwrap();
        assert!(half.iter().all(|path| path.exists()));
        drop(held);
        fs::write(run.join(".lock"), "").unwrap();
        Owned::clear(&run, &["checkpoints"]).unwrap();
        assert!(!half.iter().any(|path| path.exists()) && !run.join(".lock").exists());
        assert!(run.join("lowkey.json").exists());
    }

    #[cfg(unix)]
    #[test]
    fn a_lock_that_is_a_link_empties_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (key, run) = (dir.path().join("key"), dir.path().join("run"));
        fs::write(&key, "secret").unwrap();
        fs::create_dir(&run).unwrap();
        std::os::unix::fs::symlink(&key, run.join(".lock")).unwrap();
        assert!(Owned::claim(&run, Kind::Run, NAMES, true).is_err());
        assert_eq!(fs::read_to_string(&key).unwrap(), "secret");
    }
}
