//! The rotation's place in autodiff: its gradient is turned back.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, backend_extension};

use crate::autodiff::Parents;

/// The forward pass, dispatched to the backend of its arguments.
#[backend_extension(Autodiff, Flex, Cube: cfg(feature = "gpu"))]
pub(crate) trait RotaryOps: Backend {
    /// Rotates `2 · half` components, from component `from` on, of `x [batch, seq, heads, width]` by
    /// `cos`, `sin [batch or 1, seq, 1, half]`.
    fn rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        from: usize,
        interleaved: bool,
    ) -> FloatTensor<Self>;
}

/// What the backward pass needs from a backend.
pub(crate) trait RotaryGradients: RotaryOps {
    /// The transposed map of [`RotaryOps::rotate`].
    fn rotate_back(
        grad: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        from: usize,
        interleaved: bool,
    ) -> FloatTensor<Self>;
}

#[derive(Debug)]
struct Rotate {
    from: usize,
    interleaved: bool,
}

impl<B: RotaryGradients> Backward<B, 1> for Rotate {
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        let (cos, sin) = ops.state;
        parents.register::<B>(grads, [Some(B::rotate_back(grad, cos, sin, self.from, self.interleaved))]);
    }
}

impl<B: RotaryGradients, C: CheckpointStrategy> RotaryOps for Autodiff<B, C> {
    fn rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        from: usize,
        interleaved: bool,
    ) -> FloatTensor<Self> {
        let prep = Rotate { from, interleaved }.prepare::<C>([x.node()]).compute_bound().stateful();
        let (x, cos, sin) = (x.into_primitive(), cos.into_primitive(), sin.into_primitive());
        match prep {
            OpsKind::Tracked(prep) => {
                prep.finish((cos.clone(), sin.clone()), B::rotate(x, cos, sin, from, interleaved))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::rotate(x, cos, sin, from, interleaved)),
        }
    }
}
