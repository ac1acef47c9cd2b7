//! Reading what may come from anybody: regular files alone, and no more of them than is sensible.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result, shown};

/// Opens a regular file. A pipe or a device may have no end, or none to write it, and a folder has no bytes.
///
/// # Errors
/// [`Error::Refused`] for what is no regular file, and for a link to nothing; [`Error::Io`] where the system refuses.
pub fn open(path: &Path) -> Result<File> {
    // Looked at before it is opened, because to open a device can be an act in itself …
    let found = match fs::metadata(path) {
        Ok(found) => found,
        Err(e) => return Err(dangling(path).unwrap_or_else(|| Error::io("read", path)(e))),
    };
    check(path, &found)?;
    let mut options = File::options();
    options.read(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        // … and opened so that a pipe put there meanwhile does not hold us up.
        options.custom_flags(libc::O_NONBLOCK);
    }
    let file = options.open(path).map_err(Error::io("read", path))?;
    check(path, &file.metadata().map_err(Error::io("read", path))?)?;
    Ok(file)
}

fn check(path: &Path, found: &fs::Metadata) -> Result<()> {
    if found.is_dir() {
        return Err(Error::refused(path, "is not a regular file: it is a folder"));
    }
    if !found.is_file() {
        return Err(Error::refused(path, "is not a regular file (a pipe, a device or a socket): it is not read"));
    }
    Ok(())
}

/// The better word on a link that leads to nothing.
pub(crate) fn dangling(path: &Path) -> Option<Error> {
    let target = fs::read_link(path).ok()?;
    if path.exists() {
        return None;
    }
    let why = format!("is a link to {}, and nothing is there; copy what it should point to", shown(&target));
    Some(Error::refused(path, why))
}

/// The content of a regular file of at most `largest` bytes.
///
/// # Errors
/// As [`open`]; [`Error::Refused`] for a longer file.
pub fn read(path: &Path, largest: u64) -> Result<Vec<u8>> {
    let file = open(path)?;
    let len = file.metadata().map_err(Error::io("read", path))?.len();
    let mut bytes = Vec::with_capacity(usize::try_from(len.min(largest)).unwrap_or_default());
    // One byte more tells a file that is longer, or grows, from one that is not.
    file.take(largest.saturating_add(1)).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > largest {
        let why = format!("has {} bytes; such a file has at most {largest}", len.max(bytes.len() as u64));
        return Err(Error::refused(path, why));
    }
    Ok(bytes)
}

/// The text of a regular file of at most `largest` bytes.
///
/// # Errors
/// As [`read()`]; [`Error::Refused`] where it is not UTF-8.
pub fn read_text(path: &Path, largest: u64) -> Result<String> {
    String::from_utf8(read(path, largest)?).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::refused(path, format!("invalid UTF-8 at byte {at}; convert the file to UTF-8"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_up_to_its_bound() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, "four").unwrap();
        assert_eq!(read(&path, 4).unwrap(), b"four");
        assert!(read(&path, 3).unwrap_err().to_string().contains("at most 3"));
        fs::write(&path, [b'a', 0xff]).unwrap();
        assert!(read_text(&path, 9).unwrap_err().to_string().contains("invalid UTF-8 at byte 1"));
    }

    #[cfg(unix)]
    #[test]
    fn what_is_no_regular_file_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        let name = std::ffi::CString::new(fifo.to_str().unwrap()).unwrap();
        // SAFETY: the name is a C string.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        let (gone, circle) = (dir.path().join("gone"), dir.path().join("circle"));
        std::os::unix::fs::symlink("nowhere", &gone).unwrap();
        std::os::unix::fs::symlink("circle", &circle).unwrap();
        for (path, word) in [
            (fifo.as_path(), "not a regular file"),
            (Path::new("/dev/zero"), "not a regular file"),
            (dir.path(), "folder"),
            (&gone, "link to nowhere"),
            (&circle, "link to circle"),
        ] {
            let why = open(path).unwrap_err().to_string();
            assert!(why.contains(word), "{why}");
        }
        assert!(open(&dir.path().join("none")).unwrap_err().is_missing());
    }
}
