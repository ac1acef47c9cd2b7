//! What a step minimises: the mean of a list of terms.
//!
//! Each term is a pass over the batch, and says what it reads, what it costs and what it is held against. A new one is a variant here;
//! which terms a step has is the run's to say.

use burn::tensor::Tensor;
use lowkey_batch::Rows;
pub use lowkey_kernels::loss::LossSum;
use lowkey_kernels::loss::distill_sum;

use crate::model::CausalLm;

/// A term of an [`Objective`].
#[derive(Clone, Copy, Debug, PartialEq)]
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
}

impl Term {
    /// How much of each latent its pass reads, where not all.
    pub(crate) fn kv_rank(self) -> Option<usize> {
        match self {
            Self::Next { .. } => None,
            Self::Prefix { rank, .. } => Some(rank),
        }
    }

    /// What it costs beside a pass of the whole width, output head included, counted as the convention for FLOPs has it.
    pub fn passes(self) -> f64 {
        match self {
            Self::Next { .. } | Self::Prefix { .. } => 1.0,
        }
    }
}

/// What the gradients are taken of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Objective<'a> {
    /// Factor on the summed loss: one over the targets of the whole step for its mean.
    pub scale: f64,
    /// The terms, of which the mean is taken. The loss of the first is the one that is reported, and its pass is the teacher of those
    /// that learn from another.
    pub terms: &'a [Term],
}

impl CausalLm {
    /// The loss of a term from its pass's hidden states `[rows · seq, d]` after the final norm; `teacher` are those of the first
    /// term's pass.
    pub(crate) fn loss_of_term(
        &self,
        term: Term,
        hidden: Tensor<2>,
        batch: Rows,
        teacher: Option<&Tensor<2>>,
    ) -> LossSum {
        match (term, batch.vectors, teacher) {
            (Term::Prefix { distillation, .. }, None, Some(teacher)) if distillation > 0.0 => {
                let nats = distill_sum(hidden, self.head_weight(), teacher.clone(), batch.targets, distillation);
                LossSum { z_loss: nats.clone().detach().zeros_like(), nats, targets: batch.target_tokens() }
            }
            (Term::Prefix { .. }, ..) => self.loss_of(hidden, batch, 0.0),
            (Term::Next { z_loss }, ..) => self.loss_of(hidden, batch, z_loss),
        }
    }
}
