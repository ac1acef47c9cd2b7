//! The cache on disk, in the layout that all Hugging Face tools share:
//!
//! ```text
//! CACHE/datasets--owner--name/refs/main                      the commit that a branch or tag stands for
//!                             snapshots/COMMIT/data/a.txt ─▶ ../../../blobs/HASH
//!                             blobs/HASH                     a file's bytes, named for its content
//!                             blobs/HASH.incomplete          what has arrived of it
//!       .locks/datasets--owner--name/HASH.lock               held by who is fetching it
//! ```

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lowkey_files as files;

use super::names::is_tag;
use super::request::{Described, Fault};

/// A reference holds one commit.
const LONGEST_REFERENCE: u64 = 1024;
/// Between two looks at a lock that another process holds.
const LOOK: Duration = Duration::from_millis(50);

/// One repository in the cache. All names given to it are checked ones.
pub(super) struct Cache {
    root: PathBuf,
    folder: String,
}

impl Cache {
    /// A dataset repository under `root`, an absolute path.
    pub(super) fn new(root: PathBuf, repo: &str) -> Self {
        Self { root, folder: format!("datasets--{}", repo.replace('/', "--")) }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.join(&self.folder).join(path)
    }

    /// The local copy of a file, if there is one.
    pub(super) fn find(&self, revision: &str, file: &str) -> Option<PathBuf> {
        let pointer = |commit: &str| Some(self.pointer(commit, file)).filter(|path| path.is_file());
        let referred = || {
            let commit = files::read_text(&self.at("refs").join(revision), LONGEST_REFERENCE).ok()?;
            // A cache may have come from elsewhere, too.
            Some(commit.trim()).filter(|commit| is_tag(commit)).and_then(pointer)
        };
        if is_tag(revision) { pointer(revision).or_else(referred) } else { referred() }
    }

    fn pointer(&self, commit: &str, file: &str) -> PathBuf {
        self.at("snapshots").join(commit).join(file)
    }

    /// Where a file's bytes lie.
    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.at("blobs").join(etag)
    }

    /// Where they lie until they are whole.
    pub(super) fn partial(&self, etag: &str) -> PathBuf {
        self.at("blobs").join(format!("{etag}.incomplete"))
    }

    /// Keeps other processes from fetching the same file, or waits for one that does: as long as its file grows, and for
    /// `patience` when it does not.
    pub(super) fn lock(&self, etag: &str, patience: Duration) -> Result<files::lock::Lock, Fault> {
        let folder = self.root.join(".locks").join(&self.folder);
        files::write::create_dir(&folder).map_err(|e| self.disk(&e))?;
        files::write::create_dir(&self.at("blobs")).map_err(|e| self.disk(&e))?;
        let path = folder.join(format!("{etag}.lock"));
        let (mut since, mut arrived) = (Instant::now(), self.arrived(etag));
        loop {
            match files::lock::lock(&path) {
                Ok(lock) => return Ok(lock),
                Err(files::Error::Held { .. }) if since.elapsed() < patience => {
                    std::thread::sleep(LOOK.min(patience));
                    let now = self.arrived(etag);
                    if now != arrived {
                        (since, arrived) = (Instant::now(), now);
                    }
                }
                // What holds it too long, or bears its name, is no fault of the disk.
                Err(e @ (files::Error::Held { .. } | files::Error::Refused { .. })) => {
                    return Err(Fault::Final(e.to_string()));
                }
                Err(e) => return Err(self.disk(&e)),
            }
        }
    }

    /// Bytes of a file that have arrived, whichever tool is fetching it.
    fn arrived(&self, etag: &str) -> u64 {
        let Ok(entries) = self.at("blobs").read_dir() else { return 0 };
        let of_it =
            entries.filter_map(|entry| entry.ok().filter(|e| e.file_name().to_string_lossy().starts_with(etag)));
        of_it.filter_map(|entry| Some(entry.metadata().ok()?.len())).sum()
    }

    /// Puts a blob under its name in the snapshot, and the commit under the name of the revision.
    pub(super) fn point(&self, described: &Described, revision: &str, file: &str) -> Result<PathBuf, Fault> {
        let pointer = self.pointer(&described.commit, file);
        let blob = self.blob(&described.etag);
        files::write::create_dir(pointer.parent().unwrap_or(&pointer)).map_err(|e| self.disk(&e))?;
        if !pointer.is_file() {
            let up = "../".repeat(file.split('/').count() + 1);
            link(&format!("{up}blobs/{}", described.etag), &pointer)
                // Where there are no links, the file itself takes the place.
                .or_else(|e| {
                    if pointer.symlink_metadata().is_ok() { Err(e) } else { files::write::rename(&blob, &pointer) }
                })
                .map_err(|e| self.disk(&e))?;
        }
        if revision != described.commit {
            let reference = self.at("refs").join(revision);
            files::write::create_dir(reference.parent().unwrap_or(&reference)).map_err(|e| self.disk(&e))?;
            let is_right =
                || files::read_text(&reference, LONGEST_REFERENCE).is_ok_and(|held| held == described.commit);
            let mut patience = 100;
            while !is_right() {
                match files::write(&reference, described.commit.as_bytes()) {
                    Ok(()) => break,
                    // Another process fetches another file of the same revision.
                    Err(files::Error::Held { .. }) if patience > 0 => patience -= 1,
                    Err(e) => return Err(self.disk(&e)),
                }
                std::thread::sleep(LOOK / 5);
            }
        }
        Ok(pointer)
    }

    /// A fault of the disk.
    pub(super) fn disk(&self, error: &dyn std::fmt::Display) -> Fault {
        let cache = self.root.to_string_lossy();
        Fault::Final(format!("{error}; is the cache {} writable and not full?", files::printable(&cache)))
    }
}

#[cfg(unix)]
fn link(target: &str, at: &Path) -> files::Result<()> {
    files::write::link(target, at)
}

#[cfg(not(unix))]
fn link(_: &str, at: &Path) -> files::Result<()> {
    let why = "this system is not asked for links".to_owned();
    Err(files::Error::Refused { path: at.to_path_buf(), why })
}
