//! How well a model tells chosen answers from rejected ones.

use burn::module::Module;
use burn::tensor::Device;
use lowkey_batch::Batch;
use lowkey_model::CausalLm;
use lowkey_model::objective::{
    Figures,
    preference::{PairFigures, Preference},
};

use super::{Evaluation, Looks, look};
use crate::error::Result;
use crate::other_model::Counterpart;
use crate::workers::Workers;

/// Evaluates a model on pairs of answers, as a run that learns from them minimises their loss.
///
/// # Errors
/// [`Error::Device`](crate::Error::Device) where a logit cannot be read back; [`Error::Io`](crate::Error::Io) where what the reference said cannot be kept.
pub(crate) fn evaluate_pairs(
    model: &CausalLm,
    preference: &Preference,
    reference: Option<&Counterpart>,
    batches: &[Batch],
    workers: &Workers,
    device: &Device,
) -> Result<Evaluation> {
    let (model, device) = (model.valid(), device.clone().without_autodiff());
    let figures = workers.map_on_ranks(batches, |batch| {
        let (sums, tokens) = model.row_log_probs(batch.all(), &device);
        let of_reference = reference.map(|reference| reference.measures(batch.all()));
        reference.map_or(Ok(()), Counterpart::in_order)?;
        Ok(preference.judge_rows(&sums, &tokens, of_reference.as_deref()).1)
    })?;
    let add = |mut sum: PairFigures, more| {
        sum.add(more);
        sum
    };
    let figures = figures.into_iter().reduce(add).unwrap_or_default();
    let Looks { max_logit, latents } = look(&model, batches.first(), &device)?;
    Ok(Evaluation {
        loss: figures.mean_loss(),
        tokens: batches.iter().map(Batch::target_tokens).sum(),
        max_logit,
        latents,
        pairs: Figures::from(figures).means(&[], figures.pairs),
        ..Evaluation::default()
    })
}
