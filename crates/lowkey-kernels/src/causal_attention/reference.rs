//! The attention in plain tensor operations: whole score matrices exist.

use burn::tensor::Tensor;

use crate::masked_attention::{Mask, attention};

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
