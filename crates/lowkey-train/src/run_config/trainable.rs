//! Which tensors of a model a run trains.

use glob::Pattern;
use lowkey_model::{
    CausalLm, ModelConfig,
    adapter::AdapterPlan,
    tensor::{Role, TensorSpec},
};

use super::RunConfig;
use crate::error::{Error, Result};

/// The key, as messages call it.
const KEY: &str = "training.trainable";

/// What a run does with the weights of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Weights {
    /// Numbers that it does not train,
    pub(crate) frozen: usize,
    /// and of adapters that it trains beside them.
    pub(crate) added: usize,
    /// Bytes that frozen matrices take less because they are packed.
    pub(crate) spared: usize,
}

impl RunConfig {
    /// The patterns of [`TrainingSection::trainable`](super::TrainingSection::trainable); `None`: everything is trained.
    ///
    /// # Errors
    /// [`Error::Config`] for what is no pattern, or none at all.
    pub(super) fn trainable(&self) -> Result<Option<Vec<Pattern>>> {
        let Some(patterns) = &self.training.trainable else { return Ok(None) };
        if patterns.is_empty() {
            return Err(Error::config(KEY, "[]", "nothing would be trained; leave the key out to train everything"));
        }
        let parsed = |text: &String| {
            Pattern::new(text).map_err(|e| Error::config(KEY, text, format!("is no pattern of names: {e}")))
        };
        patterns.iter().map(parsed).collect::<Result<Vec<_>>>().map(Some)
    }

    /// The model with everything frozen but what the run trains.
    ///
    /// # Errors
    /// [`Error::Config`] for a pattern that no tensor's name matches.
    pub(crate) fn frozen(&self, model: CausalLm) -> Result<CausalLm> {
        let Some(patterns) = self.trainable()? else { return Ok(model) };
        for pattern in &patterns {
            if !model.tensors().iter().any(|spec| pattern.matches(&spec.name)) {
                let names: Vec<&str> = model.tensors().iter().map(|spec| spec.name.as_str()).take(4).collect();
                let why = format!("no tensor of the model has such a name; they are called {}, …", names.join(", "));
                return Err(Error::config(KEY, pattern.as_str(), why));
            }
        }
        Ok(model.with_trained(|spec| patterns.iter().any(|pattern| pattern.matches(&spec.name))))
    }

    /// What a run does with the weights of a model.
    pub(crate) fn weights(&self, model: &ModelConfig) -> Weights {
        let tensors = model.tensors();
        let (trained, plan) = self.trained(model);
        let frozen = tensors.iter().filter(|spec| !trained(spec)).map(|spec| spec.shape.iter().product::<usize>());
        let (added, spared) = plan.map_or((0, 0), |plan| (plan.numbers(&tensors), plan.bytes_spared(&tensors)));
        Weights { frozen: frozen.sum(), added, spared }
    }

    /// Which of a model's tensors the run trains, and its adapters. Whoever starts the run says what is wrong with either.
    fn trained(&self, model: &ModelConfig) -> (impl Fn(&TensorSpec) -> bool + use<>, Option<AdapterPlan>) {
        let (patterns, plan) = (self.trainable().ok().flatten(), self.plan_adapter(model).ok().flatten());
        let adapters = plan.clone();
        let trained = move |spec: &TensorSpec| match (&plan, &patterns) {
            (Some(plan), _) => plan.trains(spec),
            (None, Some(patterns)) => patterns.iter().any(|pattern| pattern.matches(&spec.name)),
            (None, None) => true,
        };
        (trained, adapters)
    }

    /// [`flops_beside`] of what the run trains.
    pub(crate) fn flops_beside(&self, model: &ModelConfig) -> f64 {
        let (trained, plan) = self.trained(model);
        flops_beside(model, trained, plan.as_ref())
    }
}

/// What a pass over one token costs more (or, negative, less) than one that trains all weights of the model: two operations less for each
/// that no gradient is formed of, six more for each number of an adapter's factors.
pub(crate) fn flops_beside(
    model: &ModelConfig,
    trained: impl Fn(&TensorSpec) -> bool,
    adapters: Option<&AdapterPlan>,
) -> f64 {
    let tensors = model.tensors();
    let added = adapters.map_or(0, |plan| plan.factor_numbers(&tensors));
    let multiplied =
        |spec: &&TensorSpec| spec.role.is_matrix() && (spec.role != Role::Embedding || model.tie_word_embeddings);
    let frozen = tensors.iter().filter(multiplied).filter(|spec| !trained(spec));
    let frozen: usize = frozen.map(|spec| spec.shape.iter().product::<usize>()).sum();
    6.0 * added as f64 - 2.0 * frozen as f64
}
