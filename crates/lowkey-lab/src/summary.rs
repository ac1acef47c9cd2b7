//! The arms of a study in numbers.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::stats::{Mean, holm};
use crate::study::{Arm, Rule, Study};

/// What all seeds of an arm say.
#[derive(Clone, Debug, Serialize)]
pub struct ArmSummary {
    /// The arm.
    pub arm: Arm,
    /// The metric over its finished seeds; absent where none is.
    pub metric: Option<Mean>,
    /// Its difference to the baseline, seed by seed; absent for the baseline, and where no seed is finished in both.
    pub difference: Option<Mean>,
    /// Margin rule: p-value of the claim that the difference lies outside of the margin, by Holm's correction for all arms; absent
    /// until every seed is finished.
    pub p_differs: Option<f64>,
    /// The same of the claim that it lies within: two one-sided tests.
    pub p_equal: Option<f64>,
}

/// A study in numbers.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The arms in the order of the file.
    pub arms: Vec<ArmSummary>,
    /// Finished runs.
    pub finished: usize,
    /// Runs that the experiment has.
    pub planned: usize,
    /// What the rule says, in sentences.
    pub verdict: Vec<String>,
    /// Why there is no verdict, where something speaks against any.
    pub objections: Vec<String>,
}

impl Study {
    /// The share that intervals hold the truth in.
    pub(crate) fn confidence(&self) -> f64 {
        self.rule.confidence()
    }

    /// What the rule may be called: written beforehand only where nothing speaks against it.
    pub(crate) fn rule_is(&self) -> &'static str {
        if self.objections.is_empty() && !self.runs.is_empty() { "Rule, as written before the runs" } else { "Rule" }
    }

    /// The metric of an arm by seed.
    pub(crate) fn values(&self, arm: usize) -> BTreeMap<u64, f64> {
        self.values_of(arm, &self.metric)
    }

    /// A figure of an arm by seed.
    pub(crate) fn values_of(&self, arm: usize, figure: &str) -> BTreeMap<u64, f64> {
        let runs = self.runs.iter().filter(|run| run.arm == arm);
        runs.filter_map(|run| Some((run.seed, *run.metrics.get(figure)?))).collect()
    }

    /// Means, paired differences, and what the rule makes of them.
    pub fn summary(&self) -> Summary {
        let base = self.values(self.baseline);
        let arms: Vec<ArmSummary> = self
            .arms
            .iter()
            .enumerate()
            .map(|(i, arm)| {
                let values = self.values(i);
                let all: Vec<f64> = values.values().copied().collect();
                let pairs: Vec<f64> = values.iter().filter_map(|(seed, value)| Some(value - base.get(seed)?)).collect();
                ArmSummary {
                    arm: arm.clone(),
                    metric: Mean::of(&all, self.confidence()),
                    difference: Mean::of(&pairs, self.confidence()).filter(|_| i != self.baseline),
                    p_differs: None,
                    p_equal: None,
                }
            })
            .collect();
        let mut arms = arms;
        self.judge(&mut arms);
        let (finished, planned) = (self.runs.len(), self.arms.len() * self.seeds.len());
        let mut verdict = self.verdict(&arms);
        if finished < planned {
            verdict.insert(0, format!("Preliminary: {finished} of {planned} runs are finished."));
        }
        if self.objections.is_empty() && finished > 0 && matches!(self.rule, Rule::Margin { .. }) {
            verdict.push(self.on_many());
        }
        verdict.extend(self.notes.iter().cloned());
        Summary { arms, finished, planned, verdict, objections: self.objections.clone() }
    }

    /// Gives each arm of which all seeds are finished its p-values against the margin, corrected for all arms that the experiment has:
    /// those that are not finished yet could still say anything.
    fn judge(&self, arms: &mut [ArmSummary]) {
        let Rule::Margin { margin, .. } = self.rule else { return };
        let compared: Vec<usize> = (0..arms.len()).filter(|i| *i != self.baseline).collect();
        let complete = |arm: &ArmSummary| arm.difference.filter(|difference| difference.n == self.seeds.len());
        let of = |p: fn(&Mean, f64) -> Option<f64>| -> Vec<Option<f64>> {
            let own: Vec<Option<f64>> = compared.iter().map(|i| p(&complete(&arms[*i])?, margin)).collect();
            let adjusted = holm(&own.iter().map(|p| p.unwrap_or(1.0)).collect::<Vec<_>>());
            own.iter().zip(adjusted).map(|(own, adjusted)| own.map(|_| adjusted)).collect()
        };
        let (differs, equal) = (of(Mean::p_outside), of(Mean::p_within));
        for ((i, differs), equal) in compared.into_iter().zip(differs).zip(equal) {
            (arms[i].p_differs, arms[i].p_equal) = (differs, equal);
        }
    }
}

#[cfg(test)]
mod stored;
#[cfg(test)]
mod tests;
