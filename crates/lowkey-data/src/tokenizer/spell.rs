//! Tokens as they are written, special ones spelled out.

use super::{END_OF_TEXT, Entry, Model, Tokenizer, guarded};
use crate::error::Result;

/// A part of a text, and whether it is learnt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The text, special tokens spelled out.
    pub text: String,
    /// Whether its tokens are learnt.
    pub learnt: bool,
}

impl Tokenizer {
    /// The text of `ids` with special tokens spelled out, in parts that are learnt and parts that are not; `learnt` is as long.
    ///
    /// # Errors
    /// [`Error::Tokenizer`](crate::Error::Tokenizer) where the file's own steps fail.
    pub fn parts(&self, ids: &[u32], learnt: &[bool]) -> Result<Vec<Part>> {
        let mut parts: Vec<Part> = Vec::new();
        let (mut at, mut before) = (0, String::new());
        for run in learnt.chunk_by(|a, b| a == b) {
            let end = (at + run.len()).min(ids.len());
            let whole = self.spelled(&ids[..end])?;
            // Most decoders have a rule for the first token of a text, which is not that of a part.
            let text = match whole.strip_prefix(&before) {
                Some(text) => text.to_owned(),
                None => self.spelled(&ids[at..end])?,
            };
            parts.push(Part { text, learnt: run.first() == Some(&true) });
            (at, before) = (end, whole);
        }
        Ok(parts)
    }

    /// The text of `ids`, special tokens spelled out.
    fn spelled(&self, ids: &[u32]) -> Result<String> {
        if let Model::Hf(pair) = &self.model {
            return guarded(self.name(), || pair.special.decode(ids, false));
        }
        let mut bytes = Vec::with_capacity(ids.len());
        for id in ids {
            match self.vocabulary.get(*id) {
                Entry::Special => bytes.extend_from_slice(END_OF_TEXT.as_bytes()),
                _ => self.vocabulary.append(*id, &mut bytes),
            }
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}
