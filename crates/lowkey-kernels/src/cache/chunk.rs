//! Attention of a chunk of new queries over keys and values of every head, those of the chunk among them.

use burn::backend::Dispatch;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use super::autodiff::CacheOps;
use super::{sizes, without_heads};
use crate::causal_attention::starts_tensor;
use crate::device::facts::is_cpu;
use crate::latent_attention::arguments::MlaDims;
use crate::linear::linear;
use crate::masked_attention::{Mask, attention, scores};

/// Queries of a row from which on blocks of scores pay: below, laying out the keys for them would take longer than the products.
const FEWEST: usize = 2;

/// Queries of a row from which on attention in latent space is that of a chunk. Fewer are bounded by reading the latents, which are then
/// read once for all heads; more are bounded by their products, and laying out the latents for the blocks of each head, 2L+R numbers per
/// key, is little beside 2L+R products per key and query.
pub(super) const LONG: usize = 32;

/// Keys and values of every head. Views are read where they lie: the filled part of a cache is one.
#[derive(Clone, Debug)]
pub struct Keys {
    /// What a head has to itself of its keys, `[batch, G, keys, N]`.
    pub own: Tensor<4>,
    /// What all heads share, `[batch, keys, R]`; it follows `own` in a key.
    pub shared: Option<Tensor<3>>,
    /// `[batch, G, keys, V]`
    pub values: Tensor<4>,
}

impl Keys {
    /// Made of `latents [batch, keys, L+R]` by `kv_b [H(N+V), L]` (arXiv 2405.04434, eqs. 42, 44 and 45); the shared part is the latents'
    /// own.
    pub fn of_latents(latents: Tensor<3>, kv_b: Tensor<2>, dims: MlaDims) -> Self {
        let MlaDims { heads, nope, rope, value, rank, .. } = dims;
        let [batch, keys, _] = latents.dims();
        let kv = linear(latents.clone().narrow(2, 0, rank), kv_b, None);
        let kv = kv.reshape([batch, keys, heads, nope + value]).swap_dims(1, 2);
        let shared = (rope > 0).then(|| latents.narrow(2, rank, rope));
        Self { own: kv.clone().narrow(3, 0, nope), shared, values: kv.narrow(3, nope, value) }
    }

    /// Whole keys, `[batch, G, keys, N+R]`.
    pub fn whole(&self) -> Tensor<4> {
        let [batch, groups, keys, _] = self.own.dims();
        match &self.shared {
            None => self.own.clone(),
            Some(shared) => {
                let [.., width] = shared.dims();
                let shared = shared.clone().unsqueeze_dim::<4>(1).expand([batch, groups, keys, width]);
                Tensor::cat(vec![self.own.clone(), shared], 3)
            }
        }
    }

    /// The shared part as an operation takes it; where there is none, a single number stands in for it and is not read.
    fn shared_or_none(&self) -> (Tensor<3>, usize) {
        let none = || (Tensor::zeros([1, 1, 1], &self.own.device()), 0);
        self.shared.clone().map_or_else(none, |shared| (shared.clone(), shared.dims()[2]))
    }

    fn check(&self, q: &Tensor<4>, rows: usize, what: &str) {
        let [batch, _, heads, width] = q.dims();
        let [_, groups, keys, own] = self.own.dims();
        let (_, shared) = self.shared_or_none();
        assert!(
            self.own.dims()[0] == batch
                && self.values.dims()[..3] == [batch, groups, keys]
                && self.shared.as_ref().is_none_or(|shared| shared.dims()[..2] == [batch, keys])
                && width == own + shared
                && heads.is_multiple_of(groups)
                && rows == batch,
            "{what}: q {:?}, keys {:?} and {shared} shared, values {:?}, {rows} rows do not fit",
            q.dims(),
            self.own.dims(),
            self.values.dims(),
        );
    }
}

/// Softmax attention of a chunk: query `t` of row `b` sees the keys `0..=offsets[b] + t`, as far as there are any. Query head `h` of `H`
/// reads key head `h / (H/G)`. On the CPU no score outlives its block, as in [`crate::causal_attention`]; elsewhere, and for a single
/// query, it is [`attention`] under `mask`. No gradient flows through it.
///
/// # Shapes
/// `q [batch, seq, H, N+R]`, `offsets` of length `batch` → `[batch, seq, H·V]`.
pub fn chunk_attention(q: Tensor<4>, keys: Keys, offsets: &[usize], mask: &dyn Fn() -> Mask, scale: f64) -> Tensor<3> {
    let [batch, seq, heads, _] = q.dims();
    keys.check(&q, offsets.len(), "chunk_attention");
    if !is_cpu(&q.device()) || q.dtype() != DType::F32 || seq < FEWEST {
        let [.., of_keys, value] = keys.values.dims();
        // What is in slots behind the last query's key may be no number, and 0 times that is none.
        let seen = offsets.iter().map(|offset| offset + seq).max().map_or(of_keys, |seen| seen.min(of_keys));
        let (k, v) = (keys.whole().narrow(2, 0, seen), keys.values.narrow(2, 0, seen));
        let out = attention(q.swap_dims(1, 2), k, v, &mask().first_keys(seen), scale);
        return out.swap_dims(1, 2).reshape([batch, seq, heads * value]);
    }
    let ((shared, width), at) = (keys.shared_or_none(), offsets_tensor(offsets, &q.device()));
    let (own, values) = (keys.own.into_dispatch(), keys.values.into_dispatch());
    let (q, shared, at) = (q.into_dispatch(), shared.into_dispatch(), at.into_dispatch());
    Tensor::from_dispatch(Dispatch::chunk_attention(q, own, shared, values, at, width, scale))
}

/// [`chunk_attention`] over cached latents, keys and values being made of them ("expanded"): L(N+V) products per head and key of each
/// chunk, N+R+V per pair and head. On the CPU they exist for one head and one block of keys at a time.
///
/// Rebuilding is L(N+V)/(seq · (N+R+V)) of what the pairs take behind a long past: with L = 64, N = V = 32 and R = 16 a tenth for 512
/// queries, where in latent space each pair takes 2L+R products, 1.8 times as many.
///
/// # Shapes
/// `q [batch, seq, H, N+R]`, `latents [batch, keys, L+R]` or `[batch, 1, keys, L+R]`, `kv_b [H(N+V), L]`, `offsets` of length `batch` →
/// `[batch, seq, H·V]`.
pub fn expanded_attention<const D: usize>(
    q: Tensor<4>,
    latents: Tensor<D>,
    kv_b: Tensor<2>,
    offsets: &[usize],
    mask: &dyn Fn() -> Mask,
    dims: MlaDims,
) -> Tensor<3> {
    let ([batch, seq, heads, width], MlaDims { nope, rope, value, rank, .. }) = (q.dims(), dims);
    let [rows, _, of_latents] = sizes(latents.dims());
    assert!(
        [heads, width] == [dims.heads, nope + rope]
            && [rows, of_latents] == [batch, rank + rope]
            && kv_b.dims() == [heads * (nope + value), rank]
            && offsets.len() == batch,
        "expanded_attention: q {:?}, latents {:?}, kv_b {:?}, {} rows do not fit {dims:?}",
        q.dims(),
        latents.dims(),
        kv_b.dims(),
        offsets.len(),
    );
    if !is_cpu(&q.device()) || q.dtype() != DType::F32 || seq < FEWEST {
        return chunk_attention(q, Keys::of_latents(without_heads(latents), kv_b, dims), offsets, mask, dims.scale);
    }
    let at = offsets_tensor(offsets, &q.device()).into_dispatch();
    let (q, latents, kv_b) = (q.into_dispatch(), latents.into_dispatch(), kv_b.into_dispatch());
    Tensor::from_dispatch(Dispatch::expanded_attention(q, latents, kv_b, at, dims))
}

/// The largest attention logit of whole rows, `[1]`: of query `t` and a key `document_starts[t] ≤ j ≤ t`; NaN where one of them is none.
/// On the CPU no score outlives its block. No gradient flows through it.
///
/// # Shapes
/// `q [batch, seq, H, N+R]`, as many keys, `document_starts` of length `batch · seq`.
pub fn largest_logit(q: Tensor<4>, keys: Keys, document_starts: &[u32], scale: f64) -> Tensor<1> {
    let ([batch, seq, ..], device) = (q.dims(), q.device());
    keys.check(&q, batch, "largest_logit");
    assert_eq!(document_starts.len(), batch * seq, "largest_logit: document starts");
    if !is_cpu(&device) || q.dtype() != DType::F32 {
        let mask = Mask::documents(document_starts, seq, &device);
        let scores = scores(q.swap_dims(1, 2), keys.whole(), &mask, scale);
        // Said apart: not every device's maximum keeps it.
        let none = scores.clone().is_nan().any();
        return scores.max().mask_fill(none, f32::NAN);
    }
    let (shared, width) = keys.shared_or_none();
    let starts = starts_tensor(document_starts, [batch, seq], &device).into_dispatch();
    let (q, own, shared) = (q.into_dispatch(), keys.own.into_dispatch(), shared.into_dispatch());
    Tensor::<3>::from_dispatch(Dispatch::largest_logits(q, own, shared, starts, width, scale)).max()
}

/// [`super::absorbed_attention`] of a long chunk on the CPU: one key head, whose key is the latent with the shared key and whose value is
/// the latent. It takes 2L+R products per pair and head where rebuilt keys and values take N+R+V: who wants the fewest products has
/// keys and values rebuilt, and who asks for latent space, such as a comparison of weights that have the maps multiplied in, gets it.
pub(super) fn absorbed_attention(
    q: Tensor<4>,
    latents: Tensor<3>,
    kv_b: Option<Tensor<2>>,
    offsets: &[usize],
    dims: MlaDims,
) -> Tensor<3> {
    let MlaDims { heads, nope, rope, value, rank, scale, .. } = dims;
    let [batch, seq, ..] = q.dims();
    let tokens = batch * seq;
    let by_head = |x: Tensor<4>, width| x.reshape([tokens, heads, width]).swap_dims(0, 1);
    let by_token = |x: Tensor<3>, width| x.swap_dims(0, 1).reshape([batch, seq, heads, width]);
    let maps = kv_b.map(|kv_b| {
        let maps = kv_b.reshape([heads, nope + value, rank]);
        [maps.clone().narrow(1, 0, nope), maps.narrow(1, nope, value).swap_dims(1, 2)]
    });
    let q = match &maps {
        None => q,
        Some([w_uk, _]) => {
            let own = by_head(q.clone().narrow(3, 0, nope), nope).matmul(w_uk.clone());
            let own = by_token(own, rank);
            if rope > 0 { Tensor::cat(vec![own, q.narrow(3, nope, rope)], 3) } else { own }
        }
    };
    let own = latents.unsqueeze_dim::<4>(1);
    let values = own.clone().narrow(3, 0, rank);
    let (keys, device) = (Keys { own, shared: None, values }, q.device());
    let [_, _, of_keys, _] = keys.own.dims();
    let out = chunk_attention(q, keys, offsets, &|| Mask::cached(offsets, seq, of_keys, &device), scale);
    match maps {
        None => out,
        Some([_, w_uv]) => {
            let out = by_head(out.reshape([batch, seq, heads, rank]), rank).matmul(w_uv);
            by_token(out, value).reshape([batch, seq, heads * value])
        }
    }
}

/// Tokens of each row before a chunk, for a kernel.
pub(super) fn offsets_tensor(offsets: &[usize], device: &Device) -> Tensor<1, Int> {
    let at: Vec<i32> = offsets.iter().map(|offset| *offset as i32).collect();
    Tensor::from_data(TensorData::new(at, [offsets.len()]), device)
}
