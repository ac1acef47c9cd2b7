//! Files that one process holds while it writes, gone when it is done.
//!
//! A lock is a new file of a fixed name, locked by its holder until it is dropped, and removed then. One that is found is
//! either held, or was left by a process that was killed: the system gives its lock back. Nothing is ever opened through a
//! link or emptied, since the folder may come from anybody.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use crate::error::HELD;
use crate::error::{Error, Result};

/// A lock that this process holds until it is dropped.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    /// Whether dropping removes the file; a lock that has been renamed is no longer ours to remove.
    here: bool,
    pub(crate) file: File,
}

/// What may be under the name of a lock that nobody holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leftover {
    /// Only an empty file, as locks are.
    Empty,
    /// A half-written file.
    Any,
}

/// Takes the lock `path`, whose folder exists.
///
/// # Errors
/// [`Error::Held`] where another process holds it; [`Error::Refused`] where something else bears the name; [`Error::Io`] where
/// the folder cannot be written.
pub fn lock(path: &Path) -> Result<Lock> {
    Lock::take(path, Leftover::Empty)
}

/// Whether somebody holds the lock `path`. It is not taken for that: what is found is locked for a moment, in a way that several
/// who ask at once do not take each other for a holder.
pub fn is_held(path: &Path) -> bool {
    if !path.symlink_metadata().is_ok_and(|found| found.is_file()) {
        return false;
    }
    look(path).is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

/// Opens what bears the name of a lock, and follows no link.
fn look(path: &Path) -> std::io::Result<File> {
    let mut options = File::options();
    options.read(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    }
    options.open(path)
}

impl Lock {
    pub(crate) fn take(path: &Path, leftover: Leftover) -> Result<Self> {
        /// Who only asks whether a lock is held has it for less than the time of these.
        const GLANCES: u32 = 3;
        let mut held = 0;
        // A few rounds: another process may take, drop or clear away the same name between two of our calls.
        for _ in 0..100 {
            match File::options().read(true).write(true).create_new(true).open(path) {
                Ok(file) => {
                    let mut lock = Self { path: path.to_path_buf(), here: false, file };
                    match lock.file.try_lock() {
                        // Some network file systems know no locks; there the name alone must do.
                        Ok(()) => {}
                        Err(TryLockError::Error(e)) if e.kind() == ErrorKind::Unsupported => {}
                        // Taken for a leftover by somebody who came between: begin again.
                        Err(TryLockError::WouldBlock) => continue,
                        Err(TryLockError::Error(e)) => return Err(Error::io("lock", path)(e)),
                    }
                    if same_file(&lock.file, path) {
                        lock.here = true;
                        return Ok(lock);
                    }
                }
                Err(e) if e.kind() == ErrorKind::AlreadyExists => match clear(path, leftover) {
                    Err(Error::Held { .. }) if held < GLANCES => {
                        held += 1;
                        std::thread::sleep(Duration::from_millis(2));
                    }
                    cleared => cleared?,
                },
                Err(e) => return Err(Error::io("write", path)(e)),
            }
        }
        Err(Error::refused(path, "is taken and dropped by other processes all the time; try again"))
    }

    /// Gives the locked file another name, under which it stays.
    pub(crate) fn rename(mut self, to: &Path) -> Result<()> {
        fs::rename(&self.path, to).map_err(Error::io("rename", to))?;
        self.here = false;
        Ok(())
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if self.here {
            // Still locked: nobody can take it for theirs between these two.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Removes what a killed process left under the name of a lock.
fn clear(path: &Path, leftover: Leftover) -> Result<()> {
    let found = match path.symlink_metadata() {
        Ok(found) => found,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io("read", path)(e)),
    };
    if !found.is_file() || (leftover == Leftover::Empty && found.len() > 0) {
        let why = "is in the way, and lowkey did not put it there: remove it, or move it elsewhere";
        return Err(Error::refused(path, why));
    }
    let file = match look(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io("read", path)(e)),
    };
    match file.try_lock() {
        Ok(()) if same_file(&file, path) => match fs::remove_file(path) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            Err(e) => Err(Error::io("remove", path)(e)),
        },
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(Error::Held { path: path.to_path_buf() }),
        Err(TryLockError::Error(e)) => Err(Error::io("lock", path)(e)),
    }
}

/// Whether `path` still names the open file.
#[cfg(unix)]
fn same_file(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let (Ok(open), Ok(named)) = (file.metadata(), path.symlink_metadata()) else { return false };
    (open.dev(), open.ino()) == (named.dev(), named.ino())
}

/// Elsewhere an open file cannot be removed by others.
#[cfg(not(unix))]
fn same_file(_: &File, path: &Path) -> bool {
    path.exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holds_it_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".lock");
        let held = lock(&path).unwrap();
        let why = lock(&path).unwrap_err().to_string();
        assert!(why.contains("another process"), "{why}");
        drop(held);
        assert!(!path.exists());
        // What a killed process leaves.
        fs::write(&path, "").unwrap();
        drop(lock(&path).unwrap());
        assert!(!path.exists());
    }

    #[test]
    fn who_asks_whether_it_is_held_takes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".lock");
        assert!(!is_held(&path) && !path.exists());
        let held = lock(&path).unwrap();
        assert!(is_held(&path) && is_held(&path));
        drop(held);
        fs::write(&path, "").unwrap();
        assert!(!is_held(&path) && path.exists());
        // Two who ask at once do not take each other for a holder.
        let glance = look(&path).unwrap();
        glance.try_lock_shared().unwrap();
        assert!(!is_held(&path));
    }

    #[test]
    fn many_that_ask_at_once_hold_it_one_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let (path, inside) = (dir.path().join(".lock"), std::sync::atomic::AtomicUsize::new(0));
        let taken = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let Ok(_held) = lock(&path) else { continue };
                        use std::sync::atomic::Ordering::SeqCst;
                        assert_eq!(inside.fetch_add(1, SeqCst), 0);
                        taken.fetch_add(1, SeqCst);
                        inside.fetch_sub(1, SeqCst);
                    }
                });
            }
        });
        assert!(taken.into_inner() > 0);
        assert!(!path.exists());
    }

    #[cfg(unix)]
    #[test]
    fn neither_a_link_nor_a_file_of_somebody_is_emptied_or_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, key) = (dir.path().join(".lock"), dir.path().join("key"));
        fs::write(&key, "secret").unwrap();
        std::os::unix::fs::symlink(&key, &path).unwrap();
        assert!(lock(&path).unwrap_err().to_string().contains("in the way"));
        fs::remove_file(&path).unwrap();
        fs::write(&path, "notes").unwrap();
        assert!(lock(&path).unwrap_err().to_string().contains("in the way"));
        assert_eq!(fs::read_to_string(&key).unwrap() + &fs::read_to_string(&path).unwrap(), "secretnotes");
    }
}
