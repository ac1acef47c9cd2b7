//! A model directory as one thing: opened once, or written aside and put in its place whole.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use burn::tensor::Device;
use lowkey_files::{
    Replace, Staging,
    companions::{self, Companions},
    hash::{FileHash, hash},
    mark::Kind,
    recover, write_json,
};
use lowkey_kernels::quantized_linear::Quantization;
use serde::Serialize;

use crate::adapter::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterDir, is_adapter};
use crate::checkpoint::{CONFIG, INDEX, WeightDtype, weight_files};
use crate::checksums::{has_checksums, verify};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::model::CausalLm;

/// A Hugging Face model directory that has been found whole.
///
/// A directory of an adapter opens as the model that it stands beside: [`ModelDir::adapter`] then says which adapter that is.
#[derive(Clone, Debug)]
pub struct ModelDir {
    path: PathBuf,
    /// With the weight of each.
    adapters: Vec<(AdapterDir, f64)>,
}

impl ModelDir {
    /// Opens a directory: links are followed once and for all (`best` may come to point elsewhere while a command is at work), what
    /// a killed process left is put in order, and checksums are compared where the directory has them.
    ///
    /// # Errors
    /// [`Error::File`] where there is no such folder, where it holds no model, or where a file is not what was saved.
    pub fn open(path: &Path) -> Result<Self> {
        if path.symlink_metadata().is_err() {
            recover(path)?;
        }
        let real = match path.canonicalize() {
            Ok(real) => real,
            Err(e) => {
                return Err(match std::fs::read_link(path) {
                    Ok(target) => Error::file(
                        path,
                        format!(
                            "is a link to {}, and nothing is there; copy the folder that it should point to",
                            target.display()
                        ),
                    ),
                    Err(_) => Error::io(path, e),
                });
            }
        };
        if !real.is_dir() {
            return Err(Error::file(path, format!("is a file; a model is a folder with {CONFIG} and weights")));
        }
        if has_checksums(&real) {
            verify(&real)?;
        }
        if !is_adapter(&real) {
            return Ok(Self { path: real, adapters: Vec::new() });
        }
        let adapter = AdapterDir::open(&real)?;
        let base = adapter.base_dir()?;
        if is_adapter(&base) {
            let why = "is to stand beside an adapter; merge that one first, and name the merged model as the base";
            return Err(Error::file(real, why));
        }
        Ok(Self { adapters: vec![(adapter, 1.0)], ..Self::open(&base)? })
    }

    /// The same model with an adapter beside it, whatever base that one names.
    ///
    /// # Errors
    /// [`Error::File`] where `adapter` is no directory of an adapter, where one is there already, or where a file is not what was saved.
    pub fn with_adapter(self, adapter: &Path) -> Result<Self> {
        self.with_adapters(&[(adapter.to_path_buf(), 1.0)])
    }

    /// The same model with the sum of several adapters beside it, each times its weight ([`CausalLm::load_combined`]).
    ///
    /// # Errors
    /// As [`ModelDir::with_adapter`].
    pub fn with_adapters(self, adapters: &[(PathBuf, f64)]) -> Result<Self> {
        if !self.adapters.is_empty() {
            return Err(Error::file(self.given(), "is an adapter itself; give the model that it stands beside"));
        }
        let open = |(adapter, weight): &(PathBuf, f64)| {
            if !is_adapter(adapter) {
                return Err(Error::file(
                    adapter,
                    "holds no adapter: a folder with adapter_config.json and no weights of a model",
                ));
            }
            if has_checksums(adapter) {
                verify(adapter)?;
            }
            Ok((AdapterDir::open(adapter)?, *weight))
        };
        Ok(Self { adapters: adapters.iter().map(open).collect::<Result<_>>()?, ..self })
    }

    /// The folder that was asked for: of an adapter its own, where [`ModelDir::path`] is that of its base.
    pub fn given(&self) -> &Path {
        self.adapter().map_or(&self.path, |adapter| &adapter.path)
    }

    /// The folder that its tokenizer comes from, and what is read together with it.
    pub fn beside(&self) -> &Path {
        self.beside_with("tokenizer.json")
    }

    /// The folder that the companion of this name comes from: of an adapter its own where it is there, else that of the base.
    pub fn beside_with(&self, companion: &str) -> &Path {
        let has = |dir: &&Path| dir.join(companion).symlink_metadata().is_ok();
        self.folders().into_iter().find(has).unwrap_or(&self.path)
    }

    /// Where companions are looked for: of an adapter first in its own folder, then in that of the base.
    fn folders(&self) -> Vec<&Path> {
        self.adapter().map(|adapter| &*adapter.path).into_iter().chain([&*self.path]).collect()
    }

    /// Its [companions](Self::companions) with what is in them.
    ///
    /// # Errors
    /// As [`Companions::read`].
    pub fn read_companions(&self) -> Result<Companions> {
        Ok(Companions::read_first(&self.folders())?)
    }

    /// The adapter that was opened, where it was one, and is taken as it is.
    pub fn adapter(&self) -> Option<&AdapterDir> {
        match &self.adapters[..] {
            [(adapter, weight)] if *weight == 1.0 => Some(adapter),
            _ => None,
        }
    }

    /// The folder itself, no link.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What `config.json` says; of a model with an adapter that of its base, but for the tokens and positions that the adapter was
    /// trained with.
    ///
    /// # Errors
    /// As [`ModelConfig::read`].
    pub fn config(&self) -> Result<ModelConfig> {
        let config = ModelConfig::read(&self.path.join(CONFIG))?;
        let Some(((first, _), others)) = self.adapters.split_first() else { return Ok(config) };
        let shape = first.shape(config.clone())?;
        for (adapter, _) in others {
            if !adapter.shape(config.clone())?.same_shape(&shape) {
                let why = format!("was trained with other tokens or positions than {}", first.path.display());
                return Err(Error::file(&adapter.path, why));
            }
        }
        Ok(shape)
    }

    /// The model.
    ///
    /// # Errors
    /// As [`CausalLm::load`], [`CausalLm::load_adapted`] and [`CausalLm::load_combined`].
    pub fn load(&self, device: &Device) -> Result<CausalLm> {
        match (self.adapter(), &self.adapters[..]) {
            (None, []) => CausalLm::load(&self.path, device),
            (Some(adapter), _) => CausalLm::load_adapted(&self.path, &self.config()?, adapter, device),
            (None, several) => CausalLm::load_combined(&self.path, &self.config()?, several, device),
        }
    }

    /// The model to be read and not trained, with its matrices packed, each as soon as it is read: [`CausalLm::packed_to_read`] of what
    /// [`ModelDir::load`] gives, without all of it in memory as it was. Only of a sum of several adapters all is read first.
    ///
    /// # Errors
    /// As [`ModelDir::load`] and [`CausalLm::quantized`].
    pub fn load_packed(&self, quantization: Quantization, device: &Device) -> Result<CausalLm> {
        let model = match (self.adapter(), &self.adapters[..]) {
            (None, []) => CausalLm::load_packed(&self.path, &self.config()?, quantization, device)?,
            (Some(adapter), _) => {
                let mut beside = adapter.clone();
                beside.config.quantization = Some(quantization);
                CausalLm::load_adapted(&self.path, &self.config()?, &beside, device)?
            }
            (None, _) => self.load(device)?.quantized(quantization)?,
        };
        model.with_packed_head(quantization)
    }

    /// The files of tokenizer, templates and generation settings that are there, by name.
    ///
    /// # Errors
    /// As [`companions::found`].
    pub fn companions(&self) -> Result<Vec<String>> {
        let mut names = BTreeSet::new();
        for dir in self.folders() {
            names.extend(companions::found(dir)?);
        }
        Ok(names.into_iter().collect())
    }

    /// Names, lengths and times of all files in the folder, and in those of its adapters: two that are equal were taken of the same files.
    ///
    /// # Errors
    /// [`Error::Io`] where the folder cannot be read.
    pub fn stamps(&self) -> Result<Vec<(OsString, u64, Option<SystemTime>)>> {
        let fail = |e| Error::io(self.given(), e);
        let stamp = |entry: std::io::Result<std::fs::DirEntry>| {
            let entry = entry?;
            let found = entry.metadata()?;
            Ok((entry.file_name(), found.len(), found.modified().ok()))
        };
        let mut stamps = Vec::new();
        for dir in std::iter::once(&self.path).chain(self.adapters.iter().map(|(adapter, _)| &adapter.path)) {
            for entry in std::fs::read_dir(dir).map_err(fail)? {
                stamps.push(stamp(entry).map_err(fail)?);
            }
        }
        stamps.sort();
        Ok(stamps)
    }

    /// Every file that the model consists of, with its hash: configuration, weights, [companions](Self::companions), and those of its
    /// adapters. Of several the name begins with number and weight, so that other weights are other files.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Io`] where one cannot be read.
    pub fn hashes(&self) -> Result<Vec<FileHash>> {
        let index = Some(INDEX.to_string()).filter(|name| self.path.join(name).is_file());
        let mut hashes = Vec::new();
        // By the whole name: templates lie one folder down.
        let mut add = |dir: &Path, name: &str| -> Result<()> {
            hashes.push(FileHash { name: name.to_string(), ..hash(&dir.join(name))? });
            Ok(())
        };
        add(&self.path, CONFIG)?;
        self.companions()?.iter().try_for_each(|name| add(self.beside_with(name), name))?;
        index.iter().try_for_each(|name| add(&self.path, name))?;
        for (i, (adapter, weight)) in self.adapters.iter().enumerate() {
            let before = match self.adapter() {
                Some(_) => String::new(),
                None => format!("adapter {} times {weight}/", i + 1),
            };
            let shape = Some(CONFIG).filter(|name| adapter.path.join(name).is_file());
            for name in [ADAPTER_CONFIG, ADAPTER_WEIGHTS].into_iter().chain(shape) {
                // The base has a `config.json`, too.
                let before = if name == CONFIG && before.is_empty() { "adapter/" } else { &before };
                hashes.push(FileHash { name: format!("{before}{name}"), ..hash(&adapter.path.join(name))? });
            }
        }
        for path in weight_files(&self.path)? {
            hashes.push(hash(&path)?);
        }
        Ok(hashes)
    }
}

/// A model directory that is being written. It takes its name when it is whole, and leaves nothing when it is dropped before.
#[derive(Debug)]
pub struct NewModelDir {
    staging: Staging,
}

impl NewModelDir {
    /// Begins a directory made from `source` that will stand at `target`. With `overwrite` it replaces one of the same kind
    /// that lowkey made and nobody has changed since.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Io`] where what is there may not be replaced; [`Error::File`] where that is, or holds, `source`.
    pub fn begin(target: &Path, kind: Kind, overwrite: bool, source: &ModelDir) -> Result<Self> {
        let adapters = source.adapters.iter().map(|(adapter, _)| &adapter.path);
        let sources: Vec<&PathBuf> = std::iter::once(&source.path).chain(adapters).collect();
        let holds = |target: PathBuf| sources.iter().any(|path| path.starts_with(&target));
        if target.canonicalize().is_ok_and(holds) {
            return Err(Error::file(target, "is, or holds, the model that is read: give another --out"));
        }
        let replace = if overwrite { Replace::Marked } else { Replace::Never };
        Ok(Self { staging: Staging::begin(target, kind, replace)? })
    }

    /// Where its files are written.
    pub fn dir(&self) -> &Path {
        self.staging.dir()
    }

    /// Writes configuration and weights.
    ///
    /// # Errors
    /// As [`CausalLm::save`].
    pub fn save(&self, model: &CausalLm, dtype: WeightDtype, max_shard_bytes: usize) -> Result<()> {
        model.save(self.dir(), dtype, max_shard_bytes)
    }

    /// Copies tokenizer, templates and generation settings of another model; what is there already stays.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Io`] naming the file.
    pub fn carry(&self, source: &ModelDir) -> Result<()> {
        Ok(source.read_companions()?.write(self.dir())?)
    }

    /// Writes a value as JSON.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Io`].
    pub fn write_json(&self, name: &str, value: &impl Serialize) -> Result<()> {
        Ok(write_json(&self.dir().join(name), value)?)
    }

    /// Puts the directory in its place; returns what could not be removed of the one that it replaced.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Io`]; what stood there before then stands there still.
    pub fn commit(self) -> Result<Option<PathBuf>> {
        Ok(self.staging.commit()?)
    }
}

#[cfg(test)]
mod tests;
