//! The parts of a decoder block as operations with a backward pass of their own: what they save, and what they form anew.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, Backend, backend_extension};

use crate::block::MlaDims;
use crate::ops::{Parents, Wanted};
use crate::precision::Precision;

/// Forward operations, dispatched to the backend of their arguments.
#[backend_extension(Autodiff, Flex, Cube: cfg(feature = "gpu"))]
pub(crate) trait BlockOps: Backend {
    /// `x Wᵀ` for `x [batch, seq, d_in]`, `weight [d_out, d_in]`.
    fn project(x: FloatTensor<Self>, weight: FloatTensor<Self>, precision: Precision) -> FloatTensor<Self>;

    /// `residual + x Wᵀ`, `residual [batch, seq, d_out]`.
    fn add_project(
        residual: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self>;

    /// `x + down(silu(gate n) · up n)`, `n = RMSNorm(x)`, for `x [batch, seq, d]`, `norm [d]`, `gate`, `up [f, d]`,
    /// `down [d, f]`.
    fn gated_mlp(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        eps: f64,
        precision: Precision,
    ) -> FloatTensor<Self>;

    /// Multi-head Latent Attention over whole sequences, `[batch, seq, H·V]`; see [`crate::latent_attention`].
    #[allow(clippy::too_many_arguments, reason = "the dispatch to a backend takes each tensor by itself")]
    fn latent_attention(
        q: FloatTensor<Self>,
        kv_a: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        kv_b: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        starts: IntTensor<Self>,
        dims: MlaDims,
        precision: Precision,
    ) -> FloatTensor<Self>;
}

/// What the backward passes need from a backend.
pub(crate) trait BlockGradients: BlockOps {
    /// What products read of `x`, an input or a weight, and so all that has to be kept of it.
    fn rounded(x: FloatTensor<Self>, _: Precision) -> FloatTensor<Self> {
        x
    }

    /// `[d x, d weight]` of [`BlockOps::project`], each where what it takes was kept.
    fn project_grad(
        saved: ProjectState<Self>,
        grad: FloatTensor<Self>,
        precision: Precision,
    ) -> [Option<FloatTensor<Self>>; 2];

    /// [`BlockOps::gated_mlp`] with the two inner activations, `[batch, seq, f]`, in the format that products read.
    fn gated_mlp_saving(
        x: FloatTensor<Self>,
        weights: MlpWeights<Self>,
        eps: f64,
        precision: Precision,
    ) -> [FloatTensor<Self>; 3];

    /// Those gradients of `x, norm, gate, up, down` that are wanted; consumes the inner activations.
    fn gated_mlp_grad(
        saved: MlpState<Self>,
        grad: FloatTensor<Self>,
        eps: f64,
        precision: Precision,
        wanted: Wanted<5>,
    ) -> [Option<FloatTensor<Self>>; 5];

    /// [`BlockOps::latent_attention`] with the log-sum-exp of each query's scores, `[batch, H, seq]`.
    fn latent_attention_saving(inputs: LatentInputs<Self>) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// Those gradients of `q, kv_a, norm, kv_b` that are wanted.
    fn latent_attention_grad(
        saved: LatentState<Self>,
        grad: FloatTensor<Self>,
        wanted: Wanted<4>,
    ) -> [Option<FloatTensor<Self>>; 4];
}

/// What the forward pass of a projection keeps: of each argument what the gradient of the other takes, where that one is wanted. Both
/// as [`BlockGradients::rounded`] has them.
pub(crate) struct ProjectState<B: Backend> {
    /// Input `[batch, seq, d_in]`, where the weight's gradient is wanted.
    pub(crate) x: Option<FloatTensor<B>>,
    /// Weight `[d_out, d_in]`, where the input's is.
    pub(crate) weight: Option<FloatTensor<B>>,
}

/// Norm, gate, up and down of a feed-forward layer.
pub(crate) type MlpWeights<B> = [FloatTensor<B>; 4];

/// What the forward pass of a feed-forward layer keeps.
pub(crate) struct MlpState<B: Backend> {
    /// Input.
    pub(crate) x: FloatTensor<B>,
    /// Weights, those of products as [`BlockGradients::rounded`] has them where gradients are recorded.
    pub(crate) weights: MlpWeights<B>,
    /// `gate n` and `up n`.
    pub(crate) inner: [FloatTensor<B>; 2],
}

/// Arguments of a latent attention.
pub(crate) struct LatentInputs<B: Backend> {
    /// Rotated queries, as [`BlockGradients::rounded`] has them where gradients are recorded.
    pub(crate) q: FloatTensor<B>,
    /// Latent before its norm, shared key before its rotation.
    pub(crate) kv_a: FloatTensor<B>,
    /// Gain of the latent's norm.
    pub(crate) norm: FloatTensor<B>,
    /// W_UK and W_UV.
    pub(crate) kv_b: FloatTensor<B>,
    /// Cosines.
    pub(crate) cos: FloatTensor<B>,
    /// Sines.
    pub(crate) sin: FloatTensor<B>,
    /// Document starts.
    pub(crate) starts: IntTensor<B>,
    /// Sizes and factors.
    pub(crate) dims: MlaDims,
    /// Format of the operands of products.
    pub(crate) precision: Precision,
}

/// What the forward pass of a latent attention keeps: no keys, no values.
pub(crate) struct LatentState<B: Backend> {
    /// Its arguments.
    pub(crate) inputs: LatentInputs<B>,
    /// Output.
    pub(crate) out: FloatTensor<B>,
    /// Log-sum-exp of the scores.
    pub(crate) lse: FloatTensor<B>,
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

impl<B: Backend> Clone for MlpState<B> {
    fn clone(&self) -> Self {
        Self { x: self.x.clone(), weights: self.weights.clone(), inner: self.inner.clone() }
    }
}

impl<B: Backend> Clone for LatentInputs<B> {
    fn clone(&self) -> Self {
        Self {
            q: self.q.clone(),
            kv_a: self.kv_a.clone(),
            norm: self.norm.clone(),
            kv_b: self.kv_b.clone(),
            cos: self.cos.clone(),
            sin: self.sin.clone(),
            starts: self.starts.clone(),
            dims: self.dims,
            precision: self.precision,
        }
    }
}

impl<B: Backend> Clone for LatentState<B> {
    fn clone(&self) -> Self {
        Self { inputs: self.inputs.clone(), out: self.out.clone(), lse: self.lse.clone() }
    }
}

impl<B: Backend> std::fmt::Debug for MlpState<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MlpState").finish_non_exhaustive()
    }
}

impl<B: Backend> std::fmt::Debug for LatentState<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LatentState").field("dims", &self.inputs.dims).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Project {
    precision: Precision,
}

impl<B: BlockGradients> Backward<B, 2> for Project {
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

impl<B: BlockGradients> Backward<B, 3> for AddProject {
    type State = ProjectState<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        let [d_x, d_weight] = B::project_grad(ops.state, grad.clone(), self.precision);
        parents.register::<B>(grads, [Some(grad), d_x, d_weight]);
    }
}

#[derive(Debug)]
struct GatedMlp {
    eps: f64,
    precision: Precision,
}

impl<B: BlockGradients> Backward<B, 5> for GatedMlp {
    type State = MlpState<B>;

    fn backward(self, ops: Ops<Self::State, 5>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        let gradients = B::gated_mlp_grad(ops.state, grad, self.eps, self.precision, parents.wanted());
        parents.register::<B>(grads, gradients);
    }
}

#[derive(Debug)]
struct LatentAttention;

impl<B: BlockGradients> Backward<B, 4> for LatentAttention {
    type State = LatentState<B>;

    fn backward(self, ops: Ops<Self::State, 4>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        let gradients = B::latent_attention_grad(ops.state, grad, parents.wanted());
        parents.register::<B>(grads, gradients);
    }
}

impl<B: BlockGradients, C: CheckpointStrategy> BlockOps for Autodiff<B, C> {
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

    fn gated_mlp(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        eps: f64,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let nodes = [x.node(), norm.node(), gate.node(), up.node(), down.node()];
        let prep = GatedMlp { eps, precision }.prepare::<C>(nodes).compute_bound().stateful();
        let x = x.into_primitive();
        let [gate, up, down] = [gate, up, down].map(|weight| B::rounded(weight.into_primitive(), precision));
        let weights = [norm.into_primitive(), gate, up, down];
        match prep {
            OpsKind::Tracked(prep) => {
                let [out, gate, up] = B::gated_mlp_saving(x.clone(), weights.clone(), eps, precision);
                prep.finish(MlpState { x, weights, inner: [gate, up] }, out)
            }
            OpsKind::UnTracked(prep) => {
                let [norm, gate, up, down] = weights;
                prep.finish(B::gated_mlp(x, norm, gate, up, down, eps, precision))
            }
        }
    }

    fn latent_attention(
        q: FloatTensor<Self>,
        kv_a: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        kv_b: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        starts: IntTensor<Self>,
        dims: MlaDims,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let nodes = [q.node(), kv_a.node(), norm.node(), kv_b.node()];
        let prep = LatentAttention.prepare::<C>(nodes).compute_bound().stateful();
        let [q, kv_a, norm, kv_b, cos, sin] = [q, kv_a, norm, kv_b, cos, sin].map(|tensor| tensor.into_primitive());
        let [q, kv_b] = [q, kv_b].map(|x| B::rounded(x, precision));
        match prep {
            OpsKind::Tracked(prep) => {
                let inputs = LatentInputs { q, kv_a, norm, kv_b, cos, sin, starts, dims, precision };
                let (out, lse) = B::latent_attention_saving(inputs.clone());
                prep.finish(LatentState { inputs, out: out.clone(), lse }, out)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::latent_attention(q, kv_a, norm, kv_b, cos, sin, starts, dims, precision))
            }
        }
    }
}
