//! Whole prompts through an empty cache, beside training's forward pass over as many tokens.

use std::time::{Duration, Instant};

use burn::module::Module;
use burn::tensor::Device;
use lowkey_batch::Batch;
use lowkey_infer::{CacheDtype, Decoder, Form};
use lowkey_kernels::Precision;
use lowkey_model::{CausalLm, Recompute, cost::Training};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::decode::{Subject, check_memory};
use super::machine::{Spread, below_ceiling, peak_rss_mb, thousandths};
use super::train::random_batch;
use super::{MOST_ROUNDS, Observer, Progress};
use crate::error::{Error, Result};
use crate::run_config::at_least_one;
use crate::setup::check_bytes;

/// Seed of the tokens.
const SEED: u64 = 1;

/// Time after which no further round of one way is begun.
const PATIENCE: Duration = Duration::from_secs(60);

/// How to measure.
#[derive(Clone, Debug)]
pub struct PrefillOptions {
    /// Prompts at a time.
    pub batch: usize,
    /// Their lengths; each is measured.
    pub contexts: Vec<usize>,
    /// Most tokens of a prompt that go through the model at once.
    pub chunk: usize,
    /// Times that each is measured, in turn with the forward pass of training. A length that takes longer than 60 seconds ends with
    /// fewer.
    pub rounds: usize,
    /// How attention is computed; each is measured.
    pub ways: Vec<Form>,
    /// How the cache stores its numbers.
    pub cache_dtype: CacheDtype,
    /// Threads; absent: one per core.
    pub threads: Option<usize>,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct PrefillFigures {
    /// `prefill`
    pub what: &'static str,
    /// Name of the model.
    pub model: String,
    /// Parameters.
    pub params: usize,
    /// Prompts at a time.
    pub batch: usize,
    /// Most tokens of a prompt that went through the model at once.
    pub chunk: usize,
    /// Threads.
    pub threads: usize,
    /// How the cache stored its numbers.
    pub cache_dtype: String,
    /// The model's longest position, where it was raised for this measurement.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_position_embeddings: Option<usize>,
    /// Rate of plain matrix products on as many threads.
    pub matmul_flops_per_s: f64,
    /// One per length and way.
    pub rows: Vec<PrefillRow>,
}

/// Prompts of one length in one way.
#[derive(Clone, Debug, Serialize)]
pub struct PrefillRow {
    /// Tokens of a prompt.
    pub context: usize,
    /// How attention was computed.
    pub way: String,
    /// Rounds measured.
    pub rounds: usize,
    /// Median time of all prompts, up to the logits of the first new token.
    pub ms: f64,
    /// The shortest.
    pub ms_min: f64,
    /// The longest.
    pub ms_max: f64,
    /// Tokens per second of all prompts, by the median.
    pub tokens_per_s: f64,
    /// Median time of training's forward pass over as many rows of as many tokens, with the loss and all that a backward pass needs.
    pub training_ms: f64,
    /// Its tokens per second.
    pub training_tokens_per_s: f64,
    /// Median over the rounds of the rate of prompts over that of training's forward pass.
    pub ratio: f64,
    /// Bytes of the cache.
    pub cache_bytes: usize,
    /// Largest resident memory of the process after the first prompts of this length and way, before any forward pass of training, MiB;
    /// lengths come in order. Absent where the system does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_rss_mb: Option<f64>,
}

/// Times prompts of random tokens, in turn with forward passes of training, for each length in each way.
///
/// # Errors
/// [`Error::Config`] for options out of range, [`Error::Memory`] for a cache or a forward pass of training that this machine cannot hold,
/// errors of the decoder.
pub fn prefill(subject: Subject, options: &PrefillOptions, observe: Observer) -> Result<PrefillFigures> {
    let PrefillOptions { batch, chunk, rounds, ref ways, .. } = *options;
    let mut contexts = options.contexts.clone();
    contexts.sort_unstable();
    contexts.dedup();
    for context in &contexts {
        super::check_tokens(batch, "context", *context)?;
    }
    at_least_one("rounds", rounds, MOST_ROUNDS)?;
    at_least_one("chunk", chunk, 1 << 20)?;
    let Some(longest) = contexts.last().copied().filter(|_| !ways.is_empty()) else {
        return Err(Error::config("context", "[]", "at least one context and one way to measure"));
    };
    let Subject { name, mut model, fused } = subject;
    let raised = (longest > model.config.max_position_embeddings).then_some(longest);
    model.config.max_position_embeddings = longest.max(model.config.max_position_embeddings);
    let config = model.config.clone();
    check_memory(&config, batch, longest)?;
    let threads = super::threads(options.threads)?;
    let recompute = Recompute::None;
    let training = Training { micro_batch: batch, seq: longest, threads, recompute, terms: 1, ..Training::default() };
    check_bytes(
        "training's forward pass",
        config.train_bytes(training),
        "the shape, the batch or the context",
        &config,
    )?;
    let (rows, matmul_flops_per_s) = super::on_threads(threads, || {
        let device = super::device();
        below_ceiling(threads, &device, Precision::F32, || {
            let mut random = ChaCha8Rng::seed_from_u64(SEED);
            let cases = contexts.iter().flat_map(|context| ways.iter().map(|way| (*context, *way)));
            let mut cases: Vec<Case> = cases
                .map(|(context, way)| {
                    let rows = random_batch(&mut random, batch, context, config.vocab_size);
                    Case { way, rows, peak_rss_mb: None }
                })
                .collect();
            let decoder = |case: &Case| {
                let sizes = [batch, case.rows.seq_len];
                let decoder = Decoder::with_cache(&model, sizes, options.cache_dtype, case.way, &device)?;
                Ok(if fused.is_empty() { decoder } else { decoder.with_fused(fused.clone())? })
            };
            // Before anything of training has taken memory.
            let of = cases.len();
            for (done, case) in cases.iter_mut().enumerate() {
                observe(Progress { doing: "first prompts", done, of });
                case.prompt(&mut decoder(case)?, chunk)?;
                case.peak_rss_mb = peak_rss_mb();
            }
            let trained = model.clone().train();
            let rows = cases.iter().map(|case| case.row(&decoder, &trained, options, &mut *observe));
            rows.collect::<Result<Vec<_>>>()
        })
    })?;
    Ok(PrefillFigures {
        what: "prefill",
        model: name,
        params: config.parameter_count().total,
        batch,
        chunk,
        threads,
        cache_dtype: options.cache_dtype.to_string(),
        max_position_embeddings: raised,
        matmul_flops_per_s,
        rows,
    })
}

/// Prompts of one length in one way.
struct Case {
    way: Form,
    rows: Batch,
    peak_rss_mb: Option<f64>,
}

impl Case {
    fn prompt(&self, decoder: &mut Decoder, chunk: usize) -> Result<Duration> {
        let prompts: Vec<&[u32]> = self.rows.input_ids.chunks(self.rows.seq_len).collect();
        let started = Instant::now();
        read(decoder.prefill(&prompts, chunk)?.try_into_vec_as::<f32>())?;
        Ok(started.elapsed())
    }

    /// The forward pass of training, which keeps what a backward pass needs.
    fn forward(&self, model: &CausalLm, device: &Device) -> Result<Duration> {
        let started = Instant::now();
        let loss = model.loss(self.rows.all(), 0.0, device);
        read(loss.nats.clone().try_into_vec_as::<f32>())?;
        Ok(started.elapsed())
    }

    fn row(
        &self,
        decoder: &impl Fn(&Self) -> Result<Decoder>,
        trained: &CausalLm,
        options: &PrefillOptions,
        observe: Observer,
    ) -> Result<PrefillRow> {
        let device = super::device().autodiff();
        self.forward(trained, &device)?;
        let (mut times, mut training, mut cache_bytes) = (Vec::new(), Vec::new(), 0);
        let begun = Instant::now();
        while times.is_empty() || (times.len() < options.rounds && begun.elapsed() < PATIENCE) {
            observe(Progress { doing: "prompts", done: times.len(), of: options.rounds });
            let mut decoder = decoder(self)?;
            times.push(self.prompt(&mut decoder, options.chunk)?);
            cache_bytes = decoder.cache().bytes();
            drop(decoder);
            training.push(self.forward(trained, &device)?);
        }
        let ratios = times.iter().zip(&training).map(|(prompt, forward)| forward.as_secs_f64() / prompt.as_secs_f64());
        let ratio = Spread::of(ratios.collect()).median;
        let (prompt, forward) = (Spread::milliseconds(&times), Spread::milliseconds(&training));
        let rate = |ms: f64| thousandths(self.rows.input_ids.len() as f64 / ms * 1e3);
        Ok(PrefillRow {
            context: self.rows.seq_len,
            way: self.way.to_string(),
            rounds: times.len(),
            ms: thousandths(prompt.median),
            ms_min: thousandths(prompt.min),
            ms_max: thousandths(prompt.max),
            tokens_per_s: rate(prompt.median),
            training_ms: thousandths(forward.median),
            training_tokens_per_s: rate(forward.median),
            ratio: thousandths(ratio),
            cache_bytes,
            peak_rss_mb: self.peak_rss_mb,
        })
    }
}

/// Waits for a result.
fn read<E: std::fmt::Debug>(numbers: std::result::Result<Vec<f32>, E>) -> Result<()> {
    numbers.map(drop).map_err(|e| Error::Device { what: "the result", why: format!("{e:?}") })
}
