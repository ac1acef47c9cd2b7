//! The sizes of Multi-head Latent Attention: rules, counts and costs.

use serde_json::{Value, json};

use super::super::config::{AttentionSizes, CacheBuffer};
use crate::config::Family;
use crate::decode_cost::{AttentionCost, DecodeCosts};
use crate::error::{Error, Result};
use crate::json_keys::Keys;
use crate::limits::{WIDEST, check_heads, check_size, even};
use crate::rope::{RopeConfig, RopePairs};

/// Sizes of Multi-head Latent Attention (DeepSeek-V2, arXiv 2405.04434 §2.1 and appendix C).
#[derive(Clone, Debug, PartialEq)]
pub struct MlaConfig {
    /// Width Q of the query latent, if queries are compressed.
    pub q_lora_rank: Option<usize>,
    /// Width L of the cached latent.
    pub kv_lora_rank: usize,
    /// Per-head key width N without position.
    pub qk_nope_head_dim: usize,
    /// Width R of the shared rotated key.
    pub qk_rope_head_dim: usize,
    /// Per-head value width V.
    pub v_head_dim: usize,
    /// Biases on `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj`.
    pub attention_bias: bool,
    /// Scale the normalised latent by √(d / L).
    pub latent_scale: bool,
    /// Normalise the latent. Without, it is a linear map of the hidden state, as a latent made of full keys and values must be; its gain
    /// stays.
    pub latent_norm: bool,
    /// A bias on the map that makes the heads' queries, `q_proj` or `q_b_proj`.
    pub query_bias: bool,
    /// Rotate adjacent pairs instead of halves.
    pub rope_interleave: bool,
    /// Which frequency each rotated pair turns with; absent: each has its own.
    pub rope_pairs: Option<RopePairs>,
    /// Numbers of the latent that the layer caches and reads, at most L; absent: all. The norm of the latent is taken over all L, so
    /// that a cut is a projection.
    pub kv_cache_rank: Option<usize>,
}

impl MlaConfig {
    /// DeepSeek's attention with a latent of `kv_lora_rank` and heads of `[N, R, V]`, no option set: queries are not compressed, there
    /// are no biases, neighbouring numbers are rotated in pairs.
    pub fn deepseek(kv_lora_rank: usize, [qk_nope_head_dim, qk_rope_head_dim, v_head_dim]: [usize; 3]) -> Self {
        Self {
            q_lora_rank: None,
            kv_lora_rank,
            qk_nope_head_dim,
            qk_rope_head_dim,
            v_head_dim,
            attention_bias: false,
            latent_scale: false,
            latent_norm: true,
            query_bias: false,
            rope_interleave: true,
            rope_pairs: None,
            kv_cache_rank: None,
        }
    }

    /// The first property that DeepSeek's attention as other programs compute it lacks, and the mend where there is one; `None`: they
    /// compute the same. What can be folded into the weights counts, too: [`MlaConfig::folded`] is without it. Whoever writes a model
    /// for other programs asks here.
    pub fn beyond_deepseek(&self) -> Option<&'static str> {
        // Every option by its name: a new one must say here whose it is.
        let Self {
            q_lora_rank: _,
            kv_lora_rank: _,
            qk_nope_head_dim: _,
            qk_rope_head_dim,
            v_head_dim: _,
            attention_bias: _,
            latent_scale,
            latent_norm,
            query_bias,
            rope_interleave: _,
            ref rope_pairs,
            kv_cache_rank,
        } = *self;
        if latent_scale {
            return Some("latent_scale = true, which only lowkey computes");
        }
        if !latent_norm {
            return Some("latent_norm = false: DeepSeek's attention normalises every latent");
        }
        if query_bias {
            return Some("query_bias = true: DeepSeek's attention has no bias on queries");
        }
        if rope_pairs.is_some() {
            return Some("rope_pairs: in DeepSeek's attention each rotated pair has a frequency of its own");
        }
        if kv_cache_rank.is_some() {
            return Some("kv_cache_ranks, which only lowkey reads");
        }
        if qk_rope_head_dim == 0 {
            // transformers turns something else instead.
            return Some(
                "qk_rope_head_dim = 0, which transformers reads as \"not given\" and llama.cpp has no place for; train with at least \
                 2 rotated dimensions",
            );
        }
        None
    }

    /// The configuration of the same function where weights have taken in what they can: a factor on the latent goes into the gain of
    /// its norm, and a cut one is read whole with weights of zero.
    #[must_use]
    pub fn folded(&self) -> Self {
        Self { latent_scale: false, kv_cache_rank: None, ..self.clone() }
    }

    /// Whether there is a fused form, in which W_UK is multiplied into the map of the queries and W_UV into W_O: nothing but linear maps
    /// of a head stands between these, and queries have no bias, for which the multiplied weights have no place.
    pub fn fuses(&self) -> bool {
        // Every option by its name: a new one must say here whether it stands between.
        let Self {
            q_lora_rank: _,
            kv_lora_rank: _,
            qk_nope_head_dim: _,
            qk_rope_head_dim: _,
            v_head_dim: _,
            // On W_DQ, W_DKV and W_O, which lie outside.
            attention_bias: _,
            // Before the latent and before its readers.
            latent_scale: _,
            latent_norm: _,
            query_bias,
            rope_interleave: _,
            rope_pairs: _,
            kv_cache_rank: _,
        } = self;
        !*query_bias
    }

    /// Whether what is read of a latent is a matter of weights alone: keys and values are linear maps of it, and so is what the layer
    /// makes of the values. Conversions and spectra ask.
    pub fn reads_linearly(&self) -> bool {
        // Every option by its name: a new one must say here whether more than weights reads.
        let Self {
            q_lora_rank: _,
            kv_lora_rank: _,
            qk_nope_head_dim: _,
            qk_rope_head_dim: _,
            v_head_dim: _,
            // Beside the latent and its readers.
            attention_bias: _,
            // Before the latent and before its readers.
            latent_scale: _,
            latent_norm: _,
            // Of what reads, and a weight, too.
            query_bias: _,
            rope_interleave: _,
            rope_pairs: _,
            kv_cache_rank: _,
        } = self;
        true
    }

    /// What the keys of `config.json` say in a model of `family` with `heads` query heads.
    pub(crate) fn of_keys(keys: &Keys, family: Family, heads: usize) -> Result<Self> {
        if let Some(kv_heads) = keys.size("num_key_value_heads")?
            && kv_heads != heads
        {
            return Err(Error::config(
                "num_key_value_heads",
                &kv_heads,
                format!("MLA has no key heads of its own: write null or num_attention_heads = {heads}"),
            ));
        }
        let qk_rope_head_dim = keys.need("qk_rope_head_dim")?;
        if let Some(head_dim) = keys.size("head_dim")?
            && head_dim != qk_rope_head_dim
        {
            return Err(Error::config(
                "head_dim",
                &head_dim,
                format!(
                    "for MLA it is the width of the rotation: leave it out or write qk_rope_head_dim = {qk_rope_head_dim}"
                ),
            ));
        }
        // Other programs do not know these keys, and compute as if they were not there.
        let own = family == Family::Lowkey;
        Ok(Self {
            q_lora_rank: keys.size("q_lora_rank")?,
            kv_lora_rank: keys.need("kv_lora_rank")?,
            qk_nope_head_dim: keys.need("qk_nope_head_dim")?,
            qk_rope_head_dim,
            v_head_dim: keys.need("v_head_dim")?,
            attention_bias: keys.flag("attention_bias")?.unwrap_or(false),
            latent_scale: own && keys.flag("latent_scale")?.unwrap_or(false),
            latent_norm: !own || keys.flag("latent_norm")?.unwrap_or(true),
            query_bias: own && keys.flag("query_bias")?.unwrap_or(false),
            // DeepSeek-V2 knows no other convention.
            rope_interleave: family == Family::DeepseekV2 || keys.flag("rope_interleave")?.unwrap_or(true),
            rope_pairs: if own { rope_pairs(keys)? } else { None },
            kv_cache_rank: None,
        })
    }

    /// Its keys of `config.json` that every family has.
    pub(crate) fn keys(&self, heads: usize, layers: usize) -> Value {
        // Every option by its name: one that is not written is lost. Those of lowkey alone are in `own_keys`.
        let Self {
            q_lora_rank,
            kv_lora_rank,
            qk_nope_head_dim,
            qk_rope_head_dim,
            v_head_dim,
            attention_bias,
            latent_scale: _,
            latent_norm: _,
            query_bias: _,
            rope_interleave,
            rope_pairs: _,
            kv_cache_rank: _,
        } = self;
        json!({
            "q_lora_rank": q_lora_rank,
            "kv_lora_rank": kv_lora_rank,
            "qk_nope_head_dim": qk_nope_head_dim,
            "qk_rope_head_dim": qk_rope_head_dim,
            "qk_head_dim": qk_nope_head_dim + qk_rope_head_dim,
            "v_head_dim": v_head_dim,
            // transformers takes it as the width of the rotation.
            "head_dim": qk_rope_head_dim,
            "num_key_value_heads": heads,
            "attention_bias": attention_bias,
            "rope_interleave": rope_interleave,
            // All layers dense; the defaults of these keys would make experts of them.
            "first_k_dense_replace": layers,
            "num_nextn_predict_layers": 0,
        })
    }

    /// Those that lowkey's own family has besides; other programs do not know them.
    pub(crate) fn own_keys(&self) -> Value {
        json!({
            "latent_scale": self.latent_scale,
            "latent_norm": self.latent_norm,
            "query_bias": self.query_bias,
            "rope_pairs": self.rope_pairs.as_ref().map(|pairs| &pairs.frequencies),
            "rope_pairs_width": self.rope_pairs.as_ref().map(|pairs| pairs.width),
        })
    }

    /// Whether no other family's `config.json` has this key.
    pub(crate) fn is_own_key(key: &str) -> bool {
        key == "kv_cache_ranks" || Self::deepseek(1, [1, 2, 1]).own_keys().get(key).is_some()
    }

    /// Numbers of the latent that are cached and read: L, or less of one that was cut.
    pub fn kv_rank(&self) -> usize {
        self.kv_cache_rank.unwrap_or(self.kv_lora_rank)
    }

    /// Checks every size but [`MlaConfig::kv_cache_rank`], which goes with the layer.
    pub(crate) fn check(&self, heads: usize) -> Result<()> {
        for (key, size) in [
            ("kv_lora_rank", self.kv_lora_rank),
            ("qk_nope_head_dim", self.qk_nope_head_dim),
            ("v_head_dim", self.v_head_dim),
            ("q_lora_rank", self.q_lora_rank.unwrap_or(1)),
        ] {
            check_size(key, size, WIDEST)?;
        }
        even("qk_rope_head_dim", self.qk_rope_head_dim)?;
        if let Some(pairs) = &self.rope_pairs {
            pairs.check(self.qk_rope_head_dim)?;
        }
        if self.latent_scale && !self.latent_norm {
            let why = "scales a latent that is normalised; with latent_norm = false leave it out";
            return Err(Error::config("latent_scale", &true, why));
        }
        let widest = (self.qk_nope_head_dim + self.qk_rope_head_dim).max(self.v_head_dim);
        check_heads(heads, widest, WIDEST)
    }

    /// Ascending ranks below the whole.
    pub(crate) fn check_elastic_ranks(&self, ranks: &[usize]) -> Result<()> {
        let whole = self.kv_lora_rank;
        let rising = ranks.is_sorted_by(|a, b| a < b);
        if ranks.is_empty() || !rising || ranks.iter().any(|rank| !(1..whole).contains(rank)) {
            let why = format!("must rise, from 1 on and below kv_lora_rank = {whole}, which needs no mention");
            return Err(Error::config("elastic.ranks", &format!("{ranks:?}"), why));
        }
        Ok(())
    }

    /// The transformers class that computes a model with this attention, [`Family::Lowkey`] where there is none.
    pub(crate) fn family(&self, mlp_bias: bool) -> Family {
        if self.beyond_deepseek().is_some() {
            return Family::Lowkey;
        }
        match (mlp_bias, self.rope_interleave) {
            (false, _) => Family::DeepseekV3,
            // Of the two with latents only DeepSeek-V2 has such biases, and it rotates pairs.
            (true, true) => Family::DeepseekV2,
            (true, false) => Family::Lowkey,
        }
    }

    /// 1/√(N+R), times m² under YaRN with `mscale_all_dim`.
    pub(crate) fn softmax_scale(&self, rope: &RopeConfig) -> f64 {
        let width = (self.qk_nope_head_dim + self.qk_rope_head_dim) as f64;
        rope.logit_factor() / width.sqrt()
    }

    /// One buffer, which all heads share: the latent, and behind it the rotated key.
    pub(crate) fn cache_buffers(&self) -> Vec<CacheBuffer> {
        let rank = self.kv_rank();
        vec![CacheBuffer { heads: 1, width: rank + self.qk_rope_head_dim, split: rank }]
    }

    pub(crate) fn sizes(&self, d: usize, heads: usize) -> AttentionSizes {
        let (nope, rope, value, latent) =
            (self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim, self.kv_lora_rank);
        let (q_width, down) = (heads * (nope + rope), latent + rope);
        let query = self.q_lora_rank.map_or(d * q_width, |q| d * q + q * q_width);
        let q_latent = self.q_lora_rank.unwrap_or(0);
        let biases = if self.attention_bias { q_latent + down + d } else { 0 };
        let biases = biases + if self.query_bias { q_width } else { 0 };
        AttentionSizes {
            matrices: query + d * down + latent * heads * (nope + value) + heads * value * d,
            vectors: q_latent + latent + biases,
            pair: heads * (nope + rope + value),
            expanded: heads * (nope + rope + value),
            cached: latent + rope,
            widest: heads * (nope + rope.max(value)),
            // Queries, the output with its log-sum-exp; the latents before their norms.
            kept: heads * (nope + rope + value + 1) + latent + rope + 2 * q_latent,
        }
    }

    /// [`ModelConfig::decode_costs`](crate::ModelConfig::decode_costs).
    pub(crate) fn decode_costs(&self, d: usize, heads: usize, context: usize) -> DecodeCosts {
        let (nope, rope, value, whole) =
            (self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim, self.kv_lora_rank);
        let rank = self.kv_rank();
        // What every form does: the latent, the shared key and the query latent.
        let shared = d * (whole + rope) + self.q_lora_rank.map_or(0, |q| d * q);
        let width = self.q_lora_rank.unwrap_or(d);
        let up = rank * heads * (nope + value);
        let split = shared + width * heads * (nope + rope) + up + heads * value * d;
        let fused = shared + width * heads * (rank + rope) + heads * rank * d;
        let keys_and_values = heads * (nope + rope + value);
        let cached = context * (rank + rope);
        let in_latent_space = |weights: usize| AttentionCost {
            weights,
            cached,
            rebuilt: 0,
            products: weights + context * heads * (2 * rank + rope),
        };
        DecodeCosts {
            expanded: AttentionCost {
                weights: split,
                cached,
                rebuilt: context * keys_and_values,
                // W_UK and W_UV meet every cached token, the new one among them.
                products: split - up + context * (up + keys_and_values),
            },
            absorbed: Some(in_latent_space(split)),
            fused: self.fuses().then(|| in_latent_space(fused)),
        }
    }
}

fn rope_pairs(keys: &Keys) -> Result<Option<RopePairs>> {
    let Some(frequencies) = keys.sizes("rope_pairs")? else { return Ok(None) };
    Ok(Some(RopePairs { width: keys.need("rope_pairs_width")?, frequencies }))
}
