//! What a pass learns from a model with another output head: the distance between what the two predict.
//!
//! The distance is TRL's generalised Jensen-Shannon divergence (Agarwal et al., arXiv 2306.13649, equation 1), whose ends are the two
//! Kullback-Leibler divergences. Both models' logits exist for one block of tokens at a time, with their gradient; the backward pass
//! finds the gradients of the sum formed. All in plain tensor operations, so that it is one form for CPU and GPU.

use burn::backend::Dispatch;
use burn::tensor::{IndexingUpdateOp, Int, Tensor, TensorData};

use super::autodiff::LossOps;
use crate::linear;

/// Logits of one model that exist at a time, about.
const LOGITS: usize = if cfg!(test) { 500 } else { 1 << 22 };

/// How the distance between two distributions over the vocabulary is measured, and how much of the loss it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Divergence {
    /// With t of the teacher, s of the pupil and m = β t + (1 − β) s: β KL(t ‖ m) + (1 − β) KL(s ‖ m). 0 is KL(t ‖ s), the forward
    /// one, and 1 is KL(s ‖ t), the reverse one.
    pub beta: f64,
    /// What both models' logits are divided by, above 0.
    pub temperature: f64,
    /// How much of the loss is the distance; the rest is the cross entropy with the target, at temperature 1.
    pub share: f64,
}

/// What a teacher holds likely of each token that is asked for.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "one for each pass, and what it points at is far larger")]
pub enum Teacher<'a> {
    /// Everything: hidden states `[n, d_teacher]` and the output head `[vocab, d_teacher]`. No gradient flows into either.
    Whole(Tensor<2>, Tensor<2>),
    /// The likeliest tokens.
    Top(&'a TopTokens),
}

/// The likeliest tokens of a teacher, and all others together: the distance is that between the pupil and the teacher on these
/// `k + 1` outcomes. (Without the last one, the pupil's best answer to k tokens that do not add up to 1 would not be the teacher.)
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TopTokens {
    /// Tokens of a position, k.
    pub k: usize,
    /// `[asked · k]`: the tokens, for each position that has a target, in their order.
    pub ids: Vec<u32>,
    /// `[asked · (k + 1)]`: their log-probabilities at the temperature, and that of all others.
    pub log_probs: Vec<f32>,
}

/// Output head and distance in one: `Σ share · D(teacher, softmax(W h)) + (1 − share) · (−log softmax(W h)[target])` over the tokens
/// that have a target, `[1]`.
///
/// # Shapes
/// `h [n, d]`, `weight [vocab, d]`, `targets` of length `n`; numbers in f32.
pub fn diverge_sum(
    h: Tensor<2>,
    weight: Tensor<2>,
    teacher: Teacher,
    targets: &[i64],
    divergence: Divergence,
) -> Tensor<1> {
    let [n, d] = h.dims();
    assert!(targets.len() == n, "diverge_sum: {} targets for {n} tokens", targets.len());
    let (asked, labels): (Vec<i32>, Vec<i32>) =
        (0i32..).zip(targets).filter(|(_, target)| **target >= 0).map(|(i, target)| (i, *target as i32)).unzip();
    let device = h.device().inner();
    let index = |ids: Vec<i32>| Tensor::<1, Int>::from_data(TensorData::new(ids.clone(), [ids.len()]), &device);
    let count = asked.len();
    let pick = |x: Tensor<2>| match count {
        // None, and none is looked at.
        all if all == n || all == 0 => x,
        _ => x.select(0, index(asked.clone())),
    };
    let [of_h, of_weight] = [h.is_tracked(), weight.is_tracked()];
    let (pupil, head) = (pick(h.clone().without_autodiff()), weight.clone().without_autodiff());
    let [vocab, _] = head.dims();
    let teacher = match teacher {
        Teacher::Whole(hidden, head) => {
            assert!(
                hidden.dims()[0] == n && head.dims()[0] == vocab,
                "diverge_sum: a teacher of {:?} under {:?} for {n} tokens of {vocab}",
                hidden.dims(),
                head.dims()
            );
            Taught::Whole(pick(hidden.without_autodiff()), head.without_autodiff())
        }
        Teacher::Top(top) => {
            let k = top.k;
            assert!(
                top.ids.len() == count * k && top.log_probs.len() == count * (k + 1),
                "diverge_sum: {} of {k} likeliest tokens for {count} targets",
                top.ids.len()
            );
            Taught::Top(top)
        }
    };
    let mut sum = Tensor::<1>::zeros([1], &device);
    let mut d_h = Vec::new();
    let mut d_weight: Option<Tensor<2>> = None;
    let block = (LOGITS / vocab).clamp(1, 512);
    for from in (0..count).step_by(block) {
        let size = block.min(count - from);
        let h = pupil.clone().narrow(0, from, size);
        let labels = index(labels[from..from + size].to_vec()).reshape([size, 1]);
        let (loss, slope) = block_loss(product(h.clone(), head.clone()), &teacher, from, labels, divergence);
        sum = sum + loss.sum_dim(0).reshape([1]);
        if of_h {
            d_h.push(product(slope.clone(), head.clone().transpose()));
        }
        if of_weight {
            let part = product(slope.transpose(), h.transpose());
            d_weight = Some(match d_weight {
                Some(sum) => sum + part,
                None => part,
            });
        }
    }
    if !of_h && !of_weight {
        return sum;
    }
    let none = || Tensor::<2>::zeros([1, 1], &device);
    let d_h = match (of_h, d_h.is_empty()) {
        (true, false) if count == n => Tensor::cat(d_h, 0),
        (true, false) => Tensor::<2>::zeros([n, d], &device).select_assign(
            0,
            index(asked.clone()),
            Tensor::cat(d_h, 0),
            IndexingUpdateOp::Add,
        ),
        (true, true) => Tensor::zeros([n, d], &device),
        (false, _) => none(),
    };
    let d_weight = match (of_weight, d_weight) {
        (true, Some(sum)) => sum,
        (true, None) => Tensor::zeros([vocab, d], &device),
        (false, _) => none(),
    };
    let [h, weight] = [h, weight].map(Tensor::into_dispatch);
    let d_h = d_h.autodiff().into_dispatch();
    let (sum, d_weight) = (sum.autodiff().into_dispatch(), d_weight.autodiff().into_dispatch());
    Tensor::from_dispatch(Dispatch::with_gradients(h, weight, sum, d_h, d_weight))
}

/// `a bᵀ`, in the precision of products.
fn product(a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    let [n, d] = a.dims();
    let [m, _] = b.dims();
    linear(a.reshape([1, n, d]), b, None).reshape([n, m])
}

/// [`Teacher`] on the tokens with a target.
#[expect(clippy::large_enum_variant, reason = "one for each pass, and what it points at is far larger")]
enum Taught<'a> {
    Whole(Tensor<2>, Tensor<2>),
    Top(&'a TopTokens),
}

fn log_softmax(z: Tensor<2>) -> Tensor<2> {
    let z = z.clone() - z.max_dim(1);
    z.clone() - z.exp().sum_dim(1).log()
}

/// The losses `[n, 1]` of a block's logits `z [n, vocab]`, whose first token is `from`, and the gradient of their sum.
fn block_loss(
    z: Tensor<2>,
    teacher: &Taught,
    from: usize,
    labels: Tensor<2, Int>,
    divergence: Divergence,
) -> (Tensor<2>, Tensor<2>) {
    let Divergence { beta, temperature, share } = divergence;
    let ([n, vocab], device) = (z.dims(), z.device());
    let plain = temperature == 1.0;
    let cooled = |z: Tensor<2>| if plain { z } else { z / temperature };
    let log_s = log_softmax(cooled(z.clone()));
    let s = log_s.clone().exp();
    let (apart, slope) = match teacher {
        Taught::Whole(hidden, head) => {
            let log_t = log_softmax(cooled(product(hidden.clone().narrow(0, from, n), head.clone())));
            distance(log_s.clone(), s.clone(), log_t, beta)
        }
        Taught::Top(TopTokens { k, ids, log_probs }) => {
            let k = *k;
            let chosen: Vec<i32> = ids[from * k..(from + n) * k].iter().map(|id| *id as i32).collect();
            let chosen = Tensor::<2, Int>::from_data(TensorData::new(chosen, [n, k]), &device);
            let given = log_probs[from * (k + 1)..(from + n) * (k + 1)].to_vec();
            let log_t = Tensor::<2>::from_data(TensorData::new(given, [n, k + 1]), &device);
            let of_top = s.clone().gather(1, chosen.clone());
            let rest = s.clone().scatter(1, chosen.clone(), of_top.clone().neg(), IndexingUpdateOp::Add);
            // Where nothing is left over, nothing has a slope either: any small number will do.
            let left = rest.clone().sum_dim(1).clamp_min(1e-30);
            let log_buckets = Tensor::cat(vec![log_s.clone().gather(1, chosen.clone()), left.clone().log()], 1);
            let buckets = Tensor::cat(vec![of_top, left.clone()], 1);
            let (apart, slope) = distance(log_buckets, buckets, log_t, beta);
            let of_rest = slope.clone().narrow(1, k, 1) / left;
            let slope = (rest * of_rest).scatter(1, chosen, slope.narrow(1, 0, k), IndexingUpdateOp::Add);
            (apart, slope)
        }
    };
    let slope = if plain { slope } else { slope / temperature };
    if share >= 1.0 {
        return (apart, slope);
    }
    let (log_p, p) = if plain {
        (log_s, s)
    } else {
        let log_p = log_softmax(z);
        (log_p.clone(), log_p.exp())
    };
    debug_assert!(p.dims() == [n, vocab]);
    let nats = log_p.gather(1, labels.clone()).neg();
    let ones = Tensor::<2>::ones([n, 1], &device);
    let of_nats = p.scatter(1, labels, ones.neg(), IndexingUpdateOp::Add);
    (apart * share + nats * (1.0 - share), slope * share + of_nats * (1.0 - share))
}

/// The distance of s = `log_s.exp()` from t, both `[n, outcomes]`: `[n, 1]`, and its slope by the logits of s.
fn distance(log_s: Tensor<2>, s: Tensor<2>, log_t: Tensor<2>, beta: f64) -> (Tensor<2>, Tensor<2>) {
    if beta <= 0.0 {
        let t = log_t.clone().exp();
        return ((t.clone() * (log_t - log_s)).sum_dim(1), s - t);
    }
    if beta >= 1.0 {
        let above = log_s - log_t;
        let apart = (s.clone() * above.clone()).sum_dim(1);
        return (apart.clone(), s * (above - apart));
    }
    // log m, from the larger of its two parts.
    let (ours, theirs) = (log_s.clone() + (-beta).ln_1p(), log_t.clone() + beta.ln());
    let more = theirs - ours.clone();
    let log_m = ours + more.clone().clamp_min(0.0) + more.abs().neg().exp().log1p();
    let of_s = log_s - log_m.clone();
    let apart_s = (s.clone() * of_s.clone()).sum_dim(1);
    let apart_t = (log_t.clone().exp() * (log_t - log_m)).sum_dim(1);
    let slope = s * (of_s - apart_s.clone()) * (1.0 - beta);
    (apart_t * beta + apart_s * (1.0 - beta), slope)
}
