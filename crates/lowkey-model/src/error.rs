//! What can go wrong between a file and a model.
//!
//! Names and values in these messages are a stranger's; what would steer a terminal is shown escaped.

use std::path::{Path, PathBuf};

use lowkey_files::{printable, printable_lines};

/// Why a configuration or a model directory was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A key of the model configuration has a value that no model can be built from.
    #[error("model.{key} = {value}: {why}")]
    Config {
        /// The key as the run file or `config.json` spells it.
        key: &'static str,
        /// The offending value as text.
        value: String,
        /// The rule it breaks and the mend.
        why: String,
    },
    /// A key that this attention kind needs is missing.
    #[error("model.{key} is missing: {why}")]
    MissingKey {
        /// The key as the run file or `config.json` spells it.
        key: &'static str,
        /// What needs it.
        why: String,
    },
    /// A key of an adapter has a value that no adapter can be made from.
    #[error("adapter.{key} = {value}: {why}")]
    Adapter {
        /// The key as the run file or `adapter_config.json` spells it.
        key: &'static str,
        /// The offending value as text.
        value: String,
        /// The rule it breaks and the mend.
        why: String,
    },
    /// A file of a model directory is not what it should be.
    #[error("{}: {why}", shown(path))]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong and the mend.
        why: String,
    },
    /// A file could not be read or written.
    #[error("{}: {reason}", shown(path))]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's reason. It stands in the message, hence is no source that a chain would print again.
        reason: std::io::Error,
    },
    /// The tensors of a checkpoint do not fit the model that its configuration describes.
    #[error("{}: the weights do not fit config.json\n{}", shown(path), report(missing, unexpected, mismatched))]
    Tensors {
        /// The model directory.
        path: PathBuf,
        /// Names that the model needs and no file has.
        missing: Vec<String>,
        /// Names that some file has and the model does not know.
        unexpected: Vec<String>,
        /// `name: expected shape, found shape`.
        mismatched: Vec<String>,
    },
}

fn shown(path: &Path) -> String {
    printable(&path.display().to_string()).into_owned()
}

fn report(missing: &[String], unexpected: &[String], mismatched: &[String]) -> String {
    // A configuration of another model misses hundreds; the first ones tell which.
    const SHOWN: usize = 12;
    let mut lines = Vec::new();
    for (label, names) in [("missing", missing), ("unexpected", unexpected), ("wrong shape", mismatched)] {
        if !names.is_empty() {
            let more = if names.len() > SHOWN { ", …" } else { "" };
            let shown = names[..names.len().min(SHOWN)].join(", ");
            lines.push(format!("  {label} ({}): {}{more}", names.len(), printable(&shown)));
        }
    }
    lines.join("\n")
}

/// A value as a message shows it: a file may hold a list of a million numbers where a number belongs.
pub(crate) fn shortened(mut text: String) -> String {
    const SHOWN: usize = 200;
    if let Some((end, _)) = text.char_indices().nth(SHOWN) {
        text.truncate(end);
        text.push('…');
    }
    text
}

impl Error {
    pub(crate) fn config(key: &'static str, value: &(impl ToString + ?Sized), why: impl Into<String>) -> Self {
        let value = shortened(printable(&value.to_string()).into_owned());
        Self::Config { key, value, why: printable(&why.into()).into_owned() }
    }

    pub(crate) fn adapter(key: &'static str, value: &(impl ToString + ?Sized), why: impl Into<String>) -> Self {
        let value = shortened(printable(&value.to_string()).into_owned());
        Self::Adapter { key, value, why: printable(&why.into()).into_owned() }
    }

    pub(crate) fn file(path: impl Into<PathBuf>, why: impl Into<String>) -> Self {
        Self::File { path: path.into(), why: printable_lines(&why.into()).into_owned() }
    }

    pub(crate) fn io(path: impl Into<PathBuf>, reason: std::io::Error) -> Self {
        Self::Io { path: path.into(), reason }
    }
}

impl From<lowkey_files::Error> for Error {
    fn from(error: lowkey_files::Error) -> Self {
        match error {
            lowkey_files::Error::Io { path, why, .. } => Self::io(path, why),
            lowkey_files::Error::Refused { path, why } => Self::File { path, why },
            lowkey_files::Error::Held { path } => Self::file(path, lowkey_files::lock::HELD),
        }
    }
}

/// The result of this crate's fallible functions.
pub type Result<T> = std::result::Result<T, Error>;
