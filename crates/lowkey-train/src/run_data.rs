//! The corpus of a run, opened: training sampler and held-out set.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lowkey_data::{
    DatasetConfig, OracleDocument, Packing, Prepared, Progress, Sampler, Shard, Tokenizer, oracle_documents, prepare,
    validation_batches,
};

use crate::error::{Error, Result};
use crate::evaluate::Held;
use crate::run_config::DataSection;

/// The data of a run.
#[derive(Debug)]
pub struct RunData {
    /// What the ids mean.
    pub tokenizer: Tokenizer,
    /// Training tokens.
    pub train: Arc<Shard>,
    /// All of the held-out split.
    pub held: Held,
    /// How documents fill a sequence.
    pub packing: Packing,
    /// Name of the dataset.
    pub name: String,
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
    match (&section.dataset, &section.path) {
        (Some(dataset), _) => Ok(DatasetConfig::load(&find(dataset)?)?),
        (None, Some(path)) => Ok(DatasetConfig::from_text_file(&find(path)?)?),
        (None, None) => Err(Error::config("data.dataset", "(absent)", "set it to a dataset file")),
    }
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
    let name = match tokenizer {
        // A model's own tokenizer gives other tokens than the dataset's.
        Some(tokenizer) => format!("{}-{}", dataset.name, tokenizer.fingerprint().chars().take(8).collect::<String>()),
        None => dataset.name.clone(),
    };
    dataset.base.join("prepared").join(name)
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
    progress: &mut dyn FnMut(Progress),
) -> Result<RunData> {
    let Prepared { tokenizer, train, validation, .. } = prepare(dataset, dir, tokenizer, progress)?;
    let packing = section.packing.unwrap_or(if train.documents() > 1 { Packing::Documents } else { Packing::Stream });
    let held = match oracle_documents(dataset, &tokenizer, usize::MAX)? {
        // What a document's beginning is made of does not depend on its end, so a part has its own entropy.
        Some(documents) => Held::Documents(documents.into_iter().map(|d| cropped(d, section.seq_len + 1)).collect()),
        None => {
            let batches = validation_batches(&validation, section.seq_len, rows, None, packing, section.mask_documents);
            Held::Batches(batches.collect())
        }
    };
    let empty = match &held {
        Held::Batches(batches) => batches.is_empty(),
        Held::Documents(documents) => documents.is_empty(),
    };
    if empty {
        let why = "holds too little text for a held-out split; raise split.validation_fraction or add text";
        return Err(Error::file(&dataset.origin, why));
    }
    Ok(RunData { tokenizer, train: Arc::new(train), held, packing, name: dataset.name.clone() })
}

/// The first `len` tokens of a document.
fn cropped(mut document: OracleDocument, len: usize) -> OracleDocument {
    document.ids.truncate(len);
    document.log_probs.truncate(len);
    document.classes.truncate(len);
    document
}

impl RunData {
    /// The training sampler.
    ///
    /// # Errors
    /// [`Error::Data`] where the split is shorter than one sequence.
    pub fn sampler(&self, section: &DataSection, batch_size: usize, seed: u64) -> Result<Sampler> {
        let train = Arc::clone(&self.train);
        Ok(Sampler::new(train, section.seq_len, batch_size, seed, self.packing, section.mask_documents)?)
    }
}

#[cfg(test)]
mod tests;
