//! Ids to text one at a time, for a console that shows a model thinking.

use super::{Model, Tokenizer};
use crate::error::Result;

/// How many ids to hold back for a character that does not complete, where the decoder hides the bytes. A character is
/// at most four bytes, so at most four byte-fallback tokens; past that the text is broken and is shown as it is.
const MOST_HELD: usize = 4;

/// An incremental detokenizer of a continuation: the text of what stood before, what this has returned so far, and
/// [`TextStream::finish`] are together what [`Tokenizer::decode`] gives for all the ids, yet no part ends inside a character.
/// (Where a SentencePiece vocabulary spells bytes that are not UTF-8, the two may count the U+FFFD differently.)
///
/// Most decoders treat the first token of a text in a way of their own: Metaspace and Strip drop the space that stands before
/// it, WordPiece puts none there. So text is taken as the difference that an id makes to the ids before it, never by itself.
pub struct TextStream {
    tokenizer: Tokenizer,
    /// Bytes of an unfinished character, for a tokenizer whose ids are bytes.
    bytes: Vec<u8>,
    /// For any other: recent ids, of which the first `shown` have been returned as text.
    ids: Vec<u32>,
    shown: usize,
}

impl TextStream {
    pub(super) fn new(tokenizer: Tokenizer, before: &[u32]) -> Self {
        let mut stream = Self { tokenizer, bytes: Vec::new(), ids: Vec::new(), shown: 0 };
        if !stream.joins_bytes() {
            stream.ids.extend_from_slice(before);
            stream.shown = before.len();
        }
        stream
    }

    /// Takes the next id and returns the text that it completes; often empty.
    pub fn push(&mut self, id: u32) -> Result<String> {
        if self.joins_bytes() {
            self.tokenizer.vocabulary.append(id, &mut self.bytes);
            return Ok(take_complete(&mut self.bytes));
        }
        self.ids.push(id);
        let text = self.unshown()?;
        let held = self.ids.len() - self.shown;
        if text.is_empty() || (text.ends_with(char::REPLACEMENT_CHARACTER) && held <= MOST_HELD) {
            return Ok(String::new());
        }
        // What was shown last stays as context, and with it what precedes it where it is but space: at the beginning of a text a
        // decoder would drop that.
        if !text.trim().is_empty() {
            self.ids.drain(..self.shown);
        }
        self.shown = self.ids.len();
        Ok(text)
    }

    /// Returns what is still held back, an unfinished character as U+FFFD, and starts afresh with nothing before.
    pub fn finish(&mut self) -> Result<String> {
        let text = if self.joins_bytes() { String::from_utf8_lossy(&self.bytes).into_owned() } else { self.unshown()? };
        self.bytes.clear();
        self.ids.clear();
        self.shown = 0;
        Ok(text)
    }

    fn joins_bytes(&self) -> bool {
        self.tokenizer.vocabulary.bytewise || !matches!(self.tokenizer.model, Model::Hf(_))
    }

    /// The text of all the ids held, less the text of those that were shown.
    fn unshown(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[..self.shown])?;
        let all = self.tokenizer.decode(&self.ids)?;
        match all.strip_prefix(&before) {
            Some(text) => Ok(text.to_owned()),
            // A broken character was shown and its context has turned out otherwise: what is shown stays shown.
            None => self.tokenizer.decode(&self.ids[self.shown..]),
        }
    }
}

/// Takes the longest prefix of `bytes` that later bytes cannot change. What can never become UTF-8 becomes U+FFFD, in
/// the same places as `String::from_utf8_lossy` puts it.
fn take_complete(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    loop {
        match std::str::from_utf8(bytes) {
            Ok(valid) => {
                text.push_str(valid);
                bytes.clear();
                return text;
            }
            Err(error) => {
                let valid = error.valid_up_to();
                text.push_str(&String::from_utf8_lossy(&bytes[..valid]));
                let Some(bad) = error.error_len() else {
                    bytes.drain(..valid);
                    return text;
                };
                text.push(char::REPLACEMENT_CHARACTER);
                bytes.drain(..valid + bad);
            }
        }
    }
}
