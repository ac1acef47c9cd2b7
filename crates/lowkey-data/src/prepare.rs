//! From a dataset file to a folder of tokens, once.

mod corpus;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::dataset::{DatasetConfig, Source, TokenizerConfig};
use crate::error::{Error, Result};
use crate::hub::HubConfig;
use crate::oracle::{training_story, validation_story};
use crate::shard::Shard;
use crate::tokenizer::{Tokenizer, hex, write_atomically};
use corpus::Corpus;

/// Raised whenever the same source would give other tokens than before.
const FORMAT: u32 = 1;

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

/// What [`prepare`] is busy with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
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
    /// Building the tokenizer from the text.
    BuildingTokenizer,
    /// Tokenising.
    Tokenizing {
        /// Documents done.
        documents: u64,
        /// Tokens written.
        tokens: u64,
    },
}

/// Tokenises a dataset into `out`: `train.tokens`, `validation.tokens`, `tokenizer.json` and `manifest.json`.
///
/// Where `out` already holds the same (source, files by name, size and hash, split, tokenizer), it is opened as it is.
/// The manifest is removed first and written last, so an interrupted run leaves nothing that opens. Nothing else in
/// `out` is touched. `tokenizer` replaces the one that the dataset file asks for.
pub fn prepare(
    config: &DatasetConfig,
    out: &Path,
    tokenizer: Option<Tokenizer>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Prepared> {
    prepare_from(config, out, tokenizer, &HubConfig::from_env(), progress)
}

/// [`prepare`] with a hub that does not come from the environment.
pub(crate) fn prepare_from(
    config: &DatasetConfig,
    out: &Path,
    tokenizer: Option<Tokenizer>,
    hub: &HubConfig,
    progress: &mut dyn FnMut(Progress),
) -> Result<Prepared> {
    config.check()?;
    if let Source::Task { .. } = config.source {
        let why = "this is a task, whose examples are made while a run goes: there is nothing to prepare. \
                   `lowkey data info FILE` describes it, and data.dataset of a run file can name it";
        return Err(config.error(why));
    }
    let files = source_files(config, hub, progress)?;
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
    let fingerprint = fingerprint(config, &files, given.as_ref());
    if read_manifest(out).is_ok_and(|manifest| manifest.fingerprint == fingerprint)
        // What does not open is damaged, and is made again.
        && let Ok(prepared) = open(out)
    {
        // The same ids, but perhaps another chat template beside them.
        return Ok(Prepared { tokenizer: given.unwrap_or(prepared.tokenizer), ..prepared });
    }

    let manifest_path = out.join("manifest.json");
    std::fs::create_dir_all(out).map_err(Error::io("create", out))?;
    if manifest_path.exists() {
        std::fs::remove_file(&manifest_path).map_err(Error::io("remove", &manifest_path))?;
    }
    let corpus = Corpus::new(config, &files)?;
    let tokenizer = match given {
        Some(tokenizer) => tokenizer,
        None => {
            progress(Progress::BuildingTokenizer);
            corpus.build_tokenizer()?
        }
    };
    let (train, validation) = (out.join("train.tokens"), out.join("validation.tokens"));
    corpus.tokenize(&tokenizer, &train, &validation, progress)?;
    tokenizer.save(out)?;
    let manifest = Manifest {
        format: FORMAT,
        fingerprint,
        dataset: config.clone(),
        tokenizer: tokenizer.name().to_owned(),
        tokenizer_sha256: tokenizer.fingerprint(),
        vocab_size: tokenizer.vocab_size(),
        eos_id: tokenizer.eos_id(),
        special_tokens: tokenizer.adds_special_tokens(),
        train: summary(&Shard::open(&train)?),
        validation: summary(&Shard::open(&validation)?),
        files,
    };
    let json = serde_json::to_string_pretty(&manifest)
        .map_err(|e| Error::Prepared { path: manifest_path.clone(), message: e.to_string() })?;
    write_atomically(&manifest_path, format!("{json}\n").as_bytes())?;
    Ok(Prepared { tokenizer, ..open(out)? })
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
    let path = dir.join("manifest.json");
    if dir.is_dir() && !path.exists() {
        let message = "there is no such file, so this is no prepared folder, or an unfinished one".to_owned();
        return Err(Error::Prepared { path, message });
    }
    let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let manifest: Manifest = serde_json::from_str(&text)
        .map_err(|e| Error::Prepared { path: path.clone(), message: format!("not a manifest: {e}") })?;
    if manifest.format != FORMAT {
        let message = format!("format {}, but this build reads {FORMAT}", manifest.format);
        return Err(Error::Prepared { path, message });
    }
    Ok(manifest)
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
fn source_files(
    config: &DatasetConfig,
    hub: &HubConfig,
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<SourceFile>> {
    let mut found: Vec<(String, PathBuf)> = Vec::new();
    if let Source::Hub { repo, revision, files, .. } = &config.source {
        for file in files {
            progress(Progress::Fetching { file: file.clone() });
            found.push((file.clone(), hub.fetch(repo, revision, file)?));
        }
    }
    for path in config.local_files()? {
        let name = path.strip_prefix(&config.base).unwrap_or(&path).to_string_lossy().into_owned();
        found.push((name, path));
    }
    let pinned = |name: &str| {
        let last = name.rsplit(['/', '\\']).next().unwrap_or(name);
        config.sha256.get_key_value(name).or_else(|| config.sha256.get_key_value(last))
    };
    for name in config.sha256.keys() {
        if !found.iter().any(|(file, _)| pinned(file).is_some_and(|(key, _)| key == name)) {
            return Err(config.error(format!("sha256.{name:?} names no file of the source: remove it or correct it")));
        }
    }
    let mut files = Vec::new();
    for (name, path) in found {
        progress(Progress::Hashing { file: name.clone() });
        let (bytes, sha256) = hash_file(&path)?;
        if let Some((_, expected)) = pinned(&name)
            && !expected.eq_ignore_ascii_case(&sha256)
        {
            return Err(Error::Checksum { path, expected: expected.clone(), found: sha256 });
        }
        files.push(SourceFile { name, bytes, sha256, path });
    }
    Ok(files)
}

fn hash_file(path: &Path) -> Result<(u64, String)> {
    let mut file = File::open(path).map_err(Error::io("open", path))?;
    let (mut hash, mut buffer, mut bytes) = (Sha256::new(), vec![0; 1 << 20], 0);
    loop {
        let length = file.read(&mut buffer).map_err(Error::io("read", path))?;
        if length == 0 {
            return Ok((bytes, hex(&hash.finalize())));
        }
        bytes += length as u64;
        hash.update(&buffer[..length]);
    }
}

/// Hash of all that decides the tokens. A tokenizer built from the text is decided by its settings and the text.
fn fingerprint(config: &DatasetConfig, files: &[SourceFile], tokenizer: Option<&Tokenizer>) -> String {
    let tokenizer = match tokenizer {
        Some(tokenizer) => {
            let (start, end) = (tokenizer.text_start(), tokenizer.text_end());
            let plain = start.is_empty() && end.iter().eq(&tokenizer.eos_id());
            let around = if plain { String::new() } else { format!(" {start:?} {end:?}") };
            format!("{} {:?}{around}", tokenizer.fingerprint(), tokenizer.eos_id())
        }
        None => format!("{:?}", config.tokenizer),
    };
    let mut hash = Sha256::new();
    hash.update(format!("{FORMAT}\n{:?}\n{:?}\n{tokenizer}\n", config.format(), config.split));
    for file in files {
        hash.update(format!("{:?} {} {}\n", file.name, file.bytes, file.sha256));
    }
    if let Source::Storybook { seed, documents, validation_documents } = config.source {
        hash.update(format!("{seed} {documents} {validation_documents}\n"));
        // A storybook has no file to hash. Its first stories stand for the generator, so that an improved one is noticed.
        for index in 0..16 {
            hash.update(training_story(seed, index).text);
            hash.update(validation_story(seed, index).text);
        }
    }
    hex(&hash.finalize())
}

#[cfg(test)]
mod tests;
