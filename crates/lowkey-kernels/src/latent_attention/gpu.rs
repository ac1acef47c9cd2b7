//! Latent attention on GPUs: keys and values formed anew in each direction around the kernels of the causal attention.

use burn::backend::ops::FloatTensorOps;
use burn::tensor::Slice;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::{CubeBackend, tensor::CubeTensor};

use super::arguments::MlaDims;
use super::autodiff::{LatentAttentionGradients, LatentAttentionOps, LatentInputs, LatentState};
use crate::autodiff::Wanted;
use crate::causal_attention::autodiff::{AttentionShape, AttentionState};
use crate::causal_attention::gpu::Attention;
use crate::gpu::product::{format, operand, product, rounded_projection, transposed};
use crate::gpu::tensors::{dims, reshaped};
use crate::norm::gpu::{Rows, rms_norm, rms_norm_grad};
use crate::rotary::gpu::{Turn, rotated};

/// What a latent's keys and values are made of, formed anew in each direction.
struct Latent {
    /// Normalised latents, `[B·T, L]`, in the format of operands.
    c_kv: CubeTensor,
    /// All heads' keys and values, `[B, T, H, N+V]`, in the format of operands.
    kv: CubeTensor,
    /// Rotated shared keys, `[B, T, R]`; a single number where there are none.
    k_pe: CubeTensor,
    /// Rows of the norm.
    rows: Rows,
    /// Sizes of the attention.
    shape: AttentionShape,
}

impl Latent {
    /// All inputs dense.
    fn new(inputs: &LatentInputs<CubeBackend>) -> Self {
        let MlaDims { heads, nope, rope, value, rank, scale, latent_scale, latent_eps, interleave } = inputs.dims;
        let [batch, seq, width] = dims::<3>(&inputs.kv_a);
        let rows = Rows { count: batch * seq, stride: width, width: rank, eps: latent_eps, factor: latent_scale };
        let c_kv = rms_norm(&inputs.kv_a, &inputs.norm, rows, format(inputs.precision));
        let kv = rounded_projection(c_kv.clone(), inputs.kv_b.clone(), inputs.precision);
        let kv = reshaped(kv, [batch, seq, heads, nope + value]);
        let k_pe = if rope > 0 {
            let slices = [0..batch, 0..seq, rank..width].map(Slice::from);
            let k_pe = into_contiguous(CubeBackend::float_slice(inputs.kv_a.clone(), &slices));
            let turn = Turn { from: 0, interleaved: interleave, back: false };
            let k_pe = rotated(reshaped(k_pe, [batch, seq, 1, rope]), inputs.cos.clone(), inputs.sin.clone(), turn);
            reshaped(k_pe, [batch, seq, rope])
        } else {
            CubeBackend::float_zeros([1, 1, 1].into(), &kv.device, burn::tensor::FloatDType::F32)
        };
        Self { c_kv, kv, k_pe, rows, shape: AttentionShape { nope, rope, scale, precision: inputs.precision } }
    }
}

fn contiguous(inputs: LatentInputs<CubeBackend>) -> LatentInputs<CubeBackend> {
    let LatentInputs { q, made, kv_a, norm, kv_b, cos, sin, starts, dims, precision } = inputs;
    let [q, kv_a, norm, kv_b, cos, sin, starts] = [q, kv_a, norm, kv_b, cos, sin, starts].map(into_contiguous);
    LatentInputs { q, made, kv_a, norm, kv_b, cos, sin, starts, dims, precision }
}

impl LatentAttentionOps for CubeBackend {
    fn latent_attention(inputs: LatentInputs<Self>) -> CubeTensor {
        Self::latent_attention_saving(inputs).0
    }
}

impl LatentAttentionGradients for CubeBackend {
    fn latent_attention_saving(inputs: LatentInputs<Self>) -> (CubeTensor, CubeTensor) {
        let inputs = contiguous(inputs);
        let Latent { kv, k_pe, shape, .. } = Latent::new(&inputs);
        Attention::new(&inputs.q, &kv, shape).forward(inputs.q, kv, k_pe, inputs.starts)
    }

    fn latent_attention_grad(
        saved: LatentState<Self>,
        grad: CubeTensor,
        [of_q, of_kv_a, of_norm, of_kv_b]: Wanted<4>,
    ) -> [Option<CubeTensor>; 4] {
        let LatentState { inputs, out, lse } = saved;
        let inputs = contiguous(inputs);
        let [batch, seq, width] = dims::<3>(&inputs.kv_a);
        let Latent { c_kv, kv, k_pe, rows, shape } = Latent::new(&inputs);
        let LatentInputs { q, kv_a, norm, kv_b, cos, sin, starts, dims, precision, .. } = inputs;
        let sizes = Attention::new(&q, &kv, shape);
        let state = AttentionState { q, kv, k_pe, starts, out, lse, shape };
        let [d_q, d_kv, d_pe] = sizes.backward(state, into_contiguous(grad));
        let d_kv = reshaped(d_kv, [batch * seq, dims.heads * (dims.nope + dims.value)]);
        let [d_kv, c_kv, kv_b] = [d_kv, c_kv, kv_b].map(|x| operand(x, precision));
        let d_kv_b = of_kv_b.then(|| product(transposed(d_kv.clone()), c_kv, precision));
        let d_c_kv = into_contiguous(product(d_kv, kv_b, precision));
        let (d_latent, d_norm) = rms_norm_grad(&kv_a, &norm, &d_c_kv, None, rows, of_norm);
        let d_latent = reshaped(d_latent, [batch, seq, dims.rank]);
        let d_kv_a = if dims.rope > 0 {
            let turn = Turn { from: 0, interleaved: dims.interleave, back: true };
            let d_pe = rotated(reshaped(d_pe, [batch, seq, 1, dims.rope]), cos, sin, turn);
            Self::float_cat(vec![d_latent, reshaped(d_pe, [batch, seq, dims.rope])], 2)
        } else {
            d_latent
        };
        debug_assert_eq!(d_kv_a.meta.shape()[2], width);
        [of_q.then_some(d_q), of_kv_a.then_some(d_kv_a), d_norm, d_kv_b]
    }
}
