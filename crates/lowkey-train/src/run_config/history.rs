//! Runs that were made longer or shorter on their way.
//!
//! The learning rate and the step at which narrower ranks join both follow from `training.steps`. A resumed run may have another
//! number than it began with: which steps were taken under which is kept, so that the run can be taken again from its first step.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::RunConfig;

/// One entry of `[[history]]`: a plan that a run had before it was resumed with another `training.steps`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EarlierPlan {
    /// Steps that had been taken when the plan changed. The entry holds for the steps after the entry before, up to this one.
    #[schemars(range(min = 1))]
    pub until: u64,
    /// What `training.steps` was then.
    #[schemars(range(min = 1))]
    pub steps: u64,
}

impl RunConfig {
    /// The number of steps that the run is planned for when it takes step `step`, counted from 0.
    pub(crate) fn planned_steps(&self, step: u64) -> u64 {
        let earlier = self.history.iter().find(|plan| step < plan.until);
        earlier.map_or(self.training.steps, |plan| plan.steps)
    }

    /// The learning rate of step `step`, counted from 0.
    pub fn rate(&self, step: u64) -> f64 {
        self.lr_scheduler.rate(step, self.planned_steps(step), self.optimizer.lr)
    }

    /// The first step, counted from 0, that trains an elastic model's narrower ranks as well. Once they have joined they stay, also
    /// where the run is made longer.
    pub(crate) fn narrower_ranks_join(&self) -> u64 {
        let joins = |steps: u64| (self.training.elastic_start * steps as f64).ceil() as u64;
        let mut from = 0;
        for plan in &self.history {
            let first = joins(plan.steps).max(from);
            if first < plan.until {
                return first;
            }
            from = plan.until;
        }
        joins(self.training.steps).max(from)
    }

    /// Takes over how a run that is gone on with after `taken` steps was planned so far.
    pub(crate) fn continue_after(&mut self, earlier: &Self, taken: u64) {
        let mut history = earlier.history.clone();
        if self.training.steps != earlier.training.steps {
            history.push(EarlierPlan { until: taken, steps: earlier.training.steps });
            // Steps of a session that left no checkpoint are taken again, under the new plan.
            let mut from = 0;
            history.retain_mut(|plan| {
                plan.until = plan.until.min(taken);
                let begun = from < plan.until;
                from = from.max(plan.until);
                begun
            });
        }
        self.history = history;
    }
}

#[cfg(test)]
mod tests;
