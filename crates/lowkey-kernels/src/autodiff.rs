//! What the operations' places in autodiff share: whose gradients are wanted, and what products read.

use burn::backend::Backend;
use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::Ops;
use burn::backend::tensor::FloatTensor;

use crate::precision::Precision;

/// For each argument of an operation whether its gradient is wanted. A frozen weight costs none.
pub(crate) type Wanted<const N: usize> = [bool; N];

/// Where the gradients of an operation go.
pub(crate) struct Parents<const N: usize>([Option<NodeId>; N]);

impl<const N: usize> Parents<N> {
    pub(crate) fn of<S>(ops: &Ops<S, N>) -> Self {
        Self(ops.parents.each_ref().map(|node| node.as_ref().map(|node| node.id)))
    }

    pub(crate) fn wanted(&self) -> Wanted<N> {
        self.0.map(|parent| parent.is_some())
    }

    /// Hands each argument that wants one its gradient.
    pub(crate) fn register<B: Backend>(self, grads: &mut Gradients, gradients: [Option<FloatTensor<B>>; N]) {
        for (parent, gradient) in self.0.into_iter().zip(gradients) {
            if let (Some(id), Some(gradient)) = (parent, gradient) {
                grads.register::<B>(id, gradient);
            }
        }
    }
}

/// The operands of products, as a backend rounds them.
pub(crate) trait Operands: Backend {
    /// What products read of `x`, an input or a weight, and so all that has to be kept of it.
    fn rounded(x: FloatTensor<Self>, _: Precision) -> FloatTensor<Self> {
        x
    }
}
