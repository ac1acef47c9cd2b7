//! `--to hf`: a directory that transformers, vLLM and SGLang load as it is.

use std::path::Path;

use lowkey_data::{Generation, Tokenizer};
use lowkey_model::{CausalLm, checkpoint::WeightDtype};

use crate::error::Result;

/// Writes weights, configuration, tokenizer and generation settings.
///
/// Matrices are packed where `packs`, and all else has the format `dtype`. `model` must be canonical ([`crate::source::canonical`]).
///
/// # Errors
/// [`Error::Model`] where a value does not fit `dtype`, [`Error::Io`] where a file cannot be written.
pub(crate) fn write(
    dir: &Path,
    model: &CausalLm,
    tokenizer: Option<&Tokenizer>,
    generation: &Generation,
    (dtype, packs): (WeightDtype, bool),
    max_shard_bytes: usize,
) -> Result<()> {
    match packs {
        true => model.save_nf4(dir, dtype, max_shard_bytes)?,
        false => model.save(dir, dtype, max_shard_bytes)?,
    }
    // Copies the files that came with a tokenizer, chat template included, as they were.
    if let Some(tokenizer) = tokenizer {
        tokenizer.save(dir)?;
    }
    Ok(lowkey_files::write_json(&dir.join("generation_config.json"), &generation.to_json())?)
}
