//! What can go wrong.

use std::path::{Path, PathBuf};

use lowkey_files::{printable, printable_lines};

/// Errors of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An experiment file that is not what it must be.
    #[error("{}: {}", printable(&path.to_string_lossy()), printable_lines(why))]
    Experiment {
        /// The file.
        path: PathBuf,
        /// What is wrong, with its place, and the mend.
        why: String,
    },
    /// A file or folder that cannot be read or written, or does not hold what it should.
    #[error("{}: {}", printable(&path.to_string_lossy()), printable_lines(why))]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// From writing or reading files.
    #[error(transparent)]
    Files(#[from] lowkey_files::Error),
    /// From the training loop.
    #[error(transparent)]
    Train(#[from] lowkey_train::Error),
}

impl Error {
    pub(crate) fn experiment(path: impl AsRef<Path>, why: impl Into<String>) -> Self {
        Self::Experiment { path: path.as_ref().to_path_buf(), why: why.into() }
    }

    pub(crate) fn file(path: impl AsRef<Path>, why: impl Into<String>) -> Self {
        Self::File { path: path.as_ref().to_path_buf(), why: why.into() }
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
