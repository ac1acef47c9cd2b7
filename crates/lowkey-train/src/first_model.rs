//! The model that a session of a run begins with.

use std::path::Path;

use burn::tensor::Device;
use lowkey_model::{CausalLm, ModelConfig, adapter::AdapterDir};

use crate::checkpoint;
use crate::error::Result;
use crate::run_config::RunConfig;

/// The model of `resume`, a checkpoint of the run; else that of `[init]`, with new adapters where the run has some; else a random one.
/// What the run does not train is frozen.
///
/// The configuration comes from the run file or the model of `[init]` each time: a decimal fraction need not survive `config.json` to
/// the last bit.
///
/// # Errors
/// What is wrong with the files, and patterns that fit no tensor.
pub(crate) fn first_model(
    config: &RunConfig,
    model: &ModelConfig,
    resume: Option<&Path>,
    device: &Device,
) -> Result<CausalLm> {
    if let Some(init) = &config.init {
        for dir in std::iter::once(&init.from).chain(&init.adapter) {
            if checkpoint::has_checksums(dir) {
                checkpoint::verify(dir)?;
            }
        }
        if let Some(dir) = resume.or(init.adapter.as_deref())
            && config.adapter_keys()?.is_some()
        {
            return Ok(CausalLm::load_adapted(&init.from, model, &AdapterDir::open(dir)?, device)?);
        }
        if let Some(adapter) = &config.adapter {
            return Ok(CausalLm::begin_adapter(&init.from, model, adapter, config.run.seed, device)?);
        }
    }
    config.frozen(match resume.or(config.init.as_ref().map(|init| init.from.as_path())) {
        Some(dir) => CausalLm::load_with(dir, model, device)?,
        None => CausalLm::init(model, config.run.seed, device),
    })
}
