//! What a report is made of: the arms of an experiment, and what their runs measured.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// An experiment with its results so far.
#[derive(Clone, Debug, PartialEq)]
pub struct Study {
    /// Name of the experiment.
    pub name: String,
    /// What it asks, in a sentence.
    pub question: String,
    /// What decides it, written before the first run.
    pub rule: Rule,
    /// Index in `arms` of the arm that the others are compared with.
    pub baseline: usize,
    /// Name of what is compared, a key of [`RunResult::metrics`].
    pub metric: String,
    /// Whether a smaller figure is better.
    pub lower_is_better: bool,
    /// The key of the run file that the arms' `x` comes from.
    pub x: Option<String>,
    /// Lines that a theory draws over the arms' `x`.
    pub theory: Vec<Theory>,
    /// The arms, in the order of the file.
    pub arms: Vec<Arm>,
    /// The runs that are finished, by arm and seed.
    pub runs: Vec<RunResult>,
    /// Seeds of each arm, finished or not.
    pub seeds: Vec<u64>,
    /// What speaks against any verdict, each the end of a sentence: what decides is not what it was when the runs began, or the
    /// runs cannot be held against each other.
    pub objections: Vec<String>,
    /// What a reader has to know beside the verdict.
    pub notes: Vec<String>,
}

/// One set of settings.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Arm {
    /// Its name, also its folder's.
    pub name: String,
    /// What it sets, as in a run file.
    pub settings: BTreeMap<String, String>,
    /// Where it stands on the axis of the plots (`x` of the experiment), such as its rank.
    pub x: Option<f64>,
    /// Parameters.
    pub parameters: usize,
    /// Operations of training on one token, in all passes, as a mean over the steps of the run.
    pub train_flops_per_token: f64,
    /// Operations of the whole run.
    pub training_flops: f64,
    /// Narrower ranks that an elastic latent is trained at, too.
    pub elastic_ranks: Vec<usize>,
    /// Bytes of cache per token in f32, all layers.
    pub cache_bytes_per_token: usize,
    /// The same with the cache in int8.
    pub int8_bytes_per_token: usize,
    /// Bytes that a decoded token reads, weights and cache in f32, by tokens in the cache; MLA in its absorbed form.
    pub decode_bytes: Vec<(usize, f64)>,
    /// Tokens per second by tokens in the cache, at batch 1, where they were measured.
    pub decode_tokens_per_s: Vec<(usize, f64)>,
    /// Optimiser steps.
    pub steps: u64,
    /// How far it is from the baseline in what was to be matched, relative; absent where nothing was.
    pub mismatch: Option<f64>,
}

impl Arm {
    /// Bytes of cache per token in codes of four bits, two to a byte, with the scales of int8.
    pub(crate) fn int4_bytes_per_token(&self) -> usize {
        let numbers = self.cache_bytes_per_token / 4;
        self.int8_bytes_per_token - numbers / 2
    }
}

/// What one run measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RunResult {
    /// Index of its arm.
    pub arm: usize,
    /// Its seed.
    pub seed: u64,
    /// Figures of the finished model on the whole held-out split: `val_loss`, and where there are any `gap`, `accuracy`, `mse`,
    /// `bits_per_byte`, `class.NAME.gap`, `class.NAME.loss`, `class.NAME.accuracy`, and `int8.val_loss`, `int4.val_loss` with a
    /// quantised latent cache.
    pub metrics: BTreeMap<String, f64>,
    /// Steps and held-out losses along the way.
    pub curve: Vec<(u64, f64)>,
    /// MLA: eigenvalues of the covariance of each layer's latent, largest first.
    pub spectra: Vec<Vec<f64>>,
}

/// A line over the arms' `x`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Theory {
    /// What the line is called in plots, and by a rule.
    pub name: String,
    /// Corners of the line, each `[x, y]`, by rising `x`: two at least.
    #[schemars(length(min = 2))]
    pub points: Vec<(f64, f64)>,
}

/// What decides an experiment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Rule {
    /// Each arm against the baseline: better, worse or equal within a margin, by the interval of the paired difference.
    Margin {
        /// Differences below this do not matter; in the unit of `metric`.
        #[schemars(range(min = 0))]
        margin: f64,
        /// The share of intervals that are to hold the true value, from 0.5 to below 1.
        #[serde(default = "usual_confidence")]
        #[schemars(range(min = 0.5), extend("exclusiveMaximum" = 1))]
        confidence: f64,
    },
    /// The smallest `x` whose mean is within `percent` of the best arm's, or within one standard deviation.
    Knee {
        /// How far from the best mean is near enough, in percent of it.
        #[schemars(range(min = 0))]
        percent: f64,
        /// The share of intervals that are to hold the true value, from 0.5 to below 1.
        #[serde(default = "usual_confidence")]
        #[schemars(range(min = 0.5), extend("exclusiveMaximum" = 1))]
        confidence: f64,
    },
    /// Every arm within `percent` of the theory of that name at its `x`.
    Theory {
        /// Name of a `[[theory]]`.
        name: String,
        /// How far from the theory is near enough, in percent of it.
        #[schemars(range(min = 0))]
        percent: f64,
        /// The share of intervals that are to hold the true value, from 0.5 to below 1.
        #[serde(default = "usual_confidence")]
        #[schemars(range(min = 0.5), extend("exclusiveMaximum" = 1))]
        confidence: f64,
    },
    /// Every prefix of an elastic arm's latent against the arm that was trained with a latent of that width: within `percent` of its
    /// mean, or within one standard deviation of its seeds.
    Elastic {
        /// Name of the `[[arms]]` that sets `model.elastic.ranks`.
        arm: String,
        /// How far from the other arm is near enough, in percent of its mean.
        #[schemars(range(min = 0))]
        percent: f64,
        /// The share of intervals that are to hold the true value, from 0.5 to below 1.
        #[serde(default = "usual_confidence")]
        #[schemars(range(min = 0.5), extend("exclusiveMaximum" = 1))]
        confidence: f64,
    },
}

impl Rule {
    /// The share of intervals that hold the truth.
    pub fn confidence(&self) -> f64 {
        match self {
            Self::Margin { confidence, .. }
            | Self::Knee { confidence, .. }
            | Self::Theory { confidence, .. }
            | Self::Elastic { confidence, .. } => *confidence,
        }
    }
}

fn usual_confidence() -> f64 {
    0.95
}
