//! The CPU backend's side of the operations: contiguous f32 slices in and out of its tensors.

mod block;
mod cache;
mod routing;

use burn::backend::Flex;
use burn::backend::ops::ModuleOps;
use burn::tensor::{DType, Shape};
use burn_flex::FlexTensor;

use crate::cpu::attention::{self, Dims};
use crate::cpu::cross_entropy;
use crate::cpu::linear::Tokens;
use crate::cpu::pointwise::{self, Table, Target, Turn};
use crate::ops::{AttentionShape, AttentionState, FusedGradients, FusedOps, Wanted};
use crate::precision::Precision;

fn new(shape: impl Into<Vec<usize>>) -> FlexTensor {
    FlexTensor::empty(Shape::from(shape.into()), DType::F32)
}

fn like(tensor: &FlexTensor) -> FlexTensor {
    FlexTensor::empty(tensor.layout().shape().clone(), DType::F32)
}

/// Room for the gradients that are wanted of some tensors.
fn wanted_like<const N: usize>(tensors: [&FlexTensor; N], wanted: Wanted<N>) -> [Option<FlexTensor>; N] {
    std::array::from_fn(|i| wanted[i].then(|| like(tensors[i])))
}

/// The numbers of a gradient, where it is wanted.
fn numbers(gradient: &mut Option<FlexTensor>) -> Option<&mut [f32]> {
    gradient.as_mut().map(FlexTensor::storage_mut)
}

fn head_gradients([h, weight]: &mut [Option<FlexTensor>; 2]) -> cross_entropy::Gradients<'_> {
    cross_entropy::Gradients { h: numbers(h), weight: numbers(weight) }
}

fn dims<const D: usize>(tensor: &FlexTensor) -> [usize; D] {
    let shape = tensor.layout().shape();
    std::array::from_fn(|i| shape[i])
}

/// Integers as the kernels read them; the backend may hold them as 32 or 64 bits.
fn integers(tensor: &FlexTensor) -> Vec<i32> {
    let tensor = tensor.to_contiguous();
    match tensor.dtype() {
        DType::I64 => tensor.storage::<i64>().iter().map(|x| *x as i32).collect(),
        _ => tensor.storage::<i32>().to_vec(),
    }
}

fn rotated(x: &FlexTensor, cos: &FlexTensor, sin: &FlexTensor, from: usize, turn: Turn) -> FlexTensor {
    let (x, cos, sin) = (x.to_contiguous(), cos.to_contiguous(), sin.to_contiguous());
    let [.., heads, width] = dims::<4>(&x);
    let [.., half] = dims::<4>(&cos);
    let mut out = like(&x);
    let table = Table { cos: cos.storage(), sin: sin.storage(), half };
    pointwise::rotate(x.storage(), table, [heads, width, from], turn, out.storage_mut());
    out
}

fn attention_dims(q: &FlexTensor, kv: &FlexTensor, shape: AttentionShape) -> Dims {
    let [batch, seq, heads, _] = dims::<4>(q);
    let [_, _, groups, width] = dims::<4>(kv);
    let AttentionShape { nope, rope, scale, .. } = shape;
    Dims { batch, seq, heads, groups, nope, rope, value: width - nope, scale: scale as f32 }
}

impl FusedOps for Flex {
    fn embed(weight: FlexTensor, ids: FlexTensor) -> FlexTensor {
        Self::embedding(weight, ids)
    }

    fn rms_norm(x: FlexTensor, weight: FlexTensor, eps: f64) -> FlexTensor {
        let (x, weight) = (x.to_contiguous(), weight.to_contiguous());
        let mut out = like(&x);
        let [width] = dims::<1>(&weight);
        let rows = Tokens::dense(x.storage(), width);
        pointwise::rms_norm(rows, weight.storage(), eps as f32, 1.0, out.storage_mut(), width);
        out
    }

    fn rotate(x: FlexTensor, cos: FlexTensor, sin: FlexTensor, from: usize, interleaved: bool) -> FlexTensor {
        rotated(&x, &cos, &sin, from, Turn::new(interleaved, false))
    }

    fn causal_attention(
        q: FlexTensor,
        kv: FlexTensor,
        k_pe: FlexTensor,
        starts: FlexTensor,
        shape: AttentionShape,
    ) -> FlexTensor {
        Self::causal_attention_saving(q, kv, k_pe, starts, shape).0
    }

    fn cross_entropy_sum(
        h: FlexTensor,
        weight: FlexTensor,
        targets: FlexTensor,
        label_weights: FlexTensor,
        z_loss: f64,
        _: Precision,
    ) -> FlexTensor {
        let (h, weight, label_weights) = (h.to_contiguous(), weight.to_contiguous(), label_weights.to_contiguous());
        let targets = &integers(&targets);
        let inputs = head_inputs(&h, &weight, targets, label_weights.storage(), z_loss);
        sums_tensor(inputs.sums(cross_entropy::losses(inputs).into_iter().enumerate()))
    }

    fn cross_entropy_each(h: FlexTensor, weight: FlexTensor, targets: FlexTensor, _: Precision) -> FlexTensor {
        let (h, weight) = (h.to_contiguous(), weight.to_contiguous());
        let targets = &integers(&targets);
        let mut out = new([targets.len()]);
        let losses = cross_entropy::losses(head_inputs(&h, &weight, targets, &[], 0.0));
        out.storage_mut::<f32>().iter_mut().zip(losses).for_each(|(out, loss)| *out = loss.nats);
        out
    }

    fn distill_sum(
        h: FlexTensor,
        weight: FlexTensor,
        teacher: FlexTensor,
        targets: FlexTensor,
        share: f64,
        precision: Precision,
    ) -> FlexTensor {
        // Only where nothing is trained, which is no case to be fast in.
        Self::distill_sum_saving(h, weight, teacher, targets, share, precision, [false; 2]).0
    }
}

fn head_inputs<'a>(
    h: &'a FlexTensor,
    weight: &'a FlexTensor,
    targets: &'a [i32],
    label_weights: &'a [f32],
    z_loss: f64,
) -> cross_entropy::Inputs<'a> {
    let [_, width] = dims::<2>(h);
    let z_loss = z_loss as f32;
    cross_entropy::Inputs { h: h.storage(), weight: weight.storage(), targets, label_weights, z_loss, width }
}

fn sums_tensor(sums: cross_entropy::Sums) -> FlexTensor {
    let mut out = new([2]);
    out.storage_mut::<f32>().copy_from_slice(&[sums.objective as f32, sums.z_loss as f32]);
    out
}

impl FusedGradients for Flex {
    fn embed_grad(weight: FlexTensor, ids: FlexTensor, grad: FlexTensor) -> FlexTensor {
        Self::embedding_backward(weight, grad, ids)
    }

    fn rms_norm_grad(x: FlexTensor, weight: FlexTensor, grad: FlexTensor, eps: f64) -> (FlexTensor, FlexTensor) {
        let (x, weight, grad) = (x.to_contiguous(), weight.to_contiguous(), grad.to_contiguous());
        let (mut d_x, mut d_weight) = (like(&x), like(&weight));
        let [width] = dims::<1>(&weight);
        let rows = Tokens::dense(x.storage(), width);
        let target = Target { data: d_x.storage_mut(), stride: width, accumulate: false };
        let (grad, d_weight_out) = (grad.storage(), d_weight.storage_mut());
        pointwise::rms_norm_grad(rows, weight.storage(), grad, eps as f32, 1.0, target, d_weight_out);
        (d_x, d_weight)
    }

    fn rotate_back(grad: FlexTensor, cos: FlexTensor, sin: FlexTensor, from: usize, interleaved: bool) -> FlexTensor {
        rotated(&grad, &cos, &sin, from, Turn::new(interleaved, true))
    }

    fn causal_attention_saving(
        q: FlexTensor,
        kv: FlexTensor,
        k_pe: FlexTensor,
        starts: FlexTensor,
        shape: AttentionShape,
    ) -> (FlexTensor, FlexTensor) {
        let (q, kv, k_pe) = (q.to_contiguous(), kv.to_contiguous(), k_pe.to_contiguous());
        let dims = attention_dims(&q, &kv, shape);
        let starts = &integers(&starts);
        let inputs = attention::Inputs {
            q: q.storage(),
            kv: kv.storage(),
            k_pe: k_pe.storage(),
            k_pe_stride: shape.rope,
            starts,
        };
        let mut out = new([dims.batch, dims.seq, dims.heads * dims.value]);
        let mut lse = new([dims.batch, dims.heads, dims.seq]);
        attention::forward(dims, inputs, out.storage_mut(), lse.storage_mut());
        (out, lse)
    }

    fn causal_attention_grad(saved: AttentionState<Self>, grad: FlexTensor) -> (FlexTensor, FlexTensor, FlexTensor) {
        let AttentionState { q, kv, k_pe, starts, out, lse, shape } = saved;
        let (q, kv, k_pe, grad) = (q.to_contiguous(), kv.to_contiguous(), k_pe.to_contiguous(), grad.to_contiguous());
        let dims = attention_dims(&q, &kv, shape);
        let starts = &integers(&starts);
        let inputs = attention::Inputs {
            q: q.storage(),
            kv: kv.storage(),
            k_pe: k_pe.storage(),
            k_pe_stride: shape.rope,
            starts,
        };
        let saved = attention::Saved { out: out.storage(), lse: lse.storage(), d_out: grad.storage() };
        let (mut d_q, mut d_kv) = (like(&q), like(&kv));
        let mut d_k_pe = FlexTensor::zeros(k_pe.layout().shape().clone(), DType::F32);
        let gradients =
            attention::Gradients { d_q: d_q.storage_mut(), d_kv: d_kv.storage_mut(), d_k_pe: d_k_pe.storage_mut() };
        attention::backward(dims, inputs, saved, gradients);
        (d_q, d_kv, d_k_pe)
    }

    fn cross_entropy_sum_saving(
        h: FlexTensor,
        weight: FlexTensor,
        targets: FlexTensor,
        label_weights: FlexTensor,
        z_loss: f64,
        _: Precision,
        wanted: Wanted<2>,
    ) -> (FlexTensor, [Option<FlexTensor>; 2]) {
        let (h, weight, label_weights) = (h.to_contiguous(), weight.to_contiguous(), label_weights.to_contiguous());
        let targets = &integers(&targets);
        let inputs = head_inputs(&h, &weight, targets, label_weights.storage(), z_loss);
        let mut gradients = wanted_like([&h, &weight], wanted);
        let sums = cross_entropy::sums_with_gradients(inputs, head_gradients(&mut gradients));
        (sums_tensor(sums), gradients)
    }

    fn distill_sum_saving(
        h: FlexTensor,
        weight: FlexTensor,
        teacher: FlexTensor,
        targets: FlexTensor,
        share: f64,
        _: Precision,
        wanted: Wanted<2>,
    ) -> (FlexTensor, [Option<FlexTensor>; 2]) {
        let (h, weight, teacher) = (h.to_contiguous(), weight.to_contiguous(), teacher.to_contiguous());
        let targets = &integers(&targets);
        let inputs = head_inputs(&h, &weight, targets, &[], 0.0);
        let lesson = cross_entropy::Lesson { teacher: teacher.storage(), share: share as f32 };
        let (mut gradients, mut out) = (wanted_like([&h, &weight], wanted), new([1]));
        let sum = cross_entropy::lessons_with_gradients(inputs, lesson, head_gradients(&mut gradients));
        out.storage_mut::<f32>()[0] = sum as f32;
        (out, gradients)
    }
}
