//! The corpus of a run, opened: training batches and held-out set.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lowkey_data::tasks::{RowLayout, StepBatch, TaskCorpus};
use lowkey_data::{
    DatasetConfig, Generation, Observer, OracleDocument, Packing, Prepared, Sampler, Shard, Tokenizer,
    oracle_documents, prepare, validation_batches,
};

use crate::error::{Error, Result};
use crate::evaluate::Held;
use crate::run_config::DataSection;

/// The data of a run.
#[derive(Debug)]
pub struct RunData {
    /// What the ids mean; none where there are no tokens.
    pub tokenizer: Option<Tokenizer>,
    /// How the model is to generate; what a user wrote beside the model of `[init]` stays in force.
    pub generation: Generation,
    /// Rows of an embedding that fits: tokens of the vocabulary, or numbers of an input vector.
    pub vocab_size: usize,
    /// Where training batches come from.
    pub train: TrainSource,
    /// All of the held-out split.
    pub held: Held,
    /// Name of the dataset.
    pub name: String,
}

/// Where training batches come from.
#[derive(Debug)]
pub enum TrainSource {
    /// Tokens of a text, and how its documents fill a sequence.
    Shard(Arc<Shard>, Packing),
    /// A task, whose examples are made as they are needed.
    Task(Arc<TaskCorpus>),
}

/// Training batches as a pure function of the step.
pub enum TrainBatches {
    /// Cut from a text.
    Shard(Sampler),
    /// Examples of a task.
    Task {
        /// The task.
        corpus: Arc<TaskCorpus>,
        /// How examples fill the rows.
        layout: RowLayout,
        /// Rows per step.
        batch_size: usize,
        /// Seed of the run.
        seed: u64,
    },
}

/// Finds the dataset of a run file: relative to the current folder, else to the run file's.
///
/// # Errors
/// [`Error::File`] naming both places.
pub fn dataset(section: &DataSection, run_file: &Path) -> Result<DatasetConfig> {
    let find = |path: &Path| -> Result<PathBuf> {
        let beside = run_file.parent().unwrap_or(Path::new("")).join(path);
        [path.to_path_buf(), beside.clone()].into_iter().find(|p| p.exists()).ok_or_else(|| {
            let why =
                format!("does not exist, and neither does {}; paths count from the current folder", beside.display());
            Error::file(path, why)
        })
    };
    let mut dataset = match (&section.dataset, &section.path) {
        (Some(dataset), _) => DatasetConfig::load(&find(dataset)?)?,
        (None, Some(path)) => DatasetConfig::from_text_file(&find(path)?)?,
        (None, None) => return Err(Error::config("data.dataset", "(absent)", "set it to a dataset file")),
    };
    dataset.add_special_tokens = section.add_special_tokens.or(dataset.add_special_tokens);
    Ok(dataset)
}

/// Where a dataset's tokens are kept: beside its file, or in the run's folder for a plain text file.
pub fn prepared_dir(
    dataset: &DatasetConfig,
    section: &DataSection,
    run_dir: &Path,
    tokenizer: Option<&Tokenizer>,
) -> PathBuf {
    if section.dataset.is_none() {
        return run_dir.join("data");
    }
    dataset.prepared_dir(tokenizer)
}

/// Prepares the tokens, or opens them where they lie prepared. Held-out text comes in batches of `rows` sequences.
///
/// # Errors
/// [`Error::Data`] from the reader, the tokenizer or the disk; [`Error::File`] where a split is empty.
pub fn open(
    dataset: &DatasetConfig,
    section: &DataSection,
    rows: usize,
    dir: &Path,
    tokenizer: Option<Tokenizer>,
    progress: Observer<'_>,
) -> Result<RunData> {
    let Prepared { tokenizer, train, validation, .. } = prepare(dataset, dir, tokenizer, progress)?;
    let packing = section.packing.unwrap_or(if train.documents() > 1 { Packing::Documents } else { Packing::Stream });
    let held = match oracle_documents(dataset, &tokenizer, usize::MAX)? {
        // What a document's beginning is made of does not depend on its end, so a part has its own entropy.
        Some(documents) => Held::Documents(documents.into_iter().map(|d| cropped(d, section.seq_len + 1)).collect()),
        None => {
            let batches = validation_batches(&validation, section.seq_len, rows, None, packing, section.mask_documents);
            Held::Batches(batches.collect::<Result<_, _>>()?)
        }
    };
    Ok(RunData {
        vocab_size: tokenizer.vocab_size(),
        generation: Generation::new(Some(&tokenizer)),
        tokenizer: Some(tokenizer),
        train: TrainSource::Shard(Arc::new(train), packing),
        held,
        name: dataset.name.clone(),
    })
}

/// Opens a task: nothing is read or written. Held-out examples come in batches of `rows` rows.
///
/// # Errors
/// [`Error::Config`] for a row that is too short for an example, and for keys that have no meaning for a task.
pub fn open_task(corpus: TaskCorpus, name: &str, section: &DataSection, rows: usize) -> Result<RunData> {
    let layout = layout(&corpus, section)?;
    Ok(RunData {
        tokenizer: corpus.tokenizer().cloned(),
        generation: Generation::new(corpus.tokenizer()),
        vocab_size: corpus.width(),
        held: Held::Examples(corpus.held(layout, rows)),
        train: TrainSource::Task(Arc::new(corpus)),
        name: name.to_owned(),
    })
}

/// How a task's examples fill the rows of a run.
fn layout(corpus: &TaskCorpus, section: &DataSection) -> Result<RowLayout> {
    let positions = corpus.positions();
    if section.seq_len < positions {
        let why = format!("an example of this task has {positions} positions; make it at least that");
        return Err(Error::config("data.seq_len", section.seq_len, why));
    }
    if section.packing == Some(Packing::Stream) {
        let why = "the examples of a task are never cut; leave the key out";
        return Err(Error::config("data.packing", "stream", why));
    }
    Ok(RowLayout { seq_len: section.seq_len, mask_documents: section.mask_documents })
}

/// The first `len` tokens of a document.
fn cropped(mut document: OracleDocument, len: usize) -> OracleDocument {
    document.ids.truncate(len);
    document.log_probs.truncate(len);
    document.classes.truncate(len);
    document
}

impl RunData {
    /// The training batches.
    ///
    /// # Errors
    /// [`Error::Data`] where the split is shorter than one sequence.
    pub fn batches(&self, section: &DataSection, batch_size: usize, seed: u64) -> Result<TrainBatches> {
        match &self.train {
            TrainSource::Shard(shard, packing) => {
                let shard = Arc::clone(shard);
                let sampler = Sampler::new(shard, section.seq_len, batch_size, seed, *packing, section.mask_documents)?;
                Ok(TrainBatches::Shard(sampler))
            }
            TrainSource::Task(corpus) => {
                let layout = layout(corpus, section)?;
                Ok(TrainBatches::Task { corpus: Arc::clone(corpus), layout, batch_size, seed })
            }
        }
    }

    /// What must be the same when a run goes on: the checksum of the training tokens, or of the task.
    pub fn checksum(&self) -> String {
        match &self.train {
            TrainSource::Shard(shard, _) => shard.checksum(),
            TrainSource::Task(corpus) => corpus.fingerprint(),
        }
    }
}

impl TrainBatches {
    /// The batch of a step.
    ///
    /// # Errors
    /// [`Error::Data`] where the file of tokens has been changed under the run, or cannot be read.
    pub fn batch(&self, step: u64) -> Result<StepBatch> {
        Ok(match self {
            Self::Shard(sampler) => sampler.batch(step)?.into(),
            Self::Task { corpus, layout, batch_size, seed } => corpus.batch(*layout, *batch_size, *seed, step),
        })
    }

    /// Epochs seen after `step` steps; 0 for a task, whose examples do not repeat.
    pub fn epoch(&self, step: u64) -> f64 {
        match self {
            Self::Shard(sampler) => sampler.epoch(step),
            Self::Task { .. } => 0.0,
        }
    }
}

#[cfg(test)]
mod tests;
