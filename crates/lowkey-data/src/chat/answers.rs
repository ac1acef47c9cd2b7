//! Which of a conversation's text the assistant says.
//!
//! A template that marks it (`{% generation %}`) is taken at its word. Of the others, which are most of the published ones, it
//! is found by asking: a message is replaced by a mark, and where the text changes is where the message stands. What the
//! template writes there of itself belongs to the answer where the model has to write it, which is what comes after the
//! generation prompt, and what ends the turn: a model that does not learn to end it never ends.

use std::ops::Range;

use serde_json::{Map, Value, json};

use super::template::aside;
use super::{ChatTemplate, Conversation, Now, Options, Rendered, tags};
use crate::error::{Error, Result};

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

impl Answers {
    /// The message that each token belongs to, of those that the assistant says: the token has at least a byte of the answer.
    /// A token with the last of the prompt and the first of an answer in it is the answer's, since nothing else can teach it.
    ///
    /// `places` are the tokens' byte ranges in [`Answers::text`], in order.
    pub fn messages_of<'a>(&self, places: impl IntoIterator<Item = &'a Range<usize>>) -> Vec<Option<usize>> {
        let mut next = 0;
        let owner = |place: &Range<usize>| {
            while self.spans.get(next).is_some_and(|span| span.bytes.end <= place.start) {
                next += 1;
            }
            let span = self.spans.get(next)?;
            (place.start < span.bytes.end && span.bytes.start < place.end && !place.is_empty()).then_some(span.message)
        };
        places.into_iter().map(owner).collect()
    }
}

impl ChatTemplate {
    /// The text of a conversation, with what the assistant says in it. What ends a turn belongs to it, where the template
    /// writes an end; where only the next message's beginning ends a turn, the answer ends with its words.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`], and [`Error::Template`] with the reason where it cannot be said for sure what is the
    /// assistant's. Nothing is guessed.
    pub fn answers(&self, conversation: &Conversation, now: Now) -> Result<Answers> {
        let (template, conversation) = (self.clone(), conversation.clone());
        // Many renderings, for which one thread is enough.
        let times = conversation.messages.len() + 1;
        aside(self.name(), times, move || template.answers_here(&conversation, now))?
    }

    /// The text that ends a turn of the assistant, without blanks behind it; nothing where only the next message does.
    ///
    /// # Errors
    /// As [`ChatTemplate::answers`].
    pub fn end_of_turn(&self) -> Result<String> {
        const WORDS: &str = "Yes";
        let message = |role: &str, content: &str| json!({ "role": role, "content": content });
        let conversation = Conversation::new(vec![message("user", "Here?"), message("assistant", WORDS)]);
        let Answers { text, spans } = self.answers(&conversation, Now::default())?;
        let answer = spans.last().and_then(|span| text.get(span.bytes.clone())).unwrap_or_default();
        let end = answer.rfind(WORDS).map_or("", |at| &answer[at + WORDS.len()..]);
        let bare = end.trim_end();
        Ok(if bare.is_empty() { end } else { bare }.to_owned())
    }

    fn answers_here(&self, conversation: &Conversation, now: Now) -> Result<Answers> {
        let options = Options { now, ..Options::default() };
        let whole = self.render(conversation, &options)?;
        let assistant: Vec<usize> =
            (0..conversation.messages.len()).filter(|i| conversation.role(*i) == "assistant").collect();
        let spans = if self.marks_answers() {
            self.marked(conversation, &options, &assistant, whole.spans)?
        } else {
            self.found(conversation, &options, &assistant, &whole.text)?
        };
        Ok(Answers { text: whole.text, spans })
    }

    /// Spans that the template marks, each with the message that brought it.
    fn marked(
        &self,
        conversation: &Conversation,
        options: &Options,
        assistant: &[usize],
        spans: Vec<Range<usize>>,
    ) -> Result<Vec<Span>> {
        // How many spans there are up to each message.
        let mut bounds = Vec::with_capacity(assistant.len());
        let (last, earlier) = match assistant.split_last() {
            Some(parts) => parts,
            None if spans.is_empty() => return Ok(Vec::new()),
            None => return Err(self.unsure(None, "the template marks an answer where no assistant speaks")),
        };
        for message in earlier {
            match self.render(&conversation.first(message + 1), options) {
                Ok(part) => bounds.push(part.spans.len()),
                // Some templates refuse what ends in the middle.
                Err(_) if spans.len() == assistant.len() => bounds.push(bounds.len() + 1),
                Err(e) => return Err(e),
            }
        }
        bounds.push(spans.len());
        if !bounds.is_sorted() {
            return Err(self.unsure(Some(*last), "the template marks fewer answers as the conversation grows"));
        }
        let owner = |i: usize| bounds.iter().position(|bound| i < *bound).and_then(|at| assistant.get(at)).copied();
        let with_owner = |(i, bytes)| Some(Span { message: owner(i)?, bytes });
        Ok(spans.into_iter().enumerate().filter_map(with_owner).collect())
    }

    /// Spans of a template that marks none.
    fn found(
        &self,
        conversation: &Conversation,
        options: &Options,
        assistant: &[usize],
        whole: &str,
    ) -> Result<Vec<Span>> {
        let mut spans: Vec<Span> = Vec::with_capacity(assistant.len());
        for message in assistant.iter().copied() {
            let unsure = |why: &str| self.unsure(Some(message), why);
            let Some(words) = self.place(conversation, options, message, whole)? else { continue };
            let so_far = self.render(&conversation.first(message + 1), options);
            let so_far =
                so_far.map_err(|_| unsure("the template refuses the conversation where it ends with it"))?.text;
            let at_end = self
                .place(&conversation.first(message + 1), options, message, &so_far)?
                .map_or(so_far.len(), |at| at.end);
            let last = &so_far[at_end..];
            // Some templates end the last turn of all with more than the others.
            let end = &last[..shared(last, &whole[words.end..])];
            if end.is_empty() && !last.is_empty() {
                return Err(unsure("it ends otherwise where another message follows than where it is the last"));
            }
            let (header, begin) = self.begin(conversation, options, message, whole, words.start);
            let plain = |name: &str| conversation.messages[message].get(name).is_none_or(Value::is_null);
            if begin.is_none() && !["tool_calls", "reasoning_content", "thinking", "reasoning"].into_iter().all(plain) {
                return Err(unsure("the generation prompt does not stand before it"));
            }
            if !header.is_empty() && end.contains(&*header) {
                return Err(unsure("the template begins another turn of the assistant within it"));
            }
            let begin = begin.unwrap_or(words.start);
            let bytes = begin..words.end + end.len();
            if spans.last().is_some_and(|before| before.bytes.end > bytes.start) {
                return Err(unsure("it overlaps the answer before it"));
            }
            if !bytes.is_empty() {
                spans.push(Span { message, bytes });
            }
        }
        Ok(spans)
    }

    /// Where the words of a message stand in the text; `None` where it says nothing and the template passes over it.
    fn place(
        &self,
        conversation: &Conversation,
        options: &Options,
        message: usize,
        text: &str,
    ) -> Result<Option<Range<usize>>> {
        let unsure = |why: &str| self.unsure(Some(message), why);
        let Some(Value::Object(fields)) = conversation.messages.get(message) else { return Ok(None) };
        let mut known = Vec::new();
        conversation.messages.iter().for_each(|message| tags::texts(message, &mut known));
        let known = known.iter().map(String::as_str).chain([text, self.source()]);
        let (mark, _) = tags::marks(known).ok_or_else(|| unsure("it uses the whole private use area of Unicode"))?;
        let mut probe = conversation.clone();
        let (marked, says) = with_marks(fields, mark);
        probe.messages[message] = Value::Object(marked);
        let other = self.render(&probe, options);
        let other = other.map_err(|_| unsure("the template refuses other words in its place"))?.text;
        let before = common(text.chars(), other.chars());
        let after = common(text[before..].chars().rev(), other[before..].chars().rev());
        let (ours, theirs) = (before..text.len() - after, &other[before..other.len() - after]);
        if !says {
            // Nothing but the mark has come in, or else the template treats an empty message as none.
            return Ok(theirs.chars().all(|c| c == mark).then_some(ours));
        }
        if !theirs.contains(mark) {
            return Err(unsure("the template does not write it"));
        }
        if let (Some(Value::String(content)), None) = (fields.get("content"), fields.get("tool_calls")) {
            let plain = |text: &str| text.split_whitespace().collect::<String>();
            let reasoned = ["reasoning_content", "thinking", "reasoning"].iter().any(|name| fields.contains_key(*name));
            if !reasoned && !plain(content).contains(&plain(&text[ours.clone()])) {
                return Err(unsure("the template changes more than the message's own words"));
            }
        }
        Ok(Some(ours))
    }

    /// What comes before an answer in the generation prompt, and where the answer begins whose words begin at `words`: after that
    /// prompt, or after as much of it as stands there, if any.
    fn begin(
        &self,
        conversation: &Conversation,
        options: &Options,
        message: usize,
        whole: &str,
        words: usize,
    ) -> (String, Option<usize>) {
        let asked = Options { add_generation_prompt: true, ..options.clone() };
        let before = conversation.first(message);
        let Ok(Rendered { text: asked, .. }) = self.render(&before, &asked) else { return (String::new(), None) };
        let plain = self.render(&before, options).map_or(0, |plain| common(plain.text.chars(), asked.chars()));
        let end = plain + shared(&asked[plain..], whole.get(plain..).unwrap_or_default());
        let stands = whole.starts_with(&asked[..end]) && (end > plain || end == asked.len());
        (asked[plain..end].to_owned(), stands.then_some(end.min(words)))
    }

    fn unsure(&self, message: Option<usize>, why: &str) -> Error {
        let which = message.map_or_else(String::new, |message| format!(" of message {}", message + 1));
        let message = format!(
            "cannot tell which text is the answer{which}: {why}. A template with {{% generation %}} says it, such as a built-in one"
        );
        Error::Template { name: self.name().to_owned(), message }
    }
}

/// Bytes that two texts have in common at their beginning, or at their end where they are read backwards.
fn common(a: impl Iterator<Item = char>, b: impl Iterator<Item = char>) -> usize {
    a.zip(b).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum()
}

/// Bytes of `a` that stand at the beginning of `b`: all of them, else as many as end where a marker ends (`<|end|>`, `[/INST]`,
/// a line), since two markers may begin alike.
fn shared(a: &str, b: &str) -> usize {
    let same = common(a.chars(), b.chars());
    if same == a.len() { same } else { a[..same].rfind(['>', ']', '\n']).map_or(0, |at| at + 1) }
}

/// The message with a mark in place of each text that it says, and whether it says any. Its form stays: names of arguments, ids,
/// and whether there is a content beside tool calls.
fn with_marks(fields: &Map<String, Value>, mark: char) -> (Map<String, Value>, bool) {
    let mut out = fields.clone();
    let mut says = false;
    for name in ["reasoning_content", "thinking", "reasoning", "content"] {
        if let Some(value) = out.get_mut(name) {
            says |= replace(value, mark, &["type"]);
        }
    }
    for call in out.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
        let call = if call.get("function").is_some() { &mut call["function"] } else { call };
        for name in ["name", "arguments"] {
            if let Some(value) = call.get_mut(name) {
                says |= replace(value, mark, &[]);
            }
        }
    }
    if !says {
        out.insert("content".to_owned(), Value::String(mark.into()));
    }
    (out, says)
}

/// Replaces each text that is not empty, and says whether there was one.
fn replace(value: &mut Value, mark: char, but: &[&str]) -> bool {
    match value {
        Value::String(text) if !text.trim().is_empty() => {
            *text = mark.into();
            true
        }
        Value::Array(items) => items.iter_mut().fold(false, |found, item| replace(item, mark, but) | found),
        Value::Object(fields) => {
            let kept = |name: &str| but.contains(&name);
            fields
                .iter_mut()
                .filter(|(name, _)| !kept(name))
                .fold(false, |found, (_, item)| replace(item, mark, but) | found)
        }
        _ => false,
    }
}
