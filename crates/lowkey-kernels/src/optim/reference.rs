//! Every pass as a composition of ordinary tensor operations: for tensors that are not f32, and what the fused ones are held
//! to.

use burn::tensor::Tensor;

use super::steps::{AdamWStep, MuonStep};
use crate::reference::product;

/// See [`super::adamw`].
pub(crate) fn adamw(
    value: Tensor<1>,
    gradient: Tensor<1>,
    m: Tensor<1>,
    v: Tensor<1>,
    step: AdamWStep,
) -> (Tensor<1>, Tensor<1>, Tensor<1>) {
    let AdamWStep { clip, lr, betas: [beta1, beta2], eps, weight_decay, .. } = step;
    let (correction1, correction2) = step.corrections();
    let gradient = gradient * clip;
    let m = m * beta1 + gradient.clone() * (1.0 - beta1);
    let v = v * beta2 + gradient.square() * (1.0 - beta2);
    let update = m.clone() / (v.clone().sqrt() / correction2 + eps);
    (value * (1.0 - lr * weight_decay) - update * (lr / correction1), m, v)
}

/// See [`super::accumulate`].
pub(crate) fn accumulate(first: Tensor<1>, others: Vec<Tensor<1>>) -> Tensor<1> {
    others.into_iter().fold(first, |sum, other| sum + other)
}

/// See [`super::sums_of_squares`]. One number at a time, on the host; NaN where the device does not give them.
pub(crate) fn sum_of_squares(x: Tensor<1>) -> f64 {
    x.try_into_vec_as::<f32>().map_or(f64::NAN, |x| x.iter().map(|x| f64::from(*x).powi(2)).sum())
}

/// See [`super::muon`].
pub(crate) fn muon(
    value: Tensor<1>,
    gradient: Tensor<1>,
    buffer: Tensor<1>,
    width: usize,
    heights: &[usize],
    step: MuonStep,
) -> (Tensor<1>, Tensor<1>) {
    let MuonStep { clip, lr, momentum, weight_decay, .. } = step;
    let gradient = gradient * clip;
    let buffer = buffer * momentum + gradient.clone();
    let ahead = buffer.clone() * momentum + gradient;
    let mut at = 0;
    let updates = heights.iter().map(|height| {
        let block = ahead.clone().narrow(0, at * width, height * width).reshape([*height, width]);
        at += height;
        let scale = lr * MuonStep::scale(*height, width);
        (orthogonalise(block, &product) * scale).reshape([height * width])
    });
    let update = Tensor::cat(updates.collect(), 0);
    (value * (1.0 - lr * weight_decay) - update, buffer)
}

/// About `U Vᵀ` of `x = U S Vᵀ`, with products by `times`; zero stays zero.
pub(crate) fn orthogonalise(x: Tensor<2>, times: &dyn Fn(Tensor<2>, Tensor<2>) -> Tensor<2>) -> Tensor<2> {
    let [rows, columns] = x.dims();
    if rows > columns {
        return orthogonalise(x.transpose(), times).transpose();
    }
    // Axis by axis: a sum over all at once is one of atomic additions on GPUs, in an order that changes.
    let norm = x.clone().square().sum_dim(1).sum_dim(0).sqrt();
    let mut x = x / norm.clamp_min(1e-30);
    for _ in 0..5 {
        let gram = times(x.clone(), x.clone().transpose());
        let poly = gram.clone() * -4.7750 + times(gram.clone(), gram) * 2.0315;
        x = x.clone() * 3.4445 + times(poly, x);
    }
    x
}
