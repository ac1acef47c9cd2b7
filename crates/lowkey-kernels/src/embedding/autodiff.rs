//! The embedding's place in autodiff.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, Backend, backend_extension};

use crate::autodiff::Parents;

/// The forward pass, dispatched to the backend of its arguments.
#[backend_extension(Autodiff, Flex, Cube: cfg(feature = "gpu"))]
pub(crate) trait EmbeddingOps: Backend {
    /// Rows of `weight [vocab, d]` at `ids [batch, seq]` → `[batch, seq, d]`.
    fn embed(weight: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self>;
}

/// What the backward pass needs from a backend.
pub(crate) trait EmbeddingGradients: EmbeddingOps {
    /// `d weight [vocab, d]` of [`EmbeddingOps::embed`]: the sum over each token's places.
    fn embed_grad(weight: FloatTensor<Self>, ids: IntTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self>;
}

#[derive(Debug)]
struct Embed;

impl<B: EmbeddingGradients> Backward<B, 1> for Embed {
    type State = (FloatTensor<B>, IntTensor<B>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        let (weight, ids) = ops.state;
        parents.register::<B>(grads, [Some(B::embed_grad(weight, ids, grad))]);
    }
}

impl<B: EmbeddingGradients, C: CheckpointStrategy> EmbeddingOps for Autodiff<B, C> {
    fn embed(weight: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self> {
        let prep = Embed.prepare::<C>([weight.node()]).compute_bound().stateful();
        let weight = weight.into_primitive();
        match prep {
            OpsKind::Tracked(prep) => prep.finish((weight.clone(), ids.clone()), B::embed(weight, ids)),
            OpsKind::UnTracked(prep) => prep.finish(B::embed(weight, ids)),
        }
    }
}
