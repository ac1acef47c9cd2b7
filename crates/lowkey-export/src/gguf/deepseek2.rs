//! MLA models in llama.cpp's architecture `deepseek2`: which it can express, and its keys both ways.

use lowkey_model::{
    ModelConfig,
    attention::{AttentionConfig, MlaConfig},
    rope::{RopeConfig, RopeType},
};

use super::architecture::{Keys, size, unsupported};
use super::metadata::{Metadata, Value};
use super::rope::{check_yarn, original_context};
use crate::error::Result;

/// `general.architecture`, and the prefix of the keys.
pub(super) const ARCH: &str = "deepseek2";

/// The inner norms of llama.cpp take `layer_norm_rms_epsilon` too; those of MLA models always have this one.
const EPS: f64 = lowkey_model::attention::LATENT_NORM_EPS;

/// `rope.scaling.yarn_log_multiplier` that leaves the attention logits alone. A 0 would count as absent, and llama.cpp would
/// then scale them by its own default.
const NO_LOGIT_FACTOR: f32 = 1e-10;

/// Whether the architecture computes a configuration exactly.
///
/// # Errors
/// [`crate::Error::Unsupported`] naming the property that it lacks, and the mend.
pub(super) fn expressible(config: &ModelConfig, mla: &MlaConfig) -> Result<()> {
    let refuse = |why: String| Err(unsupported(why));
    if mla.attention_bias {
        return refuse("attention_bias = true: the architecture has no biases; use --to hf".into());
    }
    if config.mlp().bias {
        return refuse("mlp_bias = true: the architecture has no biases; use --to hf".into());
    }
    if config.rms_norm_eps != EPS {
        return refuse(format!(
            "rms_norm_eps = {}: llama.cpp uses one ε for all norms, and those of the latents have {EPS}; train with \
             rms_norm_eps = {EPS}, or use --to hf",
            config.rms_norm_eps
        ));
    }
    // What weights can take in is folded when they are written.
    if let Some(why) = mla.folded().beyond_deepseek() {
        return refuse(why.into());
    }
    let layers = config.layers.len();
    if mla.q_lora_rank.is_some() && is_taken_for_lite(layers, config.vocab_size) {
        return refuse(format!(
            "num_hidden_layers = {layers} with q_lora_rank: llama.cpp takes {layers} layers for DeepSeek-V2-Lite and ignores \
             the rank; use another number of layers, leave q_lora_rank out, or use --to hf"
        ));
    }
    match config.rope.rope_type {
        RopeType::Default => Ok(()),
        RopeType::Yarn => check_yarn(config, mla.qk_rope_head_dim),
        RopeType::Linear | RopeType::Llama3 | RopeType::Longrope => {
            let name = format!("{:?}", config.rope.rope_type).to_lowercase();
            refuse(format!("rope_type = \"{name}\": deepseek2 is written with default or yarn; use --to hf"))
        }
    }
}

/// `is_lite` of llama.cpp's loader: it does not read `attention.q_lora_rank` then.
fn is_taken_for_lite(layers: usize, vocab_size: usize) -> bool {
    layers == 26 || layers == 27 || (layers == 48 && vocab_size == 128_256)
}

/// The keys of a model beside those that all architectures have. `config` has passed [`expressible`].
pub(super) fn metadata(config: &ModelConfig, mla: &MlaConfig, out: &mut Metadata) -> Result<()> {
    let (latent, rotated) = (mla.kv_lora_rank, mla.qk_rope_head_dim);
    for (key, value) in [
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
        ("leading_dense_block_count", config.layers.len()),
        ("expert_feed_forward_length", 0),
        ("expert_shared_count", 0),
    ] {
        out.set(format!("{ARCH}.{key}"), size(key, value)?);
    }
    let rope = &config.rope;
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

/// The configuration that a file's keys describe.
///
/// # Errors
/// The reason as text: experts, the layout without `attn_k_b`, a missing key.
pub(super) fn config(keys: &Keys) -> std::result::Result<ModelConfig, String> {
    let (layers, rotated, latent) =
        (keys.need("block_count")?, keys.need("rope.dimension_count")?, keys.need("attention.kv_lora_rank")?);
    if keys.need("leading_dense_block_count")? != layers {
        return Err("it has layers of experts, which are not implemented".into());
    }
    let (key_length, value_length) = (keys.need("attention.key_length_mla")?, keys.need("attention.value_length_mla")?);
    for (key, rule) in [
        ("attention.head_count_kv", 1),
        ("attention.key_length", latent.saturating_add(rotated)),
        ("attention.value_length", latent),
    ] {
        let found = keys.need(key)?;
        if found != rule {
            return Err(format!("{ARCH}.{key} = {found}, expected {rule}: not a file in the latent (absorbed) layout"));
        }
    }
    let eps = keys.number("attention.layer_norm_rms_epsilon").unwrap_or_default();
    if eps != EPS {
        return Err(format!(
            "{ARCH}.attention.layer_norm_rms_epsilon = {eps}; latent norms are computed with {EPS} only"
        ));
    }
    let without_position = key_length
        .checked_sub(rotated)
        .ok_or_else(|| format!("{ARCH}.attention.key_length_mla = {key_length} is less than the rotated {rotated}"))?;
    let attention = AttentionConfig::Mla(MlaConfig {
        q_lora_rank: Some(keys.need("attention.q_lora_rank")?).filter(|rank| *rank > 0),
        ..MlaConfig::deepseek(latent, [without_position, rotated, value_length])
    });
    keys.model(attention, read_rope(keys.file.metadata())?)
}

fn read_rope(metadata: &Metadata) -> std::result::Result<RopeConfig, String> {
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
