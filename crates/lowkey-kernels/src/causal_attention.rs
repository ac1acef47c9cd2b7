//! Causal attention within documents over whole sequences.

pub(crate) mod autodiff;
pub(crate) mod cpu;
#[cfg(feature = "gpu")]
pub(crate) mod gpu;
pub(crate) mod reference;
#[cfg(test)]
mod tests;

use burn::backend::Dispatch;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use self::autodiff::{AttentionShape, CausalAttentionOps};
use crate::precision;

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

/// Document starts `[batch, seq]` for a kernel, which relies on their order to leave blocks of keys out.
pub(crate) fn starts_tensor(document_starts: &[u32], shape: [usize; 2], device: &Device) -> Tensor<2, Int> {
    debug_assert!(document_starts.chunks(shape[1]).all(<[u32]>::is_sorted), "document starts fall along a row");
    let starts: Vec<i32> = document_starts.iter().map(|start| *start as i32).collect();
    Tensor::from_data(TensorData::new(starts, shape), device)
}
