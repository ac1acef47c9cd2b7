//! One optimiser step: gradients, a check that all is finite, clipping, new weights.

use burn::tensor::Device;
use lowkey_model::CausalLm;

use crate::error::{Error, Result};
use crate::loss_scale::LossScale;
use crate::optimizer::{Optimizer, clip_factor, global_norm};
use crate::rows::BatchRef;
use crate::workers::{PassSettings, Workers};

/// What stays the same from step to step.
pub(crate) struct StepSettings<'a> {
    /// Threads that share the rows.
    pub(crate) workers: &'a Workers,
    /// Where the model lies; records gradients.
    pub(crate) device: &'a Device,
    /// How its gradients are computed.
    pub(crate) passes: PassSettings<'a>,
    /// Largest global norm of the gradient.
    pub(crate) grad_clip: Option<f64>,
}

/// What a step has measured on its way.
pub(crate) struct StepTaken {
    /// Mean loss per target before the step.
    pub(crate) loss: f64,
    /// Global norm of the gradient before clipping.
    pub(crate) norm: f64,
    /// Targets of the batch.
    pub(crate) targets: usize,
}

impl StepSettings<'_> {
    /// Takes one step on `batch`; `step` counts those before it.
    ///
    /// With a loss scale, a gradient that overflows makes it smaller, and the step is computed again.
    ///
    /// # Errors
    /// [`Error::NonFinite`], with model and optimiser as they were, where the loss or a gradient is no number.
    pub(crate) fn step<'a>(
        &self,
        model: &mut CausalLm,
        optimizer: &mut Optimizer,
        batch: impl Into<BatchRef<'a>>,
        step: u64,
        lr: f64,
        mut scale: Option<&mut LossScale>,
    ) -> Result<StepTaken> {
        let batch: BatchRef = batch.into();
        let rows = batch.count() as u64;
        let non_finite = |what: String, value: f64| Error::NonFinite {
            step: step + 1,
            what,
            value,
            first_row: step * rows,
            last_row: (step + 1) * rows - 1,
        };
        let (result, factor, norm) = loop {
            let factor = scale.as_ref().map_or(1.0, |scale| scale.factor);
            let passes = PassSettings { loss_scale: factor, ..self.passes };
            let result = self.workers.gradients(model, batch, passes, self.device)?;
            if !result.loss.is_finite() {
                return Err(non_finite("the loss".into(), result.loss));
            }
            match self.workers.together(|| global_norm(&result.gradients)) {
                Ok(norm) => break (result, factor, norm / factor),
                Err((i, value)) => {
                    if scale.as_deref_mut().is_some_and(LossScale::overflowed) {
                        continue;
                    }
                    let name = model.parameters().into_iter().nth(i).map_or_else(|| "?".into(), |p| p.name);
                    return Err(non_finite(format!("the gradient of {name}"), value));
                }
            }
        };
        if let Some(scale) = scale {
            scale.passed();
        }
        let clip = self.grad_clip.map_or(1.0, |limit| clip_factor(norm, limit)) / factor;
        self.workers.together(|| model.update(|parameters| optimizer.step(parameters, result.gradients, clip, lr)));
        Ok(StepTaken { loss: result.loss, norm, targets: result.targets })
    }
}
