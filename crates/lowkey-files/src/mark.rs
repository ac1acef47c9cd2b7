//! Who made a folder: `lowkey.json`, which names its files and their hashes.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::hash::sha256;
use crate::names::{is_plain_name, printable};
use crate::read::read_text;
use crate::write::write_json;

/// Name of the file that a folder's maker and files stand in.
pub const MARK: &str = "lowkey.json";

/// Far more than a folder of any model needs.
const LARGEST: u64 = 64 << 20;

/// What a folder is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A model directory that was converted or merged.
    Model,
    /// An export with its certificate.
    Export,
    /// A prepared dataset.
    Data,
    /// A training run.
    Run,
    /// The runs and reports of an experiment.
    Study,
}

impl Kind {
    /// As a message calls it, with its article.
    pub fn name(self) -> &'static str {
        match self {
            Self::Model => "a converted model",
            Self::Export => "an export",
            Self::Data => "a prepared dataset",
            Self::Run => "a run",
            Self::Study => "a study",
        }
    }
}

/// The content of `lowkey.json`: by it lowkey knows again what it made, and replaces nothing else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The program and its version.
    pub made_by: String,
    /// What the folder is.
    pub kind: Kind,
    /// Its files, with `/` between the parts of a name, and their SHA-256; `None` for files that grow or change.
    pub files: BTreeMap<String, Option<String>>,
}

impl Mark {
    /// A mark by this version.
    pub fn new(kind: Kind, files: BTreeMap<String, Option<String>>) -> Self {
        Self { made_by: format!("lowkey {}", env!("CARGO_PKG_VERSION")), kind, files }
    }

    /// The mark of a folder; `None` where it has none.
    ///
    /// # Errors
    /// [`Error::Refused`] where it cannot be read or names what is no file of a folder.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(MARK);
        let text = match read_text(&path, LARGEST) {
            Ok(text) => text,
            Err(e) if e.is_missing() => return Ok(None),
            Err(e) => return Err(e),
        };
        let mark: Self = serde_json::from_str(&text)
            .map_err(|e| Error::refused(&path, format!("is not what lowkey writes under this name: {e}")))?;
        match mark.files.keys().find(|name| !name.split('/').all(is_plain_name)) {
            Some(name) => {
                Err(Error::refused(&path, format!("names \"{}\", which is no file of this folder", printable(name))))
            }
            None => Ok(Some(mark)),
        }
    }

    /// Adds a file that changes to the mark of a folder of this kind; where the folder has no such mark, nothing is done.
    ///
    /// # Errors
    /// As [`Mark::read`], and [`Error::Io`] where the mark cannot be written.
    pub fn add(dir: &Path, kind: Kind, name: &str) -> Result<()> {
        match Self::read(dir)? {
            Some(mut mark) if mark.kind == kind && !mark.files.contains_key(name) => {
                mark.files.insert(name.to_string(), None);
                write_json(&dir.join(MARK), &mark)
            }
            _ => Ok(()),
        }
    }

    /// Every regular file below `dir` but the mark itself, with its hash.
    pub(crate) fn of(dir: &Path, kind: Kind) -> Result<Self> {
        let mut files = BTreeMap::new();
        walk(dir, "", &mut |name, is_file| {
            if !is_file {
                return Err(Error::refused(&dir.join(name), "is not a regular file"));
            }
            files.insert(name.to_string(), Some(sha256(&dir.join(name))?));
            Ok(())
        })?;
        Ok(Self::new(kind, files))
    }

    /// Whether all that `dir` holds is what a lowkey once wrote there as a folder of this kind, and nobody has changed it.
    ///
    /// # Errors
    /// [`Error::Refused`] with the first thing that lowkey cannot know to be its own.
    pub fn vouch(dir: &Path, kind: Kind) -> Result<()> {
        let elsewhere = "move it away, or give another --out";
        let Some(mark) = Self::read(dir)? else {
            let why = format!(
                "holds something, and no {MARK} says that lowkey made it: --overwrite replaces what lowkey made, and \
                 nothing else; remove the folder yourself, or give another --out"
            );
            return Err(Error::refused(dir, why));
        };
        if mark.kind != kind {
            let why = format!("is {}, and {} does not replace it: {elsewhere}", mark.kind.name(), kind.name());
            return Err(Error::refused(dir, why));
        }
        walk(dir, "", &mut |name, is_file| {
            let path = dir.join(name);
            match mark.files.get(name) {
                Some(expected) if is_file => match expected {
                    Some(expected) if sha256(&path)? != *expected => {
                        Err(Error::refused(&path, format!("has been changed since lowkey wrote it: {elsewhere}")))
                    }
                    _ => Ok(()),
                },
                _ => Err(Error::refused(&path, format!("was not written by lowkey, and would be lost: {elsewhere}"))),
            }
        })
        .map(|_| ())
    }
}

/// Calls `each` with every entry below `dir` that is no folder (its name relative to `dir`, whether it is a regular file),
/// the mark excepted, and with empty folders.
fn walk(dir: &Path, below: &str, each: &mut dyn FnMut(&str, bool) -> Result<()>) -> Result<bool> {
    let at = dir.join(below);
    let mut any = false;
    for entry in fs::read_dir(&at).map_err(Error::io("read", &at))? {
        let entry = entry.map_err(Error::io("read", &at))?;
        any = true;
        let name = entry.file_name();
        let name = match below {
            "" => name.to_string_lossy().into_owned(),
            _ => format!("{below}/{}", name.to_string_lossy()),
        };
        if name == MARK {
            continue;
        }
        let kind = entry.file_type().map_err(Error::io("read", &entry.path()))?;
        if !kind.is_dir() {
            each(&name, kind.is_file())?;
        } else if !walk(dir, &name, each)? {
            each(&name, false)?;
        }
    }
    Ok(any)
}
