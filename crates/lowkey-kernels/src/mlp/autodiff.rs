//! The feed-forward layer's place in autodiff: it keeps the two inner activations, and forms the rest anew.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, backend_extension};

use crate::autodiff::{Operands, Parents, Wanted};
use crate::precision::Precision;

/// The forward pass, dispatched to the backend of its arguments.
#[backend_extension(Autodiff, Flex, Cube: cfg(feature = "gpu"))]
pub(crate) trait MlpOps: Backend {
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
}

/// What the backward pass needs from a backend.
pub(crate) trait MlpGradients: MlpOps + Operands {
    /// [`MlpOps::gated_mlp`] with the two inner activations, `[batch, seq, f]`, in the format that products read.
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
}

/// Norm, gate, up and down of a feed-forward layer.
pub(crate) type MlpWeights<B> = [FloatTensor<B>; 4];

/// What the forward pass of a feed-forward layer keeps.
pub(crate) struct MlpState<B: Backend> {
    /// Input.
    pub(crate) x: FloatTensor<B>,
    /// Weights, those of products as [`Operands::rounded`] has them where gradients are recorded.
    pub(crate) weights: MlpWeights<B>,
    /// `gate n` and `up n`.
    pub(crate) inner: [FloatTensor<B>; 2],
}

impl<B: Backend> Clone for MlpState<B> {
    fn clone(&self) -> Self {
        Self { x: self.x.clone(), weights: self.weights.clone(), inner: self.inner.clone() }
    }
}

impl<B: Backend> std::fmt::Debug for MlpState<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MlpState").finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct GatedMlp {
    eps: f64,
    precision: Precision,
}

impl<B: MlpGradients> Backward<B, 5> for GatedMlp {
    type State = MlpState<B>;

    fn backward(self, ops: Ops<Self::State, 5>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        let gradients = B::gated_mlp_grad(ops.state, grad, self.eps, self.precision, parents.wanted());
        parents.register::<B>(grads, gradients);
    }
}

impl<B: MlpGradients, C: CheckpointStrategy> MlpOps for Autodiff<B, C> {
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
}
