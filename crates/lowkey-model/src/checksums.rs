//! `checksums.json`: the SHA-256 of every file of a model directory, so that nothing is loaded that is not what was saved.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lowkey_files::{companions, hash::sha256, is_plain_name, mark::MARK, printable, read_text, write_json};

use crate::adapter::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter};
use crate::checkpoint::weight_files;
use crate::error::{Error, Result};

/// Name of the table.
pub const CHECKSUMS: &str = "checksums.json";

/// Far more than the table of any model needs.
const LARGEST: u64 = 16 << 20;

/// Whether a model directory carries checksums. Whatever bears the name counts: [`verify`] says what is wrong with it.
pub fn has_checksums(dir: &Path) -> bool {
    dir.join(CHECKSUMS).symlink_metadata().is_ok()
}

/// Writes the checksums of all files that now lie in `dir`.
///
/// # Errors
/// [`Error::File`] or [`Error::Io`] where a file cannot be read or the table not written.
pub fn write_checksums(dir: &Path) -> Result<()> {
    let mut table = BTreeMap::new();
    for name in files(dir)? {
        let sum = sha256(&dir.join(&name))?;
        table.insert(name, sum);
    }
    Ok(write_json(&dir.join(CHECKSUMS), &table)?)
}

/// Computes every checksum again. The weights, the configuration and whatever else a reader would load must be listed, so that an
/// empty table does not pass for a whole model.
///
/// # Errors
/// [`Error::File`] naming the first file that differs, is missing, or is not listed.
pub fn verify(dir: &Path) -> Result<()> {
    let path = dir.join(CHECKSUMS);
    let refuse = |why: String| Error::file(&path, format!("not a table of checksums: {why}"));
    let text = read_text(&path, LARGEST)?;
    let table: BTreeMap<String, String> = serde_json::from_str(&text).map_err(|e| refuse(e.to_string()))?;
    if let Some(name) = table.keys().find(|name| !name.split('/').all(is_plain_name)) {
        return Err(refuse(format!("\"{}\" is no file of this folder", printable(name))));
    }
    for (name, expected) in &table {
        let path = dir.join(name);
        let found = sha256(&path)?;
        if found != *expected {
            let why = format!(
                "its SHA-256 is {found}, not {} as when it was saved: the file has changed since; use another checkpoint, \
                 or remove {CHECKSUMS} if the change was meant",
                printable(expected)
            );
            return Err(Error::file(path, why));
        }
    }
    let wanted: Vec<String> = if is_adapter(dir) {
        [ADAPTER_CONFIG, ADAPTER_WEIGHTS].map(String::from).to_vec()
    } else {
        let weights = weight_files(dir)?.into_iter().map(|path| name_of(&path));
        ["config.json".to_string()].into_iter().chain(weights).collect()
    };
    let there = files(dir)?.into_iter().filter(|name| is_loaded(name));
    match wanted.into_iter().chain(there).find(|name| !table.contains_key(name)) {
        Some(name) => {
            let why = format!(
                "does not list {}: the file was put there, or its line taken away, since the model was saved; use another \
                 checkpoint, or remove {CHECKSUMS} if the change was meant",
                printable(&name)
            );
            Err(Error::file(path, why))
        }
        None => Ok(()),
    }
}

/// Whether some reader of model directories takes a file of this name into account.
fn is_loaded(name: &str) -> bool {
    // Vocabularies end in `.txt`, and so do a user's notes.
    let end = [".json", ".safetensors", ".jinja", ".model", ".bin"].iter().any(|end| name.ends_with(end));
    end || companions::largest(name).is_some()
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The regular files of a model directory and of the folders in it, with `/` between the parts of a name; neither the table
/// itself nor the mark of its maker.
fn files(dir: &Path) -> Result<Vec<String>> {
    let list = |dir: &Path| -> Result<Vec<PathBuf>> {
        let fail = |e| Error::io(dir, e);
        std::fs::read_dir(dir).map_err(fail)?.map(|entry| Ok(entry.map_err(fail)?.path())).collect()
    };
    let mut names = Vec::new();
    for path in list(dir)? {
        if path.is_dir() {
            let folder = name_of(&path);
            let below = list(&path)?.into_iter().filter(|path| path.is_file());
            names.extend(below.map(|path| format!("{folder}/{}", name_of(&path))));
        } else if path.is_file() {
            names.push(name_of(&path));
        }
    }
    names.retain(|name| name != CHECKSUMS && name != MARK && !name.starts_with('.'));
    names.sort();
    Ok(names)
}
