//! Loss on held-out text, and the distance to the true entropy where the corpus has one; accuracy and error on tasks.

mod examples;
mod mixture;
mod pairs;

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::Device;
use lowkey_batch::{Batch, IGNORE};
use lowkey_convert::{effective_rank, latent_spectra};
use lowkey_data::oracle::OracleDocument;
use lowkey_data::storybook::Class;
use lowkey_data::tasks::HeldExamples;
use lowkey_model::{CausalLm, model::Trace};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::workers::Workers;

pub(crate) use self::pairs::evaluate_pairs;

/// What to measure a model on.
#[derive(Clone, Debug)]
pub enum Held {
    /// Text without a known entropy, as batches.
    Batches(Vec<Batch>),
    /// Documents with the true log-probability of each token.
    Documents(Vec<OracleDocument>),
    /// Examples of a task, whose answers follow from what was read.
    Examples(HeldExamples),
    /// Several datasets, each measured by itself.
    Mixture(Vec<HeldPart>),
}

/// What is held out of a dataset of a mixture.
#[derive(Clone, Debug)]
pub struct HeldPart {
    /// Name of the dataset.
    pub name: String,
    /// Its weight in the mean of all.
    pub weight: f64,
    /// What is measured of it.
    pub held: Held,
}

/// A model's loss on held-out text, or on the held-out examples of a task.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Evaluation {
    /// Mean negative log-likelihood per token, nats; for vectors the mean squared error per number.
    pub loss: f64,
    /// e^loss; none for vectors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<f64>,
    /// Nats over the text's bytes, in bits; none for a task.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits_per_byte: Option<f64>,
    /// Task of tokens: fraction of answers that are the model's most likely token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// Task of vectors: mean squared error per number; an answer of 0 has 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mse: Option<f64>,
    /// Tokens predicted, or answers given.
    pub tokens: usize,
    /// Bytes of text that they stand for.
    pub bytes: u64,
    /// Largest attention logit over the blocks, on the first rows.
    pub max_logit: f64,
    /// `loss` minus the true entropy of the same tokens, nats per token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gap: Option<f64>,
    /// The same by class of token.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<ClassEvaluation>,
    /// MLA: how the latents of each layer spread, on the first rows.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub latents: Vec<LatentHealth>,
    /// The same text at each narrower rank that the model was trained at.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ranks: Vec<RankEvaluation>,
    /// Of a mixture each dataset by itself; `loss` and its like are then the means by weights.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub datasets: Vec<DatasetEvaluation>,
    /// A run that learns from pairs of answers: its figures by the names that TRL gives them, such as `rewards/accuracies`. `loss` is then the
    /// mean loss of a pair.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub pairs: BTreeMap<String, f64>,
    /// A run that keeps an average of its weights: the same with the average in their place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ema: Option<EmaEvaluation>,
}

/// The model with the average of its weights.
#[derive(Clone, Debug, Serialize)]
pub struct EmaEvaluation {
    /// As [`Evaluation::loss`].
    pub loss: f64,
    /// As [`Evaluation::bits_per_byte`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits_per_byte: Option<f64>,
    /// As [`Evaluation::gap`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gap: Option<f64>,
    /// As [`Evaluation::accuracy`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
}

impl From<Evaluation> for EmaEvaluation {
    fn from(evaluation: Evaluation) -> Self {
        let Evaluation { loss, bits_per_byte, gap, accuracy, .. } = evaluation;
        Self { loss, bits_per_byte, gap, accuracy }
    }
}

/// The figures of a dataset of a mixture.
#[derive(Clone, Debug, Serialize)]
pub struct DatasetEvaluation {
    /// Its name.
    pub dataset: String,
    /// Its weight.
    pub weight: f64,
    /// As [`Evaluation::loss`].
    pub loss: f64,
    /// As [`Evaluation::perplexity`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<f64>,
    /// As [`Evaluation::bits_per_byte`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits_per_byte: Option<f64>,
    /// As [`Evaluation::gap`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gap: Option<f64>,
    /// Tokens predicted.
    pub tokens: usize,
}

/// How much of its latent a layer uses.
#[derive(Clone, Debug, Serialize)]
pub struct LatentHealth {
    /// exp of the entropy of the covariance's eigenvalues: so many equally strong directions are as uncertain.
    pub effective_rank: f64,
    /// Eigenvalues of the covariance of the normalised latent, largest first.
    pub covariance: Vec<f64>,
}

/// A model read at a narrower rank.
#[derive(Clone, Debug, Serialize)]
pub struct RankEvaluation {
    /// Numbers of each latent that are read.
    pub rank: usize,
    /// As [`Evaluation::loss`].
    pub loss: f64,
    /// As [`Evaluation::gap`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gap: Option<f64>,
    /// As [`Evaluation::accuracy`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
}

/// Loss on the tokens of one class.
#[derive(Clone, Debug, Serialize)]
pub struct ClassEvaluation {
    /// Name of the class.
    pub class: String,
    /// Tokens of this class.
    pub tokens: usize,
    /// Model's nats per token.
    pub loss: f64,
    /// Generator's nats per token: no model can do better on average.
    pub entropy: f64,
    /// Difference of the two.
    pub gap: f64,
    /// Task: fraction of answers that are the model's most likely token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
}

/// Rows of the first batch that a look inside is taken at.
const LOOKED_AT: usize = 4;

/// Documents per pass of the oracle evaluation.
const DOCUMENTS_PER_PASS: usize = 16;

impl Held {
    /// Whether there is nothing in it to predict.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Batches(batches) => batches.iter().all(|batch| batch.target_tokens() == 0),
            Self::Documents(documents) => documents.iter().all(|document| document.ids.len() < 2),
            Self::Examples(HeldExamples::Tokens(batches, _)) => batches.is_empty(),
            Self::Examples(HeldExamples::Vectors(batches)) => batches.is_empty(),
            Self::Mixture(parts) => parts.iter().all(|part| part.held.is_empty()),
        }
    }

    /// A hash of what is asked: two that are equal ask the same.
    pub fn checksum(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        self.add_to(&mut hash);
        hash.finalize().into()
    }

    fn add_to(&self, hash: &mut Sha256) {
        fn batch(hash: &mut Sha256, batch: &Batch) {
            hash.update(format!("{} {} {}", batch.rows, batch.seq_len, batch.pairs));
            batch.input_ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
            batch.targets.iter().for_each(|target| hash.update(target.to_le_bytes()));
            batch.document_starts.iter().for_each(|start| hash.update(start.to_le_bytes()));
            if let Some(vectors) = &batch.vectors {
                let numbers = vectors.inputs.iter().chain(&vectors.values);
                numbers.for_each(|number| hash.update(number.to_le_bytes()));
            }
        }
        match self {
            Self::Batches(batches) | Self::Examples(HeldExamples::Vectors(batches)) => {
                batches.iter().for_each(|one| batch(hash, one));
            }
            Self::Examples(HeldExamples::Tokens(batches, _)) => batches.iter().for_each(|one| batch(hash, &one.batch)),
            Self::Documents(documents) => {
                documents.chunks(DOCUMENTS_PER_PASS).for_each(|some| batch(hash, &one_per_row(some)));
            }
            Self::Mixture(parts) => parts.iter().for_each(|part| part.held.add_to(hash)),
        }
    }

    /// The first `count · batch_size` rows or documents of it, of a mixture those of each dataset, for evaluations during a run; a batch is never cut.
    pub fn first(&self, count: usize, batch_size: usize) -> Self {
        let most = count.saturating_mul(batch_size);
        match self {
            Self::Batches(batches) => Self::Batches(first_rows(batches, most, |batch| batch.rows)),
            Self::Documents(documents) => Self::Documents(documents.iter().take(most).cloned().collect()),
            Self::Examples(HeldExamples::Tokens(batches, names)) => {
                Self::Examples(HeldExamples::Tokens(first_rows(batches, most, |answers| answers.batch.rows), names))
            }
            Self::Examples(HeldExamples::Vectors(batches)) => {
                Self::Examples(HeldExamples::Vectors(first_rows(batches, most, |batch| batch.rows)))
            }
            Self::Mixture(parts) => {
                let first = |part: &HeldPart| HeldPart { held: part.held.first(count, batch_size), ..part.clone() };
                Self::Mixture(parts.iter().map(first).collect())
            }
        }
    }
}

/// The first batches that together have at least `most` rows.
fn first_rows<T: Clone>(batches: &[T], most: usize, rows: impl Fn(&T) -> usize) -> Vec<T> {
    let mut left = most;
    let wanted = batches.iter().take_while(|batch| {
        let wanted = left > 0;
        left = left.saturating_sub(rows(batch));
        wanted
    });
    wanted.cloned().collect()
}

/// Evaluates `model`; `byte_lengths[id]` is the number of text bytes that a token stands for.
///
/// The first token of a document has no context and is not predicted, by the model or by the generator.
///
/// A model that was trained to be read at narrower ranks ([`lowkey_model::config::ElasticSection`]) is evaluated at each of them as well.
///
/// # Errors
/// [`Error::Device`] where a loss cannot be read back.
pub fn evaluate(
    model: &CausalLm,
    held: &Held,
    byte_lengths: &[u32],
    workers: &Workers,
    device: &Device,
) -> Result<Evaluation> {
    let model = model.valid();
    let device = device.clone().without_autodiff();
    let mut evaluation = evaluate_whole(&model, held, byte_lengths, workers, &device)?;
    for rank in model.config.elastic_ranks() {
        let narrow = model.with_kv_ranks(&vec![rank; model.config.layers.len()])?;
        let Evaluation { loss, gap, accuracy, .. } = evaluate_whole(&narrow, held, byte_lengths, workers, &device)?;
        evaluation.ranks.push(RankEvaluation { rank, loss, gap, accuracy });
    }
    Ok(evaluation)
}

/// [`evaluate`] at the width that the model is read at; without a graph.
fn evaluate_whole(
    model: &CausalLm,
    held: &Held,
    byte_lengths: &[u32],
    workers: &Workers,
    device: &Device,
) -> Result<Evaluation> {
    let packed;
    let batches = match held {
        Held::Examples(held) => return examples::evaluate(model, held, workers, device),
        Held::Mixture(parts) => return mixture::evaluate(model, parts, byte_lengths, workers, device),
        Held::Batches(batches) => batches,
        Held::Documents(documents) => {
            packed = documents.chunks(DOCUMENTS_PER_PASS).map(one_per_row).collect();
            &packed
        }
    };
    let losses = workers.map_on_ranks(batches, |batch| {
        let losses = model.losses(batch.all(), device, None).try_into_vec_as::<f32>();
        losses.map_err(|e| Error::Device { what: "the losses", why: format!("{e:?}") })
    })?;
    let (mut nats, mut tokens, mut bytes) = (0.0, 0, 0u64);
    for (batch, losses) in batches.iter().zip(&losses) {
        for (target, loss) in batch.targets.iter().zip(losses).filter(|(target, _)| **target != IGNORE) {
            nats += f64::from(*loss);
            tokens += 1;
            bytes += u64::from(byte_lengths.get(*target as usize).copied().unwrap_or(0));
        }
    }
    let loss = nats / tokens.max(1) as f64;
    let classes = match held {
        Held::Documents(documents) => by_class(documents, batches, &losses),
        Held::Batches(_) | Held::Examples(_) | Held::Mixture(_) => Vec::new(),
    };
    let Looks { max_logit, latents } = look(model, batches.first(), device)?;
    let gap = (!classes.is_empty()).then(|| {
        let entropy: f64 = classes.iter().map(|c| c.entropy * c.tokens as f64).sum();
        loss - entropy / tokens.max(1) as f64
    });
    Ok(Evaluation {
        loss,
        perplexity: Some(loss.exp()),
        bits_per_byte: Some(nats / std::f64::consts::LN_2 / bytes.max(1) as f64),
        tokens,
        bytes,
        max_logit,
        gap,
        classes,
        latents,
        ..Evaluation::default()
    })
}

/// Documents as rows of a batch, padded to the longest.
fn one_per_row(documents: &[OracleDocument]) -> Batch {
    let seq_len = documents.iter().map(|d| d.ids.len().saturating_sub(1)).max().unwrap_or(0).max(1);
    let mut batch = Batch {
        rows: documents.len(),
        seq_len,
        input_ids: Vec::with_capacity(documents.len() * seq_len),
        targets: Vec::with_capacity(documents.len() * seq_len),
        document_starts: vec![0; documents.len() * seq_len],
        vectors: None,
        pairs: false,
    };
    for document in documents {
        let inputs = document.ids.iter().take(document.ids.len().saturating_sub(1)).copied();
        batch.input_ids.extend(inputs.chain(std::iter::repeat(0)).take(seq_len));
        let targets = document.ids.iter().zip(&document.learnt).skip(1);
        let targets = targets.map(|(id, learnt)| if *learnt { i64::from(*id) } else { IGNORE });
        batch.targets.extend(targets.chain(std::iter::repeat(IGNORE)).take(seq_len));
    }
    batch
}

fn by_class(documents: &[OracleDocument], batches: &[Batch], losses: &[Vec<f32>]) -> Vec<ClassEvaluation> {
    let rows = batches.iter().zip(losses).flat_map(|(batch, losses)| losses.chunks(batch.seq_len));
    let mut sums = vec![(0usize, 0.0, 0.0); Class::ALL.len()];
    for (document, losses) in documents.iter().zip(rows) {
        let truth = document.log_probs.iter().zip(&document.classes).zip(&document.learnt).skip(1);
        for ((log_prob, class), loss) in truth.zip(losses).filter(|((_, learnt), _)| **learnt).map(|((t, _), l)| (t, l))
        {
            if let Some(i) = Class::ALL.iter().position(|c| c == class) {
                sums[i].0 += 1;
                sums[i].1 += f64::from(*loss);
                sums[i].2 -= log_prob;
            }
        }
    }
    Class::ALL
        .iter()
        .zip(sums)
        .filter(|(_, (tokens, ..))| *tokens > 0)
        .map(|(class, (tokens, model, truth))| {
            let (loss, entropy) = (model / tokens as f64, truth / tokens as f64);
            let class = class.label().to_string();
            ClassEvaluation { class, tokens, loss, entropy, gap: loss - entropy, accuracy: None }
        })
        .collect()
}

/// What only a look inside tells.
struct Looks {
    max_logit: f64,
    latents: Vec<LatentHealth>,
}

/// Looks at the first rows of a batch: the largest attention logit, and how the latents spread.
fn look(model: &CausalLm, batch: Option<&Batch>, device: &Device) -> Result<Looks> {
    let Some(batch) = batch else { return Ok(Looks { max_logit: 0.0, latents: Vec::new() }) };
    let mut trace = Trace::default();
    model.losses(batch.rows(0..batch.rows.min(LOOKED_AT)), device, Some(&mut trace));
    let mut max_logit = f64::NEG_INFINITY;
    for logit in trace.max_logit {
        let logit = logit
            .try_into_scalar::<f32>()
            .map_err(|e| Error::Device { what: "an attention logit", why: format!("{e:?}") })?;
        // What is no number stays none.
        max_logit = if max_logit.is_nan() || f64::from(logit) < max_logit { max_logit } else { f64::from(logit) };
    }
    // A model that computes no numbers is refused for its loss.
    let spectra = if max_logit.is_finite() { latent_spectra(trace.latent)? } else { Vec::new() };
    let health = |covariance: Vec<f64>| LatentHealth { effective_rank: effective_rank(&covariance), covariance };
    Ok(Looks { max_logit, latents: spectra.into_iter().map(health).collect() })
}

#[cfg(test)]
mod tests;
