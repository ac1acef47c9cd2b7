//! Multi-head Latent Attention (DeepSeek-V2, arXiv 2405.04434, §2.1.2 and eqs. 37–47).
//!
//! The forward pass is cut where a cache cuts it: [`Mla::latent`] computes what is stored per token, [`Mla::queries`] what
//! is not, and `attend_causal`, `attend_expanded` and `attend_absorbed` are three ways to compute the same attention from them;
//! [`FusedMla`](super::FusedMla) has the weights of a fourth.

mod config;

use burn::module::Module;
use burn::tensor::Tensor;
use lowkey_kernels::{
    LatentWeights, MadeQueries, MlaDims,
    cache::{Keys, Mask, Stored, absorbed_attention, expanded_attention, largest_logit},
    latent_attention_of, rotate,
};

use super::{Cached, Heads, Seen, Way};
use crate::config::ModelConfig;
use crate::context::Context;
use crate::input::Input;
use crate::layers::{Builder, Linear, RmsNorm};
use crate::rope::RopeTable;
use crate::tensor::{HeadRows, Role};

pub use config::MlaConfig;

/// ε of the latent norms: transformers builds them without `rms_norm_eps`, whatever the configuration says.
pub const LATENT_NORM_EPS: f64 = 1e-6;

/// √ε of a norm that does nothing: beside ε = 2⁶⁰ no square of a latent counts in 32 bits, and times the root, a power of two, the
/// latent is again what it was, to the last bit. So one operation serves latents with a norm and without, and its gradient is that of
/// the identity.
const NO_NORM: f64 = (1u64 << 30) as f64;

/// Multi-head Latent Attention. Fields carry the checkpoint's tensor names.
#[derive(Module, Debug)]
pub struct Mla {
    /// W_Q `[H(N+R), d]`, where queries are not compressed.
    pub q_proj: Option<Linear>,
    /// W_DQ `[Q, d]`.
    pub q_a_proj: Option<Linear>,
    /// Norm of the query latent.
    pub q_a_layernorm: Option<RmsNorm>,
    /// W_UQ and W_QR `[H(N+R), Q]`; rows per head: N without, R with position.
    pub q_b_proj: Option<Linear>,
    /// W_DKV and W_KR `[L+R, d]`; first the latent, then the shared key.
    pub kv_a_proj_with_mqa: Linear,
    /// Norm of the latent (not of the shared key); with `latent_norm = false` its gain alone.
    pub kv_a_layernorm: RmsNorm,
    /// W_UK and W_UV `[H(N+V), L]`; rows per head: N of the key, V of the value. Of a cut latent `[H(N+V), r]`.
    pub kv_b_proj: Linear,
    /// W_O `[d, HV]`.
    pub o_proj: Linear,
    /// Sizes and scale. Its rank is what is cached and read: L, or r < L of a latent that was cut
    /// ([`MlaConfig::kv_cache_rank`]); the norm is over L all the same.
    #[module(skip)]
    pub dims: MlaDims,
}

/// What a cache stores per token: the normalised latent and, behind it, the rotated shared key.
#[derive(Clone, Debug)]
pub struct Latent {
    /// `[batch, seq, L+R]`, the key in half-split order.
    pub both: Tensor<3>,
    /// L
    pub rank: usize,
}

impl From<Latent> for Stored<3> {
    fn from(latent: Latent) -> Self {
        Self::Float(latent.both)
    }
}

impl Latent {
    /// The normalised latent, `[batch, seq, L]`.
    pub fn c_kv(&self) -> Tensor<3> {
        self.both.clone().narrow(2, 0, self.rank)
    }

    /// The rotated shared key, `[batch, seq, R]`; `None` where R = 0.
    pub fn k_pe(&self) -> Option<Tensor<3>> {
        let [.., width] = self.both.dims();
        (width > self.rank).then(|| self.both.clone().narrow(2, self.rank, width - self.rank))
    }
}

impl Mla {
    pub(crate) fn build(b: &mut Builder, name: &str, config: &ModelConfig, mla: &MlaConfig) -> Self {
        let (d, heads) = (config.hidden_size, config.num_attention_heads);
        let (nope, rope, value, rank) = (mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim, mla.kv_lora_rank);
        let read = mla.kv_rank();
        let part = |part: &str| format!("{name}.{part}");
        let (compressed, bias) = (mla.q_lora_rank, mla.attention_bias);
        let eps = if mla.latent_norm { LATENT_NORM_EPS } else { NO_NORM * NO_NORM };
        let queries = HeadRows { parts: vec![nope + rope], heads };
        Self {
            q_proj: compressed
                .is_none()
                .then(|| Linear::build_heads(b, &part("q_proj"), d, queries.clone(), mla.query_bias)),
            q_a_proj: compressed.map(|q| Linear::build(b, &part("q_a_proj"), [d, q], Role::Matrix, bias)),
            q_a_layernorm: compressed.map(|q| RmsNorm::build(b, &part("q_a_layernorm"), q, LATENT_NORM_EPS)),
            q_b_proj: compressed.map(|q| Linear::build_heads(b, &part("q_b_proj"), q, queries, mla.query_bias)),
            kv_a_proj_with_mqa: Linear::build(b, &part("kv_a_proj_with_mqa"), [d, rank + rope], Role::Matrix, bias),
            kv_a_layernorm: RmsNorm::build(b, &part("kv_a_layernorm"), rank, eps),
            kv_b_proj: Linear::build_heads(
                b,
                &part("kv_b_proj"),
                read,
                HeadRows { parts: vec![nope, value], heads },
                false,
            ),
            o_proj: Linear::build(b, &part("o_proj"), [heads * value, d], Role::Residual, bias),
            dims: MlaDims {
                heads,
                nope,
                rope,
                value,
                rank: read,
                scale: mla.softmax_scale(&config.rope),
                latent_scale: match (mla.latent_norm, mla.latent_scale) {
                    (false, _) => NO_NORM,
                    (true, true) => (d as f64 / rank as f64).sqrt(),
                    (true, false) => 1.0,
                },
                latent_eps: eps,
                interleave: mla.rope_interleave,
            },
        }
    }

    /// Its maps, to be changed.
    pub(super) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let queries = [&mut self.q_proj, &mut self.q_a_proj, &mut self.q_b_proj].into_iter().filter_map(Option::as_mut);
        queries.chain([&mut self.kv_a_proj_with_mqa, &mut self.kv_b_proj, &mut self.o_proj]).collect()
    }

    /// L: the width that the latent is normalised over, of which a cut latent keeps the first numbers.
    pub(crate) fn latent_width(&self) -> usize {
        let [whole] = self.kv_a_layernorm.gain().dims();
        whole
    }

    /// c_kv = RMSNorm(W_DKV h) and k_pe = RoPE(W_KR h), eqs. 41 and 43.
    ///
    /// # Shapes
    /// `x [batch, seq, d]`.
    pub fn latent(&self, x: impl Into<Input>, rope: &RopeTable) -> Latent {
        let MlaDims { rank, rope: r, interleave, latent_scale, .. } = self.dims;
        let whole = self.latent_width();
        let kv = self.kv_a_proj_with_mqa.forward(x);
        let c_kv = self.kv_a_layernorm.forward(kv.clone().narrow(2, 0, whole));
        let c_kv = if rank < whole { c_kv.narrow(2, 0, rank) } else { c_kv };
        let c_kv = if latent_scale == 1.0 { c_kv } else { c_kv * latent_scale };
        let both = if r > 0 {
            let k_pe = kv.narrow(2, whole, r).unsqueeze_dim::<4>(2);
            let k_pe = rotate(k_pe, rope.cos.clone(), rope.sin.clone(), 0, interleave).squeeze_dim::<3>(2);
            Tensor::cat(vec![c_kv, k_pe], 2)
        } else {
            c_kv
        };
        Latent { both, rank }
    }

    /// What queries are a linear map of: the normed query latent, or `x` itself where queries are not compressed.
    pub(crate) fn query_input(&self, x: Input) -> Input {
        match (&self.q_a_proj, &self.q_a_layernorm) {
            (Some(down), Some(norm)) => Input::normed(norm, down.forward(x)),
            _ => x,
        }
    }

    /// q = [q_nope | RoPE(q_pe)] for each head, eqs. 37–40.
    ///
    /// # Shapes
    /// `x [batch, seq, d]` → `[batch, seq, H, N+R]`, the rotated part in half-split order.
    pub fn queries(&self, x: impl Into<Input>, rope: &RopeTable) -> Tensor<4> {
        self.queries_of(self.query_input(x.into()), rope)
    }

    /// The map that makes queries, of what [`Mla::query_input`] gives.
    fn query_map(&self) -> Option<&Linear> {
        self.q_b_proj.as_ref().or(self.q_proj.as_ref())
    }

    fn queries_of(&self, x: Input, rope: &RopeTable) -> Tensor<4> {
        let MlaDims { heads, nope, rope: r, interleave, .. } = self.dims;
        let [batch, seq, _] = x.value.dims();
        // `build` makes one or the other.
        let q = match self.query_map() {
            Some(up) => up.forward(x),
            None => x.value,
        };
        let q = q.reshape([batch, seq, heads, nope + r]);
        if r > 0 { rotate(q, rope.cos.clone(), rope.sin.clone(), nope, interleave) } else { q }
    }

    /// The heads' outputs for a normalised chunk `[batch, seq, d]`.
    pub(super) fn attend<'a>(&self, x: Input, seen: Seen<'a>) -> Heads<'a> {
        match seen {
            Seen::Rows(context) => self.attend_causal(x, context).into(),
            Seen::Rounded(context, rounded) => {
                let latent = self.latent(x.clone(), &context.rope);
                let rounded = |part: Tensor<3>| rounded(part.unsqueeze_dim(1)).squeeze_dim(1);
                let both = Tensor::cat(std::iter::once(latent.c_kv()).chain(latent.k_pe()).map(rounded).collect(), 2);
                let ([batch, seq, _], device) = (both.dims(), both.device());
                let mask = || Mask::causal(seq, seq, 0, &device);
                self.attend_expanded(self.queries(x, &context.rope), both, &vec![0; batch], &mask).into()
            }
            Seen::Cache(cache) => self.attend_cached(x, cache),
        }
    }

    fn attend_cached<'a>(&self, x: Input, cache: Cached<'a>) -> Heads<'a> {
        let Cached { rope, append, offsets, mask, way } = cache;
        let Latent { both, .. } = self.latent(x.clone(), rope);
        let dtype = both.dtype();
        // One latent serves all heads: it lies in the cache as a single head.
        let latents = append(0, both.unsqueeze_dim(1));
        match way {
            Way::Expanded => self.attend_expanded(self.queries(x, rope), latents.widen(dtype), offsets, mask).into(),
            Way::Absorbed => self.attend_absorbed(self.queries(x, rope), latents, offsets).into(),
            Way::Fused(fused) => {
                let queries = self.fused_queries(fused, x, rope);
                Heads { values: self.attend_fused(queries, latents, offsets), fused: Some(fused) }
            }
        }
    }

    /// Attention over whole sequences: query `t` of a row sees the keys of its document up to its own. The form for training:
    /// of keys, values and scores nothing outlives the operation. W_O has yet to follow.
    ///
    /// # Shapes
    /// `x [batch, seq, d]`, document starts of length `batch · seq` → `[batch, seq, H·V]`.
    pub(crate) fn attend_causal(&self, x: Input, context: &Context) -> Tensor<3> {
        let Context { rope, document_starts, kv_rank } = context;
        let of_queries = self.query_input(x.clone());
        // Beside frozen weights queries are among the most of what is kept, and soon formed anew.
        let made = self.query_map().and_then(Linear::adapted).zip(of_queries.made.clone());
        let made = made.map(|(map, of)| MadeQueries { map, of });
        let queries = self.queries_of(of_queries, rope);
        let kv_a = self.kv_a_proj_with_mqa.forward(x);
        let weights = LatentWeights {
            norm: self.kv_a_layernorm.gain(),
            kv_b: self.whole_kv_b(*kv_rank),
            cos: rope.cos.clone(),
            sin: rope.sin.clone(),
        };
        let dims = MlaDims { rank: self.latent_width(), ..self.dims };
        latent_attention_of(queries, made, kv_a, weights, document_starts, dims)
    }

    /// `kv_b_proj` over the whole latent, `[H(N+V), L]`: columns of zeros for what was cut, or is not to be read past `rank`.
    /// Normalising and reading are one operation where a model trains, and a zero column reads nothing.
    fn whole_kv_b(&self, rank: Option<usize>) -> Tensor<2> {
        let weight = self.kv_b_proj.matrix();
        let ([rows, kept], whole) = (weight.dims(), self.latent_width());
        let read = rank.map_or(kept, |rank| rank.min(kept));
        if read == whole {
            return weight;
        }
        let weight = if read < kept { weight.narrow(1, 0, read) } else { weight };
        let nothing = Tensor::zeros([rows, whole - read], (&weight.device(), weight.dtype()));
        Tensor::cat(vec![weight, nothing], 1)
    }

    /// Reads only the first `rank` numbers of the latent from now on; `rank` is at most what is read now.
    pub(crate) fn cut(&mut self, rank: usize) {
        let weight = self.kv_b_proj.matrix();
        self.kv_b_proj.set_matrix(weight.narrow(1, 0, rank));
        self.dims.rank = rank;
    }

    /// Reads the whole latent again, with zeros for what was cut: the same function from a wider cache.
    pub(crate) fn widen(&mut self) {
        self.kv_b_proj.set_matrix(self.whole_kv_b(None));
        self.dims.rank = self.latent_width();
    }

    /// Keys and values of every head rebuilt from the latent.
    fn keys(&self, latent: Latent) -> Keys {
        Keys::of_latents(latent.both, self.kv_b_proj.matrix(), self.dims)
    }

    /// The same with the shared part copied into each key: keys `[batch, H, keys, N+R]` and values `[batch, H, keys, V]`, eqs. 42, 44
    /// and 45.
    pub fn expand(&self, latent: Latent) -> (Tensor<4>, Tensor<4>) {
        let keys = self.keys(latent);
        (keys.whole(), keys.values)
    }

    /// Attention over a cache with keys and values rebuilt from the latent: N+R+V products per pair and head, in blocks of scores. The
    /// form for long prefills. Query `t` of row `b` sees the tokens `0..=offsets[b] + t`, which `mask` says, too.
    ///
    /// # Shapes
    /// Queries `seq`, latents `[batch, (1,) keys ≥ seq, L+R]` → `[batch, seq, H·V]`.
    pub(crate) fn attend_expanded<const D: usize>(
        &self,
        queries: Tensor<4>,
        latents: Tensor<D>,
        offsets: &[usize],
        mask: &dyn Fn() -> Mask,
    ) -> Tensor<3> {
        expanded_attention(queries, latents, self.kv_b_proj.matrix(), offsets, mask, self.dims)
    }

    /// The same attention in latent space: q̃ = W_UKᵀ q_nope attends over c_kv itself, and W_UV maps the result: 2L+R products
    /// per pair and head, and only L+R numbers read per cached token (arXiv 2405.04434 §2.1.2, "absorbed"). Query `t` of row `b`
    /// sees the tokens `0..=offsets[b] + t`. Latents are read in the format that they are stored in.
    ///
    /// # Shapes
    /// Queries `seq`, latents `[batch, (1,) keys ≥ seq, L+R]` → `[batch, seq, H·V]`.
    pub(crate) fn attend_absorbed<const D: usize>(
        &self,
        queries: Tensor<4>,
        latents: impl Into<Stored<D>>,
        offsets: &[usize],
    ) -> Tensor<3> {
        absorbed_attention(queries, latents, Some(self.kv_b_proj.matrix()), offsets, self.dims)
    }

    /// The largest attention logit, `[1]`, within documents: a growing one is the earliest sign of divergence (QK-Clip, arXiv 2507.20534).
    pub(crate) fn max_logit(&self, queries: Tensor<4>, latent: Latent, document_starts: &[u32]) -> Tensor<1> {
        largest_logit(queries, self.keys(latent), document_starts, self.dims.scale)
    }
}
