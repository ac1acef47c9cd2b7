//! Prompts that begin together: the smallest user of the scheduler.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::Duration;

use burn::tensor::Device;
use lowkey_model::{CausalLm, attention::FusedMla};

use crate::cache_dtype::CacheDtype;
use crate::error::{Error, Result};
use crate::form::Form;
use crate::sampler::SamplingConfig;
use crate::scheduler::{Request, Scheduler, Slots, Update};

/// What to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateConfig {
    /// Most tokens to generate per prompt.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: SamplingConfig,
    /// How MLA attention is computed.
    pub form: Form,
    /// How the cache stores its numbers.
    pub cache_dtype: CacheDtype,
    /// Tokens that end a sequence.
    pub eos: Vec<u32>,
    /// Most prompt tokens per row that go through the model at once.
    pub prefill_chunk: usize,
}

impl Default for GenerateConfig {
    /// 128 greedy tokens.
    fn default() -> Self {
        Self {
            max_new_tokens: 128,
            sampling: SamplingConfig::default(),
            form: Form::Auto,
            cache_dtype: CacheDtype::F32,
            eos: Vec::new(),
            prefill_chunk: 512,
        }
    }
}

/// What generates: a model and, where they were made, fused forms of its layers' attention. A plain `&CausalLm` converts.
#[derive(Clone, Copy, Debug)]
pub struct Weights<'a> {
    /// The model.
    pub model: &'a CausalLm,
    /// One entry per layer, as [`crate::Decoder::with_fused`] takes them; empty: no layer has any.
    pub fused: &'a [Option<FusedMla>],
}

impl<'a> From<&'a CausalLm> for Weights<'a> {
    fn from(model: &'a CausalLm) -> Self {
        Self { model, fused: &[] }
    }
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// `max_new_tokens` were generated.
    Length,
    /// One of the `eos` tokens came.
    Eos,
    /// The callback broke off.
    Stopped,
}

/// A continuation and what it cost.
#[derive(Clone, Debug)]
pub struct Generation {
    /// The generated tokens; one that ended the sequence ([`Finish::Eos`]) is not among them.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// Length of the prompt.
    pub prompt_tokens: usize,
    /// From the start to the logits of the first new token, cache allocation included; of the whole batch.
    pub prefill: Duration,
    /// From there to this sequence's end: one step of the batch for each token after the first.
    pub decode: Duration,
    /// Bytes allocated for this sequence's part of the cache.
    pub cache_bytes: usize,
}

/// Continues one prompt. `on_token` sees each new token at once and may break off.
///
/// Everything about the request is checked before anything is computed.
///
/// # Errors
/// [`Error::Setting`] for a configuration out of range, [`Error::NoToken`] and [`Error::Token`] for an empty prompt or an unknown
/// token, [`Error::Positions`] where prompt and `max_new_tokens` exceed the model's `max_position_embeddings`,
/// [`Error::NoFused`] and [`Error::Fused`] where fused weights are asked for and absent, or do not go with the model;
/// [`Error::Logit`] and [`Error::NoCandidate`] where the model's output is not usable.
pub fn generate<'a>(
    weights: impl Into<Weights<'a>>,
    prompt: &[u32],
    config: &GenerateConfig,
    device: &Device,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Generation> {
    let mut all = generate_batch(weights, &[prompt], config, device, &mut |_, token| on_token(token))?;
    all.pop().ok_or(Error::NoToken { row: 0 })
}

/// Continues several prompts at once. `on_token` gets the prompt's index with each token; breaking off ends that sequence only.
///
/// A sequence that ends leaves the batch. Greedy tokens are those of each prompt alone (but for ties within rounding); random
/// ones come from one stream per prompt, the first prompt's being that of [`generate`].
///
/// # Errors
/// As [`generate`]; [`Error::Setting`] where there is no prompt.
pub fn generate_batch<'a>(
    weights: impl Into<Weights<'a>>,
    prompts: &[&[u32]],
    config: &GenerateConfig,
    device: &Device,
    on_token: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
) -> Result<Vec<Generation>> {
    let weights = weights.into();
    let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(0);
    let capacity = longest.saturating_add(config.max_new_tokens);
    // What a scheduler calls by other names. The rest it checks itself, before anything is computed.
    for (field, size) in [("max_new_tokens", config.max_new_tokens), ("number of prompts", prompts.len())] {
        if size == 0 {
            return Err(Error::setting(field, &size, "at least 1"));
        }
    }
    let slots = Slots {
        count: prompts.len(),
        capacity,
        prefill_chunk: config.prefill_chunk,
        form: config.form,
        cache_dtype: config.cache_dtype,
    };
    let mut scheduler = Scheduler::new(weights, slots, device)?;
    let mut rows = BTreeMap::new();
    for (row, prompt) in prompts.iter().enumerate() {
        let request = Request {
            prompt: prompt.to_vec(),
            max_new_tokens: config.max_new_tokens,
            sampling: config.sampling.clone(),
            stream: row as u64,
            eos: config.eos.clone(),
        };
        if let Some(id) = scheduler.admit(request).map_err(|e| e.of_row(row))? {
            rows.insert(id, row);
        }
    }
    let mut done: Vec<Option<Generation>> = vec![None; prompts.len()];
    let mut stopped = vec![false; prompts.len()];
    while !scheduler.is_idle() {
        for (id, update) in scheduler.step()? {
            let row = rows[&id];
            match update {
                Update::Token(token) => {
                    if on_token(row, token).is_break() {
                        stopped[row] = true;
                        done[row] = scheduler.cancel(id);
                    }
                }
                Update::Ended(generation) => {
                    // The last token that there is room for may be the one that it is stopped at.
                    let finish = if stopped[row] { Finish::Stopped } else { generation.finish };
                    done[row] = Some(Generation { finish, ..generation });
                }
                Update::Failed(e) => return Err(e),
            }
        }
    }
    Ok(done.into_iter().flatten().collect())
}
