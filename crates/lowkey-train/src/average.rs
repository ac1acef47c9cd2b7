//! The average of the weights over the steps, beside the weights themselves (Polyak & Juditsky 1992; as an exponential mean, Tarvainen &
//! Valpola, arXiv 1703.01780, section 2).

use burn::tensor::Tensor;
use lowkey_model::CausalLm;
use rayon::prelude::*;

/// A moving average of what a model trains, in f32.
#[derive(Debug)]
pub(crate) struct Average {
    decay: f64,
    /// In the order of [`CausalLm::trained_parameters`].
    values: Vec<Tensor<1>>,
}

impl Average {
    /// Begins with the values that a model has.
    pub(crate) fn new(decay: f64, model: &CausalLm) -> Self {
        // Values of its own: a step writes over the model's.
        Self { decay, values: model.trained_parameters().into_iter().map(|p| p.value * 1.0).collect() }
    }

    /// Takes in the weights after step number `step`, counted from 1, on the threads of the current rayon pool.
    pub(crate) fn update(&mut self, model: &CausalLm, step: u64) {
        let share = 1.0 - decay_of(self.decay, step);
        let values = std::mem::take(&mut self.values).into_par_iter().zip(model.trained_parameters());
        // What equals its average leaves it as it is, to the last bit.
        self.values = values.map(|(mean, p)| mean.clone() + (p.value - mean) * share).collect();
    }

    /// `model` with the average in place of its own weights.
    pub(crate) fn of(&self, model: &CausalLm) -> CausalLm {
        let mut averages = self.values.iter();
        let value = |p: lowkey_model::Parameter| match p.trainable {
            true => averages.next().cloned().unwrap_or(p.value),
            false => p.value,
        };
        let values = model.parameters().into_iter().map(value).collect();
        model.clone().with_values(values)
    }
}

/// What stays of the average at a step: less at first, so that it soon forgets the weights that the run began with.
fn decay_of(decay: f64, step: u64) -> f64 {
    let step = step as f64;
    decay.min((1.0 + step) / (10.0 + step))
}

#[cfg(test)]
mod tests;
