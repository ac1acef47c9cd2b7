//! Requests that come and go while others are being continued.
//!
//! A [`Scheduler`] has a number of slots. [`Scheduler::admit`] takes a request into a free one, [`Scheduler::step`] moves all of them on,
//! and [`Scheduler::cancel`] ends one early. In a step the requests that are being continued get a token each, together, and of those
//! that have just come one chunk of their prompts is read, so that a long prompt keeps nobody waiting for longer than a chunk takes.
//!
//! What is read goes into a cache of its own, which joins that of the others when the prompts are at their end; rows that ended leave it
//! before the next step. Either copies the cache once, about what a step reads of it. A request's tokens do not depend on who is
//! there besides (but for ties within rounding).

use std::time::{Duration, Instant};

use burn::tensor::{Device, Tensor};

use crate::cache_dtype::CacheDtype;
use crate::decoder::{Decoder, Prefill, check_form, check_tokens};
use crate::error::{Error, Result};
use crate::form::Form;
use crate::generate::{Finish, Generation, Weights};
use crate::sampler::{Sampler, SamplingConfig};

/// The room that a scheduler has, and how it computes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slots {
    /// Requests at a time.
    pub count: usize,
    /// Tokens of each, prompt and continuation.
    pub capacity: usize,
    /// Most prompt tokens per row that go through the model at once.
    pub prefill_chunk: usize,
    /// How MLA attention is computed.
    pub form: Form,
    /// How the cache stores its numbers.
    pub cache_dtype: CacheDtype,
}

/// What is to be continued.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// Most tokens to generate.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: SamplingConfig,
    /// Which random stream of the seed chooses them: equal requests of one stream get equal tokens.
    pub stream: u64,
    /// Tokens that end it.
    pub eos: Vec<u32>,
}

/// Names a request within its scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(u64);

/// What has become of a request.
#[derive(Debug)]
pub enum Update {
    /// Its next token.
    Token(u32),
    /// It came to its end; nothing follows.
    Ended(Generation),
    /// Its logits are not usable; nothing follows.
    Failed(Error),
}

/// A request in a slot.
struct Row {
    id: RequestId,
    request: Request,
    sampler: Sampler,
    /// Prompt and continuation.
    history: Vec<u32>,
    /// When its prompt began to be read.
    began: Instant,
    /// How long that took.
    prefill: Duration,
    /// When that was over.
    decoding: Instant,
    /// It leaves before the next step.
    over: bool,
}

/// Requests whose prompts are being read.
struct Entering {
    decoder: Decoder,
    prefill: Prefill,
    rows: Vec<Row>,
}

/// Continues several requests together, each from its own beginning to its own end.
pub struct Scheduler<'a> {
    weights: Weights<'a>,
    slots: Slots,
    device: Device,
    /// Admitted, and not begun.
    waiting: Vec<Row>,
    entering: Option<Entering>,
    /// Those that get a token each step, in the order of the cache's rows; none without a cache.
    live: Vec<Row>,
    decoder: Option<Decoder>,
    admitted: u64,
}

impl<'a> Scheduler<'a> {
    /// A scheduler with all its slots free. Nothing is allocated before a request is there.
    ///
    /// # Errors
    /// [`Error::Setting`] for sizes of 0, [`Error::Positions`] for more tokens than the model was made for, [`Error::NoFused`] where
    /// fused weights are asked for and absent.
    pub fn new(weights: impl Into<Weights<'a>>, slots: Slots, device: &Device) -> Result<Self> {
        let weights = weights.into();
        for (field, size) in
            [("slots", slots.count), ("capacity", slots.capacity), ("prefill_chunk", slots.prefill_chunk)]
        {
            if size == 0 {
                return Err(Error::setting(field, &size, "at least 1"));
            }
        }
        check_form(weights.model, slots.form, weights.fused)?;
        check_positions(weights, slots.capacity)?;
        Ok(Self {
            weights,
            slots,
            device: device.clone(),
            waiting: Vec::new(),
            entering: None,
            live: Vec::new(),
            decoder: None,
            admitted: 0,
        })
    }

    /// Slots that no request has.
    pub fn free(&self) -> usize {
        self.slots.count - self.rows().filter(|row| !row.over).count()
    }

    /// Takes a request into a free slot; `None` where there is none. Its prompt is read from the next step on.
    ///
    /// # Errors
    /// [`Error::Setting`] for values that mean nothing, [`Error::NoToken`] and [`Error::Token`] for an empty prompt or an unknown token,
    /// [`Error::Positions`] and [`Error::Capacity`] where prompt and continuation are longer than the model or a slot.
    pub fn admit(&mut self, request: Request) -> Result<Option<RequestId>> {
        if request.max_new_tokens == 0 {
            return Err(Error::setting("max_new_tokens", &0, "at least 1"));
        }
        let sampler = Sampler::new(&request.sampling, request.stream)?;
        check_tokens(self.weights.model, &[&request.prompt])?;
        let needed = request.prompt.len().saturating_add(request.max_new_tokens);
        check_positions(self.weights, needed)?;
        if needed > self.slots.capacity {
            return Err(Error::Capacity { row: 0, needed, capacity: self.slots.capacity });
        }
        if self.free() == 0 {
            return Ok(None);
        }
        let id = RequestId(self.admitted);
        self.admitted += 1;
        let (now, history) = (Instant::now(), request.prompt.clone());
        let row =
            Row { id, request, sampler, history, began: now, prefill: Duration::ZERO, decoding: now, over: false };
        self.waiting.push(row);
        Ok(Some(id))
    }

    /// Ends a request now and frees its slot; what it had come to, unless it had ended before.
    pub fn cancel(&mut self, id: RequestId) -> Option<Generation> {
        let cache_bytes = self.bytes_per_row();
        let entering = self.entering.iter_mut().flat_map(|entering| &mut entering.rows);
        let mut rows = self.waiting.iter_mut().chain(entering).chain(&mut self.live);
        let row = rows.find(|row| row.id == id && !row.over)?;
        Some(row.end(Finish::Stopped, cache_bytes))
    }

    /// One token for each request that is being continued, and one chunk of the prompts of those that have come; what that led to, in
    /// the order of the slots. Empty where there is nothing to do, or where no prompt is at its end yet.
    ///
    /// # Errors
    /// What concerns all of them: [`Error::Read`], and as [`Cache::new`](crate::Cache::new).
    pub fn step(&mut self) -> Result<Vec<(RequestId, Update)>> {
        self.dismiss()?;
        let mut updates = Vec::new();
        let cache_bytes = self.bytes_per_row();
        if let Some(decoder) = &mut self.decoder {
            let next: Vec<u32> = self.live.iter().filter_map(|row| row.history.last().copied()).collect();
            let logits = to_host(decoder.step(&next)?)?;
            sample(&mut self.live, &logits, cache_bytes, &mut updates);
        }
        self.read_on(&mut updates)?;
        Ok(updates)
    }

    /// Whether no request is left.
    pub fn is_idle(&self) -> bool {
        self.rows().all(|row| row.over)
    }

    fn rows(&self) -> impl Iterator<Item = &Row> {
        let entering = self.entering.iter().flat_map(|entering| &entering.rows);
        self.waiting.iter().chain(entering).chain(&self.live)
    }

    /// Removes the rows that are over.
    fn dismiss(&mut self) -> Result<()> {
        self.waiting.retain(|row| !row.over);
        if self.entering.as_ref().is_some_and(|entering| entering.rows.iter().all(|row| row.over)) {
            self.entering = None;
        }
        let kept: Vec<usize> = (0..self.live.len()).filter(|i| !self.live[*i].over).collect();
        if kept.is_empty() {
            self.decoder = None;
        } else if kept.len() < self.live.len()
            && let Some(decoder) = &mut self.decoder
        {
            decoder.keep(&kept)?;
        }
        self.live.retain(|row| !row.over);
        Ok(())
    }

    /// Reads a chunk of the prompts; those at their end join the others, with their first token.
    fn read_on(&mut self, updates: &mut Vec<(RequestId, Update)>) -> Result<()> {
        if self.entering.is_none() && !self.waiting.is_empty() {
            let mut rows = std::mem::take(&mut self.waiting);
            rows.iter_mut().for_each(|row| row.began = Instant::now());
            let Slots { capacity, cache_dtype, form, .. } = self.slots;
            let Weights { model, fused } = self.weights;
            let mut decoder = Decoder::with_cache(model, [rows.len(), capacity], cache_dtype, form, &self.device)?;
            if !fused.is_empty() {
                decoder = decoder.with_fused(fused.to_vec())?;
            }
            let prompts: Vec<&[u32]> = rows.iter().map(|row| row.request.prompt.as_slice()).collect();
            let prefill = Prefill::new(&decoder, &prompts)?;
            self.entering = Some(Entering { decoder, prefill, rows });
        }
        let Some(entering) = &mut self.entering else { return Ok(()) };
        let Some(logits) = entering.prefill.advance(&mut entering.decoder, self.slots.prefill_chunk)? else {
            return Ok(());
        };
        let logits = to_host(logits)?;
        let Some(Entering { decoder, mut rows, .. }) = self.entering.take() else { return Ok(()) };
        for row in &mut rows {
            row.decoding = Instant::now();
            row.prefill = row.began.elapsed();
        }
        match &mut self.decoder {
            Some(others) => others.join(decoder),
            none => *none = Some(decoder),
        }
        sample(&mut rows, &logits, self.bytes_per_row(), updates);
        self.live.append(&mut rows);
        Ok(())
    }

    /// Of the cache, whose rows are all alike.
    fn bytes_per_row(&self) -> usize {
        let decoders = self.decoder.iter().chain(self.entering.iter().map(|entering| &entering.decoder));
        decoders.map(|decoder| decoder.cache().bytes() / decoder.cache().batch()).next().unwrap_or(0)
    }
}

/// The next token of each row of `logits [rows, vocab]`.
fn sample(rows: &mut [Row], logits: &[f32], cache_bytes: usize, updates: &mut Vec<(RequestId, Update)>) {
    let vocab = logits.len() / rows.len().max(1);
    for (row, logits) in rows.iter_mut().zip(logits.chunks(vocab.max(1))) {
        // Cancelled while its prompt was read.
        if row.over {
            continue;
        }
        match row.sampler.sample(logits, &row.history) {
            Ok(token) if row.request.eos.contains(&token) => {
                updates.push((row.id, Update::Ended(row.end(Finish::Eos, cache_bytes))));
            }
            Ok(token) => {
                row.history.push(token);
                updates.push((row.id, Update::Token(token)));
                if row.history.len() - row.request.prompt.len() == row.request.max_new_tokens {
                    updates.push((row.id, Update::Ended(row.end(Finish::Length, cache_bytes))));
                }
            }
            Err(e) => {
                row.over = true;
                updates.push((row.id, Update::Failed(e)));
            }
        }
    }
}

impl Row {
    fn end(&mut self, finish: Finish, cache_bytes: usize) -> Generation {
        self.over = true;
        let prompt_tokens = self.request.prompt.len();
        let decode = if self.prefill.is_zero() { Duration::ZERO } else { self.decoding.elapsed() };
        let ids = self.history.split_off(prompt_tokens);
        Generation { ids, finish, prompt_tokens, prefill: self.prefill, decode, cache_bytes }
    }
}

fn check_positions(Weights { model, .. }: Weights, needed: usize) -> Result<()> {
    let limit = model.config.max_position_embeddings;
    if needed > limit { Err(Error::Positions { needed, limit }) } else { Ok(()) }
}

/// `[batch, vocab]` → the rows one after another.
fn to_host(logits: Tensor<2>) -> Result<Vec<f32>> {
    logits.try_into_vec_as::<f32>().map_err(Error::Read)
}
