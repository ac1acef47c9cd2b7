//! GGUF files.

use std::path::Path;

use burn::tensor::Device;
use lowkey_data::Tokenizer;
use lowkey_export::gguf::{self, TensorType};
use lowkey_model::{CausalLm, ModelConfig};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use crate::driver::{Entry, Input, Target};
use crate::models::{MODEL, config};
use crate::mutate::{self, below, number, once_in, one_of};

const FILE: &str = "model.gguf";

/// The container and the model in it.
pub(crate) struct Gguf;

fn seed(changes: serde_json::Value, tokenizer: Option<&Tokenizer>, kind: TensorType) -> Input {
    let config = ModelConfig::from_json(config(changes).as_object().unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE);
    gguf::write(&path, &CausalLm::init(&config, 1, &Device::flex()), tokenizer, kind).unwrap();
    Input::from([(FILE.into(), Entry::File(std::fs::read(path).unwrap()))])
}

/// Numbers that a reader acts upon stand before the tensors' values: there most damage belongs.
fn header(file: &mut [u8], random: &mut ChaCha8Rng) {
    let end = file.len().min(4096);
    for _ in 0..one_of(random, &[1, 1, 2, 4]) {
        let at = below(random, end);
        match below(random, 4) {
            0 => file[at] ^= 1 << below(random, 8),
            1 => file[at] = one_of(random, &[0, 1, 2, 4, 8, 9, 30, 0x7f, 0x80, 0xff]),
            width => {
                let word = number(random).to_le_bytes();
                let len = if width == 2 { 4 } else { 8 }.min(file.len() - at);
                file[at..at + len].copy_from_slice(&word[..len]);
            }
        }
    }
}

impl Target for Gguf {
    fn name(&self) -> &'static str {
        "gguf"
    }

    fn seeds(&self) -> Vec<Input> {
        let yarn = json!({
            "num_hidden_layers": 2, "first_k_dense_replace": 2, "q_lora_rank": 5, "tie_word_embeddings": true,
            "rope_scaling": { "type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "mscale": 1.0,
                              "mscale_all_dim": 0.7 },
        });
        let wide = json!({ "vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "kv_lora_rank": 32 });
        vec![
            seed(json!({}), None, TensorType::F32),
            seed(yarn, None, TensorType::Bf16),
            seed(wide, Some(&Tokenizer::bytes()), TensorType::Q8_0),
        ]
    }

    fn main_file(&self) -> &'static str {
        FILE
    }

    fn damage(&self, input: &mut Input, random: &mut ChaCha8Rng) {
        let Some(Entry::File(file)) = input.get_mut(FILE) else { return };
        if once_in(random, 4) { mutate::bytes(file, random) } else { header(file, random) }
    }

    fn read(&self, dir: &Path) -> Result<(), String> {
        let path = dir.join(FILE);
        gguf::read(&path).map_err(|e| e.to_string())?;
        gguf::read_model(&path, &Device::flex()).map(drop).map_err(|e| e.to_string())
    }

    fn is_deep(&self, refusal: &str) -> bool {
        ["deepseek2", "tensor", "architecture"].iter().any(|part| refusal.contains(part))
    }

    /// A value of eight bits becomes one of 32, and for a moment there are three of each: as read, as joined, as a tensor. A key
    /// of a few bytes takes a hundred in the table.
    fn limit(&self, bytes: usize) -> usize {
        MODEL + 64 * bytes
    }

    fn inputs(&self) -> u64 {
        20_000
    }
}
