//! What a model is made of: the flat `[model]` section of a run file, and the checked configuration behind it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::attention::{AttentionConfig, GroupedConfig, MlaConfig};
use crate::error::{Error, Result};
pub use crate::layer_config::{LayerConfig, Layers, MlpConfig};
use crate::limits::{WIDEST, check_size};
use crate::rope::RopeConfig;

/// Which attention a run file asks for. One line turns one into another: keys that the chosen kind does not use may stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelSection {
    /// Kind of attention. Keys of another kind may stand beside it; they have no effect, and are named when the run starts.
    pub attention: AttentionKind,
    /// Number of different tokens, at least as many as the tokenizer has. Absent: as many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16_777_216))]
    pub vocab_size: Option<usize>,
    /// Width of the residual stream: how many numbers stand for a token between blocks.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub hidden_size: usize,
    /// Number of decoder blocks.
    #[schemars(range(min = 1, max = 4096))]
    pub num_hidden_layers: usize,
    /// Number of query heads.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub num_attention_heads: usize,
    /// GQA: number of key and value heads, a divisor of `num_attention_heads`. Absent: a quarter of the query heads, at least two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_key_value_heads: Option<usize>,
    /// Width of the feed-forward layer (SwiGLU).
    #[schemars(range(min = 1, max = 1_048_576))]
    pub intermediate_size: usize,
    /// Most tokens that the model reads at once. Absent: `data.seq_len`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16_777_216))]
    pub max_position_embeddings: Option<usize>,
    /// MLA, needed: width of the latent, the numbers that a layer caches per token beside the rotated key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_lora_rank: Option<usize>,
    /// MLA: width of the latent that queries come from. Absent: they come straight from the hidden state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub q_lora_rank: Option<usize>,
    /// MLA, needed: width of the part of each head's key that knows no position.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qk_nope_head_dim: Option<usize>,
    /// MLA, needed: width of the rotated key, which knows the position and which all heads share. An even number; 0: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qk_rope_head_dim: Option<usize>,
    /// MLA, needed: width of each head's value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v_head_dim: Option<usize>,
    /// MHA, GQA, MQA: width of a head. Absent: `hidden_size` divided by `num_attention_heads`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// MHA, GQA, MQA: the share of a head that is rotated, which must come to an even width. Absent: all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partial_rotary_factor: Option<f64>,
    /// MHA, GQA, MQA: a norm on each query and key head before the rotation, as in Qwen3.
    #[serde(default)]
    pub qk_norm: bool,
    /// Biases in the attention: with MLA on `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj`, else on all four projections.
    #[serde(default)]
    pub attention_bias: bool,
    /// MLA: multiply the normalised latent by √(`hidden_size` / `kv_lora_rank`), so that what is read of it does not shrink with its
    /// width.
    #[serde(default)]
    pub latent_scale: bool,
    /// MLA: train the model so that it can also be read at narrower ranks. Absent: at its whole width alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub elastic: Option<ElasticSection>,
    /// MLA: rotate neighbouring numbers in pairs, as DeepSeek does, instead of those of the two halves.
    #[serde(default = "yes")]
    pub rope_interleave: bool,
    /// How positions are told by rotation, and how far beyond the trained length they go.
    #[serde(default)]
    pub rope_parameters: RopeConfig,
    /// A small number that keeps norms from dividing by zero: of the norms of the blocks and the last one. Those of latents use 1e-6.
    #[serde(default = "default_eps")]
    #[schemars(range(min = 0))]
    pub rms_norm_eps: f64,
    /// Whether the output head is the embedding matrix instead of a matrix of its own.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Standard deviation of all random initial matrices (of those that write to the residual stream divided by √(2 · layers)). Absent:
    /// 0.02 for embedding and head, 1/√(width of the input) for the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub initializer_range: Option<f64>,
}

/// `[model.elastic]`: one checkpoint of which every prefix of the latent is a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ElasticSection {
    /// The narrower ranks: how many of the latent's first numbers are to suffice. They rise and lie below `kv_lora_rank`, which needs
    /// no mention.
    #[schemars(length(min = 1), inner(range(min = 1)))]
    pub ranks: Vec<usize>,
}

fn yes() -> bool {
    true
}

pub(crate) fn default_eps() -> f64 {
    1e-6
}

/// A checked model configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Rows of the embedding matrix.
    pub vocab_size: usize,
    /// Width d of the residual stream.
    pub hidden_size: usize,
    /// Number H of query heads.
    pub num_attention_heads: usize,
    /// Longest position the model was made for.
    pub max_position_embeddings: usize,
    /// The decoder blocks.
    pub layers: Layers,
    /// MLA: ranks below L at which the model was trained to be read as well, ascending; absent: none.
    pub kv_elastic_ranks: Option<Vec<usize>>,
    /// Frequencies of the rotary embedding.
    pub rope: RopeConfig,
    /// ε of the block and final norms.
    pub rms_norm_eps: f64,
    /// Whether the output head is the embedding matrix.
    pub tie_word_embeddings: bool,
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
    /// That of a file with the keys that every model needs and no other.
    pub fn new(attention: AttentionKind, layers: usize, [hidden_size, heads, intermediate_size]: [usize; 3]) -> Self {
        Self {
            attention,
            vocab_size: None,
            hidden_size,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: None,
            intermediate_size,
            max_position_embeddings: None,
            kv_lora_rank: None,
            q_lora_rank: None,
            qk_nope_head_dim: None,
            qk_rope_head_dim: None,
            v_head_dim: None,
            head_dim: None,
            partial_rotary_factor: None,
            qk_norm: false,
            attention_bias: false,
            latent_scale: false,
            elastic: None,
            rope_interleave: yes(),
            rope_parameters: RopeConfig::default(),
            rms_norm_eps: default_eps(),
            tie_word_embeddings: false,
            initializer_range: None,
        }
    }

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
        let elastic = self.elastic.as_ref().filter(|_| attention.latent().is_some());
        let mlp = MlpConfig { intermediate_size: self.intermediate_size, bias: false };
        let mut config = ModelConfig {
            vocab_size: self.vocab_size.unwrap_or(vocab_size),
            hidden_size: self.hidden_size,
            num_attention_heads: self.num_attention_heads,
            max_position_embeddings: self.max_position_embeddings.unwrap_or(seq_len),
            kv_elastic_ranks: elastic.map(|elastic| elastic.ranks.clone()),
            layers: Layers::equal(LayerConfig { attention, mlp }, self.num_hidden_layers)?,
            rope: self.rope_parameters.clone(),
            rms_norm_eps: self.rms_norm_eps,
            tie_word_embeddings: self.tie_word_embeddings,
            initializer_range: self.initializer_range,
            family: Family::Lowkey,
            bos_token_id: None,
            eos_token_id: Vec::new(),
        };
        config.family = config.natural_family();
        config.rope.settle(config.max_position_embeddings);
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
        let rank = need("kv_lora_rank", self.kv_lora_rank)?;
        let heads = [
            need("qk_nope_head_dim", self.qk_nope_head_dim)?,
            need("qk_rope_head_dim", self.qk_rope_head_dim)?,
            need("v_head_dim", self.v_head_dim)?,
        ];
        let mla = MlaConfig {
            q_lora_rank: self.q_lora_rank,
            attention_bias: self.attention_bias,
            latent_scale: self.latent_scale,
            rope_interleave: self.rope_interleave,
            ..MlaConfig::deepseek(rank, heads)
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
        let LayerConfig { attention, mlp } = self.layers.shared();
        match attention {
            AttentionConfig::Mla(mla) => mla.family(mlp.bias),
            AttentionConfig::Grouped(grouped) => grouped.family(mlp.bias),
        }
    }

    /// The attention of every layer, but for how much of its latent each caches.
    pub fn attention(&self) -> &AttentionConfig {
        &self.layers.shared().attention
    }

    /// The feed-forward layer of every layer.
    pub fn mlp(&self) -> &MlpConfig {
        &self.layers.shared().mlp
    }

    /// Whether the transformers class of this family computes exactly this model.
    fn suits_its_family(&self) -> bool {
        match (self.family, self.attention()) {
            (Family::Lowkey, _) => true,
            (Family::DeepseekV2, AttentionConfig::Mla(mla)) => {
                mla.rope_interleave && self.natural_family() != Family::Lowkey
            }
            (family, _) => family == self.natural_family(),
        }
    }

    /// Numbers of the latent that each layer caches: L, or less where it was cut; nothing without latent attention.
    pub fn kv_ranks(&self) -> Vec<usize> {
        self.layers.iter().filter_map(|layer| layer.attention.latent()).map(MlaConfig::kv_rank).collect()
    }

    /// The ranks that were chosen layer by layer, where any were: what `kv_cache_ranks` of `config.json` says.
    pub fn kv_cache_ranks(&self) -> Option<Vec<usize>> {
        let cut =
            self.layers.iter().any(|layer| layer.attention.latent().is_some_and(|mla| mla.kv_cache_rank.is_some()));
        cut.then(|| self.kv_ranks())
    }

    /// Lets each layer cache and read that much of its latent; `None`: all.
    pub(crate) fn set_kv_cache_ranks(&mut self, ranks: Option<&[usize]>) {
        for (i, mla) in self.latents_mut().enumerate() {
            mla.kv_cache_rank = ranks.and_then(|ranks| ranks.get(i)).copied();
        }
    }

    /// The latent attentions of its layers, to be changed.
    pub fn latents_mut(&mut self) -> impl Iterator<Item = &mut MlaConfig> {
        self.layers.iter_mut().filter_map(|layer| layer.attention.latent_mut())
    }

    /// The ranks, ascending, at which the model was trained to be read besides the one that it is read at.
    pub fn elastic_ranks(&self) -> Vec<usize> {
        let least = self.kv_ranks().into_iter().min().unwrap_or(0);
        self.kv_elastic_ranks.iter().flatten().copied().filter(|rank| *rank < least).collect()
    }

    /// One rank for each layer, each within its latent.
    pub(crate) fn check_kv_ranks(&self, ranks: &[usize]) -> Result<()> {
        let layers = self.layers.len();
        let refuse = |why| Err(Error::config("kv_cache_ranks", &format!("{ranks:?}"), why));
        let Some(mla) = self.attention().latent() else {
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
        let heads = self.num_attention_heads;
        let LayerConfig { attention, mlp } = self.layers.shared();
        let sizes = [
            ("vocab_size", self.vocab_size, MOST),
            ("hidden_size", self.hidden_size, WIDEST),
            ("num_attention_heads", heads, WIDEST),
            ("intermediate_size", mlp.intermediate_size, WIDEST),
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
        match attention {
            AttentionConfig::Mla(mla) => mla.check(heads)?,
            AttentionConfig::Grouped(grouped) => grouped.check(heads)?,
        }
        if !self.layers.alike() {
            let why = "layers may differ in how much of their latents they cache, and in nothing else";
            return Err(Error::config("num_hidden_layers", &self.layers.len(), why));
        }
        if let Some(ranks) = self.kv_cache_ranks() {
            self.check_kv_ranks(&ranks)?;
        }
        if let (Some(ranks), Some(mla)) = (&self.kv_elastic_ranks, attention.latent()) {
            mla.check_elastic_ranks(ranks)?;
        }
        if !self.suits_its_family() {
            return Err(Error::config(
                "model_type",
                self.family.model_type(),
                format!("does not compute this combination; {} does", self.natural_family().model_type()),
            ));
        }
        self.rope.check(self.rope_width(), self.max_position_embeddings)
    }

    /// Radians per position for each rotated pair.
    pub fn inverse_frequencies(&self) -> Vec<f64> {
        let all = self.rope.inverse_frequencies(self.rope_width(), self.max_position_embeddings);
        match self.attention().latent().and_then(|mla| mla.rope_pairs.as_ref()) {
            Some(pairs) => pairs.frequencies.iter().filter_map(|at| all.get(*at)).copied().collect(),
            None => all,
        }
    }

    /// The width whose frequencies the rotated pairs have: their own, or that which their frequencies were taken from.
    fn rope_width(&self) -> usize {
        let pairs = self.attention().latent().and_then(|mla| mla.rope_pairs.as_ref());
        pairs.map_or_else(|| self.rotary_dim(), |pairs| pairs.width)
    }

    /// Width of the rotated part of a query.
    pub fn rotary_dim(&self) -> usize {
        match self.attention() {
            AttentionConfig::Mla(mla) => mla.qk_rope_head_dim,
            AttentionConfig::Grouped(grouped) => grouped.rotary_dim,
        }
    }

    /// The factor on q·k: 1/√width, times m² under YaRN with `mscale_all_dim` (MLA only), m = 0.1·mscale_all_dim·ln(factor)+1.
    pub fn softmax_scale(&self) -> f64 {
        match self.attention() {
            AttentionConfig::Mla(mla) => mla.softmax_scale(&self.rope),
            AttentionConfig::Grouped(grouped) => grouped.softmax_scale(),
        }
    }

    /// Short name of the attention for tables: `MLA`, `MHA`, `GQA-2`, `MQA`.
    pub fn attention_name(&self) -> String {
        match self.attention() {
            AttentionConfig::Mla(_) => "MLA".into(),
            AttentionConfig::Grouped(grouped) => grouped.name(self.num_attention_heads),
        }
    }
}

#[cfg(test)]
mod tests;
