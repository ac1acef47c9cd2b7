//! What a step minimises: the mean of a list of terms.
//!
//! Each term is a pass over the batch, and says what it reads, what it costs and what it is held against. A new one is a variant here;
//! which terms a step has is the run's to say.

mod figures;
mod lesson;
mod noise;
pub mod preference;
mod teacher;

use burn::tensor::{Device, Tensor, TensorData};
use lowkey_batch::{IGNORE, Rows};
pub use lowkey_kernels::loss::{Divergence, LossSum, TopTokens};
use lowkey_kernels::loss::{Labels, cross_entropy_each, cross_entropy_sum, distill_sum};

pub use self::figures::Figures;
pub(crate) use self::lesson::Lesson;
pub use self::noise::EmbeddingNoise;
use self::preference::Preference;
use crate::model::CausalLm;

/// A term of an [`Objective`].
#[derive(Clone, Debug, PartialEq)]
pub enum Term {
    /// The next token, or the answers to vectors, at the whole width.
    Next {
        /// Factor on each squared log-partition, see [`lowkey_kernels::loss::Labels::z_loss`].
        z_loss: f64,
    },
    /// The same with no more than the first numbers of each latent.
    Prefix {
        /// How many.
        rank: usize,
        /// Tokens: how much of the loss is the distance to what the first term's pass predicts ([`distill_sum`]); the rest, and for
        /// vectors all, is its own.
        distillation: f64,
    },
    /// Of rows in pairs ([`Rows::pairs`]), the chosen answer rather than the rejected one. Its loss is summed over pairs.
    Preference(Preference),
    /// What [`Against::teacher`] predicts, and the next token beside it.
    Distillation {
        /// How far a prediction is from the teacher's.
        divergence: Divergence,
        /// Factor on how far the outputs of the attention are from those of the teacher's layers: the mean over layers of the squared
        /// distance relative to the teacher's output. Above 0 it takes a teacher that is a model, of as many layers as wide.
        attention: f64,
    },
}

impl Term {
    /// The next token and nothing else.
    pub const NEXT: Self = Self::Next { z_loss: 0.0 };

    /// How much of each latent its pass reads, where not all.
    pub(crate) fn kv_rank(&self) -> Option<usize> {
        match self {
            Self::Prefix { rank, .. } => Some(*rank),
            Self::Next { .. } | Self::Preference(_) | Self::Distillation { .. } => None,
        }
    }

    /// What it costs beside a pass of the whole width, output head included, counted as the convention for FLOPs has it: what is
    /// computed twice to save memory does not count. What another model computes for it is counted where that model is known.
    pub fn passes(&self) -> f64 {
        match self {
            Self::Next { .. } | Self::Prefix { .. } | Self::Preference(_) | Self::Distillation { .. } => 1.0,
        }
    }
}

/// What the gradients are taken of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Objective<'a> {
    /// Factor on the summed loss: one over the targets of the whole step for its mean, or over its pairs.
    pub scale: f64,
    /// The terms, of which the mean is taken. The loss of the first is the one that is reported, and its pass is the teacher of those
    /// that learn from another.
    pub terms: &'a [Term],
}

/// What terms are held against beside the rows themselves.
#[derive(Clone, Copy, Debug, Default)]
pub struct Against<'a> {
    /// [`Term::Preference`]: each row's log-probability under the reference ([`CausalLm::row_log_probs`]); needed by
    /// the losses that say so.
    pub reference: Option<&'a [f64]>,
    /// [`Term::Distillation`]: whom to learn from.
    pub teacher: Option<Teacher<'a>>,
}

/// Whom to learn from.
#[derive(Clone, Copy, Debug)]
pub enum Teacher<'a> {
    /// A model of the same vocabulary, which records no gradients.
    Model(&'a CausalLm),
    /// What such a model holds likely in these rows ([`CausalLm::top_tokens`]).
    Top(&'a TopTokens),
}

/// What [`CausalLm::learn`] finds.
#[derive(Debug)]
pub struct Learnt {
    /// Summed loss of the first term, outside its graph.
    pub loss: LossSum,
    /// Gradients of the objective, flattened, in the order of [`CausalLm::trained_parameters`].
    pub gradients: Vec<Tensor<1>>,
    /// What its terms tell beside.
    pub figures: Figures,
}

/// The loss of a term: what to go back from, and what to tell.
pub(crate) struct TermLoss {
    /// What has the loss's gradient.
    pub(crate) minimised: Tensor<1>,
    pub(crate) loss: LossSum,
    pub(crate) figures: Figures,
}

impl From<LossSum> for TermLoss {
    fn from(loss: LossSum) -> Self {
        Self { minimised: loss.nats.clone(), loss, figures: Figures::default() }
    }
}

impl CausalLm {
    /// The loss of a term from its pass's hidden states `[rows · seq, d]` after the final norm; `wider` are those of the first
    /// term's pass. What of a `lesson` is of layers is not in it.
    pub(crate) fn loss_of_term(
        &self,
        term: &Term,
        hidden: Tensor<2>,
        batch: Rows,
        wider: Option<&Tensor<2>>,
        against: Against,
        lesson: Option<&Lesson>,
    ) -> TermLoss {
        let whole = |nats: Tensor<1>| LossSum {
            z_loss: nats.clone().detach().zeros_like(),
            nats,
            targets: batch.target_tokens(),
        };
        match (term, batch.vectors, wider) {
            (Term::Prefix { distillation, .. }, None, Some(wider)) if *distillation > 0.0 => {
                let nats = distill_sum(hidden, self.head_weight(), wider.clone(), batch.targets, *distillation);
                whole(nats).into()
            }
            (Term::Prefix { .. }, ..) => self.loss_of(hidden, batch, 0.0).into(),
            (Term::Next { z_loss }, ..) => self.loss_of(hidden, batch, *z_loss).into(),
            (Term::Preference(preference), ..) => self.loss_of_pairs(preference, hidden, batch, against.reference),
            (Term::Distillation { divergence, .. }, ..) => match against.teacher {
                Some(teacher) => whole(self.distance_to(teacher, lesson, hidden, batch, *divergence)).into(),
                None => self.loss_of(hidden, batch, 0.0).into(),
            },
        }
    }

    /// The loss of rows in pairs. Its gradient is that of a cross entropy in which each token weighs as much as its log-probability
    /// counts, so that the head's forward pass is taken once more and nothing else is.
    fn loss_of_pairs(
        &self,
        preference: &Preference,
        hidden: Tensor<2>,
        batch: Rows,
        reference: Option<&[f64]>,
    ) -> TermLoss {
        let device = hidden.device();
        let (sums, tokens) =
            row_sums(cross_entropy_each(hidden.clone().detach(), self.head_weight(), batch.targets), batch);
        let (slopes, figures) = preference.judge_rows(&sums, &tokens, reference);
        // d log p = −d nats.
        let weights: Vec<f32> = slopes.iter().flat_map(|slope| vec![-*slope as f32; batch.seq_len]).collect();
        let labels = Labels { targets: batch.targets, weights: Some(&weights), z_loss: 0.0 };
        let LossSum { nats, z_loss, targets } = cross_entropy_sum(hidden, self.head_weight(), labels);
        let told = Tensor::from_data(TensorData::new(vec![figures.loss as f32], [1]), &device);
        TermLoss { minimised: nats, loss: LossSum { nats: told, z_loss, targets }, figures: figures.into() }
    }

    /// The log-probability of each row's targets, summed, and their number. Waits for the device; of one that does not answer the sums
    /// are no numbers.
    pub fn row_log_probs(&self, batch: Rows, device: &Device) -> (Vec<f64>, Vec<usize>) {
        row_sums(self.losses(batch, device, None), batch)
    }
}

/// Sums of the log-probabilities of each row's targets from the loss of each position, and how many they are.
fn row_sums(nats: Tensor<1>, batch: Rows) -> (Vec<f64>, Vec<usize>) {
    let nats = nats.try_into_vec_as::<f32>().unwrap_or_else(|_| vec![f32::NAN; batch.targets.len()]);
    let rows = nats.chunks(batch.seq_len).zip(batch.targets.chunks(batch.seq_len));
    rows.map(|(nats, targets)| {
        let asked = || nats.iter().zip(targets).filter(|(_, target)| **target != IGNORE);
        (-asked().map(|(nats, _)| f64::from(*nats)).sum::<f64>(), asked().count())
    })
    .unzip()
}

#[cfg(test)]
mod tests;
