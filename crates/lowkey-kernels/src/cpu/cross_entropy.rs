//! Output head and cross entropy in one pass over blocks of tokens: the logits of one block at a time are all that exist.

use pulp::Arch;
use rayon::prelude::*;

use super::gemm::{View, product};
use super::vector::{exp_shifted, max, scale};

/// Tokens per block.
const TOKENS: usize = 128;

/// `h [n, d]`, `weight [vocab, d]`, `targets [n]`; a negative target is no target.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub(crate) h: &'a [f32],
    pub(crate) weight: &'a [f32],
    pub(crate) targets: &'a [i32],
    pub(crate) width: usize,
}

impl Inputs<'_> {
    fn vocab(self) -> usize {
        self.weight.len() / self.width
    }

    /// Logits of tokens `from..from+count`, `[count, vocab]`.
    fn logits(self, from: usize, count: usize, logits: &mut [f32]) {
        let (d, vocab) = (self.width, self.vocab());
        let h = View::new(&self.h[from * d..], d);
        product([count, vocab, d], logits, vocab, false, h, View::new(self.weight, d).t(), 1.0);
    }
}

/// Turns a row of logits into e^(logit − max); returns `−log p(target)` and the sum.
#[inline(always)]
fn row_loss(row: &mut [f32], target: usize) -> (f32, f32) {
    let at_target = row[target];
    let highest = max(row);
    let sum = exp_shifted(row, highest);
    (highest + sum.ln() - at_target, sum)
}

/// `−log softmax(W h)[target]` of each token, 0 without a target.
pub(crate) fn losses(inputs: Inputs, losses: &mut [f32]) {
    let vocab = inputs.vocab();
    let mut logits = vec![0.0; TOKENS.min(losses.len()) * vocab];
    for (block, losses) in losses.chunks_mut(TOKENS).enumerate() {
        let from = block * TOKENS;
        inputs.logits(from, losses.len(), &mut logits);
        let rows = logits.par_chunks_exact_mut(vocab).zip(losses.par_iter_mut()).enumerate();
        rows.for_each(|(i, (row, loss))| {
            let target = inputs.targets[from + i];
            *loss = if target < 0 { 0.0 } else { Arch::new().dispatch(|| row_loss(row, target as usize).0) };
        });
    }
}

/// The sum of the losses, and its gradients `d_h [n, d]` and `d_weight [vocab, d]`.
pub(crate) fn sum_with_gradients(inputs: Inputs, d_h: &mut [f32], d_weight: &mut [f32]) -> f32 {
    let (d, vocab) = (inputs.width, inputs.vocab());
    let n = inputs.targets.len();
    let mut logits = vec![0.0; TOKENS.min(n) * vocab];
    let mut nats = 0.0;
    d_weight.fill(0.0);
    for from in (0..n).step_by(TOKENS) {
        let count = TOKENS.min(n - from);
        inputs.logits(from, count, &mut logits);
        // Collected in order: a sum in f64 in that order is the same for any number of threads.
        let losses: Vec<f64> = logits
            .par_chunks_exact_mut(vocab)
            .take(count)
            .enumerate()
            .map(|(i, row)| {
                let target = inputs.targets[from + i];
                if target < 0 {
                    row.fill(0.0);
                    return 0.0;
                }
                Arch::new().dispatch(|| {
                    let (loss, sum) = row_loss(row, target as usize);
                    scale(row, 1.0 / sum);
                    row[target as usize] -= 1.0;
                    f64::from(loss)
                })
            })
            .collect();
        nats += losses.iter().sum::<f64>();
        let p = View::new(&logits, vocab);
        product([count, d, vocab], &mut d_h[from * d..], d, false, p, View::new(inputs.weight, d), 1.0);
        product([vocab, d, count], d_weight, d, true, p.t(), View::new(&inputs.h[from * d..], d), 1.0);
    }
    nats as f32
}
