//! Random initial weights.

use burn::tensor::{Device, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use sha2::{Digest, Sha256};

use crate::config::ModelConfig;
use crate::model::CausalLm;
use crate::tensor::{Start, TensorSpec};

const EMBEDDING_STD: f64 = 0.02;

impl CausalLm {
    /// A model with random weights:
    ///
    /// | tensor | distribution (default) | with `initializer_range = σ` |
    /// |---|---|---|
    /// | `embed_tokens`, `lm_head` | N(0, 0.02²) | N(0, σ²) |
    /// | matrices `[d_out, d_in]` that read the residual stream or a latent | N(0, 1/d_in) | N(0, σ²) |
    /// | `o_proj`, `down_proj` (they write to the residual stream) | N(0, 1/(2·layers·d_in)) | N(0, σ²/(2·layers)) |
    /// | norms | 1 | 1 |
    /// | biases | 0 | 0 |
    ///
    /// The scale by fan-in keeps the variance of activations at any width (LeCun 1998 §4.6); the factor 1/√(2·layers) keeps the
    /// residual stream's variance at any depth (GPT-2, §2.3). Each tensor has a random stream of its own, derived from the seed
    /// and the tensor's name, and numbers are drawn on the host: the same seed gives the same model on every device, and a
    /// change of one size leaves the other tensors alone.
    pub fn init(config: &ModelConfig, seed: u64, device: &Device) -> Self {
        Self::build(config, device, &mut |spec| initial_values(config, seed, spec))
    }

    /// A model of given tensors, each row by row and in its own format; those that `given` does not have begin as in a new model.
    pub fn of_tensors(config: &ModelConfig, device: &Device, mut given: impl FnMut(&str) -> Option<Tensor<1>>) -> Self {
        let mut values = Vec::new();
        let model = Self::build(config, device, &mut |spec| {
            let value = given(&spec.name);
            // Drawing numbers takes longer than all else, and these would be for nothing.
            let start = match &value {
                Some(_) => vec![0.0; spec.shape.iter().product()],
                None => initial_values(config, 0, spec),
            };
            values.push(value);
            start
        });
        let own = model.parameters().into_iter();
        let values = own.zip(values).map(|(own, given)| given.unwrap_or(own.value)).collect();
        model.with_values(values)
    }
}

impl ModelConfig {
    /// What the tensors of such a model are, in the model's order; none has values.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        CausalLm::build(self, &Device::flex(), &mut |_| Vec::new()).tensors().to_vec()
    }
}

pub(crate) fn initial_values(config: &ModelConfig, seed: u64, spec: &TensorSpec) -> Vec<f32> {
    let len = spec.shape.iter().product();
    let by_fan_in = || spec.shape.last().map_or(1.0, |d_in| (*d_in as f64).powf(-0.5));
    let mut rng = stream(seed, &spec.name);
    let std = match spec.start {
        Start::Ones => return vec![1.0; len],
        // Lengths are those of a matrix, which whoever begins an adapter has at hand.
        Start::Zeros | Start::RowLengths => return vec![0.0; len],
        Start::Even => {
            let bound = by_fan_in();
            return (0..len).map(|_| (bound * (2.0 * rng.random::<f64>() - 1.0)) as f32).collect();
        }
        Start::Normal => return (0..len).map(|_| Distribution::<f32>::sample(&StandardNormal, &mut rng)).collect(),
        Start::Table => config.initializer_range.unwrap_or(EMBEDDING_STD),
        Start::FanIn => config.initializer_range.unwrap_or_else(by_fan_in),
        Start::FanInByDepth => {
            config.initializer_range.unwrap_or_else(by_fan_in) / (2.0 * config.layers.len() as f64).sqrt()
        }
    };
    (0..len).map(|_| (std * Distribution::<f64>::sample(&StandardNormal, &mut rng)) as f32).collect()
}

/// The random stream of one tensor.
pub(crate) fn stream(seed: u64, name: &str) -> ChaCha8Rng {
    let mut hash = Sha256::new();
    hash.update(seed.to_le_bytes());
    hash.update(name.as_bytes());
    ChaCha8Rng::from_seed(hash.finalize().into())
}

#[cfg(test)]
mod tests;
