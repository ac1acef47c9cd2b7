//! Operations on a cache. None has a gradient: a cache is for models that are not in training.

use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, AutodiffBackend, Backend, backend_extension};

use crate::latent_attention::arguments::MlaDims;
use crate::precision::Precision;

/// Operations on [`crate::cache::Stored`], dispatched to the backend of their arguments.
#[backend_extension(Autodiff, Flex)]
pub(crate) trait CacheOps: Backend {
    /// Attention in latent space over floating-point latents; see [`crate::cache::absorbed_attention`]. A `kv_b` without rows stands for
    /// none: the dispatch takes no optional tensors.
    fn absorbed_attention(
        q: FloatTensor<Self>,
        cache: FloatTensor<Self>,
        kv_b: FloatTensor<Self>,
        offsets: IntTensor<Self>,
        dims: MlaDims,
        precision: Precision,
    ) -> FloatTensor<Self>;

    /// The same over integer latents, whose first part has `dims.rank` numbers.
    fn absorbed_attention_int8(
        q: FloatTensor<Self>,
        codes: IntTensor<Self>,
        scales: FloatTensor<Self>,
        kv_b: FloatTensor<Self>,
        offsets: IntTensor<Self>,
        dims: MlaDims,
    ) -> FloatTensor<Self>;

    /// Attention of a chunk; see [`crate::cache::chunk_attention`]. `shared` has `width` numbers per key; with 0 it is not read.
    fn chunk_attention(
        q: FloatTensor<Self>,
        own: FloatTensor<Self>,
        shared: FloatTensor<Self>,
        values: FloatTensor<Self>,
        offsets: IntTensor<Self>,
        width: usize,
        scale: f64,
    ) -> FloatTensor<Self>;

    /// The same with keys and values made of latents; see [`crate::cache::expanded_attention`].
    fn expanded_attention(
        q: FloatTensor<Self>,
        latents: FloatTensor<Self>,
        kv_b: FloatTensor<Self>,
        offsets: IntTensor<Self>,
        dims: MlaDims,
    ) -> FloatTensor<Self>;

    /// The largest score of each query of whole rows, `[batch, heads, seq]`; see [`crate::cache::largest_logit`].
    fn largest_logits(
        q: FloatTensor<Self>,
        own: FloatTensor<Self>,
        shared: FloatTensor<Self>,
        starts: IntTensor<Self>,
        width: usize,
        scale: f64,
    ) -> FloatTensor<Self>;

    /// Numbers of 16 bits as f32.
    fn widen(x: FloatTensor<Self>) -> FloatTensor<Self>;

    /// Integers with their scales as f32.
    fn widen_int8(codes: IntTensor<Self>, scales: FloatTensor<Self>, split: usize) -> FloatTensor<Self>;

    /// Codes and scales of f32 numbers.
    fn quantise(x: FloatTensor<Self>, split: usize) -> (IntTensor<Self>, FloatTensor<Self>);
}

impl<B: Backend + CacheOps, C: CheckpointStrategy> CacheOps for Autodiff<B, C> {
    fn absorbed_attention(
        q: FloatTensor<Self>,
        cache: FloatTensor<Self>,
        kv_b: FloatTensor<Self>,
        offsets: IntTensor<Self>,
        dims: MlaDims,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let [q, cache, kv_b] = [q, cache, kv_b].map(|tensor| tensor.into_primitive());
        Self::from_inner(B::absorbed_attention(q, cache, kv_b, offsets, dims, precision))
    }

    fn absorbed_attention_int8(
        q: FloatTensor<Self>,
        codes: IntTensor<Self>,
        scales: FloatTensor<Self>,
        kv_b: FloatTensor<Self>,
        offsets: IntTensor<Self>,
        dims: MlaDims,
    ) -> FloatTensor<Self> {
        let [q, scales, kv_b] = [q, scales, kv_b].map(|tensor| tensor.into_primitive());
        Self::from_inner(B::absorbed_attention_int8(q, codes, scales, kv_b, offsets, dims))
    }

    fn chunk_attention(
        q: FloatTensor<Self>,
        own: FloatTensor<Self>,
        shared: FloatTensor<Self>,
        values: FloatTensor<Self>,
        offsets: IntTensor<Self>,
        width: usize,
        scale: f64,
    ) -> FloatTensor<Self> {
        let [q, own, shared, values] = [q, own, shared, values].map(|tensor| tensor.into_primitive());
        Self::from_inner(B::chunk_attention(q, own, shared, values, offsets, width, scale))
    }

    fn expanded_attention(
        q: FloatTensor<Self>,
        latents: FloatTensor<Self>,
        kv_b: FloatTensor<Self>,
        offsets: IntTensor<Self>,
        dims: MlaDims,
    ) -> FloatTensor<Self> {
        let [q, latents, kv_b] = [q, latents, kv_b].map(|tensor| tensor.into_primitive());
        Self::from_inner(B::expanded_attention(q, latents, kv_b, offsets, dims))
    }

    fn largest_logits(
        q: FloatTensor<Self>,
        own: FloatTensor<Self>,
        shared: FloatTensor<Self>,
        starts: IntTensor<Self>,
        width: usize,
        scale: f64,
    ) -> FloatTensor<Self> {
        let [q, own, shared] = [q, own, shared].map(|tensor| tensor.into_primitive());
        Self::from_inner(B::largest_logits(q, own, shared, starts, width, scale))
    }

    fn widen(x: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::from_inner(B::widen(x.into_primitive()))
    }

    fn widen_int8(codes: IntTensor<Self>, scales: FloatTensor<Self>, split: usize) -> FloatTensor<Self> {
        Self::from_inner(B::widen_int8(codes, scales.into_primitive(), split))
    }

    fn quantise(x: FloatTensor<Self>, split: usize) -> (IntTensor<Self>, FloatTensor<Self>) {
        let (codes, scales) = B::quantise(x.into_primitive(), split);
        (codes, Self::from_inner(scales))
    }
}
