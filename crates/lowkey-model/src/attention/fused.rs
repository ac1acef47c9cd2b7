//! Attention over cached latents with the up-projections multiplied into the maps around them.
//!
//! The absorbed form (DeepSeek-V2, arXiv 2405.04434 §2.1.2) maps each query by W_UKᵀ and each result by W_UV. Both are maps of a
//! head that follow a map and precede one: with W_UKᵀ·W_UQ and W_O·W_UV formed once, a step does neither, and W_UK and W_UV
//! are not read at all. The products have L rows or columns per head where the factors have N or V.

use burn::tensor::Tensor;
use lowkey_kernels::{
    MlaDims,
    cache::{Stored, absorbed_attention},
    linear, rotate,
};

use super::Mla;
use crate::input::Input;
use crate::rope::RopeTable;

/// The layers of [`Mla`] that [`FusedMla`] is multiplied from, by their names there: a change of one of them makes its products stale.
pub const FACTORS: [&str; 4] = ["q_proj", "q_b_proj", "kv_b_proj", "o_proj"];

/// One layer's attention with its up-projections multiplied out.
#[derive(Clone, Debug)]
pub struct FusedMla {
    /// Per head W_UKᵀ·W_UQ, L rows, then W_QR, R rows: `[H(L+R), Q]`, with d columns where queries are not compressed.
    pub query: Tensor<2>,
    /// Per head W_O·W_UV, side by side: `[d, H·L]`.
    pub output: Tensor<2>,
}

impl Mla {
    /// The shapes of [`FusedMla::query`] and [`FusedMla::output`] that go with this layer.
    pub fn fused_shapes(&self) -> [[usize; 2]; 2] {
        let MlaDims { heads, rope, rank, .. } = self.dims;
        let columns = |up: &crate::layers::Linear| up.dims()[1];
        let of_query = self.q_b_proj.as_ref().or(self.q_proj.as_ref()).map_or(0, columns);
        let [d, _] = self.o_proj.dims();
        [[heads * (rank + rope), of_query], [d, heads * rank]]
    }

    /// q = [q̃ | RoPE(q_pe)] for each head, with q̃ = W_UKᵀ q_nope already in latent space.
    ///
    /// # Shapes
    /// `x [batch, seq, d]` → `[batch, seq, H, L+R]`, the rotated part in half-split order.
    pub(super) fn fused_queries(&self, fused: &FusedMla, x: Input, rope: &RopeTable) -> Tensor<4> {
        let MlaDims { heads, rope: r, rank, interleave, .. } = self.dims;
        let [batch, seq, _] = x.value.dims();
        let q = linear(self.query_input(x).value, fused.query.clone(), None).reshape([batch, seq, heads, rank + r]);
        if r > 0 { rotate(q, rope.cos.clone(), rope.sin.clone(), rank, interleave) } else { q }
    }

    /// Attention of queries in latent space over the latents themselves; the weighted sums of latents are the result.
    /// Query `t` of row `b` sees the tokens `0..=offsets[b] + t`. [`FusedMla::output`] has yet to follow.
    ///
    /// # Shapes
    /// Queries of [`Mla::fused_queries`], latents `[batch, 1, keys ≥ seq, L+R]` → `[batch, seq, H·L]`.
    pub(super) fn attend_fused(&self, queries: Tensor<4>, latents: Stored<4>, offsets: &[usize]) -> Tensor<3> {
        absorbed_attention(queries, latents, None, offsets, self.dims)
    }
}
