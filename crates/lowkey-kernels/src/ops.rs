//! The operations with a backward pass of their own: one trait, its CPU implementation, and its place in autodiff.

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, AutodiffBackend, Backend, backend_extension};
use burn::tensor::{Shape, Slice};

use crate::precision::Precision;

/// Sizes and scale of an attention; the other sizes follow from its arguments.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct AttentionShape {
    /// Width of the part of a key that a head has to itself.
    pub(crate) nope: usize,
    /// Width of the part of a key that all heads share; 0: the shared key is not read.
    pub(crate) rope: usize,
    /// Factor on q·k.
    pub(crate) scale: f64,
    /// What it may be computed in.
    pub(crate) precision: Precision,
}

/// Forward operations, dispatched to the backend of their arguments.
#[backend_extension(Autodiff, Flex, Cube: cfg(feature = "gpu"))]
pub(crate) trait FusedOps: Backend {
    /// Rows of `weight [vocab, d]` at `ids [batch, seq]` → `[batch, seq, d]`.
    fn embed(weight: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self>;

    /// `x / sqrt(mean(x²) + eps) · weight` over the last axis.
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f64) -> FloatTensor<Self>;

    /// Rotates `2 · half` components, from component `from` on, of `x [batch, seq, heads, width]` by
    /// `cos`, `sin [batch or 1, seq, 1, half]`.
    fn rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        from: usize,
        interleaved: bool,
    ) -> FloatTensor<Self>;

    /// Causal attention within documents: `q [B, T, H, N+R]`, `kv [B, T, G, N+V]`, `k_pe [B, T, R]`, `starts [B, T]` →
    /// `[B, T, H·V]`.
    fn causal_attention(
        q: FloatTensor<Self>,
        kv: FloatTensor<Self>,
        k_pe: FloatTensor<Self>,
        starts: IntTensor<Self>,
        shape: AttentionShape,
    ) -> FloatTensor<Self>;

    /// `Σ weight · (nats + z_loss · log² Z)` and its second part, `[2]`; a gradient flows through the first. For `h [n, d]`,
    /// `weight [vocab, d]`, `targets [n]`, negative for none, `label_weights [n]` or `[1]`.
    fn cross_entropy_sum(
        h: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
        label_weights: FloatTensor<Self>,
        z_loss: f64,
        precision: Precision,
    ) -> FloatTensor<Self>;

    /// `nats = −log softmax(W h)[target]` per token, `[n]`, without a gradient.
    fn cross_entropy_each(
        h: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self>;

    /// `Σ share · KL(softmax(W t) ‖ softmax(W h)) + (1 − share) · nats`, `[1]`; `t` and its W are not differentiated.
    fn distill_sum(
        h: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        teacher: FloatTensor<Self>,
        targets: IntTensor<Self>,
        share: f64,
        precision: Precision,
    ) -> FloatTensor<Self>;
}

/// What the backward passes need from a backend.
pub(crate) trait FusedGradients: FusedOps {
    /// `d weight [vocab, d]` of [`FusedOps::embed`]: the sum over each token's places.
    fn embed_grad(weight: FloatTensor<Self>, ids: IntTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self>;

    /// `(d x, d weight)`.
    fn rms_norm_grad(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// The transposed map of [`FusedOps::rotate`].
    fn rotate_back(
        grad: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        from: usize,
        interleaved: bool,
    ) -> FloatTensor<Self>;

    /// [`FusedOps::causal_attention`] with the log-sum-exp of each query's scores, `[B, H, T]`.
    fn causal_attention_saving(
        q: FloatTensor<Self>,
        kv: FloatTensor<Self>,
        k_pe: FloatTensor<Self>,
        starts: IntTensor<Self>,
        shape: AttentionShape,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// `(d q, d kv, d k_pe)`.
    fn causal_attention_grad(
        saved: AttentionState<Self>,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// The sums with those gradients of the first that are wanted: `(sums [2], [d h, d weight])`.
    fn cross_entropy_sum_saving(
        h: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
        label_weights: FloatTensor<Self>,
        z_loss: f64,
        precision: Precision,
        wanted: Wanted<2>,
    ) -> (FloatTensor<Self>, [Option<FloatTensor<Self>>; 2]);

    /// [`FusedOps::distill_sum`], and those gradients of the sum that are wanted: `(sum, [d h, d weight])`.
    fn distill_sum_saving(
        h: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        teacher: FloatTensor<Self>,
        targets: IntTensor<Self>,
        share: f64,
        precision: Precision,
        wanted: Wanted<2>,
    ) -> (FloatTensor<Self>, [Option<FloatTensor<Self>>; 2]);
}

/// What the forward pass of an attention keeps for its backward pass: no T×T tensor.
#[derive(Debug)]
pub(crate) struct AttentionState<B: Backend> {
    /// Queries.
    pub(crate) q: FloatTensor<B>,
    /// Keys without position, and values.
    pub(crate) kv: FloatTensor<B>,
    /// Shared keys.
    pub(crate) k_pe: FloatTensor<B>,
    /// Document starts.
    pub(crate) starts: IntTensor<B>,
    /// Output.
    pub(crate) out: FloatTensor<B>,
    /// Log-sum-exp of the scores.
    pub(crate) lse: FloatTensor<B>,
    /// Sizes and scale.
    pub(crate) shape: AttentionShape,
}

impl<B: Backend> Clone for AttentionState<B> {
    fn clone(&self) -> Self {
        Self {
            q: self.q.clone(),
            kv: self.kv.clone(),
            k_pe: self.k_pe.clone(),
            starts: self.starts.clone(),
            out: self.out.clone(),
            lse: self.lse.clone(),
            shape: self.shape,
        }
    }
}

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

#[derive(Debug)]
struct Embed;

impl<B: FusedGradients> Backward<B, 1> for Embed {
    type State = (FloatTensor<B>, IntTensor<B>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        let (weight, ids) = ops.state;
        parents.register::<B>(grads, [Some(B::embed_grad(weight, ids, grad))]);
    }
}

#[derive(Debug)]
struct Norm {
    eps: f64,
}

impl<B: FusedGradients> Backward<B, 2> for Norm {
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        let (d_x, d_weight) = B::rms_norm_grad(ops.state.0, ops.state.1, grad, self.eps);
        parents.register::<B>(grads, [Some(d_x), Some(d_weight)]);
    }
}

#[derive(Debug)]
struct Rotate {
    from: usize,
    interleaved: bool,
}

impl<B: FusedGradients> Backward<B, 1> for Rotate {
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        let (cos, sin) = ops.state;
        parents.register::<B>(grads, [Some(B::rotate_back(grad, cos, sin, self.from, self.interleaved))]);
    }
}

#[derive(Debug)]
struct CausalAttention;

impl<B: FusedGradients> Backward<B, 3> for CausalAttention {
    type State = AttentionState<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        let (d_q, d_kv, d_k_pe) = B::causal_attention_grad(ops.state, grad);
        parents.register::<B>(grads, [Some(d_q), Some(d_kv), Some(d_k_pe)]);
    }
}

#[derive(Debug)]
struct CrossEntropy;

impl<B: FusedGradients> Backward<B, 2> for CrossEntropy {
    type State = [Option<FloatTensor<B>>; 2];

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = Parents::of(&ops);
        // The gradients of the sum were formed with it: what is left is the factor in front of the sum.
        let factor = B::float_slice(grad, &[Slice::from(0..1)]);
        let factor = B::float_reshape(factor, Shape::new([1, 1]));
        let gradients = ops.state.map(|gradient| gradient.map(|gradient| B::float_mul(gradient, factor.clone())));
        parents.register::<B>(grads, gradients);
    }
}

impl<B: FusedGradients, C: CheckpointStrategy> FusedOps for Autodiff<B, C> {
    fn embed(weight: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self> {
        let prep = Embed.prepare::<C>([weight.node()]).compute_bound().stateful();
        let weight = weight.into_primitive();
        match prep {
            OpsKind::Tracked(prep) => prep.finish((weight.clone(), ids.clone()), B::embed(weight, ids)),
            OpsKind::UnTracked(prep) => prep.finish(B::embed(weight, ids)),
        }
    }

    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f64) -> FloatTensor<Self> {
        let prep = Norm { eps }.prepare::<C>([x.node(), weight.node()]).compute_bound().stateful();
        let (x, weight) = (x.into_primitive(), weight.into_primitive());
        match prep {
            OpsKind::Tracked(prep) => prep.finish((x.clone(), weight.clone()), B::rms_norm(x, weight, eps)),
            OpsKind::UnTracked(prep) => prep.finish(B::rms_norm(x, weight, eps)),
        }
    }

    fn rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        from: usize,
        interleaved: bool,
    ) -> FloatTensor<Self> {
        let prep = Rotate { from, interleaved }.prepare::<C>([x.node()]).compute_bound().stateful();
        let (x, cos, sin) = (x.into_primitive(), cos.into_primitive(), sin.into_primitive());
        match prep {
            OpsKind::Tracked(prep) => {
                prep.finish((cos.clone(), sin.clone()), B::rotate(x, cos, sin, from, interleaved))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::rotate(x, cos, sin, from, interleaved)),
        }
    }

    fn causal_attention(
        q: FloatTensor<Self>,
        kv: FloatTensor<Self>,
        k_pe: FloatTensor<Self>,
        starts: IntTensor<Self>,
        shape: AttentionShape,
    ) -> FloatTensor<Self> {
        let prep = CausalAttention.prepare::<C>([q.node(), kv.node(), k_pe.node()]).compute_bound().stateful();
        let (q, kv, k_pe) = (q.into_primitive(), kv.into_primitive(), k_pe.into_primitive());
        match prep {
            OpsKind::Tracked(prep) => {
                let (out, lse) = B::causal_attention_saving(q.clone(), kv.clone(), k_pe.clone(), starts.clone(), shape);
                let state = AttentionState { q, kv, k_pe, starts, out: out.clone(), lse, shape };
                prep.finish(state, out)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::causal_attention(q, kv, k_pe, starts, shape)),
        }
    }

    fn cross_entropy_sum(
        h: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
        label_weights: FloatTensor<Self>,
        z_loss: f64,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let wanted = [h.is_tracked(), weight.is_tracked()];
        let prep = CrossEntropy.prepare::<C>([h.node(), weight.node()]).compute_bound().stateful();
        let [h, weight, labels] = [h, weight, label_weights].map(|tensor| tensor.into_primitive());
        match prep {
            OpsKind::Tracked(prep) => {
                let (sums, gradients) =
                    B::cross_entropy_sum_saving(h, weight, targets, labels, z_loss, precision, wanted);
                prep.finish(gradients, sums)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::cross_entropy_sum(h, weight, targets, labels, z_loss, precision))
            }
        }
    }

    fn cross_entropy_each(
        h: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        Self::from_inner(B::cross_entropy_each(h.into_primitive(), weight.into_primitive(), targets, precision))
    }

    fn distill_sum(
        h: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        teacher: FloatTensor<Self>,
        targets: IntTensor<Self>,
        share: f64,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let wanted = [h.is_tracked(), weight.is_tracked()];
        let prep = CrossEntropy.prepare::<C>([h.node(), weight.node()]).compute_bound().stateful();
        let [h, weight, teacher] = [h, weight, teacher].map(|tensor| tensor.into_primitive());
        match prep {
            OpsKind::Tracked(prep) => {
                let (sum, gradients) = B::distill_sum_saving(h, weight, teacher, targets, share, precision, wanted);
                prep.finish(gradients, sum)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::distill_sum(h, weight, teacher, targets, share, precision)),
        }
    }
}
