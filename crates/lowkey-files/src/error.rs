//! The one error type of the crate.

use std::io;
use std::path::{Path, PathBuf};

use crate::names::printable;

/// This crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What to do about [`Error::Held`].
pub const HELD: &str = "another process holds this and is writing here; wait for it, or write elsewhere";

/// Why a file or folder could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {doing} {}: {why}", shown(path))]
    Io {
        /// What was attempted, as a verb: "read", "write", "rename".
        doing: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason. (No `#[source]`: it already stands in the message.)
        why: io::Error,
    },
    /// What is there is not what may be read, or not lowkey's to replace.
    #[error("{}: {why}", shown(path))]
    Refused {
        /// The file or folder.
        path: PathBuf,
        /// The reason, and the mend.
        why: String,
    },
    /// Another process is writing here.
    #[error("{}: {HELD}", shown(path))]
    Held {
        /// The lock.
        path: PathBuf,
    },
}

impl Error {
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |why| Self::Io { doing, path: path.to_path_buf(), why }
    }

    pub(crate) fn refused(path: &Path, why: impl Into<String>) -> Self {
        Self::Refused { path: path.to_path_buf(), why: why.into() }
    }

    /// Whether the reason is that another process is writing here, so that it is worth waiting.
    pub fn is_held(&self) -> bool {
        matches!(self, Self::Held { .. })
    }

    /// Whether the reason is that there is no such file.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Io { why, .. } if why.kind() == io::ErrorKind::NotFound)
    }
}

/// A path as a message shows it.
pub(crate) fn shown(path: &Path) -> String {
    printable(&path.to_string_lossy()).into_owned()
}
