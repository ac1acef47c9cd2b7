//! A template and what it makes of a conversation.

use std::ops::Range;
use std::sync::Arc;

use minijinja::Environment;
use minijinja::syntax::SyntaxConfig;
use serde_json::{Map, Value};

use super::conversation::Conversation;
use super::time::Now;
use crate::error::{Error, Result};

/// A chat template; cheap to clone.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    name: Arc<str>,
    source: Arc<str>,
    special_tokens: Arc<Map<String, Value>>,
    environment: Arc<Environment<'static>>,
}

/// How a conversation is rendered.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    /// End with what comes before the assistant's next message, for a model to go on from.
    pub add_generation_prompt: bool,
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

const BUILT_IN: [(&str, &str); 1] = [("chatml", include_str!("built_in/chatml.jinja"))];

impl ChatTemplate {
    /// A template from its text. `special_tokens` are variables that it may use, such as `bos_token`.
    ///
    /// # Errors
    /// [`Error::Template`] with the line where the text is no template.
    pub fn from_source(name: &str, text: &str, special_tokens: Map<String, Value>) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| fail(name, &e))?);
        environment.add_template_owned("chat", text.to_owned()).map_err(|e| fail(name, &e))?;
        let (environment, special_tokens) = (Arc::new(environment), Arc::new(special_tokens));
        Ok(Self { name: name.into(), source: text.into(), special_tokens, environment })
    }

    /// One of lowkey's own templates.
    ///
    /// # Errors
    /// [`Error::Template`] for a name that is none of them.
    pub fn built_in(name: &str) -> Result<Self> {
        match BUILT_IN.iter().find(|(known, _)| *known == name) {
            Some((_, text)) => Self::from_source(name, text, Map::new()),
            None => {
                let known: Vec<&str> = BUILT_IN.iter().map(|(name, _)| *name).collect();
                let message = format!("is not built in; these are: {}", known.join(", "));
                Err(Error::Template { name: name.to_owned(), message })
            }
        }
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// [`Error::Template`] with the template's own words where it refuses the conversation.
    pub fn render(&self, conversation: &Conversation, options: &Options) -> Result<Rendered> {
        let _ = options.now;
        let template = self.environment.get_template("chat").map_err(|e| fail(&self.name, &e))?;
        let context = [
            ("messages", value(&Value::Array(conversation.messages.clone()))),
            ("add_generation_prompt", options.add_generation_prompt.into()),
        ];
        let context = minijinja::Value::from_pairs(context);
        let text = template.render(context).map_err(|e| fail(&self.name, &e))?;
        let _ = &self.special_tokens;
        Ok(Rendered { text, spans: Vec::new() })
    }
}

fn value(json: &Value) -> minijinja::Value {
    match json {
        Value::Null => ().into(),
        Value::Bool(b) => (*b).into(),
        Value::Number(number) => number.as_f64().unwrap_or_default().into(),
        Value::String(text) => text.as_str().into(),
        Value::Array(items) => items.iter().map(value).collect(),
        Value::Object(fields) => minijinja::Value::from_pairs(fields.iter().map(|(k, v)| (k.as_str(), value(v)))),
    }
}

fn fail(name: &str, error: &minijinja::Error) -> Error {
    Error::Template { name: name.to_owned(), message: error.to_string() }
}
