//! What goes into a pass of a model, as plain numbers.
//!
//! **Purpose.** One type for whoever fills rows (the sampler of a corpus, a task that makes examples) and one view for whoever reads
//! them (the model), so that neither has to know the other, and nothing has to be converted between them.
//!
//! **Main types.** [`Batch`], and [`Rows`], some of its rows. A position reads a token or a vector, and is to answer with a token or
//! a vector: [`Batch::vectors`] says which.
//!
//! **What this crate does not know.** Tensors, devices, files, text. It imports nothing.
//!
//! # Example
//!
//! Two documents, a row each, and a view of the second row:
//!
//! ```
//! use lowkey_batch::{Batch, IGNORE};
//!
//! let mut batch = Batch::with_capacity(4, 2);
//! for document in [&[7, 8, 9][..], &[5, 6]] {
//!     for pair in document.windows(2) {
//!         batch.input_ids.push(pair[0]);
//!         batch.targets.push(i64::from(pair[1]));
//!         batch.document_starts.push(0);
//!     }
//!     batch.end_row(true);
//! }
//! assert_eq!((batch.rows, batch.target_tokens()), (2, 3));
//!
//! let second = batch.rows(1..2);
//! assert_eq!(second.input_ids, [5, 0, 0, 0]);
//! assert_eq!(second.targets, [6, IGNORE, IGNORE, IGNORE]);
//! assert_eq!(second.document_starts, [0, 1, 1, 1]);
//! ```

use std::ops::Range;

/// The target of a position from which nothing is predicted, as in PyTorch and Hugging Face.
pub const IGNORE: i64 = -100;

/// Rows for one step; position (r, t) is index `r * seq_len + t`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Number of rows.
    pub rows: usize,
    /// Positions per row.
    pub seq_len: usize,
    /// What the model reads. Padding reads id 0; of vectors there are none.
    pub input_ids: Vec<u32>,
    /// What it is to predict: the next token, or [`IGNORE`]. The token that ends a document is a target. In a stream
    /// the first token of the next document is one, too; with document packing it is not. Of vectors: 0 where one is asked for.
    pub targets: Vec<i64>,
    /// For each position, the index within its row of the first position of its document: position t may attend to j
    /// exactly if `document_starts[t] <= j <= t`. Padding forms a document of its own. All 0 without document masks.
    pub document_starts: Vec<u32>,
    /// Vectors in place of tokens.
    pub vectors: Option<Vectors>,
    /// Whether rows 2i and 2i + 1 are the chosen and the rejected answer to the same prompt, one document a row: a pass has both or
    /// neither. The tokens of the prompt are no targets.
    pub pairs: bool,
}

/// Vectors that are read and answered with, position by position.
#[derive(Clone, Debug, PartialEq)]
pub struct Vectors {
    /// Numbers read at a position.
    pub input_width: usize,
    /// Numbers asked for.
    pub output_width: usize,
    /// `[rows · seq_len · input_width]`; padding reads zeros.
    pub inputs: Vec<f32>,
    /// `[rows · seq_len · output_width]`; zeros where nothing is asked.
    pub values: Vec<f32>,
}

/// Some rows of a [`Batch`]: what one pass reads.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Number of sequences.
    pub rows: usize,
    /// Length of each.
    pub seq_len: usize,
    /// `[rows · seq_len]`; of vectors empty.
    pub input_ids: &'a [u32],
    /// `[rows · seq_len]`: the token to predict, 0 where a vector is asked for, or [`IGNORE`].
    pub targets: &'a [i64],
    /// `[rows · seq_len]`: where in its row the document of a position starts.
    pub document_starts: &'a [u32],
    /// Vectors in place of tokens.
    pub vectors: Option<VectorRows<'a>>,
    /// Whether rows 2i and 2i + 1 are the chosen and the rejected answer to the same prompt.
    pub pairs: bool,
}

/// Some rows of [`Vectors`].
#[derive(Clone, Copy, Debug)]
pub struct VectorRows<'a> {
    /// Numbers of an input.
    pub input_width: usize,
    /// Numbers of an answer.
    pub output_width: usize,
    /// `[rows · seq_len · input_width]`
    pub inputs: &'a [f32],
    /// `[rows · seq_len · output_width]`
    pub values: &'a [f32],
}

impl Batch {
    /// No rows yet, with room for `rows`.
    pub fn with_capacity(seq_len: usize, rows: usize) -> Self {
        let size = rows * seq_len;
        Self {
            seq_len,
            input_ids: Vec::with_capacity(size),
            targets: Vec::with_capacity(size),
            document_starts: Vec::with_capacity(size),
            ..Self::default()
        }
    }

    /// Number of positions at which something is asked.
    pub fn target_tokens(&self) -> usize {
        self.targets.iter().filter(|target| **target != IGNORE).count()
    }

    /// Rows that a pass must not part: 2 where they are pairs, else 1.
    pub fn unit(&self) -> usize {
        if self.pairs { 2 } else { 1 }
    }

    /// Position within the row that is being filled with tokens.
    pub fn column(&self) -> usize {
        self.input_ids.len() - self.rows * self.seq_len
    }

    /// Pads the row of tokens to its end and starts the next one; `mask`: the padding is a document of its own.
    pub fn end_row(&mut self, mask: bool) {
        let start = if mask { self.column() as u32 } else { 0 };
        self.rows += 1;
        let size = self.rows * self.seq_len;
        self.input_ids.resize(size, 0);
        self.targets.resize(size, IGNORE);
        self.document_starts.resize(size, start);
    }

    /// All rows.
    pub fn all(&self) -> Rows<'_> {
        self.rows(0..self.rows)
    }

    /// Some rows.
    pub fn rows(&self, rows: Range<usize>) -> Rows<'_> {
        let range = rows.start * self.seq_len..rows.end * self.seq_len;
        let wide = |width: usize| range.start * width..range.end * width;
        let vectors = self.vectors.as_ref().map(|vectors| VectorRows {
            input_width: vectors.input_width,
            output_width: vectors.output_width,
            inputs: &vectors.inputs[wide(vectors.input_width)],
            values: &vectors.values[wide(vectors.output_width)],
        });
        Rows {
            rows: rows.len(),
            seq_len: self.seq_len,
            // Vectors are read in the tokens' place.
            input_ids: self.input_ids.get(range.clone()).unwrap_or_default(),
            targets: &self.targets[range.clone()],
            document_starts: &self.document_starts[range],
            vectors,
            pairs: self.pairs,
        }
    }
}

impl Rows<'_> {
    /// Number of positions at which something is asked.
    pub fn target_tokens(&self) -> usize {
        self.targets.iter().filter(|target| **target != IGNORE).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_those_of_the_batch_and_of_nothing_else() {
        let mut batch = Batch::with_capacity(3, 2);
        for (id, target) in [(4, 5), (5, 6)] {
            batch.input_ids.push(id);
            batch.targets.push(target);
            batch.document_starts.push(0);
        }
        assert_eq!(batch.column(), 2);
        batch.end_row(true);
        batch.end_row(true);
        let first = batch.rows(0..1);
        assert_eq!((first.rows, first.input_ids, first.targets), (1, &[4, 5, 0][..], &[5, 6, IGNORE][..]));
        assert_eq!((first.document_starts, batch.rows(1..2).document_starts), (&[0, 0, 2][..], &[0, 0, 0][..]));
        assert_eq!((batch.target_tokens(), first.target_tokens(), batch.rows(1..2).target_tokens()), (2, 2, 0));
        assert_eq!((batch.unit(), batch.all().pairs), (1, false));
        let pairs = Batch { pairs: true, ..batch };
        assert_eq!((pairs.unit(), pairs.all().pairs), (2, true));

        let vectors = Vectors {
            input_width: 2,
            output_width: 1,
            inputs: (0..8).map(|i| i as f32).collect(),
            values: vec![1.0; 4],
        };
        let batch = Batch {
            rows: 2,
            seq_len: 2,
            targets: vec![IGNORE, 0, 0, 0],
            document_starts: vec![0; 4],
            vectors: Some(vectors),
            ..Batch::default()
        };
        let second = batch.rows(1..2);
        assert_eq!((second.input_ids.len(), second.target_tokens()), (0, 2));
        assert_eq!(second.vectors.unwrap().inputs, [4.0, 5.0, 6.0, 7.0]);
        assert_eq!(batch.all().target_tokens(), 3);
    }
}
