//! A checkpoint read a layer at a time, for models that do not fit into memory.

use std::path::{Path, PathBuf};

use burn::tensor::Device;

use super::{CONFIG, NewCheckpoint, Weights};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::layer_config::Layers;
use crate::model::CausalLm;
use crate::params::Parameter;
use crate::tensor::TensorSpec;

/// The layers of a model directory, each read when it is asked for. What is read is f32, as of [`CausalLm::load`].
pub struct LayerReader {
    dir: PathBuf,
    config: ModelConfig,
}

impl LayerReader {
    /// Opens a directory and compares names and shapes of all its tensors with what `config.json` asks for; no value is read.
    ///
    /// # Errors
    /// As [`CausalLm::load`].
    pub fn open(dir: &Path) -> Result<Self> {
        let reader = Self { dir: dir.to_path_buf(), config: ModelConfig::read(&dir.join(CONFIG))? };
        reader.weights()?;
        Ok(reader)
    }

    /// Of the whole model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// A model of layer `layer` alone, as its layer 0, with one token whose embedding is 0, and final norm and head of no use.
    ///
    /// # Errors
    /// As [`CausalLm::load`].
    pub fn layer(&self, layer: usize, device: &Device) -> Result<CausalLm> {
        let (config, weights) = (self.config.of_layer(layer)?, self.weights()?);
        let [own, alone] = [layer, 0].map(prefix);
        CausalLm::try_build(&config, None, device, |spec| match spec.name.strip_prefix(&alone) {
            Some(part) => weights.of(&TensorSpec { name: format!("{own}{part}"), ..spec.clone() }),
            None => Ok(vec![0.0; spec.shape.iter().product()]),
        })
    }

    /// Embedding, final norm and output head, with one layer that has no values.
    ///
    /// # Errors
    /// As [`CausalLm::load`].
    pub fn ends(&self, device: &Device) -> Result<CausalLm> {
        let (mut config, weights) = (self.config.clone(), self.weights()?);
        config.layers.resize(1)?;
        let none = prefix(0);
        CausalLm::try_build(&config, None, device, |spec| match spec.name.starts_with(&none) {
            true => Ok(Vec::new()),
            false => weights.of(spec),
        })
    }

    /// The files, mapped anew for each part: pages that were read of a mapping count as memory in use until it is gone.
    fn weights(&self) -> Result<Weights> {
        let weights = Weights::open(&self.dir, &self.config)?;
        weights.check(&self.dir, &self.config, &Device::flex())?;
        Ok(weights)
    }
}

impl NewCheckpoint {
    /// Writes the one layer of a model as layer `layer`, the next shard.
    ///
    /// # Errors
    /// As [`NewCheckpoint::add`].
    pub fn add_layer(&mut self, model: &CausalLm, layer: usize) -> Result<()> {
        let [own, alone] = [layer, 0].map(prefix);
        let of_layer = model.parameters().into_iter().filter_map(|parameter| {
            let name = parameter.name.strip_prefix(&alone).map(|part| format!("{own}{part}"))?;
            Some(Parameter { name, ..parameter })
        });
        self.add(of_layer.collect())
    }

    /// Writes what a model has beside its layers, the next shard.
    ///
    /// # Errors
    /// As [`NewCheckpoint::add`].
    pub fn add_ends(&mut self, model: &CausalLm) -> Result<()> {
        let parameters = model.parameters().into_iter();
        self.add(parameters.filter(|parameter| !parameter.name.starts_with(&prefix(0))).collect())
    }
}

impl ModelConfig {
    /// Of a model of that layer alone, with one token.
    fn of_layer(&self, layer: usize) -> Result<Self> {
        let own = self.layers.get(layer).unwrap_or_else(|| self.layers.shared()).clone();
        Ok(Self { vocab_size: 1, layers: Layers::equal(own, 1)?, ..self.clone() })
    }
}

/// What the names of a layer's tensors begin with.
fn prefix(layer: usize) -> String {
    format!("model.layers.{layer}.")
}
