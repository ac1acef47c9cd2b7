//! The operation's place in autodiff: it keeps no keys and no values.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, Backend, ExtensionType, backend_extension};

use super::arguments::MlaDims;
use crate::autodiff::{Operands, Parents, Wanted};
use crate::precision::Precision;

/// The forward pass, dispatched to the backend of its arguments.
#[backend_extension(Autodiff, Flex, Cube: cfg(feature = "gpu"))]
pub(crate) trait LatentAttentionOps: Backend {
    /// Multi-head Latent Attention over whole sequences, `[batch, seq, H·V]`; see [`crate::latent_attention`].
    fn latent_attention(#[extension_type] inputs: LatentInputs<Self>) -> FloatTensor<Self>;
}

/// What the backward pass needs from a backend.
pub(crate) trait LatentAttentionGradients: LatentAttentionOps + Operands {
    /// [`LatentAttentionOps::latent_attention`] with the log-sum-exp of each query's scores, `[batch, H, seq]`.
    fn latent_attention_saving(inputs: LatentInputs<Self>) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// Those gradients of `q, kv_a, norm, kv_b` that are wanted.
    fn latent_attention_grad(
        saved: LatentState<Self>,
        grad: FloatTensor<Self>,
        wanted: Wanted<4>,
    ) -> [Option<FloatTensor<Self>>; 4];
}

/// Arguments of a latent attention.
#[derive(ExtensionType)]
pub(crate) struct LatentInputs<B: Backend> {
    /// Rotated queries, as [`Operands::rounded`] has them where gradients are recorded.
    pub(crate) q: FloatTensor<B>,
    /// Latent before its norm, shared key before its rotation.
    pub(crate) kv_a: FloatTensor<B>,
    /// Gain of the latent's norm.
    pub(crate) norm: FloatTensor<B>,
    /// W_UK and W_UV.
    pub(crate) kv_b: FloatTensor<B>,
    /// Cosines.
    pub(crate) cos: FloatTensor<B>,
    /// Sines.
    pub(crate) sin: FloatTensor<B>,
    /// Document starts.
    pub(crate) starts: IntTensor<B>,
    /// Sizes and factors.
    pub(crate) dims: MlaDims,
    /// Format of the operands of products.
    pub(crate) precision: Precision,
}

/// What the forward pass of a latent attention keeps: no keys, no values.
pub(crate) struct LatentState<B: Backend> {
    /// Its arguments.
    pub(crate) inputs: LatentInputs<B>,
    /// Output.
    pub(crate) out: FloatTensor<B>,
    /// Log-sum-exp of the scores.
    pub(crate) lse: FloatTensor<B>,
}

impl<B: Backend> Clone for LatentInputs<B> {
    fn clone(&self) -> Self {
        Self {
            q: self.q.clone(),
            kv_a: self.kv_a.clone(),
            norm: self.norm.clone(),
            kv_b: self.kv_b.clone(),
            cos: self.cos.clone(),
            sin: self.sin.clone(),
            starts: self.starts.clone(),
            dims: self.dims,
            precision: self.precision,
        }
    }
}

impl<B: Backend> Clone for LatentState<B> {
    fn clone(&self) -> Self {
        Self { inputs: self.inputs.clone(), out: self.out.clone(), lse: self.lse.clone() }
    }
}

impl<B: Backend> std::fmt::Debug for LatentState<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LatentState").field("dims", &self.inputs.dims).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct LatentAttention;

impl<B: LatentAttentionGradients> Backward<B, 4> for LatentAttention {
    type State = LatentState<B>;

    fn backward(self, ops: Ops<Self::State, 4>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        let gradients = B::latent_attention_grad(ops.state, grad, parents.wanted());
        parents.register::<B>(grads, gradients);
    }
}

impl<B: LatentAttentionGradients, C: CheckpointStrategy> LatentAttentionOps for Autodiff<B, C> {
    fn latent_attention(inputs: LatentInputs<Self>) -> FloatTensor<Self> {
        let LatentInputs { q, kv_a, norm, kv_b, cos, sin, starts, dims, precision } = inputs;
        let nodes = [q.node(), kv_a.node(), norm.node(), kv_b.node()];
        let prep = LatentAttention.prepare::<C>(nodes).compute_bound().stateful();
        let [q, kv_a, norm, kv_b, cos, sin] = [q, kv_a, norm, kv_b, cos, sin].map(|tensor| tensor.into_primitive());
        let [q, kv_b] = [q, kv_b].map(|x| B::rounded(x, precision));
        let inputs = LatentInputs { q, kv_a, norm, kv_b, cos, sin, starts, dims, precision };
        match prep {
            OpsKind::Tracked(prep) => {
                let (out, lse) = B::latent_attention_saving(inputs.clone());
                prep.finish(LatentState { inputs, out: out.clone(), lse }, out)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::latent_attention(inputs)),
        }
    }
}
