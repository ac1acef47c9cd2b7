//! `--to hf`: a directory that transformers, vLLM and SGLang load as it is.

use std::path::Path;

use lowkey_data::{Generation, Tokenizer};
use lowkey_model::{CausalLm, checkpoint::WeightDtype};

use crate::error::Result;

/// Writes weights, configuration, tokenizer and generation settings.
///
/// `model` must be canonical ([`crate::source::canonical`]).
///
/// # Errors
/// [`Error::Model`] where a value does not fit `dtype`, [`Error::Io`] where a file cannot be written.
pub(crate) fn write(
    dir: &Path,
    model: &CausalLm,
    tokenizer: Option<&Tokenizer>,
    generation: &Generation,
    dtype: WeightDtype,
    max_shard_bytes: usize,
) -> Result<()> {
    model.save(dir, dtype, max_shard_bytes)?;
    // Copies the files that came with a tokenizer, chat template included, as they were.
    if let Some(tokenizer) = tokenizer {
        tokenizer.save(dir)?;
    }
    Ok(lowkey_files::write_json(&dir.join("generation_config.json"), &generation.to_json())?)
}
