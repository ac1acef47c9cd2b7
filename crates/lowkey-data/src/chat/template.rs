//! A template and what it makes of a conversation.

use std::ops::Range;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use minijinja::{Environment, ErrorKind};
use serde_json::{Map, Value, json};

use super::conversation::Conversation;
use super::environment::{NOW, Refusal, environment};
use super::tags::{self, BEGIN, END};
use super::time::Now;
use crate::error::{Error, Result};

/// Bytes of a template at most. The longest published ones have some thirty thousand.
const LONGEST: usize = 1 << 18;

/// A chat template; cheap to clone.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    name: Arc<str>,
    source: Arc<str>,
    special_tokens: Arc<Map<String, Value>>,
    environment: Arc<Environment<'static>>,
    /// Whether it marks what the assistant says.
    marks: bool,
}

/// How a conversation is rendered.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    /// End with what comes before the assistant's next message, for a model to go on from.
    pub add_generation_prompt: bool,
    /// End within the last message, where its content ends, for a model to go on from.
    pub continue_final_message: bool,
    /// What the template takes for the present.
    pub now: Now,
}

/// A conversation as text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rendered {
    /// The text, special tokens spelled out. It is to be encoded without adding any ([`crate::Tokenizer::encode`]).
    pub text: String,
    /// Byte ranges of `text` that the template marks as the assistant's (`{% generation %}`); in order, apart from each other.
    pub spans: Vec<Range<usize>>,
}

/// A name, a template's text, and the special tokens that it uses.
type BuiltIn = (&'static str, &'static str, &'static [(&'static str, &'static str)]);

/// Templates of our own. They mark what the assistant says.
const BUILT_IN: [BuiltIn; 5] = [
    ("chatml", include_str!("built_in/chatml.jinja"), &[]),
    ("llama3", include_str!("built_in/llama3.jinja"), &[("bos_token", "<|begin_of_text|>")]),
    ("qwen", include_str!("built_in/qwen.jinja"), &[]),
    (
        "deepseek",
        include_str!("built_in/deepseek.jinja"),
        &[("bos_token", "<｜begin▁of▁sentence｜>"), ("eos_token", "<｜end▁of▁sentence｜>")],
    ),
    ("plain", include_str!("built_in/plain.jinja"), &[("eos_token", "<|endoftext|>")]),
];

impl ChatTemplate {
    /// A template from its text. `special_tokens` are variables that it may use, such as `bos_token`.
    ///
    /// # Errors
    /// [`Error::Template`] with the line where the text is no template.
    pub fn from_source(name: &str, text: &str, special_tokens: Map<String, Value>) -> Result<Self> {
        if text.len() > LONGEST {
            let message = format!("has {} bytes; a template has at most {LONGEST}", text.len());
            return Err(Error::Template { name: name.to_owned(), message });
        }
        let tags::Rewritten { text: rewritten, marks } = tags::rewrite(name, text)?;
        let add = || {
            let mut environment = environment()?;
            environment.add_template_owned("chat", rewritten)?;
            Ok(environment)
        };
        let environment = aside(name, 1, add)?.map_err(|e| fail(name, &e))?;
        let environment = Arc::new(environment);
        let special_tokens = Arc::new(special_tokens);
        Ok(Self { name: name.into(), source: text.into(), special_tokens, environment, marks })
    }

    /// One of lowkey's own templates: `chatml`, `llama3`, `qwen`, `deepseek` or `plain`.
    ///
    /// # Errors
    /// [`Error::Template`] for a name that is none of them.
    pub fn built_in(name: &str) -> Result<Self> {
        match BUILT_IN.iter().find(|(known, ..)| *known == name) {
            Some((_, text, tokens)) => {
                let tokens = tokens.iter().map(|(name, token)| ((*name).to_owned(), json!(token)));
                Self::from_source(name, text, tokens.collect())
            }
            None => {
                let message = format!("is not built in; these are: {}", Self::built_in_names().join(", "));
                Err(Error::Template { name: name.to_owned(), message })
            }
        }
    }

    /// Names of lowkey's own templates.
    pub fn built_in_names() -> [&'static str; 5] {
        BUILT_IN.map(|(name, ..)| name)
    }

    /// The file, or the name it was given.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the template itself marks what the assistant says (`{% generation %}`).
    pub fn marks_answers(&self) -> bool {
        self.marks
    }

    /// The text of a conversation.
    ///
    /// Work and memory are bounded by the conversation's size: a template that goes round in circles, or makes much of little,
    /// ends with an error.
    ///
    /// # Errors
    /// [`Error::Template`] with the template's own words where it refuses the conversation.
    pub fn render(&self, conversation: &Conversation, options: &Options) -> Result<Rendered> {
        let mut messages: Vec<Value> = conversation.messages.iter().map(with_reasoning).collect();
        let mut found = Vec::new();
        messages
            .iter()
            .chain(&conversation.tools)
            .chain(&conversation.documents)
            .for_each(|v| tags::texts(v, &mut found));
        conversation
            .variables
            .iter()
            .chain(&*self.special_tokens)
            .for_each(|(_, value)| tags::texts(value, &mut found));
        let found = || found.iter().map(String::as_str).chain([&*self.source]);
        let no_marks = || self.refused("the conversation uses the whole private use area of Unicode");
        let cut_here = if options.continue_final_message {
            let (mark, _) = tags::marks(found()).ok_or_else(no_marks)?;
            self.mark_end(&mut messages, mark)?;
            Some(mark)
        } else {
            None
        };
        let size = found().map(|text| text.len() + 16).sum::<usize>();
        let fuel = fuel(size, messages.len());
        let run = |begin: String, end: String| {
            let mut context: Map<String, Value> = (*self.special_tokens).clone();
            context.extend(conversation.variables.clone());
            context.insert("messages".to_owned(), Value::Array(messages.clone()));
            context.insert("tools".to_owned(), json!(conversation.tools));
            context.insert("documents".to_owned(), json!(conversation.documents));
            context.insert("add_generation_prompt".to_owned(), json!(options.add_generation_prompt));
            context.insert(NOW.to_owned(), json!(options.now.get().to_string()));
            context.extend([(BEGIN.to_owned(), Value::String(begin)), (END.to_owned(), Value::String(end))]);
            self.run(Value::Object(context), fuel)
        };
        let mut text = run(String::new(), String::new())?;
        let mut spans = Vec::new();
        if self.marks {
            let cut_here = cut_here.map(String::from);
            let mark = tags::marks(found().chain(cut_here.as_deref())).ok_or_else(no_marks)?;
            let marked = run(mark.0.into(), mark.1.into())?;
            // A template may cut blanks away from what it has marked.
            spans = match tags::cut(&marked, mark) {
                Some((same, spans)) if same == text => spans,
                _ => {
                    return Err(
                        self.refused("it changes what it has marked with {% generation %}, so that its place is lost")
                    );
                }
            };
        }
        if let Some(mark) = cut_here {
            let lost =
                || self.refused("the last message cannot be continued: the template leaves out or changes its end");
            let end = text.rfind(mark).ok_or_else(lost)?;
            let trims = !text[end..].trim_start_matches(mark).starts_with(' ');
            text.truncate(end);
            let end = if trims { text.trim_end().len() } else { end };
            text.truncate(end);
            spans.retain_mut(|span| {
                span.end = span.end.min(end);
                span.start < end
            });
        }
        Ok(Rendered { text, spans })
    }

    /// Puts a mark at the end of the last message's content.
    fn mark_end(&self, messages: &mut [Value], mark: char) -> Result<()> {
        let none = || self.refused("there is no last message with a text as content that could be continued");
        let content = messages.last_mut().and_then(|message| message.get_mut("content")).ok_or_else(none)?;
        let text = match content {
            Value::Array(parts) => parts.iter_mut().rev().find_map(|part| part.get_mut("text")),
            other => Some(other),
        };
        let Some(Value::String(text)) = text else { return Err(none()) };
        // The blank tells whether the template trims.
        text.extend([mark, ' ']);
        Ok(())
    }

    fn refused(&self, message: &str) -> Error {
        Error::Template { name: self.name.to_string(), message: message.to_owned() }
    }

    /// Renders with so much work at most.
    fn run(&self, context: Value, fuel: u64) -> Result<String> {
        let mut environment = (*self.environment).clone();
        environment.set_fuel(Some(fuel));
        let render = move || environment.get_template("chat")?.render(value(&context));
        aside(&self.name, 1, render)?.map_err(|e| fail(&self.name, &e))
    }
}

/// Runs what a stranger's template may drive deep or long: on a thread with room for it, and for so long at most. What takes
/// longer, although it may take few steps only, is left to itself. Work of such a thread stays on it. `times` is how many
/// renderings the work has.
pub(super) fn aside<T: Send + 'static>(
    name: &str,
    times: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    /// Room for lists in lists as deep as the fuel reaches; taken only as it is used.
    const STACK: usize = 256 << 20;
    const LONGEST: Duration = Duration::from_secs(20);
    const NAME: &str = "chat template";
    if std::thread::current().name() == Some(NAME) {
        return Ok(work());
    }
    let longest = LONGEST.saturating_mul(u32::try_from(times).unwrap_or(u32::MAX));
    let refused = |message: String| Error::Template { name: name.to_owned(), message };
    let (done, result) = mpsc::sync_channel(1);
    let run = move || {
        // Nobody may be waiting any more.
        let _ = done.send(work());
    };
    let thread = std::thread::Builder::new().name(NAME.to_owned()).stack_size(STACK).spawn(run);
    let thread = thread.map_err(|e| refused(format!("no thread to render it on: {e}")))?;
    let found = result.recv_timeout(longest);
    if let Err(mpsc::RecvTimeoutError::Timeout) = found {
        // Whoever lets go of a thread at the moment at which it ends reads what it gave back (glibc's bug 19951), so it is kept.
        std::mem::forget(thread);
        return Err(refused(format!("takes longer than {} seconds", longest.as_secs())));
    }
    // It has nothing left to do. That it may have panicked is what the missing result says.
    let _ = thread.join();
    found.map_err(|_| refused("drives the template engine into an error of its own".to_owned()))
}

/// A budget in instructions, or in pieces of 64 bytes. Published templates use some hundred for a message and pass over each
/// text a few times.
fn fuel(bytes: usize, messages: usize) -> u64 {
    const LEAST: u64 = 1_000_000;
    const MOST: u64 = 16_000_000;
    (bytes as u64).saturating_mul(2).saturating_add(messages as u64 * 5_000).saturating_add(LEAST).min(MOST)
}

/// A message whose reasoning stands under each name that templates look for it, as transformers does.
fn with_reasoning(message: &Value) -> Value {
    let Value::Object(fields) = message else { return message.clone() };
    let names = ["reasoning_content", "thinking", "reasoning"];
    let Some(reasoning) = names.iter().filter_map(|name| fields.get(*name)).find(|value| !value.is_null()) else {
        return message.clone();
    };
    let mut out = Map::from_iter([("thinking".to_owned(), reasoning.clone())]);
    out.extend(fields.clone());
    out.insert("reasoning_content".to_owned(), reasoning.clone());
    Value::Object(out)
}

fn value(json: &Value) -> minijinja::Value {
    match json {
        Value::Null => ().into(),
        Value::Bool(truth) => (*truth).into(),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => number.into(),
            (_, Some(number)) => number.into(),
            _ => number.as_f64().unwrap_or_default().into(),
        },
        Value::String(text) => text.as_str().into(),
        Value::Array(items) => items.iter().map(value).collect(),
        Value::Object(fields) => minijinja::Value::from_pairs(fields.iter().map(|(k, v)| (k.as_str(), value(v)))),
    }
}

fn fail(name: &str, error: &minijinja::Error) -> Error {
    let (mut refusal, mut out_of_fuel) = (None, false);
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(found) = cause {
        refusal = refusal.or(found.downcast_ref::<Refusal>());
        out_of_fuel |= found.downcast_ref::<minijinja::Error>().is_some_and(|e| e.kind() == ErrorKind::OutOfFuel);
        cause = found.source();
    }
    let message = if let Some(Refusal(words)) = refusal {
        format!("refuses the conversation: {}", shown(words))
    } else if out_of_fuel {
        "takes too much work or memory for a conversation of this size: it may go round in circles".to_owned()
    } else {
        let line = error.line().map(|line| format!("line {line}: ")).unwrap_or_default();
        let detail = error.detail().map(|detail| format!(": {}", shown(detail))).unwrap_or_default();
        format!("{line}{}{detail}", error.kind())
    };
    Error::Template { name: name.to_owned(), message }
}

/// The beginning of what may be long.
fn shown(text: &str) -> String {
    const MOST: usize = 500;
    let end = text.char_indices().nth(MOST).map_or(text.len(), |(byte, _)| byte);
    text[..end].to_owned()
}
