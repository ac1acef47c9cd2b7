//! Conversations as text: the chat templates that models come with, and which of the text the assistant says.
//!
//! A [`ChatTemplate`] turns a [`Conversation`] into the text that a model is trained on or prompted with, to the byte as
//! transformers does. [`ChatTemplate::answers`] says besides which bytes the assistant is to learn to say.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use lowkey_data::chat::{ChatTemplate, Conversation, Now};
//!
//! let template = ChatTemplate::built_in("chatml")?;
//! let conversation: Conversation = serde_json::from_str(
//!     r#"[{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi!"}]"#,
//! )?;
//! let answers = template.answers(&conversation, Now::Clock)?;
//! let [span] = &answers.spans[..] else { panic!("one answer") };
//! assert_eq!(span.message, 1);
//! assert_eq!(&answers.text[span.bytes.clone()], "Hi!<|im_end|>\n");
//! # Ok(())
//! # }
//! ```

mod answers;
mod conversation;
mod environment;
mod files;
mod json;
mod methods;
mod python;
mod tags;
mod template;
mod time;

pub use answers::{Answers, Span};
pub use conversation::Conversation;
pub(crate) use files::special_tokens_of;
pub use template::{ChatTemplate, Options, Rendered};
pub use time::{DateTime, Now};

#[cfg(test)]
mod tests;
