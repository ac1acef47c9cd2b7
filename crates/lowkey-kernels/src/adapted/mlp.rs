//! The feed-forward half of a block whose three maps have adapters, as one operation: as that of trained maps, it keeps the two inner
//! activations, and forms the rest anew.

mod cpu;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, backend_extension};

use super::autodiff::Map;
use crate::autodiff::{Parents, Wanted};
use crate::precision::Precision;
use crate::recalled::autodiff::Forms;

/// The forward pass, dispatched to the backend of its arguments.
#[backend_extension(Autodiff, Flex, Cube: cfg(feature = "gpu"))]
pub(crate) trait AdaptedMlpOps: Backend {
    /// `x + down(silu(gate n) · up n)`, `n = RMSNorm(x)`, for `x [batch, seq, d]`, `norm [d]`.
    fn adapted_mlp(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        #[extension_type] gate: Map<Self>,
        #[extension_type] up: Map<Self>,
        #[extension_type] down: Map<Self>,
        eps: f64,
        precision: Precision,
    ) -> FloatTensor<Self>;
}

/// Of gate, up and down the numbers between A and B; `gate n` and `up n`.
pub(crate) type Between<B> = ([FloatTensor<B>; 3], [FloatTensor<B>; 2]);

/// What the backward pass needs from a backend.
pub(crate) trait AdaptedMlpGradients: AdaptedMlpOps + Forms {
    /// [`AdaptedMlpOps::adapted_mlp`] with what its backward pass takes.
    fn adapted_mlp_saving(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        maps: [Map<Self>; 3],
        eps: f64,
        precision: Precision,
    ) -> (FloatTensor<Self>, Between<Self>);

    /// Those gradients of `x, norm` and of each map's `a, b` that are wanted; may consume what was kept.
    fn adapted_mlp_grad(
        saved: AdaptedMlpState<Self>,
        grad: FloatTensor<Self>,
        eps: f64,
        precision: Precision,
        wanted: Wanted<8>,
    ) -> [Option<FloatTensor<Self>>; 8];
}

/// What the forward pass keeps.
pub(crate) struct AdaptedMlpState<B: Backend> {
    /// Input.
    pub(super) x: FloatTensor<B>,
    /// Gain of the norm.
    pub(super) norm: FloatTensor<B>,
    /// Gate, up and down.
    pub(super) maps: [Map<B>; 3],
    pub(super) between: Between<B>,
}

impl<B: Backend> Clone for AdaptedMlpState<B> {
    fn clone(&self) -> Self {
        let Self { x, norm, maps, between } = self;
        Self { x: x.clone(), norm: norm.clone(), maps: maps.clone(), between: between.clone() }
    }
}

impl<B: Backend> std::fmt::Debug for AdaptedMlpState<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AdaptedMlpState").finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct AdaptedMlp {
    eps: f64,
    precision: Precision,
}

impl<B: AdaptedMlpGradients> Backward<B, 8> for AdaptedMlp {
    type State = AdaptedMlpState<B>;

    fn backward(self, ops: Ops<Self::State, 8>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        let wanted = parents.wanted();
        parents.register::<B>(grads, B::adapted_mlp_grad(ops.state, grad, self.eps, self.precision, wanted));
    }
}

impl<B: AdaptedMlpGradients, C: CheckpointStrategy> AdaptedMlpOps for Autodiff<B, C> {
    fn adapted_mlp(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        gate: Map<Self>,
        up: Map<Self>,
        down: Map<Self>,
        eps: f64,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let factors = [&gate.a, &gate.b, &up.a, &up.b, &down.a, &down.b];
        let [gate_a, gate_b, up_a, up_b, down_a, down_b] = factors.map(|factor| factor.node());
        let nodes = [x.node(), norm.node(), gate_a, gate_b, up_a, up_b, down_a, down_b];
        let prep = AdaptedMlp { eps, precision }.prepare::<C>(nodes).compute_bound().stateful();
        let (x, norm) = (x.into_primitive(), norm.into_primitive());
        let maps = [gate, up, down].map(|map| Map::<B>::plain(map, precision));
        match prep {
            OpsKind::Tracked(prep) => {
                let (out, between) = B::adapted_mlp_saving(x.clone(), norm.clone(), maps.clone(), eps, precision);
                prep.finish(AdaptedMlpState { x, norm, maps, between }, out)
            }
            OpsKind::UnTracked(prep) => {
                let [gate, up, down] = maps;
                prep.finish(B::adapted_mlp(x, norm, gate, up, down, eps, precision))
            }
        }
    }
}
