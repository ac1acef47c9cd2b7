//! Multi-head Latent Attention over whole sequences, as one operation: the form for training.

pub(crate) mod arguments;
pub(crate) mod autodiff;
mod cpu;
#[cfg(feature = "gpu")]
mod gpu;
pub(crate) mod reference;
#[cfg(test)]
mod tests;

use burn::backend::Dispatch;
use burn::tensor::{DType, Tensor};

pub use self::arguments::{LatentWeights, MadeQueries, MlaDims};
use self::autodiff::{LatentAttentionOps, LatentInputs, Queries};
use crate::causal_attention::starts_tensor;
use crate::precision;

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
    latent_attention_of(q, None, kv_a, weights, document_starts, dims)
}

/// [`latent_attention`] of queries that are what `made` says: they are not kept for the backward pass, which forms them anew.
///
/// # Shapes
/// As there.
pub fn latent_attention_of(
    q: Tensor<4>,
    made: Option<MadeQueries>,
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
    Tensor::from_dispatch(Dispatch::latent_attention(LatentInputs {
        q: q.into_dispatch(),
        made: made.map_or(Queries::Kept, |MadeQueries { map, of }| Queries::Made { map: map.map(), of: of.recall() }),
        kv_a: kv_a.into_dispatch(),
        norm: norm.into_dispatch(),
        kv_b: kv_b.into_dispatch(),
        cos: cos.into_dispatch(),
        sin: sin.into_dispatch(),
        starts: starts.into_dispatch(),
        dims,
        precision: precision::current(),
    }))
}
