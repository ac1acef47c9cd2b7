//! The attention's place in autodiff: what its backward pass keeps.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, Backend, backend_extension};

use crate::autodiff::Parents;
use crate::precision::Precision;

/// The forward pass, dispatched to the backend of its arguments.
#[backend_extension(Autodiff, Flex, Cube: cfg(feature = "gpu"))]
pub(crate) trait CausalAttentionOps: Backend {
    /// Causal attention within documents: `q [B, T, H, N+R]`, `kv [B, T, G, N+V]`, `k_pe [B, T, R]`, `starts [B, T]` →
    /// `[B, T, H·V]`.
    fn causal_attention(
        q: FloatTensor<Self>,
        kv: FloatTensor<Self>,
        k_pe: FloatTensor<Self>,
        starts: IntTensor<Self>,
        shape: AttentionShape,
    ) -> FloatTensor<Self>;
}

/// What the backward pass needs from a backend.
pub(crate) trait CausalAttentionGradients: CausalAttentionOps {
    /// [`CausalAttentionOps::causal_attention`] with the log-sum-exp of each query's scores, `[B, H, T]`.
    fn causal_attention_saving(
        q: FloatTensor<Self>,
        kv: FloatTensor<Self>,
        k_pe: FloatTensor<Self>,
        starts: IntTensor<Self>,
        shape: AttentionShape,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// `(d q, d kv, d k_pe)`.
    fn causal_attention_grad(
        saved: AttentionState<Self>,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
}

/// Sizes and scale of an attention; the other sizes follow from its arguments.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct AttentionShape {
    /// Width of the part of a key that a head has to itself.
    pub(crate) nope: usize,
    /// Width of the part of a key that all heads share; 0: the shared key is not read.
    pub(crate) rope: usize,
    /// Factor on q·k.
    pub(crate) scale: f64,
    /// What it may be computed in.
    pub(crate) precision: Precision,
}

/// What the forward pass of an attention keeps for its backward pass: no T×T tensor.
#[derive(Debug)]
pub(crate) struct AttentionState<B: Backend> {
    /// Queries.
    pub(crate) q: FloatTensor<B>,
    /// Keys without position, and values.
    pub(crate) kv: FloatTensor<B>,
    /// Shared keys.
    pub(crate) k_pe: FloatTensor<B>,
    /// Document starts.
    pub(crate) starts: IntTensor<B>,
    /// Output.
    pub(crate) out: FloatTensor<B>,
    /// Log-sum-exp of the scores.
    pub(crate) lse: FloatTensor<B>,
    /// Sizes and scale.
    pub(crate) shape: AttentionShape,
}

impl<B: Backend> Clone for AttentionState<B> {
    fn clone(&self) -> Self {
        Self {
            q: self.q.clone(),
            kv: self.kv.clone(),
            k_pe: self.k_pe.clone(),
            starts: self.starts.clone(),
            out: self.out.clone(),
            lse: self.lse.clone(),
            shape: self.shape,
        }
    }
}

#[derive(Debug)]
struct CausalAttention;

impl<B: CausalAttentionGradients> Backward<B, 3> for CausalAttention {
    type State = AttentionState<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        let (d_q, d_kv, d_k_pe) = B::causal_attention_grad(ops.state, grad);
        parents.register::<B>(grads, [Some(d_q), Some(d_kv), Some(d_k_pe)]);
    }
}

impl<B: CausalAttentionGradients, C: CheckpointStrategy> CausalAttentionOps for Autodiff<B, C> {
    fn causal_attention(
        q: FloatTensor<Self>,
        kv: FloatTensor<Self>,
        k_pe: FloatTensor<Self>,
        starts: IntTensor<Self>,
        shape: AttentionShape,
    ) -> FloatTensor<Self> {
        let prep = CausalAttention.prepare::<C>([q.node(), kv.node(), k_pe.node()]).compute_bound().stateful();
        let (q, kv, k_pe) = (q.into_primitive(), kv.into_primitive(), k_pe.into_primitive());
        match prep {
            OpsKind::Tracked(prep) => {
                let (out, lse) = B::causal_attention_saving(q.clone(), kv.clone(), k_pe.clone(), starts.clone(), shape);
                let state = AttentionState { q, kv, k_pe, starts, out: out.clone(), lse, shape };
                prep.finish(state, out)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::causal_attention(q, kv, k_pe, starts, shape)),
        }
    }
}
