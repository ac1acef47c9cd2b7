//! Output head and loss in one: cross entropy, and what a pass learns from another.

pub(crate) mod autodiff;
mod cpu;
mod divergence;
#[cfg(feature = "gpu")]
mod gpu;
pub(crate) mod reference;
#[cfg(test)]
mod tests;

use burn::backend::Dispatch;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use lowkey_batch::IGNORE;

use self::autodiff::LossOps;
pub use self::divergence::{Divergence, Teacher, TopTokens, diverge_sum};
use crate::precision;

/// A sum of losses (nats) and how many targets it covers.
///
/// A sum rather than a mean, so that micro-batches with different numbers of targets can be combined exactly.
#[derive(Clone, Debug)]
pub struct LossSum {
    /// What is minimised, `Σ weight · (−log p(target) + z_loss · log² Z)`, shape `[1]`.
    pub nats: Tensor<1>,
    /// The part of it that is z-loss, `[1]`; no gradient flows through it.
    pub z_loss: Tensor<1>,
    /// Number of targets that are not [`IGNORE`].
    pub targets: usize,
}

/// What [`cross_entropy_sum`] is to predict.
#[derive(Clone, Copy, Debug)]
pub struct Labels<'a> {
    /// `[n]`: the token, or [`IGNORE`].
    pub targets: &'a [i64],
    /// `[n]`: factor on each token's loss; absent: 1.
    pub weights: Option<&'a [f32]>,
    /// Factor on log² Z, Z being the sum of e^logit, which keeps logits from drifting (PaLM, arXiv 2204.02311, section 5);
    /// 0: none.
    pub z_loss: f64,
}

/// Output head and loss in one: `Σ weight · (−log softmax(W h)[target] + z_loss · log² Z)` over all tokens that have a target.
///
/// Forward and backward run together over blocks of tokens: the logits never exist whole.
///
/// # Shapes
/// `h [n, d]`, `weight [vocab, d]`, `labels` of length `n`.
pub fn cross_entropy_sum(h: Tensor<2>, weight: Tensor<2>, labels: Labels) -> LossSum {
    let Labels { targets, weights, z_loss } = labels;
    let ([n, _], device) = (h.dims(), h.device());
    assert!(
        targets.len() == n && weights.is_none_or(|weights| weights.len() == n),
        "cross_entropy_sum: {} targets and {:?} weights for {n} tokens",
        targets.len(),
        weights.map(<[f32]>::len)
    );
    let count = targets.iter().filter(|target| **target >= 0).count();
    let index = target_tensor(targets, &device);
    let weights = Tensor::<1>::from_floats(weights.unwrap_or(&[1.0]), &device);
    let sums = if h.dtype() == DType::F32 {
        let (h, weight, weights) = (h.into_dispatch(), weight.into_dispatch(), weights.into_dispatch());
        Tensor::from_dispatch(Dispatch::cross_entropy_sum(
            h,
            weight,
            index.into_dispatch(),
            weights,
            z_loss,
            precision::current(),
        ))
    } else {
        reference::cross_entropy_sum(h, weight, index, weights, z_loss)
    };
    let part = |i| sums.clone().narrow(0, i, 1);
    LossSum { nats: part(0), z_loss: part(1).detach(), targets: count }
}

/// What a pass is to learn from another under the same output head (in-place distillation, Yu & Huang, arXiv 1903.05134):
/// `Σ share · KL(softmax(W teacher) ‖ softmax(W h)) + (1 − share) · (−log softmax(W h)[target])` over the tokens that have a
/// target, `[1]`. No gradient flows into `teacher`, nor into W from it.
///
/// Forward and backward run together over blocks of tokens, as in [`cross_entropy_sum`].
///
/// # Shapes
/// `h` and `teacher [n, d]`, `weight [vocab, d]`, `targets` of length `n`; `share` from 0 to 1.
pub fn distill_sum(h: Tensor<2>, weight: Tensor<2>, teacher: Tensor<2>, targets: &[i64], share: f64) -> Tensor<1> {
    assert!(
        h.dims() == teacher.dims() && targets.len() == h.dims()[0],
        "distill_sum: {:?} is to learn from {:?} on {} targets",
        h.dims(),
        teacher.dims(),
        targets.len()
    );
    let index = target_tensor(targets, &h.device());
    let teacher = teacher.detach();
    if h.dtype() != DType::F32 {
        return reference::distill_sum(h, weight, teacher, index, share);
    }
    let (h, weight, teacher) = (h.into_dispatch(), weight.into_dispatch(), teacher.into_dispatch());
    Tensor::from_dispatch(Dispatch::distill_sum(h, weight, teacher, index.into_dispatch(), share, precision::current()))
}

/// `−log softmax(W h)[target]` of each token, 0 where the target is [`IGNORE`]; no gradient flows through it.
///
/// # Shapes
/// `h [n, d]`, `weight [vocab, d]`, `targets` of length `n` → `[n]`.
pub fn cross_entropy_each(h: Tensor<2>, weight: Tensor<2>, targets: &[i64]) -> Tensor<1> {
    let index = target_tensor(targets, &h.device());
    if h.dtype() != DType::F32 {
        return reference::cross_entropy_each(h, weight, index).detach();
    }
    let (h, weight) = (h.into_dispatch(), weight.into_dispatch());
    Tensor::from_dispatch(Dispatch::cross_entropy_each(h, weight, index.into_dispatch(), precision::current()))
}

fn target_tensor(targets: &[i64], device: &Device) -> Tensor<1, Int> {
    let targets: Vec<i32> = targets.iter().map(|t| if *t == IGNORE { -1 } else { *t as i32 }).collect();
    let n = targets.len();
    Tensor::from_data(TensorData::new(targets, [n]), device)
}
