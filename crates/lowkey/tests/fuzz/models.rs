//! Small models for the targets to start from.

use std::path::Path;

use burn::tensor::Device;
use lowkey_model::{CausalLm, ModelConfig, checkpoint::WeightDtype};
use serde_json::{Value, json};

use crate::driver::{Entry, Input};

/// `config.json` of a one-layer model of about two thousand parameters, with some keys changed.
pub(crate) fn config(changes: Value) -> Value {
    let mut config = json!({
        "model_type": "deepseek_v3", "vocab_size": 20, "hidden_size": 8, "intermediate_size": 10,
        "num_hidden_layers": 1, "first_k_dense_replace": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
        "kv_lora_rank": 6, "q_lora_rank": null, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4,
    });
    if let (Value::Object(config), Value::Object(changes)) = (&mut config, changes) {
        config.extend(changes);
    }
    config
}

pub(crate) fn yarn() -> Value {
    json!({
        "q_lora_rank": 5, "attention_bias": true, "num_hidden_layers": 2, "first_k_dense_replace": 2,
        "rope_scaling": { "type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "beta_fast": 32,
                          "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.7 },
    })
}

pub(crate) fn llama() -> Value {
    json!({
        "model_type": "llama", "num_key_value_heads": 1, "head_dim": 4, "tie_word_embeddings": true, "rope_theta": 5e5,
        "rope_parameters": { "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 16 },
    })
}

/// The model directory that lowkey writes for a configuration.
pub(crate) fn saved(config: &Value, dtype: WeightDtype, max_shard_bytes: usize) -> Input {
    let config = ModelConfig::from_json(config.as_object().unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    CausalLm::init(&config, 1, &Device::flex()).save(dir.path(), dtype, max_shard_bytes).unwrap();
    folder(dir.path())
}

/// The files of a folder.
pub(crate) fn folder(dir: &Path) -> Input {
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.unwrap();
        (entry.file_name().into_string().unwrap(), Entry::File(std::fs::read(entry.path()).unwrap()))
    };
    std::fs::read_dir(dir).unwrap().map(read).collect()
}

/// Loads a model as every command does.
pub(crate) fn load(dir: &Path) -> Result<(), String> {
    CausalLm::load(dir, &Device::flex()).map(drop).map_err(|e| e.to_string())
}

/// For a tree of JSON. A number of two bytes with its comma takes 72 in a list, and three times that while the list moves to
/// twice its room.
pub(crate) fn json_limit(bytes: usize) -> usize {
    160 * bytes
}

/// For a model in memory beside what was parsed: the table of frequencies, of 256 KiB for the widest rotation that a configuration may
/// ask for, parameters with their locks and names, and three times the configurations of the 4,096 layers that there may be, of 128
/// bytes each (as they are read, as they are written, and read again).
pub(crate) const MODEL: usize = (512 << 10) + 3 * 4096 * 128;
