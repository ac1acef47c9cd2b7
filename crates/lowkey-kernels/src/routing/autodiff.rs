//! Rows to their experts and back, and the place of both in autodiff: the gradients of a gather are gathers too.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, Backend, backend_extension};

use crate::autodiff::Parents;

/// Forward operations, dispatched to the backend of their arguments.
#[backend_extension(Autodiff, Flex, Cube: cfg(feature = "gpu"))]
pub(crate) trait RoutingOps: Backend {
    /// `out[p] = x[order[p] / k]`
    fn spread(x: FloatTensor<Self>, order: IntTensor<Self>, places: IntTensor<Self>) -> FloatTensor<Self>;

    /// `out[t] = Σⱼ weights[t, j] · y[places[t, j]]`
    fn collect(
        y: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        order: IntTensor<Self>,
        places: IntTensor<Self>,
    ) -> FloatTensor<Self>;
}

/// What the backward passes need from a backend.
pub(crate) trait RoutingGradients: RoutingOps {
    /// `d x[t] = Σⱼ grad[places[t, j]]`
    fn spread_grad(grad: FloatTensor<Self>, places: IntTensor<Self>) -> FloatTensor<Self>;

    /// `d y[p] = weights[order[p]] · grad[order[p] / k]`, `d weights[t, j] = grad[t] · y[places[t, j]]`
    fn collect_grad(saved: Collected<Self>, grad: FloatTensor<Self>) -> (FloatTensor<Self>, FloatTensor<Self>);
}

/// What [`RoutingOps::collect`] keeps.
#[derive(Debug)]
pub(crate) struct Collected<B: Backend> {
    /// Rows at their places.
    pub(crate) y: FloatTensor<B>,
    /// A weight for each choice.
    pub(crate) weights: FloatTensor<B>,
    /// The choice at each place.
    pub(crate) order: IntTensor<B>,
    /// The place of each choice.
    pub(crate) places: IntTensor<B>,
}

impl<B: Backend> Clone for Collected<B> {
    fn clone(&self) -> Self {
        let Self { y, weights, order, places } = self;
        Self { y: y.clone(), weights: weights.clone(), order: order.clone(), places: places.clone() }
    }
}

#[derive(Debug)]
struct Spread;

impl<B: RoutingGradients> Backward<B, 1> for Spread {
    type State = IntTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        parents.register::<B>(grads, [Some(B::spread_grad(grad, ops.state))]);
    }
}

#[derive(Debug)]
struct Collect;

impl<B: RoutingGradients> Backward<B, 2> for Collect {
    type State = Collected<B>;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        let (d_y, d_weights) = B::collect_grad(ops.state, grad);
        parents.register::<B>(grads, [Some(d_y), Some(d_weights)]);
    }
}

impl<B: RoutingGradients, C: CheckpointStrategy> RoutingOps for Autodiff<B, C> {
    fn spread(x: FloatTensor<Self>, order: IntTensor<Self>, places: IntTensor<Self>) -> FloatTensor<Self> {
        let prep = Spread.prepare::<C>([x.node()]).compute_bound().stateful();
        let out = B::spread(x.into_primitive(), order, places.clone());
        match prep {
            OpsKind::Tracked(prep) => prep.finish(places, out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn collect(
        y: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        order: IntTensor<Self>,
        places: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let prep = Collect.prepare::<C>([y.node(), weights.node()]).compute_bound().stateful();
        let (y, weights) = (y.into_primitive(), weights.into_primitive());
        let saved = Collected { y, weights, order, places };
        let Collected { y, weights, order, places } = saved.clone();
        let out = B::collect(y, weights, order, places);
        match prep {
            OpsKind::Tracked(prep) => prep.finish(saved, out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }
}
