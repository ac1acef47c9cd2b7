//! `lowkey eval`.

use std::path::Path;
use std::process::ExitCode;

use anyhow::bail;
use burn::tensor::Device;
use lowkey_data::tasks::{RowLayout, TaskCorpus};
use lowkey_data::{
    DatasetConfig, Packing, Tokenizer,
    dataset::{Source, SplitBy},
    oracle::oracle_documents,
    prepare,
    sampler::validation_batches,
};
use lowkey_model::{CausalLm, ModelDir, adapter::companion_dir};
use lowkey_train::{
    evaluate,
    evaluate::{Evaluation, Held},
    ranks::Ranks,
    workers::Workers,
};
use serde::Serialize;

use super::{WrongUse, ranks};
use crate::cli::EvalArguments;
use crate::output::{complain, say, say_json};
use crate::progress::{Preparation, evaluation_table};

/// Tokens of a batch that are laid out together.
const MOST_TOKENS: usize = 1 << 26;

pub(crate) fn eval(arguments: &EvalArguments) -> anyhow::Result<ExitCode> {
    let ranks = ranks::join()?;
    ranks::part(&ranks, eval_on(&ranks, arguments).map(|()| ExitCode::SUCCESS))
}

/// What is to be measured on what.
struct Asked {
    model: CausalLm,
    held: Held,
    byte_lengths: Vec<u32>,
    /// The whole text, not its held-out split.
    all: bool,
}

fn eval_on(ranks: &Ranks, arguments: &EvalArguments) -> anyhow::Result<()> {
    let device = ranks::agree(ranks, super::open_device_at(&arguments.device, ranks.place(), ranks.here()))?;
    let threads = ranks::compare(ranks, &device)?;
    let Asked { model, held, byte_lengths, all } = ranks::agree(ranks, asked(arguments, &device))?;
    if ranks.are_several() {
        let files = ranks::agree(ranks, hashes(&arguments.model))?;
        ranks::all_have(ranks, "files of the model", files.as_bytes())?;
        ranks::all_have(ranks, "tokens of the text", &held.checksum())?;
    }
    let workers = Workers::for_device(threads, threads, &device)?.among(ranks.clone());
    let evaluation = evaluate(&model, &held, &byte_lengths, &workers, &device)?;
    if ranks.is_first() { report(arguments, &evaluation, all) } else { Ok(()) }
}

/// The hash of every file of a model.
fn hashes(model: &Path) -> anyhow::Result<String> {
    Ok(serde_json::to_string(&ModelDir::open(model)?.hashes()?)?)
}

fn asked(arguments: &EvalArguments, device: &Device) -> anyhow::Result<Asked> {
    let dataset = super::data::dataset(&arguments.data)?;
    if let Some(corpus) = TaskCorpus::new(&dataset)? {
        let model = super::read_at(super::load_model(&arguments.model, device)?, arguments.kv_rank)?;
        let held = of_task(arguments, &model, &corpus)?;
        return Ok(Asked { model, held, byte_lengths: Vec::new(), all: false });
    }
    let tokenizer = super::open_tokenizer(&arguments.model, arguments.add_special_tokens)?;
    let model = super::read_at(super::load_model(&arguments.model, device)?, arguments.kv_rank)?;
    let longest = model.config.max_position_embeddings;
    let seq_len = arguments.seq_len.unwrap_or(longest.min(2048));
    if seq_len == 0 || seq_len > longest {
        return Err(WrongUse(format!("--seq-len {seq_len}: this model takes 1 to {longest} tokens")).into());
    }
    let most = MOST_TOKENS / seq_len;
    if arguments.batch_size == 0 || arguments.batch_size > most.max(1) {
        let why = format!("--batch-size {}: must lie between 1 and {}", arguments.batch_size, most.max(1));
        return Err(WrongUse(why).into());
    }
    if tokenizer.vocab_size() > model.config.vocab_size {
        bail!(
            "{}: tokenizer.json has {} tokens, more than the {} of config.json; put the model's own tokenizer there",
            arguments.model.display(),
            tokenizer.vocab_size(),
            model.config.vocab_size
        );
    }
    let mut dataset = dataset;
    // It is the model's way to read a text that is measured.
    dataset.add_special_tokens = None;
    let all = match &arguments.split {
        Some(split) => split == "all",
        // Who names a text means the text; a dataset file says what of it is held out.
        None => is_text(&arguments.data),
    };
    if arguments.split.is_none() && all && was_trained_on(&arguments.model, &arguments.data) {
        complain("note: this model was trained on this text; --split validation measures what was held out of it");
    }
    if all && matches!(dataset.source, Source::Storybook { .. }) {
        let why = "--split all: a storybook has no end; its held-out stories are --split validation";
        return Err(WrongUse(why.into()).into());
    }
    if all {
        dataset.split.validation_fraction = 0.0;
        dataset.split.by = SplitBy::Tail;
    }
    let held = match oracle_documents(&dataset, &tokenizer, usize::MAX)? {
        Some(documents) if documents.iter().all(|d| d.ids.len() <= longest + 1) => Held::Documents(documents),
        _ => Held::Batches(batches(arguments, &dataset, &tokenizer, seq_len, all)?),
    };
    let held = arguments.batches.map_or_else(|| held.clone(), |count| held.first(count, arguments.batch_size));
    Ok(Asked { model, held, byte_lengths: tokenizer.byte_lengths(), all })
}

/// Whether a path is that of a text, not of a dataset file.
fn is_text(data: &Path) -> bool {
    data.extension().is_none_or(|extension| extension != "toml")
}

/// Whether the run that a model comes from read this very text, wherever it lay.
fn was_trained_on(model: &Path, text: &Path) -> bool {
    let prepared = super::text::run_dir(model).and_then(|run| lowkey_data::open(&run.join("data")).ok());
    let (Some(prepared), Ok(sha256)) = (prepared, lowkey_files::hash::sha256(text)) else { return false };
    prepared.manifest.files.iter().any(|file| file.sha256 == sha256)
}

/// The held-out examples of a task, which the model was trained on.
fn of_task(arguments: &EvalArguments, model: &CausalLm, corpus: &TaskCorpus) -> anyhow::Result<Held> {
    let (positions, longest) = (corpus.positions(), model.config.max_position_embeddings);
    let seq_len = arguments.seq_len.unwrap_or(positions);
    if seq_len < positions || seq_len > longest {
        let why = "an example of this task has that many positions, and the model takes no more";
        return Err(WrongUse(format!("--seq-len {seq_len}: must lie between {positions} and {longest}; {why}")).into());
    }
    if arguments.batch_size == 0 || arguments.batch_size > (MOST_TOKENS / seq_len).max(1) {
        let why =
            format!("--batch-size {}: must lie between 1 and {}", arguments.batch_size, (MOST_TOKENS / seq_len).max(1));
        return Err(WrongUse(why).into());
    }
    if arguments.split.as_deref() == Some("all") {
        return Err(
            WrongUse("--split all: a task has no end; its held-out examples are --split validation".into()).into()
        );
    }
    let dir = arguments.model.display();
    let fits = match corpus.tokenizer() {
        Some(own) => {
            let beside = companion_dir(&arguments.model, "tokenizer.json")?;
            Tokenizer::from_model_dir(&beside)?.fingerprint() == own.fingerprint()
        }
        // Widths alone may agree by chance; a model of words has a tokenizer.
        None => corpus.width() <= model.config.vocab_size && !arguments.model.join("tokenizer.json").exists(),
    };
    if !fits {
        bail!(
            "{dir}: was not trained on this task: it reads other words, or fewer numbers, than {}",
            arguments.data.display()
        );
    }
    let layout = RowLayout { seq_len, mask_documents: true };
    let held = Held::Examples(corpus.held(layout, arguments.batch_size));
    Ok(arguments.batches.map_or_else(|| held.clone(), |count| held.first(count, arguments.batch_size)))
}

/// The figures with what they were measured on.
#[derive(Serialize)]
struct Report<'a> {
    split: &'static str,
    #[serde(flatten)]
    evaluation: &'a Evaluation,
}

/// Shows the figures, if they are numbers. `all`: they are those of the whole text, not of its held-out split.
fn report(arguments: &EvalArguments, evaluation: &Evaluation, all: bool) -> anyhow::Result<()> {
    if evaluation.tokens == 0 {
        return Err(WrongUse(format!("{}: no token to predict in this split", arguments.data.display())).into());
    }
    if !evaluation.loss.is_finite() {
        bail!(
            "{}: the loss is {}; the weights are damaged or have diverged",
            arguments.model.display(),
            evaluation.loss
        );
    }
    if arguments.json {
        return say_json(&Report { split: if all { "all" } else { "validation" }, evaluation });
    }
    let first = arguments.batches.map(|count| format!("the first {count} batches of ")).unwrap_or_default();
    let part = if all { "all" } else { "the held-out split" };
    say(&format!("{first}{part} of {}:\n{}", arguments.data.display(), evaluation_table(evaluation)));
    Ok(())
}

/// The split's text as batches. Its tokens go to a temporary folder: an evaluation leaves nothing behind.
fn batches(
    arguments: &EvalArguments,
    dataset: &DatasetConfig,
    tokenizer: &Tokenizer,
    seq_len: usize,
    all: bool,
) -> anyhow::Result<Vec<lowkey_batch::Batch>> {
    let dir = tempfile::tempdir()?;
    let prepared = prepare(dataset, dir.path(), Some(tokenizer.clone()), &mut Preparation::new().observer())?;
    let shard = if all { &prepared.train } else { &prepared.validation };
    let packing = if shard.documents() > 1 { Packing::Documents } else { Packing::Stream };
    let batches = validation_batches(shard, seq_len, arguments.batch_size, arguments.batches, packing, true);
    Ok(batches.collect::<Result<_, _>>()?)
}
