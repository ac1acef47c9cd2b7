//! Checkpoints of a run: a Hugging Face model directory plus the trainer's state, all or nothing.
//!
//! A checkpoint is written into a hidden folder, synced, and renamed into place; `checksums.json` holds the SHA-256 of
//! every file, and nothing is loaded that does not match. `best` is a link to the checkpoint with the lowest held-out
//! loss.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use atomic_write_file::AtomicWriteFile;
use burn::tensor::{Device, Tensor, TensorData};
use lowkey_data::Tokenizer;
use lowkey_model::{CausalLm, Parameter, WeightDtype};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::loss_scale::LossScale;
use crate::optimizer::{Optimizer, ParameterState};

const CHECKSUMS: &str = "checksums.json";
const TRAINER: &str = "trainer.json";
const OPTIMIZER: &str = "trainer.safetensors";
const MAX_SHARD_BYTES: usize = 5_000_000_000;
/// Begins the name of what is being written or removed.
const TEMPORARY: &str = ".tmp-";
/// Begins the name of a whole checkpoint that is being replaced.
const REPLACED: &str = ".old-";

/// `trainer.json`: all that a run needs besides weights and the optimiser's state to go on as if it had never stopped.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Optimiser steps taken.
    pub step: u64,
    /// Training targets seen.
    pub tokens: u64,
    /// Seconds of the run so far.
    pub time_s: f64,
    /// Checksum of the training tokens: other tokens would be another run.
    pub data: String,
    /// The lowest held-out loss so far, and the step it was measured at.
    #[serde(default)]
    pub best: Option<(u64, f64)>,
    /// `eval.batches` that it was measured with: other losses cannot be compared with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<usize>,
    /// Checksum of the held-out tokens: losses on others could not be compared. Older checkpoints do not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out: Option<String>,
    /// Nothing is held out that could tell a better checkpoint from a worse one: the newest is the best.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub newest_is_best: bool,
    /// The factor on the loss, where products are computed in f16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
    /// Kernels chosen by measurement, on a GPU: a resumed run takes the same ones.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub kernels: BTreeMap<String, String>,
}

impl TrainerState {
    /// The step of the checkpoint that `best` points to.
    fn best_step(&self) -> Option<u64> {
        if self.newest_is_best { Some(self.step) } else { self.best.map(|(step, _)| step) }
    }
}

/// The checkpoints of one run.
#[derive(Debug)]
pub struct Checkpoints {
    dir: PathBuf,
    keep: usize,
}

impl Checkpoints {
    /// Those in `dir`, which is created; what a killed process left half-written is removed, and what it was about to
    /// replace is put back.
    ///
    /// # Errors
    /// [`Error::Io`] where the folder cannot be made or cleaned.
    pub fn open(dir: &Path, keep: usize) -> Result<Self> {
        fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        for entry in entries(dir)? {
            let name = entry.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(TEMPORARY) {
                remove(&entry)?;
            } else if let Some(name) = name.strip_prefix(REPLACED) {
                let target = dir.join(name);
                if target.exists() {
                    remove(&entry)?;
                } else {
                    fs::rename(&entry, &target).map_err(|e| Error::io(&entry, e))?;
                }
            }
        }
        Ok(Self { dir: dir.to_path_buf(), keep })
    }

    /// Saves a checkpoint, with the tokenizer where ids mean something, points `best` at the best one, and removes all but the last `keep` and the best.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Model`] where a file cannot be written; earlier checkpoints stay as they are.
    pub fn save(
        &self,
        model: &CausalLm,
        tokenizer: Option<&Tokenizer>,
        optimizer: &Optimizer,
        state: &TrainerState,
    ) -> Result<PathBuf> {
        let name = step_name(state.step);
        let (target, temporary) = (self.dir.join(&name), self.dir.join(format!("{TEMPORARY}{name}")));
        let written = write(&temporary, model, tokenizer, optimizer, state);
        if let Err(e) = written {
            // The message about the disk matters more than one about the clean-up.
            let _ = remove(&temporary);
            return Err(e);
        }
        if target.exists() {
            let old = self.dir.join(format!("{REPLACED}{name}"));
            fs::rename(&target, &old).map_err(|e| Error::io(&target, e))?;
            fs::rename(&temporary, &target).map_err(|e| Error::io(&target, e))?;
            self.discard(&old)?;
        } else {
            fs::rename(&temporary, &target).map_err(|e| Error::io(&target, e))?;
        }
        sync_dir(&self.dir)?;
        self.settle(state)?;
        Ok(target)
    }

    /// Points `best` at the best checkpoint, and removes all but the last `keep` and the best. What comes after
    /// `state.step` can only be damaged; it does not count, and stays until it is written anew.
    ///
    /// # Errors
    /// [`Error::Io`] where the folder cannot be changed.
    pub fn settle(&self, state: &TrainerState) -> Result<()> {
        let best = state.best_step();
        if let Some(step) = best {
            self.point_best(&step_name(step))?;
        }
        let mut steps = steps(&self.dir)?;
        steps.retain(|(step, _)| *step <= state.step);
        let old = steps.len().saturating_sub(self.keep);
        for (_, path) in steps.into_iter().take(old).filter(|(step, _)| Some(*step) != best) {
            self.discard(&path)?;
        }
        Ok(())
    }

    /// Removes all checkpoints.
    ///
    /// # Errors
    /// [`Error::Io`] where one cannot be removed.
    pub fn clear(&self) -> Result<()> {
        let best = self.dir.join("best");
        if best.symlink_metadata().is_ok() {
            self.discard(&best)?;
        }
        steps(&self.dir)?.iter().try_for_each(|(_, path)| self.discard(path))
    }

    /// Removes a checkpoint so that at no moment a part of it stands under its name.
    fn discard(&self, path: &Path) -> Result<()> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let hidden = self.dir.join(format!("{TEMPORARY}gone-{name}"));
        fs::rename(path, &hidden).map_err(|e| Error::io(path, e))?;
        remove(&hidden)
    }

    /// The newest checkpoint that is whole, and what is wrong with any newer one.
    ///
    /// # Errors
    /// [`Error::Io`] where the folder cannot be read.
    pub fn latest(&self) -> Result<(Option<PathBuf>, Vec<String>)> {
        let mut notes = Vec::new();
        for (_, path) in steps(&self.dir)?.into_iter().rev() {
            match verify(&path) {
                Ok(()) => return Ok((Some(path), notes)),
                Err(e) => notes.push(format!("skipping a damaged checkpoint: {e}")),
            }
        }
        Ok((None, notes))
    }

    /// A relative symbolic link, replaced by rename; a copy where the system has no such links.
    fn point_best(&self, name: &str) -> Result<()> {
        let (best, temporary) = (self.dir.join("best"), self.dir.join(format!("{TEMPORARY}best")));
        if !self.dir.join(name).exists() {
            return Ok(());
        }
        if temporary.symlink_metadata().is_ok() {
            remove(&temporary)?;
        }
        #[cfg(unix)]
        {
            if best.symlink_metadata().is_ok_and(|kind| kind.is_dir()) {
                // A run that was copied without its links, or comes from a system that has none.
                self.discard(&best)?;
            }
            std::os::unix::fs::symlink(name, &temporary).map_err(|e| Error::io(&temporary, e))?;
            fs::rename(&temporary, &best).map_err(|e| Error::io(&best, e))
        }
        #[cfg(not(unix))]
        {
            fs::create_dir_all(&temporary).map_err(|e| Error::io(&temporary, e))?;
            for file in entries(&self.dir.join(name))? {
                if let Some(file_name) = file.file_name() {
                    fs::copy(&file, temporary.join(file_name)).map_err(|e| Error::io(&file, e))?;
                }
            }
            if best.exists() {
                remove(&best)?;
            }
            fs::rename(&temporary, &best).map_err(|e| Error::io(&best, e))
        }
    }
}

/// Loads the trainer's state without the optimiser's.
///
/// # Errors
/// [`Error::File`] where it is none.
pub(crate) fn load_trainer(dir: &Path) -> Result<TrainerState> {
    let path = dir.join(TRAINER);
    let text = fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    serde_json::from_str(&text).map_err(|e| Error::file(&path, format!("not a trainer's state: {e}")))
}

/// Loads the trainer's state and, in the order of `parameters`, the optimiser's states, each of the kind of `kinds`.
///
/// # Errors
/// [`Error::File`] naming the file and tensor that do not fit.
pub fn load_state(
    dir: &Path,
    parameters: &[Parameter],
    kinds: &[ParameterState],
    device: &Device,
) -> Result<(TrainerState, Vec<ParameterState>)> {
    let state = load_trainer(dir)?;
    let path = dir.join(OPTIMIZER);
    let bytes = fs::read(&path).map_err(|e| Error::io(&path, e))?;
    let tensors = SafeTensors::deserialize(&bytes)
        .map_err(|e| Error::file(&path, format!("not a readable safetensors file: {e}")))?;
    let device = device.clone().without_autodiff();
    let read = |kind: &str, parameter: &Parameter| -> Result<Tensor<1>> {
        let name = format!("{kind}.{}", parameter.name);
        let view = tensors.tensor(&name).map_err(|_| Error::file(&path, format!("tensor {name} is missing")))?;
        let len: usize = parameter.shape.iter().product();
        if view.dtype() != Dtype::F32 || view.shape() != [len] {
            let why = format!("tensor {name} is {:?} {:?}, expected F32 [{len}]", view.dtype(), view.shape());
            return Err(Error::file(&path, why));
        }
        let values: Vec<f32> =
            view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        Ok(Tensor::from_data(TensorData::new(values, [len]), &device))
    };
    let states = parameters
        .iter()
        .zip(kinds)
        .map(|(parameter, kind)| kind.read(|name| read(name, parameter)))
        .collect::<Result<_>>()?;
    Ok((state, states))
}

/// Recomputes every checksum of a checkpoint.
///
/// # Errors
/// [`Error::File`] naming the first file that differs or is missing.
pub fn verify(dir: &Path) -> Result<()> {
    let path = dir.join(CHECKSUMS);
    let text = fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let expected: BTreeMap<String, String> =
        serde_json::from_str(&text).map_err(|e| Error::file(&path, format!("not a table of checksums: {e}")))?;
    for (name, expected) in expected {
        let path = dir.join(&name);
        let found = sha256(&path)?;
        if found != expected {
            let why = format!(
                "its SHA-256 is {found}, not {expected} as when it was saved: the file has changed since; use another \
                 checkpoint, or remove {CHECKSUMS} if the change was meant"
            );
            return Err(Error::file(path, why));
        }
    }
    Ok(())
}

/// The newest checkpoint in a folder, whole or damaged; none where there is no such folder.
///
/// # Errors
/// [`Error::Io`] where the folder cannot be read.
pub fn newest(dir: &Path) -> Result<Option<PathBuf>> {
    let steps = if dir.exists() { steps(dir)? } else { Vec::new() };
    Ok(steps.into_iter().next_back().map(|(_, path)| path))
}

/// Checkpoints by step, oldest first.
fn steps(dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found: Vec<(u64, PathBuf)> = entries(dir)?
        .into_iter()
        .filter_map(|path| {
            let name = path.file_name()?.to_str()?;
            let step = name.strip_prefix("step-")?.parse().ok()?;
            // Something else may look like a checkpoint.
            (name == step_name(step)).then_some((step, path))
        })
        .collect();
    found.sort();
    Ok(found)
}

/// Whether a model directory carries checksums.
pub fn has_checksums(dir: &Path) -> bool {
    dir.join(CHECKSUMS).is_file()
}

fn step_name(step: u64) -> String {
    format!("step-{step:06}")
}

fn write(
    dir: &Path,
    model: &CausalLm,
    tokenizer: Option<&Tokenizer>,
    optimizer: &Optimizer,
    state: &TrainerState,
) -> Result<()> {
    if dir.exists() {
        remove(dir)?;
    }
    model.save(dir, WeightDtype::F32, MAX_SHARD_BYTES)?;
    if let Some(tokenizer) = tokenizer {
        tokenizer.save(dir)?;
    }
    let generation = json!({
        "bos_token_id": model.config.bos_token_id,
        // null where there is none: an empty list would stop transformers' own generation.
        "eos_token_id": (!model.config.eos_token_id.is_empty()).then_some(&model.config.eos_token_id),
        "do_sample": true,
        "temperature": 0.8,
    });
    write_json(&dir.join("generation_config.json"), &generation)?;
    write_states(&dir.join(OPTIMIZER), model, optimizer)?;
    write_json(&dir.join(TRAINER), &json!(state))?;
    let mut checksums = BTreeMap::new();
    for path in entries(dir)? {
        if let Some(name) = path.file_name() {
            checksums.insert(name.to_string_lossy().into_owned(), sha256(&path)?);
        }
    }
    write_json(&dir.join(CHECKSUMS), &json!(checksums))?;
    sync_dir(dir)
}

fn write_states(path: &Path, model: &CausalLm, optimizer: &Optimizer) -> Result<()> {
    let (states, _) = optimizer.state();
    let mut tensors = Vec::new();
    for (parameter, state) in model.parameters().iter().zip(states) {
        for (kind, tensor) in state.tensors() {
            let values = tensor
                .try_to_vec_as::<f32>()
                .map_err(|e| Error::Device { what: "the optimiser's state", why: format!("{e:?}") })?;
            let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            tensors.push((format!("{kind}.{}", parameter.name), values.len(), bytes));
        }
    }
    let bytes = tensors
        .iter()
        .map(|(name, len, bytes)| Ok((name.as_str(), TensorView::new(Dtype::F32, vec![*len], bytes)?)))
        .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>()
        .and_then(|views| safetensors::serialize(views, None::<HashMap<String, String>>))
        .map_err(|e| Error::file(path, format!("cannot be encoded: {e}")))?;
    write_file(path, &bytes)
}

/// Writes a file atomically: temporary file, fsync, rename.
///
/// # Errors
/// [`Error::Io`] naming the file.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut file = AtomicWriteFile::open(path)?;
        file.write_all(bytes)?;
        file.commit()
    };
    write().map_err(|e| Error::io(path, e))
}

pub(crate) fn write_json(path: &Path, value: &serde_json::Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::file(path, e.to_string()))?;
    write_file(path, (text + "\n").as_bytes())
}

fn sha256(path: &Path) -> Result<String> {
    let fail = |e| Error::io(path, e);
    let mut file = File::open(path).map_err(fail)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).map_err(fail)?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let fail = |e| Error::io(dir, e);
    fs::read_dir(dir).map_err(fail)?.map(|entry| Ok(entry.map_err(fail)?.path())).collect()
}

/// Removes a file, a link, or a folder with all that is in it.
fn remove(path: &Path) -> Result<()> {
    let kind = path.symlink_metadata().map_err(|e| Error::io(path, e))?;
    let removed = if kind.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    removed.map_err(|e| Error::io(path, e))
}

/// Makes a rename durable. Only Unix can open a folder to sync it.
fn sync_dir(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(dir).and_then(|file| file.sync_all()).map_err(|e| Error::io(dir, e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
