//! Records of fine-tuning data: conversations, prompts with their completions, and pairs of answers of which one was chosen.
//!
//! Whatever the file's format and the names in it, a record becomes a [`Record`]: messages of the form that chat templates read
//! (`role`, `content`, `tool_calls` with arguments as mappings), or plain texts. What is wrong with one is a message without its
//! place, which who reads the file knows.

mod messages;
mod pair;
mod sharegpt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use messages::{Said, message, messages};

/// What a record of a JSONL or Parquet file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Records {
    /// A conversation: `messages`, a list of `role` and `content`, where an assistant's may have `tool_calls`; perhaps `tools`.
    Messages,
    /// `prompt` and `completion`: both texts, which are learnt as they are and end with the end-of-text token, or both lists of messages.
    Completion,
    /// A conversation as ShareGPT has it: `conversations`, a list of `from` (`human`, `gpt`, `system`, `tool`) and `value`.
    ShareGpt,
    /// `instruction`, `input` (which may be empty) and `output`: a conversation of one question and its answer.
    Alpaca,
    /// `chosen` and `rejected`, texts or lists of messages; perhaps `prompt`. Without it the prompt is what both begin with.
    Preference,
}

/// What an answer is learnt from.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Sample {
    /// Messages, which a chat template makes a text of.
    Chat(Chat),
    /// A text that goes on with another, as they are.
    Text { prompt: String, completion: String },
}

/// A conversation.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Chat {
    /// Objects with `role` and `content`.
    pub(crate) messages: Vec<Map<String, Value>>,
    /// For each message what the record says of it: that it is learnt, or that it is not.
    pub(crate) said: Vec<Option<bool>>,
    /// Descriptions of the tools that an assistant may call.
    pub(crate) tools: Vec<Value>,
    /// How many messages are the prompt, where the record says so.
    pub(crate) prompt: Option<usize>,
}

/// A record.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Record {
    One(Sample),
    Pair { chosen: Sample, rejected: Sample },
}

impl Records {
    /// The usual name of the list of messages; none where a record has no such list.
    pub(crate) fn list(self) -> Option<&'static str> {
        match self {
            Self::Messages => Some("messages"),
            Self::ShareGpt => Some("conversations"),
            Self::Completion | Self::Alpaca | Self::Preference => None,
        }
    }

    /// The fields of a record that are read; `list` is the name of its list of messages.
    pub(crate) fn fields(self, list: &str) -> Vec<&str> {
        match self {
            Self::Messages => vec![list, "tools"],
            Self::Completion => vec!["prompt", "completion", "tools"],
            Self::ShareGpt => vec![list, "system", "tools"],
            Self::Alpaca => vec!["instruction", "input", "output", "system"],
            Self::Preference => vec!["prompt", "chosen", "rejected", "tools"],
        }
    }

    /// Reads a record whose list of messages, if it is one, lies under `list`.
    ///
    /// # Errors
    /// What is wrong with it and how to mend it, in words that follow the name of its place.
    pub(crate) fn read(self, object: &Map<String, Value>, list: &str) -> Result<Record, String> {
        let chat = |messages: Said, prompt| -> Result<Record, String> {
            Ok(Record::One(Sample::Chat(Chat::new(messages, tools(object)?, prompt))))
        };
        match self {
            Self::Messages => chat(messages(field(object, list)?, list)?, None),
            Self::ShareGpt => chat(sharegpt::conversation(object, list)?, None),
            Self::Alpaca => {
                let mut said = Said::default();
                if let Some(system) = text(object, "system")?.filter(|system| !system.is_empty()) {
                    said.push(message("system", system));
                }
                let instruction = needed(object, "instruction")?;
                let input = text(object, "input")?.filter(|input| !input.is_empty());
                said.push(message(
                    "user",
                    &[Some(instruction), input].into_iter().flatten().collect::<Vec<_>>().join("\n\n"),
                ));
                let prompt = said.messages.len();
                said.push(message("assistant", needed(object, "output")?));
                chat(said, Some(prompt))
            }
            Self::Completion => {
                let (prompt, completion) = (field(object, "prompt")?, field(object, "completion")?);
                if let (Value::String(prompt), Value::String(completion)) = (prompt, completion) {
                    return Ok(Record::One(Sample::Text { prompt: prompt.clone(), completion: completion.clone() }));
                }
                let mut said = messages(prompt, "prompt")?;
                let prompt = said.messages.len();
                said.append(messages(completion, "completion")?);
                chat(said, Some(prompt))
            }
            Self::Preference => pair::pair(object, &tools(object)?),
        }
    }
}

impl Chat {
    pub(crate) fn new(said: Said, tools: Vec<Value>, prompt: Option<usize>) -> Self {
        let Said { messages, said } = said;
        Self { messages, said, tools, prompt }
    }

    /// Whether a message is an assistant's.
    pub(crate) fn is_answer(&self, index: usize) -> bool {
        self.messages.get(index).and_then(|message| message.get("role")).and_then(Value::as_str) == Some("assistant")
    }
}

/// Messages of plain texts, each with its role.
pub(crate) fn messages_of(turns: &[(&str, &str)]) -> Said {
    let mut said = Said::default();
    turns.iter().for_each(|(role, content)| said.push(message(role, content)));
    said
}

/// A field that must be there and not null.
fn field<'a>(object: &'a Map<String, Value>, name: &str) -> Result<&'a Value, String> {
    object.get(name).filter(|value| !value.is_null()).ok_or_else(|| {
        let names: Vec<&String> = object.keys().take(32).collect();
        format!("no field {name:?}; the record has {names:?}: set source.records to what these are")
    })
}

/// A text, if it is there and not null.
fn text<'a>(object: &'a Map<String, Value>, name: &str) -> Result<Option<&'a str>, String> {
    match object.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(format!("field {name:?} is not a string")),
    }
}

/// A text that must be there.
fn needed<'a>(object: &'a Map<String, Value>, name: &str) -> Result<&'a str, String> {
    field(object, name)?.as_str().ok_or_else(|| format!("field {name:?} is not a string"))
}

/// `tools`: a list, or the JSON of one, as columns that must have one type hold it.
fn tools(object: &Map<String, Value>) -> Result<Vec<Value>, String> {
    let list = match object.get("tools") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(Vec::new()),
        Some(Value::String(text)) => {
            serde_json::from_str(text).map_err(|e| format!("field \"tools\" is a text that is not valid JSON: {e}"))?
        }
        Some(list) => list.clone(),
    };
    match list {
        Value::Null => Ok(Vec::new()),
        Value::Array(tools) if tools.iter().all(Value::is_object) => Ok(tools),
        _ => Err("field \"tools\" is not a list of objects".to_owned()),
    }
}

/// What a message shows of itself in an error.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    let end = text.floor_char_boundary(60);
    if end < text.len() { format!("{}…", &text[..end]) } else { text }
}

#[cfg(test)]
mod tests;
