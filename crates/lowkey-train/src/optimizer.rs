//! AdamW over the flat list of parameters.

use burn::tensor::Tensor;
use lowkey_kernels::optim::{self, AdamWStep};
use lowkey_model::Parameter;
use rayon::prelude::*;

use crate::run_config::OptimizerSection;

/// AdamW (arXiv 1711.05101) as PyTorch computes it, see [`lowkey_kernels::optim::adamw`]: one pass over each parameter, in
/// place, on the threads of the current rayon pool, with a result that does not depend on how many there are.
#[derive(Clone, Debug)]
pub struct AdamW {
    betas: [f64; 2],
    eps: f64,
    /// One per parameter: matrices decay, norms and biases do not.
    weight_decay: Vec<f64>,
    moments: Vec<Moments>,
    steps: u64,
}

/// First and second moment of one parameter's gradient, `[numel]` each.
#[derive(Clone, Debug)]
pub struct Moments {
    /// Running mean of the gradient.
    pub m: Tensor<1>,
    /// Running mean of its square.
    pub v: Tensor<1>,
}

impl AdamW {
    /// An optimiser with zero moments. Weight decay applies where `decays` says so.
    pub fn new(section: &OptimizerSection, parameters: &[Parameter], decays: impl Fn(&Parameter) -> bool) -> Self {
        Self {
            betas: section.betas,
            eps: section.eps,
            weight_decay: parameters.iter().map(|p| if decays(p) { section.weight_decay } else { 0.0 }).collect(),
            moments: parameters.iter().map(|p| Moments { m: p.value.zeros_like(), v: p.value.zeros_like() }).collect(),
            steps: 0,
        }
    }

    /// Moments in the order of the parameters, and how many steps they have seen.
    pub fn state(&self) -> (&[Moments], u64) {
        (&self.moments, self.steps)
    }

    /// Continues from saved moments.
    pub fn restore(&mut self, moments: Vec<Moments>, steps: u64) {
        self.moments = moments;
        self.steps = steps;
    }

    /// One step with the gradients times `clip`; returns the new values in the order of `parameters`.
    pub fn step(
        &mut self,
        parameters: Vec<Parameter>,
        gradients: Vec<Tensor<1>>,
        clip: f64,
        lr: f64,
    ) -> Vec<Tensor<1>> {
        self.steps += 1;
        let Self { betas, eps, steps, .. } = *self;
        parameters
            .into_par_iter()
            .zip(gradients)
            .zip(self.moments.par_iter_mut().zip(&self.weight_decay))
            .map(|((parameter, gradient), (moments, weight_decay))| {
                let step = AdamWStep { clip, lr, betas, eps, weight_decay: *weight_decay, step: steps };
                // Taken out, so that the pass holds their only handles.
                let nothing = || Tensor::empty([0], &gradient.device());
                let Moments { m, v } = std::mem::replace(moments, Moments { m: nothing(), v: nothing() });
                let (value, m, v) = optim::adamw(parameter.value, gradient, m, v, step);
                *moments = Moments { m, v };
                value
            })
            .collect()
    }
}

/// The global L2 norm of the gradients; uses the threads of the current rayon pool, and does not depend on how many there are.
///
/// # Errors
/// The index of the first gradient whose norm is not finite, with that norm. Norms whose square exceeds f32 count as such: the
/// second moment could not hold them.
pub fn global_norm(gradients: &[Tensor<1>]) -> Result<f64, (usize, f64)> {
    let squares: Vec<f64> = gradients.par_iter().map(|gradient| optim::sum_of_squares(gradient.clone())).collect();
    let mut total = 0.0;
    for (i, squares) in squares.into_iter().enumerate() {
        let single = squares as f32;
        if !single.is_finite() {
            return Err((i, f64::from(single.sqrt())));
        }
        total += squares;
    }
    Ok(total.sqrt())
}

/// The factor that scales gradients of global norm `norm` to at most `limit`, as PyTorch's `clip_grad_norm_` has it.
pub fn clip_factor(norm: f64, limit: f64) -> f64 {
    (limit / (norm + 1e-6)).min(1.0)
}

#[cfg(test)]
mod tests;
