//! The entry points: tensors in, tensors out, fused where there is a fused implementation for their dtype.

use burn::backend::Dispatch;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use lowkey_batch::IGNORE;

use crate::ops::{AttentionShape, FusedOps};
use crate::{precision, reference};

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

/// Token embedding: the rows of `weight` that the ids name.
///
/// # Shapes
/// `weight [vocab, d]`, `ids [batch, seq]` → `[batch, seq, d]`.
pub fn embed(weight: Tensor<2>, ids: Tensor<2, Int>) -> Tensor<3> {
    if weight.dtype() != DType::F32 {
        return reference::embed(weight, ids);
    }
    Tensor::from_dispatch(Dispatch::embed(weight.into_dispatch(), ids.into_dispatch()))
}

/// Root-mean-square normalisation over the last axis: `x / sqrt(mean(x²) + eps) · weight` (Zhang & Sennrich,
/// arXiv 1910.07467, eq. 4).
///
/// # Shapes
/// `x [..., d]`, `weight [d]` → `[..., d]`.
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    if x.dtype() != DType::F32 {
        return reference::rms_norm(x, weight, eps);
    }
    Tensor::from_dispatch(Dispatch::rms_norm(x.into_dispatch(), weight.into_dispatch(), eps))
}

/// Rotary position embedding (Su et al., arXiv 2104.09864) of R components of each head, from component `from` on; the others
/// are copied.
///
/// With `interleaved` the rotated pairs are `(x[2i], x[2i+1])` of those R, else `(x[i], x[i + R/2])`. The result is always in
/// half-split order (all first components, then all second ones): dot products between two rotated tensors do not depend
/// on the order, and one order for the cache serves both conventions.
///
/// # Shapes
/// `x [batch, seq, heads, width ≥ from + R]`, `cos` and `sin [batch or 1, seq, 1, R/2]` → `[batch, seq, heads, width]`.
pub fn rotate(x: Tensor<4>, cos: Tensor<4>, sin: Tensor<4>, from: usize, interleaved: bool) -> Tensor<4> {
    if x.dtype() != DType::F32 {
        return reference::rotate(x, cos, sin, from, interleaved);
    }
    let (x, cos, sin) = (x.into_dispatch(), cos.into_dispatch(), sin.into_dispatch());
    Tensor::from_dispatch(Dispatch::rotate(x, cos, sin, from, interleaved))
}

/// Causal softmax attention within documents, over whole sequences: the form for training.
///
/// Query `t` of a row sees keys `document_starts[t] ≤ j ≤ t`; the starts must not fall along a row. Query head `h` of `H`
/// reads key head `h / (H/G)` of `G`; the last R components of every key are `k_pe`, shared by all heads and not copied.
/// Neither scores nor probabilities exist beyond one block, in either direction.
///
/// # Shapes
/// `q [batch, seq, H, N+R]`, `kv [batch, seq, G, N+V]` (key without position, then value), `k_pe [batch, seq, R]`,
/// `document_starts` of length `batch · seq` → `[batch, seq, H·V]`.
pub fn causal_attention(
    q: Tensor<4>,
    kv: Tensor<4>,
    k_pe: Option<Tensor<3>>,
    document_starts: &[u32],
    nope: usize,
    scale: f64,
) -> Tensor<3> {
    if q.dtype() != DType::F32 {
        return reference::causal_attention(q, kv, k_pe, document_starts, nope, scale);
    }
    let [batch, seq, heads, q_width] = q.dims();
    let [_, _, groups, kv_width] = kv.dims();
    let shared = k_pe.as_ref().map_or(0, |k_pe| k_pe.dims()[2]);
    assert!(
        kv.dims()[..2] == [batch, seq]
            && q_width == nope + shared
            && kv_width > nope
            && heads.is_multiple_of(groups)
            && document_starts.len() == batch * seq,
        "causal_attention: q {:?}, kv {:?}, shared key {shared}, own key {nope}, {} starts do not fit",
        q.dims(),
        kv.dims(),
        document_starts.len()
    );
    let device = q.device();
    let starts = starts_tensor(document_starts, [batch, seq], &device);
    // Where no part of a key is shared, a single number stands in for it and is not read.
    let k_pe = k_pe.unwrap_or_else(|| Tensor::zeros([1, 1, 1], &device));
    let (q, kv, k_pe) = (q.into_dispatch(), kv.into_dispatch(), k_pe.into_dispatch());
    let shape = AttentionShape { nope, rope: shared, scale, precision: precision::current() };
    Tensor::from_dispatch(Dispatch::causal_attention(q, kv, k_pe, starts.into_dispatch(), shape))
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

/// Document starts `[batch, seq]` for a kernel, which relies on their order to leave blocks of keys out.
pub(crate) fn starts_tensor(document_starts: &[u32], shape: [usize; 2], device: &Device) -> Tensor<2, Int> {
    debug_assert!(document_starts.chunks(shape[1]).all(<[u32]>::is_sorted), "document starts fall along a row");
    let starts: Vec<i32> = document_starts.iter().map(|start| *start as i32).collect();
    Tensor::from_data(TensorData::new(starts, shape), device)
}

fn target_tensor(targets: &[i64], device: &Device) -> Tensor<1, Int> {
    let targets: Vec<i32> = targets.iter().map(|t| if *t == IGNORE { -1 } else { *t as i32 }).collect();
    let n = targets.len();
    Tensor::from_data(TensorData::new(targets, [n]), device)
}

#[cfg(test)]
mod tests;
