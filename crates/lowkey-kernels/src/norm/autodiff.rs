//! The norm's place in autodiff.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, backend_extension};

use crate::autodiff::Parents;

/// The forward pass, dispatched to the backend of its arguments.
#[backend_extension(Autodiff, Flex, Cube: cfg(feature = "gpu"))]
pub(crate) trait NormOps: Backend {
    /// `x / sqrt(mean(x²) + eps) · weight` over the last axis.
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f64) -> FloatTensor<Self>;
}

/// What the backward pass needs from a backend.
pub(crate) trait NormGradients: NormOps {
    /// `(d x, d weight)`, the second where it is wanted.
    fn rms_norm_grad(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        eps: f64,
        of_weight: bool,
    ) -> (FloatTensor<Self>, Option<FloatTensor<Self>>);
}

#[derive(Debug)]
struct Norm {
    eps: f64,
}

impl<B: NormGradients> Backward<B, 2> for Norm {
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        let [_, of_weight] = parents.wanted();
        let (d_x, d_weight) = B::rms_norm_grad(ops.state.0, ops.state.1, grad, self.eps, of_weight);
        parents.register::<B>(grads, [Some(d_x), d_weight]);
    }
}

impl<B: NormGradients, C: CheckpointStrategy> NormOps for Autodiff<B, C> {
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f64) -> FloatTensor<Self> {
        let prep = Norm { eps }.prepare::<C>([x.node(), weight.node()]).compute_bound().stateful();
        let (x, weight) = (x.into_primitive(), weight.into_primitive());
        match prep {
            OpsKind::Tracked(prep) => prep.finish((x.clone(), weight.clone()), B::rms_norm(x, weight, eps)),
            OpsKind::UnTracked(prep) => prep.finish(B::rms_norm(x, weight, eps)),
        }
    }
}
