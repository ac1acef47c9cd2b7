//! Runs that train adapters beside a frozen model.

use lowkey_kernels::quantized_linear::Quantization;
use lowkey_model::{
    ModelConfig,
    adapter::{AdapterConfig, AdapterDir, AdapterPlan},
};

use super::{OptimizerKind, RunConfig, at_least_one};
use crate::error::{Error, Result};

impl RunConfig {
    /// Refuses keys that do not go together with an adapter.
    pub(super) fn check_adapter(&self) -> Result<()> {
        let adapter = match (&self.adapter, self.init.as_ref().map(|init| &init.adapter)) {
            (None, None | Some(None)) => return self.check_none(),
            (Some(_), Some(Some(dir))) => {
                let why = "the adapter that is gone on with brings its own keys; leave [adapter] out";
                return Err(Error::config("init.adapter", dir.display(), why));
            }
            (Some(_), None) => {
                let why = "an adapter stands beside a model that is there; write [init] from = its directory";
                return Err(Error::config("adapter", "{ … }", why));
            }
            (adapter, _) => adapter,
        };
        if self.training.trainable.is_some() {
            let why = "with an adapter it alone is trained; leave the key out, or name what is trained as well in \
                       adapter.modules_to_save";
            return Err(Error::config("training.trainable", "[ … ]", why));
        }
        if self.optimizer.kind == OptimizerKind::Muon {
            let why = "orthogonal updates are for whole matrices, not for the factors of an adapter; write \"adamw\"";
            return Err(Error::config("optimizer.kind", "muon", why));
        }
        match adapter {
            Some(adapter) => {
                at_least_one("adapter.r", adapter.r, 1 << 16)?;
                if !(adapter.lora_alpha.is_finite() && adapter.lora_alpha > 0.0) {
                    let why = "must be a finite number > 0";
                    return Err(Error::config("adapter.lora_alpha", adapter.lora_alpha, why));
                }
                if !(0.0..1.0).contains(&adapter.lora_dropout) {
                    return Err(Error::config("adapter.lora_dropout", adapter.lora_dropout, "must lie in 0 ≤ p < 1"));
                }
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Refuses keys that say something of an adapter where none is trained.
    fn check_none(&self) -> Result<()> {
        const MEND: &str = "write an [adapter], or init.adapter = the directory of one, or leave the key out";
        if let Some(packed) = self.quantization() {
            let why = format!("matrices of few bits are not trained themselves; beside them {MEND}");
            return Err(Error::config("init.quantization", packed.name(), why));
        }
        if let Some(ratio) = self.optimizer.loraplus_lr_ratio {
            let why = format!("is of an adapter's two factors, and nothing here has them: {MEND}");
            return Err(Error::config("optimizer.loraplus_lr_ratio", ratio, why));
        }
        Ok(())
    }

    /// How the run holds the frozen matrices of its model.
    pub(crate) fn quantization(&self) -> Option<Quantization> {
        self.init.as_ref()?.quantization
    }

    /// Moves what `[adapter] quantization` says, where the key stood first, to `[init]`.
    ///
    /// # Errors
    /// [`Error::Config`] where both places say something, and not the same.
    pub(super) fn take_packing(&mut self) -> Result<()> {
        let Some(init) = &mut self.init else { return Ok(()) };
        let Some(packed) = self.adapter.as_mut().and_then(|adapter| adapter.quantization.take()) else { return Ok(()) };
        match init.quantization {
            Some(other) if other != packed => {
                let why =
                    format!("init.quantization = {:?} says otherwise; keep that key and remove this one", other.name());
                Err(Error::config("adapter.quantization", packed.name(), why))
            }
            _ => {
                (init.quantization, init.packed_by_adapter) = (Some(packed), true);
                Ok(())
            }
        }
    }

    /// The keys of the run's adapter: its own, or those of the adapter that it goes on with.
    ///
    /// # Errors
    /// As [`AdapterDir::open`].
    pub(crate) fn adapter_keys(&self) -> Result<Option<AdapterConfig>> {
        let keys = match self.init.as_ref().map(|init| (&init.adapter, init.keys.get())) {
            Some((Some(_), Some(keys))) => Some(keys.clone()),
            Some((Some(dir), None)) => Some(AdapterDir::open(dir)?.config),
            _ => self.adapter.clone(),
        };
        Ok(keys.map(|keys| AdapterConfig { quantization: self.quantization(), ..keys }))
    }

    /// What its adapter means for a model.
    ///
    /// # Errors
    /// As [`AdapterConfig::plan`].
    pub(crate) fn plan_adapter(&self, model: &ModelConfig) -> Result<Option<AdapterPlan>> {
        Ok(self.adapter_keys()?.map(|adapter| adapter.plan(model)).transpose()?)
    }
}
