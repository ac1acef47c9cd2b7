//! Rotary position embedding: frequencies, YaRN and the tables of cosines and sines.
//!
//! Su et al., arXiv 2104.09864; YaRN: Peng et al., arXiv 2309.00071, as transformers computes it.

use burn::tensor::{Tensor, TensorCreationOptions, TensorData};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::limits::{WIDEST, check_size, even};
pub use crate::reshape::RopeChange;

/// `rope_parameters` of a configuration. Keys that a type does not use may be absent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RopeConfig {
    /// Base of the frequencies, above 0: the larger, the slower the slowest rotation. YaRN needs more than 1.
    #[serde(default = "default_theta")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub rope_theta: f64,
    /// How the frequencies are changed to reach beyond the original length.
    #[serde(default)]
    pub rope_type: RopeType,
    /// Needed unless `rope_type` is "default" or "longrope": how many times longer the new length is than the original one, above 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub factor: Option<f64>,
    /// YaRN, Llama 3 and LongRoPE: the original length in tokens. Absent: `max_position_embeddings`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_max_position_embeddings: Option<usize>,
    /// YaRN: a frequency that turns more often than this within the original length is left alone. Absent: 32.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta_fast: Option<f64>,
    /// YaRN: a frequency that turns less often than this within the original length is divided by `factor`. Absent: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta_slow: Option<f64>,
    /// YaRN: with `mscale_all_dim`, numerator of the factor on cosines and sines. Absent or 0: that factor follows from `factor`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mscale: Option<f64>,
    /// YaRN: denominator of that factor; with MLA it scales the attention logits as well. Absent or 0: it does neither.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mscale_all_dim: Option<f64>,
    /// YaRN and LongRoPE: the factor on cosines and sines itself. Absent: with YaRN what `mscale` and `mscale_all_dim` make, with LongRoPE
    /// √(1 + ln `factor` / ln `original_max_position_embeddings`), 1 without a `factor` above 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention_factor: Option<f64>,
    /// YaRN: whether the ramp between the two kinds of frequencies begins and ends at a whole dimension. Absent: `true`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub truncate: Option<bool>,
    /// Llama 3, needed: a frequency that turns less often than this within the original length is divided by `factor`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub low_freq_factor: Option<f64>,
    /// Llama 3, needed: a frequency that turns more often than this is left alone. Above `low_freq_factor`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub high_freq_factor: Option<f64>,
    /// LongRoPE, needed: by what the frequency of each rotated pair is divided, all above 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub short_factor: Option<Vec<f64>>,
    /// LongRoPE, needed: the same for texts longer than the original length. A model that reads such texts must have the same numbers in
    /// both, as what a cache holds would otherwise turn anew with the text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub long_factor: Option<Vec<f64>>,
}

/// The kinds of position scaling that are implemented.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RopeType {
    /// They are not changed.
    #[default]
    Default,
    /// All are divided by `factor`.
    Linear,
    /// YaRN: slow ones are divided by `factor`, fast ones are left alone, those between in part (arXiv 2309.00071, section 3.2).
    Yarn,
    /// The same with the bounds of Llama 3.1.
    Llama3,
    /// LongRoPE: each is divided by a number of its own (arXiv 2402.13753).
    Longrope,
}

fn default_theta() -> f64 {
    10_000.0
}

impl Default for RopeConfig {
    fn default() -> Self {
        Self {
            rope_theta: default_theta(),
            rope_type: RopeType::Default,
            factor: None,
            original_max_position_embeddings: None,
            beta_fast: None,
            beta_slow: None,
            mscale: None,
            mscale_all_dim: None,
            attention_factor: None,
            truncate: None,
            low_freq_factor: None,
            high_freq_factor: None,
            short_factor: None,
            long_factor: None,
        }
    }
}

/// A number that counts as absent when it is 0, as in Python's `x or default`.
fn truthy(value: Option<f64>) -> Option<f64> {
    value.filter(|x| *x != 0.0)
}

fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

impl RopeConfig {
    pub(crate) fn check(&self, dim: usize, max_positions: usize) -> Result<()> {
        let positive = |key: &'static str, value: f64| {
            if value.is_finite() && value > 0.0 {
                Ok(())
            } else {
                Err(Error::config(key, &value, "must be a finite number > 0"))
            }
        };
        positive("rope_theta", self.rope_theta)?;
        let needed = self.rope_type != RopeType::Default;
        match self.factor {
            Some(factor) => positive("rope_parameters.factor", factor)?,
            None if needed && self.rope_type != RopeType::Longrope => {
                let why = format!("rope_type = \"{:?}\" needs it", self.rope_type).to_lowercase();
                return Err(Error::MissingKey { key: "rope_parameters.factor", why });
            }
            None => {}
        }
        if !needed {
            return Ok(());
        }
        if self.original_max_position_embeddings == Some(0) {
            return Err(Error::config("rope_parameters.original_max_position_embeddings", &0, "must be at least 1"));
        }
        for (key, value) in [
            ("rope_parameters.beta_fast", self.beta_fast),
            ("rope_parameters.beta_slow", self.beta_slow),
            ("rope_parameters.mscale", self.mscale),
            ("rope_parameters.mscale_all_dim", self.mscale_all_dim),
            ("rope_parameters.attention_factor", self.attention_factor),
        ] {
            if let Some(value) = value
                && !(value.is_finite() && value >= 0.0)
            {
                return Err(Error::config(key, &value, "must be a finite number ≥ 0"));
            }
        }
        if self.rope_type == RopeType::Llama3 {
            for (key, value) in [
                ("rope_parameters.low_freq_factor", self.low_freq_factor),
                ("rope_parameters.high_freq_factor", self.high_freq_factor),
            ] {
                positive(
                    key,
                    value.ok_or_else(|| Error::MissingKey { key, why: "rope_type = \"llama3\" needs it".into() })?,
                )?;
            }
            if self.high_freq_factor <= self.low_freq_factor {
                return Err(Error::config(
                    "rope_parameters.high_freq_factor",
                    &self.high_freq_factor.unwrap_or_default(),
                    "must be greater than low_freq_factor",
                ));
            }
        }
        if self.rope_type == RopeType::Longrope {
            self.check_divisors(dim, max_positions)?;
        }
        if self.rope_type == RopeType::Yarn && self.rope_theta <= 1.0 {
            return Err(Error::config("rope_theta", &self.rope_theta, "YaRN needs frequencies that fall: more than 1"));
        }
        let frequencies = self.inverse_frequencies(dim, max_positions);
        if frequencies.iter().any(|f| !f.is_finite()) {
            return Err(Error::config("rope_theta", &self.rope_theta, "gives frequencies that are not finite"));
        }
        // As f32, which is what the tables and the logits are.
        for factor in [self.table_factor(), self.logit_factor()] {
            if !(factor as f32).is_finite() {
                let why = "with factor, mscale_all_dim and attention_factor gives a scale that is not finite";
                return Err(Error::config("rope_parameters.mscale", &self.mscale.unwrap_or_default(), why));
            }
        }
        Ok(())
    }

    /// LongRoPE: a divisor above 0 for each pair, and the same ones for every text that the model reads.
    fn check_divisors(&self, dim: usize, max_positions: usize) -> Result<()> {
        const KEYS: [&str; 2] = ["rope_parameters.short_factor", "rope_parameters.long_factor"];
        for (key, divisors) in KEYS.into_iter().zip([&self.short_factor, &self.long_factor]) {
            let why = "rope_type = \"longrope\" needs it";
            let divisors = divisors.as_ref().ok_or_else(|| Error::MissingKey { key, why: why.into() })?;
            if divisors.len() != dim / 2 {
                let why = format!("must hold a number for each of the {} rotated pairs", dim / 2);
                return Err(Error::config(key, &format!("{} numbers", divisors.len()), why));
            }
            if let Some(wrong) = divisors.iter().find(|x| !(x.is_finite() && **x > 0.0)) {
                return Err(Error::config(key, wrong, "must be finite numbers > 0"));
            }
        }
        let original = self.original_max_position_embeddings.unwrap_or(max_positions);
        if max_positions > original && self.short_factor != self.long_factor {
            let why = format!(
                "beyond {original} tokens (original_max_position_embeddings) the model is to turn by other frequencies, also what was \
                 read before, which no cache can follow; with max_position_embeddings = {original} it is read as it was trained"
            );
            return Err(Error::config(KEYS[1], &"other numbers than short_factor", why));
        }
        Ok(())
    }

    /// The factor on the attention logits: m² with m = 0.1·mscale_all_dim·ln(factor)+1 when positions are scaled and
    /// `mscale_all_dim` is set, else 1.
    pub(crate) fn logit_factor(&self) -> f64 {
        match (self.rope_type, truthy(self.mscale_all_dim), self.factor) {
            (RopeType::Default, _, _) | (_, None, _) | (_, _, None) => 1.0,
            (_, Some(mscale), Some(factor)) => yarn_mscale(factor, mscale).powi(2),
        }
    }

    /// The factor on cosines and sines: `attention_factor`, or the ratio of the two mscales where both are set, or
    /// 0.1·ln(factor)+1; LongRoPE's. 1 with other types.
    pub fn table_factor(&self) -> f64 {
        let factor = self.factor.unwrap_or(1.0);
        match self.rope_type {
            RopeType::Yarn => {}
            RopeType::Longrope => return self.attention_factor.unwrap_or_else(|| self.longrope_factor(factor)),
            RopeType::Default | RopeType::Linear | RopeType::Llama3 => return 1.0,
        }
        match (self.attention_factor, truthy(self.mscale), truthy(self.mscale_all_dim)) {
            (Some(given), _, _) => given,
            (None, Some(mscale), Some(all)) => yarn_mscale(factor, mscale) / yarn_mscale(factor, all),
            (None, _, _) => yarn_mscale(factor, 1.0),
        }
    }

    /// LongRoPE's factor on cosines and sines for a text `factor` times as long as the original one.
    fn longrope_factor(&self, factor: f64) -> f64 {
        match self.original_max_position_embeddings {
            Some(original) if factor > 1.0 && original > 1 => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
            _ => 1.0,
        }
    }

    /// LongRoPE without a `factor`: the one that the two lengths make, as every reader of such files takes it.
    pub(crate) fn settle(&mut self, max_positions: usize) {
        if self.rope_type == RopeType::Longrope && self.factor.is_none() {
            let original = *self.original_max_position_embeddings.get_or_insert(max_positions);
            self.factor = Some(max_positions as f64 / original.max(1) as f64);
        }
    }

    /// Radians per position for each of the `dim / 2` pairs.
    pub fn inverse_frequencies(&self, dim: usize, max_positions: usize) -> Vec<f64> {
        let plain = |i: usize| self.rope_theta.powf(-2.0 * i as f64 / dim as f64);
        let factor = self.factor.unwrap_or(1.0);
        let original = self.original_max_position_embeddings.unwrap_or(max_positions) as f64;
        match self.rope_type {
            RopeType::Default => (0..dim / 2).map(plain).collect(),
            RopeType::Linear => (0..dim / 2).map(|i| plain(i) / factor).collect(),
            RopeType::Yarn => {
                // The pair that makes `turns` turns within the original context.
                let pair = |turns: f64| {
                    dim as f64 * (original / (turns * std::f64::consts::TAU)).ln() / (2.0 * self.rope_theta.ln())
                };
                let (mut low, mut high) =
                    (pair(truthy(self.beta_fast).unwrap_or(32.0)), pair(truthy(self.beta_slow).unwrap_or(1.0)));
                if self.truncate.unwrap_or(true) {
                    (low, high) = (low.floor(), high.ceil());
                }
                // The upper clamp is dim − 1, not dim/2 − 1: transformers and DeepSeek's own code agree on it.
                low = low.max(0.0);
                high = high.min(dim as f64 - 1.0);
                if low == high {
                    high += 0.001;
                }
                (0..dim / 2)
                    .map(|i| {
                        let interpolated = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                        plain(i) / factor * interpolated + plain(i) * (1.0 - interpolated)
                    })
                    .collect()
            }
            RopeType::Longrope => {
                // Those of the trained length: a model that is read beyond it has the same ones there.
                let divisors = self.short_factor.as_deref().unwrap_or_default();
                (0..dim / 2).map(|i| plain(i) / divisors.get(i).copied().unwrap_or(1.0)).collect()
            }
            RopeType::Llama3 => {
                let (slow, fast) = (self.low_freq_factor.unwrap_or(1.0), self.high_freq_factor.unwrap_or(4.0));
                (0..dim / 2)
                    .map(|i| {
                        let frequency = plain(i);
                        let turns = original * frequency / std::f64::consts::TAU;
                        let keep = ((turns - slow) / (fast - slow)).clamp(0.0, 1.0);
                        frequency * keep + frequency / factor * (1.0 - keep)
                    })
                    .collect()
            }
        }
    }
}

/// Rotated pairs that turn with chosen frequencies, each as often as it is named: what keys of several heads are that have become one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RopePairs {
    /// The width whose frequencies they are.
    pub width: usize,
    /// For each pair the index of its frequency, below `width / 2`.
    pub frequencies: Vec<usize>,
}

impl RopePairs {
    /// Checks that they are those of a key with `rotated` numbers.
    pub(crate) fn check(&self, rotated: usize) -> Result<()> {
        even("rope_pairs_width", self.width)?;
        check_size("rope_pairs_width", self.width, WIDEST)?;
        if self.frequencies.len() != rotated / 2 {
            let why =
                format!("must name a frequency for each of the {} pairs of qk_rope_head_dim = {rotated}", rotated / 2);
            return Err(Error::config("rope_pairs", &format!("{} indices", self.frequencies.len()), why));
        }
        let half = self.width / 2;
        match self.frequencies.iter().find(|at| **at >= half) {
            Some(at) => {
                let why = format!("rope_pairs_width = {} has frequencies 0 to {}", self.width, half - 1);
                Err(Error::config("rope_pairs", at, why))
            }
            None => Ok(()),
        }
    }
}

/// Cosines and sines for one batch of positions.
#[derive(Clone, Debug)]
pub struct RopeTable {
    /// `[batch or 1, seq, 1, R/2]`
    pub cos: Tensor<4>,
    /// `[batch or 1, seq, 1, R/2]`
    pub sin: Tensor<4>,
}

impl RopeTable {
    /// Tables for pairs that turn by `frequencies` radians per position
    /// ([`ModelConfig::inverse_frequencies`](crate::ModelConfig::inverse_frequencies)), every cosine and sine times `factor`
    /// ([`RopeConfig::table_factor`]), at the given positions, one row per sequence (or one row for all). All rows have the same length.
    ///
    /// Angles are formed in f64 and rounded once, to the format that `options` name, so that positions far from 0 lose nothing.
    pub fn new(
        frequencies: &[f64],
        factor: f64,
        positions: &[Vec<usize>],
        options: impl Into<TensorCreationOptions>,
    ) -> Self {
        let options = options.into();
        let (rows, seq) = (positions.len(), positions.first().map_or(0, Vec::len));
        let mut cos = Vec::with_capacity(rows * seq * frequencies.len());
        let mut sin = Vec::with_capacity(rows * seq * frequencies.len());
        for position in positions.iter().flatten() {
            for frequency in frequencies {
                let (s, c) = (*position as f64 * frequency).sin_cos();
                cos.push(c * factor);
                sin.push(s * factor);
            }
        }
        let shape = [rows, seq, 1, frequencies.len()];
        let table = |values: Vec<f64>| Tensor::from_data(TensorData::new(values, shape), options.clone());
        Self { cos: table(cos), sin: table(sin) }
    }
}

#[cfg(test)]
mod tests;
