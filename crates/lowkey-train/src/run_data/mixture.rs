//! Several datasets in fixed shares.

use lowkey_data::prepare::Expected;
use lowkey_data::sampler::Mixture;
use lowkey_data::{Generation, Tokenizer};

use super::{MixtureShard, RunData, TrainSource, sampler};
use crate::checkpoint::TrainerState;
use crate::error::{Error, Result};
use crate::evaluate::{Held, HeldPart};
use crate::run_config::DataSection;

/// Between the checksums of the datasets of a mixture.
const BETWEEN: &str = "+";

/// The checksum of several.
pub(super) fn joined(checksums: impl Iterator<Item = String>) -> String {
    checksums.collect::<Vec<_>>().join(BETWEEN)
}

/// The checksums that dataset number `index` of `count` had when a run began; none where it began with another number of them.
pub(crate) fn expected(begun: &TrainerState, index: usize, count: usize) -> Option<Expected> {
    let part = |joined: &str| {
        let all: Vec<&str> = joined.split(BETWEEN).collect();
        (all.len() == count).then(|| all.get(index).map(|one| (*one).to_owned())).flatten()
    };
    let validation = begun.held_out.as_deref().and_then(part);
    // What cannot be told apart is compared all the same, and is another.
    let train = part(&begun.data).unwrap_or_else(|| begun.data.clone());
    Some(Expected { train, validation })
}

/// What the ids of a dataset mean.
struct Meaning {
    /// The dataset.
    name: String,
    tokenizer: Option<Tokenizer>,
    generation: Generation,
    vocab_size: usize,
}

impl Meaning {
    /// What must be the same of all datasets of a mixture.
    fn key(&self) -> Option<(String, Option<u32>, bool)> {
        self.tokenizer.as_ref().map(|own| (own.fingerprint(), own.eos_id(), own.adds_special_tokens()))
    }
}

/// One corpus of several, each with its weight.
///
/// # Errors
/// [`Error::Config`] where their ids mean different things.
pub(crate) fn mixed(parts: Vec<(RunData, f64)>) -> Result<RunData> {
    let (mut shards, mut held, mut notes, mut example) = (Vec::new(), Vec::new(), Vec::new(), None);
    let (mut names, mut held_out) = (Vec::new(), Vec::new());
    let mut first: Option<Meaning> = None;
    let mut chat = None;
    for (data, weight) in parts {
        let RunData { tokenizer, generation, vocab_size, train, held: own, held_out: sum, name, .. } = data;
        let TrainSource::Shard(shard, packing) = train else {
            let why = "is a task, whose examples are mixed with nothing; train on it alone";
            return Err(Error::config("data.mixture", name, why));
        };
        let is_chat = shard.is_masked();
        let own_meaning = Meaning { name: name.clone(), tokenizer: tokenizer.clone(), generation, vocab_size };
        match &first {
            Some(first) if first.key() != own_meaning.key() => {
                let why = format!(
                    "its tokenizer is not that of {}, and a model reads one: give both the same with kind = \"file\", or start from a \
                     model with [init]",
                    first.name
                );
                return Err(Error::config("data.mixture", name, why));
            }
            Some(_) => {}
            None => first = Some(own_meaning),
        }
        // With the chat template beside it, where there is one.
        chat = chat.or(tokenizer.filter(|_| is_chat));
        shards.push(MixtureShard { shard, packing, weight });
        held.push(HeldPart { name: name.clone(), weight, held: own });
        held_out.push(sum);
        notes.extend(data.notes);
        example = example.or(data.example);
        names.push(name);
    }
    let Some(Meaning { generation, vocab_size, tokenizer, .. }) = first else {
        return Err(Error::config("data.mixture", "(empty)", "name at least one dataset"));
    };
    Ok(RunData {
        tokenizer: chat.or(tokenizer),
        generation,
        vocab_size,
        train: TrainSource::Mixture(shards),
        held: Held::Mixture(held),
        held_out: joined(held_out.into_iter()),
        cut: None,
        name: names.join(" + "),
        notes,
        example,
    })
}

/// The training batches of a mixture.
pub(super) fn batches(shards: &[MixtureShard], section: &DataSection, batch_size: usize, seed: u64) -> Result<Mixture> {
    let parts = (0u64..).zip(shards).map(|(i, part)| {
        // Datasets of one length are not to come in one order.
        let own = seed ^ i.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        sampler(&part.shard, part.packing, section, batch_size, own)
    });
    let weights: Vec<f64> = shards.iter().map(|part| part.weight).collect();
    Ok(Mixture::new(parts.collect::<Result<_>>()?, &weights, seed)?)
}
