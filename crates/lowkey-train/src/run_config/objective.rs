//! `[[objective]]`: what a run minimises, where that is not the loss on the next token alone.

use std::path::{Path, PathBuf};

use lowkey_model::ModelConfig;
use lowkey_model::adapter::AdapterConfig;
use lowkey_model::objective::preference::{Preference, PreferenceLoss};
use lowkey_model::objective::{Divergence, Term};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::RunConfig;
use crate::error::{Error, Result};
use crate::resume::same_place;

/// One entry of `[[objective]]`. A run has one; absent: `kind = "next_token"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum ObjectiveSection {
    /// The next token of a text, or the answers of a task.
    NextToken {},
    /// Of two answers to a prompt, the chosen one rather than the rejected one (DPO and its kin). The dataset must consist of such
    /// pairs, and a pair is two sequences of `training.batch_size`.
    Preference {
        /// The loss by the name that TRL gives it, or a list of losses, which are added up. With Δ, the chosen answer's log-probability
        /// above the rejected one's, less the same of the reference: `sigmoid` (DPO, −log σ(β Δ)), `sigmoid_norm` (of means over tokens),
        /// `ipo` ((Δ − 1/(2β))² of means), `hinge` (max(0, 1 − β Δ)) and `robust` (for pairs of which some are the wrong way round);
        /// without a reference `simpo` and `orpo`.
        #[serde(default)]
        loss_type: LossTypes,
        /// Factors on the losses of the list, as many as there are. Absent: 1 each.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        loss_weights: Option<Vec<f64>>,
        /// How strongly a margin between the answers counts, above 0. What it is multiplied with, sums or means over tokens, depends on
        /// the loss.
        #[serde(default = "default_beta")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        beta: f64,
        /// `robust` alone: the share of pairs that are taken to be the wrong way round, from 0 to below 0.5. Absent: 0.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[schemars(range(min = 0), extend("exclusiveMaximum" = 0.5))]
        label_smoothing: Option<f64>,
        /// `simpo` alone: the margin that is asked for. Absent: 0.5.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        simpo_gamma: Option<f64>,
        /// `simpo` alone: factor on the mean loss on the chosen answer. 0 is SimPO as published. Absent: 1.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[schemars(range(min = 0))]
        cpo_alpha: Option<f64>,
        /// The model directory that the trained model is held against. Absent: the model of `[init]`, as it was. `simpo` and `orpo` need none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reference: Option<PathBuf>,
        /// A folder in which the reference's log-probabilities are kept, so that it computes each answer once, in this run and in later
        /// ones. Absent: they are computed at every step.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cache: Option<PathBuf>,
    },
    /// What another model predicts at every position that has a target (knowledge distillation).
    Distillation {
        /// The model directory to learn from. Its vocabulary must be the run's.
        teacher: PathBuf,
        /// Which distance, from 0 to 1: 0 is the forward KL divergence, KL(teacher ‖ model), 1 the reverse one, and between them lie the
        /// generalised Jensen-Shannon divergences (arXiv 2306.13649).
        #[serde(default)]
        #[schemars(range(min = 0, max = 1))]
        beta: f64,
        /// What both models' logits are divided by, above 0.
        #[serde(default = "default_temperature")]
        #[schemars(extend("exclusiveMinimum" = 0))]
        temperature: f64,
        /// The share of the loss that is the distance to the teacher; the rest is the loss on the next token.
        #[serde(default = "default_share")]
        #[schemars(range(min = 0, max = 1))]
        share: f64,
        /// Learn from so many of the teacher's likeliest tokens, and all others together, at each position. Absent: from all tokens.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[schemars(range(min = 1, max = 4096))]
        top_k: Option<usize>,
        /// Factor on how far the output of each layer's attention lies from that of the teacher's layer: the squared distance relative to the
        /// square of the teacher's output, a mean over layers and targets. For a teacher of as many layers as wide, such as the model that
        /// this one was converted from; beside `top_k` there is none. Absent: 0.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[schemars(range(min = 0))]
        attention_weight: Option<f64>,
        /// A folder in which these likeliest tokens are kept, `6 · top_k + 2` bytes for each target: runs over the same sequences read them
        /// there. Absent: they are computed at every step.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cache: Option<PathBuf>,
    },
}

/// One loss or several.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "must be sigmoid, sigmoid_norm, ipo, hinge, robust, simpo or orpo, or a list of these")]
pub enum LossTypes {
    /// One.
    One(PreferenceLoss),
    /// A list.
    Several(Vec<PreferenceLoss>),
}

impl Default for LossTypes {
    fn default() -> Self {
        Self::One(PreferenceLoss::Sigmoid)
    }
}

impl LossTypes {
    fn list(&self) -> &[PreferenceLoss] {
        match self {
            Self::One(loss) => std::slice::from_ref(loss),
            Self::Several(losses) => losses,
        }
    }
}

fn default_beta() -> f64 {
    0.1
}

fn default_temperature() -> f64 {
    1.0
}

fn default_share() -> f64 {
    1.0
}

/// Another model that a run needs, as its file names it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OtherModel<'a> {
    /// The key, for messages.
    pub(crate) key: &'static str,
    /// Its directory.
    pub(crate) dir: &'a Path,
    /// Where what it says is kept.
    pub(crate) cache: Option<&'a Path>,
    pub(crate) asked: Asked,
}

/// What it is asked.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Asked {
    /// The log-probability of each row's targets.
    Rows,
    /// Everything at each target, or the likeliest tokens at a temperature.
    Tokens { top_k: Option<usize>, temperature: f64 },
}

impl ObjectiveSection {
    /// The term of a step.
    pub(crate) fn term(&self, z_loss: f64) -> Term {
        match self {
            Self::NextToken {} => Term::Next { z_loss },
            Self::Preference { loss_type, loss_weights, beta, label_smoothing, simpo_gamma, cpo_alpha, .. } => {
                let weight = |i: usize| loss_weights.as_ref().and_then(|w| w.get(i)).copied().unwrap_or(1.0);
                Term::Preference(Preference {
                    losses: loss_type.list().iter().enumerate().map(|(i, loss)| (*loss, weight(i))).collect(),
                    beta: *beta,
                    label_smoothing: label_smoothing.unwrap_or(0.0),
                    gamma: simpo_gamma.unwrap_or(0.5),
                    cpo_alpha: cpo_alpha.unwrap_or(1.0),
                })
            }
            Self::Distillation { beta, temperature, share, attention_weight, .. } => Term::Distillation {
                divergence: Divergence { beta: *beta, temperature: *temperature, share: *share },
                attention: attention_weight.unwrap_or(0.0),
            },
        }
    }

    /// Refuses values that no term can be made from.
    fn check(&self, config: &RunConfig) -> Result<()> {
        match self {
            Self::NextToken {} => Ok(()),
            Self::Preference { .. } => self.check_preference(config),
            Self::Distillation { beta, temperature, share, top_k, cache, attention_weight, .. } => {
                no_z_loss(config, "the distance to a teacher")?;
                super::check::fraction("objective.beta", *beta)?;
                super::check::fraction("objective.share", *share)?;
                above_zero("objective.temperature", *temperature)?;
                if let Some(top_k) = top_k {
                    super::at_least_one("objective.top_k", *top_k, 4096)?;
                }
                if let Some(weight) = attention_weight {
                    if !(weight.is_finite() && *weight >= 0.0) {
                        return Err(Error::config("objective.attention_weight", weight, "must be a finite number ≥ 0"));
                    }
                    if top_k.is_some() {
                        let why = "is learnt from the teacher itself, and with top_k only what it predicts is asked of it; leave one out";
                        return Err(Error::config("objective.attention_weight", weight, why));
                    }
                }
                match (cache, top_k) {
                    (Some(cache), None) => {
                        let why = "all tokens of every position would fill any disk; write top_k = 64 beside it";
                        Err(Error::config("objective.cache", cache.display(), why))
                    }
                    _ => Ok(()),
                }
            }
        }
    }

    fn check_preference(&self, config: &RunConfig) -> Result<()> {
        let Self::Preference {
            loss_type,
            loss_weights,
            beta,
            label_smoothing,
            simpo_gamma,
            cpo_alpha,
            reference,
            cache,
        } = self
        else {
            return Ok(());
        };
        let losses = loss_type.list();
        if losses.is_empty() {
            return Err(Error::config("objective.loss_type", "[]", "name a loss, such as \"sigmoid\""));
        }
        if let Some(weights) = loss_weights {
            if weights.len() != losses.len() {
                let why = format!("has {} numbers for {} losses; write one for each", weights.len(), losses.len());
                return Err(Error::config("objective.loss_weights", format!("{weights:?}"), why));
            }
            if let Some(weight) = weights.iter().find(|weight| !(weight.is_finite() && **weight >= 0.0)) {
                return Err(Error::config("objective.loss_weights", weight, "must be finite numbers ≥ 0"));
            }
        }
        above_zero("objective.beta", *beta)?;
        let belongs = |key, value: Option<f64>, loss: PreferenceLoss, name: &str| match value {
            Some(value) if !losses.contains(&loss) => {
                let why = format!("belongs to loss_type = \"{name}\"; leave it out, or name that loss");
                Err(Error::config(key, value, why))
            }
            _ => Ok(()),
        };
        belongs("objective.label_smoothing", *label_smoothing, PreferenceLoss::Robust, "robust")?;
        belongs("objective.simpo_gamma", *simpo_gamma, PreferenceLoss::Simpo, "simpo")?;
        belongs("objective.cpo_alpha", *cpo_alpha, PreferenceLoss::Simpo, "simpo")?;
        if let Some(share) = label_smoothing.filter(|share| !(0.0..0.5).contains(share)) {
            let why = "must lie in 0 ≤ ε < 0.5: from a half on, the pairs say nothing";
            return Err(Error::config("objective.label_smoothing", share, why));
        }
        if let Some(gamma) = simpo_gamma.filter(|gamma| !gamma.is_finite()) {
            return Err(Error::config("objective.simpo_gamma", gamma, "must be a finite number"));
        }
        if let Some(alpha) = cpo_alpha.filter(|alpha| !(alpha.is_finite() && *alpha >= 0.0)) {
            return Err(Error::config("objective.cpo_alpha", alpha, "must be a finite number ≥ 0"));
        }
        let referenced = losses.iter().any(|loss| loss.needs_reference());
        for (key, path) in [("objective.reference", reference), ("objective.cache", cache)] {
            if let (false, Some(path)) = (referenced, path) {
                let why = "simpo and orpo are held against no other model; leave the key out";
                return Err(Error::config(key, path.display(), why));
            }
        }
        if referenced && reference.is_none() && config.init.is_none() {
            let why = "the loss is held against a reference; write [init] from = a model directory, which is then the reference, or name \
                       one here";
            return Err(Error::config("objective.reference", "(absent)", why));
        }
        no_z_loss(config, "a preference")?;
        let training = &config.training;
        let devices = config.run.devices.len().max(1);
        if !training.batch_size.is_multiple_of(2 * devices) {
            let why = match devices {
                1 => "must be even: the two answers of a pair are two sequences".into(),
                _ => format!("must be a multiple of {}: each of {devices} devices has whole pairs", 2 * devices),
            };
            return Err(Error::config("training.batch_size", training.batch_size, why));
        }
        if let Some(micro) = training.micro_batch_size.filter(|micro| !micro.is_multiple_of(2)) {
            let why = "must be even: the two answers of a pair go through the model together";
            return Err(Error::config("training.micro_batch_size", micro, why));
        }
        Ok(())
    }
}

fn above_zero(key: &'static str, value: f64) -> Result<()> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(Error::config(key, value, "must be a finite number > 0"))
}

fn no_z_loss(config: &RunConfig, what: &str) -> Result<()> {
    if config.training.z_loss == 0.0 {
        return Ok(());
    }
    let why = format!("the log-partition is held with the next token alone, not with {what}; leave the key out");
    Err(Error::config("training.z_loss", config.training.z_loss, why))
}

impl RunConfig {
    /// Refuses objectives that no run can have.
    pub(super) fn check_objective(&self) -> Result<()> {
        match &self.objective[..] {
            [] => Ok(()),
            [only] => only.check(self),
            more => {
                let why = "a run has one; for the loss on the next token beside a teacher, write share in \
                           kind = \"distillation\", and for several preference losses a list as loss_type";
                Err(Error::config("objective", format!("({} entries)", more.len()), why))
            }
        }
    }

    /// The first term of each step.
    pub(crate) fn first_term(&self) -> Term {
        let z_loss = self.training.z_loss;
        self.objective.first().map_or(Term::Next { z_loss }, |section| section.term(z_loss))
    }

    /// Refuses what of the objective has no meaning for a task of vectors, which predicts no tokens.
    pub(crate) fn check_objective_of_vectors(&self) -> Result<()> {
        let z_loss = self.training.z_loss;
        if z_loss != 0.0 {
            let why = "the dataset is a task of vectors, whose loss has no log-partition; leave the key out";
            return Err(Error::config("training.z_loss", z_loss, why));
        }
        match self.objective.first() {
            Some(ObjectiveSection::Distillation { teacher, .. }) => {
                let why = "the dataset is a task of vectors, and a teacher predicts tokens; leave [[objective]] out";
                Err(Error::config("objective.teacher", teacher.display(), why))
            }
            Some(ObjectiveSection::NextToken {} | ObjectiveSection::Preference { .. }) | None => Ok(()),
        }
    }

    /// Refuses data that the objective does not learn from; `pairs`: they are pairs of answers.
    pub(crate) fn check_pairs(&self, pairs: bool, dataset: &str) -> Result<()> {
        match (self.prefers(), pairs) {
            (true, false) => {
                let why = format!(
                    "{dataset} has no pairs of answers; take a dataset of prompt, chosen and rejected, or leave [[objective]] out"
                );
                Err(Error::config("objective.kind", "preference", why))
            }
            (false, true) => {
                let why = "consists of pairs of answers, of which the rejected ones would be learnt as well; write [[objective]] with \
                           kind = \"preference\"";
                Err(Error::config("data.dataset", dataset, why))
            }
            _ => Ok(()),
        }
    }

    /// Floating-point operations of the other model's forward pass over one token of a step. Where what it says is kept, none: over
    /// the epochs of a run they are few.
    pub(crate) fn other_flops_per_token(&self) -> f64 {
        match self.other_model() {
            Some(OtherModel { cache: None, .. }) => {
                self.other_config().map_or(0.0, |other| other.forward_flops_per_token(self.data.seq_len))
            }
            _ => 0.0,
        }
    }

    /// Whether the other model is the frozen base of an adapter, which is there already and changes in no step.
    pub(crate) fn other_is_base(&self, adapter: Option<&AdapterConfig>) -> bool {
        let whole = adapter.is_some_and(|adapter| adapter.modules_to_save.is_none());
        let (Some(init), Some(OtherModel { dir, .. })) = (&self.init, self.other_model()) else { return false };
        whole && same_place(&init.from, dir)
    }

    /// Bytes of the other model's weights, where they are loaded for it. Whoever starts the run says what is wrong with an adapter.
    pub(crate) fn other_bytes(&self) -> usize {
        if self.other_is_base(self.adapter_keys().ok().flatten().as_ref()) {
            return 0;
        }
        self.other_config().map_or(0, |other| other.parameter_count().total * size_of::<f32>())
    }

    /// The other model's sizes. Whoever is to load it says what is wrong with it.
    fn other_config(&self) -> Option<ModelConfig> {
        ModelConfig::read(&self.other_model()?.dir.join("config.json")).ok()
    }

    /// Whether the run learns from pairs of answers.
    pub(crate) fn prefers(&self) -> bool {
        matches!(self.objective[..], [ObjectiveSection::Preference { .. }])
    }

    /// Whether the outputs of the other model's attention are learnt, too.
    pub(crate) fn learns_attention(&self) -> bool {
        let weight = |section: &ObjectiveSection| match section {
            ObjectiveSection::Distillation { attention_weight, .. } => attention_weight.unwrap_or(0.0),
            ObjectiveSection::NextToken {} | ObjectiveSection::Preference { .. } => 0.0,
        };
        self.objective.iter().any(|section| weight(section) > 0.0)
    }

    /// The other model that the objective needs.
    pub(crate) fn other_model(&self) -> Option<OtherModel<'_>> {
        match self.objective.first()? {
            ObjectiveSection::NextToken {} => None,
            ObjectiveSection::Preference { loss_type, reference, cache, .. } => {
                if !loss_type.list().iter().any(|loss| loss.needs_reference()) {
                    return None;
                }
                let (key, dir) = match (reference, &self.init) {
                    (Some(dir), _) => ("objective.reference", dir),
                    (None, Some(init)) => ("init.from", &init.from),
                    (None, None) => return None,
                };
                Some(OtherModel { key, dir, cache: cache.as_deref(), asked: Asked::Rows })
            }
            ObjectiveSection::Distillation { teacher, temperature, top_k, cache, .. } => Some(OtherModel {
                key: "objective.teacher",
                dir: teacher,
                cache: cache.as_deref(),
                asked: Asked::Tokens { top_k: *top_k, temperature: *temperature },
            }),
        }
    }

    /// Forgets where what another model says is kept, which decides nothing.
    pub(crate) fn without_caches(&mut self) {
        for section in &mut self.objective {
            match section {
                ObjectiveSection::NextToken {} => {}
                ObjectiveSection::Preference { cache, .. } | ObjectiveSection::Distillation { cache, .. } => {
                    *cache = None;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
