//! The entry points to the parts of a decoder block.

use burn::backend::Dispatch;
use burn::tensor::{DType, Tensor};

use crate::block_ops::BlockOps;
use crate::fused::starts_tensor;
use crate::{precision, reference};

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
        Tensor::from_dispatch(Dispatch::project(x.into_dispatch(), weight.into_dispatch(), precision::current()))
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
        Tensor::from_dispatch(Dispatch::add_project(residual, x, weight.into_dispatch(), precision::current()))
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
    Tensor::from_dispatch(Dispatch::gated_mlp(x.into_dispatch(), norm, gate, up, down, eps, precision::current()))
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
        precision::current(),
    ))
}

#[cfg(test)]
mod tests;
