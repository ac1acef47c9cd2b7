//! The model that a session of a run begins with.

use std::ops::Range;
use std::path::Path;

use burn::tensor::Device;
use lowkey_model::{CausalLm, ModelConfig, ModelDir, adapter::AdapterDir};

use crate::error::Result;
use crate::run_config::RunConfig;

/// The model of `resume`, a checkpoint of the run; else that of `[init]`, with new adapters where the run has some; else a random one.
/// What the run does not train is frozen, and packed where the run says so: the same way each time, so that a run goes on with the same
/// numbers. The tokens `new` begin as the mean of the others.
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
    new: Range<usize>,
    resume: Option<&Path>,
    device: &Device,
) -> Result<CausalLm> {
    if let Some(init) = init {
        // A directory of PEFT does not say how a run holds its base.
        let load = |mut adapter: AdapterDir| {
            adapter.config.quantization = config.quantization();
            CausalLm::load_adapted(init.path(), model, &adapter, device)
        };
        match (config.adapter_keys()?, resume, init.adapter()) {
            (None, ..) => {}
            (Some(_), Some(dir), _) => return Ok(load(AdapterDir::open(dir)?)?),
            (Some(_), None, Some(adapter)) => return Ok(load(adapter.clone())?),
            (Some(adapter), None, None) => {
                let begun = CausalLm::begin_adapter(init.path(), model, &adapter, config.run.seed, device)?;
                return Ok(begun.with_new_rows(new));
            }
        }
    }
    config.frozen(match (resume, init) {
        (Some(dir), _) => CausalLm::load_with(dir, model, device)?,
        (None, Some(init)) => CausalLm::load_growing(init.path(), model, device)?.with_new_rows(new),
        (None, None) => CausalLm::init(model, config.run.seed, device),
    })
}
