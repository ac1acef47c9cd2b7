//! The held-out loss of several datasets, each by itself and all together.

use burn::tensor::Device;
use lowkey_model::CausalLm;

use super::{DatasetEvaluation, Evaluation, HeldPart, evaluate_whole};
use crate::error::Result;
use crate::workers::Workers;

/// Evaluates a model on each dataset, without a graph. What is said of all of them is the mean by their weights.
pub(super) fn evaluate(
    model: &CausalLm,
    parts: &[HeldPart],
    byte_lengths: &[u32],
    workers: &Workers,
    device: &Device,
) -> Result<Evaluation> {
    let mut measured = Vec::with_capacity(parts.len());
    for HeldPart { name, weight, held } in parts.iter().filter(|part| !part.held.is_empty()) {
        measured.push((name, *weight, evaluate_whole(model, held, byte_lengths, workers, device)?));
    }
    let sum: f64 = measured.iter().map(|(_, weight, _)| weight).sum();
    // Where one has none of a figure, there is none of all.
    let mean = |figure: fn(&Evaluation) -> Option<f64>| -> Option<f64> {
        let figures: Option<Vec<f64>> =
            measured.iter().map(|(_, weight, evaluation)| Some(weight / sum * figure(evaluation)?)).collect();
        figures.filter(|figures| !figures.is_empty()).map(|figures| figures.iter().sum())
    };
    let loss = mean(|evaluation| Some(evaluation.loss)).unwrap_or(0.0);
    let datasets = measured.iter().map(|(name, weight, evaluation)| DatasetEvaluation {
        dataset: (*name).clone(),
        weight: *weight,
        loss: evaluation.loss,
        perplexity: evaluation.perplexity,
        bits_per_byte: evaluation.bits_per_byte,
        gap: evaluation.gap,
        tokens: evaluation.tokens,
    });
    Ok(Evaluation {
        loss,
        perplexity: Some(loss.exp()),
        bits_per_byte: mean(|evaluation| evaluation.bits_per_byte),
        tokens: measured.iter().map(|(.., evaluation)| evaluation.tokens).sum(),
        bytes: measured.iter().map(|(.., evaluation)| evaluation.bytes).sum(),
        max_logit: measured.iter().map(|(.., evaluation)| evaluation.max_logit).fold(0.0, f64::max),
        gap: mean(|evaluation| evaluation.gap),
        datasets: datasets.collect(),
        // Those of the first, as everywhere on its first rows.
        latents: measured.into_iter().next().map(|(.., evaluation)| evaluation.latents).unwrap_or_default(),
        ..Evaluation::default()
    })
}
