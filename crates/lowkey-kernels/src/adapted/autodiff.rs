//! The map's place in autodiff: it keeps the r numbers between A and B, and of the input no more than what forms it anew.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, ExtensionType, backend_extension};

use crate::autodiff::{Parents, Wanted};
use crate::precision::Precision;
use crate::quantized_linear::autodiff::Frozen;
use crate::recalled::autodiff::{Forms, Recall};

/// Forward passes, dispatched to the backend of their arguments.
#[backend_extension(Autodiff, Flex, Cube: cfg(feature = "gpu"))]
pub(crate) trait AdaptedOps: Backend {
    /// `x Wᵀ + s·(x Aᵀ) Bᵀ` for `x [batch, seq, d_in]`, which `made` forms.
    fn adapted(
        x: FloatTensor<Self>,
        #[extension_type] map: Map<Self>,
        #[extension_type] made: Recall<Self>,
        precision: Precision,
    ) -> FloatTensor<Self>;

    /// The same added to `residual [batch, seq, d_out]`.
    fn add_adapted(
        residual: FloatTensor<Self>,
        x: FloatTensor<Self>,
        #[extension_type] map: Map<Self>,
        #[extension_type] made: Recall<Self>,
        precision: Precision,
    ) -> FloatTensor<Self>;
}

/// What the backward pass needs from a backend.
pub(crate) trait AdaptedGradients: AdaptedOps + Forms {
    /// The map's result, and `x Aᵀ`, `[batch, seq, r]`.
    fn adapted_saving(
        residual: Option<FloatTensor<Self>>,
        x: FloatTensor<Self>,
        map: Map<Self>,
        precision: Precision,
    ) -> [FloatTensor<Self>; 2];

    /// Those gradients of `x, a, b` that are wanted.
    fn adapted_grad(
        saved: AdaptedState<Self>,
        grad: FloatTensor<Self>,
        precision: Precision,
        wanted: Wanted<3>,
    ) -> [Option<FloatTensor<Self>>; 3];
}

/// A frozen matrix and what stands beside it.
#[derive(ExtensionType)]
pub(crate) struct Map<B: Backend> {
    /// W
    #[extension_type]
    pub(crate) weight: Frozen<B>,
    /// A `[r, d_in]`
    pub(crate) a: FloatTensor<B>,
    /// B `[d_out, r]`
    pub(crate) b: FloatTensor<B>,
    /// s
    pub(crate) scale: f64,
}

impl<B: Backend> Clone for Map<B> {
    fn clone(&self) -> Self {
        Self { weight: self.weight.clone(), a: self.a.clone(), b: self.b.clone(), scale: self.scale }
    }
}

impl<B: Forms> Map<B> {
    /// The same outside the graph, as products read it.
    pub(crate) fn plain<C: CheckpointStrategy>(map: Map<Autodiff<B, C>>, precision: Precision) -> Self {
        let Map { weight, a, b, scale } = map;
        let [a, b] = [a, b].map(|x| B::rounded(x.into_primitive(), precision));
        let weight = match weight {
            Frozen::Whole(weight) => Frozen::Whole(B::rounded(weight.into_primitive(), precision)),
            Frozen::Packed { words, scales, layout } => {
                Frozen::Packed { words, scales: scales.into_primitive(), layout }
            }
        };
        Self { weight, a, b, scale }
    }
}

/// What the forward pass keeps.
pub(crate) struct AdaptedState<B: Backend> {
    /// What forms the input, where A's gradient is wanted.
    pub(crate) input: Option<Recall<B>>,
    /// The matrices, as [`Operands::rounded`](crate::autodiff::Operands::rounded) has them.
    pub(crate) map: Map<B>,
    /// `x Aᵀ`
    pub(crate) low: FloatTensor<B>,
}

impl<B: Backend> Clone for AdaptedState<B> {
    fn clone(&self) -> Self {
        Self { input: self.input.clone(), map: self.map.clone(), low: self.low.clone() }
    }
}

impl<B: Backend> std::fmt::Debug for AdaptedState<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AdaptedState").finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Adapted {
    precision: Precision,
}

impl<B: AdaptedGradients> Backward<B, 3> for Adapted {
    type State = AdaptedState<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        let wanted = parents.wanted();
        parents.register::<B>(grads, B::adapted_grad(ops.state, grad, self.precision, wanted));
    }
}

#[derive(Debug)]
struct AddAdapted {
    precision: Precision,
}

impl<B: AdaptedGradients> Backward<B, 4> for AddAdapted {
    type State = AdaptedState<B>;

    fn backward(self, ops: Ops<Self::State, 4>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        let [_, wanted @ ..] = parents.wanted();
        let [d_x, d_a, d_b] = B::adapted_grad(ops.state, grad.clone(), self.precision, wanted);
        parents.register::<B>(grads, [Some(grad), d_x, d_a, d_b]);
    }
}

impl<B: AdaptedGradients, C: CheckpointStrategy> AdaptedOps for Autodiff<B, C> {
    fn adapted(x: FloatTensor<Self>, map: Map<Self>, made: Recall<Self>, precision: Precision) -> FloatTensor<Self> {
        let (nodes, of_a) = ([x.node(), map.a.node(), map.b.node()], map.a.is_tracked());
        let prep = Adapted { precision }.prepare::<C>(nodes).compute_bound().stateful();
        let x = B::rounded(x.into_primitive(), precision);
        let (map, made) = (Map::<B>::plain(map, precision), Recall::<B>::plain(made, precision));
        match prep {
            OpsKind::Tracked(prep) => {
                let [y, low] = B::adapted_saving(None, x, map.clone(), precision);
                prep.finish(AdaptedState { input: of_a.then_some(made), map, low }, y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::adapted(x, map, made, precision)),
        }
    }

    fn add_adapted(
        residual: FloatTensor<Self>,
        x: FloatTensor<Self>,
        map: Map<Self>,
        made: Recall<Self>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let (nodes, of_a) = ([residual.node(), x.node(), map.a.node(), map.b.node()], map.a.is_tracked());
        let prep = AddAdapted { precision }.prepare::<C>(nodes).compute_bound().stateful();
        let (residual, x) = (residual.into_primitive(), B::rounded(x.into_primitive(), precision));
        let (map, made) = (Map::<B>::plain(map, precision), Recall::<B>::plain(made, precision));
        match prep {
            OpsKind::Tracked(prep) => {
                let [y, low] = B::adapted_saving(Some(residual), x, map.clone(), precision);
                prep.finish(AdaptedState { input: of_a.then_some(made), map, low }, y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::add_adapted(residual, x, map, made, precision)),
        }
    }
}
