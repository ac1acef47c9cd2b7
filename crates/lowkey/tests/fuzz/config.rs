//! `config.json`, beside the weights of a small model.

use std::path::Path;

use lowkey_model::{ModelConfig, checkpoint::WeightDtype, cost::Training};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use crate::driver::{Entry, Input, Target};
use crate::models::{MODEL, config, json_limit, llama, load, saved, yarn};
use crate::mutate::{self, number, once_in, one_of, weird};

const CONFIG: &str = "config.json";

/// The keys that are read, whether a seed has them or not.
const KEYS: [&str; 48] = [
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "head_dim",
    "first_k_dense_replace",
    "attention_bias",
    "latent_scale",
    "latent_norm",
    "query_bias",
    "rope_pairs",
    "rope_pairs_width",
    "rope_interleave",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "qkv_bias",
    "qk_norm",
    "mlp_bias",
    "use_sliding_window",
    "hidden_act",
    "quantization_config",
    "rope_type",
    "type",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
    "low_freq_factor",
    "high_freq_factor",
];

pub(crate) struct Config;

impl Target for Config {
    fn name(&self) -> &'static str {
        "config"
    }

    fn seeds(&self) -> Vec<Input> {
        let lowkey = json!({
            "model_type": "lowkey", "kv_lora_rank": null, "head_dim": 4, "partial_rotary_factor": 0.5, "qkv_bias": true,
            "qk_norm": true, "eos_token_id": [1, 2], "bos_token_id": 0,
        });
        let scaled = json!({ "model_type": "lowkey", "latent_scale": true, "rope_interleave": false });
        let converted = json!({
            "model_type": "lowkey", "latent_norm": false, "query_bias": true, "rope_pairs": [1], "rope_pairs_width": 4,
        });
        [json!({}), yarn(), json!({ "model_type": "deepseek_v2" }), llama(), lowkey, scaled, converted]
            .into_iter()
            .flat_map(|changes| {
                let config = config(changes);
                let written = saved(&config, WeightDtype::F32, usize::MAX);
                // As lowkey writes it, and in the older spelling that it came in.
                let mut older = written.clone();
                older.insert(CONFIG.into(), Entry::File(config.to_string().into_bytes()));
                [written, older]
            })
            .collect()
    }

    fn main_file(&self) -> &'static str {
        CONFIG
    }

    fn damage(&self, input: &mut Input, random: &mut ChaCha8Rng) {
        let known = [
            "deepseek_v2",
            "deepseek_v3",
            "llama",
            "qwen2",
            "qwen3",
            "lowkey",
            "yarn",
            "linear",
            "llama3",
            "default",
            "silu",
        ]
        .map(Value::from);
        let Some(Entry::File(file)) = input.get_mut(CONFIG) else { return };
        match serde_json::from_slice(file) {
            Ok(Value::Object(mut config)) if once_in(random, 2) => {
                for _ in 0..one_of(random, &[1, 2, 4, 8]) {
                    let value = match mutate::below(random, 4) {
                        0 => weird(random),
                        1 => one_of(random, &known).clone(),
                        2 => number(random).into(),
                        _ => json!(one_of(random, &[0, 1, 2, 3, 4, 6, 8, 200, 4096, 65_536])),
                    };
                    let key = (one_of(random, &KEYS)).to_string();
                    let rope = ["rope_scaling", "rope_parameters"].into_iter().find(|key| config.contains_key(*key));
                    match rope.and_then(|rope| config[rope].as_object_mut()) {
                        Some(rope) if once_in(random, 3) => drop(rope.insert(key, value)),
                        _ => drop(config.insert(key, value)),
                    }
                }
                *file = mutate::text(&Value::Object(config), random);
            }
            _ => mutate::json(file, &known, random),
        }
    }

    /// A configuration that is read must also survive what is done with it before any weight is: its costs, and being
    /// written and read again.
    fn read(&self, dir: &Path) -> Result<(), String> {
        let config = ModelConfig::read(&dir.join(CONFIG)).map_err(|e| e.to_string())?;
        let count = config.parameter_count();
        assert!(count.blocks <= count.total && count.attention <= count.blocks, "{count:?}");
        assert!(config.forward_flops_per_token(config.max_position_embeddings) > 0.0);
        assert!(config.softmax_scale().is_finite());
        assert!(
            config.train_bytes(Training {
                micro_batch: 8,
                seq: 1 << 20,
                threads: 8,
                evaluated: 8,
                terms: 1,
                ..Training::default()
            }) > count.total
        );
        assert!(config.cache_width().latent <= config.cache_width().expanded.max(1 << 22));
        match ModelConfig::from_json(config.to_json("float32").as_object().unwrap()) {
            Ok(again) => assert_eq!(again, config),
            Err(e) => panic!("written, it is refused: {e}"),
        }
        load(dir)
    }

    fn is_deep(&self, refusal: &str) -> bool {
        !refusal.contains("not valid JSON")
    }

    fn limit(&self, bytes: usize) -> usize {
        MODEL + json_limit(bytes)
    }

    fn inputs(&self) -> u64 {
        25_000
    }
}
