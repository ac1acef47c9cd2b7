//! Single tokens over a filled cache.

use std::time::Instant;

use lowkey_infer::{Decoder, Form, GenerateConfig, Sampler};
use lowkey_model::{CausalLm, ModelConfig};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::machine::{Spread, peak_rss_mb, read_bandwidth, thousandths};
use super::shapes::Shape;
use super::{MOST_ROUNDS, Observer, Progress};
use crate::error::{Error, Result};
use crate::run_config::at_least_one;
use crate::setup::check_bytes;

/// Seed of weights and tokens.
const SEED: u64 = 1;

/// Bytes of a number in weights and cache.
const F32: usize = 4;

/// Longest prompt that goes through the model. What is measured behind it does not depend on what lies in the cache, and the
/// work of a prompt grows with its square.
const LONGEST_PROMPT: usize = 4096;

/// What to measure.
#[derive(Clone, Debug)]
pub struct DecodeOptions {
    /// Name of a [`Shape`].
    pub shape: String,
    /// Sequences at a time.
    pub batch: usize,
    /// Tokens per sequence that the cache holds before the first step.
    pub context: usize,
    /// Steps, of one token per sequence each.
    pub new: usize,
    /// Name of a [`Form`].
    pub way: String,
    /// Threads; absent: one per core.
    pub threads: Option<usize>,
}

impl Default for DecodeOptions {
    fn default() -> Self {
        Self { shape: "d256".into(), batch: 1, context: 4096, new: 64, way: "absorbed".into(), threads: None }
    }
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct DecodeFigures {
    /// `decode`
    pub what: &'static str,
    /// Name of the shape.
    pub shape: &'static str,
    /// How attention was computed in the steps.
    pub way: String,
    /// Sequences at a time.
    pub batch: usize,
    /// Tokens per sequence before the first step.
    pub context: usize,
    /// Steps.
    pub new: usize,
    /// Threads.
    pub threads: usize,
    /// Parameters.
    pub params: usize,
    /// Tokens per second of a prompt of `context` tokens, at most 4096, by whichever form takes fewer operations. A longer cache is
    /// filled with random numbers.
    pub prefill_tokens_per_s: f64,
    /// Median time of a step: of one token for each sequence.
    pub step_ms: f64,
    /// The shortest.
    pub step_ms_min: f64,
    /// The longest.
    pub step_ms_max: f64,
    /// Median time of a step divided by the sequences.
    pub ms_per_token: f64,
    /// Its inverse.
    pub tokens_per_s: f64,
    /// Numbers that the cache stores per token, all layers together.
    pub cache_numbers_per_token: usize,
    /// Bytes of the whole cache as allocated.
    pub cache_bytes: usize,
    /// Bytes that a step reads, divided by the sequences: each weight but the rows of the embedding that are not looked up, the cache
    /// at half of the steps, and in the expanded form the keys and values that it rebuilds from the latents.
    pub bytes_per_token: f64,
    /// Those bytes per second of the median step.
    pub bytes_per_s: f64,
    /// Rate at which as many threads read memory that no cache of the processor holds.
    pub memory_bytes_per_s: f64,
    /// `bytes_per_s / memory_bytes_per_s`; above 1 where weights stay in the processor's caches.
    pub bandwidth_fraction: f64,
    /// Largest resident memory of the process, MiB; absent where the system does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_rss_mb: Option<f64>,
}

/// Fills a cache and times greedy steps from there.
///
/// # Errors
/// [`Error::Config`] for options out of range, [`Error::Memory`] for a cache that this machine cannot hold.
pub fn decode(options: &DecodeOptions, observe: Observer) -> Result<DecodeFigures> {
    let shape = Shape::named(&options.shape)?;
    let DecodeOptions { batch, context, new, .. } = *options;
    super::check_tokens(batch, "context", context)?;
    at_least_one("new", new, MOST_ROUNDS)?;
    let unknown = |_| Error::config("way", format!("{:?}", options.way), "must be absorbed, expanded or auto");
    let way: Form = options.way.parse().map_err(unknown)?;
    let config = shape.config(context + new)?;
    let cache = batch * (context + new) * cache_numbers(&config) * F32;
    let needed = (config.parameter_count().total * F32).saturating_add(cache);
    check_bytes("decoding", needed, "the shape, the batch or the context", &config)?;
    let threads = super::threads(options.threads)?;
    super::on_threads(threads, || measure(shape, &config, options, way, threads, observe))
}

fn cache_numbers(config: &ModelConfig) -> usize {
    config.cache_width().latent * config.num_hidden_layers
}

fn measure(
    shape: Shape,
    config: &ModelConfig,
    options: &DecodeOptions,
    way: Form,
    threads: usize,
    observe: Observer,
) -> Result<DecodeFigures> {
    let DecodeOptions { batch, context, new, .. } = *options;
    let device = super::device();
    let model = CausalLm::init(config, SEED, &device);
    let mut random = ChaCha8Rng::seed_from_u64(SEED);
    let prompt_tokens = context.min(LONGEST_PROMPT);
    let mut prompt = || (0..prompt_tokens).map(|_| random.random_range(0..config.vocab_size as u32)).collect();
    let prompts: Vec<Vec<u32>> = (0..batch).map(|_| prompt()).collect();
    let mut decoder = Decoder::new(&model, batch, context + new, Form::Auto, &device)?;

    // In parts, so that there is something to watch. What lies in the cache is the same in every form.
    let chunk = GenerateConfig::default().prefill_chunk;
    let started = Instant::now();
    let mut logits = None;
    for from in (0..prompt_tokens).step_by(chunk) {
        observe(Progress { doing: "prefill", done: from, of: prompt_tokens });
        let parts: Vec<&[u32]> = prompts.iter().map(|ids| &ids[from..(from + chunk).min(prompt_tokens)]).collect();
        logits = Some(decoder.prefill(&parts, chunk)?);
    }
    let logits = logits.ok_or_else(|| Error::config("context", context, "must be at least 1"))?;
    let mut samplers = (0..batch)
        .map(|row| Sampler::new(&GenerateConfig::default().sampling, row as u64))
        .collect::<std::result::Result<Vec<_>, _>>()?;
    let mut greedy = |logits: burn::tensor::Tensor<2>| -> Result<Vec<u32>> {
        let failed = |e| Error::Device { what: "the logits", why: format!("{e:?}") };
        let logits = logits.try_into_vec_as::<f32>().map_err(failed)?;
        let rows = samplers.iter_mut().zip(logits.chunks(config.vocab_size));
        Ok(rows.map(|(sampler, logits)| sampler.sample(logits, &[])).collect::<std::result::Result<_, _>>()?)
    };
    let mut tokens = greedy(logits)?;
    let prefill = started.elapsed();

    if prompt_tokens < context {
        decoder.fill_at_random(context)?;
    }
    decoder.set_form(way);
    let mut times = Vec::with_capacity(new);
    for done in 0..new {
        observe(Progress { doing: "tokens", done, of: new });
        let started = Instant::now();
        tokens = greedy(decoder.step(&tokens)?)?;
        times.push(started.elapsed());
    }
    let peak_rss_mb = peak_rss_mb();
    let cache_bytes = decoder.cache().bytes();
    drop(decoder);

    let memory_bytes_per_s = read_bandwidth(threads)?;
    let Spread { median, min, max } = Spread::milliseconds(&times);
    let params = config.parameter_count().total;
    let weights = params - (config.vocab_size - batch.min(config.vocab_size)) * config.hidden_size;
    let cached = batch * (context + new / 2) * cache_numbers(config);
    // Keys and values of all heads, which the expanded form makes of the latents anew and then reads.
    let rebuilt = match way {
        Form::Expanded => batch * (context + new / 2) * config.cache_width().expanded * config.num_hidden_layers,
        _ => 0,
    };
    let step_bytes = ((weights + cached + rebuilt) * F32) as f64;
    let bytes_per_s = step_bytes / median * 1e3;
    Ok(DecodeFigures {
        what: "decode",
        shape: shape.name,
        way: way.to_string(),
        batch,
        context,
        new,
        threads,
        params,
        prefill_tokens_per_s: thousandths((batch * prompt_tokens) as f64 / prefill.as_secs_f64()),
        step_ms: thousandths(median),
        step_ms_min: thousandths(min),
        step_ms_max: thousandths(max),
        ms_per_token: thousandths(median / batch as f64),
        tokens_per_s: thousandths(batch as f64 / median * 1e3),
        cache_numbers_per_token: cache_numbers(config),
        cache_bytes,
        bytes_per_token: step_bytes / batch as f64,
        bytes_per_s,
        memory_bytes_per_s,
        bandwidth_fraction: bytes_per_s / memory_bytes_per_s,
        peak_rss_mb,
    })
}
