//! One optimiser step: gradients, a check that all is finite, clipping, new weights.

use std::collections::BTreeMap;

use lowkey_batch::Batch;
use lowkey_kernels::optim::{Fault, Gate, Judgement, Terms, Verdict, clip_factor};
use lowkey_model::CausalLm;
use lowkey_model::objective::Figures;

use crate::error::{Error, Result};
use crate::loss_scale::LossScale;
use crate::optimizer::{Update, global_norm};
use crate::workers::{PassSettings, StepGradients};
use crate::world::{Replica, World};

/// What stays the same from step to step.
pub(crate) struct StepSettings<'a> {
    /// How gradients are computed.
    pub(crate) passes: PassSettings<'a>,
    /// Largest global norm of the gradient.
    pub(crate) grad_clip: Option<f64>,
}

/// A step that was taken, or will be once the device comes to it.
#[derive(Debug)]
pub(crate) struct StepTaken {
    /// Steps before it.
    step: u64,
    /// Rows of its batch.
    rows: u64,
    /// Targets of its batch.
    pub(crate) targets: usize,
    /// What its terms tell beside their loss,
    figures: Figures,
    /// as means over so many targets or pairs.
    count: usize,
    outcome: Outcome,
}

/// What is known of a step once it is over.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct StepFigures {
    /// Mean loss per target before it: nats, or the squared error per number; of pairs the mean per pair.
    pub(crate) loss: f64,
    /// Global norm of the gradient before clipping.
    pub(crate) norm: f64,
    /// What its terms tell beside, by name.
    pub(crate) named: BTreeMap<String, f64>,
}

#[derive(Debug)]
enum Outcome {
    /// The host has decided, and has read these sums of the figures.
    Known(Judgement, Vec<f32>),
    /// The device will have decided, and has not written anything if the step was impossible.
    Queued(Box<Verdict>),
}

impl Outcome {
    /// Waits for the device where it is the one that decides.
    fn wait(self) -> Result<(Judgement, Vec<f32>)> {
        match self {
            Self::Known(judgement, sums) => Ok((judgement, sums)),
            Self::Queued(verdict) => verdict.wait().map_err(|why| Error::Device { what: "a step's loss", why }),
        }
    }
}

impl StepTaken {
    /// Whether the host already knows the outcome.
    pub(crate) fn is_known(&self) -> bool {
        matches!(self.outcome, Outcome::Known(..))
    }

    /// What is known of the step. Waits for the device.
    ///
    /// # Errors
    /// [`Error::NonFinite`], with model and optimiser as they were before the step, where loss or gradient is no number;
    /// [`Error::Device`] where the device does not answer.
    pub(crate) fn wait(self, model: &CausalLm) -> Result<StepFigures> {
        let (judgement, sums) = self.outcome.wait()?;
        match judgement.fault {
            None => {
                let named = self.figures.means(&sums, self.count);
                Ok(StepFigures { loss: judgement.loss, norm: judgement.norm, named })
            }
            Some(fault) => Err(non_finite(self.step, self.rows, fault, judgement, model)),
        }
    }
}

fn non_finite(step: u64, rows: u64, fault: Fault, judgement: Judgement, model: &CausalLm) -> Error {
    let (what, value) = match fault {
        Fault::Loss => ("the loss".to_owned(), judgement.loss),
        Fault::Gradient(i) => {
            let name = model.trained_parameters().into_iter().nth(i).map_or_else(|| "?".into(), |p| p.name);
            (format!("the gradient of {name}"), judgement.norm)
        }
        Fault::Norm => ("the norm of all gradients".to_owned(), judgement.norm),
    };
    let (first_row, last_row) = (step * rows, (step + 1) * rows - 1);
    Error::NonFinite { step: step + 1, what, value, first_row, last_row, kept: None }
}

impl StepSettings<'_> {
    /// Takes one step on `batch`; `step` counts those before it.
    ///
    /// On the CPU it is over when this returns. On a GPU it is queued, with the decision whether it may be taken: where the loss or a
    /// gradient is no number, the device leaves model and optimiser as they are, in this and all later steps.
    ///
    /// With a loss scale, a gradient that overflows makes it smaller, and the step is computed again: that is waited for.
    ///
    /// # Errors
    /// As [`StepTaken::wait`], for what is known at once.
    pub(crate) fn step(
        &self,
        world: &mut World,
        batch: &Batch,
        step: u64,
        lr: f64,
        mut scale: Option<&mut LossScale>,
    ) -> Result<StepTaken> {
        let rows = batch.rows as u64;
        let (results, decision) = loop {
            let factor = scale.as_ref().map_or(1.0, |scale| scale.factor);
            let passes = PassSettings { loss_scale: factor, step, ..self.passes };
            let results = world.gradients(batch, passes)?;
            let mut decision = self.decide(world, &results, factor, scale.is_some())?;
            if let Some(scale) = scale.as_deref_mut() {
                let (judgement, sums) = decision.outcome.wait()?;
                match judgement.fault {
                    None => scale.passed(),
                    // A loss that is no number is none at any scale.
                    Some(Fault::Gradient(_) | Fault::Norm) if scale.overflowed() => continue,
                    Some(_) => {}
                }
                decision.outcome = Outcome::Known(judgement, sums);
            }
            break (results, decision);
        };
        let targets = batch.target_tokens();
        let (figures, count) =
            results.first().map_or_else(Default::default, |result| (result.figures.clone(), result.targets));
        let taken = |outcome| StepTaken { step, rows, targets, figures, count, outcome };
        let Decision { outcome, gates, clip } = decision;
        if let Outcome::Known(judgement, _) = &outcome
            && let Some(fault) = judgement.fault
        {
            return Err(non_finite(step, rows, fault, *judgement, &world.main().model));
        }
        let precision = self.passes.precision;
        world.update(results, gates, |gate| Update { clip, lr, gate, precision })?;
        Ok(taken(outcome))
    }

    /// Computes the gradients of a batch, and steps on zeros, and forgets them: afterwards kernels are compiled and chosen. Of several
    /// ranks each does so by itself.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub(crate) fn warm_up(&self, world: &World, batch: &Batch) -> Result<()> {
        // A kernel that could not be compiled is told by what it has left unwritten: the loss is read.
        for gradients in world.own_gradients(batch, self.passes)? {
            gradients.loss()?;
        }
        world.warm_up_optimizers(self.passes.precision);
        world.finish()
    }

    /// Whether the step may be taken: where the gradients lie, if that is a GPU.
    ///
    /// `anew`: whatever was decided before has been dealt with.
    fn decide(&self, world: &World, results: &[StepGradients], factor: f64, anew: bool) -> Result<Decision> {
        let main = world.main();
        let Some(result) = results.first() else { unreachable!("there is a replica") };
        let terms = Terms { mean: result.mean(), scale: factor, limit: self.grad_clip };
        let judge = |(replica, result): (&Replica, &StepGradients)| {
            let before = if anew { None } else { replica.gate.as_ref() };
            Gate::of(&result.losses, &result.gradients, terms, before)
        };
        let gates: Vec<Option<Gate>> = world.members().iter().zip(results).map(judge).collect();
        // All of them judge the same sums.
        if let Some(Some(gate)) = gates.first() {
            let verdict = Box::new(gate.ask(result.figures.on_device()));
            return Ok(Decision { outcome: Outcome::Queued(verdict), gates, clip: 1.0 });
        }
        let loss = result.loss()?;
        let (norm, fault) = match main.workers.together(|| global_norm(&result.gradients)) {
            _ if !loss.is_finite() => (0.0, Some(Fault::Loss)),
            Ok(norm) => (norm / factor, None),
            Err((i, value)) => (value, Some(Fault::Gradient(i))),
        };
        let clip = self.grad_clip.map_or(1.0, |limit| clip_factor(norm, limit)) / factor;
        let sums = result.figures.on_device().into_iter().map(|sum| sum.try_into_scalar::<f32>());
        let sums = sums.collect::<std::result::Result<Vec<f32>, _>>();
        let sums = sums.map_err(|e| Error::Device { what: "a figure of the step", why: format!("{e:?}") })?;
        Ok(Decision { outcome: Outcome::Known(Judgement { loss, norm, fault }, sums), gates, clip })
    }
}

struct Decision {
    outcome: Outcome,
    /// Of each replica.
    gates: Vec<Option<Gate>>,
    /// The host's factor on the gradients.
    clip: f64,
}

#[cfg(test)]
mod tests {
    use lowkey_model::objective::Term;

    use super::*;
    use crate::fixtures::{bits, passes, replica, uneven_batch, weight_bits};
    use crate::run_config::OptimizerKind;

    /// Weights and the optimiser's memory.
    fn state(world: &World) -> Vec<u32> {
        let Replica { model, optimizer, .. } = world.main();
        let states = optimizer.state().0.iter().flat_map(|state| state.tensors()).map(|(_, tensor)| tensor);
        weight_bits(model).into_iter().chain(bits(states)).collect()
    }

    #[test]
    fn a_step_that_is_no_number_changes_nothing_and_neither_does_what_was_queued_after_it() {
        for kind in [OptimizerKind::AdamW, OptimizerKind::Muon] {
            let mut world = World::new(replica(kind), vec![replica(kind)]);
            let good = StepSettings { passes: passes(4), grad_clip: Some(0.5) };
            let bad = StepSettings {
                passes: PassSettings { terms: &[Term::Next { z_loss: f64::INFINITY }], ..passes(4) },
                grad_clip: Some(0.5),
            };
            let batch = |step| uneven_batch(4, 11, 29, step);
            let mut norms = Vec::new();
            for step in 0..2 {
                let taken = good.step(&mut world, &batch(step), step, 1e-2, None).unwrap();
                norms.push(taken.wait(&world.main().model).unwrap().norm);
            }
            assert!(norms.iter().all(|norm| norm.is_finite() && *norm > 0.5), "{norms:?}");
            let before = state(&world);
            let model = world.main().model.clone();
            let error = match bad.step(&mut world, &batch(2), 2, 1e-2, None) {
                // The CPU, which waits for itself.
                Err(error) => error,
                Ok(taken) => {
                    assert!(!taken.is_known());
                    drop(good.step(&mut world, &batch(3), 3, 1e-2, None).unwrap());
                    taken.wait(&model).unwrap_err()
                }
            };
            let Error::NonFinite { step, first_row, last_row, value, .. } = error else { panic!("{error}") };
            assert_eq!((step, first_row, last_row), (3, 8, 11));
            assert!(!value.is_finite());
            assert!(state(&world) == before, "{kind:?}: something was written");
            assert!(world.agree());
        }
    }

    #[test]
    fn a_step_is_the_same_whether_anybody_waits_for_it() {
        let run = |wait: bool| {
            let mut world = World::new(replica(OptimizerKind::AdamW), Vec::new());
            let settings = StepSettings { passes: passes(2), grad_clip: Some(0.5) };
            let mut queued = Vec::new();
            for step in 0..5 {
                let taken = settings.step(&mut world, &uneven_batch(4, 11, 29, step), step, 1e-2, None).unwrap();
                if wait {
                    world.finish().unwrap();
                }
                queued.push(taken);
            }
            let model = world.main().model.clone();
            let judged: Vec<_> = queued.into_iter().map(|taken| taken.wait(&model).unwrap()).collect();
            (judged, state(&world))
        };
        assert!(run(true) == run(false));
    }
}
