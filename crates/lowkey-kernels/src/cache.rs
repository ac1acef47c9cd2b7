//! What a cache stores, and attention straight from it.

pub(crate) mod autodiff;
mod chunk;
mod cpu;
pub(crate) mod reference;
#[cfg(test)]
mod tests;

use burn::backend::Dispatch;
use burn::tensor::{DType, FloatDType, Int, IntDType, Tensor};

pub use self::chunk::{Keys, chunk_attention, expanded_attention, largest_logit};
pub use crate::masked_attention::{Mask, attention, scores};

use self::autodiff::CacheOps;
use self::chunk::offsets_tensor;
use crate::device::facts::is_cpu;
use crate::latent_attention::arguments::MlaDims;
use crate::precision;

/// Cached vectors in the format that they are stored in.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "one per buffer; a box would stand between every use and the tensors")]
pub enum Stored<const D: usize> {
    /// As floating-point numbers of any width, `[.., keys, width]`.
    Float(Tensor<D>),
    /// As symmetric 8-bit integers with f32 scales. A vector is cut in two parts, the first `split` numbers and the rest, if
    /// any, each with a scale of its own: the largest magnitude of the part divided by 127. Number = code · scale, codes are
    /// −127 to 127. A part of zeros has scale 0, a part with a NaN or an infinity has scale NaN.
    Int8 {
        /// `[.., keys, width]`, 8 bits each.
        codes: Tensor<D, Int>,
        /// `[.., keys, 2]`, or `[.., keys, 1]` where `split` is the whole width.
        scales: Tensor<D>,
        /// Numbers of the first part.
        split: usize,
    },
}

impl<const D: usize> From<Tensor<D>> for Stored<D> {
    fn from(tensor: Tensor<D>) -> Self {
        Self::Float(tensor)
    }
}

impl<const D: usize> Stored<D> {
    /// Vectors `[.., keys, width]` as [`Stored::Int8`].
    pub fn quantise(x: Tensor<D>, split: usize) -> Self {
        if is_cpu(&x.device()) && x.dtype() == DType::F32 {
            let (codes, scales) = Dispatch::quantise(x.into_dispatch(), split);
            return Self::Int8 { codes: Tensor::from_dispatch(codes), scales: Tensor::from_dispatch(scales), split };
        }
        let (codes, scales) = reference::quantise(x, split);
        let (codes, scales) = (codes.cast(IntDType::I8), scales.cast(FloatDType::F32));
        Self::Int8 { codes, scales, split }
    }

    /// The vectors as floating-point numbers of the given format; a copy where they are stored in another.
    pub fn widen(self, dtype: DType) -> Tensor<D> {
        let half = |dtype| matches!(dtype, DType::BF16 | DType::F16);
        match self {
            Self::Float(x) if x.dtype() == dtype => x,
            Self::Float(x) if is_cpu(&x.device()) && dtype == DType::F32 && half(x.dtype()) => {
                Tensor::from_dispatch(Dispatch::widen(x.into_dispatch()))
            }
            Self::Float(x) => cast(x, dtype),
            Self::Int8 { codes, scales, split } if is_cpu(&scales.device()) && dtype == DType::F32 => {
                Tensor::from_dispatch(Dispatch::widen_int8(codes.into_dispatch(), scales.into_dispatch(), split))
            }
            Self::Int8 { codes, scales, split } => cast(reference::widen(codes, scales, split), dtype),
        }
    }
}

/// A cast between any two formats of floating-point numbers.
fn cast<const D: usize>(x: Tensor<D>, dtype: DType) -> Tensor<D> {
    x.cast(match dtype {
        DType::F64 => FloatDType::F64,
        DType::F16 => FloatDType::F16,
        DType::BF16 => FloatDType::BF16,
        _ => FloatDType::F32,
    })
}

/// Attention of new queries over cached latents, in latent space ("absorbed", arXiv 2405.04434 §2.1.2): `q̃ = W_UKᵀ q_nope`
/// attends over the latents themselves, and W_UV maps the result. No key and no value of a head ever exists, and each cached
/// token is read once for all heads, in the format that it is stored in. Without `kv_b`, queries come already mapped and the
/// result leaves as it is, for weights that have the maps multiplied in ("fused").
///
/// Long chunks go through blocks of scores as in [`chunk_attention`], the latents being the keys and values of one head.
///
/// Query `t` of row `b` sees the cached tokens `0..=offsets[b] + t`, as far as there are any. No gradient flows through it.
///
/// In bf16 ([`precision::scope`]) and over latents that are stored so, queries and weights are rounded to it where the processor has a unit
/// for such products that is faster (Intel's AMX).
///
/// # Shapes
/// `cache [batch, keys, L+R]` or `[batch, 1, keys, L+R]` (latent after its norm, then rotated shared key; of [`Stored::Int8`] the first
/// part is the latent), `offsets` of length `batch`. With `kv_b [H(N+V), L]`: `q [batch, seq, H, N+R]` (rotated) → `[batch, seq, H·V]`.
/// Without: `q [batch, seq, H, L+R]` → `[batch, seq, H·L]`.
pub fn absorbed_attention<const D: usize>(
    q: Tensor<4>,
    cache: impl Into<Stored<D>>,
    kv_b: Option<Tensor<2>>,
    offsets: &[usize],
    dims: MlaDims,
) -> Tensor<3> {
    let cache = cache.into();
    let [batch, _, _, of_query] = q.dims();
    let [rows, keys, width] = sizes(match &cache {
        Stored::Float(latents) => latents.dims(),
        Stored::Int8 { codes, .. } => codes.dims(),
    });
    let expected = if kv_b.is_some() { dims.nope + dims.rope } else { width };
    assert!(
        of_query == expected
            && [rows, offsets.len()] == [batch; 2]
            && offsets.iter().all(|offset| *offset < keys)
            && width == dims.rank + dims.rope,
        "absorbed_attention: q {:?}, cache {cache:?}, offsets {offsets:?} do not fit {dims:?}",
        q.dims(),
    );
    if !is_cpu(&q.device()) || q.dtype() != DType::F32 {
        let cache = without_heads(cache.widen(q.dtype()));
        return reference::absorbed_attention(q, cache, kv_b, offsets, dims);
    }
    let [_, seq, ..] = q.dims();
    if seq >= chunk::LONG {
        return chunk::absorbed_attention(q, without_heads(cache.widen(DType::F32)), kv_b, offsets, dims);
    }
    let at = offsets_tensor(offsets, &q.device()).into_dispatch();
    let kv_b = kv_b.unwrap_or_else(|| Tensor::empty([0, dims.rank], &q.device())).into_dispatch();
    let q = q.into_dispatch();
    Tensor::from_dispatch(match cache {
        Stored::Float(latents) => {
            Dispatch::absorbed_attention(q, latents.into_dispatch(), kv_b, at, dims, precision::current())
        }
        Stored::Int8 { codes, scales, .. } => {
            let (codes, scales) = (codes.into_dispatch(), scales.into_dispatch());
            Dispatch::absorbed_attention_int8(q, codes, scales, kv_b, at, dims)
        }
    })
}

/// Sequences, keys and width of latents, which may have an axis of one head between the first two.
fn sizes<const D: usize>(dims: [usize; D]) -> [usize; 3] {
    assert!(D == 3 || D == 4 && dims[1] == 1, "latents {dims:?} are [batch, keys, width] or [batch, 1, keys, width]");
    [dims[0], dims[D - 2], dims[D - 1]]
}

/// Latents without the axis of their one head. Of a part of a longer buffer this is a copy.
fn without_heads<const D: usize>(latents: Tensor<D>) -> Tensor<3> {
    let sizes = sizes(latents.dims());
    latents.reshape(sizes)
}
