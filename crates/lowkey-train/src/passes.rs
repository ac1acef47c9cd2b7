//! Which passes a step takes, and what a run of them costs.
//!
//! A step trains the whole width; of a model whose latent is elastic, from a share of the run on, narrower ranks as well. Which
//! ones follows the sandwich rule of slimmable networks (Yu & Huang, arXiv 1903.05134, section 3.1): every step trains the widest
//! and the narrowest, which bound all others, and draws from those between. A step costs as many passes however many ranks there
//! are. Whoever needs to know what a step or a run costs asks here, where the training loop asks what to do.

use lowkey_model::{ModelConfig, objective::Term};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::run_config::RunConfig;

/// The passes that each step of a run takes.
#[derive(Clone, Debug)]
pub struct Passes {
    /// Ranks below the whole one, ascending.
    ranks: Vec<usize>,
    /// The first step that trains them.
    from: u64,
    steps: u64,
    seed: u64,
    /// Tokens of a step.
    tokens: f64,
    /// Operations of one pass over one token.
    per_token: f64,
    /// What another model computes for a token of each step.
    other: f64,
    /// The first term of each step.
    first: Term,
    distillation: f64,
}

impl Passes {
    /// Those of a run with the given model.
    pub fn new(config: &RunConfig, model: &ModelConfig) -> Self {
        let training = &config.training;
        Self {
            ranks: model.elastic_ranks(),
            from: config.narrower_ranks_join(),
            steps: training.steps,
            seed: config.run.seed,
            tokens: training.batch_size as f64 * config.data.seq_len as f64,
            per_token: model.pass_flops_per_token(config.data.seq_len) + config.flops_beside(model),
            other: config.other_flops_per_token(),
            first: config.first_term(),
            distillation: training.distillation,
        }
    }

    /// What a step minimises: a term for each of its passes.
    pub(crate) fn terms(&self, step: u64) -> Vec<Term> {
        let distillation = self.distillation;
        let narrow = if step >= self.from { narrow_ranks(&self.ranks, self.seed, step) } else { Vec::new() };
        let narrow = narrow.into_iter().map(|rank| Term::Prefix { rank, distillation });
        std::iter::once(self.first.clone()).chain(narrow).collect()
    }

    /// The most that a step of the run has: narrower ranks that join do not leave again.
    pub(crate) fn most_terms(&self) -> usize {
        self.terms(self.steps.saturating_sub(1)).len()
    }

    /// What the terms of a step cost, in passes.
    fn of_step(&self, step: u64) -> f64 {
        self.terms(step).iter().map(Term::passes).sum()
    }

    /// The same of all steps: those before the narrower ranks join cost alike, and so do those from there on.
    fn in_all(&self) -> f64 {
        let alone = self.from.min(self.steps);
        alone as f64 * self.of_step(0) + (self.steps - alone) as f64 * self.of_step(self.from)
    }

    /// Floating-point operations of a step over one token, all its passes together.
    pub(crate) fn flops_per_token(&self, step: u64) -> f64 {
        self.of_step(step) * self.per_token + self.other
    }

    /// The same as a mean over the steps of the run.
    pub fn mean_flops_per_token(&self) -> f64 {
        self.per_token * self.in_all() / self.steps.max(1) as f64 + self.other
    }

    /// Floating-point operations of the whole run.
    pub fn flops(&self) -> f64 {
        self.per_token * self.tokens * self.in_all() + self.other * self.tokens * self.steps as f64
    }
}

/// The ranks of a step's further passes: of `ranks`, ascending, the first and one of the others. The same for the same seed and
/// step, so that a resumed run draws what the uninterrupted one does.
fn narrow_ranks(ranks: &[usize], seed: u64, step: u64) -> Vec<usize> {
    let Some((narrowest, between)) = ranks.split_first() else { return Vec::new() };
    let mut drawn = vec![*narrowest];
    if !between.is_empty() {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        random.set_stream(step);
        drawn.push(between[random.random_range(0..between.len())]);
    }
    drawn
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_has_its_turn_and_the_narrowest_each() {
        assert!(narrow_ranks(&[], 3, 0).is_empty());
        assert_eq!(narrow_ranks(&[4], 3, 9), [4]);
        assert_eq!(narrow_ranks(&[4, 8], 3, 9), [4, 8]);
        let ranks = [2, 4, 8, 16];
        let mut counts = [0; 3];
        for step in 0..600 {
            let drawn = narrow_ranks(&ranks, 7, step);
            assert_eq!((drawn.len(), drawn[0]), (2, 2));
            assert_eq!(drawn, narrow_ranks(&ranks, 7, step));
            counts[ranks.iter().position(|rank| *rank == drawn[1]).unwrap() - 1] += 1;
        }
        // Four standard deviations of a third of 600.
        assert!(counts.iter().all(|count| (154..=246).contains(count)), "{counts:?}");
    }

    #[test]
    fn a_run_costs_what_its_steps_cost_one_by_one() {
        for ranks in [vec![], vec![4], vec![4, 8], vec![4, 8, 16]] {
            for (steps, start) in [(1, 0.3), (10, 0.3), (33, 0.3), (100, 0.3), (100, 0.0), (100, 0.999), (7, 1.0)] {
                let from = (start * steps as f64).ceil() as u64;
                let distillation = 0.5;
                let passes = Passes {
                    ranks: ranks.clone(),
                    from,
                    steps,
                    seed: 5,
                    tokens: 6.0,
                    per_token: 2.0,
                    other: 3.0,
                    first: Term::NEXT,
                    distillation,
                };
                // The narrower ranks join at that share of the run, not a step before.
                for step in 0..steps {
                    let joined = step as f64 >= start * steps as f64;
                    assert_eq!(passes.terms(step).len() > 1, joined && !ranks.is_empty(), "{step} of {steps}");
                }
                let most = (0..steps).map(|step| passes.terms(step).len()).max();
                assert_eq!(Some(passes.most_terms()), most, "{ranks:?} {steps} {start}");
                let one_by_one: f64 = (0..steps).map(|step| 6.0 * passes.flops_per_token(step)).sum();
                assert_eq!(passes.flops(), one_by_one, "{ranks:?} {steps} {start}");
                assert!((passes.mean_flops_per_token() * 6.0 * steps as f64 / one_by_one - 1.0).abs() < 1e-12);
            }
        }
    }
}
