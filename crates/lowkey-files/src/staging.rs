//! Folders that are written beside their place and take their name when they are whole.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::lock::{Lock, lock};
use crate::mark::{Kind, MARK, Mark};
use crate::write::{BEGUN, LOCK, NEW, OLD, create_dir, hidden, parent, remove_tree, sync_dir, write_json};

/// What may become of a folder that is there already and holds something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replace {
    /// It stays, and there is an error.
    Never,
    /// It is replaced where its [`Mark`] vouches for all that it holds.
    Marked,
    /// It is replaced: the caller has made sure that it is lowkey's.
    Vouched,
}

/// A folder being written. Dropped before [`Staging::commit`] it leaves nothing.
#[derive(Debug)]
pub struct Staging {
    target: PathBuf,
    dir: PathBuf,
    kind: Kind,
    replace: Replace,
    // Last, so that it is given up after the folder is gone.
    _lock: Lock,
}

impl Staging {
    /// Begins a folder that will stand at `target`, or where that links to.
    ///
    /// # Errors
    /// [`Error::Refused`] where what is there may not be replaced, or another process is writing it; [`Error::Io`].
    pub fn begin(target: &Path, kind: Kind, replace: Replace) -> Result<Self> {
        let target = resolve(target)?;
        create_dir(parent(&target))?;
        let lock = lock(&hidden(&target, LOCK)?)?;
        settle(&target)?;
        check(&target, kind, replace)?;
        let dir = hidden(&target, NEW)?;
        fs::create_dir(&dir).map_err(Error::io("create", &dir))?;
        Ok(Self { target, dir, kind, replace, _lock: lock })
    }

    /// Where to write; in any way, files and folders.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the folder will stand.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Writes the mark, syncs everything, and gives the folder its name. What it replaces is removed afterwards; where that
    /// fails the new folder stands all the same, and the path of what is left is returned.
    ///
    /// # Errors
    /// [`Error::Refused`] where what is to be replaced has changed meanwhile; [`Error::Io`]. What stood there then stands there
    /// still.
    pub fn commit(self) -> Result<Option<PathBuf>> {
        write_json(&self.dir.join(MARK), &Mark::of(&self.dir, self.kind)?)?;
        self.commit_unmarked()
    }

    /// As [`Staging::commit`], for a folder inside one that has a mark.
    ///
    /// # Errors
    /// As [`Staging::commit`].
    pub fn commit_unmarked(self) -> Result<Option<PathBuf>> {
        sync_tree(&self.dir)?;
        // Somebody may have put a file there while this was at work.
        check(&self.target, self.kind, self.replace)?;
        let old = match self.target.symlink_metadata() {
            Ok(_) => Some(exchange(&self.dir, &self.target)?),
            Err(_) => {
                fs::rename(&self.dir, &self.target).map_err(Error::io("rename", &self.target))?;
                None
            }
        };
        sync_dir(parent(&self.target))?;
        Ok(old.filter(|old| remove_tree(old).is_err()))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // A failure to tidy up would hide the reason why there is something to tidy up. After a commit there is nothing.
        let _ = remove_tree(&self.dir);
    }
}

/// Puts in order what a process left that was killed while it wrote the folder `target`, unless one is at it now: an old folder
/// is put back where nothing bears its name, and half-written ones are removed.
///
/// # Errors
/// [`Error::Io`].
pub fn recover(target: &Path) -> Result<()> {
    let Ok(target) = resolve(target) else { return Ok(()) };
    let left =
        [NEW, OLD, LOCK].iter().any(|end| hidden(&target, end).is_ok_and(|path| path.symlink_metadata().is_ok()));
    if !left {
        return Ok(());
    }
    match lock(&hidden(&target, LOCK)?) {
        Ok(_held) => settle(&target),
        Err(Error::Refused { .. } | Error::Held { .. }) => Ok(()),
        Err(e) => Err(e),
    }
}

/// A folder beside `target` for what whoever makes that one has done so far, for the next who makes it to go on with. It is used under the lock
/// of a [`Staging`], and stays until it is removed.
///
/// # Errors
/// [`Error::Refused`] where `target` has no name of its own.
pub fn begun(target: &Path) -> Result<PathBuf> {
    hidden(&resolve(target)?, BEGUN)
}

/// What [`recover`] does, under the lock.
fn settle(target: &Path) -> Result<()> {
    let old = hidden(target, OLD)?;
    if old.symlink_metadata().is_ok() && target.symlink_metadata().is_err() {
        fs::rename(&old, target).map_err(Error::io("rename", &old))?;
    }
    remove_tree(&old)?;
    remove_tree(&hidden(target, NEW)?)
}

/// The folder that a path stands for: links are followed, and `.` and `..` get their names.
fn resolve(path: &Path) -> Result<PathBuf> {
    match path.canonicalize() {
        Ok(real) => Ok(real),
        Err(e) if e.kind() == ErrorKind::NotFound => match crate::read::dangling(path) {
            Some(refused) => Err(refused),
            None => Ok(path.to_path_buf()),
        },
        Err(e) => Err(Error::io("find", path)(e)),
    }
}

fn check(target: &Path, kind: Kind, replace: Replace) -> Result<()> {
    let found = match target.symlink_metadata() {
        Ok(found) => found,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io("read", target)(e)),
    };
    if !found.is_dir() {
        let why = format!("is a file, and {} is a folder: give another --out", kind.name());
        return Err(Error::refused(target, why));
    }
    let here = std::env::current_dir().ok().and_then(|dir| dir.canonicalize().ok());
    if here.is_some_and(|here| here.starts_with(target)) {
        return Err(Error::refused(target, "is the folder that you are in, or above it: give another --out"));
    }
    if fs::read_dir(target).map_err(Error::io("read", target))?.next().is_none() {
        return Ok(());
    }
    match replace {
        Replace::Never => {
            Err(Error::refused(target, "already holds something; give another --out, or --overwrite to replace it"))
        }
        Replace::Marked => Mark::vouch(target, kind),
        Replace::Vouched => Ok(()),
    }
}

/// Makes `new` the folder under the name `target` and returns where the old one is: in one step where the system can.
fn exchange(new: &Path, target: &Path) -> Result<PathBuf> {
    match exchange_at_once(new, target) {
        Ok(true) => return Ok(new.to_path_buf()),
        Ok(false) => {}
        Err(e) => return Err(Error::io("rename", target)(e)),
    }
    // Between these two nothing bears the name; `recover` puts the old one back.
    let old = hidden(target, OLD)?;
    fs::rename(target, &old).map_err(Error::io("rename", target))?;
    if let Err(e) = fs::rename(new, target) {
        let _ = fs::rename(&old, target);
        return Err(Error::io("rename", target)(e));
    }
    Ok(old)
}

/// `Ok(false)` where the system or the file system has no such call.
#[cfg(any(target_os = "linux", target_os = "macos"))]
fn exchange_at_once(a: &Path, b: &Path) -> std::io::Result<bool> {
    use std::ffi::CString;
    use std::os::unix::ffi::OsStrExt;
    let name = |path: &Path| CString::new(path.as_os_str().as_bytes()).map_err(std::io::Error::from);
    let (a, b) = (name(a)?, name(b)?);
    // SAFETY: both are C strings that live until the call returns.
    #[cfg(target_os = "linux")]
    let done =
        unsafe { libc::renameat2(libc::AT_FDCWD, a.as_ptr(), libc::AT_FDCWD, b.as_ptr(), libc::RENAME_EXCHANGE) };
    // SAFETY: as above.
    #[cfg(target_os = "macos")]
    let done = unsafe { libc::renamex_np(a.as_ptr(), b.as_ptr(), libc::RENAME_SWAP) };
    if done == 0 {
        return Ok(true);
    }
    let e = std::io::Error::last_os_error();
    match e.raw_os_error() {
        Some(libc::ENOSYS | libc::EINVAL | libc::ENOTSUP) => Ok(false),
        _ => Err(e),
    }
}

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
fn exchange_at_once(_: &Path, _: &Path) -> std::io::Result<bool> {
    Ok(false)
}

/// Syncs every file and folder below `dir`, and `dir`.
fn sync_tree(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(Error::io("read", dir))? {
        let path = entry.map_err(Error::io("read", dir))?.path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            File::open(&path).and_then(|file| file.sync_all()).map_err(Error::io("sync", &path))?;
        }
    }
    sync_dir(dir)
}

#[cfg(test)]
mod tests;
