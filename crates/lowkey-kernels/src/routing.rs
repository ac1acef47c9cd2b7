//! Routing of a mixture of experts: which experts each token goes to, and the order in which experts see them. No sort, no read by the
//! host, no atomic addition: the order is counted, and the gradients of a gather are gathers too. No model here has experts yet.

#[cfg(test)]
mod tests;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, Backend, Dispatch, backend_extension};
use burn::tensor::{Int, Tensor, TensorData};

use crate::ops::Parents;

/// Choices of experts in the order of the experts.
///
/// Token `t` makes choices `t·k … t·k + k − 1`, best first; a choice's place is its index among all choices ordered by expert, then by
/// token.
#[derive(Clone, Debug)]
pub struct Routing {
    /// The chosen experts, best first, `[tokens, k]`.
    pub experts: Tensor<2, Int>,
    /// The place of each choice, `[tokens, k]`.
    pub places: Tensor<2, Int>,
    /// The choice at each place, `[tokens · k]`.
    pub order: Tensor<1, Int>,
    /// Where each expert's places begin, and where the last one's end, `[experts + 1]`.
    pub begins: Tensor<1, Int>,
}

/// Sends each token to the `k` experts with the highest scores (Shazeer et al., arXiv 1701.06538); of equal scores to the first. A
/// score that is no number counts as the lowest. No gradient flows through the choice: it flows through the weights that
/// [`Routing::from_experts`] takes.
///
/// On a GPU all of it is queued, none waited for.
///
/// # Shapes
/// `scores [tokens, experts]`, f32.
pub fn route(scores: Tensor<2>, k: usize) -> Routing {
    let [tokens, experts] = scores.dims();
    assert!(k >= 1 && k <= experts && tokens > 0, "route: {k} of {experts} experts for {tokens} tokens");
    let scores = scores.without_autodiff();
    #[cfg(feature = "gpu")]
    if let Some(routing) = crate::gpu::routing::route(&scores, k) {
        return routing;
    }
    let device = scores.device();
    let on_host = on_host(&scores.into_data().iter::<f32>().collect::<Vec<f32>>(), experts, k);
    let integers = |values: Vec<i32>| {
        let count = values.len();
        Tensor::<1, Int>::from_data(TensorData::new(values, [count]), &device)
    };
    let [chosen, places, order, begins] = on_host.map(integers);
    Routing { experts: chosen.reshape([tokens, k]), places: places.reshape([tokens, k]), order, begins }
}

/// Experts, places, order and begins.
fn on_host(scores: &[f32], experts: usize, k: usize) -> [Vec<i32>; 4] {
    let mut chosen = Vec::with_capacity(scores.len() / experts * k);
    let mut by_score: Vec<usize> = Vec::with_capacity(experts);
    for row in scores.chunks_exact(experts) {
        let score = |expert: usize| if row[expert].is_nan() { f32::NEG_INFINITY } else { row[expert] };
        by_score.clear();
        by_score.extend(0..experts);
        // Of equal ones the first: the index decides. Zeros of either sign are equal.
        let before = |a: &usize, b: &usize| {
            score(*b).partial_cmp(&score(*a)).unwrap_or(std::cmp::Ordering::Equal).then(a.cmp(b))
        };
        if k < experts {
            by_score.select_nth_unstable_by(k - 1, before);
        }
        by_score[..k].sort_unstable_by(before);
        chosen.extend(by_score[..k].iter().map(|expert| *expert as i32));
    }
    let mut begins = vec![0i32; experts + 1];
    for expert in &chosen {
        begins[*expert as usize + 1] += 1;
    }
    for expert in 0..experts {
        begins[expert + 1] += begins[expert];
    }
    let mut next = begins.clone();
    let (mut places, mut order) = (vec![0i32; chosen.len()], vec![0i32; chosen.len()]);
    for (choice, expert) in chosen.iter().enumerate() {
        let place = &mut next[*expert as usize];
        places[choice] = *place;
        order[*place as usize] = choice as i32;
        *place += 1;
    }
    [chosen, places, order, begins]
}

impl Routing {
    /// The tokens at their places: expert `e` reads rows `begins[e] .. begins[e + 1]`.
    ///
    /// # Shapes
    /// `x [tokens, d]` → `[tokens · k, d]`, f32.
    pub fn to_experts(&self, x: Tensor<2>) -> Tensor<2> {
        let (order, places) = self.dispatched();
        Tensor::from_dispatch(Dispatch::spread(x.into_dispatch(), order, places))
    }

    /// Each token's sum of what its experts make of it, weighted.
    ///
    /// # Shapes
    /// `y [tokens · k, d]`, `weights [tokens, k]` → `[tokens, d]`, f32.
    pub fn from_experts(&self, y: Tensor<2>, weights: Tensor<2>) -> Tensor<2> {
        assert_eq!(weights.dims(), self.experts.dims(), "there is a weight for each choice");
        let (order, places) = self.dispatched();
        Tensor::from_dispatch(Dispatch::collect(y.into_dispatch(), weights.into_dispatch(), order, places))
    }

    fn dispatched(&self) -> (burn::tensor::DispatchTensor, burn::tensor::DispatchTensor) {
        (self.order.clone().into_dispatch(), self.places.clone().into_dispatch())
    }
}

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
