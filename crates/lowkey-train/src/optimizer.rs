//! AdamW over the flat list of parameters.

use burn::tensor::Tensor;
use lowkey_model::Parameter;

use crate::error::{Error, Result};
use crate::run_config::OptimizerSection;

/// AdamW (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2), with PyTorch's order of operations:
/// `p ← p(1 − lr·wd)`, then `p ← p − lr/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε)`.
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

    /// One step; returns the new values in the order of `parameters`.
    pub fn step(&mut self, parameters: Vec<Parameter>, gradients: Vec<Tensor<1>>, lr: f64) -> Vec<Tensor<1>> {
        self.steps += 1;
        let [beta1, beta2] = self.betas;
        let correction1 = 1.0 - beta1.powf(self.steps as f64);
        let correction2 = (1.0 - beta2.powf(self.steps as f64)).sqrt();
        parameters
            .into_iter()
            .zip(gradients)
            .zip(self.moments.iter_mut().zip(&self.weight_decay))
            .map(|((parameter, gradient), (moments, decay))| {
                let m = moments.m.clone() * beta1 + gradient.clone() * (1.0 - beta1);
                let v = moments.v.clone() * beta2 + gradient.square() * (1.0 - beta2);
                let update = m.clone() / (v.clone().sqrt() / correction2 + self.eps);
                *moments = Moments { m, v };
                let value = if *decay > 0.0 { parameter.value * (1.0 - lr * decay) } else { parameter.value };
                value - update * (lr / correction1)
            })
            .collect()
    }
}

/// The global L2 norm of the gradients.
///
/// # Errors
/// The index of the first gradient whose norm is not finite, with that norm.
pub fn global_norm(gradients: &[Tensor<1>]) -> Result<std::result::Result<f64, (usize, f64)>> {
    /// Numbers that are added in one go. Above some millions the CPU's threads share a sum in an order that changes from
    /// call to call, and f32 loses digits.
    const PART: usize = 1 << 20;
    let mut total = 0.0;
    for (i, gradient) in gradients.iter().enumerate() {
        let len = gradient.dims()[0];
        for from in (0..len).step_by(PART) {
            let part = gradient.clone().narrow(0, from, PART.min(len - from));
            let squares = part
                .square()
                .sum()
                .try_into_scalar::<f32>()
                .map_err(|e| Error::Device { what: "a gradient's norm", why: format!("{e:?}") })?;
            let squares = f64::from(squares);
            if !squares.is_finite() {
                return Ok(Err((i, squares.sqrt())));
            }
            total += squares;
        }
    }
    Ok(Ok(total.sqrt()))
}

/// Scales the gradients to a global norm of at most `limit`, as PyTorch's `clip_grad_norm_` does.
pub fn clip(gradients: Vec<Tensor<1>>, norm: f64, limit: f64) -> Vec<Tensor<1>> {
    let factor = limit / (norm + 1e-6);
    if factor >= 1.0 {
        return gradients;
    }
    gradients.into_iter().map(|gradient| gradient * factor).collect()
}

#[cfg(test)]
mod tests;
