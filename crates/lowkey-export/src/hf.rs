//! `--to hf`: a directory that transformers, vLLM and SGLang load as it is.

use std::path::Path;

use lowkey_data::Tokenizer;
use lowkey_model::{CausalLm, ModelConfig, WeightDtype};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::files::write_json;

/// Written where the source has no settings for generation of its own.
const GENERATION: &str = "generation_config.json";

/// Writes weights, configuration, tokenizer and generation settings.
///
/// `model` must be canonical ([`crate::canonical`]).
///
/// # Errors
/// [`Error::Model`] where a value does not fit `dtype`, [`Error::Io`] where a file cannot be written.
pub(crate) fn write(
    dir: &Path,
    model: &CausalLm,
    tokenizer: Option<&Tokenizer>,
    source: &Path,
    dtype: WeightDtype,
    max_shard_bytes: usize,
) -> Result<()> {
    model.save(dir, dtype, max_shard_bytes)?;
    // Copies the files that came with a tokenizer, chat template included, as they were.
    if let Some(tokenizer) = tokenizer {
        tokenizer.save(dir)?;
    }
    write_json(&dir.join(GENERATION), &generation(source, &model.config)?)
}

/// The source's own settings, or the tokens that begin and end a text.
fn generation(source: &Path, config: &ModelConfig) -> Result<Value> {
    let path = source.join(GENERATION);
    if path.is_file() {
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        return serde_json::from_str(&text).map_err(|e| Error::file(&path, format!("not valid JSON: {e}")));
    }
    Ok(json!({
        "bos_token_id": config.bos_token_id,
        // null where there is none: an empty list would stop transformers' own generation.
        "eos_token_id": (!config.eos_token_id.is_empty()).then_some(&config.eos_token_id),
    }))
}
