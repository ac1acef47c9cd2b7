//! The dataset file: where a corpus comes from, how it becomes tokens, what is held out.

mod chat;

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::documents::{self, Format};
use crate::error::{Error, Result};
use crate::hub::{check_file, check_repo, check_revision};
pub use crate::records::Records;
use crate::tasks::Task;
use crate::tokenizer::Tokenizer;
pub use chat::{ChatConfig, TrainOn};

/// Bytes of a dataset file at most.
const LARGEST_FILE: u64 = 64 << 20;

/// Held-out examples of a task lie in memory together.
const MOST_HELD_EXAMPLES: u64 = 1 << 20;

/// A dataset file: one TOML file is one corpus. Paths in it are relative to the file's folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DatasetConfig {
    /// Name of the dataset: letters, digits, `-`, `_` and `.`. Its tokens are kept in `prepared/NAME` beside the file.
    pub name: String,
    /// What the corpus is, in a sentence.
    #[serde(default)]
    pub description: String,
    /// The licence of the text.
    #[serde(default)]
    pub license: String,
    /// Where the text comes from.
    pub source: Source,
    /// How the text becomes tokens. Absent: `kind = "bytes"`. A task brings its own words and takes none.
    #[serde(default)]
    pub tokenizer: TokenizerConfig,
    /// Whether documents get the special tokens that the tokenizer puts around a text, such as `<s>`. Absent: they do, unless the
    /// tokenizer comes from a model that was trained without. Tokenizers built from the text have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub add_special_tokens: Option<bool>,
    /// How records become tokens, and which of these are learnt. For records alone.
    #[serde(default, skip_serializing_if = "ChatConfig::is_default")]
    pub chat: ChatConfig,
    /// What is held out for validation. A storybook and a task have held-out examples of their own and take no split.
    #[serde(default)]
    pub split: Split,
    /// Checksums that the files must have: SHA-256 in 64 hex digits, by the name of a file (its last part, or the path as the source
    /// lists it).
    #[serde(default)]
    pub sha256: BTreeMap<String, String>,
    /// The folder that relative paths start from.
    #[serde(skip)]
    pub base: PathBuf,
    /// The file this came from, for messages.
    #[serde(skip)]
    pub origin: PathBuf,
}

/// Where text comes from. Text and JSONL files are decompressed by the endings `.gz` and `.zst`, in any case. A file may have any
/// size; a JSONL line, and a text in a Parquet file, have at most 256 MiB.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Source {
    /// Short stories that lowkey makes itself, whose entropy is known exactly. Nothing is downloaded.
    Storybook {
        /// Seed of the stories.
        seed: u64,
        /// Number of training stories.
        #[schemars(range(min = 1))]
        documents: u64,
        /// Number of held-out stories, from a seed of their own.
        validation_documents: u64,
        /// What a document is.
        #[serde(default, skip_serializing_if = "StorybookForm::is_text")]
        form: StorybookForm,
    },
    /// A diagnostic task: examples that ask for one ability, made while a run goes.
    Task {
        /// Seed of the examples, training and held-out.
        seed: u64,
        /// Number of held-out examples, from a stream of their own.
        #[schemars(range(min = 1, max = 1_048_576))]
        validation_examples: u64,
        /// Which task, and its sizes.
        task: Task,
    },
    /// Plain text files, also compressed as `.gz` or `.zst`. Each is one document unless a separator cuts it.
    Text {
        /// Files, or patterns of names with `*`; relative to the folder of this file.
        #[schemars(length(min = 1))]
        paths: Vec<String>,
        /// The text that stands between documents. Absent: a file is one document.
        #[schemars(length(min = 1))]
        #[serde(default, skip_serializing_if = "Option::is_none")]
        separator: Option<String>,
        /// Where a reader can get the files. It is shown when they are missing, and never fetched.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        url: Option<String>,
    },
    /// JSONL files, also compressed as `.gz` or `.zst`: one JSON object a line, of at most 256 MiB, is a document. Where its text is
    /// null there is none.
    Jsonl {
        /// Files, or patterns of names with `*`; relative to the folder of this file.
        #[schemars(length(min = 1))]
        paths: Vec<String>,
        /// The field of the object that holds the text, or with `records` the list of messages. Absent: `text`, or the list's usual name.
        #[serde(default = "text_field")]
        field: String,
        /// What an object is. Absent: a plain text.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        records: Option<Records>,
    },
    /// Parquet files: a row is a document. Where its text is null there is none.
    Parquet {
        /// Files, or patterns of names with `*`; relative to the folder of this file.
        #[schemars(length(min = 1))]
        paths: Vec<String>,
        /// The column that holds the text, or with `records` the list of messages. Absent: `text`, or the list's usual name.
        #[serde(default = "text_field")]
        column: String,
        /// What a row is. Absent: a plain text.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        records: Option<Records>,
    },
    /// Files of a dataset repository on the Hugging Face hub, or on the mirror that `HF_ENDPOINT` names.
    Hub {
        /// The repository, as `owner/name`.
        repo: String,
        /// A branch, a tag or a commit.
        #[serde(default = "main_revision")]
        revision: String,
        /// Paths of the files in the repository.
        #[schemars(length(min = 1))]
        files: Vec<String>,
        /// What the files are.
        format: HubFormat,
        /// The JSONL field or Parquet column that holds the text, or with `records` the list of messages. Absent: `text`, or the list's
        /// usual name. Not for plain text.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        field: Option<String>,
        /// What an object or a row is. Absent: a plain text. Not for plain text.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        records: Option<Records>,
        /// Plain text alone: the text that stands between documents. Absent: a file is one document.
        #[schemars(length(min = 1))]
        #[serde(default, skip_serializing_if = "Option::is_none")]
        separator: Option<String>,
    },
}

/// What a document of a storybook is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StorybookForm {
    /// The story.
    #[default]
    Text,
    /// A conversation: the user tells a story and asks all that it decides, the assistant answers.
    Chat,
    /// A pair of answers to the same question about a story: the right one was chosen, and one that is right of another story was not.
    Pairs,
}

impl StorybookForm {
    fn is_text(&self) -> bool {
        *self == Self::Text
    }
}

/// Format of hub files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum HubFormat {
    /// Plain text: a file is a document unless a separator cuts it.
    Text,
    /// One JSON object a line is a document.
    Jsonl,
    /// A row is a document.
    Parquet,
}

/// How text becomes tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "lowercase", from = "TokenizerKeys")]
#[schemars(!from, deny_unknown_fields)]
pub enum TokenizerConfig {
    /// A token is a byte: 256 of them, and one that ends a document.
    #[default]
    Bytes,
    /// A token is a character: one for each that stands in the corpus, the held-out part included.
    Chars,
    /// A byte-level BPE, trained on what is not held out.
    Bpe {
        /// Most entries, the token that ends a document included.
        #[schemars(range(min = 257, max = 1_048_576))]
        vocab_size: usize,
    },
    /// A `tokenizer.json` that is there already.
    File {
        /// The file, or the folder of a model that has one; relative to the folder of this file.
        path: PathBuf,
    },
}

/// The keys of a tokenizer as written. A variant without fields lets stray keys pass in silence; one with none inside
/// braces refuses them.
#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
enum TokenizerKeys {
    Bytes {},
    Chars {},
    Bpe { vocab_size: usize },
    File { path: PathBuf },
}

impl From<TokenizerKeys> for TokenizerConfig {
    fn from(keys: TokenizerKeys) -> Self {
        match keys {
            TokenizerKeys::Bytes {} => Self::Bytes,
            TokenizerKeys::Chars {} => Self::Chars,
            TokenizerKeys::Bpe { vocab_size } => Self::Bpe { vocab_size },
            TokenizerKeys::File { path } => Self::File { path },
        }
    }
}

/// What is held out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Split {
    /// The share of the text that is held out; 0: nothing.
    #[serde(default = "tenth")]
    #[schemars(range(min = 0, max = 0.5))]
    pub validation_fraction: f64,
    /// Which part is held out.
    #[serde(default)]
    pub by: SplitBy,
}

/// Which part is held out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SplitBy {
    /// The end: of several documents the last ones, in the order of the source. A text file that is one document is cut by itself, after
    /// `int(n * (1 - fraction))` of its `n` characters, and neither part gets the token that ends a document.
    #[default]
    Tail,
    /// Whole documents, here and there, by a hash of their number. Needs several.
    Documents,
}

impl Default for Split {
    fn default() -> Self {
        Self { validation_fraction: tenth(), by: SplitBy::Tail }
    }
}

fn tenth() -> f64 {
    0.1
}

fn text_field() -> String {
    "text".to_owned()
}

fn main_revision() -> String {
    "main".to_owned()
}

/// Whether a folder can have this name on any system: other letters are spelt in more than one way, and systems disagree on which
/// spellings are the same.
fn is_folder_name(name: &str) -> bool {
    /// So that what is made of the name is one, too.
    const LONGEST: usize = 200;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let stem = name.split('.').next().unwrap_or_default().to_ascii_uppercase();
    let numbered =
        |kind: &str| stem.strip_prefix(kind).is_some_and(|n| n.len() == 1 && n.chars().all(|c| c.is_ascii_digit()));
    let device = ["CON", "PRN", "AUX", "NUL"].contains(&stem.as_str()) || numbered("COM") || numbered("LPT");
    let ends = name.starts_with('.') || name.ends_with('.');
    !name.is_empty() && name.len() <= LONGEST && name.chars().all(plain) && !ends && !device
}

impl DatasetConfig {
    /// Reads and checks a dataset file.
    pub fn load(path: &Path) -> Result<Self> {
        let text = lowkey_files::read_text(path, LARGEST_FILE)?;
        let mut config: Self = toml::from_str(text.strip_prefix('\u{feff}').unwrap_or(&text))
            .map_err(|e| Error::Config { path: path.to_path_buf(), message: e.to_string().trim_end().to_owned() })?;
        config.base = path.parent().unwrap_or(Path::new("")).to_path_buf();
        config.origin = path.to_path_buf();
        if !is_folder_name(&config.name) {
            let why = "must be a folder name of letters, digits, '-', '_' and '.', and one on every system: letters from a to z, \
                       no '.' at either end, 200 of them at most, and none that Windows gives to a device";
            return Err(config.error(format!("name = {:?} {why}", config.name)));
        }
        config.check()?;
        Ok(config)
    }

    /// A text file as it is: bytes, the last tenth held out. What is no plain text, or has documents that a format of its own
    /// sets apart, is refused with the dataset file that reads it.
    pub fn from_text_file(path: &Path) -> Result<Self> {
        not_plain(path)?;
        let Some(text) = path.to_str() else {
            let message = "the path is not UTF-8; rename the file".to_owned();
            return Err(Error::Config { path: path.to_path_buf(), message });
        };
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self {
            name,
            description: String::new(),
            license: String::new(),
            source: Source::Text { paths: vec![text.to_owned()], separator: None, url: None },
            tokenizer: TokenizerConfig::default(),
            add_special_tokens: None,
            chat: ChatConfig::default(),
            split: Split::default(),
            sha256: BTreeMap::new(),
            base: PathBuf::new(),
            origin: path.to_path_buf(),
        })
    }

    /// Where the tokens of this dataset lie: beside its file, in a folder for each tokenizer that is not its own, for tokens without the
    /// special ones around a text, and for each template and way to learn records.
    pub fn prepared_dir(&self, tokenizer: Option<&Tokenizer>) -> PathBuf {
        let (mut name, plain) = match tokenizer {
            Some(own) => (
                format!("{}-{}", self.name, own.fingerprint().chars().take(8).collect::<String>()),
                own.omits_special_tokens(),
            ),
            None => (self.name.clone(), self.add_special_tokens == Some(false)),
        };
        if plain {
            name += "-plain";
        }
        if let Some(key) = self.chat_key(tokenizer) {
            name += &format!("-{key}");
        }
        // A text file that is a dataset by itself has paths from the current folder.
        let base =
            if self.base.as_os_str().is_empty() { self.origin.parent().unwrap_or(&self.base) } else { &self.base };
        base.join("prepared").join(name)
    }

    /// An error that names the dataset file.
    pub(crate) fn error(&self, message: impl Into<String>) -> Error {
        let path = if self.origin.as_os_str().is_empty() { PathBuf::from(&self.name) } else { self.origin.clone() };
        Error::Config { path, message: message.into() }
    }

    /// An error of a source that holds nothing.
    pub(crate) fn empty(&self, message: &str) -> Error {
        let origin = &self.origin;
        let name = if origin.as_os_str().is_empty() { self.name.clone() } else { origin.display().to_string() };
        Error::Empty { name, message: message.to_owned() }
    }

    /// How documents lie in the source's files; none for a storybook and a task, which have no files.
    pub(crate) fn format(&self) -> Option<Format> {
        let text = |separator: &Option<String>| Format::Text { separator: separator.clone() };
        Some(match &self.source {
            Source::Storybook { .. } | Source::Task { .. } => return None,
            Source::Text { separator, .. } => text(separator),
            Source::Jsonl { field, .. } => Format::Jsonl { field: field.clone() },
            Source::Parquet { column, .. } => Format::Parquet { column: column.clone() },
            Source::Hub { format, field, separator, .. } => {
                let field = field.clone().unwrap_or_else(text_field);
                match format {
                    HubFormat::Text => text(separator),
                    HubFormat::Jsonl => Format::Jsonl { field },
                    HubFormat::Parquet => Format::Parquet { column: field },
                }
            }
        })
    }

    /// Checks what the types cannot.
    pub(crate) fn check(&self) -> Result<()> {
        let refuse = |message: String| Err(self.error(message));
        let fraction = self.split.validation_fraction;
        if !(0.0..=0.5).contains(&fraction) {
            return refuse(format!("split.validation_fraction = {fraction} must lie between 0 and 0.5"));
        }
        if let TokenizerConfig::Bpe { vocab_size } = self.tokenizer
            && !(257..=1 << 20).contains(&vocab_size)
        {
            let range = format!("must be at least 257 (256 bytes and one end) and at most {}", 1 << 20);
            return refuse(format!("tokenizer.vocab_size = {vocab_size} {range}"));
        }
        for (name, digest) in &self.sha256 {
            if digest.len() != 64 || !digest.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return refuse(format!("sha256.{name:?} = {digest:?} is not 64 hex digits"));
            }
        }
        match &self.source {
            Source::Storybook { documents, .. } => {
                if *documents == 0 {
                    return refuse("source.documents = 0 leaves nothing to train on".to_owned());
                }
                if self.split != Split::default() || !self.sha256.is_empty() {
                    return refuse(
                        "a storybook takes neither [split] nor [sha256]: remove them and set source.validation_documents"
                            .to_owned(),
                    );
                }
            }
            Source::Task { validation_examples, task, .. } => {
                task.check().or_else(|why| refuse(format!("source.task.{why}")))?;
                if !(1..=MOST_HELD_EXAMPLES).contains(validation_examples) {
                    let range = format!("must lie between 1 and {MOST_HELD_EXAMPLES}");
                    return refuse(format!("source.validation_examples = {validation_examples} {range}"));
                }
                let own = self.tokenizer != TokenizerConfig::default();
                if own || self.split != Split::default() || !self.sha256.is_empty() {
                    return refuse(
                        "a task brings its own vocabulary and held-out examples: remove [tokenizer], [split] and [sha256]"
                            .to_owned(),
                    );
                }
            }
            Source::Text { paths, .. } | Source::Jsonl { paths, .. } | Source::Parquet { paths, .. } => {
                if paths.is_empty() {
                    return refuse("source.paths is empty: name at least one file or pattern".to_owned());
                }
            }
            Source::Hub { repo, revision, files, format, field, separator, records } => {
                check_repo(repo).or_else(|why| refuse(format!("source.repo = {why}")))?;
                check_revision(revision).or_else(|why| refuse(format!("source.revision = {why}")))?;
                if files.is_empty() {
                    return refuse("source.files is empty: name at least one file of the repository".to_owned());
                }
                for file in files {
                    check_file(file).or_else(|why| refuse(format!("source.files: {why}")))?;
                }
                if *format == HubFormat::Text && records.is_some() {
                    return refuse("source.records has no meaning for format = \"text\": remove it".to_owned());
                }
                if *format == HubFormat::Text && field.is_some() {
                    return refuse("source.field has no meaning for format = \"text\": remove it".to_owned());
                }
                if *format != HubFormat::Text && separator.is_some() {
                    return refuse("source.separator has a meaning for format = \"text\" only: remove it".to_owned());
                }
            }
        }
        self.check_chat()?;
        if let Some(Format::Text { separator: Some(separator) }) = self.format()
            && separator.is_empty()
        {
            return refuse("source.separator is empty: leave it out, or name the string between documents".to_owned());
        }
        Ok(())
    }

    /// The local files of the source in a fixed order: by pattern, then by name. Empty for a source that has none.
    pub(crate) fn local_files(&self) -> Result<Vec<PathBuf>> {
        let (paths, url) = match &self.source {
            Source::Text { paths, url, .. } => (paths, url.as_deref()),
            Source::Jsonl { paths, .. } | Source::Parquet { paths, .. } => (paths, None),
            Source::Storybook { .. } | Source::Task { .. } | Source::Hub { .. } => return Ok(Vec::new()),
        };
        let (mut files, mut seen) = (Vec::new(), HashSet::new());
        for pattern in paths {
            let literal = self.base.join(pattern);
            // A path that is there is no pattern, whatever is in its name; what is no regular file is refused when it is opened.
            let there = !literal.is_dir() && literal.exists();
            let found = if there { vec![literal] } else { self.expand(pattern)? };
            if found.is_empty() {
                let mend = url.map_or_else(String::new, |url| format!("; get it from {url}"));
                let place = self.base.join(pattern);
                return Err(self.error(format!("source.paths: nothing matches {}{mend}", place.display())));
            }
            files.extend(found.into_iter().filter(|file| seen.insert(file.clone())));
        }
        Ok(files)
    }

    /// The files that match a glob pattern, sorted.
    fn expand(&self, pattern: &str) -> Result<Vec<PathBuf>> {
        // Only the pattern is a pattern: a bracket in the name of the folder that the dataset file lies in is not.
        let base = glob::Pattern::escape(&self.base.to_string_lossy());
        let whole = Path::new(&base).join(pattern);
        let entries = glob::glob(&whole.to_string_lossy())
            .map_err(|e| self.error(format!("source.paths: {pattern:?} is not a pattern: {e}")))?;
        let mut found = Vec::new();
        for entry in entries {
            let path = entry.map_err(|e| self.error(format!("source.paths: {pattern:?}: {e}")))?;
            if path.is_file() {
                found.push(path);
            }
        }
        found.sort();
        Ok(found)
    }
}

/// Refuses a file that is no plain text, with what to do about it.
fn not_plain(path: &Path) -> Result<()> {
    let refuse = |message: String| Err(Error::Config { path: path.to_path_buf(), message });
    let content = documents::kind(path)?;
    let mut bare = path.to_path_buf();
    let ending = |path: &Path| path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    if matches!(ending(&bare).as_str(), "gz" | "zst") {
        bare.set_extension("");
    } else if let Some(kind) = content.filter(|kind| *kind != documents::Kind::Parquet) {
        return refuse(format!("is {}, not plain text: {}", kind.what(), kind.mend(path)));
    }
    let (kind, what, key) = match ending(&bare).as_str() {
        _ if content == Some(documents::Kind::Parquet) => ("parquet", "a Parquet file", "column"),
        "parquet" => ("parquet", "a Parquet file", "column"),
        "jsonl" | "ndjson" => ("jsonl", "JSONL, one JSON object a line", "field"),
        _ => return Ok(()),
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let stem = name.split('.').find(|part| !part.is_empty()).unwrap_or("data");
    refuse(format!(
        "is {what}, not plain text: write a dataset file beside it, for instance {stem}.toml, with these lines, and name that \
         instead (as data.dataset in a run file):\n\nname = {stem:?}\n\n[source]\nkind = \"{kind}\"\npaths = [{name:?}]\n\
         {key} = \"text\"  # what holds the text"
    ))
}

#[cfg(test)]
mod tests;
