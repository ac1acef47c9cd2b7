//! The operations on a cache in plain tensor operations.

use burn::tensor::{Int, Tensor};

use crate::latent_attention::arguments::MlaDims;
use crate::masked_attention::{Mask, attention, products};

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
