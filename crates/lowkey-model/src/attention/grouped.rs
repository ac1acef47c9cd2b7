//! Multi-head, grouped-query and multi-query attention: the baselines, and the sources of conversions.

mod config;

use burn::module::Module;
use burn::tensor::Tensor;
use lowkey_kernels::{
    cache::{Keys, Mask, chunk_attention, largest_logit},
    causal_attention, rotate,
};

use super::{Cached, Seen};
use crate::config::ModelConfig;
use crate::input::Input;
use crate::layers::{Builder, Linear, RmsNorm};
use crate::rope::RopeTable;
use crate::tensor::{HeadRows, Role};

pub use config::GroupedConfig;

/// Attention with `G` key and value heads for `H` query heads (arXiv 2305.13245). Fields carry the checkpoint's names.
#[derive(Module, Debug)]
pub struct Grouped {
    /// `[H·D, d]`
    pub q_proj: Linear,
    /// `[G·D, d]`
    pub k_proj: Linear,
    /// `[G·D, d]`
    pub v_proj: Linear,
    /// `[d, H·D]`
    pub o_proj: Linear,
    /// Norm of each query head (Qwen3).
    pub q_norm: Option<RmsNorm>,
    /// Norm of each key head (Qwen3).
    pub k_norm: Option<RmsNorm>,
    /// Sizes and scale.
    #[module(skip)]
    pub dims: GroupedDims,
}

/// The numbers that the forward pass of [`Grouped`] needs.
#[derive(Clone, Debug)]
pub struct GroupedDims {
    /// H
    pub heads: usize,
    /// G
    pub kv_heads: usize,
    /// D
    pub head_dim: usize,
    /// Leading components of a head that are rotated.
    pub rotary_dim: usize,
    /// Softmax scale.
    pub scale: f64,
}

/// What a cache stores per token.
#[derive(Clone, Debug)]
pub(crate) struct KeyValue {
    /// `[batch, G, seq, D]`, rotated.
    pub k: Tensor<4>,
    /// `[batch, G, seq, D]`
    pub v: Tensor<4>,
}

impl From<KeyValue> for Keys {
    fn from(KeyValue { k, v }: KeyValue) -> Self {
        Self { own: k, shared: None, values: v }
    }
}

impl Grouped {
    pub(crate) fn build(b: &mut Builder, name: &str, config: &ModelConfig, grouped: &GroupedConfig) -> Self {
        let (d, heads) = (config.hidden_size, config.num_attention_heads);
        let (kv_heads, head_dim) = (grouped.num_key_value_heads, grouped.head_dim);
        let part = |part: &str| format!("{name}.{part}");
        let eps = config.rms_norm_eps;
        let rows = |heads: usize| HeadRows { parts: vec![head_dim], heads };
        Self {
            q_proj: Linear::build_heads(b, &part("q_proj"), d, rows(heads), grouped.qkv_bias),
            k_proj: Linear::build_heads(b, &part("k_proj"), d, rows(kv_heads), grouped.qkv_bias),
            v_proj: Linear::build_heads(b, &part("v_proj"), d, rows(kv_heads), grouped.qkv_bias),
            o_proj: Linear::build(b, &part("o_proj"), [heads * head_dim, d], Role::Residual, grouped.o_bias),
            q_norm: grouped.qk_norm.then(|| RmsNorm::build(b, &part("q_norm"), head_dim, eps)),
            k_norm: grouped.qk_norm.then(|| RmsNorm::build(b, &part("k_norm"), head_dim, eps)),
            dims: GroupedDims {
                heads,
                kv_heads,
                head_dim,
                rotary_dim: grouped.rotary_dim,
                scale: grouped.softmax_scale(),
            },
        }
    }

    /// Its maps, to be changed.
    pub(super) fn linears_mut(&mut self) -> [&mut Linear; 4] {
        [&mut self.q_proj, &mut self.k_proj, &mut self.v_proj, &mut self.o_proj]
    }

    /// The heads' outputs `[batch, seq, H·D]` for a normalised chunk `[batch, seq, d]`.
    pub(super) fn attend(&self, x: Input, seen: Seen) -> Tensor<3> {
        match seen {
            Seen::Rows(context) => {
                let kv = self.key_value(x.clone(), &context.rope);
                self.attend_causal(self.queries(x, &context.rope), kv, &context.document_starts)
            }
            Seen::Rounded(context, rounded) => {
                let KeyValue { k, v } = self.key_value(x.clone(), &context.rope);
                let kv = KeyValue { k: rounded(k), v: rounded(v) };
                self.attend_causal(self.queries(x, &context.rope), kv, &context.document_starts)
            }
            Seen::Cache(Cached { rope, append, offsets, mask, .. }) => {
                let new = self.key_value(x.clone(), rope);
                let queries = self.queries(x, rope);
                let dtype = new.k.dtype();
                let k = append(0, new.k).widen(dtype);
                let kv = KeyValue { k, v: append(1, new.v).widen(dtype) };
                self.attend_chunk(queries, kv, offsets, mask)
            }
        }
    }

    /// Keys and values of a chunk, `x [batch, seq, d]`.
    pub(crate) fn key_value(&self, x: Input, rope: &RopeTable) -> KeyValue {
        let kv_heads = self.dims.kv_heads;
        let k = self.heads(self.k_proj.forward(x.clone()), kv_heads, self.k_norm.as_ref(), Some(rope));
        let v = self.heads(self.v_proj.forward(x), kv_heads, None, None);
        KeyValue { k, v }
    }

    /// Queries of a chunk, `x [batch, seq, d]` → `[batch, H, seq, D]`.
    pub(crate) fn queries(&self, x: Input, rope: &RopeTable) -> Tensor<4> {
        self.heads(self.q_proj.forward(x), self.dims.heads, self.q_norm.as_ref(), Some(rope))
    }

    fn heads(&self, x: Tensor<3>, heads: usize, norm: Option<&RmsNorm>, rope: Option<&RopeTable>) -> Tensor<4> {
        let GroupedDims { head_dim, rotary_dim, .. } = self.dims;
        let [batch, seq, _] = x.dims();
        let x = x.reshape([batch, seq, heads, head_dim]);
        let x = match norm {
            Some(norm) => norm.forward(x),
            None => x,
        };
        let x = match rope {
            Some(rope) if rotary_dim > 0 => rotate(x, rope.cos.clone(), rope.sin.clone(), 0, false),
            _ => x,
        };
        x.swap_dims(1, 2)
    }

    /// Attention over whole sequences, `[batch, seq, H·D]`: query `t` of a row sees the keys of its document up to its own. The
    /// form for training: no score outlives its block. W_O has yet to follow.
    pub(crate) fn attend_causal(&self, q: Tensor<4>, kv: KeyValue, document_starts: &[u32]) -> Tensor<3> {
        let GroupedDims { head_dim, scale, .. } = self.dims;
        let kv = Tensor::cat(vec![kv.k.swap_dims(1, 2), kv.v.swap_dims(1, 2)], 3);
        causal_attention(q.swap_dims(1, 2), kv, None, document_starts, head_dim, scale)
    }

    /// `[batch, seq, H·D]` from queries of `seq` positions and keys and values of `keys ≥ seq` positions: query `t` of row `b` sees
    /// those up to `offsets[b] + t`, which `mask` says, too.
    pub(crate) fn attend_chunk(
        &self,
        q: Tensor<4>,
        kv: KeyValue,
        offsets: &[usize],
        mask: &dyn Fn() -> Mask,
    ) -> Tensor<3> {
        chunk_attention(q.swap_dims(1, 2), kv.into(), offsets, mask, self.dims.scale)
    }

    /// The largest attention logit, `[1]`, within documents.
    pub(crate) fn max_logit(&self, q: Tensor<4>, kv: KeyValue, document_starts: &[u32]) -> Tensor<1> {
        largest_logit(q.swap_dims(1, 2), kv.into(), document_starts, self.dims.scale)
    }
}
