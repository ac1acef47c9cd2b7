//! Their place in autodiff: for the gradient of the matrix the input is formed anew. That of the input goes to the input, as that of the
//! map beside it does, and is carried on once for both.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, ExtensionType, backend_extension};

use crate::autodiff::{Operands, Parents, Wanted};
use crate::linear::autodiff::{LinearGradients, ProjectState};
use crate::norm::autodiff::NormOps;
use crate::precision::Precision;
use crate::swiglu::autodiff::SwigluOps;

/// Forward passes, dispatched to the backend of their arguments.
#[backend_extension(Autodiff, Flex, Cube: cfg(feature = "gpu"))]
pub(crate) trait RecalledOps: Backend {
    /// `x Wᵀ` for `x [batch, seq, d_in]`, which `made` forms.
    fn project_recalled(
        x: FloatTensor<Self>,
        #[extension_type] made: Recall<Self>,
        weight: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self>;
}

/// What the backward pass needs from a backend.
trait RecalledGradients: RecalledOps + LinearGradients + Forms {}

impl<B: RecalledOps + LinearGradients + Forms> RecalledGradients for B {}

/// A backend that forms what was not kept.
pub(crate) trait Forms: NormOps + SwigluOps + Operands {}

impl<B: NormOps + SwigluOps + Operands> Forms for B {}

/// Something that is a function of tensors which are kept anyway, of one shape but for the gain.
#[derive(ExtensionType)]
pub(crate) enum Recall<B: Backend> {
    /// Itself.
    Given(FloatTensor<B>),
    /// A norm with a gain `[d_in]`.
    Norm { x: FloatTensor<B>, gain: FloatTensor<B>, eps: f64 },
    /// The activation of two.
    Swiglu { gate: FloatTensor<B>, up: FloatTensor<B> },
}

impl<B: Backend> Clone for Recall<B> {
    fn clone(&self) -> Self {
        match self {
            Self::Given(x) => Self::Given(x.clone()),
            Self::Norm { x, gain, eps } => Self::Norm { x: x.clone(), gain: gain.clone(), eps: *eps },
            Self::Swiglu { gate, up } => Self::Swiglu { gate: gate.clone(), up: up.clone() },
        }
    }
}

impl<B: Backend> std::fmt::Debug for Recall<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Recall")
    }
}

impl<B: Forms> Recall<B> {
    /// What products read of it.
    pub(crate) fn form(self, precision: Precision) -> FloatTensor<B> {
        let x = match self {
            Self::Given(x) => x,
            Self::Norm { x, gain, eps } => B::rms_norm(x, gain, eps),
            Self::Swiglu { gate, up } => B::swiglu(gate, up),
        };
        B::rounded(x, precision)
    }

    /// The same outside the graph.
    pub(crate) fn plain<C: CheckpointStrategy>(made: Recall<Autodiff<B, C>>, precision: Precision) -> Self {
        match made {
            Recall::Given(x) => Self::Given(B::rounded(x.into_primitive(), precision)),
            Recall::Norm { x, gain, eps } => Self::Norm { x: x.into_primitive(), gain: gain.into_primitive(), eps },
            Recall::Swiglu { gate, up } => Self::Swiglu { gate: gate.into_primitive(), up: up.into_primitive() },
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
        let x = input.map(|input| input.form(self.precision));
        parents.register::<B>(grads, B::project_grad(ProjectState { x, weight }, grad, self.precision));
    }
}

impl<B: RecalledGradients, C: CheckpointStrategy> RecalledOps for Autodiff<B, C> {
    fn project_recalled(
        x: FloatTensor<Self>,
        made: Recall<Self>,
        weight: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let [of_x, of_weight]: Wanted<2> = [x.is_tracked(), weight.is_tracked()];
        let prep = ProjectRecalled { precision }.prepare::<C>([x.node(), weight.node()]).compute_bound().stateful();
        let made = Recall::<B>::plain(made, precision);
        let [x, weight] = [x, weight].map(|x| B::rounded(x.into_primitive(), precision));
        match prep {
            OpsKind::Tracked(prep) => {
                let kept = Kept { input: of_weight.then(|| made.clone()), weight: of_x.then(|| weight.clone()) };
                prep.finish(kept, B::project_recalled(x, made, weight, precision))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::project_recalled(x, made, weight, precision)),
        }
    }
}
