//! What can go wrong between a model and its exported files.

use std::path::PathBuf;

/// Why an export could not be written, read or certified.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file is not what it should be.
    #[error("{}: {why}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong and the mend.
        why: String,
    },
    /// A file could not be read or written.
    #[error("{}: {reason}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's reason. It stands in the message, hence is no source that a chain would print again.
        reason: std::io::Error,
    },
    /// The target format has no way to say what this model computes.
    #[error("{format} cannot hold this model: {why}")]
    Unsupported {
        /// The format or form.
        format: &'static str,
        /// Which property of the model, and the mend where there is one.
        why: String,
    },
    /// A setting of the export is out of range.
    #[error("{key} = {value}: {why}")]
    Setting {
        /// The setting.
        key: &'static str,
        /// Its value as text.
        value: String,
        /// What it must be.
        why: String,
    },
    /// A tensor could not be read back from the device.
    #[error("{what} cannot be read back: {why}")]
    Device {
        /// The tensor.
        what: String,
        /// The device's reason.
        why: String,
    },
    /// The exported files do not hold what was demanded of them.
    #[error("the export does not hold:\n{}", failures.join("\n"))]
    Broken {
        /// A line for each figure or file that fails.
        failures: Vec<String>,
    },
    /// The model directory could not be read or written.
    #[error(transparent)]
    Model(#[from] lowkey_model::Error),
    /// The tokenizer could not be read or written.
    #[error(transparent)]
    Data(#[from] lowkey_data::Error),
    /// The model could not be run.
    #[error(transparent)]
    Infer(#[from] lowkey_infer::Error),
}

impl Error {
    pub(crate) fn file(path: impl Into<PathBuf>, why: impl Into<String>) -> Self {
        Self::File { path: path.into(), why: why.into() }
    }

    pub(crate) fn unsupported(format: &'static str, why: impl Into<String>) -> Self {
        Self::Unsupported { format, why: why.into() }
    }

    pub(crate) fn setting(key: &'static str, value: impl ToString, why: impl Into<String>) -> Self {
        Self::Setting { key, value: value.to_string(), why: why.into() }
    }

    pub(crate) fn device(what: impl Into<String>, error: impl std::fmt::Debug) -> Self {
        Self::Device { what: what.into(), why: format!("{error:?}") }
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
