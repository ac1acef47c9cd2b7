//! Files of an export: written whole or not at all, listed with their hashes.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use atomic_write_file::AtomicWriteFile;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// A file by content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHash {
    /// Name within its folder.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256 in lower-case hex.
    pub sha256: String,
}

/// Writes a file atomically: temporary file, fsync, rename.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut file = AtomicWriteFile::open(path)?;
        file.write_all(bytes)?;
        file.commit()
    };
    write().map_err(|e| Error::io(path, e))
}

/// Writes pretty JSON atomically.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::file(path, e.to_string()))?;
    write_file(path, (text + "\n").as_bytes())
}

/// Name, size and hash of a file.
pub(crate) fn hash(path: &Path) -> Result<FileHash> {
    let fail = |e| Error::io(path, e);
    let mut file = File::open(path).map_err(fail)?;
    let (mut digest, mut bytes) = (Sha256::new(), 0);
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).map_err(fail)?;
        if n == 0 {
            break;
        }
        digest.update(&buffer[..n]);
        bytes += n as u64;
    }
    let sha256 = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(FileHash { name: name(path), bytes, sha256 })
}

/// The regular files of a folder in the order of their names; folders and hidden files do not count.
pub(crate) fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let fail = |e| Error::io(dir, e);
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        if path.is_file() && !name(&path).starts_with('.') {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// The last part of a path as text.
pub(crate) fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// A folder that is written beside its place and takes its name only when it is whole; dropped before, it leaves nothing.
pub(crate) struct Staging {
    target: PathBuf,
    dir: PathBuf,
    done: bool,
}

impl Staging {
    /// # Errors
    /// [`Error::File`] where `target` holds something and `overwrite` is not set, or is no folder.
    pub(crate) fn new(target: &Path, overwrite: bool) -> Result<Self> {
        if target.exists() && !target.is_dir() {
            return Err(Error::file(target, "is a file, and an export is a folder: give another --out"));
        }
        let occupied = target.is_dir() && fs::read_dir(target).map_err(|e| Error::io(target, e))?.next().is_some();
        if occupied && !overwrite {
            let why = "already holds something; give another --out, or --overwrite to replace it";
            return Err(Error::file(target, why));
        }
        // What is replaced must be an export: --overwrite is no way to remove other folders.
        if occupied && !target.join(crate::certificate::JSON).is_file() {
            let why = "holds something that is no export (no certificate.json): --overwrite replaces exports only";
            return Err(Error::file(target, why));
        }
        let dir = target.with_file_name(format!(".tmp-{}-{}", std::process::id(), name(target)));
        if dir.exists() {
            fs::remove_dir_all(&dir).map_err(|e| Error::io(&dir, e))?;
        }
        fs::create_dir_all(&dir).map_err(|e| Error::io(&dir, e))?;
        Ok(Self { target: target.to_path_buf(), dir, done: false })
    }

    /// Where to write.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Gives the folder its name.
    pub(crate) fn commit(mut self) -> Result<()> {
        let fail = |e| Error::io(&self.target, e);
        sync_dir(&self.dir)?;
        if self.target.is_dir() {
            let old = self.target.with_file_name(format!(".old-{}-{}", std::process::id(), name(&self.target)));
            fs::rename(&self.target, &old).map_err(fail)?;
            fs::rename(&self.dir, &self.target).map_err(fail)?;
            self.done = true;
            return fs::remove_dir_all(&old).map_err(|e| Error::io(&old, e));
        }
        fs::rename(&self.dir, &self.target).map_err(fail)?;
        self.done = true;
        match self.target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => sync_dir(parent),
            _ => Ok(()),
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.done {
            // A failure to tidy up would hide the reason why there is something to tidy up.
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// Makes renames durable. Only Unix can open a folder to sync it.
fn sync_dir(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(dir).and_then(|file| file.sync_all()).map_err(|e| Error::io(dir, e))?;
    }
    Ok(())
}
