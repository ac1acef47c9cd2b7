//! Whether a step may be taken, decided where its gradients lie.

use burn::tensor::Tensor;

use super::judgement::{Gate, Terms, Verdict};

impl Gate {
    /// Judges `gradients`, each `[numel]`, and the `losses` of their passes, `[passes]`, on the device and without waiting for it.
    ///
    /// `before` is the gate of the step before: where it is shut, this one is. `None` on the CPU, where there is nothing to wait for.
    pub fn of(losses: &Tensor<1>, gradients: &[Tensor<1>], terms: Terms, before: Option<&Gate>) -> Option<Self> {
        let before = before.map(|gate| &gate.numbers);
        #[cfg(feature = "gpu")]
        if let Some(numbers) = super::gpu::judge(losses, gradients, terms, before) {
            return Some(Self { numbers, gradients: gradients.len() });
        }
        let _ = (losses, gradients, terms, before);
        None
    }

    /// Asks for the decision and for numbers `[1]` that lie beside it, behind what is queued so far and before what comes later.
    pub fn ask(&self, beside: Vec<Tensor<1>>) -> Verdict {
        #[cfg(feature = "gpu")]
        let wait = super::gpu::ask(&self.numbers, beside);
        #[cfg(not(feature = "gpu"))]
        let wait = {
            drop(beside);
            None
        };
        Verdict { gradients: self.gradients, wait }
    }
}
