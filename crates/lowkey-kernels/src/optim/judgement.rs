//! A step as a device judges it: by what, with what answer, and how to wait for it.

use burn::tensor::Tensor;

/// Numbers of a [`Gate`]: factor on the gradients, whether steps have stopped, loss, norm, fault.
pub(super) const NUMBERS: usize = 5;

/// The number that stands for no fault; at and above 0 it is the gradient's index.
pub(super) const NO_FAULT: f32 = -1.0;

/// The number that stands for the loss.
pub(super) const LOSS: f32 = -2.0;

/// What a step's gradients are judged by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Terms {
    /// What the sum of the losses is multiplied by: one over the number of targets.
    pub mean: f64,
    /// Factor that the gradients were computed with, taken off again: that of the loss scaling.
    pub scale: f64,
    /// Largest global norm; larger gradients are scaled to it, as [`clip_factor`] has it.
    pub limit: Option<f64>,
}

/// The factor that scales gradients of global norm `norm` to at most `limit`, as PyTorch's `clip_grad_norm_` has it.
pub fn clip_factor(norm: f64, limit: f64) -> f64 {
    (limit / (norm + 1e-6)).min(1.0)
}

/// A device's own decision about a step, which [`super::adamw`] and [`super::muon`] heed: the factor on the gradients, and whether
/// anything may be written at all. Once a step was refused, all that follow are, until one is judged anew without what went before.
#[derive(Clone, Debug)]
pub struct Gate {
    pub(super) numbers: Tensor<1>,
    pub(super) gradients: usize,
}

/// What made a step impossible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The loss is no number.
    Loss,
    /// The norm of this gradient, the first of its kind, is no number, or its square no f32.
    Gradient(usize),
    /// The global norm overflows f32, though each gradient's does not.
    Norm,
}

/// A step as it was judged.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Judgement {
    /// Mean loss.
    pub loss: f64,
    /// Global norm of the gradients, before clipping.
    pub norm: f64,
    /// Why nothing was written, if so.
    pub fault: Option<Fault>,
}

/// What gives the numbers of a gate, and those that were asked for with them, once the device has them.
pub(super) type Wait = Box<dyn FnOnce() -> Result<([f32; NUMBERS], Vec<f32>), String> + Send>;

/// A judgement that has been asked for and may not have been made yet.
pub struct Verdict {
    pub(super) gradients: usize,
    pub(super) wait: Option<Wait>,
}

impl std::fmt::Debug for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Verdict").field("gradients", &self.gradients).finish_non_exhaustive()
    }
}

impl Verdict {
    /// Waits for the device: the judgement, and the numbers that were asked for beside it.
    ///
    /// # Errors
    /// The device's reason, where it does not answer.
    pub fn wait(mut self) -> Result<(Judgement, Vec<f32>), String> {
        let wait = self.wait.take().ok_or_else(|| "it was never asked".to_owned())?;
        let ([_, _, loss, norm, fault], beside) = wait()?;
        let fault = match fault {
            NO_FAULT => None,
            LOSS => Some(Fault::Loss),
            i if (i as usize) < self.gradients => Some(Fault::Gradient(i as usize)),
            _ => Some(Fault::Norm),
        };
        Ok((Judgement { loss: f64::from(loss), norm: f64::from(norm), fault }, beside))
    }
}

impl Drop for Verdict {
    /// What has been asked for is waited for: memory that was mapped for an answer nobody takes stays mapped, and the next answer that
    /// is put there fails.
    fn drop(&mut self) {
        if let Some(wait) = self.wait.take() {
            drop(wait());
        }
    }
}
