//! What each step of a conversion costs.

use burn::tensor::Device;
use lowkey_model::CausalLm;
use serde::Serialize;

use crate::cut::loss;
use crate::error::Result;

/// The texts of a conversion.
#[derive(Clone, Copy, Debug)]
pub struct Texts<'a> {
    /// What moments are taken of.
    pub train: &'a [Vec<u32>],
    /// What only losses are.
    pub held_out: &'a [Vec<u32>],
}

/// What a model has become.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The model that was given.
    Source,
    /// Norms of query and key heads are constants.
    HeadNormsAbsorbed,
    /// Fewer numbers of the keys turn with their position, and the latent holds all else.
    RotatedKeysNarrowed,
    /// The latent is cut.
    LatentsCut,
    /// The same function with latents.
    Exact,
}

impl Stage {
    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::HeadNormsAbsorbed => "norms of heads as constants",
            Self::RotatedKeysNarrowed => "fewer rotated numbers",
            Self::LatentsCut => "latents cut",
            Self::Exact => "latent attention",
        }
    }
}

/// The loss of a model at one stage.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Loss {
    /// Which.
    pub stage: Stage,
    /// Nats per token of the calibration text.
    pub calibration: f64,
    /// The same of held-out text, where there is one.
    pub held_out: Option<f64>,
}

impl Loss {
    /// Of a model that is there as a whole.
    ///
    /// # Errors
    /// [`Error::Text`](crate::Error::Text) for a text that the model cannot read.
    pub fn of(stage: Stage, model: &CausalLm, texts: Texts, device: &Device) -> Result<Self> {
        let Texts { train, held_out } = texts;
        let held_out = held_out.iter().any(|ids| ids.len() > 1).then(|| loss(model, held_out, device)).transpose()?;
        Ok(Self { stage, calibration: loss(model, train, device)?, held_out })
    }
}
