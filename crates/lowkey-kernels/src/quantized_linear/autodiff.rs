//! The packed linear map's place in autodiff: what the input's gradient takes is the packed matrix itself.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, AutodiffBackend, Backend, ExtensionType, backend_extension};

use super::format::Layout;
use crate::autodiff::Parents;
use crate::precision::Precision;

/// Forward passes, dispatched to the backend of their arguments.
#[backend_extension(Autodiff, Flex, Cube: cfg(feature = "gpu"))]
pub(crate) trait QuantizedLinearOps: Backend {
    /// The matrix `[d_out, d_in]` as f32.
    fn unpack(words: IntTensor<Self>, scales: FloatTensor<Self>, layout: Layout) -> FloatTensor<Self>;

    /// `x Wᵀ` for `x [batch, seq, d_in]`.
    fn project_quantized(
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        layout: Layout,
        precision: Precision,
    ) -> FloatTensor<Self>;

    /// `residual + x Wᵀ`, `residual [batch, seq, d_out]`.
    fn add_project_quantized(
        residual: FloatTensor<Self>,
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        layout: Layout,
        precision: Precision,
    ) -> FloatTensor<Self>;
}

/// What the backward pass needs from a backend.
pub(crate) trait QuantizedLinearGradients: QuantizedLinearOps {
    /// `d x = d y W`, `[batch, seq, d_in]`.
    fn input_grad_quantized(
        matrix: Matrix<Self>,
        grad: FloatTensor<Self>,
        layout: Layout,
        precision: Precision,
    ) -> FloatTensor<Self>;
}

/// A frozen matrix `[d_out, d_in]`, for an operation that takes either kind.
#[derive(ExtensionType)]
pub(crate) enum Frozen<B: Backend> {
    /// As numbers.
    Whole(FloatTensor<B>),
    /// In few bits.
    Packed { words: IntTensor<B>, scales: FloatTensor<B>, layout: Layout },
}

impl<B: Backend> Clone for Frozen<B> {
    fn clone(&self) -> Self {
        match self {
            Self::Whole(weight) => Self::Whole(weight.clone()),
            Self::Packed { words, scales, layout } => {
                Self::Packed { words: words.clone(), scales: scales.clone(), layout: *layout }
            }
        }
    }
}

impl<B: QuantizedLinearOps> Frozen<B> {
    /// As numbers.
    pub(crate) fn whole(self) -> FloatTensor<B> {
        match self {
            Self::Whole(weight) => weight,
            Self::Packed { words, scales, layout } => B::unpack(words, scales, layout),
        }
    }
}

/// A packed matrix of a backend: words and scales.
pub(crate) type Matrix<B> = (IntTensor<B>, FloatTensor<B>);

#[derive(Debug)]
struct Project {
    layout: Layout,
    precision: Precision,
}

impl<B: QuantizedLinearGradients> Backward<B, 1> for Project {
    type State = Matrix<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        let d_x = B::input_grad_quantized(ops.state, grad, self.layout, self.precision);
        parents.register::<B>(grads, [Some(d_x)]);
    }
}

#[derive(Debug)]
struct AddProject {
    layout: Layout,
    precision: Precision,
}

impl<B: QuantizedLinearGradients> Backward<B, 2> for AddProject {
    type State = Matrix<B>;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        let [_, of_x] = parents.wanted();
        let d_x = of_x.then(|| B::input_grad_quantized(ops.state, grad.clone(), self.layout, self.precision));
        parents.register::<B>(grads, [Some(grad), d_x]);
    }
}

impl<B: QuantizedLinearGradients, C: CheckpointStrategy> QuantizedLinearOps for Autodiff<B, C> {
    fn unpack(words: IntTensor<Self>, scales: FloatTensor<Self>, layout: Layout) -> FloatTensor<Self> {
        Self::from_inner(B::unpack(words, scales.into_primitive(), layout))
    }

    fn project_quantized(
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        layout: Layout,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let prep = Project { layout, precision }.prepare::<C>([x.node()]).compute_bound().stateful();
        let (x, scales) = (x.into_primitive(), scales.into_primitive());
        match prep {
            OpsKind::Tracked(prep) => {
                let saved = (words.clone(), scales.clone());
                prep.finish(saved, B::project_quantized(x, words, scales, layout, precision))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::project_quantized(x, words, scales, layout, precision)),
        }
    }

    fn add_project_quantized(
        residual: FloatTensor<Self>,
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        layout: Layout,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let nodes = [residual.node(), x.node()];
        let prep = AddProject { layout, precision }.prepare::<C>(nodes).compute_bound().stateful();
        let [residual, x, scales] = [residual, x, scales].map(|tensor| tensor.into_primitive());
        match prep {
            OpsKind::Tracked(prep) => {
                let saved = (words.clone(), scales.clone());
                prep.finish(saved, B::add_project_quantized(residual, x, words, scales, layout, precision))
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::add_project_quantized(residual, x, words, scales, layout, precision))
            }
        }
    }
}
