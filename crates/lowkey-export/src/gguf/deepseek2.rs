//! Configurations in llama.cpp's architecture `deepseek2`: which it can express, and its keys both ways.

use lowkey_model::{AttentionConfig, Family, MlaConfig, ModelConfig, RopeConfig, RopeType};

use super::metadata::{Metadata, Value};
use crate::error::{Error, Result};

/// `general.architecture`, and the prefix of the keys.
const ARCH: &str = "deepseek2";

/// The inner norms of llama.cpp take `layer_norm_rms_epsilon` too; those of MLA models always have this one.
const EPS: f64 = lowkey_model::LATENT_NORM_EPS;

/// llama.cpp keeps sizes per layer in arrays of this length.
const MAX_LAYERS: usize = 512;

/// `rope.scaling.yarn_log_multiplier` that leaves the attention logits alone. A 0 would count as absent, and llama.cpp would
/// then scale them by its own default.
const NO_LOGIT_FACTOR: f32 = 1e-10;

/// The sizes of MLA, where a configuration is one that the architecture computes exactly.
///
/// # Errors
/// [`Error::Unsupported`] naming the property that it lacks, and the mend.
pub(super) fn expressible(config: &ModelConfig) -> Result<&MlaConfig> {
    let refuse = |why: String| Err(Error::Unsupported { format: "GGUF", why });
    let AttentionConfig::Mla(mla) = &config.attention else {
        return refuse(format!(
            "its attention is {}, and only MLA models are written; use --to hf, which llama.cpp's own converter reads",
            config.attention_name()
        ));
    };
    if mla.attention_bias {
        return refuse("attention_bias = true: the architecture has no biases; use --to hf".into());
    }
    if config.mlp_bias {
        return refuse("mlp_bias = true: the architecture has no biases; use --to hf".into());
    }
    if config.rms_norm_eps != EPS {
        return refuse(format!(
            "rms_norm_eps = {}: llama.cpp uses one ε for all norms, and those of the latents have {EPS}; train with \
             rms_norm_eps = {EPS}, or use --to hf",
            config.rms_norm_eps
        ));
    }
    if mla.qk_rope_head_dim == 0 {
        return refuse("qk_rope_head_dim = 0: the architecture needs a rotated key; use --to hf".into());
    }
    let layers = config.num_hidden_layers;
    if layers > MAX_LAYERS {
        return refuse(format!("num_hidden_layers = {layers}: llama.cpp allows {MAX_LAYERS}; use --to hf"));
    }
    if mla.q_lora_rank.is_some() && is_taken_for_lite(layers, config.vocab_size) {
        return refuse(format!(
            "num_hidden_layers = {layers} with q_lora_rank: llama.cpp takes {layers} layers for DeepSeek-V2-Lite and ignores \
             the rank; use another number of layers, leave q_lora_rank out, or use --to hf"
        ));
    }
    check_rope(config, mla)?;
    Ok(mla)
}

/// `is_lite` of llama.cpp's loader: it does not read `attention.q_lora_rank` then.
fn is_taken_for_lite(layers: usize, vocab_size: usize) -> bool {
    layers == 26 || layers == 27 || (layers == 48 && vocab_size == 128_256)
}

fn check_rope(config: &ModelConfig, mla: &MlaConfig) -> Result<()> {
    let rope = &config.rope;
    let refuse = |why: String| Err(Error::Unsupported { format: "GGUF", why });
    match rope.rope_type {
        RopeType::Default => return Ok(()),
        RopeType::Yarn => {}
        RopeType::Linear | RopeType::Llama3 => {
            let name = format!("{:?}", rope.rope_type).to_lowercase();
            return refuse(format!("rope_type = \"{name}\": deepseek2 is written with default or yarn; use --to hf"));
        }
    }
    let factor = rope.factor.unwrap_or(1.0);
    if factor < 1.0 {
        return refuse(format!("rope_parameters.factor = {factor}: llama.cpp scales below 1 otherwise; use --to hf"));
    }
    // Everything else shows in the frequencies themselves: betas, truncate, an original context of a few tokens.
    let here = rope.inverse_frequencies(mla.qk_rope_head_dim, config.max_position_embeddings);
    let there = yarn_frequencies(rope, mla.qk_rope_head_dim, original_context(config));
    if let Some((here, there)) =
        here.iter().zip(&there).find(|(here, there)| (*here - *there).abs() > 1e-6 * here.abs())
    {
        return refuse(format!(
            "its YaRN frequencies: llama.cpp would turn a pair by {there} radians per position, the model by {here}. It reads \
             neither beta_fast = {} nor beta_slow = {} nor truncate = {} for deepseek2, and takes 32, 1 and true; use --to hf",
            rope.beta_fast.filter(|x| *x != 0.0).unwrap_or(32.0),
            rope.beta_slow.filter(|x| *x != 0.0).unwrap_or(1.0),
            rope.truncate.unwrap_or(true),
        ));
    }
    Ok(())
}

fn original_context(config: &ModelConfig) -> usize {
    config.rope.original_max_position_embeddings.unwrap_or(config.max_position_embeddings)
}

/// Radians per position as `ggml_rope_yarn` computes them with its default betas, 32 and 1.
fn yarn_frequencies(rope: &RopeConfig, dim: usize, original: usize) -> Vec<f64> {
    let width = dim as f64;
    let bound =
        |turns: f64| width * (original as f64 / (turns * std::f64::consts::TAU)).ln() / (2.0 * rope.rope_theta.ln());
    let low = bound(32.0).floor().max(0.0);
    let high = bound(1.0).ceil().min(width - 1.0);
    (0..dim / 2)
        .map(|pair| {
            let plain = rope.rope_theta.powf(-2.0 * pair as f64 / width);
            let interpolated = ((pair as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
            plain / rope.factor.unwrap_or(1.0) * interpolated + plain * (1.0 - interpolated)
        })
        .collect()
}

/// The keys of a model. `config` has passed [`expressible`].
pub(super) fn metadata(config: &ModelConfig, mla: &MlaConfig, out: &mut Metadata) -> Result<()> {
    let size = |key: &str, value: usize| {
        u32::try_from(value).map_err(|_| Error::Unsupported {
            format: "GGUF",
            why: format!("{key} = {value} does not fit into 32 bits"),
        })
    };
    let rope = &config.rope;
    let (latent, rotated) = (mla.kv_lora_rank, mla.qk_rope_head_dim);
    out.set("general.architecture", ARCH);
    for (key, value) in [
        ("block_count", config.num_hidden_layers),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("vocab_size", config.vocab_size),
        ("attention.head_count", config.num_attention_heads),
        // In latent space all heads share one key and one value: the cached latent, with the rotated key behind it.
        ("attention.head_count_kv", 1),
        ("attention.key_length", latent + rotated),
        ("attention.value_length", latent),
        ("attention.key_length_mla", mla.qk_nope_head_dim + rotated),
        ("attention.value_length_mla", mla.v_head_dim),
        ("attention.kv_lora_rank", latent),
        // The key is required; 0 says that there is no query latent.
        ("attention.q_lora_rank", mla.q_lora_rank.unwrap_or(0)),
        ("rope.dimension_count", rotated),
        // All layers are dense; the two sizes of experts are required all the same.
        ("leading_dense_block_count", config.num_hidden_layers),
        ("expert_feed_forward_length", 0),
        ("expert_shared_count", 0),
    ] {
        out.set(format!("{ARCH}.{key}"), size(key, value)?);
    }
    out.set(format!("{ARCH}.attention.layer_norm_rms_epsilon"), EPS as f32);
    out.set(format!("{ARCH}.rope.freq_base"), rope.rope_theta as f32);
    if rope.rope_type == RopeType::Yarn {
        let log_multiplier = rope.mscale_all_dim.filter(|x| *x != 0.0).map_or(NO_LOGIT_FACTOR, |m| (0.1 * m) as f32);
        out.set(format!("{ARCH}.rope.scaling.type"), "yarn");
        out.set(format!("{ARCH}.rope.scaling.factor"), rope.factor.unwrap_or(1.0) as f32);
        let original = size("rope.scaling.original_context_length", original_context(config))?;
        out.set(format!("{ARCH}.rope.scaling.original_context_length"), original);
        out.set(format!("{ARCH}.rope.scaling.yarn_log_multiplier"), log_multiplier);
    }
    Ok(())
}

/// The configuration that a file's keys describe, as llama.cpp computes it; `tied` where it has no output head.
///
/// # Errors
/// The reason as text: another architecture, experts, the layout without `attn_k_b`, a missing key, sizes that no model has.
pub(super) fn config(metadata: &Metadata, tied: bool) -> std::result::Result<ModelConfig, String> {
    match metadata.text("general.architecture") {
        Some(ARCH) => {}
        other => return Err(format!("general.architecture is {other:?}; only {ARCH} is read back")),
    }
    let optional = |key: &str| metadata.integer(&format!("{ARCH}.{key}")).and_then(|n| usize::try_from(n).ok());
    let need = |key: &str| optional(key).ok_or_else(|| format!("{ARCH}.{key} is missing or not a size"));
    let number = |key: &str| metadata.number(&format!("{ARCH}.{key}"));
    let (layers, rotated, latent) =
        (need("block_count")?, need("rope.dimension_count")?, need("attention.kv_lora_rank")?);
    if need("leading_dense_block_count")? != layers {
        return Err("it has layers of experts, which are not implemented".into());
    }
    let (key_length, value_length) = (need("attention.key_length_mla")?, need("attention.value_length_mla")?);
    for (key, rule) in [
        ("attention.head_count_kv", 1),
        ("attention.key_length", latent.saturating_add(rotated)),
        ("attention.value_length", latent),
    ] {
        let found = need(key)?;
        if found != rule {
            return Err(format!("{ARCH}.{key} = {found}, expected {rule}: not a file in the latent (absorbed) layout"));
        }
    }
    let eps = number("attention.layer_norm_rms_epsilon").unwrap_or_default();
    if eps != EPS {
        return Err(format!(
            "{ARCH}.attention.layer_norm_rms_epsilon = {eps}; latent norms are computed with {EPS} only"
        ));
    }
    let token = |key: &str| metadata.integer(&format!("tokenizer.ggml.{key}")).and_then(|id| u32::try_from(id).ok());
    let mut config = ModelConfig {
        vocab_size: need("vocab_size")?,
        hidden_size: need("embedding_length")?,
        num_hidden_layers: layers,
        num_attention_heads: need("attention.head_count")?,
        intermediate_size: need("feed_forward_length")?,
        max_position_embeddings: need("context_length")?,
        attention: AttentionConfig::Mla(MlaConfig {
            q_lora_rank: Some(need("attention.q_lora_rank")?).filter(|rank| *rank > 0),
            kv_lora_rank: latent,
            qk_nope_head_dim: key_length.checked_sub(rotated).ok_or_else(|| {
                format!("{ARCH}.attention.key_length_mla = {key_length} is less than the rotated {rotated}")
            })?,
            qk_rope_head_dim: rotated,
            v_head_dim: value_length,
            attention_bias: false,
            latent_scale: false,
            rope_interleave: true,
            kv_cache_ranks: None,
            kv_elastic_ranks: None,
        }),
        rope: rope(metadata)?,
        rms_norm_eps: EPS,
        tie_word_embeddings: tied,
        mlp_bias: false,
        initializer_range: None,
        family: Family::DeepseekV3,
        bos_token_id: token("bos_token_id"),
        eos_token_id: ["eos_token_id", "eot_token_id", "eom_token_id"].into_iter().filter_map(token).collect(),
    };
    config.family = config.natural_family();
    config.check().map_err(|e| e.to_string())?;
    // Before anything is multiplied by it: a check of the configuration alone allows sizes that no file holds.
    expressible(&config).map_err(|e| e.to_string())?;
    Ok(config)
}

fn rope(metadata: &Metadata) -> std::result::Result<RopeConfig, String> {
    let number = |key: &str| metadata.number(&format!("{ARCH}.rope.{key}"));
    let theta = number("freq_base").unwrap_or(RopeConfig::default().rope_theta);
    let plain = RopeConfig { rope_theta: theta, ..RopeConfig::default() };
    let key = format!("{ARCH}.rope.scaling.type");
    match metadata.get(&key) {
        None => return Ok(plain),
        Some(Value::String(name)) if name == "none" => return Ok(plain),
        Some(Value::String(name)) if name == "yarn" => {}
        Some(other) => return Err(format!("{key} = {other:?}; only none and yarn are read back")),
    }
    let factor = number("scaling.factor").ok_or_else(|| format!("{ARCH}.rope.scaling.factor is missing"))?;
    let original =
        metadata.integer(&format!("{ARCH}.rope.scaling.original_context_length")).and_then(|n| usize::try_from(n).ok());
    // Without the multiplier llama.cpp multiplies cosines, sines and queries by 0.1·ln(factor) + 1, and the logits by its square.
    let (mscale_all_dim, attention_factor) = match number("scaling.yarn_log_multiplier").filter(|m| *m != 0.0) {
        None => (Some(1.0), None),
        Some(multiplier) if multiplier <= f64::from(NO_LOGIT_FACTOR) => (None, Some(1.0)),
        // Rounded where a 32-bit number ends, so that 0.1 · 0.707 gives 0.707 again.
        Some(multiplier) => (Some((multiplier * 1e8).round() / 1e7), Some(1.0)),
    };
    Ok(RopeConfig {
        rope_type: RopeType::Yarn,
        factor: Some(factor),
        original_max_position_embeddings: original,
        mscale_all_dim,
        attention_factor,
        ..plain
    })
}
