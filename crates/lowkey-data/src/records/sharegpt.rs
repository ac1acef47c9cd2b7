//! Conversations as ShareGPT has them: `from` and `value`.

use serde_json::{Map, Value};

use super::messages::{Said, message, messages};
use super::{field, text};

/// Who speaks, and what templates call them.
const SPEAKERS: [(&str, &str); 9] = [
    ("human", "user"),
    ("user", "user"),
    ("gpt", "assistant"),
    ("chatgpt", "assistant"),
    ("assistant", "assistant"),
    ("model", "assistant"),
    ("system", "system"),
    ("tool", "tool"),
    ("observation", "tool"),
];

/// The conversation of a record whose list lies under `list`; `system` of the record comes before it.
pub(super) fn conversation(object: &Map<String, Value>, list: &str) -> Result<Said, String> {
    let Value::Array(items) = field(object, list)? else { return Err(format!("field {list:?} is not a list")) };
    let renamed = items.iter().enumerate().map(|(i, item)| {
        let turn = |why: String| format!("message {} of {list:?} {why}", i + 1);
        let Value::Object(given) = item else { return Err(turn("is not an object".to_owned())) };
        let mut given = given.clone();
        let from = given.remove("from").filter(|from| !from.is_null());
        let from =
            from.ok_or_else(|| turn("has no \"from\"; with \"role\" it is source.records = \"messages\"".to_owned()))?;
        let role = SPEAKERS.iter().find(|(name, _)| from.as_str() == Some(name)).map(|(_, role)| *role);
        let role = role.ok_or_else(|| {
            let names = SPEAKERS.map(|(name, _)| name);
            turn(format!("is from the unknown {}; known are {names:?}", super::shown(&from)))
        })?;
        let value = given.remove("value").ok_or_else(|| turn("has no \"value\"".to_owned()))?;
        given.insert("role".to_owned(), Value::from(role));
        given.insert("content".to_owned(), value);
        Ok(Value::Object(given))
    });
    let listed = messages(&Value::Array(renamed.collect::<Result<_, _>>()?), list)?;
    let mut said = Said::default();
    if let Some(system) = text(object, "system")?.filter(|system| !system.is_empty()) {
        said.push(message("system", system));
    }
    said.append(listed);
    Ok(said)
}
