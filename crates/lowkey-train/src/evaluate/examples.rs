//! Loss and accuracy on the held-out examples of a task.

use burn::tensor::Device;
use lowkey_batch::{Batch, IGNORE};
use lowkey_data::tasks::{AnswerBatch, HeldExamples};
use lowkey_model::CausalLm;

use super::{ClassEvaluation, Evaluation, Looks, look};
use crate::error::{Error, Result};
use crate::workers::Workers;

/// Evaluates a model on the examples of a task; both without a graph.
pub(super) fn evaluate(
    model: &CausalLm,
    held: &HeldExamples,
    workers: &Workers,
    device: &Device,
) -> Result<Evaluation> {
    match held {
        HeldExamples::Tokens(batches, names) => tokens(model, batches, names, workers, device),
        HeldExamples::Vectors(batches) => vectors(model, batches, workers, device),
    }
}

/// Answers of one class, added up.
#[derive(Clone, Copy, Default)]
struct Sum {
    answers: usize,
    right: usize,
    nats: f64,
}

fn tokens(
    model: &CausalLm,
    batches: &[AnswerBatch],
    names: &[&str],
    workers: &Workers,
    device: &Device,
) -> Result<Evaluation> {
    let unreadable = |why: String| Error::Device { what: "the answers", why };
    let answers = workers.map_on_ranks(batches, |AnswerBatch { batch, .. }| -> Result<(Vec<f32>, Vec<i64>)> {
        let (losses, best) = model.answers(batch.all(), device);
        let losses = losses.try_into_vec_as::<f32>().map_err(|e| unreadable(format!("{e:?}")))?;
        Ok((losses, best.try_into_vec_as::<i64>().map_err(|e| unreadable(format!("{e:?}")))?))
    })?;
    let mut sums = vec![Sum::default(); names.len()];
    for (AnswerBatch { batch, classes }, (losses, best)) in batches.iter().zip(answers) {
        let answers = batch.targets.iter().zip(&best).zip(losses.iter().zip(classes));
        for ((target, best), (loss, class)) in answers.filter(|((target, _), _)| **target != IGNORE) {
            if let Some(sum) = sums.get_mut(usize::from(*class)) {
                sum.answers += 1;
                sum.right += usize::from(best == target);
                sum.nats += f64::from(*loss);
            }
        }
    }
    let all = sums.iter().fold(Sum::default(), |all, sum| Sum {
        answers: all.answers + sum.answers,
        right: all.right + sum.right,
        nats: all.nats + sum.nats,
    });
    let mean = |total: f64, sum: &Sum| total / sum.answers.max(1) as f64;
    let loss = mean(all.nats, &all);
    let class = |(name, sum): (&&str, &Sum)| ClassEvaluation {
        class: (*name).to_owned(),
        tokens: sum.answers,
        loss: mean(sum.nats, sum),
        // An answer follows from what was read.
        entropy: 0.0,
        gap: mean(sum.nats, sum),
        accuracy: Some(mean(sum.right as f64, sum)),
    };
    let Looks { max_logit, latents } = look(model, batches.first().map(|held| &held.batch), device)?;
    Ok(Evaluation {
        loss,
        perplexity: Some(loss.exp()),
        accuracy: Some(mean(all.right as f64, &all)),
        tokens: all.answers,
        max_logit,
        gap: Some(loss),
        classes: names.iter().zip(&sums).filter(|(_, sum)| sum.answers > 0).map(class).collect(),
        latents,
        ..Evaluation::default()
    })
}

fn vectors(model: &CausalLm, batches: &[Batch], workers: &Workers, device: &Device) -> Result<Evaluation> {
    let errors = workers.map_on_ranks(batches, |batch| {
        let errors = model.losses(batch.all(), device, None).try_into_vec_as::<f32>();
        errors.map_err(|e| Error::Device { what: "the errors", why: format!("{e:?}") })
    })?;
    let (mut total, mut tokens) = (0.0, 0);
    for (batch, errors) in batches.iter().zip(errors) {
        // 0 where nothing is asked.
        total += errors.into_iter().map(f64::from).sum::<f64>();
        tokens += batch.target_tokens();
    }
    let mse = total / tokens.max(1) as f64;
    let Looks { max_logit, latents } = look(model, batches.first(), device)?;
    Ok(Evaluation { loss: mse, mse: Some(mse), tokens, max_logit, latents, ..Evaluation::default() })
}

#[cfg(test)]
mod tests;
