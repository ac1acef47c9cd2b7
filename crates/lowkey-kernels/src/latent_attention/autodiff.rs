//! The operation's place in autodiff: it keeps no keys and no values.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, Backend, ExtensionType, TensorMetadata, backend_extension};
use burn::tensor::Shape;

use super::arguments::MlaDims;
use crate::adapted::autodiff::{AdaptedGradients, Map};
use crate::autodiff::{Parents, Wanted};
use crate::precision::Precision;
use crate::recalled::autodiff::Recall;
use crate::rotary::autodiff::RotaryOps;

/// The forward pass, dispatched to the backend of its arguments.
#[backend_extension(Autodiff, Flex, Cube: cfg(feature = "gpu"))]
pub(crate) trait LatentAttentionOps: Backend {
    /// Multi-head Latent Attention over whole sequences, `[batch, seq, H·V]`; see [`crate::latent_attention`].
    fn latent_attention(#[extension_type] inputs: LatentInputs<Self>) -> FloatTensor<Self>;
}

/// What the backward pass needs from a backend.
pub(crate) trait LatentAttentionGradients: LatentAttentionOps + AdaptedGradients + RotaryOps {
    /// [`LatentAttentionOps::latent_attention`] with the log-sum-exp of each query's scores, `[batch, H, seq]`.
    fn latent_attention_saving(inputs: LatentInputs<Self>) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// Those gradients of `q, kv_a, norm, kv_b` that are wanted.
    fn latent_attention_grad(
        saved: LatentState<Self>,
        grad: FloatTensor<Self>,
        wanted: Wanted<4>,
    ) -> [Option<FloatTensor<Self>>; 4];
}

/// Where the backward pass has its queries from.
#[derive(ExtensionType)]
pub(crate) enum Queries<B: Backend> {
    /// They are kept.
    Kept,
    /// A map of what can be formed anew, rotated.
    Made {
        #[extension_type]
        map: Map<B>,
        #[extension_type]
        of: Recall<B>,
    },
}

impl<B: Backend> Clone for Queries<B> {
    fn clone(&self) -> Self {
        match self {
            Self::Kept => Self::Kept,
            Self::Made { map, of } => Self::Made { map: map.clone(), of: of.clone() },
        }
    }
}

/// Arguments of a latent attention.
#[derive(ExtensionType)]
pub(crate) struct LatentInputs<B: Backend> {
    /// Rotated queries, as [`Operands::rounded`] has them where gradients are recorded.
    pub(crate) q: FloatTensor<B>,
    /// What they were made of.
    #[extension_type]
    pub(crate) made: Queries<B>,
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

impl<B: Backend> Clone for LatentInputs<B> {
    fn clone(&self) -> Self {
        Self {
            q: self.q.clone(),
            made: self.made.clone(),
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

impl<B: Backend> std::fmt::Debug for LatentState<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LatentState").field("dims", &self.inputs.dims).finish_non_exhaustive()
    }
}

impl<B: LatentAttentionGradients> LatentInputs<B> {
    /// What is kept: where queries can be formed anew, a table that is kept anyway stands in for them.
    fn without_queries(self) -> Self {
        match self.made {
            Queries::Kept => self,
            Queries::Made { .. } => Self { q: self.cos.clone(), ..self },
        }
    }

    /// The same with queries again.
    fn with_queries(self) -> Self {
        let Self { made, cos, sin, dims: MlaDims { heads, nope, rope, interleave, .. }, precision, .. } = &self;
        let Queries::Made { map, of } = made.clone() else { return self };
        let [q, _] = B::adapted_saving(None, of.form(*precision), map, *precision);
        let [batch, seq] = [q.shape()[0], q.shape()[1]];
        let q = B::float_reshape(q, Shape::from(vec![batch, seq, *heads, nope + rope]));
        let q = if *rope > 0 { B::rotate(q, cos.clone(), sin.clone(), *nope, *interleave) } else { q };
        Self { q: B::rounded(q, *precision), made: Queries::Kept, ..self }
    }
}

#[derive(Debug)]
struct LatentAttention;

impl<B: LatentAttentionGradients> Backward<B, 4> for LatentAttention {
    type State = LatentState<B>;

    fn backward(self, ops: Ops<Self::State, 4>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        let LatentState { inputs, out, lse } = ops.state;
        let saved = LatentState { inputs: inputs.with_queries(), out, lse };
        let gradients = B::latent_attention_grad(saved, grad, parents.wanted());
        parents.register::<B>(grads, gradients);
    }
}

impl<B: LatentAttentionGradients, C: CheckpointStrategy> LatentAttentionOps for Autodiff<B, C> {
    fn latent_attention(inputs: LatentInputs<Self>) -> FloatTensor<Self> {
        let LatentInputs { q, made, kv_a, norm, kv_b, cos, sin, starts, dims, precision } = inputs;
        let nodes = [q.node(), kv_a.node(), norm.node(), kv_b.node()];
        let prep = LatentAttention.prepare::<C>(nodes).compute_bound().stateful();
        let [q, kv_a, norm, kv_b, cos, sin] = [q, kv_a, norm, kv_b, cos, sin].map(|tensor| tensor.into_primitive());
        let [q, kv_b] = [q, kv_b].map(|x| B::rounded(x, precision));
        let made = match made {
            Queries::Kept => Queries::Kept,
            Queries::Made { map, of } => {
                Queries::Made { map: Map::<B>::plain(map, precision), of: Recall::<B>::plain(of, precision) }
            }
        };
        let inputs = LatentInputs { q, made, kv_a, norm, kv_b, cos, sin, starts, dims, precision };
        match prep {
            OpsKind::Tracked(prep) => {
                let (out, lse) = B::latent_attention_saving(inputs.clone());
                prep.finish(LatentState { inputs: inputs.without_queries(), out: out.clone(), lse }, out)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::latent_attention(inputs)),
        }
    }
}
