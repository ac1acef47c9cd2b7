//! Every fused operation as a composition of ordinary tensor operations.
//!
//! It runs on every backend and in every floating-point dtype, and it is what the fused implementations are held to. Slow
//! and hungry: whole score and logit matrices exist.

use burn::tensor::module::embedding;
use burn::tensor::{Int, Tensor, activation::log_softmax, activation::sigmoid};

use crate::attention::{Mask, attention, products};
use crate::block::{LatentWeights, MlaDims, MlpWeights};

/// See [`crate::embed`].
pub fn embed(weight: Tensor<2>, ids: Tensor<2, Int>) -> Tensor<3> {
    embedding(weight, ids)
}

/// See [`crate::linear`]; without a bias.
pub fn linear(x: Tensor<3>, weight: Tensor<2>) -> Tensor<3> {
    let [batch, seq, d_in] = x.dims();
    let [d_out, _] = weight.dims();
    // One tall product: a batched one would repeat the packing of W for every row of the batch.
    x.reshape([batch * seq, d_in]).matmul(weight.transpose()).reshape([batch, seq, d_out])
}

/// See [`crate::gated_mlp`].
pub fn gated_mlp(x: Tensor<3>, weights: MlpWeights, eps: f64) -> Tensor<3> {
    let normed = rms_norm(x.clone(), weights.norm, eps);
    let (gate, up) = (linear(normed.clone(), weights.gate), linear(normed, weights.up));
    x + linear(gate.clone() * sigmoid(gate) * up, weights.down)
}

/// See [`crate::latent_attention`].
pub fn latent_attention(
    q: Tensor<4>,
    kv_a: Tensor<3>,
    weights: LatentWeights,
    document_starts: &[u32],
    dims: MlaDims,
) -> Tensor<3> {
    let MlaDims { heads, nope, rope, value, rank, scale, latent_scale, latent_eps, interleave } = dims;
    let [batch, seq, _] = kv_a.dims();
    let c_kv = rms_norm(kv_a.clone().narrow(2, 0, rank), weights.norm, latent_eps) * latent_scale;
    let k_pe = (rope > 0).then(|| {
        let k_pe = kv_a.narrow(2, rank, rope).unsqueeze_dim::<4>(2);
        rotate(k_pe, weights.cos, weights.sin, 0, interleave).squeeze_dim::<3>(2)
    });
    let kv = linear(c_kv, weights.kv_b).reshape([batch, seq, heads, nope + value]);
    causal_attention(q, kv, k_pe, document_starts, nope, scale)
}

/// See [`crate::cache::absorbed_attention`].
pub fn absorbed_attention(
    q: Tensor<4>,
    cache: Tensor<3>,
    kv_b: Option<Tensor<2>>,
    offsets: &[usize],
    dims: MlaDims,
) -> Tensor<3> {
    let MlaDims { heads, nope, rope, value, rank, scale, .. } = dims;
    let [batch, seq, ..] = q.dims();
    let [_, keys, width] = cache.dims();
    let q = q.swap_dims(1, 2);
    let maps = kv_b.map(|kv_b| {
        let w = kv_b.reshape([1, heads, nope + value, rank]);
        let part = |from, rows| w.clone().narrow(2, from, rows).expand([batch, heads, rows, rank]);
        (part(0, nope), part(nope, value))
    });
    let (q, w_uv) = match maps {
        Some((w_uk, w_uv)) => {
            let q_nope = products(q.clone().narrow(3, 0, nope), w_uk);
            let q = if rope > 0 { Tensor::cat(vec![q_nope, q.narrow(3, nope, rope)], 3) } else { q_nope };
            (q, Some(w_uv))
        }
        None => (q, None),
    };
    let mask = Mask::cached(offsets, seq, keys, &q.device());
    let cache = cache.reshape([batch, 1, keys, width]);
    let out = attention(q, cache.clone(), cache.narrow(3, 0, rank), &mask, scale);
    let out = match w_uv {
        Some(w_uv) => products(out, w_uv.swap_dims(2, 3)),
        None => out,
    };
    let [.., width] = out.dims();
    out.swap_dims(1, 2).reshape([batch, seq, heads * width])
}

/// Codes, as whole floating-point numbers become integers, and scales of [`crate::cache::Stored::Int8`].
pub fn quantise<const D: usize>(x: Tensor<D>, split: usize) -> (Tensor<D, Int>, Tensor<D>) {
    let width = x.dims()[D - 1];
    let parts = [(0, split.min(width)), (split.min(width), width - split.min(width))];
    let parts = parts.into_iter().filter(|(_, len)| *len > 0).map(|(from, len)| {
        let part = x.clone().narrow(D - 1, from, len);
        // A number that is none makes the sum none, as it makes 0 times the sum.
        let scale = part.clone().abs().max_dim(D - 1) / 127.0 + part.clone().sum_dim(D - 1) * 0.0;
        let step = scale.clone().mask_fill(scale.clone().equal_elem(0.0), 1.0);
        let codes = (part / step).round().clamp(-127.0, 127.0);
        (codes.clone().mask_fill(codes.is_nan(), 0.0).int(), scale)
    });
    let (codes, scales) = parts.unzip();
    (Tensor::cat(codes, D - 1), Tensor::cat(scales, D - 1))
}

/// The numbers of [`crate::cache::Stored::Int8`].
pub fn widen<const D: usize>(codes: Tensor<D, Int>, scales: Tensor<D>, split: usize) -> Tensor<D> {
    let width = codes.dims()[D - 1];
    let codes = codes.float();
    let first = codes.clone().narrow(D - 1, 0, split.min(width)) * scales.clone().narrow(D - 1, 0, 1);
    if split >= width {
        return first;
    }
    let second = codes.narrow(D - 1, split, width - split) * scales.narrow(D - 1, 1, 1);
    Tensor::cat(vec![first, second], D - 1)
}

/// See [`crate::rms_norm`].
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    let inv = (x.clone().square().mean_dim(D - 1) + eps).sqrt().recip();
    x * inv * weight.unsqueeze()
}

/// See [`crate::rotate`].
pub fn rotate(x: Tensor<4>, cos: Tensor<4>, sin: Tensor<4>, from: usize, interleaved: bool) -> Tensor<4> {
    let [batch, seq, heads, width] = x.dims();
    let half = cos.dims()[3];
    let part = x.clone().narrow(3, from, 2 * half);
    let (first, second) = if interleaved {
        let pairs = part.reshape([batch, seq, heads * half, 2]);
        let one = |i| pairs.clone().narrow(3, i, 1).reshape([batch, seq, heads, half]);
        (one(0), one(1))
    } else {
        (part.clone().narrow(3, 0, half), part.narrow(3, half, half))
    };
    let turned_first = first.clone() * cos.clone() - second.clone() * sin.clone();
    let turned_second = first * sin + second * cos;
    let mut parts = vec![turned_first, turned_second];
    if from > 0 {
        parts.insert(0, x.clone().narrow(3, 0, from));
    }
    let after = width - from - 2 * half;
    if after > 0 {
        parts.push(x.narrow(3, width - after, after));
    }
    Tensor::cat(parts, 3)
}

/// See [`crate::causal_attention`].
pub fn causal_attention(
    q: Tensor<4>,
    kv: Tensor<4>,
    k_pe: Option<Tensor<3>>,
    document_starts: &[u32],
    nope: usize,
    scale: f64,
) -> Tensor<3> {
    let [batch, seq, heads, _] = q.dims();
    let [_, _, groups, width] = kv.dims();
    let mask = Mask::documents(document_starts, seq, &q.device());
    let k_nope = kv.clone().narrow(3, 0, nope);
    let v = kv.narrow(3, nope, width - nope);
    let k = match k_pe {
        Some(k_pe) => {
            let rope = k_pe.dims()[2];
            let shared = k_pe.unsqueeze_dim::<4>(2).expand([batch, seq, groups, rope]);
            Tensor::cat(vec![k_nope, shared], 3)
        }
        None => k_nope,
    };
    let out = attention(q.swap_dims(1, 2), k.swap_dims(1, 2), v.swap_dims(1, 2), &mask, scale);
    out.swap_dims(1, 2).reshape([batch, seq, heads * (width - nope)])
}

/// `−log softmax(W h)[target]` of each token, 0 where the target is negative. See [`crate::loss::cross_entropy_each`].
pub fn cross_entropy_each(h: Tensor<2>, weight: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let [n] = targets.dims();
    let ignored = targets.clone().lower_elem(0);
    let index = targets.clamp_min(0).reshape([n, 1]);
    let picked = log_softmax(h.matmul(weight.transpose()), 1).gather(1, index).reshape([n]);
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
    let logits = h.clone().matmul(weight.clone().transpose());
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
    let log_p = log_softmax(teacher.detach().matmul(weight.clone().detach().transpose()), 1);
    let log_q = log_softmax(h.clone().matmul(weight.clone().transpose()), 1);
    let [n] = targets.dims();
    let apart = (log_p.clone().exp() * (log_p - log_q)).sum_dim(1).reshape([n]).mask_fill(ignored, 0.0f32);
    (apart * share + cross_entropy_each(h, weight, targets) * (1.0 - share)).sum()
}
