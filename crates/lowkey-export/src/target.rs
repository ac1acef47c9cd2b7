//! What a model can be exported to, and what is demanded of it then.

use std::fmt;

use lowkey_model::checkpoint::WeightDtype;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::gguf::TensorType;

/// Layout and number format of an export.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// The layout.
    pub to: Layout,
    /// The number format of matrices: `f32`, `bf16`, `f16`, `q8_0` for GGUF, and `nf4` of bitsandbytes for [`Layout::Hf`], whose other
    /// tensors are bf16.
    pub dtype: String,
}

/// The layout of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// A Hugging Face directory.
    Hf,
    /// The same with W_UK and W_UV of each layer in a side file.
    Absorbed,
    /// The same with the products W_UKᵀ·W_UQ and W_O·W_UV in a side file.
    Fused,
    /// One file for llama.cpp.
    Gguf,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hf => "hf",
            Self::Absorbed => "absorbed",
            Self::Fused => "fused",
            Self::Gguf => "gguf",
        })
    }
}

impl Target {
    /// Reads the names of a layout and a number format.
    ///
    /// # Errors
    /// [`Error::Setting`] where there is no such layout or format, or the one does not have the other.
    pub fn parse(to: &str, dtype: &str) -> Result<Self> {
        let layouts = [Layout::Hf, Layout::Absorbed, Layout::Fused, Layout::Gguf];
        let to = layouts
            .into_iter()
            .find(|layout| layout.to_string() == to)
            .ok_or_else(|| Error::setting("to", to, "must be hf, absorbed, fused or gguf"))?;
        let target = Self { to, dtype: dtype.to_ascii_lowercase() };
        match to {
            Layout::Gguf => target.tensor_type().map(drop)?,
            _ => target.weight_dtype().map(drop)?,
        }
        Ok(target)
    }

    /// The format of Hugging Face and side files.
    pub(crate) fn weight_dtype(&self) -> Result<WeightDtype> {
        match self.dtype.as_str() {
            "f32" => Ok(WeightDtype::F32),
            "bf16" => Ok(WeightDtype::Bf16),
            "f16" => Ok(WeightDtype::F16),
            "nf4" if self.to == Layout::Hf => Ok(WeightDtype::Bf16),
            "nf4" => Err(Error::setting("dtype", &self.dtype, "is a format of bitsandbytes: use --to hf")),
            "q8_0" => Err(Error::setting("dtype", &self.dtype, "is a format of GGUF: use --to gguf")),
            other => Err(Error::setting("dtype", other, "must be f32, bf16 or f16, nf4 for hf, or q8_0 for GGUF")),
        }
    }

    /// Whether matrices are packed.
    pub(crate) fn is_packed(&self) -> bool {
        self.dtype == "nf4"
    }

    /// The format of GGUF's matrices.
    pub(crate) fn tensor_type(&self) -> Result<TensorType> {
        self.dtype.parse().map_err(|_| Error::setting("dtype", &self.dtype, "must be f32, bf16, f16 or q8_0"))
    }

    /// What is demanded of an export in this format unless the user says otherwise: for f32 that nothing but rounding differs;
    /// for the narrower formats that the weights are rounded correctly, and that the model is as near to its source as
    /// models usually are at that width. A weight's error is the format's unit roundoff, for `q8_0` half a step of 1/127 and
    /// the rounding of the step itself, for `nf4` half the widest gap between two levels.
    pub fn bounds(&self) -> Bounds {
        let bits = |significand: i32| 2f64.powi(-significand);
        let bounds = |weight: f64, [logit, kl, top1, perplexity]: [f64; 4], greedy| Bounds {
            weight_max: weight,
            weight_rms: weight,
            logit,
            kl,
            top1,
            perplexity,
            greedy,
        };
        match self.dtype.as_str() {
            "f32" => bounds(bits(24), [1e-5, 1e-8, 0.999, 1e-5], true),
            "f16" => bounds(bits(11), [0.02, 1e-3, 0.99, 2e-3], false),
            "bf16" => bounds(bits(8), [0.1, 0.02, 0.95, 0.01], false),
            "nf4" => bounds(0.16, [0.5, 0.2, 0.8, 0.1], false),
            _ => Bounds { weight_max: 4.5e-3, ..bounds(1.5e-2, [0.2, 0.02, 0.95, 0.01], false) },
        }
    }
}

/// What was demanded.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bounds {
    /// Largest [`TensorError::max`](crate::certificate::TensorError::max) of a weight or product: the unit roundoff of the number format.
    pub weight_max: f64,
    /// Largest [`TensorError::rms`](crate::certificate::TensorError::rms).
    pub weight_rms: f64,
    /// Largest [`LogitEvidence::max_relative`](crate::evidence::LogitEvidence::max_relative).
    pub logit: f64,
    /// Largest [`LogitEvidence::mean_kl`](crate::evidence::LogitEvidence::mean_kl).
    pub kl: f64,
    /// Least [`LogitEvidence::top1_agreement`](crate::evidence::LogitEvidence::top1_agreement).
    pub top1: f64,
    /// Largest relative change of the perplexity.
    pub perplexity: f64,
    /// Whether greedy continuations must be the source's, but for ties within `logit`.
    pub greedy: bool,
}

impl Bounds {
    /// Replaces one bound by name: `logit=0.2`.
    ///
    /// # Errors
    /// [`Error::Setting`] where there is no such bound, or the value is not one.
    pub fn set(&mut self, assignment: &str) -> Result<()> {
        let (key, value) = assignment.split_once('=').unwrap_or((assignment, ""));
        let slot = match key {
            "logit" => &mut self.logit,
            "kl" => &mut self.kl,
            "top1" => &mut self.top1,
            "perplexity" => &mut self.perplexity,
            _ => return Err(Error::setting("bound", assignment, "must be logit, kl, top1 or perplexity = NUMBER")),
        };
        match value.parse::<f64>() {
            Ok(number) if number.is_finite() && number >= 0.0 => *slot = number,
            _ => return Err(Error::setting("bound", assignment, "must be a number of at least 0")),
        }
        Ok(())
    }
}

impl Bounds {
    /// A line for each bound that demands less than `usual`.
    pub(crate) fn laxer_than(&self, usual: &Self) -> Vec<String> {
        let figures = [
            ("weight_max", self.weight_max, usual.weight_max),
            ("weight_rms", self.weight_rms, usual.weight_rms),
            ("logit", self.logit, usual.logit),
            ("kl", self.kl, usual.kl),
            ("perplexity", self.perplexity, usual.perplexity),
            ("1 - top1", 1.0 - self.top1, 1.0 - usual.top1),
        ];
        // NaN is laxer than anything; a number read from text may differ in its last digit.
        let is_laxer = |found: f64, usual: f64| found.is_nan() || found > usual * (1.0 + 1e-9);
        let laxer = figures.into_iter().filter(|(_, found, usual)| is_laxer(*found, *usual));
        let mut lines: Vec<String> = laxer
            .map(|(name, found, usual)| format!("the certificate allows {name} ≤ {found:.1e}; usual is {usual:.1e}"))
            .collect();
        if usual.greedy && !self.greedy {
            lines.push("the certificate does not ask for the same greedy continuations, as is usual".into());
        }
        lines
    }
}
