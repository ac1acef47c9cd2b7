//! Where a model keeps its chat templates and the names of its special tokens.

use std::path::Path;

use serde_json::{Map, Value};

use super::ChatTemplate;
use crate::error::{Error, Result};
use crate::tokenizer::{Tokenizer, read_text};

/// The name of the template that is used where nobody asks for another.
const DEFAULT: &str = "default";

const CONFIG: &str = "tokenizer_config.json";

/// The text of a companion by its name, where there is one.
type Companions<'a> = &'a dyn Fn(&str) -> Result<Option<String>>;

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
        let read = |file: &str| {
            let path = dir.join(file);
            // What is there and is no file is refused.
            path.symlink_metadata().is_ok().then(|| read_text(&path)).transpose()
        };
        of_companions(dir, &read, name.unwrap_or(DEFAULT))
    }

    /// The template that came with a tokenizer from a model's folder, as [`ChatTemplate::of_directory`] finds it there.
    ///
    /// # Errors
    /// As [`ChatTemplate::of_directory`]; files are named without their folder.
    pub fn of_tokenizer(tokenizer: &Tokenizer) -> Result<Option<Self>> {
        let read = |file: &str| companion(tokenizer, file);
        of_companions(Path::new(""), &read, DEFAULT)
    }

    /// The text of that template alone, whatever it is.
    ///
    /// # Errors
    /// [`Error::Model`] naming the file that cannot be used.
    pub fn source_of_tokenizer(tokenizer: &Tokenizer) -> Result<Option<String>> {
        let (dir, read) = (Path::new(""), |file: &str| companion(tokenizer, file));
        Ok(source(dir, &read, &object(dir, &read, CONFIG)?, DEFAULT)?.map(|(_, text)| text))
    }
}

/// A file as it is written beside a tokenizer that is saved: its configuration names the special tokens that the tokenizer has, also where
/// it came without one.
fn companion(tokenizer: &Tokenizer, file: &str) -> Result<Option<String>> {
    match file {
        CONFIG => tokenizer.config_json().map(Some),
        _ => Ok(tokenizer.companion(file).map(str::to_owned)),
    }
}

/// The special tokens of a tokenizer that a template may name, `bos_token` and its like.
pub(crate) fn special_tokens_of(tokenizer: &Tokenizer) -> Result<Map<String, Value>> {
    let read = |file: &str| companion(tokenizer, file);
    Ok(special_tokens(&object(Path::new(""), &read, CONFIG)?))
}

/// The template of that name among files that lie in `dir`, which is for errors.
fn of_companions(dir: &Path, read: Companions<'_>, name: &str) -> Result<Option<ChatTemplate>> {
    let config = object(dir, read, CONFIG)?;
    let Some((file, text)) = source(dir, read, &config, name)? else { return Ok(None) };
    ChatTemplate::from_source(&dir.join(file).display().to_string(), &text, special_tokens(&config)).map(Some)
}

/// The file that holds the template of that name, and the template's text.
fn source(
    dir: &Path,
    read: Companions<'_>,
    config: &Map<String, Value>,
    name: &str,
) -> Result<Option<(String, String)>> {
    if !lowkey_files::is_plain_name(name) {
        return Err(Error::Template { name: name.to_owned(), message: "is no name of a template".to_owned() });
    }
    let file = match name {
        DEFAULT => "chat_template.jinja".to_owned(),
        other => format!("{}/{other}.jinja", lowkey_files::companions::TEMPLATES),
    };
    if let Some(text) = read(&file)? {
        return Ok(Some((file, text)));
    }
    for (file, object) in [("chat_template.json", &object(dir, read, "chat_template.json")?), (CONFIG, config)] {
        let fail = |message: &str| Error::Model { path: dir.join(file), message: format!("chat_template {message}") };
        let named = match object.get("chat_template") {
            None | Some(Value::Null) => continue,
            Some(Value::String(text)) => Vec::from([(DEFAULT, text.as_str())]),
            Some(Value::Array(list)) => {
                let mut named = Vec::with_capacity(list.len());
                for item in list {
                    let fields =
                        item.get("name").and_then(Value::as_str).zip(item.get("template").and_then(Value::as_str));
                    named.push(fields.ok_or_else(|| fail("has an entry without name and template, both texts"))?);
                }
                named
            }
            Some(_) => return Err(fail("must be a text, or a list of objects with name and template")),
        };
        if let Some((_, text)) = named.iter().find(|(known, _)| *known == name) {
            return Ok(Some((file.to_owned(), (*text).to_owned())));
        }
    }
    Ok(None)
}

/// The object in a JSON file; empty where there is no such file.
fn object(dir: &Path, read: Companions<'_>, file: &str) -> Result<Map<String, Value>> {
    let fail = |message: String| Error::Model { path: dir.join(file), message };
    let Some(text) = read(file)? else { return Ok(Map::new()) };
    match serde_json::from_str(&text).map_err(|e| fail(format!("not valid JSON: {e}")))? {
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
