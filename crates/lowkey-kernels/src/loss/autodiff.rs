//! The losses' place in autodiff: their gradients are formed with them, and kept.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, AutodiffBackend, Backend, backend_extension};
use burn::tensor::{Shape, Slice};

use crate::autodiff::{Parents, Wanted};
use crate::precision::Precision;

/// Forward passes, dispatched to the backend of their arguments.
#[backend_extension(Autodiff, Flex, Cube: cfg(feature = "gpu"))]
pub(crate) trait LossOps: Backend {
    /// `Σ weight · (nats + z_loss · log² Z)` and its second part, `[2]`; a gradient flows through the first. For `h [n, d]`,
    /// `weight [vocab, d]`, `targets [n]`, negative for none, `label_weights [n]` or `[1]`.
    fn cross_entropy_sum(
        h: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
        label_weights: FloatTensor<Self>,
        z_loss: f64,
        precision: Precision,
    ) -> FloatTensor<Self>;

    /// `nats = −log softmax(W h)[target]` per token, `[n]`, without a gradient.
    fn cross_entropy_each(
        h: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self>;

    /// `Σ share · KL(softmax(W t) ‖ softmax(W h)) + (1 − share) · nats`, `[1]`; `t` and its W are not differentiated.
    fn distill_sum(
        h: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        teacher: FloatTensor<Self>,
        targets: IntTensor<Self>,
        share: f64,
        precision: Precision,
    ) -> FloatTensor<Self>;

    /// A sum `[1]` that was computed with its gradients, `d_h` and `d_weight` of the shapes of `h` and `weight`. Of what is not
    /// differentiated the gradient is not looked at.
    fn with_gradients(
        h: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        sum: FloatTensor<Self>,
        d_h: FloatTensor<Self>,
        d_weight: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
}

/// What the backward pass needs from a backend.
pub(crate) trait LossGradients: LossOps {
    /// The sums with those gradients of the first that are wanted: `(sums [2], [d h, d weight])`.
    fn cross_entropy_sum_saving(
        h: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
        label_weights: FloatTensor<Self>,
        z_loss: f64,
        precision: Precision,
        wanted: Wanted<2>,
    ) -> (FloatTensor<Self>, [Option<FloatTensor<Self>>; 2]);

    /// [`LossOps::distill_sum`], and those gradients of the sum that are wanted: `(sum, [d h, d weight])`.
    fn distill_sum_saving(
        h: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        teacher: FloatTensor<Self>,
        targets: IntTensor<Self>,
        share: f64,
        precision: Precision,
        wanted: Wanted<2>,
    ) -> (FloatTensor<Self>, [Option<FloatTensor<Self>>; 2]);

    /// A gradient times the only number of `factor [1, 1]`.
    fn times(gradient: FloatTensor<Self>, factor: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_mul(gradient, factor)
    }
}

#[derive(Debug)]
struct CrossEntropy;

impl<B: LossGradients> Backward<B, 2> for CrossEntropy {
    type State = [Option<FloatTensor<B>>; 2];

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        // The gradients of the sum were formed with it: what is left is the factor in front of the sum.
        let factor = B::float_slice(grad, &[Slice::from(0..1)]);
        let factor = B::float_reshape(factor, Shape::new([1, 1]));
        let gradients = ops.state.map(|gradient| gradient.map(|gradient| B::times(gradient, factor.clone())));
        parents.register::<B>(grads, gradients);
    }
}

impl<B: LossGradients, C: CheckpointStrategy> LossOps for Autodiff<B, C> {
    fn cross_entropy_sum(
        h: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
        label_weights: FloatTensor<Self>,
        z_loss: f64,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let wanted = [h.is_tracked(), weight.is_tracked()];
        let prep = CrossEntropy.prepare::<C>([h.node(), weight.node()]).compute_bound().stateful();
        let [h, weight, labels] = [h, weight, label_weights].map(|tensor| tensor.into_primitive());
        match prep {
            OpsKind::Tracked(prep) => {
                let (sums, gradients) =
                    B::cross_entropy_sum_saving(h, weight, targets, labels, z_loss, precision, wanted);
                prep.finish(gradients, sums)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::cross_entropy_sum(h, weight, targets, labels, z_loss, precision))
            }
        }
    }

    fn cross_entropy_each(
        h: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        Self::from_inner(B::cross_entropy_each(h.into_primitive(), weight.into_primitive(), targets, precision))
    }

    fn distill_sum(
        h: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        teacher: FloatTensor<Self>,
        targets: IntTensor<Self>,
        share: f64,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let wanted = [h.is_tracked(), weight.is_tracked()];
        let prep = CrossEntropy.prepare::<C>([h.node(), weight.node()]).compute_bound().stateful();
        let [h, weight, teacher] = [h, weight, teacher].map(|tensor| tensor.into_primitive());
        match prep {
            OpsKind::Tracked(prep) => {
                let (sum, gradients) = B::distill_sum_saving(h, weight, teacher, targets, share, precision, wanted);
                prep.finish(gradients, sum)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::distill_sum(h, weight, teacher, targets, share, precision)),
        }
    }

    fn with_gradients(
        h: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        sum: FloatTensor<Self>,
        d_h: FloatTensor<Self>,
        d_weight: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let [of_h, of_weight] = [h.is_tracked(), weight.is_tracked()];
        let prep = CrossEntropy.prepare::<C>([h.node(), weight.node()]).compute_bound().stateful();
        let [sum, d_h, d_weight] = [sum, d_h, d_weight].map(|tensor| tensor.into_primitive());
        match prep {
            OpsKind::Tracked(prep) => prep.finish([of_h.then_some(d_h), of_weight.then_some(d_weight)], sum),
            OpsKind::UnTracked(prep) => prep.finish(sum),
        }
    }
}
