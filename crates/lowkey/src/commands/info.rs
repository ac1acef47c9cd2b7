//! `lowkey info`.

use std::path::Path;

use anyhow::bail;
use burn::tensor::Device;
use lowkey_convert::Spectrum;
use lowkey_data::Tokenizer;
use lowkey_model::{
    ModelConfig,
    attention::AttentionConfig,
    checkpoint::{check_weights, weight_files},
};
use lowkey_train::{checkpoint, metrics::Metrics};
use serde_json::json;

use super::text;
use crate::cli::InfoArguments;
use crate::output::{bytes, count, duration, pairs, say, say_json, table};
use crate::progress::Measuring;

/// Bytes of a number in a bf16 cache.
const CACHE_BYTES: usize = 2;

pub(crate) fn info(arguments: &InfoArguments) -> anyhow::Result<()> {
    let path = &arguments.path;
    if path.join("metrics.jsonl").is_file() {
        return run_info(path, arguments.json);
    }
    if !path.join("config.json").is_file() {
        bail!("{}: neither a model directory (config.json) nor a run (metrics.jsonl)", path.display());
    }
    if arguments.spectrum {
        return spectrum(arguments);
    }
    model_info(path, arguments.json)
}

/// Tokens that a latent is looked at with.
const TOKENS: usize = 16384;

fn spectrum(arguments: &InfoArguments) -> anyhow::Result<()> {
    let device = Device::flex();
    let model = super::load_model(&arguments.path, &device)?;
    let calibration = text::Calibration::find(arguments.data.as_deref(), &arguments.path, &model.config, TOKENS)?;
    let bar = Measuring::new();
    let layers = lowkey_convert::health(&model, &calibration.train, arguments.energy, &device, &mut |p| {
        bar.show(p.doing, p.done, p.of);
    });
    drop(bar);
    let layers = layers?;
    if arguments.json {
        return say_json(&json!({
            "model": arguments.path,
            "text": calibration.name,
            "tokens": calibration.tokens(),
            "energy": arguments.energy,
            "layers": layers,
        }));
    }
    let ranks = |spectrum: &Spectrum| format!("{:.1}", spectrum.effective_rank);
    let rows: Vec<Vec<String>> = layers
        .iter()
        .map(|l| {
            let half = carried(&l.readout, l.kv_lora_rank / 2);
            vec![
                l.layer.to_string(),
                l.kv_lora_rank.to_string(),
                ranks(&l.w_dkv),
                ranks(&l.w_uk),
                ranks(&l.w_uv),
                format!("{:.1}", l.effective_rank),
                format!("{:.1}", l.participation_ratio),
                format!("{:.1} %", l.rope_share * 100.0),
                format!("{:.2} %", half * 100.0),
                l.recommended_rank.to_string(),
            ]
        })
        .collect();
    let header =
        ["layer", "L", "W_DKV", "W_UK", "W_UV", "latent", "particip.", "position", "half reads", "recommended"];
    let total: usize = layers.iter().map(|l| l.recommended_rank).sum();
    let data = arguments.data.as_ref().map_or_else(String::new, |path| format!(" --data {}", path.display()));
    let of: usize = layers.iter().map(|l| l.kv_lora_rank).sum();
    say(&format!(
        "{}: effective ranks of the up- and down-projections and of the latents, on {} tokens of {}\n{}\n\n\
         Effective rank: exp of the entropy of the energies. Position: share of the logits' variance that the\n\
         rotated part makes. Half reads: what the best L/2 directions carry of all that is read. Recommended:\n\
         the fewest that carry {} %, {total} of {of} in all: lowkey convert {}{data} --kv-rank-budget {total}",
        arguments.path.display(),
        calibration.tokens(),
        calibration.name,
        table(&header, &rows),
        arguments.energy * 100.0,
        arguments.path.display(),
    ));
    Ok(())
}

fn carried(readout: &[f64], rank: usize) -> f64 {
    readout.iter().take(rank).sum()
}

fn model_info(path: &Path, as_json: bool) -> anyhow::Result<()> {
    let config = ModelConfig::read(&path.join("config.json"))?;
    let files = weight_files(path)?;
    check_weights(path, &config)?;
    let mut size = 0;
    for file in &files {
        size += lowkey_files::open(file)?.metadata()?.len();
    }
    let (parameters, cache) = (config.parameter_count(), config.cache_width());
    let whole = if checkpoint::has_checksums(path) {
        checkpoint::verify(path)?;
        "all checksums match"
    } else {
        "no checksums here"
    };
    let tokenizer = match Tokenizer::from_model_dir(path) {
        Ok(tokenizer) => format!("{}, {} tokens", tokenizer.name(), tokenizer.vocab_size()),
        Err(e) => format!("none ({e})"),
    };
    let latent = config.cache_numbers() * CACHE_BYTES;
    let expanded = cache.expanded * config.layers.len() * CACHE_BYTES;
    if as_json {
        return say_json(&json!({
            "attention": config.attention_name(),
            "parameters": parameters.total,
            "block_parameters": parameters.blocks,
            "attention_parameters": parameters.attention,
            "cache_bytes_per_token_bf16": latent,
            "cache_bytes_per_token_expanded_bf16": expanded,
            "weight_bytes": size,
            "tokenizer": tokenizer,
            "config": config.to_json("float32"),
        }));
    }
    let sizes = match config.attention() {
        AttentionConfig::Mla(m) => {
            format!(
                "MLA: {} heads, kv_lora_rank {}, q_lora_rank {}, nope {} + rope {}, v {}",
                config.num_attention_heads,
                m.kv_lora_rank,
                m.q_lora_rank.map_or("none".into(), |q| q.to_string()),
                m.qk_nope_head_dim,
                m.qk_rope_head_dim,
                m.v_head_dim
            ) + &cut(&config)
        }
        AttentionConfig::Grouped(g) => format!(
            "{}: {} heads over {} key heads of {}, {} rotated",
            config.attention_name(),
            config.num_attention_heads,
            g.num_key_value_heads,
            g.head_dim,
            g.rotary_dim
        ),
    };
    say(&pairs(&[
        ("model", path.display().to_string()),
        ("attention", sizes),
        (
            "shape",
            format!(
                "{} layers, d {}, ffn {}, vocabulary {}{}",
                config.layers.len(),
                config.hidden_size,
                config.mlp().intermediate_size,
                config.vocab_size,
                if config.tie_word_embeddings { " (tied)" } else { "" }
            ),
        ),
        ("positions", config.max_position_embeddings.to_string()),
        ("parameters", format!("{} ({} in blocks)", count(parameters.total as f64), count(parameters.blocks as f64))),
        ("cache", format!("{} per token in bf16; expanded {}", bytes(latent), bytes(expanded))),
        ("weights", format!("{} in {} file(s); {whole}", bytes(size as usize), files.len())),
        ("tokenizer", tokenizer),
    ]));
    Ok(())
}

/// What is cached of latents that were cut.
fn cut(config: &ModelConfig) -> String {
    let Some(ranks) = config.kv_cache_ranks() else { return String::new() };
    let (least, most) = (ranks.iter().min().copied().unwrap_or(0), ranks.iter().max().copied().unwrap_or(0));
    format!("; latents cut to {least}..{most}, {} in all", ranks.iter().sum::<usize>())
}

/// A line for each of a hundred million steps.
const LONGEST_METRICS: u64 = 1 << 36;

fn run_info(path: &Path, as_json: bool) -> anyhow::Result<()> {
    let text = lowkey_files::read_text(&path.join("metrics.jsonl"), LONGEST_METRICS)?;
    let lines: Vec<Metrics> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let Some(last) = lines.last() else { bail!("{}: metrics.jsonl holds no step yet", path.display()) };
    let evaluated = lines.iter().filter(|m| m.val_loss.is_some());
    let best =
        evaluated.clone().min_by(|a, b| a.val_loss.unwrap_or(f64::MAX).total_cmp(&b.val_loss.unwrap_or(f64::MAX)));
    if as_json {
        return say_json(&json!({ "last": last, "best": best }));
    }
    let mut rows = vec![
        ("run", path.display().to_string()),
        ("steps", last.step.to_string()),
        ("tokens", count(last.tokens as f64)),
        ("time", duration(last.time_s)),
        ("train loss", format!("{:.4}", last.train_loss)),
    ];
    if let Some(best) = best {
        let gap = best.gap.map(|gap| format!(", gap {gap:.4}")).unwrap_or_default();
        let figure = format!("{:.4} at step {}{gap}", best.val_loss.unwrap_or(f64::NAN), best.step);
        rows.push(("best val loss", figure));
    }
    say(&pairs(&rows));
    Ok(())
}
