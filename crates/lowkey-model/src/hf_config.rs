//! `config.json`: reading both spellings of Hugging Face, and writing one that both old and new transformers read.
//!
//! transformers 5 keeps the rotary parameters in `rope_parameters`; older versions, and the DeepSeek repositories, in
//! `rope_theta` and `rope_scaling`. Where both are present transformers lets `rope_scaling` win, and so does this module.

pub(crate) mod dialect;

use std::path::Path;

use lowkey_files::read_text;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::attention::{AttentionConfig, GroupedConfig, MlaConfig};
use crate::checkpoint::quantisation::Quantisation;
use crate::config::{Family, ModelConfig, default_eps};
use crate::error::{Error, Result};
use crate::json_keys::Keys;
use crate::layer_config::{LayerConfig, Layers, MlpConfig};
use crate::rope::{RopeConfig, RopeType};
use dialect::{Dialect, NAMES};

/// Largest `config.json` that is read. Those of published models have a few kilobytes; a tree of JSON takes a hundred times
/// the room of its text.
pub(crate) const LARGEST: u64 = 4 << 20;

impl ModelConfig {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// [`Error::File`] naming the file, the key and the reason: a `model_type` that is not implemented, mixture-of-experts
    /// layers, a missing key, a value of the wrong type, or sizes that no model can have.
    pub fn read(path: &Path) -> Result<Self> {
        let text = read_text(path, LARGEST)?;
        let value: Value =
            serde_json::from_str(&text).map_err(|e| Error::file(path, format!("not valid JSON: {e}")))?;
        let Value::Object(map) = value else {
            return Err(Error::file(path, "must hold a JSON object"));
        };
        Self::from_json(&map).map_err(|e| Error::file(path, e.to_string()))
    }

    /// The configuration that a `config.json` object describes.
    ///
    /// # Errors
    /// As [`ModelConfig::read`], without the file's name.
    pub fn from_json(map: &Map<String, Value>) -> Result<Self> {
        match Dialect::of(map)? {
            Some(translated) => Self::of_known(&translated.keys),
            None => Self::of_known(map),
        }
    }

    /// Of a model type that is read as it is.
    fn of_known(map: &Map<String, Value>) -> Result<Self> {
        let keys = Keys(map);
        let model_type = keys.text("model_type")?.unwrap_or_default();
        let family = match model_type {
            "deepseek_v2" => Family::DeepseekV2,
            "deepseek_v3" => Family::DeepseekV3,
            "llama" => Family::Llama,
            "qwen2" => Family::Qwen2,
            "qwen3" => Family::Qwen3,
            "lowkey" => Family::Lowkey,
            other => {
                let why = format!(
                    "not implemented; known are deepseek_v2, deepseek_v3, llama, qwen2, qwen3, lowkey; and as such {NAMES}"
                );
                return Err(Error::config("model_type", other, why));
            }
        };
        refuse_unsupported(&keys, family)?;
        let hidden_size = keys.need("hidden_size")?;
        let heads = keys.need("num_attention_heads")?;
        let attention = match family {
            Family::DeepseekV2 | Family::DeepseekV3 => AttentionConfig::Mla(MlaConfig::of_keys(&keys, family, heads)?),
            Family::Lowkey if map.get("kv_lora_rank").is_some_and(|v| !v.is_null()) => {
                AttentionConfig::Mla(MlaConfig::of_keys(&keys, family, heads)?)
            }
            _ => AttentionConfig::Grouped(GroupedConfig::of_keys(&keys, family, hidden_size, heads)?),
        };
        let layer = LayerConfig {
            attention,
            mlp: MlpConfig {
                intermediate_size: keys.need("intermediate_size")?,
                bias: keys.flag("mlp_bias")?.unwrap_or(false),
            },
        };
        let mut config = Self {
            vocab_size: keys.need("vocab_size")?,
            hidden_size,
            num_attention_heads: heads,
            max_position_embeddings: match (keys.size("max_position_embeddings")?, longest_by_default(family)) {
                (Some(longest), _) | (None, Some(longest)) => longest,
                (None, None) => keys.need("max_position_embeddings")?,
            },
            kv_elastic_ranks: if layer.attention.latent().is_some() { keys.sizes("kv_elastic_ranks")? } else { None },
            layers: Layers::equal(layer, keys.need("num_hidden_layers")?)?,
            rope: rope(&keys)?,
            rms_norm_eps: keys.number("rms_norm_eps")?.unwrap_or_else(default_eps),
            tie_word_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(false),
            initializer_range: keys.number("initializer_range")?,
            family,
            bos_token_id: keys.get("bos_token_id", "a token id", token_ids)?.unwrap_or_default().first().copied(),
            eos_token_id: keys.get("eos_token_id", "a token id or a list of them", token_ids)?.unwrap_or_default(),
        };
        if family == Family::Lowkey
            && config.attention().latent().is_some()
            && let Some(ranks) = keys.sizes("kv_cache_ranks")?
        {
            config.check_kv_ranks(&ranks)?;
            config.set_kv_cache_ranks(Some(&ranks));
        }
        config.rope.settle(config.max_position_embeddings);
        config.check()?;
        Ok(config)
    }

    /// `base` with the tokens and positions that the `config.json` at `path` says, and no other key of it.
    pub(crate) fn shape_in(path: &Path, base: &Self) -> Result<Self> {
        let text = read_text(path, LARGEST)?;
        let map: Map<String, Value> =
            serde_json::from_str(&text).map_err(|e| Error::file(path, format!("not a JSON object: {e}")))?;
        let keys = Keys(&map);
        let fail = |e: Error| Error::file(path, e.to_string());
        let spelled = ["rope_parameters", "rope_scaling", "rope_theta"].iter().any(|key| map.contains_key(*key));
        Ok(Self {
            vocab_size: keys.size("vocab_size").map_err(fail)?.unwrap_or(base.vocab_size),
            max_position_embeddings: keys
                .size("max_position_embeddings")
                .map_err(fail)?
                .unwrap_or(base.max_position_embeddings),
            rope: if spelled { rope(&keys).map_err(fail)? } else { base.rope.clone() },
            ..base.clone()
        })
    }

    /// The object to write as `config.json`; `dtype` is that of the weights beside it, such as `float32`.
    ///
    /// Writes both spellings of the rotary parameters and of the dtype, so that old and new transformers read the same model.
    /// What old ones cannot be told (seen in 4.51 and 4.55): they take `max_position_embeddings` over
    /// `original_max_position_embeddings` for YaRN's factor, whatever `factor` says; their DeepSeek-V2 leaves `mscale_all_dim`
    /// out of the softmax's scale; and 4.51 knows neither DeepSeek-V2 nor a DeepSeek-V3 without `q_lora_rank`.
    pub fn to_json(&self, dtype: &str) -> Value {
        let architecture = match self.family {
            Family::DeepseekV2 => "DeepseekV2ForCausalLM",
            Family::DeepseekV3 => "DeepseekV3ForCausalLM",
            Family::Llama => "LlamaForCausalLM",
            Family::Qwen2 => "Qwen2ForCausalLM",
            Family::Qwen3 => "Qwen3ForCausalLM",
            Family::Lowkey => "LowkeyForCausalLM",
        };
        let mut out = json!({
            "architectures": [architecture],
            "model_type": self.family.model_type(),
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.mlp().intermediate_size,
            "num_hidden_layers": self.layers.len(),
            "num_attention_heads": self.num_attention_heads,
            "max_position_embeddings": self.max_position_embeddings,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": match self.eos_token_id.as_slice() {
                [] => Value::Null,
                [one] => json!(one),
                many => json!(many),
            },
            "rope_theta": self.rope.rope_theta,
            "rope_parameters": self.rope,
            "use_cache": true,
            "dtype": dtype,
            "torch_dtype": dtype,
        });
        let extra = match self.attention() {
            AttentionConfig::Mla(mla) => mla.keys(self.num_attention_heads, self.layers.len()),
            AttentionConfig::Grouped(grouped) => grouped.keys(),
        };
        extend(&mut out, extra);
        // No layer has experts, so that no model depends on these. Some readers look at them before they know that: they find
        // the gating of the family, groups that divide anything, and numbers with a point where the type is strict. The
        // number of experts stays out: transformers refuses null there, and llama.cpp takes any number for a mixture.
        let experts = |scoring: &str, method: &str, normalise: bool| {
            json!({
                "moe_layer_freq": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
                "scoring_func": scoring, "topk_method": method, "norm_topk_prob": normalise,
            })
        };
        match self.family {
            Family::DeepseekV2 => extend(&mut out, experts("softmax", "greedy", false)),
            Family::DeepseekV3 => extend(&mut out, experts("sigmoid", "noaux_tc", true)),
            _ => {}
        }
        if self.mlp().bias {
            extend(&mut out, json!({ "mlp_bias": true }));
        }
        // Left out where it is not fixed: transformers refuses null here.
        if let Some(range) = self.initializer_range {
            extend(&mut out, json!({ "initializer_range": range }));
        }
        if self.rope.rope_type != RopeType::Default {
            let mut scaling = json!(self.rope);
            if let Value::Object(map) = &mut scaling {
                let rope_type = map.get("rope_type").cloned().unwrap_or_default();
                map.insert("type".into(), rope_type);
            }
            extend(&mut out, json!({ "rope_scaling": scaling }));
        }
        if let Some(ranks) = &self.kv_elastic_ranks {
            // Whole, it is a plain model of its family: programs that do not know the key compute the same.
            extend(&mut out, json!({ "kv_elastic_ranks": ranks }));
        }
        if self.family == Family::Lowkey {
            let own = match self.attention() {
                AttentionConfig::Mla(mla) => mla.own_keys(),
                AttentionConfig::Grouped(grouped) => grouped.own_keys(),
            };
            extend(&mut out, own);
            if self.attention().latent().is_some() {
                extend(&mut out, json!({ "kv_cache_ranks": self.kv_cache_ranks() }));
            }
        }
        out
    }
}

fn extend(target: &mut Value, more: Value) {
    if let (Value::Object(target), Value::Object(more)) = (target, more) {
        target.extend(more);
    }
}

fn refuse_unsupported(keys: &Keys, family: Family) -> Result<()> {
    // The same function by its two names.
    if let Some(act) = keys.text("hidden_act")?
        && !["silu", "swish"].contains(&act)
    {
        return Err(Error::config("hidden_act", act, "only \"silu\" (SwiGLU) is implemented"));
    }
    // How the weights beside it are stored is no property of the model: it is read again where they are.
    Quantisation::of_config(keys.0)?;
    if keys.flag("mlp_bias")?.unwrap_or(false) && !matches!(family, Family::Llama | Family::DeepseekV2 | Family::Lowkey)
    {
        let why =
            "transformers knows biases in the feed-forward layers of llama and deepseek_v2 only; leave the key out";
        return Err(Error::config("mlp_bias", &true, why));
    }
    if slides(keys, family)? {
        return Err(Error::config("use_sliding_window", &true, "sliding-window attention is not implemented"));
    }
    let dense_by_default = match family {
        Family::DeepseekV2 => 0,
        Family::DeepseekV3 => 3,
        _ => return Ok(()),
    };
    let layers = keys.need("num_hidden_layers")?;
    let dense = keys.size("first_k_dense_replace")?.unwrap_or(dense_by_default);
    if dense < layers {
        return Err(Error::config(
            "first_k_dense_replace",
            &dense,
            format!(
                "layers {dense} to {} are mixture-of-experts layers, which are not implemented; a dense model has \
                 first_k_dense_replace = num_hidden_layers = {layers}",
                layers - 1
            ),
        ));
    }
    Ok(())
}

/// What transformers takes for `max_position_embeddings` where the file does not say.
fn longest_by_default(family: Family) -> Option<usize> {
    match family {
        Family::DeepseekV2 | Family::Llama => Some(2048),
        Family::DeepseekV3 => Some(4096),
        Family::Qwen2 | Family::Qwen3 => Some(32_768),
        Family::Lowkey => None,
    }
}

/// Whether some layer sees less than all that came before: files often carry the keys of a window that is not used.
fn slides(keys: &Keys, family: Family) -> Result<bool> {
    let asked = keys.flag("use_sliding_window")?.unwrap_or(false);
    if !asked || !matches!(family, Family::Qwen2 | Family::Qwen3) {
        return Ok(false);
    }
    // Absent it is transformers' default, null is none.
    let window = match keys.0.get("sliding_window") {
        Some(Value::Null) => return Ok(false),
        _ => keys.size("sliding_window")?.unwrap_or(4096),
    };
    let longest = keys.size("max_position_embeddings")?.or(longest_by_default(family)).unwrap_or(usize::MAX);
    let layers = match keys.0.get("layer_types") {
        Some(Value::Array(types)) => types.iter().any(|kind| kind == "sliding_attention"),
        _ => keys.size("max_window_layers")?.unwrap_or(28) < keys.need("num_hidden_layers")?,
    };
    Ok(layers && window < longest)
}

fn rope(keys: &Keys) -> Result<RopeConfig> {
    let object = |key: &'static str| match keys.0.get(key) {
        None | Some(Value::Null) => Ok(None),
        // In Python an empty one is as good as none.
        Some(Value::Object(map)) => Ok(Some(map.clone()).filter(|map| !map.is_empty())),
        Some(other) => Err(Error::config(key, other, "must be an object or null")),
    };
    let Some(mut map) = object("rope_scaling")?.or(object("rope_parameters")?) else {
        return Ok(RopeConfig {
            rope_theta: keys.number("rope_theta")?.unwrap_or(RopeConfig::default().rope_theta),
            ..RopeConfig::default()
        });
    };
    if let Some(legacy) = map.remove("type") {
        map.entry("rope_type").or_insert(legacy);
    }
    let longrope = map.get("rope_type").is_some_and(|kind| kind == "longrope");
    if let (true, None, Some(original)) =
        (longrope, map.get(ORIGINAL).filter(|value| !value.is_null()), keys.0.get(ORIGINAL))
    {
        // Where Phi-3 has it.
        map.insert(ORIGINAL.into(), original.clone());
    }
    if let (false, Some(theta)) = (map.contains_key("rope_theta"), keys.0.get("rope_theta")) {
        map.insert("rope_theta".into(), theta.clone());
    }
    // DeepSeek and Qwen files carry keys of other rope types; those that no type here uses are dropped.
    map.retain(|key, value| !value.is_null() && KNOWN_ROPE_KEYS.contains(&key.as_str()));
    if let Some(original) = map.get_mut(ORIGINAL)
        && let Some(positions) = whole(original)
    {
        *original = json!(positions);
    }
    let map = Value::Object(map);
    RopeConfig::deserialize(&map).map_err(|e| Error::config("rope_parameters", &map, e.to_string()))
}

const ORIGINAL: &str = "original_max_position_embeddings";

const KNOWN_ROPE_KEYS: [&str; 14] = [
    "rope_theta",
    "rope_type",
    "factor",
    ORIGINAL,
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
    "truncate",
    "low_freq_factor",
    "high_freq_factor",
    "short_factor",
    "long_factor",
];

/// A whole number that is written with a point, as Python does after a division.
fn whole(value: &Value) -> Option<u64> {
    let number = value.as_f64().filter(|x| x.fract() == 0.0 && (0.0..=1e15).contains(x))?;
    Some(number as u64)
}

/// One token id or several; a negative one, by which many files say "none", is none.
fn token_ids(value: &Value) -> Option<Vec<u32>> {
    let each = match value {
        Value::Array(ids) => ids.as_slice(),
        one => std::slice::from_ref(one),
    };
    let given = each.iter().filter(|id| id.as_i64().is_none_or(|id| id >= 0));
    given.map(|id| u32::try_from(id.as_u64()?).ok()).collect()
}

#[cfg(test)]
mod tests;
