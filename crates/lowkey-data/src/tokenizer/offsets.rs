//! Tokens with where they stand in the text.

use std::ops::Range;

use super::{END_OF_TEXT, MOST_GROWN, Model, Tokenizer, guarded};
use crate::error::{Error, Result};

impl Tokenizer {
    /// [`Tokenizer::encode`] with the bytes of the text that each token stands for. Tokens of one character that takes several have its
    /// bytes each; a token that stands for no text has an empty range where it comes.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_offsets(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        if let Model::Hf(pair) = &self.model {
            if text.len().saturating_mul(pair.growth) > MOST_GROWN {
                return Err(Error::tokenizer(
                    self.name(),
                    format!("a text of {} bytes is too long for it", text.len()),
                ));
            }
            let encoding = guarded(self.name(), || pair.special.encode(text, false))?;
            let ranges = encoding.get_offsets().iter().map(|(start, end)| *start..*end);
            return Ok(encoding.get_ids().iter().copied().zip(ranges).collect());
        }
        let mut tokens = Vec::with_capacity(text.len());
        let mut at = 0;
        for (i, part) in text.split(END_OF_TEXT).enumerate() {
            if i > 0 {
                tokens.extend(self.eos.map(|eos| (eos, at..at + END_OF_TEXT.len())));
                at += END_OF_TEXT.len();
            }
            let mut ids = Vec::with_capacity(part.len());
            self.extend_plain(part, &mut ids)?;
            let lengths: Vec<usize> = match &self.model {
                Model::Chars(_) => part.chars().map(char::len_utf8).collect(),
                Model::Bytes | Model::Hf(_) => vec![1; ids.len()],
            };
            for (id, length) in ids.into_iter().zip(lengths) {
                tokens.push((id, at..at + length));
                at += length;
            }
        }
        Ok(tokens)
    }
}
