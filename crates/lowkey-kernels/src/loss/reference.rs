//! The losses in plain tensor operations: whole logit matrices exist.

use burn::tensor::activation::log_softmax;
use burn::tensor::{Int, Tensor};

use super::Divergence;
use crate::reference::product;

/// `−log softmax(W h)[target]` of each token, 0 where the target is negative. See [`crate::loss::cross_entropy_each`].
pub fn cross_entropy_each(h: Tensor<2>, weight: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let [n] = targets.dims();
    let ignored = targets.clone().lower_elem(0);
    let index = targets.clamp_min(0).reshape([n, 1]);
    let picked = log_softmax(product(h, weight.transpose()), 1).gather(1, index).reshape([n]);
    // A select, not a product: an ignored row may hold a non-finite logit, and 0 · inf would be NaN.
    picked.neg().mask_fill(ignored, 0.0f32)
}

/// `Σ weight · (nats + z_loss · log² Z)` and its second part, `[2]`. See [`crate::loss::cross_entropy_sum`]; `label_weights [n]` or `[1]`.
pub fn cross_entropy_sum(
    h: Tensor<2>,
    weight: Tensor<2>,
    targets: Tensor<1, Int>,
    label_weights: Tensor<1>,
    z_loss: f64,
) -> Tensor<1> {
    let [n] = targets.dims();
    let logits = product(h.clone(), weight.clone().transpose());
    let highest = logits.clone().max_dim(1).detach();
    let log_z = (logits - highest.clone()).exp().sum_dim(1).log() + highest;
    let weights = label_weights.cast(log_z.dtype());
    let z = (log_z.square() * z_loss).reshape([n]).mask_fill(targets.clone().lower_elem(0), 0.0f32) * weights.clone();
    let nats = cross_entropy_each(h, weight, targets) * weights;
    Tensor::cat(vec![(nats + z.clone()).sum(), z.sum()], 0)
}

/// `Σ share · KL(softmax(W teacher) ‖ softmax(W h)) + (1 − share) · nats`, `[1]`. See [`crate::loss::distill_sum`].
pub fn distill_sum(
    h: Tensor<2>,
    weight: Tensor<2>,
    teacher: Tensor<2>,
    targets: Tensor<1, Int>,
    share: f64,
) -> Tensor<1> {
    let ignored = targets.clone().lower_elem(0);
    let log_p = log_softmax(product(teacher.detach(), weight.clone().detach().transpose()), 1);
    let log_q = log_softmax(product(h.clone(), weight.clone().transpose()), 1);
    let [n] = targets.dims();
    let apart = (log_p.clone().exp() * (log_p - log_q)).sum_dim(1).reshape([n]).mask_fill(ignored, 0.0f32);
    (apart * share + cross_entropy_each(h, weight, targets) * (1.0 - share)).sum()
}

/// The distance of [`crate::loss::diverge_sum`] from the whole of what a teacher predicts, with its share of the cross entropy.
pub fn diverge_sum(
    h: Tensor<2>,
    weight: Tensor<2>,
    teacher: [Tensor<2>; 2],
    targets: Tensor<1, Int>,
    divergence: Divergence,
) -> Tensor<1> {
    let Divergence { beta, temperature, share } = divergence;
    let ([n, _], ignored) = (h.dims(), targets.clone().lower_elem(0));
    let [hidden, head] = teacher;
    let log_s = log_softmax(product(h.clone(), weight.clone().transpose()) / temperature, 1);
    let log_t = log_softmax(product(hidden, head.transpose()) / temperature, 1).detach();
    let apart = |p: Tensor<2>, q: Tensor<2>| (p.clone().exp() * (p - q)).sum_dim(1);
    let distance = if beta == 0.0 {
        apart(log_t, log_s)
    } else if beta == 1.0 {
        apart(log_s, log_t)
    } else {
        let log_m = (log_s.clone().exp() * (1.0 - beta) + log_t.clone().exp() * beta).log();
        apart(log_t, log_m.clone()) * beta + apart(log_s, log_m) * (1.0 - beta)
    };
    let distance = distance.reshape([n]).mask_fill(ignored, 0.0f32);
    (distance * share + cross_entropy_each(h, weight, targets) * (1.0 - share)).sum()
}
