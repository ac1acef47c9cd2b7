//! The CPU backend's side of the operations on parts of a block.

use burn::backend::Flex;
use burn_flex::FlexTensor;

use super::{dims, integers, like, new, numbers, wanted_like};
use crate::block::MlaDims;
use crate::block_ops::{BlockGradients, BlockOps, LatentInputs, LatentState, MlpState, MlpWeights, ProjectState};
use crate::cpu::attention::{Dims, Saved};
use crate::cpu::latent::{self, Shape};
use crate::cpu::linear::{Tokens, input_gradient, project, weight_gradient};
use crate::cpu::mlp;
use crate::cpu::pointwise::Table;
use crate::ops::Wanted;
use crate::precision::Precision;

/// A tensor's memory and how far its rows of the last axis are apart, where all rows have one distance; else a copy that does.
fn rows(tensor: &FlexTensor) -> FlexTensor {
    if row_stride(tensor).is_some() { tensor.clone() } else { tensor.to_contiguous() }
}

/// The one distance between the rows of a tensor, where there is one and the numbers of a row lie side by side.
fn row_stride(tensor: &FlexTensor) -> Option<usize> {
    let layout = tensor.layout();
    let (shape, strides) = (layout.shape(), layout.strides());
    let last = shape.num_dims() - 1;
    let side_by_side = shape[last] == 1 || strides[last] == 1;
    // The distance is that of the innermost axis with several rows; the axes outside must go on from it.
    let mut distance: Option<(usize, usize)> = None;
    for axis in (0..last).rev().filter(|axis| shape[*axis] > 1) {
        let stride = usize::try_from(strides[axis]).ok()?;
        match &mut distance {
            None => distance = Some((stride, shape[axis])),
            Some((first, count)) if stride == *first * *count => *count *= shape[axis],
            Some(_) => return None,
        }
    }
    let stride = distance.map_or(shape[last], |(stride, _)| stride);
    (side_by_side && stride >= shape[last]).then_some(stride)
}

/// The rows of a tensor that [`rows`] returned.
fn tokens(tensor: &FlexTensor) -> Tokens<'_> {
    let shape = tensor.layout().shape();
    let width = shape[shape.num_dims() - 1];
    let data = &tensor.storage::<f32>()[tensor.layout().start_offset()..];
    let count = shape.num_elements() / width.max(1);
    Tokens { data, count, stride: row_stride(tensor).unwrap_or(width) }
}

fn projected(x: &FlexTensor, weight: &FlexTensor, mut out: FlexTensor, accumulate: bool) -> FlexTensor {
    let (x, weight) = (rows(x), weight.to_contiguous());
    let [_, d_in] = dims::<2>(&weight);
    project(tokens(&x), weight.storage(), d_in, out.storage_mut(), accumulate);
    out
}

fn mlp_weights<'a>(weights: &'a [FlexTensor; 4], eps: f64) -> mlp::Weights<'a> {
    let [norm, gate, up, down] = weights;
    mlp::Weights { norm: norm.storage(), gate: gate.storage(), up: up.storage(), down: down.storage(), eps: eps as f32 }
}

/// The arguments of a latent attention, each contiguous, with the starts as the kernels read them.
struct LatentArguments {
    inputs: LatentInputs<Flex>,
    starts: Vec<i32>,
    shape: Shape,
}

impl LatentArguments {
    fn new(inputs: LatentInputs<Flex>) -> Self {
        let LatentInputs { q, kv_a, norm, kv_b, cos, sin, starts, dims: mla, precision } = inputs;
        let [batch, seq, ..] = dims::<4>(&q);
        let MlaDims { heads, nope, rope, value, rank, scale, latent_scale, latent_eps, interleave } = mla;
        let attention = Dims { batch, seq, heads, groups: heads, nope, rope, value, scale: scale as f32 };
        let (latent_scale, eps) = (latent_scale as f32, latent_eps as f32);
        let inputs = LatentInputs {
            q: q.to_contiguous(),
            kv_a: kv_a.to_contiguous(),
            norm: norm.to_contiguous(),
            kv_b: kv_b.to_contiguous(),
            cos: cos.to_contiguous(),
            sin: sin.to_contiguous(),
            starts: starts.clone(),
            dims: mla,
            precision,
        };
        let shape = Shape { attention, rank, latent_scale, eps, interleaved: interleave };
        Self { inputs, starts: integers(&starts), shape }
    }

    fn slices(&self) -> latent::Inputs<'_> {
        let LatentInputs { q, kv_a, norm, kv_b, cos, sin, dims, .. } = &self.inputs;
        latent::Inputs {
            q: q.storage(),
            kv_a: kv_a.storage(),
            norm: norm.storage(),
            kv_b: kv_b.storage(),
            table: Table { cos: cos.storage(), sin: sin.storage(), half: dims.rope / 2 },
            starts: &self.starts,
        }
    }
}

impl BlockOps for Flex {
    fn project(x: FlexTensor, weight: FlexTensor, _: Precision) -> FlexTensor {
        let [batch, seq, _] = dims::<3>(&x);
        let [d_out, _] = dims::<2>(&weight);
        projected(&x, &weight, new([batch, seq, d_out]), false)
    }

    fn add_project(residual: FlexTensor, x: FlexTensor, weight: FlexTensor, _: Precision) -> FlexTensor {
        // Where nobody else holds the residual, the sum takes its place.
        let out = residual.to_contiguous();
        drop(residual);
        projected(&x, &weight, out, true)
    }

    fn gated_mlp(
        x: FlexTensor,
        norm: FlexTensor,
        gate: FlexTensor,
        up: FlexTensor,
        down: FlexTensor,
        eps: f64,
        precision: Precision,
    ) -> FlexTensor {
        let [out, ..] = Self::gated_mlp_saving(x, [norm, gate, up, down], eps, precision);
        out
    }

    fn latent_attention(
        q: FlexTensor,
        kv_a: FlexTensor,
        norm: FlexTensor,
        kv_b: FlexTensor,
        cos: FlexTensor,
        sin: FlexTensor,
        starts: FlexTensor,
        dims: MlaDims,
        precision: Precision,
    ) -> FlexTensor {
        Self::latent_attention_saving(LatentInputs { q, kv_a, norm, kv_b, cos, sin, starts, dims, precision }).0
    }
}

impl BlockGradients for Flex {
    fn project_grad(saved: ProjectState<Self>, grad: FlexTensor, _: Precision) -> [Option<FlexTensor>; 2] {
        let grad = grad.to_contiguous();
        let [batch, seq, d_out] = dims::<3>(&grad);
        let d_x = saved.weight.map(|weight| {
            let [_, d_in] = dims::<2>(&weight);
            let mut d_x = new([batch, seq, d_in]);
            input_gradient(grad.storage(), weight.to_contiguous().storage(), d_in, d_x.storage_mut(), false);
            d_x
        });
        let d_weight = saved.x.map(|x| {
            let ([.., d_in], x) = (dims::<3>(&x), rows(&x));
            let mut d_weight = new([d_out, d_in]);
            weight_gradient(grad.storage(), tokens(&x), d_in, d_weight.storage_mut());
            d_weight
        });
        [d_x, d_weight]
    }

    fn gated_mlp_saving(x: FlexTensor, weights: MlpWeights<Self>, eps: f64, _: Precision) -> [FlexTensor; 3] {
        let (x, weights) = (x.to_contiguous(), weights.map(|weight| weight.to_contiguous()));
        let [batch, seq, _] = dims::<3>(&x);
        let [inner, _] = dims::<2>(&weights[1]);
        let (mut out, mut gate, mut up) = (like(&x), new([batch, seq, inner]), new([batch, seq, inner]));
        let (gate_data, up_data) = (gate.storage_mut(), up.storage_mut());
        mlp::forward(x.storage(), mlp_weights(&weights, eps), gate_data, up_data, out.storage_mut());
        [out, gate, up]
    }

    fn gated_mlp_grad(
        saved: MlpState<Self>,
        grad: FlexTensor,
        eps: f64,
        _: Precision,
        wanted: Wanted<5>,
    ) -> [Option<FlexTensor>; 5] {
        let MlpState { x, weights, inner: [mut gate, mut up] } = saved;
        let (x, grad) = (x.to_contiguous(), grad.to_contiguous());
        let weights = weights.map(|weight| weight.to_contiguous());
        let (mut d_x, mut d_norm) = (like(&x), like(&weights[0]));
        let [of_x, of_norm, matrices @ ..] = wanted;
        let mut d_matrices = wanted_like([&weights[1], &weights[2], &weights[3]], matrices);
        let [d_gate, d_up, d_down] = &mut d_matrices;
        let gradients = mlp::Gradients {
            x: d_x.storage_mut(),
            norm: d_norm.storage_mut(),
            gate: numbers(d_gate),
            up: numbers(d_up),
            down: numbers(d_down),
        };
        let (gate, up) = (gate.storage_mut(), up.storage_mut());
        mlp::backward(x.storage(), mlp_weights(&weights, eps), gate, up, grad.storage(), gradients);
        let [d_gate, d_up, d_down] = d_matrices;
        [of_x.then_some(d_x), of_norm.then_some(d_norm), d_gate, d_up, d_down]
    }

    fn latent_attention_saving(inputs: LatentInputs<Self>) -> (FlexTensor, FlexTensor) {
        let arguments = LatentArguments::new(inputs);
        let Dims { batch, seq, heads, value, .. } = arguments.shape.attention;
        let (mut out, mut lse) = (new([batch, seq, heads * value]), new([batch, heads, seq]));
        latent::forward(arguments.shape, arguments.slices(), out.storage_mut(), lse.storage_mut());
        (out, lse)
    }

    fn latent_attention_grad(saved: LatentState<Self>, grad: FlexTensor, wanted: Wanted<4>) -> [Option<FlexTensor>; 4] {
        let LatentState { inputs, out, lse } = saved;
        let (arguments, grad) = (LatentArguments::new(inputs), grad.to_contiguous());
        let saved = Saved { out: out.storage(), lse: lse.storage(), d_out: grad.storage() };
        let LatentInputs { q, kv_a, norm, kv_b, .. } = &arguments.inputs;
        let (mut d_q, mut d_kv_a, mut d_norm) = (like(q), like(kv_a), like(norm));
        let [of_q, of_kv_a, of_norm, of_kv_b] = wanted;
        let [mut d_kv_b] = wanted_like([kv_b], [of_kv_b]);
        let gradients = latent::Gradients {
            q: d_q.storage_mut(),
            kv_a: d_kv_a.storage_mut(),
            norm: d_norm.storage_mut(),
            kv_b: numbers(&mut d_kv_b),
        };
        latent::backward(arguments.shape, arguments.slices(), saved, gradients);
        [of_q.then_some(d_q), of_kv_a.then_some(d_kv_a), of_norm.then_some(d_norm), d_kv_b]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{DType, Shape as TensorShape};

    #[test]
    fn rows_of_one_distance_are_read_where_they_lie() {
        let whole = FlexTensor::zeros(TensorShape::from(vec![2, 3, 10]), DType::F32);
        assert_eq!(row_stride(&whole), Some(10));
        assert_eq!(row_stride(&whole.narrow(2, 4, 5)), Some(10));
        assert_eq!(row_stride(&whole.narrow(1, 1, 2)), None, "rows of two batches with a hole between");
        assert_eq!(row_stride(&whole.narrow(0, 1, 1).narrow(1, 1, 2)), Some(10));
        assert_eq!(row_stride(&whole.transpose(1, 2)), None);
        let part = whole.narrow(1, 2, 1).narrow(2, 1, 3);
        assert_eq!((row_stride(&part), tokens(&part).count), (Some(30), 2));
    }
}
