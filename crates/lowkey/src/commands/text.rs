//! The text that a model is looked at with: the user's, or that of the run which it came from.

use std::path::{Path, PathBuf};

use lowkey_batch::IGNORE;
use lowkey_data::{Packing, Prepared, Shard, Tokenizer, prepare, sampler::validation_batches};
use lowkey_model::{ModelConfig, adapter::companion_dir};
use lowkey_train::{RunConfig, run_data};

use super::WrongUse;
use crate::progress::Preparation;

/// Most tokens of one sequence.
pub(crate) const LONGEST: usize = 512;

/// The run that a checkpoint belongs to.
pub(super) fn run_dir(model: &Path) -> Option<PathBuf> {
    let full = model.canonicalize().ok()?;
    let checkpoints = full.parent()?;
    (checkpoints.ends_with("checkpoints")).then(|| checkpoints.parent().map(Path::to_path_buf)).flatten()
}

/// What to call a model: by its run, else by its folder.
pub(crate) fn name(model: &Path) -> String {
    let full = model.canonicalize().unwrap_or_else(|_| model.to_path_buf());
    let folder = run_dir(model).unwrap_or(full);
    folder.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
}

/// The text of `--data`, else that of the run that the model belongs to; or why there is none.
pub(crate) fn find(
    data: Option<&Path>,
    model: &Path,
    tokenizer: Option<&Tokenizer>,
) -> anyhow::Result<Result<Prepared, String>> {
    match (tokenizer, data) {
        (Some(tokenizer), Some(path)) => {
            let mut dataset = super::data::dataset(path)?;
            // It is the model's way to read a text that counts here.
            dataset.add_special_tokens = None;
            let dir = tempfile::tempdir()?;
            let own = Some(tokenizer.clone());
            Ok(Ok(prepare(&dataset, dir.path(), own, &mut Preparation::new().observer())?))
        }
        (None, Some(_)) => {
            Err(WrongUse(format!("--data: {} has no tokenizer.json to read it with", model.display())).into())
        }
        (_, None) => of_run(model, tokenizer),
    }
}

/// The text that the model's run itself used, or why it is not there. Tokens that are there and cannot be read are an error.
fn of_run(model: &Path, tokenizer: Option<&Tokenizer>) -> anyhow::Result<Result<Prepared, String>> {
    let run = run_dir(model).filter(|run| run.join("run.toml").is_file());
    let (Some(run), Some(tokenizer)) = (run, tokenizer) else {
        return Ok(Err("the model belongs to no run".into()));
    };
    let file = run.join("run.toml");
    let own_tokens = run.join("data");
    let read = || -> anyhow::Result<Prepared> {
        let config = RunConfig::load(&file, &[])?;
        // The tokens of a plain text file lie in the run's own folder; the file may be gone.
        if config.data.path.is_some() {
            return Ok(lowkey_data::open(&own_tokens)?);
        }
        let mut dataset = run_data::dataset(&config.data, &file)?;
        if tokenizer.omits_special_tokens() {
            dataset.add_special_tokens = Some(false);
        }
        let own = config.init.is_some().then(|| tokenizer.clone());
        let dir = run_data::prepared_dir(&dataset, &config.data, &run, own.as_ref());
        Ok(prepare(&dataset, &dir, own, &mut Preparation::new().observer())?)
    };
    match read() {
        Ok(prepared) if prepared.validation.len() < 2 => Ok(Err("its run has no held-out text".into())),
        Ok(prepared) => Ok(Ok(prepared)),
        // Tokens that are damaged are no tokens that are gone: whoever measures with others should have said so.
        Err(e) if own_tokens.symlink_metadata().is_ok() => {
            Err(e.context("the text of the model's run is damaged; --data FILE takes another"))
        }
        Err(e) => Ok(Err(format!("the text of its run cannot be read ({e:#})"))),
    }
}

/// What a latent is measured with, and what the result is judged by.
pub(crate) struct Calibration {
    /// Name of the corpus.
    pub(crate) name: String,
    /// Training text, each sequence by itself.
    pub(crate) train: Vec<Vec<u32>>,
    /// Held-out text.
    pub(crate) held_out: Vec<Vec<u32>>,
}

impl Calibration {
    /// About `tokens` tokens of either split of the text of `--data`, else of the model's run.
    pub(crate) fn find(data: Option<&Path>, dir: &Path, model: &ModelConfig, tokens: usize) -> anyhow::Result<Self> {
        let tokenizer = Tokenizer::from_model_dir(&companion_dir(dir, "tokenizer.json")?)?;
        let prepared = find(data, dir, Some(&tokenizer))?;
        let prepared = prepared.map_err(|why| WrongUse(format!("{why}; give a text with --data")))?;
        let longest = model.max_position_embeddings.min(LONGEST);
        Ok(Self {
            train: documents(&prepared.train, longest, tokens)?,
            held_out: documents(&prepared.validation, longest, tokens)?,
            name: prepared.manifest.dataset.name,
        })
    }

    pub(crate) fn tokens(&self) -> usize {
        self.train.iter().map(Vec::len).sum()
    }
}

/// The first `count` windows of a shard, of at most `len` tokens each; of records, whose rows say what is learnt of them and not where they
/// end, the first records.
pub(crate) fn windows(shard: &Shard, len: usize, count: usize) -> lowkey_data::Result<Vec<Vec<u32>>> {
    if shard.is_masked() || shard.is_pairs() {
        let mut records = each_document(shard, len, count.saturating_mul(len))?;
        records.truncate(count);
        return Ok(records);
    }
    let batch = validation_batches(shard, len, count, Some(1), Packing::Stream, false).next().transpose()?;
    let rows = batch.iter().flat_map(|b| b.input_ids.chunks(len).zip(b.targets.chunks(len)));
    // A row that the text does not fill is padded.
    let filled = |(ids, targets): (&[u32], &[i64])| {
        let len = targets.iter().take_while(|target| **target != IGNORE).count();
        ids[..len].to_vec()
    };
    Ok(rows.map(filled).filter(|ids| !ids.is_empty()).collect())
}

/// About `tokens` tokens of a shard, each document by itself and cut to `len` tokens; windows where it is all one document.
fn documents(shard: &Shard, len: usize, tokens: usize) -> lowkey_data::Result<Vec<Vec<u32>>> {
    if shard.documents() < 2 {
        return windows(shard, len, tokens.div_ceil(len.max(1)));
    }
    each_document(shard, len, tokens)
}

/// The documents of a shard up to about so many tokens, each cut to `len` tokens.
fn each_document(shard: &Shard, len: usize, tokens: usize) -> lowkey_data::Result<Vec<Vec<u32>>> {
    let mut left = tokens;
    let mut found = Vec::new();
    for i in 0..shard.documents() {
        if left == 0 {
            break;
        }
        let Some(mut ids) = shard.document(i)? else { break };
        ids.truncate(len);
        // A single token predicts nothing.
        if ids.len() > 1 {
            left = left.saturating_sub(ids.len());
            found.push(ids);
        }
    }
    Ok(found)
}
