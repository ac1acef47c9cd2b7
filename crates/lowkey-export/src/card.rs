//! The model card: `README.md` of an exported directory.

use std::fmt::Write;
use std::path::Path;

use lowkey_model::{CausalLm, ModelConfig};
use serde_json::Value;

use crate::markdown::words;
use crate::source::Source;
use crate::target::{Layout, Target};

/// Bytes of a number in a bf16 cache.
const BF16: usize = 2;

/// What the model is, how it was trained as far as its folder says, and how to run it.
pub(crate) fn card(source: &Source, model: &CausalLm, target: &Target) -> String {
    let config = &model.config;
    let name = words(&title(source));
    let mut page = format!(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- {}\n- lowkey\n---\n\n# {name}\n\n{}\n",
        if config.attention().latent().is_some() { "mla" } else { "llm" },
        summary(config)
    );
    page.push_str("\n## Sizes\n\n| | |\n|---|---|\n");
    for (what, value) in sizes(config, &target.dtype) {
        let _ = writeln!(page, "| {what} | {} |", words(&value));
    }
    let facts = training(source.dir.given());
    if !facts.is_empty() {
        page.push_str("\n## Training\n\n| | |\n|---|---|\n");
        for (what, value) in facts {
            let _ = writeln!(page, "| {what} | {} |", words(&value));
        }
    }
    page.push_str("\n## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n");
    page.push_str("model = AutoModelForCausalLM.from_pretrained(\".\")\n");
    if source.tokenizer.is_some() {
        page.push_str("tokenizer = AutoTokenizer.from_pretrained(\".\")\n");
        page.push_str("ids = tokenizer(\"Once\", return_tensors=\"pt\")\n");
        page.push_str("print(tokenizer.decode(model.generate(**ids, max_new_tokens=100)[0]))\n");
    }
    page.push_str("```\n\nvLLM: `vllm serve .`; SGLang: `python -m sglang.launch_server --model-path .`; ");
    page.push_str("lowkey: `lowkey generate . --prompt \"Once\"`.\n");
    match target.to {
        Layout::Absorbed => page.push_str(
            "\n`absorbed.safetensors` holds `kv_b_proj` of each layer cut into `w_uk` (H, N, L) and `w_uv` (H, V, L).\n",
        ),
        Layout::Fused => page.push_str(
            "\n`fused.safetensors`, where there is one, holds W_UKᵀ·W_UQ (`q_fused`) and W_O·W_UV (`o_fused`) of the \
             layers that the plan in `CERTIFICATE.md` fuses: `lowkey generate . --decode fused`.\n",
        ),
        Layout::Hf | Layout::Gguf => {}
    }
    page.push_str("\n`CERTIFICATE.md` says what this export was compared with and how far apart the two are.\n");
    page
}

/// The run's name where the model is a run's checkpoint, else the folder's.
fn title(source: &Source) -> String {
    let full = source.dir.given();
    let last = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    let run = full.parent().filter(|dir| dir.ends_with("checkpoints")).and_then(Path::parent);
    run.and_then(last).or_else(|| last(full)).unwrap_or_else(|| "model".into())
}

fn summary(config: &ModelConfig) -> String {
    let millions = config.parameter_count().total as f64 / 1e6;
    match config.attention().latent() {
        Some(mla) => format!(
            "A causal language model of {millions:.1} M parameters with Multi-head Latent Attention (DeepSeek-V2, \
             arXiv 2405.04434): each token leaves {} numbers per layer in the cache.",
            mla.kv_lora_rank + mla.qk_rope_head_dim
        ),
        None => {
            format!("A causal language model of {millions:.1} M parameters with {} attention.", config.attention_name())
        }
    }
}

fn sizes(config: &ModelConfig, dtype: &str) -> Vec<(&'static str, String)> {
    let cache = config.cache_width();
    let per_token = |width: usize| format!("{} bytes in bf16", width * config.layers.len() * BF16);
    let mut rows = vec![
        ("weights", dtype.to_string()),
        ("layers", config.layers.len().to_string()),
        ("hidden_size", config.hidden_size.to_string()),
        ("num_attention_heads", config.num_attention_heads.to_string()),
    ];
    if let Some(mla) = config.attention().latent() {
        rows.extend([
            ("kv_lora_rank", mla.kv_lora_rank.to_string()),
            ("q_lora_rank", mla.q_lora_rank.map_or_else(|| "none".into(), |q| q.to_string())),
            ("qk_nope_head_dim + qk_rope_head_dim", format!("{} + {}", mla.qk_nope_head_dim, mla.qk_rope_head_dim)),
            ("v_head_dim", mla.v_head_dim.to_string()),
        ]);
    }
    rows.extend([
        ("vocab_size", config.vocab_size.to_string()),
        ("max_position_embeddings", config.max_position_embeddings.to_string()),
        ("cache per token", per_token(cache.latent)),
        ("the same with full keys and values", per_token(cache.expanded)),
    ]);
    rows
}

/// What a checkpoint's `trainer.json` and its run's `run.toml` say; nothing where they are not there.
fn training(dir: &Path) -> Vec<(&'static str, String)> {
    let mut rows = Vec::new();
    let state = std::fs::read_to_string(dir.join("trainer.json")).ok();
    if let Some(state) = state.and_then(|text| serde_json::from_str::<Value>(&text).ok()) {
        let number = |key: &str| state.get(key).filter(|value| value.is_number()).map(Value::to_string);
        rows.extend(number("step").map(|n| ("optimiser steps", n)));
        rows.extend(number("tokens").map(|n| ("tokens", n)));
        rows.extend(state.get("time_s").and_then(Value::as_f64).map(|s| ("time", format!("{s:.0} s"))));
        let best = state.get("best").and_then(|best| Some((best.get(0)?.as_u64()?, best.get(1)?.as_f64()?)));
        rows.extend(best.map(|(step, loss)| ("lowest held-out loss", format!("{loss:.4} nats, at step {step}"))));
    }
    rows
}
