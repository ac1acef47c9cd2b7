//! Single tokens over a filled cache.

use std::time::{Duration, Instant};

use burn::tensor::{Device, Tensor};
use lowkey_infer::{CacheDtype, Decoder, Form, GenerateConfig, Sampler};
use lowkey_kernels::Precision;
use lowkey_kernels::quantized_linear::Quantization;
use lowkey_model::{CausalLm, ModelConfig, attention::FusedMla};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::machine::{Spread, below_ceiling, peak_rss_mb, read_bandwidth, thousandths};
use super::shapes::Shape;
use super::{MOST_ROUNDS, Observer, Progress};
use crate::error::{Error, Result};
use crate::run_config::at_least_one;
use crate::setup::check_bytes;

/// Seed of weights and tokens.
const SEED: u64 = 1;

/// Bytes of a number in weights, and in keys and values that are made anew.
const F32: usize = 4;

/// Longest prompt that goes through the model. Its work grows with its square, and the steps take as long whatever numbers lie in
/// the cache.
const LONGEST_PROMPT: usize = 4096;

/// Time after which no further step of one way is begun, and the steps that are taken all the same.
const PATIENCE: Duration = Duration::from_secs(20);
const FEWEST_STEPS: usize = 3;

/// What is measured: a model, and its layers with their up-projections multiplied out, where the fused form is among the ways.
#[derive(Debug)]
pub struct Subject {
    /// What to call it.
    pub name: String,
    /// The model.
    pub model: CausalLm,
    /// One entry per layer, or none at all.
    pub fused: Vec<Option<FusedMla>>,
}

impl Subject {
    /// A model of a [`Shape`], drawn at random, for `batch` sequences of up to `positions` tokens.
    ///
    /// # Errors
    /// [`Error::Config`] for an unknown shape, [`Error::Model`] where `positions` is out of range, [`Error::Memory`] for a model
    /// and a cache that this machine cannot hold.
    pub fn shape(name: &str, batch: usize, positions: usize) -> Result<Self> {
        let shape = Shape::named(name)?;
        let config = shape.config(positions)?;
        check_memory(&config, batch, positions)?;
        let model = CausalLm::init(&config, SEED, &super::device());
        Ok(Self { name: name.into(), model, fused: Vec::new() })
    }
}

/// How to measure.
#[derive(Clone, Debug)]
pub struct DecodeOptions {
    /// Sequences at a time.
    pub batch: usize,
    /// Tokens per sequence that the cache holds before the first step; each is measured.
    pub contexts: Vec<usize>,
    /// Steps, of one token per sequence each. A way that takes longer than 20 seconds ends with fewer.
    pub new: usize,
    /// How attention is computed; each is measured.
    pub ways: Vec<Form>,
    /// How the cache stores its numbers.
    pub cache_dtype: CacheDtype,
    /// How the matrices are packed; absent: f32.
    pub weights: Option<Quantization>,
    /// Threads; absent: one per core.
    pub threads: Option<usize>,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct DecodeFigures {
    /// `decode`
    pub what: &'static str,
    /// Name of the model.
    pub model: String,
    /// Parameters.
    pub params: usize,
    /// Sequences at a time.
    pub batch: usize,
    /// Threads.
    pub threads: usize,
    /// How the matrices were held: `f32`, or packed.
    pub weights: &'static str,
    /// How the cache stored its numbers.
    pub cache_dtype: String,
    /// Numbers that the cache stores per token, all layers together.
    pub cache_numbers_per_token: usize,
    /// The model's longest position, where it was raised for this measurement.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_position_embeddings: Option<usize>,
    /// Rate at which as many threads read memory that no cache of the processor holds.
    pub memory_bytes_per_s: f64,
    /// Rate of plain matrix products on as many threads.
    pub matmul_flops_per_s: f64,
    /// Largest resident memory of the process, MiB; absent where the system does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_rss_mb: Option<f64>,
    /// One per context and way.
    pub rows: Vec<DecodeRow>,
}

/// Steps over one context in one way.
#[derive(Clone, Debug, Serialize)]
pub struct DecodeRow {
    /// Tokens per sequence before the first step.
    pub context: usize,
    /// How attention was computed.
    pub way: String,
    /// Steps taken.
    pub steps: usize,
    /// Tokens per second of a prompt of `context` tokens, at most 4096, by whichever form takes fewer operations.
    pub prefill_tokens_per_s: f64,
    /// Median time of a step: of one token for each sequence.
    pub step_ms: f64,
    /// The shortest.
    pub step_ms_min: f64,
    /// The longest.
    pub step_ms_max: f64,
    /// Tokens per second of all sequences, by the median.
    pub tokens_per_s: f64,
    /// Bytes of the whole cache as allocated.
    pub cache_bytes: usize,
    /// Bytes that a step reads, divided by the sequences: each weight but the rows of the embedding that are not looked up, the cache
    /// as allocated at half of the steps, and in the expanded form the keys and values that it rebuilds from the latents.
    pub bytes_per_token: f64,
    /// Operations of a token at half of the steps, two per multiply-add.
    pub flops_per_token: f64,
    /// Bytes per second of the median step.
    pub bytes_per_s: f64,
    /// Operations per second of the median step.
    pub flops_per_s: f64,
    /// What takes longer at its best: reading those bytes (`memory`) or computing those operations (`arithmetic`).
    pub bound: &'static str,
    /// That time over the median step; above 1 where weights stay in the processor's caches.
    pub bound_fraction: f64,
}

/// Fills a cache and times greedy steps from there, for each context in each way.
///
/// # Errors
/// [`Error::Config`] for options out of range, [`Error::Memory`] for a cache that this machine cannot hold, errors of the decoder.
pub fn decode(subject: Subject, options: &DecodeOptions, observe: Observer) -> Result<DecodeFigures> {
    let DecodeOptions { batch, ref contexts, new, ref ways, .. } = *options;
    for context in contexts {
        super::check_tokens(batch, "context", *context)?;
    }
    at_least_one("new", new, MOST_ROUNDS)?;
    if ways.contains(&Form::Auto) {
        return Err(Error::config("way", "\"auto\"", "must be expanded, absorbed or fused"));
    }
    let Some(longest) = contexts.iter().max().filter(|_| !ways.is_empty()) else {
        return Err(Error::config("context", "[]", "at least one context and one way to measure"));
    };
    let Subject { name, mut model, fused } = subject;
    let positions = longest + new;
    let raised = (positions > model.config.max_position_embeddings).then_some(positions);
    // Where a model was trained for less, its texts beyond that are worth nothing, but their speed is the same.
    model.config.max_position_embeddings = positions.max(model.config.max_position_embeddings);
    let config = model.config.clone();
    check_memory(&config, batch, positions)?;
    let packed = |quantization| model.packed_to_read(quantization);
    let model = options.weights.map(packed).transpose()?.unwrap_or(model);
    let threads = super::threads(options.threads)?;
    let (rows, matmul_flops_per_s, memory_bytes_per_s, peak_rss_mb) = super::on_threads(threads, || {
        let device = super::device();
        let (mut rows, ceiling) = below_ceiling(threads, &device, Precision::F32, || {
            let bench = Bench { model: &model, fused: &fused, options, device: &device };
            let measured: Result<Vec<Vec<DecodeRow>>> =
                contexts.iter().map(|context| bench.context(*context, observe)).collect();
            Ok(measured?.concat())
        })?;
        // Taken before the arrays that memory is measured with.
        let peak = peak_rss_mb();
        let memory = read_bandwidth(threads)?;
        rows.iter_mut().for_each(|row| row.set_bound(memory, ceiling, batch));
        Ok((rows, ceiling, memory, peak))
    })?;
    Ok(DecodeFigures {
        what: "decode",
        model: name,
        params: config.parameter_count().total,
        batch,
        threads,
        weights: options.weights.map_or("f32", Quantization::name),
        cache_dtype: options.cache_dtype.to_string(),
        cache_numbers_per_token: config.cache_numbers(),
        max_position_embeddings: raised,
        memory_bytes_per_s,
        matmul_flops_per_s,
        peak_rss_mb,
        rows,
    })
}

pub(super) fn check_memory(config: &ModelConfig, batch: usize, positions: usize) -> Result<()> {
    let cache = batch.saturating_mul(positions).saturating_mul(config.cache_numbers());
    let needed = cache.saturating_add(config.parameter_count().total).saturating_mul(F32);
    check_bytes("decoding", needed, "the shape, the batch or the context", config)
}

impl DecodeRow {
    fn set_bound(&mut self, memory_bytes_per_s: f64, matmul_flops_per_s: f64, batch: usize) {
        let seconds = batch as f64 / self.tokens_per_s;
        let reading = self.bytes_per_token * batch as f64 / memory_bytes_per_s;
        let computing = self.flops_per_token * batch as f64 / matmul_flops_per_s;
        let (bound, floor) = if reading > computing { ("memory", reading) } else { ("arithmetic", computing) };
        self.bound = bound;
        self.bound_fraction = floor / seconds;
    }
}

/// What all measurements share.
struct Bench<'a> {
    model: &'a CausalLm,
    fused: &'a [Option<FusedMla>],
    options: &'a DecodeOptions,
    device: &'a Device,
}

impl Bench<'_> {
    /// A prompt, then each way from the same number of cached tokens on.
    fn context(&self, context: usize, observe: Observer) -> Result<Vec<DecodeRow>> {
        let Self { model, fused, options, device } = *self;
        let DecodeOptions { batch, new, ref ways, cache_dtype, .. } = *options;
        let rows = [batch, context + new];
        let mut decoder = Decoder::with_cache(model, rows, cache_dtype, Form::Auto, device)?;
        if !fused.is_empty() {
            decoder = decoder.with_fused(fused.to_vec())?;
        }
        let (mut tokens, prefill_tokens_per_s) = self.prefill(&mut decoder, context, observe)?;
        let cache_bytes = decoder.cache().bytes();
        let mut greedy = self.greedy()?;
        let mut rows = Vec::with_capacity(ways.len());
        for way in ways {
            decoder.fill_at_random(context)?;
            decoder.set_form(*way);
            let (begun, mut times) = (Instant::now(), Vec::with_capacity(new));
            while times.len() < new.min(FEWEST_STEPS) || (times.len() < new && begun.elapsed() < PATIENCE) {
                observe(Progress { doing: "tokens", done: times.len(), of: new });
                let started = Instant::now();
                tokens = greedy(decoder.step(&tokens)?)?;
                times.push(started.elapsed());
            }
            let steps = times.len();
            let Spread { median, min, max } = Spread::milliseconds(&times);
            let held = context + steps / 2;
            let cached_bytes = cache_bytes as f64 * held as f64 / (context + new) as f64;
            let (step_bytes, step_flops) = step_cost(&model.config, batch, held, cached_bytes, *way);
            let step_bytes = step_bytes - model.packed_bytes_spared() as f64;
            rows.push(DecodeRow {
                context,
                way: way.to_string(),
                steps,
                prefill_tokens_per_s: thousandths(prefill_tokens_per_s),
                step_ms: thousandths(median),
                step_ms_min: thousandths(min),
                step_ms_max: thousandths(max),
                tokens_per_s: thousandths(batch as f64 / median * 1e3),
                cache_bytes,
                bytes_per_token: step_bytes / batch as f64,
                flops_per_token: step_flops / batch as f64,
                bytes_per_s: step_bytes / median * 1e3,
                flops_per_s: step_flops / median * 1e3,
                bound: "",
                bound_fraction: 0.0,
            });
        }
        Ok(rows)
    }

    /// Runs prompts of random tokens; the first tokens that follow them, and the prompts' tokens per second.
    fn prefill(&self, decoder: &mut Decoder, context: usize, observe: Observer) -> Result<(Vec<u32>, f64)> {
        let (batch, vocab) = (self.options.batch, self.model.config.vocab_size as u32);
        let len = context.min(LONGEST_PROMPT);
        let mut random = ChaCha8Rng::seed_from_u64(SEED);
        let mut prompt = || (0..len).map(|_| random.random_range(0..vocab)).collect();
        let prompts: Vec<Vec<u32>> = (0..batch).map(|_| prompt()).collect();
        // In parts, so that there is something to watch.
        let chunk = GenerateConfig::default().prefill_chunk;
        let started = Instant::now();
        let mut logits = None;
        for from in (0..len).step_by(chunk) {
            observe(Progress { doing: "prefill", done: from, of: len });
            let parts: Vec<&[u32]> = prompts.iter().map(|ids| &ids[from..(from + chunk).min(len)]).collect();
            logits = Some(decoder.prefill(&parts, chunk)?);
        }
        let logits = logits.ok_or_else(|| Error::config("context", context, "must be at least 1"))?;
        let tokens = self.greedy()?(logits)?;
        Ok((tokens, (batch * len) as f64 / started.elapsed().as_secs_f64()))
    }

    /// What picks the likeliest tokens of `[batch, vocab]` logits, as generation does it.
    fn greedy(&self) -> Result<impl FnMut(Tensor<2>) -> Result<Vec<u32>>> {
        let vocab = self.model.config.vocab_size;
        let mut samplers = (0..self.options.batch)
            .map(|row| Sampler::new(&GenerateConfig::default().sampling, row as u64))
            .collect::<std::result::Result<Vec<_>, _>>()?;
        Ok(move |logits: Tensor<2>| {
            let failed = |e| Error::Device { what: "the logits", why: format!("{e:?}") };
            let logits = logits.try_into_vec_as::<f32>().map_err(failed)?;
            let rows = samplers.iter_mut().zip(logits.chunks(vocab));
            Ok(rows.map(|(sampler, logits)| sampler.sample(logits, &[])).collect::<std::result::Result<_, _>>()?)
        })
    }
}

/// Bytes that a step reads and operations that it takes, for all sequences, with `context` tokens in each one's cache.
fn step_cost(config: &ModelConfig, batch: usize, context: usize, cached_bytes: f64, way: Form) -> (f64, f64) {
    // Over all layers: weights in place of those of the expanded form, products likewise, and what is rebuilt.
    let (mut plain, mut own, mut products, mut rebuilt) = (0, 0, 0, 0);
    for layer in 0..config.layers.len() {
        let costs = config.decode_costs(layer, context);
        let cost = match way {
            Form::Expanded => None,
            Form::Auto | Form::Absorbed => costs.absorbed,
            // Layers without such weights are absorbed.
            Form::Fused => costs.fused.or(costs.absorbed),
        }
        .unwrap_or(costs.expanded);
        plain += costs.expanded.weights;
        own += cost.weights;
        products += cost.products;
        rebuilt += cost.rebuilt;
    }
    // A head that is the embedding is read whole.
    let looked_up = config.vocab_size.saturating_sub(batch) * config.hidden_size;
    let unread = if config.tie_word_embeddings { 0 } else { looked_up };
    let weights = config.parameter_count().total - unread - plain + own;
    let products = config.matrix_weights() - plain + products;
    let bytes = ((weights + batch * rebuilt) * F32) as f64 + cached_bytes;
    (bytes, (2 * batch * products) as f64)
}
