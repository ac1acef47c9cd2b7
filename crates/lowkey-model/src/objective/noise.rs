//! Noise on the embeddings of training passes (NEFTune, Jain et al., arXiv 2310.05914).
//!
//! The noise of a number follows from seed, step, row and place alone: who computes the row, and with how many others at a time, makes no
//! difference, and a run that is gone on with draws what the uninterrupted one does.

use burn::tensor::{Tensor, TensorData};
use lowkey_batch::Rows;
use rand::RngExt;

use crate::init::stream;

/// What a training pass adds to what its blocks read: to each number one between −α/√(L·d) and α/√(L·d), even, where d is the width and
/// L the length of the document that the position belongs to, so that what else lies in a row makes no difference. Of rows without
/// document masks L is the row's length.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EmbeddingNoise {
    /// α.
    pub alpha: f64,
    /// Of the run.
    pub seed: u64,
    /// The step, whose noise is its own.
    pub step: u64,
    /// Place in the step's batch of the pass's first row.
    pub first_row: usize,
}

impl EmbeddingNoise {
    /// `x [rows, seq, d]`, what the blocks read of `batch`, with noise.
    pub(crate) fn added(&self, x: Tensor<3>, batch: Rows) -> Tensor<3> {
        let ([rows, seq, d], device) = (x.dims(), x.device());
        x + Tensor::<3>::from_data(TensorData::new(self.values(batch, d), [rows, seq, d]), &device)
    }

    /// The noise, `[rows · seq · d]`.
    fn values(&self, batch: Rows, d: usize) -> Vec<f32> {
        let Rows { rows, seq_len, document_starts, .. } = batch;
        let mut random = stream(self.seed, "embedding noise");
        random.set_stream(self.step);
        // One word a number: rows that are computed elsewhere are passed over.
        random.set_word_pos(self.first_row as u128 * (seq_len * d) as u128);
        let mut values = Vec::with_capacity(rows * seq_len * d);
        for row in document_starts.chunks(seq_len.max(1)) {
            for document in row.chunk_by(|a, b| a == b) {
                let most = (self.alpha / ((document.len() * d) as f64).sqrt()) as f32;
                values.extend((0..document.len() * d).map(|_| most * even(random.random::<u32>())));
            }
        }
        values
    }
}

/// A number between −1 and 1, as often below 0 as above.
fn even(word: u32) -> f32 {
    /// 2⁻²².
    const SPACING: f32 = 1.0 / (1u32 << 22) as f32;
    // 24 bits with the half: exact.
    ((word >> 9) as f32 + 0.5) * SPACING - 1.0
}

#[cfg(test)]
mod tests;
