//! What a record becomes: tokens, and which of them are learnt.
//!
//! A conversation is rendered by its chat template and encoded as one text, without a special token that the template has not
//! spelled out. A token is learnt if any of its bytes lies in a part of the text that is; that part is taken from the text and never
//! from ids, so that a padding token which is the end of a text, too, stays what it is.

mod template;

use std::ops::Range;

use serde_json::Value;

use crate::chat::{Answers, ChatTemplate, Conversation, DateTime, Now};
use crate::dataset::TrainOn;
use crate::error::Result;
use crate::records::{Chat, Record, Sample};
use crate::tokenizer::Tokenizer;
pub(crate) use template::method;

/// The present of templates that ask for it: tokens must not depend on the day on which they are made. It is the day that Llama 3.1's
/// template takes where nobody tells it one.
const TODAY: &str = "2024-07-26";

/// A document of which some tokens are learnt.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Document {
    pub(crate) ids: Vec<u32>,
    /// For each token whether it is learnt.
    pub(crate) learnt: Vec<bool>,
    /// Bytes of text.
    pub(crate) bytes: u64,
}

/// How records become tokens.
#[derive(Debug, Clone)]
pub(crate) struct Method {
    /// What makes a text of a conversation; none where nobody has named one.
    pub(crate) template: Option<ChatTemplate>,
    /// What is learnt.
    pub(crate) train_on: TrainOn,
}

/// The documents of a record: one, or of a pair the chosen and the rejected one.
///
/// # Errors
/// What is wrong with the record, in words that follow the name of its place.
pub(crate) fn documents(record: Record, method: &Method, tokenizer: &Tokenizer) -> Result<Vec<Document>, String> {
    let samples = match record {
        Record::One(sample) => vec![("", sample)],
        Record::Pair { chosen, rejected } => vec![("the chosen answer: ", chosen), ("the rejected answer: ", rejected)],
    };
    samples
        .into_iter()
        .map(|(which, sample)| {
            let document = match sample {
                Sample::Chat(chat) => conversation(&chat, method, tokenizer),
                Sample::Text { prompt, completion } => continuation(&prompt, &completion, method.train_on, tokenizer),
            };
            let document = document.map_err(|why| format!("{which}{why}"))?;
            // Nothing stands before the first token, so that it is never predicted.
            if !document.learnt.iter().skip(1).any(|learnt| *learnt) {
                return Err(format!("{which}no token of it is learnt"));
            }
            Ok(document)
        })
        .collect()
}

/// A conversation in tokens.
pub(crate) fn conversation(chat: &Chat, method: &Method, tokenizer: &Tokenizer) -> Result<Document, String> {
    let template = method.template.as_ref().ok_or(
        "is a conversation, and there is no chat template: name one with chat.template of the dataset file, or data.chat_template of the \
         run file",
    )?;
    let Answers { text, spans } = rendered(chat, template)?;
    let answers = (0..chat.messages.len()).filter(|i| chat.is_answer(*i));
    let last = answers.clone().next_back();
    let wanted = |message: usize| match method.train_on {
        TrainOn::Assistant | TrainOn::All => true,
        TrainOn::Last => Some(message) == last,
        TrainOn::Completion => chat.prompt.is_some_and(|prompt| message >= prompt),
    };
    for (i, said) in chat.said.iter().enumerate().filter(|(i, _)| !chat.is_answer(*i)) {
        let all = method.train_on == TrainOn::All;
        match said {
            Some(true) if !all => {
                return Err(format!(
                    "message {} is to be learnt, and is no answer of the assistant: answers alone are, unless train_on = \"all\"",
                    i + 1
                ));
            }
            Some(false) if all => {
                return Err(format!(
                    "message {} is not to be learnt: with train_on = \"all\" only an answer of the assistant can be left out",
                    i + 1
                ));
            }
            _ => {}
        }
    }
    let left_out = |message: usize| chat.said.get(message).copied().flatten() == Some(false);
    let chosen = spans.iter().filter(|span| wanted(span.message) && !left_out(span.message));
    let omitted = spans.iter().filter(|span| left_out(span.message));
    let ranges = |spans: Vec<&crate::chat::Span>| spans.into_iter().map(|span| span.bytes.clone()).collect::<Vec<_>>();
    let (chosen, omitted) = (ranges(chosen.collect()), ranges(omitted.collect()));
    let tokens = tokenizer.encode_placed(&text).map_err(|e| e.to_string())?;
    let is_learnt = |bytes: &Range<usize>| match method.train_on {
        TrainOn::All => !lies_in(bytes, &omitted),
        _ => lies_in(bytes, &chosen),
    };
    let learnt = tokens.iter().map(|token| is_learnt(&token.bytes)).collect();
    let ids = tokens.into_iter().map(|token| token.id).collect();
    Ok(Document { ids, learnt, bytes: text.len() as u64 })
}

/// The text of a conversation, and what of it the assistant says.
fn rendered(chat: &Chat, template: &ChatTemplate) -> Result<Answers, String> {
    let messages = chat.messages.iter().cloned().map(Value::Object).collect();
    let tools = (!chat.tools.is_empty()).then(|| Value::Array(chat.tools.clone()));
    let conversation = Conversation { tools, ..Conversation::new(messages) };
    let now = TODAY.parse::<DateTime>().map(Now::At)?;
    template.answers(&conversation, now).map_err(|e| e.to_string())
}

/// A text that goes on with another, and ends: what begins a text, both, and what ends a document.
fn continuation(prompt: &str, completion: &str, train_on: TrainOn, tokenizer: &Tokenizer) -> Result<Document, String> {
    // As one text: a word whose beginning is the prompt's is not cut where no reader would cut it.
    let text = format!("{prompt}{completion}");
    let tokens = tokenizer.encode_placed(&text).map_err(|e| e.to_string())?;
    let learnt_from = if train_on == TrainOn::All { 0 } else { prompt.len() };
    let completion = learnt_from..text.len();
    let mut ids: Vec<u32> = tokens.iter().map(|token| token.id).collect();
    let mut learnt: Vec<bool> =
        tokens.iter().map(|token| lies_in(&token.bytes, std::slice::from_ref(&completion))).collect();
    let start = tokenizer.text_start();
    // A text that spells its beginning out is not given a second one.
    if !ids.starts_with(start) {
        ids.splice(0..0, start.iter().copied());
        learnt.splice(0..0, start.iter().map(|_| false));
    }
    ids.extend(tokenizer.text_end());
    learnt.resize(ids.len(), true);
    Ok(Document { ids, learnt, bytes: text.len() as u64 })
}

/// Whether any byte of a token lies in one of the ranges, which are in order and apart. A token of no bytes lies where it stands.
fn lies_in(token: &Range<usize>, ranges: &[Range<usize>]) -> bool {
    // The first range that ends behind the token's start.
    let next = ranges.partition_point(|range| range.end <= token.start);
    ranges.get(next).is_some_and(|range| range.start < token.end.max(token.start + 1))
}

#[cfg(test)]
mod tests;
