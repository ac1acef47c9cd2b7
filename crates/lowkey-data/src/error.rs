//! The one error type of the crate. Every message names the file, the place in it, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

/// This crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong between a dataset's TOML file and a batch.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused a file operation.
    #[error("cannot {action} {}: {reason}", path.display())]
    Io {
        /// What was attempted, as a verb: "read", "write", "open".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The reason. It stands in the message, hence is no source that a chain would print again.
        reason: io::Error,
    },
    /// A file is not what may be read, or not lowkey's to replace, or the operating system refused.
    #[error(transparent)]
    Files(#[from] lowkey_files::Error),
    /// A dataset file does not parse, or a key's value cannot be used.
    #[error("{}: {message}", path.display())]
    Config {
        /// The TOML file, or the dataset's name where it did not come from a file.
        path: PathBuf,
        /// The key, what is wrong with it and how to mend it.
        message: String,
    },
    /// A text source is not UTF-8.
    #[error("{}: invalid UTF-8 at byte {offset}; convert the file to UTF-8 (for instance with iconv)", path.display())]
    Utf8 {
        /// The file.
        path: PathBuf,
        /// Offset of the first offending byte, after decompression.
        offset: u64,
    },
    /// A line of a JSONL source, or a row of a Parquet source, cannot be used.
    #[error("{}: {unit} {number}: {message}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// "line" or "row".
        unit: &'static str,
        /// Its number, counted from 1.
        number: u64,
        /// What is wrong with it and how to mend it.
        message: String,
    },
    /// A source file is damaged or not of the format it is declared to be.
    #[error("{}: {message}", path.display())]
    Source {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A source file is not the one that the dataset file pins.
    #[error("{}: sha256 is {found}, but the dataset file expects {expected}; fetch the file again, or correct its entry under [sha256]", path.display())]
    Checksum {
        /// The file.
        path: PathBuf,
        /// The digest in the dataset file.
        expected: String,
        /// The digest of the bytes found.
        found: String,
    },
    /// A source holds no text at all.
    #[error("{name}: {message}")]
    Empty {
        /// The dataset file, or the dataset's name where it did not come from a file.
        name: String,
        /// What is empty and how to mend it.
        message: String,
    },
    /// A tokenizer file cannot be used, or a tokenizer cannot be built as asked.
    #[error("tokenizer {origin}: {message}")]
    Tokenizer {
        /// The file, or the built-in kind.
        origin: String,
        /// What is wrong and how to mend it.
        message: String,
    },
    /// A character tokenizer met a character that it was not built with.
    #[error(
        "character {character:?} (U+{:04X}) is not in this tokenizer's alphabet of {alphabet} characters; remove it from the text, or use the bytes tokenizer", u32::from(*character)
    )]
    UnknownCharacter {
        /// The character.
        character: char,
        /// How many characters the tokenizer knows.
        alphabet: usize,
    },
    /// A token file is damaged, or was asked for what it does not hold.
    #[error("{}: {message}", path.display())]
    Shard {
        /// The token file.
        path: PathBuf,
        /// What is wrong with it and how to mend it.
        message: String,
    },
    /// What is in the way of a prepared folder, and not lowkey's to replace.
    #[error("{}: {message}; move it away, or give another --out", lowkey_files::printable(&path.to_string_lossy()))]
    Foreign {
        /// The file or folder.
        path: PathBuf,
        /// Why it is not replaced.
        message: String,
    },
    /// A prepared folder does not hold together.
    #[error("{}: {message}; run `lowkey data prepare` again", path.display())]
    Prepared {
        /// The file in the folder.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A JSON file of a model directory does not parse, or a key's value cannot be used.
    #[error("{}: {message}", path.display())]
    Model {
        /// The file.
        path: PathBuf,
        /// The key, what is wrong with it and how to mend it.
        message: String,
    },
    /// A chat template cannot be read, or refuses a conversation.
    #[error("chat template {name}: {message}")]
    Template {
        /// The file, or the built-in template's name.
        name: String,
        /// The line, what is wrong and how to mend it.
        message: String,
    },
    /// A conversation does not have the form that templates need.
    #[error("the conversation {message}")]
    Conversation {
        /// The key or message, what is wrong with it and how to mend it.
        message: String,
    },
    /// Preparing was stopped through its progress callback.
    #[error("stopped while the corpus was being prepared; nothing that was there has been replaced")]
    Stopped,
    /// What a run goes on with gives other tokens than those it began with. Nothing has been replaced.
    #[error(
        "{}: the {split} tokens are not those this run began with (sha256 {found}, not {expected}): its text, or what makes \
         tokens of it, has changed; restore it, or begin a new run. The tokens that lie there are as they were", path.display()
    )]
    OtherTokens {
        /// The prepared folder.
        path: PathBuf,
        /// Which split: "training" or "held-out".
        split: &'static str,
        /// Checksum of the tokens that the run began with.
        expected: String,
        /// Checksum of those that would take their place.
        found: String,
    },
    /// A file could not be fetched from the hub.
    #[error("hub dataset {repo}, file {file}, revision {revision}, from {endpoint}: {message}")]
    Hub {
        /// Repository.
        repo: String,
        /// File in the repository.
        file: String,
        /// Branch, tag or commit.
        revision: String,
        /// The server asked.
        endpoint: String,
        /// What it answered and how to mend it.
        message: String,
    },
    /// Batches cannot be cut from this shard with these settings.
    #[error("cannot sample from {}: {message}", path.display())]
    Sampler {
        /// The token file.
        path: PathBuf,
        /// The key, what is wrong with it and how to mend it.
        message: String,
    },
}

impl Error {
    /// Wraps an I/O error with the action and the path that it lacks.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |reason| Self::Io { action, path: path.to_path_buf(), reason }
    }

    /// A tokenizer error.
    pub(crate) fn tokenizer(origin: impl Into<String>, message: impl std::fmt::Display) -> Self {
        Self::Tokenizer { origin: origin.into(), message: format!("{message}") }
    }
}
