//! Model types that are one of ours under other keys: their `config.json` is translated, and their weights where they are read.
//!
//! | `model_type` | is | what differs |
//! |---|---|---|
//! | `minicpm3` | `deepseek_v3` that rotates halves | factors on the embedding (`scale_emb`), on what each block adds (`scale_depth` / √layers) and before the output head (`dim_model_base` / `hidden_size`), which are multiplied into weights |
//! | `mistral` | `llama` without biases | a window, which is refused where it is shorter than the longest text |
//! | `mistral4` | `deepseek_v3` | queries that grow with their position beyond the original length (`llama_4_scaling_beta`), which is refused where texts reach it |
//! | `mistral3` | a model of images and text around one of text (`text_config`) | the model of text is read, and what is for images left |
//!
//! Facts: transformers 5.23, `models/{minicpm3,mistral,mistral3,mistral4}`.

use std::path::Path;

use lowkey_files::read_text;
use serde_json::{Map, Value, json};

use super::LARGEST;
use crate::attention::MlaConfig;
use crate::checkpoint::CONFIG;
use crate::error::{Error, Result};
use crate::json_keys::Keys;
use crate::tensor::{Role, TensorSpec};

/// The model types that are translated.
pub(super) const NAMES: &str = "minicpm3, mistral, mistral3, mistral4";

/// A configuration in our words, and what is to be done to the weights beside it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Dialect {
    /// The keys of a model type that is read as it is.
    pub(super) keys: Map<String, Value>,
    scales: Scales,
    /// Whether the model of text is a part of another.
    nested: bool,
}

/// Factors that a forward pass has between weights, and which weights take in.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Scales {
    embedding: f64,
    residual: f64,
    head: f64,
    /// Whether embedding and output head are one matrix in the files, and two here, as their factors differ.
    untied: bool,
}

const NONE: Scales = Scales { embedding: 1.0, residual: 1.0, head: 1.0, untied: false };

impl Dialect {
    /// Of a `config.json` object; none of a model type that needs no translation.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key of what only that model type computes.
    pub(super) fn of(map: &Map<String, Value>) -> Result<Option<Self>> {
        let keys = Keys(map);
        let latent = map.get("kv_lora_rank").is_some_and(|rank| !rank.is_null());
        match keys.text("model_type")?.unwrap_or_default() {
            "minicpm3" => minicpm3(&keys).map(Some),
            "mistral4" => mistral4(&keys).map(Some),
            "mistral" if latent => mistral4(&keys).map(Some),
            "mistral" => mistral(&keys).map(Some),
            "mistral3" => mistral3(&keys).map(Some),
            _ => Ok(None),
        }
    }

    /// What the `config.json` of a model directory asks for; nothing where there is no such file.
    ///
    /// # Errors
    /// [`Error::File`] where it cannot be read; as [`Dialect::of`].
    pub(crate) fn of_directory(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG);
        let none = Self { keys: Map::new(), scales: NONE, nested: false };
        if path.symlink_metadata().is_err() {
            return Ok(none);
        }
        let text = read_text(&path, LARGEST)?;
        let map: Map<String, Value> =
            serde_json::from_str(&text).map_err(|e| Error::file(&path, format!("not a JSON object: {e}")))?;
        let found = Self::of(&map).map_err(|e| Error::file(&path, e.to_string()))?;
        Ok(found.unwrap_or(none))
    }

    /// The name that a tensor has here; none of one that is no part of the model of text.
    pub(crate) fn name(&self, name: &str) -> Option<String> {
        if !self.nested {
            return Some(name.to_owned());
        }
        // As transformers 5 saves them, and as it did before.
        for (there, here) in [
            ("model.language_model.", "model."),
            ("language_model.model.", "model."),
            ("language_model.lm_head.", "lm_head."),
        ] {
            if let Some(rest) = name.strip_prefix(there) {
                return Some(format!("{here}{rest}"));
            }
        }
        let of_images = ["vision_tower.", "multi_modal_projector."];
        let bare = name.strip_prefix("model.").unwrap_or(name);
        (!of_images.iter().any(|part| bare.starts_with(part))).then(|| name.to_owned())
    }

    /// Whether one matrix of the files is embedding and output head here.
    pub(crate) fn unties(&self) -> bool {
        self.scales.untied
    }

    /// By what the values of a tensor are multiplied.
    pub(crate) fn scale(&self, spec: &TensorSpec) -> f64 {
        let adds = |name: &str| name.ends_with(".o_proj.bias") || name.ends_with(".down_proj.bias");
        match spec.role {
            Role::Embedding => self.scales.embedding,
            Role::Head => self.scales.head,
            Role::Residual => self.scales.residual,
            Role::Bias if adds(&spec.name) => self.scales.residual,
            _ => 1.0,
        }
    }

    /// Why an adapter of such a model would not be one of the model in the files.
    pub(crate) fn against_adapters(&self) -> Option<&'static str> {
        if self.nested {
            return Some(
                "its text model is a part of a model of images and text, by whose names an adapter of it would go",
            );
        }
        (self.scales != NONE).then_some("its weights are multiplied by factors of its config.json when they are read, which an adapter of it knows nothing of")
    }
}

fn set(map: &mut Map<String, Value>, key: &str, value: impl Into<Value>) {
    map.insert(key.into(), value.into());
}

/// Gives keys that are absent transformers' defaults.
fn fill(map: &mut Map<String, Value>, defaults: &Value) {
    if let Value::Object(defaults) = defaults {
        for (key, value) in defaults {
            map.entry(key.as_str()).or_insert_with(|| value.clone());
        }
    }
}

/// What MiniCPM3 and Mistral share with DeepSeek-V3: all keys of its attention, with a default for each.
fn latent(keys: &Keys, defaults: &Value) -> Map<String, Value> {
    let mut map = keys.0.clone();
    fill(&mut map, defaults);
    set(&mut map, "model_type", "deepseek_v3");
    // Computed from the other sizes, whatever a file says.
    map.remove("head_dim");
    map
}

fn positive(key: &'static str, value: f64) -> Result<f64> {
    if value.is_finite() && value > 0.0 {
        return Ok(value);
    }
    Err(Error::config(key, &value, "must be a finite number > 0"))
}

fn minicpm3(keys: &Keys) -> Result<Dialect> {
    let (d, heads, layers) =
        (keys.need("hidden_size")?, keys.need("num_attention_heads")?, keys.need("num_hidden_layers")?);
    // A key that is there and null has another meaning than one that is not.
    let number = |key: &'static str, absent: f64, null: f64| match keys.0.get(key) {
        None => Ok(absent),
        Some(_) => positive(key, keys.number(key)?.unwrap_or(null)),
    };
    let depth = (layers as f64).sqrt();
    let mut scales = Scales {
        embedding: number("scale_emb", 12.0, 1.0)?,
        residual: number("scale_depth", 1.4, depth)? / depth,
        head: number("dim_model_base", 256.0, d as f64)? / d as f64,
        untied: false,
    };
    let tied = keys.flag("tie_word_embeddings")?.unwrap_or(true);
    scales.untied = tied && scales.embedding != scales.head;
    let mut map = latent(
        keys,
        &json!({
            "kv_lora_rank": 256, "q_lora_rank": 768, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 32_768,
        }),
    );
    if map.get("v_head_dim").is_none_or(Value::is_null) {
        set(&mut map, "v_head_dim", d.checked_div(heads).unwrap_or(0));
    }
    set(&mut map, "tie_word_embeddings", tied && !scales.untied);
    set(&mut map, "first_k_dense_replace", layers);
    set(&mut map, "rope_interleave", false);
    if keys.flag("mlp_bias")?.unwrap_or(false) {
        // No other model type has such biases beside halves that are rotated. What only that type has besides is not meant.
        set(&mut map, "model_type", "lowkey");
        map.retain(|key, _| !MlaConfig::is_own_key(key));
    }
    Ok(Dialect { keys: map, scales, nested: false })
}

fn mistral(keys: &Keys) -> Result<Dialect> {
    let mut map = keys.0.clone();
    fill(
        &mut map,
        &json!({ "num_key_value_heads": 8, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "sliding_window": 4096 }),
    );
    let whole = match map.get("layer_types") {
        Some(Value::Array(kinds)) => kinds.iter().all(|kind| kind == "full_attention"),
        _ => map.get("sliding_window").is_none_or(Value::is_null),
    };
    let keys = Keys(&map);
    let longest = keys.need("max_position_embeddings")?;
    if let (false, Some(window)) = (whole, keys.size("sliding_window")?)
        && window < longest
    {
        let why = format!(
            "sliding-window attention is not implemented; a text no longer than the window is read the same without: write \
             max_position_embeddings = {window} instead of {longest}"
        );
        return Err(Error::config("sliding_window", &window, why));
    }
    set(&mut map, "model_type", "llama");
    // Keys that its class does not read.
    for key in ["attention_bias", "mlp_bias"] {
        map.remove(key);
    }
    Ok(Dialect { keys: map, scales: NONE, nested: false })
}

fn mistral4(keys: &Keys) -> Result<Dialect> {
    let longest = keys.size("max_position_embeddings")?.unwrap_or(1_048_576);
    let mut map = latent(
        keys,
        &json!({
            "kv_lora_rank": 256, "q_lora_rank": 1024, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 128,
            "first_k_dense_replace": 0, "max_position_embeddings": longest, "rms_norm_eps": 1e-6, "rope_interleave": true,
        }),
    );
    let given = |key: &str| map.get(key).filter(|value| value.as_object().is_some_and(|map| !map.is_empty())).cloned();
    let parameters = given("rope_scaling").or(given("rope_parameters")).unwrap_or_else(|| {
        json!({
            "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 128.0, "original_max_position_embeddings": 8192,
            "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
        })
    });
    let found = |key: &str| parameters.get(key).and_then(Value::as_f64);
    let original = found("original_max_position_embeddings").unwrap_or(longest as f64);
    if let Some(beta) = found("llama_4_scaling_beta").filter(|beta| *beta != 0.0)
        && longest as f64 > original
    {
        let why = format!(
            "from position {original} on queries grow with their position, which is not implemented; shorter texts are read the same \
             without: write max_position_embeddings = {original} instead of {longest}"
        );
        return Err(Error::config("rope_parameters.llama_4_scaling_beta", &beta, why));
    }
    let sizes = Keys(&map);
    let (nope, rope) = (sizes.need("qk_nope_head_dim")? as f64, sizes.need("qk_rope_head_dim")? as f64);
    if let Some(share) = found("partial_rotary_factor")
        && (share * (nope + rope) - rope).abs() > 1e-6
    {
        let why = format!(
            "of a head's {} numbers qk_rope_head_dim = {rope} are rotated: write {}",
            nope + rope,
            rope / (nope + rope)
        );
        return Err(Error::config("rope_parameters.partial_rotary_factor", &share, why));
    }
    map.remove("rope_scaling");
    set(&mut map, "rope_parameters", parameters);
    Ok(Dialect { keys: map, scales: NONE, nested: false })
}

fn mistral3(keys: &Keys) -> Result<Dialect> {
    let Some(Value::Object(text)) = keys.0.get("text_config") else {
        return Err(Error::MissingKey {
            key: "text_config",
            why: "model_type = \"mistral3\" has its text model there".into(),
        });
    };
    let mut text = text.clone();
    text.entry("model_type").or_insert_with(|| json!("mistral"));
    if text.get("model_type").is_some_and(|kind| kind == "mistral3") {
        return Err(Error::config(
            "text_config.model_type",
            "mistral3",
            "names a model around another, where one of text must be",
        ));
    }
    let (tied, quantised) = ("tie_word_embeddings", "quantization_config");
    for key in [tied, quantised] {
        if let Some(value) = keys.0.get(key) {
            text.insert(key.into(), value.clone());
        }
    }
    let inner = Dialect::of(&text)?.unwrap_or(Dialect { keys: text, scales: NONE, nested: false });
    Ok(Dialect { nested: true, ..inner })
}

#[cfg(test)]
mod tests;
