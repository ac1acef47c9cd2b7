//! Which of a conversation's text the assistant says.

use std::ops::Range;

use super::{ChatTemplate, Conversation, Now, Options};
use crate::error::Result;

/// A conversation as text, and what of it the assistant says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    /// The text, special tokens spelled out. It is to be encoded without adding any ([`crate::Tokenizer::encode`]).
    pub text: String,
    /// The answers, in order and apart from each other. A message may have several, or none.
    pub spans: Vec<Span>,
}

/// A part of a conversation's text that the assistant says, with what ends its turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// The message that it belongs to, by its place in [`Conversation::messages`].
    pub message: usize,
    /// Where it stands in the text, in bytes.
    pub bytes: Range<usize>,
}

impl ChatTemplate {
    /// The text of a conversation, with what the assistant says in it.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`], and where it cannot be said for sure what is the assistant's.
    pub fn answers(&self, conversation: &Conversation, now: Now) -> Result<Answers> {
        let options = Options { now, ..Options::default() };
        let whole = self.render(conversation, &options)?;
        let mut spans = Vec::new();
        for message in (0..conversation.messages.len()).filter(|i| conversation.role(*i) == "assistant") {
            let prompt = Options { add_generation_prompt: true, ..options.clone() };
            let before = self.render(&conversation.first(message), &prompt)?.text.len();
            let after = self.render(&conversation.first(message + 1), &options)?.text.len();
            spans.push(Span { message, bytes: before..after });
        }
        Ok(Answers { text: whole.text, spans })
    }
}
