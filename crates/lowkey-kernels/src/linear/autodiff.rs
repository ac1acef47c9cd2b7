//! The linear map's place in autodiff: of each argument it keeps what the gradient of the other takes.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, backend_extension};

use crate::autodiff::{Operands, Parents, Wanted};
use crate::precision::Precision;

/// Forward passes, dispatched to the backend of their arguments.
#[backend_extension(Autodiff, Flex, Cube: cfg(feature = "gpu"))]
pub(crate) trait LinearOps: Backend {
    /// `x Wᵀ` for `x [batch, seq, d_in]`, `weight [d_out, d_in]`.
    fn project(x: FloatTensor<Self>, weight: FloatTensor<Self>, precision: Precision) -> FloatTensor<Self>;

    /// `residual + x Wᵀ`, `residual [batch, seq, d_out]`.
    fn add_project(
        residual: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self>;
}

/// What the backward pass needs from a backend.
pub(crate) trait LinearGradients: LinearOps + Operands {
    /// `[d x, d weight]` of [`LinearOps::project`], each where what it takes was kept.
    fn project_grad(
        saved: ProjectState<Self>,
        grad: FloatTensor<Self>,
        precision: Precision,
    ) -> [Option<FloatTensor<Self>>; 2];
}

/// What the forward pass of a projection keeps: of each argument what the gradient of the other takes, where that one is wanted. Both
/// as [`Operands::rounded`] has them.
pub(crate) struct ProjectState<B: Backend> {
    /// Input `[batch, seq, d_in]`, where the weight's gradient is wanted.
    pub(crate) x: Option<FloatTensor<B>>,
    /// Weight `[d_out, d_in]`, where the input's is.
    pub(crate) weight: Option<FloatTensor<B>>,
}

impl<B: Backend> ProjectState<B> {
    fn new(x: &FloatTensor<B>, weight: &FloatTensor<B>, [of_x, of_weight]: Wanted<2>) -> Self {
        Self { x: of_weight.then(|| x.clone()), weight: of_x.then(|| weight.clone()) }
    }
}

impl<B: Backend> Clone for ProjectState<B> {
    fn clone(&self) -> Self {
        Self { x: self.x.clone(), weight: self.weight.clone() }
    }
}

impl<B: Backend> std::fmt::Debug for ProjectState<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProjectState").finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Project {
    precision: Precision,
}

impl<B: LinearGradients> Backward<B, 2> for Project {
    type State = ProjectState<B>;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        parents.register::<B>(grads, B::project_grad(ops.state, grad, self.precision));
    }
}

#[derive(Debug)]
struct AddProject {
    precision: Precision,
}

impl<B: LinearGradients> Backward<B, 3> for AddProject {
    type State = ProjectState<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        let [d_x, d_weight] = B::project_grad(ops.state, grad.clone(), self.precision);
        parents.register::<B>(grads, [Some(grad), d_x, d_weight]);
    }
}

impl<B: LinearGradients, C: CheckpointStrategy> LinearOps for Autodiff<B, C> {
    fn project(x: FloatTensor<Self>, weight: FloatTensor<Self>, precision: Precision) -> FloatTensor<Self> {
        let wanted = [x.is_tracked(), weight.is_tracked()];
        let prep = Project { precision }.prepare::<C>([x.node(), weight.node()]).compute_bound().stateful();
        let [x, weight] = [x.into_primitive(), weight.into_primitive()].map(|x| B::rounded(x, precision));
        match prep {
            OpsKind::Tracked(prep) => {
                prep.finish(ProjectState::new(&x, &weight, wanted), B::project(x, weight, precision))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::project(x, weight, precision)),
        }
    }

    fn add_project(
        residual: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let wanted = [x.is_tracked(), weight.is_tracked()];
        let nodes = [residual.node(), x.node(), weight.node()];
        let prep = AddProject { precision }.prepare::<C>(nodes).compute_bound().stateful();
        let residual = residual.into_primitive();
        let [x, weight] = [x.into_primitive(), weight.into_primitive()].map(|x| B::rounded(x, precision));
        match prep {
            OpsKind::Tracked(prep) => {
                let saved = ProjectState::new(&x, &weight, wanted);
                prep.finish(saved, B::add_project(residual, x, weight, precision))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::add_project(residual, x, weight, precision)),
        }
    }
}
