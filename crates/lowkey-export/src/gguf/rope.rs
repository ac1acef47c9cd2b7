//! Scaled rotations: which of them llama.cpp turns by the same angles, and its keys for them.
//!
//! | `rope_type` | in the file |
//! |---|---|
//! | `linear` | `rope.scaling.type`, `rope.scaling.factor` |
//! | `yarn` | the same and `rope.scaling.original_context_length`; the factor on cosines and sines in `rope.scaling.attn_factor`, where it is not the usual 0.1·ln(factor) + 1 (`deepseek2` has no such key: it is folded into weights) |
//! | `longrope` | the same tensor, of its divisors; the factor on cosines and sines is folded into nothing, and must be 1 |
//! | `llama3` | the tensor `rope_freqs.weight`, by which llama.cpp divides each pair's frequency; the parameters behind it, which it does not read, under `lowkey.rope.` |

use lowkey_model::{
    ModelConfig,
    rope::{RopeConfig, RopeType},
};

use super::architecture::{Keys, size, unsupported};
use super::metadata::{Metadata, Value};
use crate::error::Result;

/// The tensor of `llama3`.
pub(super) const FREQUENCIES: &str = "rope_freqs.weight";

/// Under YaRN, whether llama.cpp turns each pair of `dim` components by the model's angles.
///
/// # Errors
/// [`crate::Error::Unsupported`] with the first frequency that differs.
pub(super) fn check_yarn(config: &ModelConfig, dim: usize) -> Result<()> {
    let rope = &config.rope;
    let factor = rope.factor.unwrap_or(1.0);
    if factor < 1.0 {
        let why = format!("rope_parameters.factor = {factor}: llama.cpp scales below 1 otherwise; use --to hf");
        return Err(unsupported(why));
    }
    // Everything else shows in the frequencies themselves: betas, truncate, an original context of a few tokens.
    let here = rope.inverse_frequencies(dim, config.max_position_embeddings);
    let there = yarn_frequencies(rope, dim, original_context(config));
    if let Some((here, there)) =
        here.iter().zip(&there).find(|(here, there)| (*here - *there).abs() > 1e-6 * here.abs())
    {
        return Err(unsupported(format!(
            "its YaRN frequencies: llama.cpp would turn a pair by {there} radians per position, the model by {here}. It reads \
             neither beta_fast = {} nor beta_slow = {} nor truncate = {} of a file, and takes 32, 1 and true; use --to hf",
            rope.beta_fast.filter(|x| *x != 0.0).unwrap_or(32.0),
            rope.beta_slow.filter(|x| *x != 0.0).unwrap_or(1.0),
            rope.truncate.unwrap_or(true),
        )));
    }
    Ok(())
}

pub(super) fn original_context(config: &ModelConfig) -> usize {
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

/// What llama.cpp itself multiplies cosines and sines by under YaRN.
fn usual_table_factor(factor: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 }
}

/// The keys of a scaled rotation in the architectures without latents.
pub(super) fn metadata(config: &ModelConfig, name: &str, out: &mut Metadata) -> Result<()> {
    let rope = &config.rope;
    let factor = rope.factor.unwrap_or(1.0);
    let scaling = |key: &str| format!("{name}.rope.scaling.{key}");
    match rope.rope_type {
        RopeType::Default => {}
        RopeType::Linear => {
            out.set(scaling("type"), "linear");
            out.set(scaling("factor"), factor as f32);
        }
        RopeType::Yarn => {
            out.set(scaling("type"), "yarn");
            out.set(scaling("factor"), factor as f32);
            let original = size("original_max_position_embeddings", original_context(config))?;
            out.set(scaling("original_context_length"), original);
            let ratio = rope.table_factor() / usual_table_factor(factor);
            if ratio as f32 != 1.0 {
                out.set(scaling("attn_factor"), ratio as f32);
            }
        }
        RopeType::Llama3 => {
            out.set("lowkey.rope.factor", factor);
            out.set("lowkey.rope.low_freq_factor", rope.low_freq_factor.unwrap_or(1.0));
            out.set("lowkey.rope.high_freq_factor", rope.high_freq_factor.unwrap_or(4.0));
            let original = size("original_max_position_embeddings", original_context(config))?;
            out.set("lowkey.rope.original_context_length", original);
        }
        RopeType::Longrope => {
            if rope.table_factor() != 1.0 {
                let why = format!(
                    "LongRoPE's factor on cosines and sines, {}: llama.cpp's llama has no key for it; use --to hf",
                    rope.table_factor()
                );
                return Err(unsupported(why));
            }
            out.set(LONGROPE, true);
            let original = size("original_max_position_embeddings", original_context(config))?;
            out.set("lowkey.rope.original_context_length", original);
        }
    }
    Ok(())
}

/// Says that the divisors are those of LongRoPE, and not what follows from other parameters.
const LONGROPE: &str = "lowkey.rope.longrope";

/// The values of [`FREQUENCIES`], where there is such a tensor: plain frequencies over those of the model.
pub(super) fn frequency_divisors(config: &ModelConfig, dim: usize) -> Option<Vec<f32>> {
    match config.rope.rope_type {
        RopeType::Llama3 => {}
        RopeType::Longrope => {
            return config.rope.short_factor.as_ref().map(|all| all.iter().map(|x| *x as f32).collect());
        }
        RopeType::Default | RopeType::Linear | RopeType::Yarn => return None,
    }
    let plain = RopeConfig { rope_type: RopeType::Default, ..config.rope.clone() };
    let plain = plain.inverse_frequencies(dim, config.max_position_embeddings);
    let scaled = config.rope.inverse_frequencies(dim, config.max_position_embeddings);
    Some(plain.iter().zip(scaled).map(|(plain, scaled)| (plain / scaled) as f32).collect())
}

/// The rotation that a file's keys describe, in the architectures without latents.
pub(super) fn config(keys: &Keys) -> std::result::Result<RopeConfig, String> {
    let theta = keys.number("rope.freq_base").unwrap_or(RopeConfig::default().rope_theta);
    let plain = RopeConfig { rope_theta: theta, ..RopeConfig::default() };
    let metadata = keys.file.metadata();
    let need = |key: &str| metadata.number(key).ok_or_else(|| format!("{key} is missing or not a number"));
    if keys.file.tensor(FREQUENCIES).is_some() {
        let original = metadata.integer("lowkey.rope.original_context_length");
        if metadata.get(LONGROPE).is_some() {
            let divisors = keys.file.values(FREQUENCIES).unwrap_or_default();
            let divisors: Vec<f64> = divisors.into_iter().map(f64::from).collect();
            return Ok(RopeConfig {
                rope_type: RopeType::Longrope,
                factor: Some(1.0),
                attention_factor: Some(1.0),
                original_max_position_embeddings: original.and_then(|n| usize::try_from(n).ok()),
                short_factor: Some(divisors.clone()),
                long_factor: Some(divisors),
                ..plain
            });
        }
        return Ok(RopeConfig {
            rope_type: RopeType::Llama3,
            factor: Some(need("lowkey.rope.factor")?),
            low_freq_factor: Some(need("lowkey.rope.low_freq_factor")?),
            high_freq_factor: Some(need("lowkey.rope.high_freq_factor")?),
            original_max_position_embeddings: original.and_then(|n| usize::try_from(n).ok()),
            ..plain
        });
    }
    let key = keys.full("rope.scaling.type");
    let factor = || need(&keys.full("rope.scaling.factor"));
    let linear = || Ok(RopeConfig { rope_type: RopeType::Linear, factor: Some(factor()?), ..plain.clone() });
    match metadata.get(&key) {
        // As llama.cpp reads it.
        None if metadata.get(&keys.full("rope.scaling.factor")).is_some() => linear(),
        None => Ok(plain),
        Some(Value::String(kind)) if kind == "none" => Ok(plain),
        Some(Value::String(kind)) if kind == "linear" => linear(),
        Some(Value::String(kind)) if kind == "yarn" => {
            let factor = factor()?;
            let ratio = keys.number("rope.scaling.attn_factor");
            Ok(RopeConfig {
                rope_type: RopeType::Yarn,
                factor: Some(factor),
                original_max_position_embeddings: keys.size("rope.scaling.original_context_length"),
                attention_factor: ratio.map(|ratio| ratio * usual_table_factor(factor)),
                ..plain
            })
        }
        Some(other) => Err(format!("{key} = {other:?}; only none, linear and yarn are read back")),
    }
}
