//! The corpus of a run, opened: training batches and held-out set.

mod find;
mod mixture;
mod records;

use std::path::Path;
use std::sync::Arc;

use lowkey_batch::Batch;
use lowkey_data::tasks::{RowLayout, TaskCorpus};
use lowkey_data::{
    DatasetConfig, Generation, Packing, Prepared, Sampler, Shard, Tokenizer,
    oracle::{OracleDocument, oracle_documents},
    prepare,
    prepare::{Expected, Observer, prepare_expecting},
    sampler::{Mixture, validation_batches},
    tokenizer::Part,
};

use crate::error::{Error, Result};
use crate::evaluate::Held;
use crate::run_config::DataSection;
pub use find::{dataset, datasets, prepared_dir};
pub(crate) use mixture::{expected, mixed};

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
    /// The held-out split, or what of it is measured.
    pub held: Held,
    /// Checksum of the whole of it.
    held_out: String,
    /// Tokens in the held-out documents, and how long a document may be where some were cut.
    cut: Option<(usize, usize)>,
    /// Name of the dataset.
    pub name: String,
    /// What a user should know of its records.
    pub notes: Vec<String>,
    /// The first training record with what is learnt of it; none of plain text.
    pub example: Option<Vec<Part>>,
}

/// Where training batches come from.
#[derive(Debug)]
pub enum TrainSource {
    /// Tokens of a text, and how its documents fill a sequence.
    Shard(Arc<Shard>, Packing),
    /// Several of them in fixed shares.
    Mixture(Vec<MixtureShard>),
    /// A task, whose examples are made as they are needed.
    Task(Arc<TaskCorpus>),
}

/// A dataset of a mixture.
#[derive(Debug)]
pub struct MixtureShard {
    /// Its tokens.
    pub shard: Arc<Shard>,
    /// How its documents fill a sequence.
    pub packing: Packing,
    /// Its weight.
    pub weight: f64,
}

/// Training batches as a pure function of the step.
pub enum TrainBatches {
    /// Cut from a text.
    Shard(Sampler),
    /// Cut from several texts.
    Mixture(Mixture),
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

/// Prepares the tokens, or opens them where they lie prepared. Held-out text comes in batches of `rows` sequences. For a run that
/// goes on, other tokens than those `expected` are refused, and its own stay as they are.
///
/// # Errors
/// [`Error::Data`] from the reader, the tokenizer or the disk.
pub fn open(
    dataset: &DatasetConfig,
    section: &DataSection,
    rows: usize,
    dir: &Path,
    tokenizer: Option<Tokenizer>,
    expected: Option<&Expected>,
    progress: Observer<'_>,
) -> Result<RunData> {
    records::check_keys(dataset, section)?;
    let prepared = match expected {
        Some(expected) => prepare_expecting(dataset, dir, tokenizer, expected, progress)?,
        None => prepare(dataset, dir, tokenizer, progress)?,
    };
    let (notes, example) = (records::notes(&prepared, section)?, records::example(&prepared)?);
    let Prepared { tokenizer, train, validation, .. } = prepared;
    let packing = match section.packing {
        _ if train.is_masked() => Packing::Documents,
        Some(packing) => packing,
        None => {
            if train.documents() > 1 {
                Packing::Documents
            } else {
                Packing::Stream
            }
        }
    };
    let mut cut = None;
    let held = match oracle_documents(dataset, &tokenizer, usize::MAX)? {
        Some(documents) => {
            let most = section.seq_len + 1;
            if documents.iter().any(|document| document.ids.len() > most) {
                cut = Some((documents.iter().map(targets).sum(), most));
            }
            // What a document's beginning is made of does not depend on its end, so a part has its own entropy.
            Held::Documents(documents.into_iter().map(|d| cropped(d, most)).collect())
        }
        None => {
            let batches = validation_batches(&validation, section.seq_len, rows, None, packing, section.mask_documents);
            Held::Batches(batches.collect::<lowkey_data::Result<_>>()?)
        }
    };
    Ok(RunData {
        vocab_size: tokenizer.vocab_size(),
        generation: Generation::new(Some(&tokenizer)),
        tokenizer: Some(tokenizer),
        train: TrainSource::Shard(Arc::new(train), packing),
        held,
        held_out: validation.checksum(),
        cut,
        name: dataset.name.clone(),
        notes,
        example,
    })
}

/// Opens a task: nothing is read or written. Held-out examples come in batches of `rows` rows.
///
/// # Errors
/// [`Error::Config`] for a row that is too short for an example, and for keys that have no meaning for a task.
pub(crate) fn open_task(corpus: TaskCorpus, name: &str, section: &DataSection, rows: usize) -> Result<RunData> {
    let layout = layout(&corpus, section)?;
    Ok(RunData {
        tokenizer: corpus.tokenizer().cloned(),
        generation: Generation::new(corpus.tokenizer()),
        vocab_size: corpus.width(),
        held: Held::Examples(corpus.held(layout, rows)),
        // A task's fingerprint covers its held-out examples.
        held_out: corpus.fingerprint(),
        cut: None,
        train: TrainSource::Task(Arc::new(corpus)),
        name: name.to_owned(),
        notes: Vec::new(),
        example: None,
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

/// How many tokens of a document are predicted: the first has nothing before it.
fn targets(document: &OracleDocument) -> usize {
    document.learnt.iter().skip(1).filter(|learnt| **learnt).count()
}

/// The first `len` tokens of a document.
fn cropped(mut document: OracleDocument, len: usize) -> OracleDocument {
    document.ids.truncate(len);
    document.log_probs.truncate(len);
    document.classes.truncate(len);
    document.learnt.truncate(len);
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
                Ok(TrainBatches::Shard(sampler(shard, *packing, section, batch_size, seed)?))
            }
            TrainSource::Mixture(shards) => {
                Ok(TrainBatches::Mixture(mixture::batches(shards, section, batch_size, seed)?))
            }
            TrainSource::Task(corpus) => {
                let layout = layout(corpus, section)?;
                Ok(TrainBatches::Task { corpus: Arc::clone(corpus), layout, batch_size, seed })
            }
        }
    }

    /// Whether sequences 2i and 2i + 1 are an answer that was chosen and one that was rejected.
    pub fn is_pairs(&self) -> bool {
        match &self.train {
            TrainSource::Shard(shard, _) => shard.is_pairs(),
            TrainSource::Mixture(shards) => shards.iter().any(|part| part.shard.is_pairs()),
            TrainSource::Task(_) => false,
        }
    }

    /// What must be the same when a run goes on: the checksum of the training tokens, or of the task.
    pub fn checksum(&self) -> String {
        match &self.train {
            TrainSource::Shard(shard, _) => shard.checksum(),
            TrainSource::Mixture(shards) => mixture::joined(shards.iter().map(|part| part.shard.checksum())),
            TrainSource::Task(corpus) => corpus.fingerprint(),
        }
    }
}

impl RunData {
    /// What a run's held-out figures must be measured on throughout: the checksum of the held-out tokens, or of the task.
    pub(crate) fn held_checksum(&self) -> String {
        self.held_out.clone()
    }

    /// What of the held-out split is measured at the end of a run, in words.
    pub(crate) fn held_part(&self) -> String {
        match (self.cut, &self.held) {
            (Some((all, most)), Held::Documents(documents)) => {
                let measured: usize = documents.iter().map(targets).sum();
                format!(
                    "the first {most} tokens (data.seq_len + 1) of each held-out document, {measured} of {all} tokens to predict"
                )
            }
            _ => "the whole held-out split".into(),
        }
    }
}

/// What cuts sequences from a shard.
fn sampler(
    shard: &Arc<Shard>,
    packing: Packing,
    section: &DataSection,
    batch_size: usize,
    seed: u64,
) -> Result<Sampler> {
    let (shard, seq_len, mask) = (Arc::clone(shard), section.seq_len, section.mask_documents);
    Ok(if shard.is_masked() {
        Sampler::of_records(shard, seq_len, batch_size, seed, section.too_long.unwrap_or_default(), mask)?
    } else {
        Sampler::new(shard, seq_len, batch_size, seed, packing, mask)?
    })
}

impl TrainBatches {
    /// The batch of a step.
    ///
    /// # Errors
    /// [`Error::Data`] where the file of tokens has been changed under the run, or cannot be read.
    pub fn batch(&self, step: u64) -> Result<Batch> {
        Ok(match self {
            Self::Shard(sampler) => sampler.batch(step)?,
            Self::Mixture(mixture) => mixture.batch(step)?,
            Self::Task { corpus, layout, batch_size, seed } => corpus.batch(*layout, *batch_size, *seed, step),
        })
    }

    /// Epochs seen after `step` steps, of a mixture those of the dataset that was seen most often; 0 for a task, whose examples do not
    /// repeat.
    pub fn epoch(&self, step: u64) -> f64 {
        match self {
            Self::Shard(sampler) => sampler.epoch(step),
            Self::Mixture(mixture) => mixture.epoch(step),
            Self::Task { .. } => 0.0,
        }
    }
}

#[cfg(test)]
mod tests;
