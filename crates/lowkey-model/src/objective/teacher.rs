//! Learning from another model's predictions (Hinton et al., arXiv 1503.02531).

use burn::tensor::{Device, Tensor};
use lowkey_batch::{IGNORE, Rows};
use lowkey_kernels::loss::{self, Divergence, TopTokens, diverge_sum};

use super::{Lesson, Teacher};
use crate::model::CausalLm;

/// Logits that are on the host at a time, about.
const LOGITS: usize = 1 << 22;

impl CausalLm {
    /// The summed distance of what follows from `hidden [rows · seq, d]` from what a teacher predicts, see [`diverge_sum`]; `lesson` is
    /// its pass, where that was taken.
    pub(super) fn distance_to(
        &self,
        teacher: Teacher,
        lesson: Option<&Lesson>,
        hidden: Tensor<2>,
        batch: Rows,
        divergence: Divergence,
    ) -> Tensor<1> {
        let teacher = match teacher {
            Teacher::Model(model) => {
                let pass = || model.last_hidden(batch, None, &hidden.device().inner(), None);
                let taught = lesson.map_or_else(pass, |lesson| lesson.hidden.clone());
                loss::Teacher::Whole(taught, model.head_weight())
            }
            Teacher::Top(top) => loss::Teacher::Top(top),
        };
        diverge_sum(hidden, self.head_weight(), teacher, batch.targets, divergence)
    }

    /// The `k` tokens that the model holds likeliest at each position that has a target, with their log-probabilities at a temperature
    /// and that of all others. Without a graph; waits for the device, and of one that does not answer there are no numbers.
    ///
    /// `k` must be below the size of the vocabulary.
    pub fn top_tokens(&self, batch: Rows, k: usize, temperature: f64, device: &Device) -> TopTokens {
        let hidden = self.last_hidden(batch, None, device, None);
        let ([n, d], head) = (hidden.dims(), self.head_weight());
        let vocab = self.config.vocab_size;
        let mut top = TopTokens { k, ..TopTokens::default() };
        let block = (LOGITS / vocab).clamp(1, 512);
        for from in (0..n).step_by(block) {
            let size = block.min(n - from);
            let targets = &batch.targets[from..from + size];
            if targets.iter().all(|target| *target == IGNORE) {
                continue;
            }
            let h = hidden.clone().narrow(0, from, size).reshape([1, size, d]);
            let logits = lowkey_kernels::linear(h, head.clone(), None).try_into_vec_as::<f32>();
            let logits = logits.unwrap_or_else(|_| vec![f32::NAN; size * vocab]);
            for (logits, _) in logits.chunks(vocab).zip(targets).filter(|(_, target)| **target != IGNORE) {
                push_top(&mut top, logits, temperature);
            }
        }
        top
    }
}

/// Appends the likeliest tokens of a row of logits, likeliest first.
fn push_top(top: &mut TopTokens, logits: &[f32], temperature: f64) {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    // Of equal ones the first, so that the choice is the same everywhere.
    let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    order.select_nth_unstable_by(top.k, by_logit);
    order[..top.k].sort_unstable_by(by_logit);
    let highest = f64::from(logits[order[0] as usize]);
    let above = |id: &u32| (f64::from(logits[*id as usize]) - highest) / temperature;
    let rest: f64 = order[top.k..].iter().map(|id| above(id).exp()).sum();
    let likeliest = &order[..top.k];
    let log_sum = (rest + likeliest.iter().map(|id| above(id).exp()).sum::<f64>()).ln();
    top.ids.extend(likeliest);
    top.log_probs.extend(likeliest.iter().map(|id| (above(id) - log_sum) as f32));
    // What is nothing in f32 stays a number.
    top.log_probs.push((rest.ln() - log_sum).max(-80.0) as f32);
}

#[cfg(test)]
mod tests;
