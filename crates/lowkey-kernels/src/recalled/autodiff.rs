//! Their place in autodiff: the input is formed anew, and its gradient carried on to what it was made of.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, backend_extension};

use crate::autodiff::{Operands, Parents, Wanted};
use crate::linear::autodiff::{LinearGradients, ProjectState};
use crate::norm::autodiff::NormGradients;
use crate::precision::Precision;
use crate::swiglu::autodiff::SwigluGradients;

/// Forward passes, dispatched to the backend of their arguments.
#[backend_extension(Autodiff, Flex, Cube: cfg(feature = "gpu"))]
pub(crate) trait RecalledOps: Backend {
    /// `normed Wᵀ`, where `normed` is the norm of `x [batch, seq, d_in]` with a gain `[d_in]`.
    fn project_normed(
        normed: FloatTensor<Self>,
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f64,
        precision: Precision,
    ) -> FloatTensor<Self>;

    /// `inner Wᵀ`, where `inner` is the activation of `gate` and `up [batch, seq, d_in]`.
    fn project_swiglu(
        inner: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self>;
}

/// What the backward pass needs from a backend: the gradients of the parts.
trait RecalledGradients: LinearGradients + NormGradients + SwigluGradients + Operands {}

impl<B: LinearGradients + NormGradients + SwigluGradients + Operands> RecalledGradients for B {}

/// `[d x, d W]` of a map of `x`, each where it is wanted.
fn gradients<B: RecalledGradients>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    grad: FloatTensor<B>,
    precision: Precision,
    [of_x, of_weight]: Wanted<2>,
) -> [Option<FloatTensor<B>>; 2] {
    let saved = ProjectState { x: of_weight.then(|| B::rounded(x, precision)), weight: of_x.then_some(weight) };
    B::project_grad(saved, grad, precision)
}

#[derive(Debug)]
struct ProjectNormed {
    eps: f64,
    precision: Precision,
}

impl<B: RecalledGradients> Backward<B, 3> for ProjectNormed {
    type State = [FloatTensor<B>; 3];

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        let [of_x, of_gain, of_weight] = parents.wanted();
        let [x, gain, weight] = ops.state;
        let normed = B::rms_norm(x.clone(), gain.clone(), self.eps);
        let [d_normed, d_weight] = gradients::<B>(normed, weight, grad, self.precision, [of_x || of_gain, of_weight]);
        let (d_x, d_gain) = d_normed.map(|grad| B::rms_norm_grad(x, gain, grad, self.eps)).unzip();
        parents.register::<B>(grads, [d_x, d_gain, d_weight]);
    }
}

#[derive(Debug)]
struct ProjectSwiglu {
    precision: Precision,
}

impl<B: RecalledGradients> Backward<B, 3> for ProjectSwiglu {
    type State = [FloatTensor<B>; 3];

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        let [of_gate, of_up, of_weight] = parents.wanted();
        let [gate, up, weight] = ops.state;
        let inner = B::swiglu(gate.clone(), up.clone());
        let [d_inner, d_weight] = gradients::<B>(inner, weight, grad, self.precision, [of_gate || of_up, of_weight]);
        let (d_gate, d_up) = d_inner.map(|grad| B::swiglu_grad(gate, up, grad).into()).unzip();
        parents.register::<B>(grads, [d_gate, d_up, d_weight]);
    }
}

impl<B: RecalledGradients + RecalledOps, C: CheckpointStrategy> RecalledOps for Autodiff<B, C> {
    fn project_normed(
        normed: FloatTensor<Self>,
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f64,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let nodes = [x.node(), gain.node(), weight.node()];
        let prep = ProjectNormed { eps, precision }.prepare::<C>(nodes).compute_bound().stateful();
        let [normed, weight] = [normed, weight].map(|x| B::rounded(x.into_primitive(), precision));
        let (x, gain) = (x.into_primitive(), gain.into_primitive());
        match prep {
            OpsKind::Tracked(prep) => prep.finish([x, gain, weight.clone()], B::project(normed, weight, precision)),
            OpsKind::UnTracked(prep) => prep.finish(B::project(normed, weight, precision)),
        }
    }

    fn project_swiglu(
        inner: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let nodes = [gate.node(), up.node(), weight.node()];
        let prep = ProjectSwiglu { precision }.prepare::<C>(nodes).compute_bound().stateful();
        let [inner, weight] = [inner, weight].map(|x| B::rounded(x.into_primitive(), precision));
        let (gate, up) = (gate.into_primitive(), up.into_primitive());
        match prep {
            OpsKind::Tracked(prep) => prep.finish([gate, up, weight.clone()], B::project(inner, weight, precision)),
            OpsKind::UnTracked(prep) => prep.finish(B::project(inner, weight, precision)),
        }
    }
}
