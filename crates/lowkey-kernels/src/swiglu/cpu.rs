//! The activation between the products of a feed-forward layer, on the CPU.

use burn::backend::Flex;
use burn_flex::FlexTensor;
use pulp::{Arch, Simd};
use rayon::prelude::*;

use super::autodiff::{SwigluGradients, SwigluOps};
use crate::cpu::parts::PIECE;
use crate::cpu::tensors::like;
use crate::cpu::vector::exp;

/// `out = silu(gate) · up`
pub(crate) fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    let pieces = out.par_chunks_mut(PIECE).zip(gate.par_chunks(PIECE).zip(up.par_chunks(PIECE)));
    pieces.for_each(|(out, (gate, up))| swiglu_piece(gate, up, out));
}

#[pulp::with_simd(swiglu_piece = Arch::new())]
#[inline(always)]
fn swiglu_piece_with<'a, S: Simd>(_simd: S, gate: &'a [f32], up: &'a [f32], out: &'a mut [f32]) {
    for (o, (g, u)) in out.iter_mut().zip(gate.iter().zip(up)) {
        *o = g / (1.0 + exp(-g)) * u;
    }
}

/// `(gate, up, d_inner)` → `(d_gate, d_up, inner)` for `inner = silu(gate) · up`.
pub(crate) fn swiglu_in_place(gate: &mut [f32], up: &mut [f32], inner: &mut [f32]) {
    let pieces = gate.par_chunks_mut(PIECE).zip(up.par_chunks_mut(PIECE)).zip(inner.par_chunks_mut(PIECE));
    pieces.for_each(|((gate, up), inner)| swiglu_piece_in_place(gate, up, inner));
}

#[pulp::with_simd(swiglu_piece_in_place = Arch::new())]
#[inline(always)]
fn swiglu_piece_in_place_with<'a, S: Simd>(_simd: S, gate: &'a mut [f32], up: &'a mut [f32], inner: &'a mut [f32]) {
    for ((gate, up), inner) in gate.iter_mut().zip(up.iter_mut()).zip(inner.iter_mut()) {
        let (g, u, d) = (*gate, *up, *inner);
        let s = 1.0 / (1.0 + exp(-g));
        let silu = g * s;
        *inner = silu * u;
        *up = d * silu;
        *gate = d * u * s * (1.0 + g * (1.0 - s));
    }
}

impl SwigluOps for Flex {
    fn swiglu(gate: FlexTensor, up: FlexTensor) -> FlexTensor {
        let (gate, up) = (gate.to_contiguous(), up.to_contiguous());
        let mut out = like(&gate);
        swiglu(gate.storage(), up.storage(), out.storage_mut());
        out
    }
}

impl SwigluGradients for Flex {
    fn swiglu_grad(gate: FlexTensor, up: FlexTensor, grad: FlexTensor) -> [FlexTensor; 2] {
        // Each is written to where it lies, or to a copy where somebody else reads it still.
        let [mut gate, mut up, mut grad] = [gate, up, grad].map(|x| x.to_contiguous());
        swiglu_in_place(gate.storage_mut(), up.storage_mut(), grad.storage_mut());
        [gate, up]
    }
}
