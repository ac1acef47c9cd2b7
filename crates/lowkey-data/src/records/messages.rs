//! Lists of messages: `role`, `content`, `tool_calls`, and what is said about learning them.

use serde_json::{Map, Value};

use super::shown;

/// Roles that chat templates know.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// Messages, and for each what its record says of it: that it is learnt, or that it is not.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Said {
    pub(super) messages: Vec<Map<String, Value>>,
    pub(super) said: Vec<Option<bool>>,
}

impl Said {
    pub(super) fn push(&mut self, message: Map<String, Value>) {
        self.messages.push(message);
        self.said.push(None);
    }

    pub(super) fn append(&mut self, mut other: Self) {
        self.messages.append(&mut other.messages);
        self.said.append(&mut other.said);
    }
}

/// A message of plain text.
pub(super) fn message(role: &str, content: &str) -> Map<String, Value> {
    let mut message = Map::new();
    message.insert("role".to_owned(), Value::from(role));
    message.insert("content".to_owned(), Value::from(content));
    message
}

/// The list of messages under the field `name`.
pub(super) fn messages(value: &Value, name: &str) -> Result<Said, String> {
    let Value::Array(items) = value else {
        return Err(format!("field {name:?} is not a list of messages but {}", shown(value)));
    };
    if items.is_empty() {
        return Err(format!("field {name:?} is an empty list of messages"));
    }
    let mut said = Said::default();
    for (i, item) in items.iter().enumerate() {
        let (message, learnt) = read(item).map_err(|why| format!("message {} of {name:?} {why}", i + 1))?;
        said.messages.push(message);
        said.said.push(learnt);
    }
    Ok(said)
}

/// One message as a template reads it, and what is said about learning it.
fn read(item: &Value) -> Result<(Map<String, Value>, Option<bool>), String> {
    let Value::Object(given) = item else { return Err(format!("is not an object but {}", shown(item))) };
    let mut message = given.clone();
    message.retain(|_, value| !value.is_null());
    let role = match message.get("role") {
        Some(Value::String(role)) if ROLES.contains(&role.as_str()) => role.clone(),
        Some(role) => return Err(format!("has the unknown role {}; the roles are {ROLES:?}", shown(role))),
        None if given.contains_key("from") => {
            return Err("has \"from\" and no \"role\": set source.records = \"sharegpt\"".to_owned());
        }
        None => return Err(format!("has no role; the roles are {ROLES:?}")),
    };
    let weight = weight(message.remove("weight").as_ref())?;
    let training = match message.remove("training") {
        None => None,
        Some(Value::Bool(training)) => Some(training),
        Some(other) => return Err(format!("has training = {}; it must be true or false", shown(&other))),
    };
    let learnt = match (weight, training) {
        (Some(weight), Some(training)) if weight != training => {
            return Err("has a weight and a training that contradict each other: leave one of them out".to_owned());
        }
        (weight, training) => weight.or(training),
    };
    if let Some(calls) = message.remove("tool_calls").filter(|calls| *calls != Value::Array(Vec::new())) {
        if role != "assistant" {
            return Err(format!("has tool_calls, and its role is {role:?}: only an assistant calls tools"));
        }
        message.insert("tool_calls".to_owned(), tool_calls(&calls)?);
    }
    let content = match message.remove("content") {
        Some(content) => content_text(&content)?,
        // Templates look at the content of every message.
        None if message.contains_key("tool_calls") => String::new(),
        None => return Err("has no content".to_owned()),
    };
    message.insert("content".to_owned(), Value::String(content));
    Ok((message, learnt))
}

/// A message is learnt or it is not: sums over targets have no other weights.
fn weight(value: Option<&Value>) -> Result<Option<bool>, String> {
    match value.map(|weight| (weight, weight.as_f64())) {
        None => Ok(None),
        Some((_, Some(1.0))) => Ok(Some(true)),
        Some((_, Some(0.0))) => Ok(Some(false)),
        Some((weight, _)) => Err(format!(
            "has weight = {}; it must be 0 or 1: a token is a target or it is none, and the loss is the mean over targets",
            shown(weight)
        )),
    }
}

/// A content as one text: lists of parts are joined.
fn content_text(content: &Value) -> Result<String, String> {
    match content {
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => parts
            .iter()
            .map(|part| match (part, part.get("text"), part.get("type").and_then(Value::as_str)) {
                (Value::String(text), ..) | (_, Some(Value::String(text)), None | Some("text")) => Ok(text.as_str()),
                _ => Err(format!("has a part {} in its content: only text can be learnt", shown(part))),
            })
            .collect(),
        other => Err(format!("has a content that is no text but {}", shown(other))),
    }
}

/// Calls of tools as templates read them: `function` with `name` and, as a mapping, `arguments`.
fn tool_calls(calls: &Value) -> Result<Value, String> {
    let Value::Array(calls) = calls else {
        return Err(format!("has tool_calls that are no list but {}", shown(calls)));
    };
    let call = |call: &Value| -> Result<Value, String> {
        let Value::Object(given) = call else {
            return Err(format!("has a tool call that is no object but {}", shown(call)));
        };
        let mut call = given.clone();
        call.retain(|_, value| !value.is_null());
        let mut function = match call.remove("function") {
            Some(Value::Object(function)) => function,
            Some(other) => return Err(format!("has a tool call whose function is no object but {}", shown(&other))),
            // The call itself is the function.
            None => {
                let mut function = Map::new();
                for key in ["name", "arguments"] {
                    function.extend(call.remove(key).map(|value| (key.to_owned(), value)));
                }
                function
            }
        };
        if !function.get("name").is_some_and(Value::is_string) {
            return Err("has a tool call without the name of a function".to_owned());
        }
        let arguments = match function.remove("arguments") {
            None | Some(Value::Null) => Value::Object(Map::new()),
            Some(arguments @ Value::Object(_)) => arguments,
            Some(Value::String(text)) => match serde_json::from_str(&text) {
                Ok(arguments @ Value::Object(_)) => arguments,
                Ok(_) => return Err(format!("has a tool call whose arguments are the JSON of no object: {text:?}")),
                Err(e) => return Err(format!("has a tool call whose arguments are not valid JSON: {e}")),
            },
            Some(other) => return Err(format!("has a tool call whose arguments are no object but {}", shown(&other))),
        };
        function.insert("arguments".to_owned(), arguments);
        call.entry("type").or_insert_with(|| Value::from("function"));
        call.insert("function".to_owned(), Value::Object(function));
        Ok(Value::Object(call))
    };
    calls.iter().map(call).collect::<Result<Vec<_>, _>>().map(Value::Array)
}
