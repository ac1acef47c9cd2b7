//! What a pass over whole rows reads and is to answer: tokens, or real vectors.
//!
//! A token is a row of the embedding matrix E, a target a class. A vector x of `width` numbers enters as x·E, of which a token is the
//! case of a single 1; it is answered by the first `targets` of the logits, and the loss is the mean squared error per number.
//! Everything between embedding and output head is the same, so that what is measured of the one holds for the other.

use burn::tensor::{Device, Int, Tensor, TensorData};
use lowkey_kernels::{Labels, LossSum, cross_entropy_each, cross_entropy_sum};

use crate::model::{CausalLm, TokenBatch, ids_tensor};

/// Vectors, answers and document bounds of one forward pass, as plain numbers.
#[derive(Clone, Copy, Debug)]
pub struct VectorRows<'a> {
    /// Number of sequences.
    pub rows: usize,
    /// Length of each.
    pub seq_len: usize,
    /// Numbers of an input, at most the vocabulary's size.
    pub input_width: usize,
    /// Numbers of an answer, at most the vocabulary's size.
    pub output_width: usize,
    /// `[rows · seq_len · input_width]`
    pub inputs: &'a [f32],
    /// `[rows · seq_len · output_width]`
    pub values: &'a [f32],
    /// `[rows · seq_len]`: whether the value counts.
    pub asked: &'a [bool],
    /// As [`TokenBatch::document_starts`].
    pub document_starts: &'a [u32],
}

/// What one forward pass reads and is to answer.
#[derive(Clone, Copy, Debug)]
pub enum PassBatch<'a> {
    /// Tokens.
    Tokens(TokenBatch<'a>),
    /// Vectors.
    Vectors(VectorRows<'a>),
}

impl<'a> From<TokenBatch<'a>> for PassBatch<'a> {
    fn from(batch: TokenBatch<'a>) -> Self {
        Self::Tokens(batch)
    }
}

impl<'a> From<VectorRows<'a>> for PassBatch<'a> {
    fn from(rows: VectorRows<'a>) -> Self {
        Self::Vectors(rows)
    }
}

impl PassBatch<'_> {
    /// Rows, and positions of each.
    pub(crate) fn dims(&self) -> [usize; 2] {
        match self {
            Self::Tokens(batch) => [batch.rows, batch.seq_len],
            Self::Vectors(rows) => [rows.rows, rows.seq_len],
        }
    }

    /// `[rows · seq_len]`: where in its row the document of a position starts.
    pub(crate) fn document_starts(&self) -> &[u32] {
        match self {
            Self::Tokens(batch) => batch.document_starts,
            Self::Vectors(rows) => rows.document_starts,
        }
    }
}

impl CausalLm {
    /// What the blocks read, `[rows, seq, d]`.
    pub(crate) fn embed(&self, batch: PassBatch, device: &Device) -> Tensor<3> {
        match batch {
            PassBatch::Tokens(TokenBatch { rows, seq_len, input_ids, .. }) => {
                self.model.embed_tokens.forward(ids_tensor(input_ids, rows, seq_len, device))
            }
            PassBatch::Vectors(VectorRows { rows, seq_len, input_width, inputs, .. }) => {
                let x = Tensor::<2>::from_data(TensorData::new(inputs.to_vec(), [rows * seq_len, input_width]), device);
                let table = self.model.embed_tokens.table().narrow(0, 0, input_width);
                x.matmul(table).reshape([rows, seq_len, self.config.hidden_size])
            }
        }
    }

    /// The summed loss of what follows from the hidden states `[rows · seq, d]` after the final norm. For vectors it is a sum of
    /// squared errors per number, and there is no log-partition to be kept small.
    pub(crate) fn loss_of(&self, hidden: Tensor<2>, batch: PassBatch, z_loss: f64) -> LossSum {
        match batch {
            PassBatch::Tokens(TokenBatch { targets, .. }) => {
                cross_entropy_sum(hidden, self.head_weight(), Labels { targets, weights: None, z_loss })
            }
            PassBatch::Vectors(rows) => {
                let sum = self.squared_errors(hidden, rows).sum();
                let targets = rows.asked.iter().filter(|asked| **asked).count();
                LossSum { z_loss: sum.clone().detach().zeros_like(), nats: sum, targets }
            }
        }
    }

    /// The loss of each position, `[rows · seq]`, 0 where nothing is asked; no gradient flows through it.
    pub(crate) fn losses_of(&self, hidden: Tensor<2>, batch: PassBatch) -> Tensor<1> {
        match batch {
            PassBatch::Tokens(TokenBatch { targets, .. }) => cross_entropy_each(hidden, self.head_weight(), targets),
            PassBatch::Vectors(rows) => self.squared_errors(hidden, rows).detach(),
        }
    }

    /// `mean((W h − value)²)` of each position over the numbers of an answer, `[rows · seq]`, 0 where nothing is asked.
    fn squared_errors(&self, hidden: Tensor<2>, rows: VectorRows) -> Tensor<1> {
        let VectorRows { output_width, values, asked, .. } = rows;
        let ([n, _], device) = (hidden.dims(), hidden.device());
        let head = self.head_weight().narrow(0, 0, output_width);
        let values = Tensor::<2>::from_data(TensorData::new(values.to_vec(), [n, output_width]), &device);
        let asked: Vec<f32> = asked.iter().map(|asked| f32::from(u8::from(*asked))).collect();
        let asked = Tensor::<1>::from_data(TensorData::new(asked, [n]), &device);
        let error = hidden.matmul(head.transpose()) - values;
        (error.clone() * error).mean_dim(1).reshape([n]) * asked
    }

    /// Loss of each position, 0 where there is no target, and the token that the model holds most likely there, each
    /// `[rows · seq_len]`. All logits exist at once; no gradient flows.
    pub fn answers(&self, batch: TokenBatch, device: &Device) -> (Tensor<1>, Tensor<1, Int>) {
        let hidden = self.last_hidden(batch.into(), None, device, None);
        let [n, _] = hidden.dims();
        let best = hidden.clone().matmul(self.head_weight().transpose()).argmax(1).reshape([n]);
        (self.losses_of(hidden, batch.into()), best)
    }
}

#[cfg(test)]
mod tests;
