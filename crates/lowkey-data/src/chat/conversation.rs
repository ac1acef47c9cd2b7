//! What a template is given: messages, and what comes with them.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// A conversation as it stands in a file: an object with `messages`, or a bare list of messages.
///
/// A message is an object with a `role`; what else it holds (`content`, `tool_calls`, `reasoning_content`) is for the template.
/// Arguments of tool calls are objects, not JSON in a string: templates iterate over them.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(try_from = "Value")]
pub struct Conversation {
    /// The messages, in order; each is an object.
    pub messages: Vec<Value>,
    /// Tools that the assistant may call: a list of JSON Schemas.
    pub tools: Option<Value>,
    /// Documents to answer from: a list of objects.
    pub documents: Option<Value>,
    /// Further variables of the template, such as `enable_thinking`.
    pub variables: Map<String, Value>,
}

impl Conversation {
    /// A conversation of messages alone.
    pub fn new(messages: Vec<Value>) -> Self {
        Self { messages, ..Self::default() }
    }

    /// Reads `{"messages": [...], "tools": [...], "documents": [...], "variables": {...}}`, of which only `messages` must be
    /// there, or a bare list of messages. Other keys are left alone: rows of datasets have them.
    ///
    /// # Errors
    /// [`Error::Conversation`] naming the key or the message that cannot be used.
    pub fn from_json(value: Value) -> Result<Self> {
        let mut fields = match value {
            Value::Array(messages) => Map::from_iter([("messages".to_owned(), Value::Array(messages))]),
            Value::Object(fields) => fields,
            other => {
                return Err(refused(format!(
                    "must be an object with messages, or a list of them, not {}",
                    kind(&other)
                )));
            }
        };
        let messages = match fields.remove("messages") {
            Some(Value::Array(messages)) => messages,
            Some(other) => return Err(refused(format!("messages must be a list, not {}", kind(&other)))),
            None => return Err(refused("has no messages".to_owned())),
        };
        for (i, message) in messages.iter().enumerate() {
            let Value::Object(message) = message else {
                return Err(refused(format!("message {}: must be an object, not {}", i + 1, kind(message))));
            };
            match message.get("role") {
                Some(Value::String(_)) => {}
                Some(other) => {
                    return Err(refused(format!("message {}: role must be a string, not {}", i + 1, kind(other))));
                }
                None => return Err(refused(format!("message {}: has no role (user, assistant, system, tool)", i + 1))),
            }
        }
        let mut list = |key: &str| match fields.remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Array(items)) => match items.iter().position(|item| !item.is_object()) {
                None => Ok(Some(Value::Array(items))),
                Some(i) => Err(refused(format!("{key}: item {} must be an object, not {}", i + 1, kind(&items[i])))),
            },
            Some(other) => Err(refused(format!("{key} must be a list of objects, not {}", kind(&other)))),
        };
        let (tools, documents) = (list("tools")?, list("documents")?);
        let variables = match fields.remove("variables") {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(variables)) => variables,
            Some(other) => return Err(refused(format!("variables must be an object, not {}", kind(&other)))),
        };
        Ok(Self { messages, tools, documents, variables })
    }

    /// The role of a message; empty where it has none.
    pub(crate) fn role(&self, message: usize) -> &str {
        self.messages.get(message).and_then(|message| message.get("role")).and_then(Value::as_str).unwrap_or_default()
    }

    /// The first `count` messages, with everything else.
    pub(crate) fn first(&self, count: usize) -> Self {
        let messages = self.messages.iter().take(count).cloned().collect();
        Self {
            messages,
            tools: self.tools.clone(),
            documents: self.documents.clone(),
            variables: self.variables.clone(),
        }
    }
}

impl TryFrom<Value> for Conversation {
    type Error = Error;

    fn try_from(value: Value) -> Result<Self> {
        Self::from_json(value)
    }
}

fn refused(message: String) -> Error {
    Error::Conversation { message }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
