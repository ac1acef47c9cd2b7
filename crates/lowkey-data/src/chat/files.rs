//! Where a model keeps its chat templates and the names of its special tokens.

use std::path::Path;

use serde_json::{Map, Value};

use super::ChatTemplate;
use crate::error::{Error, Result};
use crate::tokenizer::read_text;

/// The name of the template that is used where nobody asks for another.
const DEFAULT: &str = "default";

impl ChatTemplate {
    /// The template of a model directory; `None` where it has none, or none of that name.
    ///
    /// The first of these that there is, as in transformers: `chat_template.jinja` with `additional_chat_templates/NAME.jinja`
    /// beside it; `chat_template` in `chat_template.json`; `chat_template` in `tokenizer_config.json`, a text or a list of
    /// `{name, template}`. Without `name` the one called `default` is taken.
    ///
    /// # Errors
    /// [`Error::Model`] or [`Error::Files`] naming the file that cannot be used, [`Error::Template`] where the text is no template.
    pub fn of_directory(dir: &Path, name: Option<&str>) -> Result<Option<Self>> {
        let config = read_object(&dir.join("tokenizer_config.json"))?;
        let special = special_tokens(&config);
        let name = name.unwrap_or(DEFAULT);
        if !lowkey_files::is_plain_name(name) {
            return Err(Error::Template { name: name.to_owned(), message: "is no name of a template".to_owned() });
        }
        let mut path = dir.join("chat_template.jinja");
        if name != DEFAULT {
            path = dir.join("additional_chat_templates").join(format!("{name}.jinja"));
        }
        // What is there and is no file is refused.
        if path.symlink_metadata().is_ok() {
            return Self::from_source(&path.display().to_string(), &read_text(&path)?, special).map(Some);
        }
        for (file, object) in [("chat_template.json", None), ("tokenizer_config.json", Some(&config))] {
            let path = dir.join(file);
            let read = object.is_none().then(|| read_object(&path)).transpose()?;
            let fail = |message: &str| Error::Model { path: path.clone(), message: format!("chat_template {message}") };
            let Some(found) = object.or(read.as_ref()).and_then(|object| object.get("chat_template")) else { continue };
            let named = match found {
                Value::Null => continue,
                Value::String(text) => Vec::from([(DEFAULT, text.as_str())]),
                Value::Array(list) => {
                    let mut named = Vec::with_capacity(list.len());
                    for item in list {
                        let fields =
                            item.get("name").and_then(Value::as_str).zip(item.get("template").and_then(Value::as_str));
                        named.push(fields.ok_or_else(|| fail("has an entry without name and template, both texts"))?);
                    }
                    named
                }
                _ => return Err(fail("must be a text, or a list of objects with name and template")),
            };
            if let Some((_, text)) = named.iter().find(|(known, _)| *known == name) {
                return Self::from_source(&path.display().to_string(), text, special).map(Some);
            }
        }
        Ok(None)
    }
}

/// The object in a JSON file; empty where there is no such file.
fn read_object(path: &Path) -> Result<Map<String, Value>> {
    if path.symlink_metadata().is_err() {
        return Ok(Map::new());
    }
    let fail = |message: String| Error::Model { path: path.to_path_buf(), message };
    match serde_json::from_str(&read_text(path)?).map_err(|e| fail(format!("not valid JSON: {e}")))? {
        Value::Object(map) => Ok(map),
        _ => Err(fail("must hold a JSON object".to_owned())),
    }
}

/// The special tokens that a template may name, `bos_token` and its like: each a text, or an object with its `content`.
fn special_tokens(config: &Map<String, Value>) -> Map<String, Value> {
    let text = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Object(token) => token.get("content").and_then(Value::as_str).map(str::to_owned),
        _ => None,
    };
    let is_token = |key: &str| key.ends_with("_token") && !key.starts_with("add_");
    config
        .iter()
        .filter(|(key, _)| is_token(key))
        .filter_map(|(key, value)| Some((key.clone(), Value::String(text(value)?))))
        .collect()
}
