//! Two models on the same text: how far apart they are.

use std::ops::ControlFlow;

use burn::tensor::{Device, Tensor};
use lowkey_infer::{Decoder, Form, GenerateConfig, Weights, generate};
use lowkey_model::{CausalLm, attention::FusedMla, ids_tensor};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::{Observer, Progress};

/// Positions that go through both models at once.
const CHUNK: usize = 64;

/// Tokens of a prompt, and of its greedy continuation.
const PROMPT: usize = 16;
const CONTINUATION: usize = 64;

/// The text that both models read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Text {
    /// Where it is from.
    pub description: String,
    /// Token ids, each sequence by itself.
    pub sequences: Vec<Vec<u32>>,
}

/// Next-token distributions of the source (p) and of the export (q) over all positions of the text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LogitEvidence {
    /// Positions compared.
    pub positions: usize,
    /// Largest difference of two logits.
    pub max_abs: f64,
    /// That, divided by the largest logit of the source.
    pub max_relative: f64,
    /// Mean of KL(p‖q), nats.
    pub mean_kl: f64,
    /// Share of positions where both have the same most likely token.
    pub top1_agreement: f64,
    /// exp of the mean loss of the source on the text's next tokens.
    pub perplexity_source: f64,
    /// The same of the export.
    pub perplexity_export: f64,
}

/// A greedy continuation of both.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Greedy {
    /// Prompt.
    pub prompt: Vec<u32>,
    /// What the source continues with.
    pub source: Vec<u32>,
    /// What the export continues with.
    pub export: Vec<u32>,
    /// Tokens before they part.
    pub agree: usize,
    /// Where they part: by how much the source prefers its own token, as a share of its largest logit there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub margin: Option<f64>,
}

/// A model and the form it decodes in.
pub(crate) struct Candidate {
    pub(crate) model: CausalLm,
    /// One entry per layer, or none at all.
    pub(crate) fused: Vec<Option<FusedMla>>,
    pub(crate) form: Form,
}

/// Runs both over the text. The source computes whole sequences in the expanded form; the export goes through its cache.
pub(crate) fn compare_logits(
    source: &CausalLm,
    export: &Candidate,
    text: &Text,
    device: &Device,
    observe: Observer,
) -> Result<LogitEvidence> {
    let total: usize = text.sequences.iter().map(Vec::len).sum();
    let mut sums = Sums::default();
    for ids in &text.sequences {
        let context = source.context(&vec![0; ids.len()], ids.len(), device);
        let hidden = source.hidden(ids_tensor(ids, 1, ids.len(), device), &context, None);
        let mut decoder = Decoder::new(&export.model, 1, ids.len(), export.form, device)?;
        if !export.fused.is_empty() {
            decoder = decoder.with_fused(export.fused.clone())?;
        }
        for (i, chunk) in ids.chunks(CHUNK).enumerate() {
            observe(Progress { doing: "comparing logits", done: sums.positions, of: total });
            let from = i * CHUNK;
            let p = host(source.logits(hidden.clone().narrow(1, from, chunk.len())))?;
            let q = host(decoder.forward(&[chunk])?)?;
            let width = p.len() / chunk.len();
            for (j, (p, q)) in p.chunks(width).zip(q.chunks(width)).enumerate() {
                sums.add(p, q, ids.get(from + j + 1).copied());
            }
        }
    }
    Ok(sums.finish())
}

#[derive(Default)]
struct Sums {
    positions: usize,
    targets: usize,
    max_abs: f64,
    scale: f64,
    kl: f64,
    agree: usize,
    loss: [f64; 2],
    damaged: bool,
}

impl Sums {
    fn add(&mut self, p: &[f32], q: &[f32], target: Option<u32>) {
        let (log_p, log_q) = (log_partition(p), log_partition(q));
        let mut kl = 0.0;
        for (p, q) in p.iter().zip(q) {
            let (p, q) = (f64::from(*p), f64::from(*q));
            self.max_abs = self.max_abs.max((p - q).abs());
            self.scale = self.scale.max(p.abs());
            let log_ratio = (p - log_p) - (q - log_q);
            kl += (p - log_p).exp() * log_ratio;
            self.damaged |= !p.is_finite() || !q.is_finite();
        }
        // A sum of terms of both signs: rounding may leave it below 0.
        self.kl += kl.max(0.0);
        self.agree += usize::from(argmax(p) == argmax(q));
        self.positions += 1;
        if let Some((p, q)) = target.and_then(|t| Some((p.get(t as usize)?, q.get(t as usize)?))) {
            self.loss[0] += log_p - f64::from(*p);
            self.loss[1] += log_q - f64::from(*q);
            self.targets += 1;
        }
    }

    fn finish(self) -> LogitEvidence {
        let n = self.positions.max(1) as f64;
        let perplexity = |loss: f64| (loss / self.targets.max(1) as f64).exp();
        // max() passes over NaN: a model that computes none must not look perfect.
        let or_nan = |x: f64| if self.damaged { f64::INFINITY } else { x };
        LogitEvidence {
            positions: self.positions,
            max_abs: or_nan(self.max_abs),
            max_relative: or_nan(if self.scale > 0.0 { self.max_abs / self.scale } else { self.max_abs }),
            mean_kl: or_nan(self.kl / n),
            top1_agreement: self.agree as f64 / n,
            perplexity_source: perplexity(self.loss[0]),
            perplexity_export: perplexity(self.loss[1]),
        }
    }
}

fn log_partition(logits: &[f32]) -> f64 {
    let top = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    top + logits.iter().map(|x| (f64::from(*x) - top).exp()).sum::<f64>().ln()
}

fn argmax(logits: &[f32]) -> usize {
    let better = |best: usize, i: usize| if logits[i] > logits[best] { i } else { best };
    (0..logits.len()).reduce(better).unwrap_or(0)
}

/// Continues the beginning of each sequence greedily with both, one token after another.
pub(crate) fn compare_greedy(
    source: &CausalLm,
    export: &Candidate,
    text: &Text,
    device: &Device,
    observe: Observer,
) -> Result<Vec<Greedy>> {
    let limit = source.config.max_position_embeddings;
    let plain = Candidate { model: source.clone(), fused: Vec::new(), form: Form::Expanded };
    let mut found = Vec::new();
    for (done, ids) in text.sequences.iter().enumerate() {
        observe(Progress { doing: "continuing greedily", done, of: text.sequences.len() });
        let prompt = &ids[..ids.len().min(PROMPT).min(limit - 1)];
        let new = CONTINUATION.min(limit - prompt.len());
        if prompt.is_empty() || new == 0 {
            continue;
        }
        let (ours, theirs) = (continuation(&plain, prompt, new, device)?, continuation(export, prompt, new, device)?);
        let agree = ours.iter().zip(&theirs).take_while(|(a, b)| a == b).count();
        let margin = match (ours.get(agree), theirs.get(agree)) {
            (Some(a), Some(b)) => Some(margin(source, &[prompt, &ours[..agree]].concat(), [*a, *b], device)?),
            _ => None,
        };
        found.push(Greedy { prompt: prompt.to_vec(), source: ours, export: theirs, agree, margin });
    }
    Ok(found)
}

fn continuation(model: &Candidate, prompt: &[u32], new: usize, device: &Device) -> Result<Vec<u32>> {
    let config = GenerateConfig { max_new_tokens: new, form: model.form, ..GenerateConfig::default() };
    let weights = Weights { model: &model.model, fused: &model.fused };
    Ok(generate(weights, prompt, &config, device, &mut |_| ControlFlow::Continue(()))?.ids)
}

/// A line for each recorded continuation that is not what is found now and not greedy either. Where two tokens are as likely as each
/// other, to within `tie` of the largest logit, another processor may have taken the other one, and all after it follows.
pub(crate) fn not_greedy(
    recorded: &[Greedy],
    found: &[Greedy],
    (source, with_source): (&CausalLm, bool),
    tie: f64,
    device: &Device,
) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for (i, (recorded, found)) in recorded.iter().zip(found).enumerate() {
        let sides = [("export", &recorded.export, &found.export), ("source", &recorded.source, &found.source)];
        for (whose, recorded_ids, found_ids) in &sides[..if with_source { 2 } else { 1 }] {
            if recorded_ids == found_ids {
                continue;
            }
            let same = recorded_ids.iter().zip(*found_ids).take_while(|(a, b)| a == b).count();
            let at = match recorded_ids.len() == found_ids.len() {
                true => first_not_greedy(source, &found.prompt, recorded_ids, tie, device)?,
                false => Some(same),
            };
            if let Some(at) = at {
                lines.push(format!(
                    "greedy continuation {}: token {} of the {whose}'s is not what the certificate records, and no tie",
                    i + 1,
                    at + 1
                ));
            }
        }
    }
    Ok(lines)
}

/// The first of `ids` that the model holds for less likely than another one after `prompt` and those before it, by more than `tie`
/// of the largest logit.
fn first_not_greedy(model: &CausalLm, prompt: &[u32], ids: &[u32], tie: f64, device: &Device) -> Result<Option<usize>> {
    let all = [prompt, ids].concat();
    if all.len() > model.config.max_position_embeddings || all.iter().any(|id| *id as usize >= model.config.vocab_size)
    {
        return Ok(Some(0));
    }
    let context = model.context(&vec![0; all.len()], all.len(), device);
    let hidden = model.hidden(ids_tensor(&all, 1, all.len(), device), &context, None);
    let logits = host(model.logits(hidden.narrow(1, prompt.len() - 1, ids.len())))?;
    let width = logits.len() / ids.len();
    let behind = |(logits, id): (&[f32], &u32)| {
        let top = f64::from(logits[argmax(logits)]);
        let scale = logits.iter().fold(f64::MIN_POSITIVE, |most, x| most.max(f64::from(x.abs())));
        let apart = (top - f64::from(logits[*id as usize])) / scale;
        apart.is_nan() || apart > tie
    };
    Ok(logits.chunks(width).zip(ids).position(behind))
}

/// How much the model prefers the first token over the second after `ids`, as a share of its largest logit.
fn margin(model: &CausalLm, ids: &[u32], [a, b]: [u32; 2], device: &Device) -> Result<f64> {
    let context = model.context(&vec![0; ids.len()], ids.len(), device);
    let hidden = model.hidden(ids_tensor(ids, 1, ids.len(), device), &context, None);
    let logits = host(model.logits(hidden.narrow(1, ids.len() - 1, 1)))?;
    let at = |token: u32| logits.get(token as usize).map_or(f64::NAN, |x| f64::from(*x));
    let scale = logits.iter().fold(f64::MIN_POSITIVE, |top, x| top.max(f64::from(x.abs())));
    Ok((at(a) - at(b)) / scale)
}

fn host(logits: Tensor<3>) -> Result<Vec<f32>> {
    logits.try_into_vec_as::<f32>().map_err(|e| Error::device("the logits", e))
}
