//! From a dataset file to a folder of tokens, once.
//!
//! A folder is written aside, under a lock, and takes its name when it is whole: what stands there stays as it is until then,
//! and readers keep the files that they have open. Only a folder that lowkey made is replaced.

mod corpus;
mod folder;
mod parts;
mod samples;

use std::collections::HashSet;
use std::io::Read;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::dataset::{DatasetConfig, Source, StorybookForm, TokenizerConfig, TrainOn};
use crate::documents::Meter;
use crate::error::{Error, Result};
use crate::hub::HubConfig;
use crate::oracle::{training_story, validation_story};
use crate::records::Records;
use crate::samples::Method;
use crate::shard::Shard;
use crate::storybook::exchange;
use crate::tokenizer::{Part, Tokenizer};
use corpus::Corpus;
use parts::{Begun, Form, Parts};

/// Raised whenever the same source would give other tokens than before.
const FORMAT: u32 = 1;

/// Raised whenever the same text would give another BPE than before.
const BPE_FORMAT: u32 = 2;

/// Bytes of a manifest at most: it names every file of the source.
const LARGEST_MANIFEST: u64 = 1 << 30;

/// A prepared dataset, opened.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// The folder.
    pub dir: PathBuf,
    /// What its ids mean.
    pub tokenizer: Tokenizer,
    /// What to train on.
    pub train: Shard,
    /// What is held out; it may be empty.
    pub validation: Shard,
    /// Where it came from.
    pub manifest: Manifest,
}

impl Prepared {
    /// Training document `i` as it is read, special tokens spelled out, in parts that are learnt and parts that are not; none past the
    /// last one.
    ///
    /// # Errors
    /// As [`Shard::document`] and [`Tokenizer::parts`].
    pub fn example(&self, i: usize) -> Result<Option<Vec<Part>>> {
        let (Some(ids), Some(learnt)) = (self.train.document(i)?, self.train.learnt(i)?) else { return Ok(None) };
        self.tokenizer.parts(&ids, &learnt).map(Some)
    }
}

/// `manifest.json`: what a prepared folder holds and what it was made from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Format of the folder.
    pub format: u32,
    /// Hash of everything that decides the tokens: source, files, split, tokenizer.
    pub fingerprint: String,
    /// The dataset file, paths as written there.
    pub dataset: DatasetConfig,
    /// The source's files, in the order read; none for a storybook.
    pub files: Vec<SourceFile>,
    /// Kind of the tokenizer.
    pub tokenizer: String,
    /// SHA-256 of `tokenizer.json`.
    pub tokenizer_sha256: String,
    /// One more than the largest id.
    pub vocab_size: usize,
    /// The id that ends a document.
    pub eos_id: Option<u32>,
    /// Whether documents have special tokens around them ([`Tokenizer::adds_special_tokens`]).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub special_tokens: bool,
    /// The training split.
    pub train: SplitSummary,
    /// The held-out split.
    pub validation: SplitSummary,
    /// How records became tokens; none for plain text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat: Option<ChatSummary>,
}

/// How records became tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatSummary {
    /// What tokens are learnt.
    pub train_on: TrainOn,
    /// SHA-256 of the chat template, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template_sha256: Option<String>,
    /// Tokens that are learnt, of the training split and of what is held out.
    pub learnt: [u64; 2],
    /// Records that were left out.
    pub skipped: Skipped,
}

/// Records that were left out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// How many.
    pub records: u64,
    /// Where the first one stands, and what is wrong with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first: Option<String>,
}

/// A file of a source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceFile {
    /// Its name: relative to the dataset file, or the path in the hub repository.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Its SHA-256 in hex.
    pub sha256: String,
    /// Where it lies on this machine.
    #[serde(skip)]
    path: PathBuf,
}

/// Size of a split.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitSummary {
    /// Number of documents.
    pub documents: u64,
    /// Number of tokens.
    pub tokens: u64,
    /// Bytes of text.
    pub bytes: u64,
    /// Checksum of the token file.
    pub sha256: String,
}

/// What [`prepare`] is busy with. It is said every second or so of work at least.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// Another process is preparing the same folder.
    Waiting {
        /// The folder.
        dir: PathBuf,
    },
    /// Asking the hub for a file.
    Fetching {
        /// Its path in the repository.
        file: String,
    },
    /// Hashing a source file.
    Hashing {
        /// Its name.
        file: String,
    },
    /// Counting what is to be split.
    Counting {
        /// The file being read.
        file: String,
        /// How far this pass over the source has come.
        share: Share,
    },
    /// Reading the text to build the tokenizer from it.
    BuildingTokenizer {
        /// Bytes of text read.
        bytes: u64,
        /// How far this pass over the source has come.
        share: Share,
    },
    /// Learning the merges of a BPE. While this goes on nothing is said.
    LearningMerges {
        /// Distinct words that they are learnt from.
        words: u64,
    },
    /// Tokenising.
    Tokenizing {
        /// Documents done.
        documents: u64,
        /// Tokens written.
        tokens: u64,
        /// How far this pass over the source has come.
        share: Share,
    },
}

/// A part of a source that was read: bytes of its files as they lie on the disk, or stories that are made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Share {
    /// So much of it,
    pub read: u64,
    /// and all of it; 0 where that is not known.
    pub of: u64,
}

impl Share {
    fn of_files(meter: &Meter, files: &[SourceFile]) -> Self {
        let of = files.iter().map(|file| file.bytes).sum();
        Self { read: meter.bytes().min(of), of }
    }
}

/// What is told of the work as it goes, and can end it: after [`ControlFlow::Break`] there is [`Error::Stopped`] soon.
pub type Observer<'a> = &'a mut dyn FnMut(Progress) -> ControlFlow<()>;

/// An [`Observer`] whose wish to stop is an error.
struct Watch<'a>(Observer<'a>);

impl Watch<'_> {
    fn tell(&mut self, progress: Progress) -> Result<()> {
        if (self.0)(progress).is_break() { Err(Error::Stopped) } else { Ok(()) }
    }
}

/// Checksums ([`Shard::checksum`]) of the tokens that a run began with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// Of the training split.
    pub train: String,
    /// Of the held-out split, where it is known.
    pub validation: Option<String>,
}

/// Tokenises a dataset into `out`: `train.tokens`, `validation.tokens`, `tokenizer.json` and `manifest.json`.
///
/// Where `out` already holds the same (source, files by name, size and hash, split, tokenizer), it is opened as it is. Else the
/// folder is made anew beside its place and put there when it is whole; where that fails, or is stopped, `out` is as it was, and what is
/// done of a long one waits beside it for the next call with the same.
/// `tokenizer` replaces the one that the dataset file asks for.
///
/// # Errors
/// [`Error::Files`] where `out` holds what lowkey did not make; [`Error::Stopped`]; all that can be wrong with the dataset.
pub fn prepare(
    config: &DatasetConfig,
    out: &Path,
    tokenizer: Option<Tokenizer>,
    progress: Observer<'_>,
) -> Result<Prepared> {
    prepare_from(config, out, tokenizer, None, &HubConfig::from_env(), parts::PART, progress)
}

/// [`prepare`] for a run that goes on, with the checksums of the tokens that it began with.
///
/// # Errors
/// [`Error::OtherTokens`] where the dataset gives others now: `out` is then as it was, so that the run can still go on when the
/// text is what it was.
pub fn prepare_expecting(
    config: &DatasetConfig,
    out: &Path,
    tokenizer: Option<Tokenizer>,
    expected: &Expected,
    progress: Observer<'_>,
) -> Result<Prepared> {
    prepare_from(config, out, tokenizer, Some(expected), &HubConfig::from_env(), parts::PART, progress)
}

/// [`prepare`] with a hub that does not come from the environment, and parts of so many bytes of text.
fn prepare_from(
    config: &DatasetConfig,
    out: &Path,
    tokenizer: Option<Tokenizer>,
    expected: Option<&Expected>,
    hub: &HubConfig,
    part: u64,
    progress: Observer<'_>,
) -> Result<Prepared> {
    config.check()?;
    if let Source::Task { .. } = config.source {
        let why = "this is a task, whose examples are made while a run goes: there is nothing to prepare. \
                   `lowkey data info FILE` describes it, and data.dataset of a run file can name it";
        return Err(config.error(why));
    }
    let watch = &mut Watch(progress);
    let files = source_files(config, hub, watch)?;
    let given = match (&config.tokenizer, tokenizer) {
        (_, Some(tokenizer)) => Some(tokenizer),
        (TokenizerConfig::Bytes, None) => Some(Tokenizer::bytes()),
        (TokenizerConfig::File { path }, None) => {
            let path = config.base.join(path);
            Some(if path.is_dir() { Tokenizer::from_model_dir(&path)? } else { Tokenizer::from_file(&path)? })
        }
        (TokenizerConfig::Chars | TokenizerConfig::Bpe { .. }, None) => None,
    };
    // From here on it is known whether documents have special tokens: what is trained on these tokens records it.
    let given = given.map(|tokenizer| {
        let add = config.add_special_tokens.or(Some(!tokenizer.omits_special_tokens()));
        tokenizer.with_special_tokens(add)
    });
    let method = match &given {
        Some(tokenizer) if config.is_chat() => Some(crate::samples::method(config, tokenizer)?),
        _ => None,
    };
    // Whoever is trained on these tokens is to be asked in their form.
    let given = given.map(|tokenizer| {
        match (method.as_ref().and_then(|method| method.template.as_ref()), &config.chat.template) {
            (Some(template), Some(_)) => tokenizer.with_chat_template(template.source()),
            _ => tokenizer,
        }
    });
    let fingerprint = fingerprint(config, &files, given.as_ref(), method.as_ref());
    // What does not open is damaged, and is made again.
    let ready = || -> Result<Option<Prepared>> {
        if !read_manifest(out).is_ok_and(|manifest| manifest.fingerprint == fingerprint) {
            return Ok(None);
        }
        let Ok(prepared) = open(out) else { return Ok(None) };
        compare(out, expected, &prepared.manifest.train, &prepared.manifest.validation)?;
        // The same ids, but perhaps another chat template beside them.
        let tokenizer = given.clone().unwrap_or_else(|| prepared.tokenizer.clone());
        Ok(Some(Prepared { tokenizer, ..prepared }))
    };
    if let Some(prepared) = ready()? {
        // What a process left that was killed when this stood already.
        lowkey_files::recover(out)?;
        parts::forget(out, &fingerprint)?;
        return Ok(prepared);
    }

    let staging = folder::begin(out, watch)?;
    // Whoever held the lock before may have made the very folder.
    if let Some(prepared) = ready()? {
        return Ok(prepared);
    }
    let (train, validation) = (staging.dir().join("train.tokens"), staging.dir().join("validation.tokens"));
    let mut begun = Begun::find(&staging, &fingerprint)?;
    let form = |tokenizer: &Tokenizer, masked: bool| {
        let pairs = config.records() == Some(Records::Preference);
        Form { vocab_size: tokenizer.vocab_size(), masked, pairs }
    };
    let finals = [&*train, &*validation];
    let (tokenizer, skipped) = match (given, &method) {
        (Some(tokenizer), Some(method)) => {
            let parts = Parts::new(begun, finals, form(&tokenizer, true), part)?;
            let skipped = samples::tokenize(config, &files, &tokenizer, method, parts, watch)?;
            (tokenizer, Some(skipped))
        }
        (given, _) => {
            let corpus = Corpus::new(config, &files, watch)?;
            let tokenizer = match given.or_else(|| begun.tokenizer()) {
                Some(tokenizer) => tokenizer,
                None => {
                    let tokenizer = corpus.build_tokenizer(watch)?;
                    if files.iter().map(|file| file.bytes).sum::<u64>() > part {
                        begun.keep(&tokenizer)?;
                    }
                    tokenizer
                }
            };
            corpus.tokenize(&tokenizer, Parts::new(begun, finals, form(&tokenizer, false), part)?, watch)?;
            (tokenizer, None)
        }
    };
    tokenizer.save(staging.dir())?;
    let (train, validation) = (Shard::open(&train)?, Shard::open(&validation)?);
    let chat = match (&method, skipped) {
        (Some(method), Some(skipped)) => Some(ChatSummary {
            train_on: method.train_on,
            template_sha256: method.template.as_ref().map(|template| text_sha256(template.source())),
            learnt: [train.learnt_tokens()?, validation.learnt_tokens()?],
            skipped,
        }),
        _ => None,
    };
    let manifest = Manifest {
        format: FORMAT,
        fingerprint,
        dataset: config.clone(),
        tokenizer: tokenizer.name().to_owned(),
        tokenizer_sha256: tokenizer.fingerprint(),
        vocab_size: tokenizer.vocab_size(),
        eos_id: tokenizer.eos_id(),
        special_tokens: tokenizer.adds_special_tokens(),
        train: summary(&train),
        validation: summary(&validation),
        files,
        chat,
    };
    compare(out, expected, &manifest.train, &manifest.validation)?;
    lowkey_files::write_json(&staging.dir().join(folder::MANIFEST), &manifest)?;
    folder::commit(staging)?;
    parts::forget(out, &manifest.fingerprint)?;
    Ok(Prepared { tokenizer, ..open(out)? })
}

/// Refuses tokens that are not those expected.
fn compare(out: &Path, expected: Option<&Expected>, train: &SplitSummary, validation: &SplitSummary) -> Result<()> {
    let Some(Expected { train: training, validation: held_out }) = expected else { return Ok(()) };
    for (split, expected, found) in
        [("training", Some(training), &train.sha256), ("held-out", held_out.as_ref(), &validation.sha256)]
    {
        if let Some(expected) = expected.filter(|expected| *expected != found) {
            let (expected, found) = (expected.clone(), found.clone());
            return Err(Error::OtherTokens { path: out.to_path_buf(), split, expected, found });
        }
    }
    Ok(())
}

/// Opens a folder that [`prepare`] made, and checks that its parts belong together.
pub fn open(dir: &Path) -> Result<Prepared> {
    let manifest = read_manifest(dir)?;
    let tokenizer = Tokenizer::from_model_dir(dir)?.with_special_tokens(Some(manifest.special_tokens));
    let part = |name: &str, expected: &SplitSummary| {
        let shard = Shard::open(&dir.join(name))?;
        if summary(&shard) != *expected || shard.vocab_size() != manifest.vocab_size {
            let message = "not the token file that manifest.json describes".to_owned();
            return Err(Error::Prepared { path: dir.join(name), message });
        }
        Ok(shard)
    };
    let train = part("train.tokens", &manifest.train)?;
    let validation = part("validation.tokens", &manifest.validation)?;
    let same = tokenizer.fingerprint() == manifest.tokenizer_sha256 && tokenizer.eos_id() == manifest.eos_id;
    if !same || tokenizer.vocab_size() != manifest.vocab_size {
        let message = "not the tokenizer that manifest.json describes".to_owned();
        return Err(Error::Prepared { path: dir.join("tokenizer.json"), message });
    }
    Ok(Prepared { dir: dir.to_path_buf(), tokenizer, train, validation, manifest })
}

fn read_manifest(dir: &Path) -> Result<Manifest> {
    let path = dir.join(folder::MANIFEST);
    if dir.is_dir() && !path.exists() {
        let message = "there is no such file, so this is no prepared folder".to_owned();
        return Err(Error::Prepared { path, message });
    }
    let text = lowkey_files::read_text(&path, LARGEST_MANIFEST)?;
    let manifest: Manifest = serde_json::from_str(&text)
        .map_err(|e| Error::Prepared { path: path.clone(), message: format!("not a manifest: {e}") })?;
    if manifest.format != FORMAT {
        let message = format!("format {}, but this build reads {FORMAT}", manifest.format);
        return Err(Error::Prepared { path, message });
    }
    Ok(manifest)
}

fn text_sha256(text: &str) -> String {
    lowkey_files::hash::hex(&Sha256::digest(text.as_bytes()))
}

fn summary(shard: &Shard) -> SplitSummary {
    SplitSummary {
        documents: shard.documents() as u64,
        tokens: shard.len() as u64,
        bytes: shard.bytes(),
        sha256: shard.checksum(),
    }
}

/// Finds or fetches the source's files, hashes them and compares with the digests that the dataset file pins.
fn source_files(config: &DatasetConfig, hub: &HubConfig, watch: &mut Watch) -> Result<Vec<SourceFile>> {
    let mut found: Vec<(String, PathBuf)> = Vec::new();
    if let Source::Hub { repo, revision, files, .. } = &config.source {
        for file in files {
            watch.tell(Progress::Fetching { file: file.clone() })?;
            found.push((file.clone(), hub.fetch(repo, revision, file)?));
        }
    }
    for path in config.local_files()? {
        let name = path.strip_prefix(&config.base).unwrap_or(&path).to_string_lossy().into_owned();
        found.push((name, path));
    }
    let last = |name: &str| name.rsplit(['/', '\\']).next().unwrap_or(name).to_owned();
    let known: HashSet<String> = found.iter().flat_map(|(name, _)| [name.clone(), last(name)]).collect();
    if let Some(name) = config.sha256.keys().find(|name| !known.contains(*name)) {
        return Err(config.error(format!("sha256.{name:?} names no file of the source: remove it or correct it")));
    }
    let mut files = Vec::new();
    for (name, path) in found {
        let (bytes, sha256) = hash_file(&path, &mut || watch.tell(Progress::Hashing { file: name.clone() }))?;
        if let Some(expected) = config.sha256.get(&name).or_else(|| config.sha256.get(&last(&name)))
            && !expected.eq_ignore_ascii_case(&sha256)
        {
            return Err(Error::Checksum { path, expected: expected.clone(), found: sha256 });
        }
        files.push(SourceFile { name, bytes, sha256, path });
    }
    Ok(files)
}

/// Length and SHA-256 of a regular file; calls `each` before every part of it.
fn hash_file(path: &Path, each: &mut dyn FnMut() -> Result<()>) -> Result<(u64, String)> {
    let mut file = lowkey_files::open(path)?;
    let (mut hash, mut buffer, mut bytes) = (Sha256::new(), vec![0; 1 << 20], 0);
    loop {
        if bytes % (64 << 20) == 0 {
            each()?;
        }
        let length = file.read(&mut buffer).map_err(Error::io("read", path))?;
        if length == 0 {
            return Ok((bytes, lowkey_files::hash::hex(&hash.finalize())));
        }
        bytes += length as u64;
        hash.update(&buffer[..length]);
    }
}

/// Hash of all that decides the tokens. A tokenizer built from the text is decided by its settings and the text.
fn fingerprint(
    config: &DatasetConfig,
    files: &[SourceFile],
    given: Option<&Tokenizer>,
    method: Option<&Method>,
) -> String {
    let tokenizer = match given {
        Some(tokenizer) => {
            let (start, end) = (tokenizer.text_start(), tokenizer.text_end());
            let plain = start.is_empty() && end.iter().eq(&tokenizer.eos_id());
            let around = if plain { String::new() } else { format!(" {start:?} {end:?}") };
            format!("{} {:?}{around}", tokenizer.fingerprint(), tokenizer.eos_id())
        }
        None => match config.tokenizer {
            TokenizerConfig::Bpe { .. } => format!("{:?} {BPE_FORMAT}", config.tokenizer),
            _ => format!("{:?}", config.tokenizer),
        },
    };
    let mut hash = Sha256::new();
    hash.update(format!("{FORMAT}\n{:?}\n{:?}\n{tokenizer}\n", config.format(), config.split));
    for file in files {
        hash.update(format!("{:?} {} {}\n", file.name, file.bytes, file.sha256));
    }
    if let Some(Method { template, train_on }) = method {
        // Everything else about them is in the template, or in the tokenizer.
        let template = template.as_ref().map(|template| text_sha256(template.source()));
        let (records, list) = (config.records(), config.list());
        hash.update(format!("{records:?} {list:?} {train_on:?} {template:?} {}\n", config.chat.skip_bad));
        // The special tokens that a template may name.
        hash.update(given.and_then(|tokenizer| tokenizer.companion("tokenizer_config.json")).unwrap_or_default());
    }
    if let Source::Storybook { seed, documents, validation_documents, form } = config.source {
        hash.update(format!("{seed} {documents} {validation_documents}\n"));
        // A storybook has no file to hash. Its first stories stand for the generator, so that an improved one is noticed.
        for index in 0..16 {
            hash.update(training_story(seed, index).text);
            hash.update(validation_story(seed, index).text);
            if form == StorybookForm::Chat {
                hash.update(format!("{:?}", exchange(&training_story(seed, index)).chat.messages));
            }
        }
    }
    lowkey_files::hash::hex(&hash.finalize())
}

#[cfg(test)]
mod tests;
