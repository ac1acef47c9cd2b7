//! Their place in autodiff: for the gradient of the matrix the input is formed anew. That of the input goes to the input, as that of the
//! map beside it does, and is carried on once for both.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, backend_extension};

use crate::autodiff::{Operands, Parents, Wanted};
use crate::linear::autodiff::{LinearGradients, ProjectState};
use crate::norm::autodiff::NormOps;
use crate::precision::Precision;
use crate::swiglu::autodiff::SwigluOps;

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

/// What the backward pass needs from a backend.
trait RecalledGradients: RecalledOps + LinearGradients + NormOps + SwigluOps + Operands {}

impl<B: RecalledOps + LinearGradients + NormOps + SwigluOps + Operands> RecalledGradients for B {}

/// Something that is a function of tensors which are kept anyway.
#[derive(Debug)]
enum Recall<B: Backend> {
    Norm { x: FloatTensor<B>, gain: FloatTensor<B>, eps: f64 },
    Swiglu { gate: FloatTensor<B>, up: FloatTensor<B> },
}

impl<B: Backend> Clone for Recall<B> {
    fn clone(&self) -> Self {
        match self {
            Self::Norm { x, gain, eps } => Self::Norm { x: x.clone(), gain: gain.clone(), eps: *eps },
            Self::Swiglu { gate, up } => Self::Swiglu { gate: gate.clone(), up: up.clone() },
        }
    }
}

impl<B: RecalledGradients> Recall<B> {
    fn form(self) -> FloatTensor<B> {
        match self {
            Self::Norm { x, gain, eps } => B::rms_norm(x, gain, eps),
            Self::Swiglu { gate, up } => B::swiglu(gate, up),
        }
    }
}

/// What the forward pass keeps: of each argument what the gradient of the other takes, where that one is wanted.
#[derive(Clone, Debug)]
struct Kept<B: Backend> {
    input: Option<Recall<B>>,
    weight: Option<FloatTensor<B>>,
}

#[derive(Debug)]
struct ProjectRecalled {
    precision: Precision,
}

impl<B: RecalledGradients> Backward<B, 2> for ProjectRecalled {
    type State = Kept<B>;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        let Kept { input, weight } = ops.state;
        let x = input.map(|input| B::rounded(input.form(), self.precision));
        parents.register::<B>(grads, B::project_grad(ProjectState { x, weight }, grad, self.precision));
    }
}

/// `x Wᵀ`, of an x that `input` forms.
fn project<B: RecalledGradients, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    weight: FloatTensor<Autodiff<B, C>>,
    input: Recall<B>,
    precision: Precision,
) -> FloatTensor<Autodiff<B, C>> {
    let [of_x, of_weight]: Wanted<2> = [x.is_tracked(), weight.is_tracked()];
    let prep = ProjectRecalled { precision }.prepare::<C>([x.node(), weight.node()]).compute_bound().stateful();
    let [x, weight] = [x, weight].map(|x| B::rounded(x.into_primitive(), precision));
    match prep {
        OpsKind::Tracked(prep) => {
            let kept = Kept { input: of_weight.then_some(input), weight: of_x.then(|| weight.clone()) };
            prep.finish(kept, B::project(x, weight, precision))
        }
        OpsKind::UnTracked(prep) => prep.finish(B::project(x, weight, precision)),
    }
}

impl<B: RecalledGradients, C: CheckpointStrategy> RecalledOps for Autodiff<B, C> {
    fn project_normed(
        normed: FloatTensor<Self>,
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f64,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let input = Recall::Norm { x: x.into_primitive(), gain: gain.into_primitive(), eps };
        project::<B, C>(normed, weight, input, precision)
    }

    fn project_swiglu(
        inner: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let input = Recall::Swiglu { gate: gate.into_primitive(), up: up.into_primitive() };
        project::<B, C>(inner, weight, input, precision)
    }
}
