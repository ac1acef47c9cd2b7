//! The loop: prefill, sample, step.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use burn::tensor::{Device, Tensor};
use lowkey_model::{CausalLm, attention::FusedMla};

use crate::cache_dtype::CacheDtype;
use crate::decoder::{Decoder, check_form, check_tokens};
use crate::error::{Error, Result};
use crate::form::Form;
use crate::sampler::{Sampler, SamplingConfig};

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
    /// One entry per layer, as [`Decoder::with_fused`] takes them; empty: no layer has any.
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

/// A sequence that has not ended.
struct Live {
    /// Its index among the prompts.
    prompt: usize,
    sampler: Sampler,
    /// Prompt and continuation.
    history: Vec<u32>,
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
    let weights @ Weights { model, fused } = weights.into();
    let capacity = check(weights, prompts, config)?;
    let mut live = Vec::with_capacity(prompts.len());
    for (prompt, tokens) in prompts.iter().enumerate() {
        let sampler = Sampler::new(&config.sampling, prompt as u64)?;
        live.push(Live { prompt, sampler, history: tokens.to_vec() });
    }

    let start = Instant::now();
    let mut decoder = Decoder::with_cache(model, [prompts.len(), capacity], config.cache_dtype, config.form, device)?;
    if !fused.is_empty() {
        decoder = decoder.with_fused(fused.to_vec())?;
    }
    let cache_bytes = decoder.cache().bytes() / prompts.len();
    let mut logits = to_host(decoder.prefill(prompts, config.prefill_chunk)?)?;
    let prefill = start.elapsed();

    let start = Instant::now();
    let mut done: Vec<Option<Generation>> = vec![None; prompts.len()];
    loop {
        let (mut kept, mut next) = (Vec::new(), Vec::new());
        let vocab = logits.len() / live.len();
        for (index, (row, logits)) in live.iter_mut().zip(logits.chunks(vocab)).enumerate() {
            let token = row.sampler.sample(logits, &row.history)?;
            let prompt_tokens = prompts[row.prompt].len();
            let finish = if config.eos.contains(&token) {
                Some(Finish::Eos)
            } else {
                row.history.push(token);
                let full = row.history.len() - prompt_tokens == config.max_new_tokens;
                match on_token(row.prompt, token) {
                    ControlFlow::Break(()) => Some(Finish::Stopped),
                    ControlFlow::Continue(()) => full.then_some(Finish::Length),
                }
            };
            match finish {
                Some(finish) => {
                    let ids = row.history.split_off(prompt_tokens);
                    let decode = start.elapsed();
                    done[row.prompt] = Some(Generation { ids, finish, prompt_tokens, prefill, decode, cache_bytes });
                }
                None => {
                    kept.push(index);
                    next.push(token);
                }
            }
        }
        if kept.is_empty() {
            return Ok(done.into_iter().flatten().collect());
        }
        if kept.len() < live.len() {
            decoder.keep(&kept)?;
            live.retain(|row| done[row.prompt].is_none());
        }
        logits = to_host(decoder.step(&next)?)?;
    }
}

/// Checks a request and returns the slots per row that it needs.
fn check(Weights { model, fused }: Weights, prompts: &[&[u32]], config: &GenerateConfig) -> Result<usize> {
    let sizes = [
        ("max_new_tokens", config.max_new_tokens),
        ("prefill_chunk", config.prefill_chunk),
        ("number of prompts", prompts.len()),
    ];
    for (field, size) in sizes {
        if size == 0 {
            return Err(Error::setting(field, &size, "at least 1"));
        }
    }
    config.sampling.check()?;
    check_tokens(model, prompts)?;
    check_form(model, config.form, fused)?;
    let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(0);
    let needed = longest.saturating_add(config.max_new_tokens);
    let limit = model.config.max_position_embeddings;
    if needed > limit {
        return Err(Error::Positions { needed, limit });
    }
    Ok(needed)
}

/// `[batch, vocab]` → the rows one after another.
fn to_host(logits: Tensor<2>) -> Result<Vec<f32>> {
    logits.try_into_vec_as::<f32>().map_err(Error::Read)
}
