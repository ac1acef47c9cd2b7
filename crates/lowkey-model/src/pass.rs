//! What a pass over whole rows reads and is to answer: tokens, or real vectors.
//!
//! A token is a row of the embedding matrix E, a target a class. A vector x of `width` numbers enters as x·E, of which a token is the
//! case of a single 1; it is answered by the first `targets` of the logits, and the loss is the mean squared error per number.
//! Everything between embedding and output head is the same, so that what is measured of the one holds for the other.

use burn::tensor::{Device, Int, Tensor, TensorData};
use lowkey_batch::{IGNORE, Rows, VectorRows};
use lowkey_kernels::loss::{Labels, LossSum, cross_entropy_each, cross_entropy_sum};

use crate::model::{CausalLm, ids_tensor};

impl CausalLm {
    /// What the blocks read, `[rows, seq, d]`.
    pub(crate) fn embed(&self, batch: Rows, device: &Device) -> Tensor<3> {
        let Rows { rows, seq_len, input_ids, vectors, .. } = batch;
        match vectors {
            None => self.model.embed_tokens.forward(ids_tensor(input_ids, rows, seq_len, device)),
            Some(VectorRows { input_width, inputs, .. }) => {
                let x = Tensor::<2>::from_data(TensorData::new(inputs.to_vec(), [rows * seq_len, input_width]), device);
                let table = self.model.embed_tokens.table().narrow(0, 0, input_width);
                x.matmul(table).reshape([rows, seq_len, self.config.hidden_size])
            }
        }
    }

    /// The summed loss of what follows from the hidden states `[rows · seq, d]` after the final norm. For vectors it is a sum of
    /// squared errors per number, and there is no log-partition to be kept small.
    pub(crate) fn loss_of(&self, hidden: Tensor<2>, batch: Rows, z_loss: f64) -> LossSum {
        let Rows { targets, vectors, .. } = batch;
        match vectors {
            None => cross_entropy_sum(hidden, self.head_weight(), Labels { targets, weights: None, z_loss }),
            Some(vectors) => {
                let sum = self.squared_errors(hidden, targets, vectors).sum();
                LossSum { z_loss: sum.clone().detach().zeros_like(), nats: sum, targets: batch.target_tokens() }
            }
        }
    }

    /// The loss of each position, `[rows · seq]`, 0 where nothing is asked; no gradient flows through it.
    pub(crate) fn losses_of(&self, hidden: Tensor<2>, batch: Rows) -> Tensor<1> {
        match batch.vectors {
            None => cross_entropy_each(hidden, self.head_weight(), batch.targets),
            Some(vectors) => self.squared_errors(hidden, batch.targets, vectors).detach(),
        }
    }

    /// `mean((W h − value)²)` of each position over the numbers of an answer, `[rows · seq]`, 0 where nothing is asked.
    fn squared_errors(&self, hidden: Tensor<2>, targets: &[i64], vectors: VectorRows) -> Tensor<1> {
        let VectorRows { output_width, values, .. } = vectors;
        let ([n, _], device) = (hidden.dims(), hidden.device());
        let head = self.head_weight().narrow(0, 0, output_width);
        let values = Tensor::<2>::from_data(TensorData::new(values.to_vec(), [n, output_width]), &device);
        let asked: Vec<f32> = targets.iter().map(|target| f32::from(u8::from(*target != IGNORE))).collect();
        let asked = Tensor::<1>::from_data(TensorData::new(asked, [n]), &device);
        let error = hidden.matmul(head.transpose()) - values;
        (error.clone() * error).mean_dim(1).reshape([n]) * asked
    }

    /// Loss of each position, 0 where there is no target, and the token that the model holds most likely there, each
    /// `[rows · seq_len]`. All logits exist at once; no gradient flows.
    pub fn answers(&self, batch: Rows, device: &Device) -> (Tensor<1>, Tensor<1, Int>) {
        let hidden = self.last_hidden(batch, None, device, None);
        let [n, _] = hidden.dims();
        let best = hidden.clone().matmul(self.head_weight().transpose()).argmax(1).reshape([n]);
        (self.losses_of(hidden, batch), best)
    }
}

#[cfg(test)]
mod tests;
