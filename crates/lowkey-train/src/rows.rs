//! Rows of a batch, as a pass of the model reads them.

use lowkey_data::Batch;
use lowkey_data::tasks::{StepBatch, VectorBatch};
use lowkey_model::{PassBatch, TokenBatch, VectorRows};

/// A batch of either kind.
#[derive(Clone, Copy, Debug)]
pub enum BatchRef<'a> {
    /// Tokens.
    Tokens(&'a Batch),
    /// Vectors.
    Vectors(&'a VectorBatch),
}

impl<'a> From<&'a Batch> for BatchRef<'a> {
    fn from(batch: &'a Batch) -> Self {
        Self::Tokens(batch)
    }
}

impl<'a> From<&'a VectorBatch> for BatchRef<'a> {
    fn from(batch: &'a VectorBatch) -> Self {
        Self::Vectors(batch)
    }
}

impl<'a> From<&'a StepBatch> for BatchRef<'a> {
    fn from(batch: &'a StepBatch) -> Self {
        match batch {
            StepBatch::Tokens(batch) => Self::Tokens(batch),
            StepBatch::Vectors(batch) => Self::Vectors(batch),
        }
    }
}

impl<'a> BatchRef<'a> {
    /// Number of rows.
    pub fn count(self) -> usize {
        match self {
            Self::Tokens(batch) => batch.rows,
            Self::Vectors(batch) => batch.rows,
        }
    }

    /// Number of positions at which something is asked.
    pub fn target_tokens(self) -> usize {
        match self {
            Self::Tokens(batch) => batch.target_tokens(),
            Self::Vectors(batch) => batch.target_tokens(),
        }
    }

    /// Rows `from..to`.
    pub(crate) fn rows(self, from: usize, to: usize) -> PassBatch<'a> {
        match self {
            Self::Tokens(batch) => rows(batch, from, to).into(),
            Self::Vectors(batch) => vector_rows(batch, from, to).into(),
        }
    }
}

/// Rows `from..to` of a batch.
pub(crate) fn rows(batch: &Batch, from: usize, to: usize) -> TokenBatch<'_> {
    let range = from * batch.seq_len..to * batch.seq_len;
    TokenBatch {
        rows: to - from,
        seq_len: batch.seq_len,
        input_ids: &batch.input_ids[range.clone()],
        targets: &batch.targets[range.clone()],
        document_starts: &batch.document_starts[range],
    }
}

/// Rows `from..to` of a batch of vectors.
fn vector_rows(batch: &VectorBatch, from: usize, to: usize) -> VectorRows<'_> {
    let VectorBatch { seq_len, input_width, output_width, .. } = *batch;
    let range = from * seq_len..to * seq_len;
    let wide = |width: usize| range.start * width..range.end * width;
    VectorRows {
        rows: to - from,
        seq_len,
        input_width,
        output_width,
        inputs: &batch.inputs[wide(input_width)],
        values: &batch.values[wide(output_width)],
        asked: &batch.asked[range.clone()],
        document_starts: &batch.document_starts[range],
    }
}
