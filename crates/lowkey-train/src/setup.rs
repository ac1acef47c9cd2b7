//! From a run file to a model, a corpus and a device that fit together.

use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::{DType, Device};
use lowkey_data::chat::ChatTemplate;
use lowkey_data::tasks::TaskCorpus;
use lowkey_data::{DatasetConfig, Generation, Tokenizer, dataset::TokenizerConfig};
use lowkey_kernels::Precision;
use lowkey_kernels::device::is_cpu;
use lowkey_model::{ModelConfig, ModelDir};

use crate::checkpoint::{self, TrainerState};
use crate::error::{Error, Result};
use crate::event::{Event, RunOptions};
use crate::other_model;
use crate::prompts::{Prompt, prompts};
use crate::ranks::Ranks;
use crate::run_config::{RunConfig, RunSection};
use crate::run_data::{self, RunData};
use crate::start;
use crate::workers::memory;
use crate::world::check_kinds;

/// What a saved model samples at where nobody has said otherwise.
const SAVED_TEMPERATURE: f64 = 0.8;

/// The device that a run file names.
///
/// # Errors
/// [`Error::Config`] for a name that is unknown, not built in, or not here.
pub fn device(name: &str) -> Result<Device> {
    lowkey_kernels::device::open(name).map_err(|e| Error::config("run.device", name, e.to_string()))
}

/// The devices of a run, which record gradients; of one of several `ranks`, its own, and of one of several runs, that whose `turn` it is.
///
/// # Errors
/// [`Error::Config`] as [`device()`], and for several that could not keep in step.
pub fn devices(section: &RunSection, ranks: &Ranks, turn: usize) -> Result<Vec<Device>> {
    let [first, ..] = &section.devices[..] else {
        let own = match ranks.are_several() {
            true => lowkey_kernels::device::open_at(&section.device, ranks.place(), ranks.here()),
            false => lowkey_kernels::device::open_in_turn(&section.device, turn),
        };
        let own = own.map_err(|e| Error::config("run.device", &section.device, e.to_string()))?;
        return Ok(vec![own.autodiff()]);
    };
    if ranks.are_several() {
        let why = format!(
            "each of {} ranks has one device; write run.device = \"cuda\", say, and start as many ranks as there are devices",
            ranks.size()
        );
        return Err(Error::config("run.devices", first, why));
    }
    let open = |name: &String| {
        let opened = lowkey_kernels::device::open(name);
        opened.map_err(|e| Error::config("run.devices", name, e.to_string()))
    };
    let devices = section.devices.iter().map(open).collect::<Result<Vec<_>>>()?;
    check_kinds(&devices)?;
    Ok(devices.into_iter().map(Device::autodiff).collect())
}

fn check_tf32(device: &Device) -> Result<()> {
    let units =
        lowkey_kernels::device::properties(device).map(|properties| properties.matrix_units).unwrap_or_default();
    if units.iter().any(|unit| unit.starts_with("tf32")) {
        return Ok(());
    }
    let why = "this device has no matrix units for it (NVIDIA's have, from Ampere on, through `cuda`); write \"f32\"";
    Err(Error::config("training.dtype", "tf32", why))
}

/// Refuses formats that a device does not calculate in, unless it is to `emulate` them and can.
///
/// # Errors
/// [`Error::Config`] with what it does.
pub(crate) fn check_precision(precision: Precision, emulate: bool, device: &Device) -> Result<()> {
    let (name, dtype) = match precision {
        Precision::F32 => return Ok(()),
        Precision::Tf32 if !is_cpu(device) => return check_tf32(device),
        Precision::Tf32 => ("tf32", DType::F32),
        Precision::Bf16 if is_cpu(device) => {
            if emulate || lowkey_kernels::device::cpu_bf16().is_some() {
                return Ok(());
            }
            let why = "this CPU has no instructions for it (AMX or AVX512-BF16) and would be slower than in \"f32\"; write that, \
                       or training.emulate_dtype = true to have it all the same";
            return Err(Error::config("training.dtype", "bf16", why));
        }
        Precision::Bf16 => ("bf16", DType::BF16),
        Precision::F16 => ("f16", DType::F16),
    };
    if is_cpu(device) {
        let why = "the CPU trains in f32 and bf16; write one of them, or take a GPU with --device";
        return Err(Error::config("training.dtype", name, why));
    }
    if !device.supports_dtype(dtype) {
        let others: Vec<&str> = [("\"bf16\"", DType::BF16), ("\"f16\"", DType::F16), ("\"f32\"", DType::F32)]
            .into_iter()
            .filter(|(_, dtype)| device.supports_dtype(*dtype))
            .map(|(name, _)| name)
            .collect();
        let why = format!("this device does not calculate in it; write {}", others.join(" or "));
        return Err(Error::config("training.dtype", name, why));
    }
    Ok(())
}

/// Model configuration, corpus and tokenizer of a run file, with notes for the user.
#[derive(Debug)]
pub struct Setup {
    /// The model to train.
    pub model: ModelConfig,
    /// The corpus.
    pub data: RunData,
    /// The model directory of `[init]`, opened, with the adapter that is gone on with.
    pub init: Option<ModelDir>,
    /// The tokens that the run adds to those of that model.
    pub new_tokens: Range<usize>,
    /// What the user should know.
    pub notes: Vec<String>,
    /// The model that the objective is held against.
    pub(crate) other: Option<ModelConfig>,
}

/// Resolves a run file: opens (or prepares) the corpus and checks the model against its tokenizer.
///
/// # Errors
/// Everything that is wrong with the run file, the corpus or the model directory of `[init]`.
pub fn setup(config: &RunConfig, options: &RunOptions, observe: &mut dyn FnMut(Event)) -> Result<Setup> {
    setup_run(config, options, None, &AtomicBool::new(false), observe)
}

/// [`setup`] for a run that may have `begun`, with a checkpoint and its state: with other data than it began with it does not go
/// on, and its own stay as they are. `interrupt` ends the preparation of a corpus.
pub(crate) fn setup_run(
    config: &RunConfig,
    options: &RunOptions,
    begun: Option<(&Path, &TrainerState)>,
    interrupt: &AtomicBool,
    observe: &mut dyn FnMut(Event),
) -> Result<Setup> {
    let (checkpoint, begun) = begun.unzip();
    let datasets = run_data::datasets(&config.data, &options.run_file)?;
    if let [(dataset, _)] = &datasets[..]
        && let Some(corpus) = TaskCorpus::new(dataset)?
    {
        let setup = task_setup(config, dataset, corpus)?;
        if let Some(begun) = begun {
            check_same_task(begun, &setup.data, dataset)?;
        }
        return Ok(setup);
    }
    let init = start::open(config)?;
    let vocabulary = match (&init, &config.init) {
        (Some(init), Some(section)) => Some(start::vocabulary(section, init)?),
        _ => None,
    };
    let new_tokens = vocabulary.as_ref().map_or(0..0, |vocabulary| vocabulary.new.clone());
    if let Some(init) = &init {
        // What is wrong with it is told before a corpus is prepared.
        start::model(config, init, &new_tokens)?;
    }
    let (mut parts, mut earlier) = (Vec::new(), None);
    let count = datasets.len();
    for (i, (mut dataset, weight)) in datasets.into_iter().enumerate() {
        dataset.add_special_tokens = match (dataset.add_special_tokens, checkpoint) {
            (None, Some(checkpoint)) => begun_with_special_tokens(checkpoint)?,
            (given, _) => given,
        };
        let mut own_tokenizer = None;
        if let (Some(vocabulary), Some(section)) = (&vocabulary, &config.init) {
            let tokenizer = vocabulary.tokenizer.clone();
            if dataset.add_special_tokens.is_none() {
                earlier = special_tokens_note(&section.from, &tokenizer, "data.add_special_tokens = false");
            }
            own_tokenizer = Some(tokenizer.with_special_tokens(dataset.add_special_tokens));
        }
        let dir = run_data::prepared_dir(&dataset, &config.data, &options.out, own_tokenizer.as_ref());
        let expected = begun.and_then(|begun| run_data::expected(begun, i, count));
        let data = run_data::open(
            &dataset,
            &config.data,
            config.micro_batch_size(),
            &dir,
            own_tokenizer,
            expected.as_ref(),
            &mut |progress| {
                observe(Event::Preparing(progress));
                if interrupt.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            },
        )?;
        parts.push((data, weight));
    }
    // A mixture of one is that one.
    let mut data = if count == 1 { parts.remove(0).0 } else { run_data::mixed(parts)? };
    check_pairs(config, &data)?;
    let (mut model, mut notes) = resolve_model(config, init.as_ref(), &new_tokens, data.vocab_size)?;
    notes.extend(vocabulary.into_iter().flat_map(|vocabulary| vocabulary.notes));
    notes.extend(earlier);
    notes.append(&mut data.notes);
    if let Some(init) = &init {
        data.generation = Generation::from_model_dir(init.path(), data.tokenizer.as_ref())?;
    }
    let end = end_of_turn(&data)?;
    data.generation = data.generation.or_sampling(SAVED_TEMPERATURE).ending_at(end);
    model.eos_token_id.clone_from(&data.generation.ends);
    model.bos_token_id = model.bos_token_id.or(data.generation.begin);
    if let Some(tokenizer) = &data.tokenizer {
        check_prompts(&prompts(&config.eval, tokenizer)?, &model)?;
    }
    let other = other_model::check(config, &model, data.tokenizer.as_ref())?;
    Ok(Setup { model, data, init, new_tokens, notes, other })
}

/// The token that ends the turns of conversations that a run learns, where it is one that means nothing else: programs that run the model
/// are to stop there, too. A line break, with which some templates end a turn, stands in the middle of texts as well.
fn end_of_turn(data: &RunData) -> Result<Option<u32>> {
    let (Some(tokenizer), Some(_)) = (&data.tokenizer, &data.example) else { return Ok(None) };
    let Some(template) = ChatTemplate::of_tokenizer(tokenizer)? else { return Ok(None) };
    // A template that answers cannot be told in has no turns that a model could end.
    let Ok(end) = template.end_of_turn() else { return Ok(None) };
    let ids: Vec<u32> = tokenizer.encode_placed(&end)?.into_iter().map(|token| token.id).collect();
    Ok(match ids[..] {
        [id] if tokenizer.token_bytes(id).is_empty() => Some(id),
        _ => None,
    })
}

/// Whether a checkpoint says that the documents of its run have special tokens around them; they have none where it says nothing,
/// as runs that were begun before there was such a record. `None` where there is nothing to add.
fn begun_with_special_tokens(checkpoint: &Path) -> Result<Option<bool>> {
    if !checkpoint.join("tokenizer.json").is_file() {
        return Ok(None);
    }
    let tokenizer = Tokenizer::from_model_dir(checkpoint)?;
    let plain = tokenizer.omits_special_tokens() || tokenizer.special_tokens_are_assumed();
    Ok((plain || tokenizer.adds_special_tokens()).then_some(!plain))
}

/// What to tell about a model that was trained here before it was recorded whether documents have special tokens around them:
/// they had none. `instead` is what leaves them out again.
pub fn special_tokens_note(model: &Path, tokenizer: &Tokenizer, instead: &str) -> Option<String> {
    let trained_here = model.join(checkpoint::TRAINER).is_file();
    (trained_here && tokenizer.special_tokens_are_assumed()).then(|| {
        format!(
            "{} does not say whether it was trained with the special tokens that its tokenizer puts around a text, so they \
             are added; earlier versions trained without: {instead} leaves them out",
            model.display()
        )
    })
}

/// Refuses to go on with a run on another task than it began with. (Of a text, who prepares it compares the tokens.)
fn check_same_task(begun: &TrainerState, data: &RunData, dataset: &DatasetConfig) -> Result<()> {
    let held = begun.held_out.as_ref().is_none_or(|held| *held == data.held_checksum());
    if begun.data == data.checksum() && held {
        return Ok(());
    }
    let why = "the examples of this task are not those this run began with; restore the file, or start a new run with --out DIR";
    Err(Error::file(&dataset.origin, why))
}

/// [`setup`] for a task: nothing is prepared, there is no text to go on with, and a model to start from must have been made for
/// the same words.
fn task_setup(config: &RunConfig, dataset: &DatasetConfig, corpus: TaskCorpus) -> Result<Setup> {
    for (key, texts) in [("eval.prompts", &config.eval.prompts), ("eval.chat", &config.eval.chat)] {
        if let Some(prompt) = texts.first() {
            let why = "the dataset is a task, which has no text to go on with; leave the key out";
            return Err(Error::config(key, format!("{prompt:?}"), why));
        }
    }
    if corpus.task().is_of_vectors() {
        config.check_objective_of_vectors()?;
    }
    if let Some(token) = config.init.iter().flat_map(|init| &init.new_tokens).next() {
        let why = "the dataset is a task, whose words are fixed; leave the key out";
        return Err(Error::config("init.new_tokens", format!("{token:?}"), why));
    }
    let init = start::open(config)?;
    if let Some(init) = &init {
        let path = init.path().join("tokenizer.json");
        let why = match corpus.tokenizer() {
            Some(own) if Tokenizer::from_model_dir(init.path())?.fingerprint() != own.fingerprint() => {
                Some("its words are not those of the task")
            }
            None if path.exists() => Some("the model reads words, and the task has vectors"),
            Some(_) | None => None,
        };
        if let Some(why) = why {
            let why = format!("{why}; start from a model that was trained on the same task");
            return Err(Error::file(path, why));
        }
    }
    let (model, notes) = resolve_model(config, init.as_ref(), &(0..0), corpus.width())?;
    let mut data = run_data::open_task(corpus, &dataset.name, &config.data, config.micro_batch_size())?;
    if let Some(init) = &init {
        data.generation = Generation::from_model_dir(init.path(), data.tokenizer.as_ref())?;
    }
    data.generation = data.generation.or_sampling(SAVED_TEMPERATURE);
    let other = other_model::check(config, &model, data.tokenizer.as_ref())?;
    Ok(Setup { model, data, init, new_tokens: 0..0, notes, other })
}

/// The model of a run file for a vocabulary of that many tokens, of which `new` are added, with notes for the user.
fn resolve_model(
    config: &RunConfig,
    init: Option<&ModelDir>,
    new: &Range<usize>,
    vocab: usize,
) -> Result<(ModelConfig, Vec<String>)> {
    let seq_len = config.data.seq_len;
    let mut notes = Vec::new();
    let model = match (init, &config.model) {
        (Some(init), _) => start::model(config, init, new)?,
        (None, Some(section)) => {
            let (model, unused) = section.resolve(vocab, seq_len)?;
            if !unused.is_empty() {
                notes.push(format!("{} does not use {}", model.attention_name(), unused.join(", ")));
            }
            model
        }
        (None, None) => return Err(Error::config("model", "(absent)", "write a [model] section")),
    };
    if model.vocab_size < vocab {
        let why = format!("the tokenizer has {vocab} tokens, more than the model's embedding has rows");
        return Err(Error::config("model.vocab_size", model.vocab_size, why));
    }
    if config.prefers() && !model.elastic_ranks().is_empty() {
        let why = "the model's latent is elastic, and its narrower ranks learn from text alone; take a model without \
                   kv_elastic_ranks";
        return Err(Error::config("objective.kind", "preference", why));
    }
    if model.max_position_embeddings < seq_len {
        let most = model.max_position_embeddings;
        let why = match init {
            Some(_) => format!(
                "the model of [init] was made for {most} positions at most; lower it, or write more into \
                 init.max_position_embeddings (with init.rope_parameters, such as YaRN's)"
            ),
            None => format!("the model was made for {most} positions at most"),
        };
        return Err(Error::config("data.seq_len", seq_len, why));
    }
    if config.init.as_ref().is_some_and(|init| init.packed_by_adapter) {
        notes.push("adapter.quantization: the key stands in [init] now, and means there what it meant here".to_owned());
    }
    notes.extend(config.without_effect(!model.elastic_ranks().is_empty()));
    Ok((model, notes))
}

/// The model of a run file, without touching its corpus where the dataset file already says how many tokens there are: a plan
/// for a corpus on the hub fetches nothing.
///
/// # Errors
/// As [`setup`].
pub fn planned_model(config: &RunConfig, options: &RunOptions) -> Result<(ModelConfig, Vec<String>)> {
    let dataset = run_data::dataset(&config.data, &options.run_file)?;
    if let Some(corpus) = TaskCorpus::new(&dataset)? {
        let setup = task_setup(config, &dataset, corpus)?;
        return Ok((setup.model, setup.notes));
    }
    let init = start::open(config)?;
    let mut new = 0..0;
    let vocab = match (&init, &dataset.tokenizer) {
        (Some(init), _) => {
            let tokens = config.init.as_ref().map(|section| start::vocabulary(section, init)).transpose()?;
            new = tokens.as_ref().map_or(0..0, |tokens| tokens.new.clone());
            tokens.map_or(0, |tokens| tokens.tokenizer.vocab_size())
        }
        (None, TokenizerConfig::Bytes) => Tokenizer::bytes().vocab_size(),
        (None, TokenizerConfig::Bpe { vocab_size }) => *vocab_size,
        (None, TokenizerConfig::Chars | TokenizerConfig::File { .. }) => {
            let setup = setup(config, options, &mut |_| {})?;
            return Ok((setup.model, setup.notes));
        }
    };
    resolve_model(config, init.as_ref(), &new, vocab)
}

/// Refuses numbers of rows that would part a chosen answer from the rejected one.
fn check_pairs(config: &RunConfig, data: &RunData) -> Result<()> {
    if !data.is_pairs() {
        return Ok(());
    }
    let (batch, micro) = (config.training.batch_size, config.micro_batch_size());
    let devices = config.run.devices.len().max(1);
    let why = "the dataset has pairs of answers, a sequence each, which stay together: it must be a multiple of";
    if !batch.is_multiple_of(2 * devices) {
        return Err(Error::config("training.batch_size", batch, format!("{why} {}", 2 * devices)));
    }
    if !micro.is_multiple_of(2) {
        return Err(Error::config("training.micro_batch_size", micro, format!("{why} 2")));
    }
    Ok(())
}

/// Refuses now what would stop the run at its first evaluation.
fn check_prompts(prompts: &[Prompt], model: &ModelConfig) -> Result<()> {
    let most = model.max_position_embeddings;
    match prompts.iter().find(|prompt| prompt.ids.len() >= most) {
        Some(Prompt { key, text, ids, .. }) => {
            let why = format!("has {} tokens and fills the model's {most} positions; shorten it", ids.len());
            Err(Error::config(key, format!("{text:?}"), why))
        }
        None => Ok(()),
    }
}

/// Refuses a run that this machine cannot hold, before an allocation fails and takes the process with it.
pub(crate) fn check_memory(config: &RunConfig, model: &ModelConfig, replicas: usize) -> Result<()> {
    let each = crate::plan::train_bytes(config, model, config.threads().div_ceil(replicas));
    let needed = replicas.saturating_mul(each);
    let lower = "the model's sizes, training.micro_batch_size or data.seq_len";
    check_bytes("training", needed, lower, model)
}

/// Refuses tensors that a GPU does not take.
///
/// # Errors
/// [`Error::Tensor`].
pub(crate) fn check_tensors(config: &RunConfig, model: &ModelConfig, device: &Device) -> Result<()> {
    const MIB: f64 = (1u64 << 20) as f64;
    let needed = model.largest_tensor_bytes(config.rows_of_a_pass(), config.data.seq_len);
    match lowkey_kernels::device::properties(device) {
        Some(properties) if needed as u64 > properties.max_tensor => Err(Error::Tensor {
            device: format!("{} ({})", config.run.device_names(), properties.part),
            needed_mib: needed as f64 / MIB,
            limit_mib: properties.max_tensor as f64 / MIB,
        }),
        _ => Ok(()),
    }
}

/// Refuses to need more than the machine has. Estimates are rough, so that only twice the memory is certainly too much.
pub(crate) fn check_bytes(what: &'static str, needed: usize, lower: &'static str, model: &ModelConfig) -> Result<()> {
    const GIB: f64 = (1u64 << 30) as f64;
    match memory() {
        Some(memory) if needed as f64 > 2.0 * memory as f64 => Err(Error::Memory {
            what,
            needed_gib: needed as f64 / GIB,
            parameters: model.parameter_count().total,
            memory_gib: memory as f64 / GIB,
            lower,
        }),
        _ => Ok(()),
    }
}
