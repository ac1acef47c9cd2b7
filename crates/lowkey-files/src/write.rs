//! One file at a time: written beside its place, synced, renamed.

use std::fs::{self, File};
use std::io::{ErrorKind, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::{Error, Result};
use crate::lock::{Leftover, Lock};
use crate::read::{dangling, open};
use crate::staging::recover;

/// Ends the name of what is being written, `.NAME.lowkey-new`.
pub(crate) const NEW: &str = ".lowkey-new";
/// Ends the name of a folder that is being replaced, where a system cannot exchange two.
pub(crate) const OLD: &str = ".lowkey-old";
/// Ends the name of a folder with what is done so far of another one.
pub(crate) const BEGUN: &str = ".lowkey-begun";
/// Ends the name of the lock on a folder that is being written.
pub(crate) const LOCK: &str = ".lowkey-lock";

/// A file that gets its name when it is whole. Dropped before [`NewFile::commit`] it leaves nothing.
#[derive(Debug)]
pub struct NewFile {
    target: PathBuf,
    aside: Lock,
}

impl NewFile {
    /// Begins a file beside `path`. Where `path` is a link, what it points to is what will be replaced.
    ///
    /// # Errors
    /// [`Error::Refused`] where `path` is a folder, a device or a link to nothing, or another process is writing it;
    /// [`Error::Io`] where the folder cannot be written.
    pub fn create(path: &Path) -> Result<Self> {
        let target = target(path)?;
        let aside = Lock::take(&hidden(&target, NEW)?, Leftover::Any)?;
        Ok(Self { target, aside })
    }

    /// Puts what has been written so far on the disk, so that committing is short.
    ///
    /// # Errors
    /// The system's.
    pub fn sync(&self) -> std::io::Result<()> {
        self.aside.file.sync_all()
    }

    /// Syncs the file and gives it its name, with the permissions of the file that it replaces.
    ///
    /// # Errors
    /// [`Error::Io`]; the old file then stays as it was.
    pub fn commit(self) -> Result<()> {
        let fail = |e| Error::io("write", &self.target)(e);
        if let Ok(old) = self.target.metadata() {
            self.aside.file.set_permissions(old.permissions()).map_err(fail)?;
        }
        self.aside.file.sync_all().map_err(fail)?;
        self.aside.rename(&self.target)?;
        sync_dir(parent(&self.target))
    }
}

impl Write for NewFile {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.aside.file.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.aside.file.flush()
    }
}

impl Seek for NewFile {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.aside.file.seek(to)
    }
}

/// What a path stands for as the place of a file: itself, or what it links to.
fn target(path: &Path) -> Result<PathBuf> {
    match path.metadata() {
        Ok(found) if found.is_dir() => Err(Error::refused(path, "is a folder, not a file: give the name of a file")),
        Ok(found) if !found.is_file() => Err(Error::refused(path, "is not a regular file: it is not replaced")),
        Ok(_) => match path.symlink_metadata() {
            Ok(found) if found.is_symlink() => path.canonicalize().map_err(Error::io("find", path)),
            _ => Ok(path.to_path_buf()),
        },
        Err(e) if e.kind() == ErrorKind::NotFound => match dangling(path) {
            Some(refused) => Err(refused),
            None => Ok(path.to_path_buf()),
        },
        Err(e) => Err(Error::io("write", path)(e)),
    }
}

/// The name under which what belongs to `path` is written aside.
pub(crate) fn hidden(path: &Path, end: &str) -> Result<PathBuf> {
    let name =
        path.file_name().ok_or_else(|| Error::refused(path, "has no name of its own: give one that ends in a name"))?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(end);
    Ok(path.with_file_name(hidden))
}

/// The folder that a path lies in.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Writes a file: whole, or not at all.
///
/// # Errors
/// As [`NewFile::create`] and [`NewFile::commit`].
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = NewFile::create(path)?;
    file.write_all(bytes).map_err(Error::io("write", path))?;
    file.commit()
}

/// Writes a value as JSON for people, ending in a line break: whole, or not at all.
///
/// # Errors
/// As [`write()`]; [`Error::Refused`] for a value that JSON cannot hold.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Error::refused(path, format!("cannot be written as JSON: {e}")))?;
    write(path, (text + "\n").as_bytes())
}

/// Writes what a command was asked to put at `path`. A regular file, there or not, is written whole or not at all, through a
/// link if need be. A pipe or a character device takes the bytes and stays what it is.
///
/// # Errors
/// As [`write()`]; [`Error::Refused`] for a folder, a disk or a socket.
pub fn output(path: &Path, bytes: &[u8]) -> Result<()> {
    if !path.metadata().is_ok_and(|found| takes_a_stream(&found)) {
        return write(path, bytes);
    }
    let mut file = File::options().write(true).open(path).map_err(Error::io("write", path))?;
    file.write_all(bytes).and_then(|()| file.flush()).map_err(Error::io("write", path))
}

#[cfg(unix)]
fn takes_a_stream(found: &fs::Metadata) -> bool {
    use std::os::unix::fs::FileTypeExt;
    found.file_type().is_fifo() || found.file_type().is_char_device()
}

#[cfg(not(unix))]
fn takes_a_stream(_: &fs::Metadata) -> bool {
    false
}

/// Opens a regular file for appending, and makes it where there is none. Never through a link: a log in a folder from
/// elsewhere could lead anywhere.
///
/// # Errors
/// [`Error::Refused`] for a link or anything that is no regular file; [`Error::Io`].
pub fn append(path: &Path) -> Result<File> {
    if path.symlink_metadata().is_ok_and(|found| !found.is_file()) {
        return Err(Error::refused(path, "is a link, or no regular file: nothing is appended to it; remove it"));
    }
    let mut options = File::options();
    options.create(true).append(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    }
    options.open(path).map_err(Error::io("write", path))
}

/// Copies a regular file to a new place: whole, or not at all.
///
/// # Errors
/// As [`open`] and [`write()`].
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let (mut from, mut file) = (open(from)?, NewFile::create(to)?);
    std::io::copy(&mut from, &mut file).map_err(Error::io("write", to))?;
    file.commit()
}

/// Makes `at` a relative link to `name` in the same folder, in one step; a link that is there is replaced.
///
/// # Errors
/// [`Error::Refused`] where `at` is there and is no link; [`Error::Io`].
#[cfg(unix)]
pub fn link(name: &str, at: &Path) -> Result<()> {
    if at.symlink_metadata().is_ok_and(|found| !found.is_symlink()) {
        return Err(Error::refused(at, "is no link, and lowkey puts one here: move it elsewhere"));
    }
    let aside = hidden(at, NEW)?;
    match fs::remove_file(&aside) {
        Ok(()) => {}
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(Error::io("remove", &aside)(e)),
    }
    std::os::unix::fs::symlink(name, &aside).map_err(Error::io("write", &aside))?;
    if let Err(e) = fs::rename(&aside, at) {
        // The reason matters more than what the clean-up says.
        let _ = fs::remove_file(&aside);
        return Err(Error::io("rename", at)(e));
    }
    sync_dir(parent(at))
}

/// Removes a file or a link; it is no error that there is none.
///
/// # Errors
/// [`Error::Io`].
pub fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io("remove", path)(e)),
        _ => Ok(()),
    }
}

/// Removes a folder with all that is in it, so that at no moment a part of it stands under its name; it is no error that
/// there is none. The caller answers for it that the folder is lowkey's.
///
/// # Errors
/// [`Error::Io`].
pub fn remove_dir(path: &Path) -> Result<()> {
    let gone = hidden(path, NEW)?;
    remove_tree(&gone)?;
    match fs::rename(path, &gone) {
        Ok(()) => remove_tree(&gone),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::io("remove", path)(e)),
    }
}

/// Removes whatever bears one of our hidden names.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    let found = match path.symlink_metadata() {
        Ok(found) => found,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io("remove", path)(e)),
    };
    let removed = if found.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    removed.map_err(Error::io("remove", path))
}

/// Clears away what killed processes left in `dir`: files, folders, links and locks with the hidden names of this crate that nobody
/// holds; an old folder that was about to be replaced is put back where nothing bears its name.
///
/// # Errors
/// [`Error::Io`].
pub fn sweep(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(Error::io("read", dir))? {
        let entry = entry.map_err(Error::io("read", dir))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let Some(hidden) = name.strip_prefix('.') else { continue };
        let path = entry.path();
        let is_file = path.symlink_metadata().is_ok_and(|found| found.is_file());
        if hidden.ends_with(NEW) && is_file {
            match Lock::take(&path, Leftover::Any) {
                Ok(held) => drop(held),
                // Somebody is writing it.
                Err(Error::Refused { .. } | Error::Held { .. }) => {}
                Err(e) => return Err(e),
            }
        } else if let Some(target) = [NEW, OLD, LOCK].iter().find_map(|end| hidden.strip_suffix(end)) {
            recover(&dir.join(target))?;
        }
    }
    Ok(())
}

/// Makes a folder and those above it.
///
/// # Errors
/// [`Error::Io`], and [`Error::Refused`] where a file is in the way.
pub fn create_dir(path: &Path) -> Result<()> {
    if let Some(refused) = dangling(path) {
        return Err(refused);
    }
    if path.is_file() {
        return Err(Error::refused(path, "is a file, and a folder is wanted here: give another name"));
    }
    fs::create_dir_all(path).map_err(Error::io("create", path))
}

/// Renames a file or a folder, and syncs the folder it lies in.
///
/// # Errors
/// [`Error::Io`].
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(Error::io("rename", from))?;
    sync_dir(parent(to))
}

/// Makes renames in a folder durable. Only Unix can open a folder to sync it.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(dir).and_then(|file| file.sync_all()).map_err(Error::io("sync", dir))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
