//! The other model that an objective is held against: a reference, or a teacher.
//!
//! It is asked about the rows of a pass before the pass, without a graph, and answers in plain numbers, or is there itself where all
//! that it predicts is wanted. What it says of a row can be kept on disk, see [`Kept`].

use std::sync::Arc;

use burn::module::Module;
use burn::tensor::Device;
use half::f16;
use lowkey_batch::{IGNORE, Rows};
use lowkey_data::Tokenizer;
use lowkey_kernels::Precision;
use lowkey_model::objective::{Against, Teacher, TopTokens};
use lowkey_model::{CausalLm, ModelConfig};

use crate::checkpoint;
use crate::error::{Error, Result};
use crate::kept::{Kept, fingerprint, row_key};
use crate::ranks::Ranks;
use crate::run_config::{Asked, OtherModel, RunConfig};

/// A model that is asked and not trained, on one device.
#[derive(Debug)]
pub(crate) struct Counterpart {
    model: CausalLm,
    device: Device,
    asked: Asked,
    kept: Option<Arc<Kept>>,
    /// What a run computes its steps in.
    precision: Precision,
}

/// What it says of some rows.
#[derive(Debug)]
pub(crate) enum Said<'a> {
    /// The log-probability of each row's targets.
    Rows(Vec<f64>),
    /// The likeliest tokens.
    Top(TopTokens),
    /// Whatever it is asked.
    All(&'a CausalLm),
}

impl Said<'_> {
    pub(crate) fn against(&self) -> Against<'_> {
        match self {
            Self::Rows(sums) => Against { reference: Some(sums), teacher: None },
            Self::Top(top) => Against { reference: None, teacher: Some(Teacher::Top(top)) },
            Self::All(model) => Against { reference: None, teacher: Some(Teacher::Model(model)) },
        }
    }
}

/// What must fit before anything is loaded: vocabulary, positions, tokens.
pub(crate) fn check(
    config: &RunConfig,
    model: &ModelConfig,
    tokenizer: Option<&Tokenizer>,
) -> Result<Option<ModelConfig>> {
    let Some(OtherModel { key, dir, asked, .. }) = config.other_model() else { return Ok(None) };
    let other = ModelConfig::read(&dir.join("config.json"))?;
    let refuse = |why: String| Err(Error::config(key, dir.display(), why));
    if other.vocab_size != model.vocab_size {
        return refuse(format!(
            "predicts {} tokens, and the model of this run {}; both must have one vocabulary: take the model of [init] and the \
             other from one family",
            other.vocab_size, model.vocab_size
        ));
    }
    if other.max_position_embeddings < config.data.seq_len {
        let most = other.max_position_embeddings;
        return refuse(format!("was made for {most} positions at most; lower data.seq_len = {}", config.data.seq_len));
    }
    let size = |config: &ModelConfig| (config.layers.len(), config.hidden_size);
    if config.learns_attention() && size(&other) != size(model) {
        let ((its_layers, its_width), (layers, width)) = (size(&other), size(model));
        return refuse(format!(
            "has {its_layers} layers of width {its_width}, and the model of this run {layers} of width {width};              objective.attention_weight takes layers that say the same: leave it out"
        ));
    }
    if let Asked::Tokens { top_k: Some(top_k), .. } = asked
        && top_k >= model.vocab_size
    {
        let why = format!("must be below the {} tokens of the vocabulary; leave it out for all", model.vocab_size);
        return Err(Error::config("objective.top_k", top_k, why));
    }
    if let (Some(own), true) = (tokenizer, dir.join("tokenizer.json").exists()) {
        let its = Tokenizer::from_model_dir(dir)?;
        let ids = 0..own.vocab_size().max(its.vocab_size()) as u32;
        if let Some(id) = ids.into_iter().find(|id| own.token_bytes(*id) != its.token_bytes(*id)) {
            let text = |tokenizer: &Tokenizer| String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned();
            return refuse(format!(
                "its token {id} is {:?}, and that of this run {:?}; both must have one tokenizer",
                text(&its),
                text(own)
            ));
        }
    }
    Ok(Some(other))
}

impl Counterpart {
    /// The other model of a run on each of its devices; none where the objective needs none. [`check`] has passed. What is kept of it,
    /// one of several ranks keeps in a file of its own.
    pub(crate) fn load(
        config: &RunConfig,
        other: Option<&ModelConfig>,
        trained: &CausalLm,
        devices: &[Device],
        ranks: &Ranks,
    ) -> Result<Vec<Option<Self>>> {
        let (Some(OtherModel { dir, cache, asked, .. }), Some(other)) = (config.other_model(), other) else {
            return Ok(devices.iter().map(|_| None).collect());
        };
        if checkpoint::has_checksums(dir) {
            checkpoint::verify(dir)?;
        }
        let precision = config.training.dtype;
        let kept = match cache {
            Some(cache) => {
                let what = match asked {
                    Asked::Rows => "rows".to_owned(),
                    Asked::Tokens { top_k, temperature } => format!("top{}-t{temperature}", top_k.unwrap_or_default()),
                };
                let of_rank =
                    if ranks.are_several() { format!("-{}of{}", ranks.rank(), ranks.size()) } else { String::new() };
                Some(Arc::new(Kept::open(
                    cache,
                    &format!("{}-{what}-{}{of_rank}", fingerprint(dir)?, format!("{precision:?}").to_lowercase()),
                )?))
            }
            None => None,
        };
        // Beside an adapter lies the base itself, which no step changes: there is no need to load it a second time.
        // One with other positions than it was made for is not what it was.
        let same = trained.config.rope == other.rope
            && trained.config.max_position_embeddings == other.max_position_embeddings;
        let base = (same && config.other_is_base(trained.adapter())).then(|| trained.unadapted().valid());
        let load = |device: &Device| {
            let device = device.clone().inner();
            let model = match &base {
                Some(base) => base.clone().fork(&device),
                None => CausalLm::load_with(dir, other, &device)?.valid(),
            };
            Ok(Some(Self { model, device, asked, kept: kept.clone(), precision }))
        };
        devices.iter().map(load).collect()
    }

    /// What it says of rows.
    pub(crate) fn says(&self, rows: Rows) -> Said<'_> {
        match self.asked {
            Asked::Rows => Said::Rows(self.sums(rows, self.kept.as_deref())),
            Asked::Tokens { top_k: None, .. } => Said::All(&self.model),
            Asked::Tokens { top_k: Some(top_k), temperature } => Said::Top(self.top(rows, top_k, temperature)),
        }
    }

    /// Whether everything that was to be kept is.
    ///
    /// # Errors
    /// What the disk said first.
    pub(crate) fn in_order(&self) -> Result<()> {
        self.kept.as_ref().map_or(Ok(()), |kept| kept.in_order())
    }

    /// The log-probabilities of rows' targets at an evaluation, which calculates in f32 whatever the steps do.
    pub(crate) fn measures(&self, rows: Rows) -> Vec<f64> {
        self.sums(rows, self.kept.as_deref().filter(|_| self.precision == Precision::F32))
    }

    fn sums(&self, rows: Rows, kept: Option<&Kept>) -> Vec<f64> {
        let compute = || self.model.row_log_probs(rows, &self.device).0;
        let Some(kept) = kept else { return compute() };
        let keys: Vec<_> = (0..rows.rows).map(|row| row_key(rows, row)).collect();
        let known = |bytes: Vec<u8>| Some(f64::from_le_bytes(bytes.try_into().ok()?));
        let found: Option<Vec<f64>> = keys.iter().map(|key| kept.get(*key).and_then(known)).collect();
        found.unwrap_or_else(|| {
            let sums = compute();
            for (key, sum) in keys.iter().zip(&sums).filter(|(_, sum)| sum.is_finite()) {
                kept.put(*key, &sum.to_le_bytes());
            }
            sums
        })
    }

    fn top(&self, rows: Rows, k: usize, temperature: f64) -> TopTokens {
        let Some(kept) = &self.kept else { return self.model.top_tokens(rows, k, temperature, &self.device) };
        let asked = |row: usize| {
            let targets = &rows.targets[row * rows.seq_len..(row + 1) * rows.seq_len];
            targets.iter().filter(|target| **target != IGNORE).count()
        };
        let vocab = self.model.config.vocab_size;
        let keys: Vec<_> = (0..rows.rows).map(|row| row_key(rows, row)).collect();
        let known = |row: usize| unpacked(&kept.get(keys[row])?, k, asked(row), vocab);
        let found: Option<Vec<TopTokens>> = (0..rows.rows).map(known).collect();
        let parts = found.unwrap_or_else(|| {
            let all = self.model.top_tokens(rows, k, temperature, &self.device);
            let mut at = 0;
            let part = |row: usize| {
                let from = at;
                at += asked(row);
                let bytes = packed(&all, from..at);
                if all.log_probs[from * (k + 1)..at * (k + 1)].iter().all(|x| x.is_finite()) {
                    kept.put(keys[row], &bytes);
                }
                // As it is read again, so that it makes no difference who computed it.
                unpacked(&bytes, k, at - from, vocab)
            };
            (0..rows.rows).filter_map(part).collect()
        });
        let mut joined = TopTokens { k, ..TopTokens::default() };
        for part in parts {
            joined.ids.extend(part.ids);
            joined.log_probs.extend(part.log_probs);
        }
        joined
    }
}

/// Tokens as u32 and log-probabilities as f16, little-endian.
fn packed(top: &TopTokens, asked: std::ops::Range<usize>) -> Vec<u8> {
    let ids = &top.ids[asked.start * top.k..asked.end * top.k];
    let log_probs = &top.log_probs[asked.start * (top.k + 1)..asked.end * (top.k + 1)];
    let log_probs = log_probs.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes());
    ids.iter().flat_map(|id| id.to_le_bytes()).chain(log_probs).collect()
}

/// The tokens of [`packed`], with probabilities that add up to 1 again; none where the bytes are not those of so many.
fn unpacked(bytes: &[u8], k: usize, asked: usize, vocab: usize) -> Option<TopTokens> {
    if bytes.len() != asked * (6 * k + 2) {
        return None;
    }
    let (ids, log_probs) = bytes.split_at(asked * 4 * k);
    let ids: Vec<u32> = ids.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
    let mut log_probs: Vec<f32> =
        log_probs.as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect();
    for row in log_probs.chunks_mut(k + 1) {
        let log_sum = row.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln() as f32;
        row.iter_mut().for_each(|x| *x -= log_sum);
    }
    let whole = ids.iter().all(|id| (*id as usize) < vocab) && log_probs.iter().all(|x| x.is_finite());
    whole.then_some(TopTokens { k, ids, log_probs })
}

#[cfg(test)]
mod tests;
