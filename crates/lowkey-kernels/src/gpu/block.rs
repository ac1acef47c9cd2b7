//! The parts of a decoder block on GPUs.

use burn::backend::ops::FloatTensorOps;
use burn::tensor::Slice;
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::CubeDim;

use super::{
    Attention, Rows, Turn, count, dense, dims, format, new_of, of_format, operand, pointwise, pointwise_cubes, product,
    reshaped, rms_norm, rms_norm_grad, rotated, rounded_product, transposed,
};
use crate::block::MlaDims;
use crate::block_ops::{BlockGradients, BlockOps, LatentInputs, LatentState, MlpState, MlpWeights, ProjectState};
use crate::ops::{AttentionShape, AttentionState, Wanted};
use crate::precision::Precision;

/// All tokens as one tall matrix.
fn tall(x: CubeTensor) -> CubeTensor {
    let shape = x.meta.shape().to_vec();
    let width = shape[shape.len() - 1];
    let rows = shape.iter().product::<usize>() / width.max(1);
    reshaped(into_contiguous(x), [rows, width])
}

/// `x Wᵀ` of a tall matrix.
fn projected(x: CubeTensor, weight: CubeTensor, precision: Precision) -> CubeTensor {
    product(operand(x, precision), transposed(operand(weight, precision)), precision)
}

/// The same of what is rounded already, rounded for a product that reads it.
fn rounded_projection(x: CubeTensor, weight: CubeTensor, precision: Precision) -> CubeTensor {
    into_contiguous(rounded_product(x, transposed(operand(weight, precision)), precision))
}

/// `silu(gate) · up`
fn swiglu(gate: &CubeTensor, up: &CubeTensor) -> CubeTensor {
    let out = new_of(gate, gate.meta.shape().to_vec(), gate.dtype);
    let launch = of_format!(gate.dtype, pointwise::swiglu::launch);
    launch(
        &out.client,
        pointwise_cubes(count(gate)),
        CubeDim::new_1d(pointwise::UNITS),
        gate.clone().into_buffer_arg(),
        up.clone().into_buffer_arg(),
        out.clone().into_buffer_arg(),
        count(gate),
    );
    out
}

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
    let LatentInputs { q, kv_a, norm, kv_b, cos, sin, starts, dims, precision } = inputs;
    let [q, kv_a, norm, kv_b, cos, sin, starts] = [q, kv_a, norm, kv_b, cos, sin, starts].map(into_contiguous);
    LatentInputs { q, kv_a, norm, kv_b, cos, sin, starts, dims, precision }
}

impl BlockOps for CubeBackend {
    fn project(x: CubeTensor, weight: CubeTensor, precision: Precision) -> CubeTensor {
        let [batch, seq, _] = dims::<3>(&x);
        let [d_out, _] = dims::<2>(&weight);
        reshaped(projected(tall(x), weight, precision), [batch, seq, d_out])
    }

    fn add_project(residual: CubeTensor, x: CubeTensor, weight: CubeTensor, precision: Precision) -> CubeTensor {
        Self::float_add(Self::project(x, weight, precision), residual)
    }

    fn gated_mlp(
        x: CubeTensor,
        norm: CubeTensor,
        gate: CubeTensor,
        up: CubeTensor,
        down: CubeTensor,
        eps: f64,
        precision: Precision,
    ) -> CubeTensor {
        let [out, ..] = Self::gated_mlp_saving(x, [norm, gate, up, down], eps, precision);
        out
    }

    fn latent_attention(
        q: CubeTensor,
        kv_a: CubeTensor,
        norm: CubeTensor,
        kv_b: CubeTensor,
        cos: CubeTensor,
        sin: CubeTensor,
        starts: CubeTensor,
        dims: MlaDims,
        precision: Precision,
    ) -> CubeTensor {
        Self::latent_attention_saving(LatentInputs { q, kv_a, norm, kv_b, cos, sin, starts, dims, precision }).0
    }
}

impl BlockGradients for CubeBackend {
    fn rounded(x: CubeTensor, precision: Precision) -> CubeTensor {
        operand(x, precision)
    }

    fn project_grad(saved: ProjectState<Self>, grad: CubeTensor, precision: Precision) -> [Option<CubeTensor>; 2] {
        let [batch, seq, _] = dims::<3>(&grad);
        let grad = operand(tall(grad), precision);
        let d_x = saved.weight.map(|weight| {
            let [_, d_in] = dims::<2>(&weight);
            reshaped(product(grad.clone(), operand(weight, precision), precision), [batch, seq, d_in])
        });
        let d_weight = saved.x.map(|x| product(transposed(grad), operand(tall(x), precision), precision));
        [d_x, d_weight]
    }

    fn gated_mlp_saving(x: CubeTensor, weights: MlpWeights<Self>, eps: f64, precision: Precision) -> [CubeTensor; 3] {
        let [norm, gate, up, down] = weights;
        let [batch, seq, width] = dims::<3>(&x);
        let (flat, norm) = (tall(x.clone()), into_contiguous(norm));
        let normed = rms_norm(&flat, &norm, dense(&flat, width, eps), format(precision));
        let [gate, up] = [gate, up].map(|weight| rounded_projection(normed.clone(), weight, precision));
        let out = reshaped(projected(swiglu(&gate, &up), down, precision), [batch, seq, width]);
        [Self::float_add(out, x), gate, up]
    }

    fn gated_mlp_grad(
        saved: MlpState<Self>,
        grad: CubeTensor,
        eps: f64,
        precision: Precision,
        [of_x, of_norm, of_gate, of_up, of_down]: Wanted<5>,
    ) -> [Option<CubeTensor>; 5] {
        let MlpState { x, weights: [norm, gate_weight, up_weight, down], inner: [gate, up] } = saved;
        let shape = x.meta.shape().to_vec();
        let width = shape[shape.len() - 1];
        let (flat, norm, d_out) = (tall(x), into_contiguous(norm), tall(grad));
        let rounded = operand(d_out.clone(), precision);
        let d_act = into_contiguous(rounded_product(rounded.clone(), operand(down, precision), precision));
        // The inner activations are consumed: their gradients take their places.
        let act = new_of(&gate, gate.meta.shape().to_vec(), gate.dtype);
        let launch = of_format!(gate.dtype, pointwise::swiglu_grad::launch);
        launch(
            &act.client,
            pointwise_cubes(count(&act)),
            CubeDim::new_1d(pointwise::UNITS),
            gate.clone().into_buffer_arg(),
            up.clone().into_buffer_arg(),
            d_act.into_buffer_arg(),
            act.clone().into_buffer_arg(),
            count(&act),
        );
        let d_down = of_down.then(|| product(transposed(rounded), act, precision));
        let rows = dense(&flat, width, eps);
        let normed = (of_gate || of_up).then(|| rms_norm(&flat, &norm, rows, format(precision)));
        let [gate_weight, up_weight] = [gate_weight, up_weight].map(|x| operand(x, precision));
        let of = |d_y: &CubeTensor, wanted: bool| {
            normed.clone().filter(|_| wanted).map(|x| product(transposed(d_y.clone()), x, precision))
        };
        let (d_gate, d_up) = (of(&gate, of_gate), of(&up, of_up));
        drop(normed);
        let [by_gate, by_up] = [product(gate, gate_weight, precision), product(up, up_weight, precision)];
        let [by_gate, by_up] = [by_gate, by_up].map(into_contiguous);
        let (d_x, d_norm) = rms_norm_grad(&flat, &norm, &by_gate, Some([by_up, d_out]), rows);
        [of_x.then(|| reshaped(d_x, shape)), of_norm.then_some(d_norm), d_gate, d_up, d_down]
    }

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
        let LatentInputs { q, kv_a, norm, kv_b, cos, sin, starts, dims, precision } = inputs;
        let sizes = Attention::new(&q, &kv, shape);
        let state = AttentionState { q, kv, k_pe, starts, out, lse, shape };
        let [d_q, d_kv, d_pe] = sizes.backward(state, into_contiguous(grad));
        let d_kv = reshaped(d_kv, [batch * seq, dims.heads * (dims.nope + dims.value)]);
        let [d_kv, c_kv, kv_b] = [d_kv, c_kv, kv_b].map(|x| operand(x, precision));
        let d_kv_b = of_kv_b.then(|| product(transposed(d_kv.clone()), c_kv, precision));
        let d_c_kv = into_contiguous(product(d_kv, kv_b, precision));
        let (d_latent, d_norm) = rms_norm_grad(&kv_a, &norm, &d_c_kv, None, rows);
        let d_latent = reshaped(d_latent, [batch, seq, dims.rank]);
        let d_kv_a = if dims.rope > 0 {
            let turn = Turn { from: 0, interleaved: dims.interleave, back: true };
            let d_pe = rotated(reshaped(d_pe, [batch, seq, 1, dims.rope]), cos, sin, turn);
            Self::float_cat(vec![d_latent, reshaped(d_pe, [batch, seq, dims.rope])], 2)
        } else {
            d_latent
        };
        debug_assert_eq!(d_kv_a.meta.shape()[2], width);
        [of_q.then_some(d_q), of_kv_a.then_some(d_kv_a), of_norm.then_some(d_norm), d_kv_b]
    }
}
