//! The entry points to the parts of a decoder block.

use burn::backend::Dispatch;
use burn::tensor::{DType, Int, Tensor, TensorData};

use crate::block_ops::BlockOps;
use crate::fused::starts_tensor;
use crate::reference;

/// Sizes and factors of a Multi-head Latent Attention, in the symbols of DeepSeek-V2 (arXiv 2405.04434).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MlaDims {
    /// H
    pub heads: usize,
    /// N
    pub nope: usize,
    /// R
    pub rope: usize,
    /// V
    pub value: usize,
    /// L
    pub rank: usize,
    /// Softmax scale.
    pub scale: f64,
    /// Factor on the normalised latent.
    pub latent_scale: f64,
    /// ε of the latent's norm.
    pub latent_eps: f64,
    /// Rotate adjacent pairs.
    pub interleave: bool,
}

/// `x · Wᵀ (+ b)` with the weight as Hugging Face stores it.
///
/// # Shapes
/// `x [batch, seq, d_in]`, `weight [d_out, d_in]`, `bias [d_out]` → `[batch, seq, d_out]`.
pub fn linear(x: Tensor<3>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<3> {
    let y = if x.dtype() == DType::F32 {
        Tensor::from_dispatch(Dispatch::project(x.into_dispatch(), weight.into_dispatch()))
    } else {
        reference::linear(x, weight)
    };
    match bias {
        Some(bias) => y + bias.unsqueeze::<3>(),
        None => y,
    }
}

/// `residual + x · Wᵀ (+ b)`, in one pass over the result.
///
/// # Shapes
/// As [`linear`]; `residual [batch, seq, d_out]`.
pub fn add_linear(residual: Tensor<3>, x: Tensor<3>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<3> {
    let y = if x.dtype() == DType::F32 {
        let (residual, x) = (residual.into_dispatch(), x.into_dispatch());
        Tensor::from_dispatch(Dispatch::add_project(residual, x, weight.into_dispatch()))
    } else {
        residual + reference::linear(x, weight)
    };
    match bias {
        Some(bias) => y + bias.unsqueeze::<3>(),
        None => y,
    }
}

/// The weights of [`gated_mlp`].
#[derive(Clone, Debug)]
pub struct MlpWeights {
    /// Gain of the norm, `[d]`.
    pub norm: Tensor<1>,
    /// `[f, d]`
    pub gate: Tensor<2>,
    /// `[f, d]`
    pub up: Tensor<2>,
    /// `[d, f]`
    pub down: Tensor<2>,
}

/// The second half of a pre-norm block with SwiGLU (Shazeer, arXiv 2002.05202): `x + down(silu(gate n) · up n)` with
/// `n = RMSNorm(x)` and `silu(x) = x · sigmoid(x)`.
///
/// Keeps `gate n` and `up n` for the backward pass, which forms the rest anew.
///
/// # Shapes
/// `x [batch, seq, d]` → `[batch, seq, d]`.
pub fn gated_mlp(x: Tensor<3>, weights: MlpWeights, eps: f64) -> Tensor<3> {
    if x.dtype() != DType::F32 {
        return reference::gated_mlp(x, weights, eps);
    }
    let MlpWeights { norm, gate, up, down } = weights;
    let (norm, gate) = (norm.into_dispatch(), gate.into_dispatch());
    let (up, down) = (up.into_dispatch(), down.into_dispatch());
    Tensor::from_dispatch(Dispatch::gated_mlp(x.into_dispatch(), norm, gate, up, down, eps))
}

/// The weights and tables that make keys and values of a latent.
#[derive(Clone, Debug)]
pub struct LatentWeights {
    /// Gain of the latent's norm, `[L]`.
    pub norm: Tensor<1>,
    /// W_UK and W_UV, `[H(N+V), L]`; rows per head: N of the key, V of the value.
    pub kv_b: Tensor<2>,
    /// Cosines of the positions, `[batch or 1, seq, 1, R/2]`.
    pub cos: Tensor<4>,
    /// Sines of the positions.
    pub sin: Tensor<4>,
}

/// Multi-head Latent Attention over whole sequences, causal within documents, from the projected latent on: the form for
/// training. Queries and their documents are as in [`crate::causal_attention`].
///
/// The latent's norm, the shared key's rotation and all heads' keys and values exist only while this runs; the backward pass
/// forms them anew from `kv_a`, at the price of one product with W_UK and W_UV.
///
/// # Shapes
/// `q [batch, seq, H, N+R]` (rotated), `kv_a [batch, seq, L+R]` (latent before its norm, shared key before its rotation),
/// `document_starts` of length `batch · seq` → `[batch, seq, H·V]`.
pub fn latent_attention(
    q: Tensor<4>,
    kv_a: Tensor<3>,
    weights: LatentWeights,
    document_starts: &[u32],
    dims: MlaDims,
) -> Tensor<3> {
    if q.dtype() != DType::F32 {
        return reference::latent_attention(q, kv_a, weights, document_starts, dims);
    }
    let [batch, seq, ..] = q.dims();
    assert!(
        q.dims() == [batch, seq, dims.heads, dims.nope + dims.rope]
            && kv_a.dims() == [batch, seq, dims.rank + dims.rope]
            && weights.kv_b.dims() == [dims.heads * (dims.nope + dims.value), dims.rank]
            && document_starts.len() == batch * seq,
        "latent_attention: q {:?}, kv_a {:?}, kv_b {:?}, {} starts do not fit {dims:?}",
        q.dims(),
        kv_a.dims(),
        weights.kv_b.dims(),
        document_starts.len()
    );
    let starts = starts_tensor(document_starts, [batch, seq], &q.device());
    let LatentWeights { norm, kv_b, cos, sin } = weights;
    Tensor::from_dispatch(Dispatch::latent_attention(
        q.into_dispatch(),
        kv_a.into_dispatch(),
        norm.into_dispatch(),
        kv_b.into_dispatch(),
        cos.into_dispatch(),
        sin.into_dispatch(),
        starts.into_dispatch(),
        dims,
    ))
}

/// Attention of new queries over cached latents, in latent space ("absorbed", arXiv 2405.04434 §2.1.2): `q̃ = W_UKᵀ q_nope`
/// attends over the latents themselves, and W_UV maps the result. No key and no value of a head ever exists, and each cached
/// token is read once for all heads. Without `kv_b`, queries come already mapped and the result leaves as it is, for weights that
/// have the maps multiplied in ("fused").
///
/// Query `t` of row `b` sees the cached tokens `0..=offsets[b] + t`, as far as there are any. No gradient flows through it.
///
/// # Shapes
/// `cache [batch, keys, L+R]` (latent after its norm, then rotated shared key), `offsets` of length `batch`. With
/// `kv_b [H(N+V), L]`: `q [batch, seq, H, N+R]` (rotated) → `[batch, seq, H·V]`. Without:
/// `q [batch, seq, H, L+R]` → `[batch, seq, H·L]`.
pub fn absorbed_attention(
    q: Tensor<4>,
    cache: Tensor<3>,
    kv_b: Option<Tensor<2>>,
    offsets: &[usize],
    dims: MlaDims,
) -> Tensor<3> {
    let [batch, _, _, of_query] = q.dims();
    let [_, keys, width] = cache.dims();
    let expected = if kv_b.is_some() { dims.nope + dims.rope } else { width };
    assert!(
        of_query == expected
            && offsets.len() == batch
            && offsets.iter().all(|offset| *offset < keys)
            && width == dims.rank + dims.rope,
        "absorbed_attention: q {:?}, cache {:?}, offsets {offsets:?} do not fit {dims:?}",
        q.dims(),
        cache.dims()
    );
    if q.dtype() != DType::F32 {
        return reference::absorbed_attention(q, cache, kv_b, offsets, dims);
    }
    let at: Vec<i32> = offsets.iter().map(|offset| *offset as i32).collect();
    let at = Tensor::<1, Int>::from_data(TensorData::new(at, [batch]), &q.device());
    let kv_b = kv_b.unwrap_or_else(|| Tensor::empty([0, dims.rank], &q.device()));
    let (q, cache, kv_b) = (q.into_dispatch(), cache.into_dispatch(), kv_b.into_dispatch());
    Tensor::from_dispatch(Dispatch::absorbed_attention(q, cache, kv_b, at.into_dispatch(), dims))
}

#[cfg(test)]
mod tests;
