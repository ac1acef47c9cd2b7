//! The model that a session of a run begins with.

use std::path::Path;

use burn::tensor::Device;
use lowkey_model::{CausalLm, ModelConfig, ModelDir, adapter::AdapterDir};

use crate::checkpoint;
use crate::error::Result;
use crate::run_config::RunConfig;

/// The model of `resume`, a checkpoint of the run; else that of `[init]`, with new adapters where the run has some; else a random one.
/// What the run does not train is frozen, and packed where the run says so: the same way each time, so that a run goes on with the same
/// numbers.
///
/// The configuration comes from the run file or the model of `[init]` each time: a decimal fraction need not survive `config.json` to
/// the last bit.
///
/// # Errors
/// What is wrong with the files, and patterns that fit no tensor.
pub(crate) fn first_model(
    config: &RunConfig,
    model: &ModelConfig,
    init: Option<&ModelDir>,
    resume: Option<&Path>,
    device: &Device,
) -> Result<CausalLm> {
    if let Some(init) = init {
        let adapter = config.init.as_ref().and_then(|init| init.adapter.as_deref());
        if let Some(dir) = adapter
            && checkpoint::has_checksums(dir)
        {
            checkpoint::verify(dir)?;
        }
        if config.adapter_keys()?.is_some()
            && let Some(dir) = resume.or(adapter)
        {
            let mut dir = AdapterDir::open(dir)?;
            // A directory of PEFT does not say how a run holds its base.
            dir.config.quantization = config.adapter.as_ref().and_then(|adapter| adapter.quantization);
            return Ok(CausalLm::load_adapted(init.path(), model, &dir, device)?);
        }
        if let Some(adapter) = &config.adapter {
            return Ok(CausalLm::begin_adapter(init.path(), model, adapter, config.run.seed, device)?);
        }
    }
    config.frozen(match resume.or(init.map(ModelDir::path)) {
        Some(dir) => CausalLm::load_with(dir, model, device)?,
        None => CausalLm::init(model, config.run.seed, device),
    })
}
