//! The files of an export, listed with their hashes.

use std::path::Path;

use lowkey_files::{
    hash::{FileHash, hash},
    mark::MARK,
};

use crate::error::{Error, Result};

/// Name, size and hash of a file of the folder `dir`; the name has `/` between its parts.
pub(crate) fn hash_of(dir: &Path, name: &str) -> Result<FileHash> {
    Ok(FileHash { name: name.to_owned(), ..hash(&dir.join(name))? })
}

/// The regular files of a folder, and of the folders in it, in the order of their names; hidden ones do not count, nor does the
/// mark of their maker.
pub(crate) fn list(dir: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    walk(dir, "", &mut found)?;
    found.sort();
    Ok(found)
}

fn walk(dir: &Path, below: &str, found: &mut Vec<String>) -> Result<()> {
    let at = dir.join(below);
    let fail = |e| Error::io(&at, e);
    for entry in std::fs::read_dir(&at).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        let name = format!("{below}{}", name(&path));
        if self::name(&path).starts_with('.') || name == MARK {
            continue;
        }
        if path.is_dir() {
            walk(dir, &format!("{name}/"), found)?;
        } else if path.is_file() {
            found.push(name);
        }
    }
    Ok(())
}

/// The last part of a path as text.
pub(crate) fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
