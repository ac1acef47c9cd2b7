//! Checkpoints of a run: a Hugging Face model directory plus the trainer's state, all or nothing.
//!
//! A checkpoint is written into a hidden folder, synced, and renamed into place; `checksums.json` holds the SHA-256 of
//! every file, and nothing is loaded that does not match. `best` is a link to the checkpoint with the lowest held-out
//! loss. A folder that lowkey did not write is left alone, whatever it is called.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use lowkey_data::{Generation, Tokenizer};
use lowkey_files::{
    Replace, Staging,
    companions::Companions,
    mark::Kind,
    printable, read, read_text,
    write::{copy, create_dir, remove_dir, rename, sweep},
    write_json,
};
pub use lowkey_model::checksums::{has_checksums, verify};
use lowkey_model::{
    CausalLm, Parameter,
    checkpoint::{Pending, WeightDtype, write_tensors},
    checksums::{CHECKSUMS, write_checksums},
};
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::loss_scale::LossScale;
use crate::optimizer::{Optimizer, ParameterState};

pub(crate) const TRAINER: &str = "trainer.json";
const OPTIMIZER: &str = "trainer.safetensors";
const MAX_SHARD_BYTES: usize = 5_000_000_000;
/// Largest `trainer.json`: a few lines, and one for each kernel that was chosen.
const LARGEST_STATE: u64 = 16 << 20;
pub(crate) const BEST: &str = "best";
/// The averaged model in a checkpoint, where the run keeps an average.
pub(crate) const EMA: &str = "ema";

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

/// What lies beside the weights of a checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct Beside<'a> {
    /// What ids mean, where they mean something.
    pub tokenizer: Option<&'a Tokenizer>,
    /// How the model is to generate.
    pub generation: &'a Generation,
    /// What came with the model that the run began with.
    pub companions: &'a Companions,
    /// The model with the average of its weights, where the run keeps one.
    pub ema: Option<&'a CausalLm>,
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
    /// [`Error::Io`] where the folder cannot be made or cleaned; [`Error::File`] where something that lowkey did not make lies
    /// where `best` belongs.
    pub fn open(dir: &Path, keep: usize) -> Result<Self> {
        create_dir(dir)?;
        sweep(dir)?;
        for entry in entries(dir)? {
            let name = entry.file_name().unwrap_or_default().to_string_lossy().into_owned();
            match Leftover::of(&name) {
                Some(Leftover::Unfinished) => remove_dir(&entry)?,
                Some(Leftover::Replaced(step)) => {
                    let target = dir.join(step);
                    if target.exists() { remove_dir(&entry)? } else { rename(&entry, &target)? }
                }
                None => {}
            }
        }
        let best = dir.join(BEST);
        if best.symlink_metadata().is_ok_and(|found| !found.is_symlink()) && foreign(&best)?.is_some() {
            let why = "was not written by lowkey, and the best checkpoint is to stand here: move it elsewhere";
            return Err(Error::file(best, why));
        }
        Ok(Self { dir: dir.to_path_buf(), keep })
    }

    /// Saves a checkpoint, with the tokenizer where ids mean something and what came beside the model that the run began with, points
    /// `best` at the best one, and removes all but the last `keep` and the best.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Model`] where a file cannot be written; earlier checkpoints stay as they are.
    pub fn save(
        &self,
        model: &CausalLm,
        beside: Beside,
        optimizer: &Optimizer,
        state: &TrainerState,
    ) -> Result<PathBuf> {
        let target = self.dir.join(step_name(state.step));
        // Whatever stands there is a checkpoint of the same step; files of others that were put into it are taken along.
        let staging = Staging::begin(&target, Kind::Model, Replace::Vouched)?;
        write(staging.dir(), model, beside, optimizer, state)?;
        if target.is_dir() {
            take_along(&target, staging.dir())?;
        }
        write_checksums(staging.dir())?;
        staging.commit_unmarked()?;
        self.settle(state)?;
        Ok(target)
    }

    /// Points `best` at the best checkpoint, and removes all but the last `keep` and the best. What comes after
    /// `state.step` can only be damaged; it does not count, and stays until it is written anew.
    ///
    /// # Errors
    /// [`Error::Io`] where the folder cannot be changed.
    pub(crate) fn settle(&self, state: &TrainerState) -> Result<()> {
        let best = state.best_step();
        if let Some(step) = best {
            self.point_best(&step_name(step))?;
        }
        let mut steps = steps(&self.dir)?;
        steps.retain(|(step, _)| *step <= state.step);
        let old = steps.len().saturating_sub(self.keep);
        steps.into_iter().take(old).filter(|(step, _)| Some(*step) != best).try_for_each(|(_, path)| discard(&path))
    }

    /// Removes all checkpoints that hold nothing but what lowkey wrote.
    ///
    /// # Errors
    /// [`Error::Io`] where one cannot be removed.
    pub fn clear(&self) -> Result<()> {
        let best = self.dir.join(BEST);
        match best.symlink_metadata() {
            Ok(found) if found.is_symlink() => lowkey_files::write::remove(&best)?,
            Ok(_) => discard(&best)?,
            Err(_) => {}
        }
        steps(&self.dir)?.iter().try_for_each(|(_, path)| discard(path))
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
                Err(e) => notes.push(format!("skipping a damaged checkpoint: {}", printable(&e.to_string()))),
            }
        }
        Ok((None, notes))
    }

    /// A relative symbolic link, replaced by rename; a copy where the system has no such links.
    fn point_best(&self, name: &str) -> Result<()> {
        let best = self.dir.join(BEST);
        if !self.dir.join(name).exists() {
            return Ok(());
        }
        // What an earlier version left when it was killed.
        remove_dir(&self.dir.join(".tmp-best"))?;
        #[cfg(unix)]
        {
            if best.symlink_metadata().is_ok_and(|kind| kind.is_dir()) {
                // A run that was copied without its links, or comes from a system that has none.
                discard(&best)?;
            }
            Ok(lowkey_files::write::link(name, &best)?)
        }
        #[cfg(not(unix))]
        {
            let staging = Staging::begin(&best, Kind::Model, Replace::Vouched)?;
            copy_all(&self.dir.join(name), staging.dir())?;
            staging.commit_unmarked()?;
            Ok(())
        }
    }
}

/// Copies the files of a checkpoint, and those of the folders in it.
#[cfg(not(unix))]
fn copy_all(from: &Path, to: &Path) -> Result<()> {
    create_dir(to)?;
    for path in entries(from)? {
        let Some(name) = path.file_name() else { continue };
        if path.is_dir() { copy_all(&path, &to.join(name))? } else { copy(&path, &to.join(name))? }
    }
    Ok(())
}

/// What earlier versions left when they were killed.
enum Leftover {
    Unfinished,
    /// The checkpoint of this name, moved aside to be replaced.
    Replaced(String),
}

impl Leftover {
    fn of(name: &str) -> Option<Self> {
        let of_step = |name: &str| name.strip_prefix("step-").is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()));
        if let Some(rest) = name.strip_prefix(".tmp-") {
            let rest = rest.strip_prefix("gone-").unwrap_or(rest);
            return (rest == BEST || of_step(rest)).then_some(Self::Unfinished);
        }
        let replaced = name.strip_prefix(".old-")?;
        of_step(replaced).then(|| Self::Replaced(replaced.to_string()))
    }
}

/// Removes a checkpoint so that at no moment a part of it stands under its name. One that holds something of others stays.
fn discard(path: &Path) -> Result<()> {
    match foreign(path)? {
        Some(_) => Ok(()),
        None => Ok(remove_dir(path)?),
    }
}

/// The first thing in a folder that is no file of a checkpoint.
fn foreign(dir: &Path) -> Result<Option<PathBuf>> {
    let listed = listed(dir);
    Ok(entries(dir)?.into_iter().find(|path| !is_part(path, &listed)))
}

/// Copies what others put into the checkpoint `old` to the one that takes its place.
fn take_along(old: &Path, new: &Path) -> Result<()> {
    let listed = listed(old);
    for path in entries(old)?.into_iter().filter(|path| !is_part(path, &listed)) {
        let Some(name) = path.file_name() else { continue };
        if !path.is_file() {
            let why =
                "was not written by lowkey, and the checkpoint that it lies in is to be replaced: move it elsewhere";
            return Err(Error::file(path, why));
        }
        copy(&path, &new.join(name))?;
    }
    Ok(())
}

/// The files that a checkpoint's own table names; none where it has none that can be read.
fn listed(dir: &Path) -> BTreeSet<String> {
    let table = read_text(&dir.join(CHECKSUMS), LARGEST_STATE).ok();
    let table = table.and_then(|text| serde_json::from_str::<BTreeMap<String, serde_json::Value>>(&text).ok());
    table.into_iter().flatten().map(|(name, _)| name).collect()
}

/// Whether lowkey wrote this entry of a checkpoint, as far as its name tells.
fn is_part(path: &Path, listed: &BTreeSet<String>) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // What every checkpoint has; of other companions its table tells which are the run's and which its user's.
    let known = [
        CHECKSUMS,
        TRAINER,
        OPTIMIZER,
        "config.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    let known = known.contains(&&*name);
    let weights = name.starts_with("model") && (name.ends_with(".safetensors") || name.ends_with(".index.json"));
    // A folder is listed by the files in it.
    let is_listed = |file: &PathBuf| {
        file.file_name().is_some_and(|file| listed.contains(&format!("{name}/{}", file.to_string_lossy())))
    };
    let folder = || entries(path).is_ok_and(|files| !files.is_empty() && files.iter().all(is_listed));
    path.symlink_metadata().is_ok_and(|found| match found.is_dir() {
        // A model directory with a table of its own.
        true if name == EMA => {
            let listed = self::listed(path);
            entries(path).is_ok_and(|files| files.iter().all(|file| is_part(file, &listed)))
        }
        true => folder(),
        false => found.is_file() && (weights || known || listed.contains(&*name)),
    })
}

/// Loads the trainer's state without the optimiser's.
///
/// # Errors
/// [`Error::File`] where it is none.
pub(crate) fn load_trainer(dir: &Path) -> Result<TrainerState> {
    let path = dir.join(TRAINER);
    let text = read_text(&path, LARGEST_STATE)?;
    serde_json::from_str(&text).map_err(|e| Error::file(&path, format!("not a trainer's state: {e}")))
}

/// Loads the trainer's state and, in the order of `parameters`, the optimiser's states, each of the kind of `kinds`.
///
/// # Errors
/// [`Error::File`] naming the file and tensor that do not fit.
pub(crate) fn load_state(
    dir: &Path,
    parameters: &[Parameter],
    kinds: &[ParameterState],
    device: &Device,
) -> Result<(TrainerState, Vec<ParameterState>)> {
    let state = load_trainer(dir)?;
    let path = dir.join(OPTIMIZER);
    let bytes = read(&path, u64::MAX)?;
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

/// The newest checkpoint in a folder, whole or damaged; none where there is no such folder.
///
/// # Errors
/// [`Error::Io`] where the folder cannot be read.
pub fn newest(dir: &Path) -> Result<Option<PathBuf>> {
    let steps = if dir.exists() { steps(dir)? } else { Vec::new() };
    Ok(steps.into_iter().next_back().map(|(_, path)| path))
}

/// Checkpoints by step, oldest first.
pub(crate) fn steps(dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found: Vec<(u64, PathBuf)> = entries(dir)?
        .into_iter()
        .filter_map(|path| {
            let name = path.file_name()?.to_str()?;
            let step = name.strip_prefix("step-")?.parse().ok()?;
            // `step-1` and the like are somebody else's.
            (step_name(step) == name && path.is_dir()).then_some((step, path))
        })
        .collect();
    found.sort();
    Ok(found)
}

fn step_name(step: u64) -> String {
    format!("step-{step:06}")
}

fn write(dir: &Path, model: &CausalLm, beside: Beside, optimizer: &Optimizer, state: &TrainerState) -> Result<()> {
    write_model(dir, model, beside)?;
    if let Some(averaged) = beside.ema {
        let dir = dir.join(EMA);
        create_dir(&dir)?;
        write_model(&dir, averaged, beside)?;
        write_checksums(&dir)?;
    }
    write_states(&dir.join(OPTIMIZER), model, optimizer)?;
    Ok(write_json(&dir.join(TRAINER), state)?)
}

/// A model directory.
fn write_model(dir: &Path, model: &CausalLm, beside: Beside) -> Result<()> {
    match model.adapter() {
        None => model.save(dir, WeightDtype::F32, MAX_SHARD_BYTES)?,
        Some(_) => model.save_adapter(dir)?,
    }
    if let Some(tokenizer) = beside.tokenizer {
        tokenizer.save(dir)?;
    }
    write_json(&dir.join("generation_config.json"), &beside.generation.to_json())?;
    // Last: what the run knows itself is not that of the model it began with.
    Ok(beside.companions.write(dir)?)
}

fn write_states(path: &Path, model: &CausalLm, optimizer: &Optimizer) -> Result<()> {
    let (states, _) = optimizer.state();
    let mut tensors = Vec::new();
    for (parameter, state) in model.trained_parameters().iter().zip(states) {
        for (kind, tensor) in state.tensors() {
            let name = format!("{kind}.{}", parameter.name);
            let bytes = move || {
                let values = tensor.try_to_vec_as::<f32>();
                let why = |e| format!("{kind} of the optimiser cannot be read back: {e:?}");
                let unread = |e| lowkey_model::Error::File { path: path.to_path_buf(), why: why(e) };
                Ok(values.map_err(unread)?.iter().flat_map(|x| x.to_le_bytes()).collect())
            };
            tensors.push(Pending::new(name, Dtype::F32, tensor.dims().to_vec(), bytes));
        }
    }
    Ok(write_tensors(path, tensors, None)?)
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let fail = |e| Error::io(dir, e);
    fs::read_dir(dir).map_err(fail)?.map(|entry| Ok(entry.map_err(fail)?.path())).collect()
}

#[cfg(test)]
mod tests;
