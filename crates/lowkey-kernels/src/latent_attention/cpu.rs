//! Multi-head Latent Attention from the projected latent to the heads' outputs, as one operation.
//!
//! The latent's norm, the shared key's rotation and the keys and values of all heads are computed for as long as the attention
//! runs, and again in the backward pass: what is kept per token is the latent (L + R numbers), the queries and the output.

use burn::backend::Flex;
use burn_flex::FlexTensor;

use super::arguments::MlaDims;
use super::autodiff::{LatentAttentionGradients, LatentAttentionOps, LatentInputs, LatentState};
use crate::autodiff::Wanted;
use crate::causal_attention::cpu::{self as attention, Dims, Saved};
use crate::cpu::linear::{Tokens, input_gradient, project, weight_gradient};
use crate::cpu::tensors::{dims, integers, like, new, numbers, room, wanted_like};
use crate::norm::cpu::{Target, rms_norm, rms_norm_grad};
use crate::precision::Precision;
use crate::rotary::cpu::{Table, Turn, rotate};

/// Sizes and factors of one latent attention.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) attention: Dims,
    /// Width of the latent.
    pub(crate) rank: usize,
    /// Factor on the normalised latent.
    pub(crate) latent_scale: f32,
    pub(crate) eps: f32,
    /// Whether the shared key comes as adjacent pairs.
    pub(crate) interleaved: bool,
    /// Of the products with `kv_b`.
    pub(crate) precision: Precision,
}

/// `q [batch, seq, heads, nope+rope]`, rotated; `kv_a [batch, seq, rank+rope]`: latent before its norm, shared key before its
/// rotation; `norm [rank]`; `kv_b [heads(nope+value), rank]`; cosines and sines; `starts [batch, seq]`.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub(crate) q: &'a [f32],
    pub(crate) kv_a: &'a [f32],
    pub(crate) norm: &'a [f32],
    pub(crate) kv_b: &'a [f32],
    pub(crate) table: Table<'a>,
    pub(crate) starts: &'a [i32],
}

/// What [`Inputs::expand`] makes of the latents.
struct Expanded {
    /// Normalised latent and rotated shared key, `[batch, seq, rank+rope]`.
    latent: Vec<f32>,
    /// Keys without position and values, `[batch, seq, heads, nope+value]`.
    kv: Vec<f32>,
}

impl Shape {
    fn width(self) -> usize {
        self.rank + self.attention.rope
    }

    fn turn(self, back: bool) -> Turn {
        Turn::new(self.interleaved, back)
    }

    fn latents(self, latent: &[f32]) -> Tokens<'_> {
        Tokens { data: latent, count: latent.len() / self.width(), stride: self.width() }
    }
}

impl<'a> Inputs<'a> {
    fn expand(self, shape: Shape) -> Expanded {
        let Shape { rank, latent_scale, eps, .. } = shape;
        let mut latent = room(self.kv_a.len());
        let sizes = [1, shape.width(), rank];
        rotate(self.kv_a, self.table, sizes, shape.turn(false), &mut latent);
        let raw = shape.latents(self.kv_a);
        rms_norm(raw, self.norm, eps, latent_scale, &mut latent, shape.width());
        let tokens = shape.latents(&latent);
        let mut kv = room(tokens.count * self.kv_b.len() / rank);
        project(shape.precision, tokens, self.kv_b, rank, &mut kv, false);
        Expanded { latent, kv }
    }

    fn attention<'b>(self, shape: Shape, expanded: &'b Expanded) -> attention::Inputs<'b>
    where
        'a: 'b,
    {
        attention::Inputs {
            q: self.q,
            kv: &expanded.kv,
            k_pe: &expanded.latent[shape.rank..],
            k_pe_stride: shape.width(),
            starts: self.starts,
        }
    }
}

/// Writes `out [batch, seq, heads, value]` and `lse [batch, heads, seq]`.
pub(crate) fn forward(shape: Shape, inputs: Inputs, out: &mut [f32], lse: &mut [f32]) {
    let expanded = inputs.expand(shape);
    attention::forward(shape.attention, inputs.attention(shape, &expanded), out, lse);
}

/// Gradients of [`forward`], laid out as the inputs; those of the weights where they are wanted.
pub(crate) struct Gradients<'a> {
    pub(crate) q: &'a mut [f32],
    pub(crate) kv_a: &'a mut [f32],
    pub(crate) norm: Option<&'a mut [f32]>,
    pub(crate) kv_b: Option<&'a mut [f32]>,
}

/// Fills `gradients` from what [`forward`] wrote and the gradient of its output.
pub(crate) fn backward(shape: Shape, inputs: Inputs, saved: Saved, gradients: Gradients) {
    let Shape { attention: dims, rank, latent_scale, eps, precision, .. } = shape;
    let expanded = inputs.expand(shape);
    let tokens = dims.batch * dims.seq;
    let mut d_kv = room(expanded.kv.len());
    let mut d_k_pe = room(tokens * dims.rope);
    let parts = attention::Gradients { d_q: gradients.q, d_kv: &mut d_kv, d_k_pe: &mut d_k_pe };
    attention::backward(dims, inputs.attention(shape, &expanded), saved, parts);
    let Expanded { latent, kv } = expanded;
    drop(kv);
    if let Some(kv_b) = gradients.kv_b {
        weight_gradient(precision, &d_kv, shape.latents(&latent), rank, kv_b);
    }
    drop(latent);
    let mut d_latent = room(tokens * rank);
    input_gradient(precision, &d_kv, inputs.kv_b, rank, &mut d_latent, false);
    let raw = shape.latents(inputs.kv_a);
    let into = Target { data: gradients.kv_a, stride: shape.width(), accumulate: false };
    rms_norm_grad(raw, inputs.norm, &d_latent, eps, latent_scale, into, gradients.norm);
    if dims.rope > 0 {
        let mut turned = room(d_k_pe.len());
        rotate(&d_k_pe, inputs.table, [1, dims.rope, 0], shape.turn(true), &mut turned);
        for (row, turned) in gradients.kv_a.chunks_exact_mut(shape.width()).zip(turned.chunks_exact(dims.rope)) {
            row[rank..].copy_from_slice(turned);
        }
    }
}

/// The arguments of a latent attention, each contiguous, with the starts as the kernels read them.
struct LatentArguments {
    inputs: LatentInputs<Flex>,
    starts: Vec<i32>,
    shape: Shape,
}

impl LatentArguments {
    fn new(inputs: LatentInputs<Flex>) -> Self {
        let LatentInputs { q, made, kv_a, norm, kv_b, cos, sin, starts, dims: mla, precision } = inputs;
        let [batch, seq, ..] = dims::<4>(&q);
        let MlaDims { heads, nope, rope, value, rank, scale, latent_scale, latent_eps, interleave } = mla;
        let attention = Dims { batch, seq, heads, groups: heads, nope, rope, value, scale: scale as f32, precision };
        let (latent_scale, eps) = (latent_scale as f32, latent_eps as f32);
        let inputs = LatentInputs {
            q: q.to_contiguous(),
            made,
            kv_a: kv_a.to_contiguous(),
            norm: norm.to_contiguous(),
            kv_b: kv_b.to_contiguous(),
            cos: cos.to_contiguous(),
            sin: sin.to_contiguous(),
            starts: starts.clone(),
            dims: mla,
            precision,
        };
        let shape = Shape { attention, rank, latent_scale, eps, interleaved: interleave, precision };
        Self { inputs, starts: integers(&starts), shape }
    }

    fn slices(&self) -> Inputs<'_> {
        let LatentInputs { q, kv_a, norm, kv_b, cos, sin, dims, .. } = &self.inputs;
        Inputs {
            q: q.storage(),
            kv_a: kv_a.storage(),
            norm: norm.storage(),
            kv_b: kv_b.storage(),
            table: Table { cos: cos.storage(), sin: sin.storage(), half: dims.rope / 2 },
            starts: &self.starts,
        }
    }
}

impl LatentAttentionOps for Flex {
    fn latent_attention(inputs: LatentInputs<Self>) -> FlexTensor {
        Self::latent_attention_saving(inputs).0
    }
}

impl LatentAttentionGradients for Flex {
    fn latent_attention_saving(inputs: LatentInputs<Self>) -> (FlexTensor, FlexTensor) {
        let arguments = LatentArguments::new(inputs);
        let Dims { batch, seq, heads, value, .. } = arguments.shape.attention;
        let (mut out, mut lse) = (new([batch, seq, heads * value]), new([batch, heads, seq]));
        forward(arguments.shape, arguments.slices(), out.storage_mut(), lse.storage_mut());
        (out, lse)
    }

    fn latent_attention_grad(saved: LatentState<Self>, grad: FlexTensor, wanted: Wanted<4>) -> [Option<FlexTensor>; 4] {
        let LatentState { inputs, out, lse } = saved;
        let (arguments, grad) = (LatentArguments::new(inputs), grad.to_contiguous());
        let saved = Saved { out: out.storage(), lse: lse.storage(), d_out: grad.storage() };
        let LatentInputs { q, kv_a, norm, kv_b, .. } = &arguments.inputs;
        let (mut d_q, mut d_kv_a) = (like(q), like(kv_a));
        let [of_q, of_kv_a, of_weights @ ..] = wanted;
        let [mut d_norm, mut d_kv_b] = wanted_like([norm, kv_b], of_weights);
        let gradients = Gradients {
            q: d_q.storage_mut(),
            kv_a: d_kv_a.storage_mut(),
            norm: numbers(&mut d_norm),
            kv_b: numbers(&mut d_kv_b),
        };
        backward(arguments.shape, arguments.slices(), saved, gradients);
        [of_q.then_some(d_q), of_kv_a.then_some(d_kv_a), d_norm, d_kv_b]
    }
}
