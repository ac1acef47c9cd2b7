//! What a model is made of: the flat `[model]` section of a run file, and the checked configuration behind it.

use serde::{Deserialize, Serialize};

use crate::attention::{AttentionConfig, GroupedConfig, MlaConfig};
use crate::error::{Error, Result};
use crate::rope::RopeConfig;

/// Which attention a run file asks for. One line turns one into another: keys that the chosen kind does not use may stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttentionKind {
    /// Multi-head Latent Attention (DeepSeek-V2, arXiv 2405.04434 §2.1).
    Mla,
    /// Multi-head attention: a key and value head for each query head.
    Mha,
    /// Grouped-query attention (arXiv 2305.13245): query heads share key and value heads in groups.
    Gqa,
    /// Multi-query attention (arXiv 1911.02150): one key and value head.
    Mqa,
}

/// The `[model]` section of a run file: Hugging Face's keys, flat.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSection {
    /// Kind of attention.
    pub attention: AttentionKind,
    /// Size of the token vocabulary; absent: the tokenizer's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vocab_size: Option<usize>,
    /// Width d of the residual stream.
    pub hidden_size: usize,
    /// Number of decoder blocks.
    pub num_hidden_layers: usize,
    /// Number H of query heads.
    pub num_attention_heads: usize,
    /// Key and value heads of GQA; absent: a quarter of the query heads, at least two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_key_value_heads: Option<usize>,
    /// Width of the SwiGLU feed-forward layer.
    pub intermediate_size: usize,
    /// Longest position; absent: the training sequence length.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_position_embeddings: Option<usize>,
    /// MLA: width L of the cached latent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_lora_rank: Option<usize>,
    /// MLA: width Q of the query latent; absent: queries come straight from the hidden state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub q_lora_rank: Option<usize>,
    /// MLA: per-head key width N without position.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qk_nope_head_dim: Option<usize>,
    /// MLA: width R of the rotated key that all heads share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qk_rope_head_dim: Option<usize>,
    /// MLA: per-head value width V.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v_head_dim: Option<usize>,
    /// MHA, GQA, MQA: head width; absent: `hidden_size / num_attention_heads`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// MHA, GQA, MQA: fraction of the head width that is rotated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partial_rotary_factor: Option<f64>,
    /// MHA, GQA, MQA: RMSNorm on each query and key head before the rotation (Qwen3).
    #[serde(default)]
    pub qk_norm: bool,
    /// Biases: on `q_a_proj`, `kv_a_proj_with_mqa`, `o_proj` for MLA; on all four projections otherwise.
    #[serde(default)]
    pub attention_bias: bool,
    /// MLA: multiply the normalised latent by √(d / kv_lora_rank), so that its read-out does not shrink with the rank.
    #[serde(default)]
    pub latent_scale: bool,
    /// MLA: train narrower readings of the latent together with the whole one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub elastic: Option<ElasticSection>,
    /// MLA: rotate adjacent pairs (DeepSeek's convention) instead of the two halves.
    #[serde(default = "yes")]
    pub rope_interleave: bool,
    /// Base frequency and, under YaRN, its parameters.
    #[serde(default)]
    pub rope_parameters: RopeConfig,
    /// ε of the block and final norms (the latent norms always use 1e-6).
    #[serde(default = "default_eps")]
    pub rms_norm_eps: f64,
    /// Use the embedding matrix as output head.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// One standard deviation for all matrices; absent: by fan-in (see [`crate::CausalLm::init`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initializer_range: Option<f64>,
}

/// `[model.elastic]`: one checkpoint of which every prefix of the latent is a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ElasticSection {
    /// Numbers of the latent that are to suffice, ascending and below `kv_lora_rank`, which always does.
    pub ranks: Vec<usize>,
}

fn yes() -> bool {
    true
}

pub(crate) fn default_eps() -> f64 {
    1e-6
}

/// Most of a width: above it the parameter count could overflow, and no machine could hold the model anyway.
pub(crate) const WIDEST: usize = 1 << 20;

/// A checked model configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Rows of the embedding matrix.
    pub vocab_size: usize,
    /// Width d of the residual stream.
    pub hidden_size: usize,
    /// Number of decoder blocks.
    pub num_hidden_layers: usize,
    /// Number H of query heads.
    pub num_attention_heads: usize,
    /// Width of the SwiGLU feed-forward layer.
    pub intermediate_size: usize,
    /// Longest position the model was made for.
    pub max_position_embeddings: usize,
    /// The attention of every block.
    pub attention: AttentionConfig,
    /// Frequencies of the rotary embedding.
    pub rope: RopeConfig,
    /// ε of the block and final norms.
    pub rms_norm_eps: f64,
    /// Whether the output head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Biases on the three projections of every feed-forward layer.
    pub mlp_bias: bool,
    /// Standard deviation of the initial matrices, where one is fixed for all.
    pub initializer_range: Option<f64>,
    /// Which `model_type` the configuration came from or is written as.
    pub family: Family,
    /// First token of a text, where the tokenizer has one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_id: Vec<u32>,
}

/// The `model_type` of `config.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `deepseek_v2`: MLA, pairs rotated in place.
    DeepseekV2,
    /// `deepseek_v3`: MLA, pairs or halves.
    DeepseekV3,
    /// `llama`.
    Llama,
    /// `qwen2`: biases on query, key and value.
    Qwen2,
    /// `qwen3`: norms on query and key heads.
    Qwen3,
    /// `lowkey`: a combination that no transformers class computes (a latent scale, a partial rotation, …). Written under a
    /// name of its own, so that other programs refuse it instead of computing something else.
    Lowkey,
}

impl Family {
    /// The name in `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::DeepseekV2 => "deepseek_v2",
            Self::DeepseekV3 => "deepseek_v3",
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Lowkey => "lowkey",
        }
    }
}

impl ModelSection {
    /// Fills the defaults, checks every size and says which keys the chosen attention leaves unused.
    ///
    /// `vocab_size` and `seq_len` are those of the data; they stand in for absent keys.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::MissingKey`] naming the key, the value and the rule.
    pub fn resolve(&self, vocab_size: usize, seq_len: usize) -> Result<(ModelConfig, Vec<&'static str>)> {
        let (attention, unused) = match self.attention {
            AttentionKind::Mla => self.mla()?,
            kind => self.grouped(kind)?,
        };
        let mut config = ModelConfig {
            vocab_size: self.vocab_size.unwrap_or(vocab_size),
            hidden_size: self.hidden_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            intermediate_size: self.intermediate_size,
            max_position_embeddings: self.max_position_embeddings.unwrap_or(seq_len),
            attention,
            rope: self.rope_parameters.clone(),
            rms_norm_eps: self.rms_norm_eps,
            tie_word_embeddings: self.tie_word_embeddings,
            mlp_bias: false,
            initializer_range: self.initializer_range,
            family: Family::Lowkey,
            bos_token_id: None,
            eos_token_id: Vec::new(),
        };
        config.family = config.natural_family();
        config.check()?;
        if config.vocab_size < vocab_size {
            return Err(Error::config(
                "vocab_size",
                &config.vocab_size,
                format!("the tokenizer has {vocab_size} tokens; leave the key out or make it at least that"),
            ));
        }
        Ok((config, unused))
    }

    fn mla(&self) -> Result<(AttentionConfig, Vec<&'static str>)> {
        let need = |key: &'static str, value: Option<usize>| {
            value.ok_or_else(|| Error::MissingKey { key, why: "attention = \"mla\" needs it".into() })
        };
        let mla = MlaConfig {
            q_lora_rank: self.q_lora_rank,
            kv_lora_rank: need("kv_lora_rank", self.kv_lora_rank)?,
            qk_nope_head_dim: need("qk_nope_head_dim", self.qk_nope_head_dim)?,
            qk_rope_head_dim: need("qk_rope_head_dim", self.qk_rope_head_dim)?,
            v_head_dim: need("v_head_dim", self.v_head_dim)?,
            attention_bias: self.attention_bias,
            latent_scale: self.latent_scale,
            rope_interleave: self.rope_interleave,
            kv_cache_ranks: None,
            kv_elastic_ranks: self.elastic.as_ref().map(|elastic| elastic.ranks.clone()),
        };
        let unused = [
            ("num_key_value_heads", self.num_key_value_heads.is_some()),
            ("head_dim", self.head_dim.is_some()),
            ("partial_rotary_factor", self.partial_rotary_factor.is_some()),
            ("qk_norm", self.qk_norm),
        ];
        Ok((AttentionConfig::Mla(mla), set_keys(&unused)))
    }

    fn grouped(&self, kind: AttentionKind) -> Result<(AttentionConfig, Vec<&'static str>)> {
        let heads = self.num_attention_heads;
        let num_key_value_heads = match kind {
            AttentionKind::Mqa => 1,
            AttentionKind::Gqa => self.num_key_value_heads.unwrap_or((heads / 4).max(2).min(heads)),
            AttentionKind::Mha | AttentionKind::Mla => heads,
        };
        if self.head_dim.is_none() && (heads == 0 || !self.hidden_size.is_multiple_of(heads)) {
            return Err(Error::config(
                "hidden_size",
                &self.hidden_size,
                format!("not a multiple of num_attention_heads = {heads}; set head_dim or change one of them"),
            ));
        }
        let head_dim = self.head_dim.unwrap_or_else(|| self.hidden_size / heads);
        let factor = self.partial_rotary_factor.unwrap_or(1.0);
        if !(0.0..=1.0).contains(&factor) {
            return Err(Error::config("partial_rotary_factor", &factor, "must lie between 0 and 1"));
        }
        let grouped = GroupedConfig {
            num_key_value_heads,
            head_dim,
            rotary_dim: (head_dim as f64 * factor).round() as usize,
            qkv_bias: self.attention_bias,
            o_bias: self.attention_bias,
            qk_norm: self.qk_norm,
        };
        let unused = [
            ("num_key_value_heads", kind != AttentionKind::Gqa && self.num_key_value_heads.is_some()),
            ("kv_lora_rank", self.kv_lora_rank.is_some()),
            ("q_lora_rank", self.q_lora_rank.is_some()),
            ("qk_nope_head_dim", self.qk_nope_head_dim.is_some()),
            ("qk_rope_head_dim", self.qk_rope_head_dim.is_some()),
            ("v_head_dim", self.v_head_dim.is_some()),
            ("latent_scale", self.latent_scale),
            ("elastic", self.elastic.is_some()),
        ];
        Ok((AttentionConfig::Grouped(grouped), set_keys(&unused)))
    }
}

fn set_keys(keys: &[(&'static str, bool)]) -> Vec<&'static str> {
    keys.iter().filter(|(_, set)| *set).map(|(key, _)| *key).collect()
}

impl ModelConfig {
    /// The transformers class that computes this model exactly, or [`Family::Lowkey`] where there is none.
    pub fn natural_family(&self) -> Family {
        match &self.attention {
            AttentionConfig::Mla(mla) => mla.family(self.mlp_bias),
            AttentionConfig::Grouped(grouped) => grouped.family(self.mlp_bias),
        }
    }

    /// Whether the transformers class of this family computes exactly this model.
    fn suits_its_family(&self) -> bool {
        match (self.family, &self.attention) {
            (Family::Lowkey, _) => true,
            (Family::DeepseekV2, AttentionConfig::Mla(mla)) => {
                mla.rope_interleave && self.natural_family() != Family::Lowkey
            }
            (family, _) => family == self.natural_family(),
        }
    }

    /// Numbers of the latent that each layer caches: L, or less where it was cut; nothing without latent attention.
    pub fn kv_ranks(&self) -> Vec<usize> {
        let latent = self.attention.latent();
        latent.map_or_else(Vec::new, |mla| (0..self.num_hidden_layers).map(|layer| mla.kv_rank(layer)).collect())
    }

    /// The ranks, ascending, at which the model was trained to be read besides the one that it is read at.
    pub fn elastic_ranks(&self) -> Vec<usize> {
        let least = self.kv_ranks().into_iter().min().unwrap_or(0);
        let Some(mla) = self.attention.latent() else { return Vec::new() };
        mla.kv_elastic_ranks.iter().flatten().copied().filter(|rank| *rank < least).collect()
    }

    /// One rank for each layer, each within its latent.
    pub(crate) fn check_kv_ranks(&self, ranks: &[usize]) -> Result<()> {
        let layers = self.num_hidden_layers;
        let refuse = |why| Err(Error::config("kv_cache_ranks", &format!("{ranks:?}"), why));
        let Some(mla) = self.attention.latent() else {
            return refuse(format!("{} attention has no latent to cut", self.attention_name()));
        };
        if ranks.len() != layers {
            return refuse(format!("{} ranks for {layers} layers", ranks.len()));
        }
        let most = mla.kv_lora_rank;
        match ranks.iter().position(|rank| !(1..=most).contains(rank)) {
            Some(layer) => refuse(format!("layer {layer} must keep 1 to kv_lora_rank = {most}")),
            None => Ok(()),
        }
    }

    /// Checks every size.
    ///
    /// # Errors
    /// [`Error::Config`] naming the first key that breaks a rule.
    pub fn check(&self) -> Result<()> {
        // Bounds below which the parameter count and the cost model cannot overflow, and above which no machine could hold
        // the model anyway.
        const MOST: usize = 1 << 24;
        const DEEPEST: usize = 1 << 12;
        let heads = self.num_attention_heads;
        let sizes = [
            ("vocab_size", self.vocab_size, MOST),
            ("hidden_size", self.hidden_size, WIDEST),
            ("num_hidden_layers", self.num_hidden_layers, DEEPEST),
            ("num_attention_heads", heads, WIDEST),
            ("intermediate_size", self.intermediate_size, WIDEST),
            ("max_position_embeddings", self.max_position_embeddings, MOST),
        ];
        for (key, size, most) in sizes {
            check_size(key, size, most)?;
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            return Err(Error::config("rms_norm_eps", &self.rms_norm_eps, "must be a finite number ≥ 0"));
        }
        if let Some(range) = self.initializer_range
            && !(range.is_finite() && range > 0.0)
        {
            return Err(Error::config("initializer_range", &range, "must be a finite number > 0"));
        }
        match &self.attention {
            AttentionConfig::Mla(mla) => mla.check(heads)?,
            AttentionConfig::Grouped(grouped) => grouped.check(heads)?,
        }
        if let Some(ranks) = self.attention.latent().and_then(|mla| mla.kv_cache_ranks.as_ref()) {
            self.check_kv_ranks(ranks)?;
        }
        if !self.suits_its_family() {
            return Err(Error::config(
                "model_type",
                self.family.model_type(),
                format!("does not compute this combination; {} does", self.natural_family().model_type()),
            ));
        }
        self.rope.check(self.rotary_dim(), self.max_position_embeddings)
    }

    /// Width of the rotated part of a query.
    pub fn rotary_dim(&self) -> usize {
        match &self.attention {
            AttentionConfig::Mla(mla) => mla.qk_rope_head_dim,
            AttentionConfig::Grouped(grouped) => grouped.rotary_dim,
        }
    }

    /// The factor on q·k: 1/√width, times m² under YaRN with `mscale_all_dim` (MLA only), m = 0.1·mscale_all_dim·ln(factor)+1.
    pub fn softmax_scale(&self) -> f64 {
        match &self.attention {
            AttentionConfig::Mla(mla) => mla.softmax_scale(&self.rope),
            AttentionConfig::Grouped(grouped) => grouped.softmax_scale(),
        }
    }

    /// Short name of the attention for tables: `MLA`, `MHA`, `GQA-2`, `MQA`.
    pub fn attention_name(&self) -> String {
        match &self.attention {
            AttentionConfig::Mla(_) => "MLA".into(),
            AttentionConfig::Grouped(grouped) => grouped.name(self.num_attention_heads),
        }
    }
}

pub(crate) fn check_size(key: &'static str, size: usize, most: usize) -> Result<()> {
    if size == 0 || size > most {
        return Err(Error::config(key, &size, format!("must lie between 1 and {most}")));
    }
    Ok(())
}

pub(crate) fn check_heads(heads: usize, width: usize, most: usize) -> Result<()> {
    if heads.saturating_mul(width) > most {
        let why = format!("{heads} heads of width {width} are more than {most} wide together");
        return Err(Error::config("num_attention_heads", &heads, why));
    }
    Ok(())
}

pub(crate) fn even(key: &'static str, width: usize) -> Result<()> {
    if !width.is_multiple_of(2) || width > 1 << 16 {
        return Err(Error::config(
            key,
            &width,
            "the rotated width must be even (components turn in pairs) and at most 65536",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
