//! What a teacher's layers say: the output of each attention, which a model with another attention can learn beside the predictions.

use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use lowkey_batch::{IGNORE, Rows};

use super::{Against, Figures, LossSum, Teacher, Term};
use crate::model::Trace;

/// Keeps the error of an output of zeros finite.
const LEAST: f64 = 1e-9;

/// A teacher's pass over the rows of a batch, and how far the outputs of a model's attention lie from its.
#[derive(Debug)]
pub(crate) struct Lesson {
    /// Hidden states after the final norm, `[rows · seq, d]`.
    pub(crate) hidden: Tensor<2>,
    /// Of each layer `[rows, seq, d]`.
    attn_out: Vec<Tensor<3>>,
    /// 1 where there is a target and 0 elsewhere, `[rows, seq, 1]`.
    asked: Tensor<3>,
    /// Factor on the mean of the layers' errors.
    weight: f64,
}

impl Lesson {
    /// What a term's teacher has to say, where the term asks for it.
    pub(crate) fn of(term: &Term, against: Against, batch: Rows, device: &Device) -> Option<Self> {
        let (Term::Distillation { attention, .. }, Some(Teacher::Model(teacher))) = (term, against.teacher) else {
            return None;
        };
        if *attention == 0.0 {
            return None;
        }
        let (device, mut trace) = (device.clone().inner(), Trace::of_attention());
        let hidden = teacher.last_hidden(batch, None, &device, Some(&mut trace));
        let asked = batch.targets.iter().map(|target| f32::from(u8::from(*target != IGNORE))).collect();
        let asked = Tensor::from_data(TensorData::new::<f32, _>(asked, [batch.rows, batch.seq_len, 1]), &device);
        Some(Self { hidden, attn_out: trace.attn_out, asked, weight: *attention })
    }

    /// Of a layer whose attention gives `own [rows, seq, d]`: over all positions with a target, the sum of the squared distance from the
    /// teacher's output relative to that output's square, over the number of layers. `own` records gradients.
    fn error(&self, layer: usize, own: Tensor<3>) -> Tensor<1> {
        let taught = self.attn_out[layer].clone().cast(FloatDType::F32);
        let weight = self.asked.clone() / (taught.clone().square().sum_dim(2) + LEAST) / self.attn_out.len() as f64;
        let apart = own.cast(FloatDType::F32) - taught.autodiff();
        let each = apart.square().sum_dim(2) * weight.autodiff();
        // Along an axis: the sum over all would be one of atomic additions on a GPU, in an order that changes.
        let [rows, seq, _] = each.dims();
        each.reshape([rows * seq]).sum_dim(0)
    }

    /// The part of the term's loss that is a layer's, to go back from; tells of it in the loss, which has no graph, and in the figures.
    pub(crate) fn learn(&self, layer: usize, own: Tensor<3>, loss: &mut LossSum, figures: &mut Figures) -> Tensor<1> {
        let error = self.error(layer, own);
        figures.add(Figures::default().with_tensor("attention_error", error.clone()));
        let part = error * self.weight;
        loss.nats = loss.nats.clone() + part.clone().without_autodiff();
        part
    }
}
