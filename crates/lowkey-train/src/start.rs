//! The model of `[init]` as a run takes it: with an adapter beside it, more tokens, other positions.

use std::collections::BTreeSet;
use std::ops::Range;

use lowkey_data::Tokenizer;
use lowkey_model::{ModelConfig, ModelDir};

use crate::error::{Error, Result};
use crate::run_config::{InitSection, RunConfig, at_least_one};

/// The tokens of a model that a run starts from.
#[derive(Clone, Debug)]
pub(crate) struct Vocabulary {
    pub(crate) tokenizer: Tokenizer,
    /// Those that the run has added.
    pub(crate) new: Range<usize>,
    /// What a user should know of them.
    pub(crate) notes: Vec<String>,
}

/// The model directory of `[init]`, with the adapter that is gone on with, whose keys the run file knows from then on.
pub(crate) fn open(config: &RunConfig) -> Result<Option<ModelDir>> {
    let Some(init) = &config.init else { return Ok(None) };
    let dir = ModelDir::open(&init.from)?;
    if dir.adapter().is_some() {
        let why =
            "is an adapter; write it as adapter = …, and as from the model that it stands beside, or merge the two";
        return Err(Error::config("init.from", init.from.display(), why));
    }
    let Some(adapter) = &init.adapter else { return Ok(Some(dir)) };
    let dir = dir.with_adapter(adapter)?;
    if let Some(adapter) = dir.adapter() {
        init.keys.get_or_init(|| adapter.config.clone());
    }
    Ok(Some(dir))
}

/// The tokenizer of the model of `[init]`, with the run's new tokens behind its own.
pub(crate) fn vocabulary(section: &InitSection, dir: &ModelDir) -> Result<Vocabulary> {
    let old = Tokenizer::from_model_dir(dir.beside())?;
    let tokenizer = old.with_new_tokens(&section.new_tokens)?;
    let new = old.vocab_size()..tokenizer.vocab_size();
    let mut notes = Vec::new();
    let there: Vec<String> = section.new_tokens.iter().filter_map(|token| told(token, &old)).collect();
    if !there.is_empty() {
        notes.push(format!("init.new_tokens: the tokenizer has {} already", there.join(", ")));
    }
    if !new.is_empty() {
        notes.push(format!(
            "init.new_tokens: {} new tokens, ids {} to {}; their rows begin as the mean of the others",
            new.len(),
            new.start,
            new.end - 1
        ));
    }
    if let (false, Some(adapter)) = (new.is_empty(), &section.adapter) {
        let why = format!(
            "the adapter {} has rows for the tokens that it was trained with; leave out what it does not know, or merge it and start \
             from the merged model",
            adapter.display()
        );
        return Err(Error::config("init.new_tokens", format!("{:?}", section.new_tokens), why));
    }
    Ok(Vocabulary { tokenizer, new, notes })
}

/// A token that is there already, in words.
fn told(token: &str, old: &Tokenizer) -> Option<String> {
    let id = old.token_to_id(token)?;
    let plain = if old.token_bytes(id).is_empty() { "" } else { " as a plain one" };
    Some(format!("{token:?} (id {id}{plain})"))
}

/// The configuration of the model of `[init]` for a vocabulary of which `new` are added, with the positions that the run asks for.
pub(crate) fn model(config: &RunConfig, dir: &ModelDir, new: &Range<usize>) -> Result<ModelConfig> {
    let Some(section) = &config.init else { return Ok(dir.config()?) };
    let mut model = dir.config()?;
    if !new.is_empty() && model.vocab_size < new.start {
        let why = format!("the tokenizer has {} tokens, more than the model's embedding has rows", new.start);
        return Err(Error::config("model.vocab_size", model.vocab_size, why));
    }
    model.vocab_size = model.vocab_size.max(new.end);
    let model = model.with_positions(section.max_position_embeddings, section.rope_parameters.as_ref())?;
    if let (false, Some(adapter)) = (new.is_empty(), &config.adapter) {
        adapter.check_new_rows(&model)?;
    }
    Ok(model)
}

impl InitSection {
    /// Refuses tokens that are none.
    pub(crate) fn check(&self, seq_len: usize) -> Result<()> {
        if let Some(empty) = self.new_tokens.iter().find(|token| token.trim().is_empty()) {
            let why = "a new token has at least one character that is no space";
            return Err(Error::config("init.new_tokens", format!("{empty:?}"), why));
        }
        let mut seen = BTreeSet::new();
        if let Some(twice) = self.new_tokens.iter().find(|token| !seen.insert(*token)) {
            return Err(Error::config("init.new_tokens", format!("{twice:?}"), "stands there twice; keep one of them"));
        }
        match self.max_position_embeddings {
            Some(longest) if longest < seq_len => {
                let why = format!("is shorter than data.seq_len = {seq_len}; make it at least that");
                Err(Error::config("init.max_position_embeddings", longest, why))
            }
            Some(longest) => at_least_one("init.max_position_embeddings", longest, 1 << 24),
            None => Ok(()),
        }
    }
}
