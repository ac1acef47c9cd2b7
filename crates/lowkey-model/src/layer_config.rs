//! What a layer is made of. Each has a configuration of its own, expanded from Hugging Face's flat keys.

use std::ops::{Deref, DerefMut};

use crate::attention::AttentionConfig;
use crate::error::Result;
use crate::limits::check_size;

/// Most layers: more than any published model has, and few enough that a list of their sizes is small.
const DEEPEST: usize = 1 << 12;

/// A decoder block.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerConfig {
    /// Its attention.
    pub attention: AttentionConfig,
    /// Its feed-forward layer.
    pub mlp: MlpConfig,
}

/// A SwiGLU feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MlpConfig {
    /// Width f between its two halves.
    pub intermediate_size: usize,
    /// Biases on its three projections.
    pub bias: bool,
}

impl MlpConfig {
    /// Parameters of its matrices, in a stream of width `d`.
    pub fn matrices(&self, d: usize) -> usize {
        3 * d * self.intermediate_size
    }

    /// Parameters of its biases.
    pub(crate) fn biases(&self, d: usize) -> usize {
        if self.bias { 2 * self.intermediate_size + d } else { 0 }
    }
}

/// The layers of a model, first to last: never none.
#[derive(Clone, Debug, PartialEq)]
pub struct Layers(Vec<LayerConfig>);

impl Layers {
    /// `count` equal layers.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) where there would be none, or more than any machine could hold.
    pub fn equal(layer: LayerConfig, count: usize) -> Result<Self> {
        check_size("num_hidden_layers", count, DEEPEST)?;
        Ok(Self(vec![layer; count]))
    }

    /// Keeps the first `count`, or adds more of the last.
    ///
    /// # Errors
    /// As [`Layers::equal`].
    pub fn resize(&mut self, count: usize) -> Result<()> {
        check_size("num_hidden_layers", count, DEEPEST)?;
        let last = self.0[self.0.len() - 1].clone();
        self.0.resize(count, last);
        Ok(())
    }

    /// The first layer. What it says of sizes holds for all of them, but for how much of its latent each caches.
    pub fn shared(&self) -> &LayerConfig {
        &self.0[0]
    }

    /// Whether no layer differs from the first in anything but how much of its latent it caches.
    pub(crate) fn alike(&self) -> bool {
        let whole = |layer: &LayerConfig| {
            let mut layer = layer.clone();
            if let Some(mla) = layer.attention.latent_mut() {
                mla.kv_cache_rank = None;
            }
            layer
        };
        let first = whole(self.shared());
        self.0.iter().all(|layer| whole(layer) == first)
    }
}

impl Deref for Layers {
    type Target = [LayerConfig];

    fn deref(&self) -> &[LayerConfig] {
        &self.0
    }
}

impl DerefMut for Layers {
    fn deref_mut(&mut self) -> &mut [LayerConfig] {
        &mut self.0
    }
}
