//! The chat template of a dataset.

use serde_json::{Map, Value};

use super::Method;
use crate::chat::ChatTemplate;
use crate::dataset::DatasetConfig;
use crate::error::{Error, Result};
use crate::tokenizer::{Tokenizer, read_text};

/// How the records of a dataset become tokens.
pub(crate) fn method(config: &DatasetConfig, tokenizer: &Tokenizer) -> Result<Method> {
    let template = match &config.chat.template {
        Some(name) => {
            let path = config.template_file(name);
            Some(if path.is_file() {
                let text = read_text(&path)?;
                ChatTemplate::from_source(&path.display().to_string(), &text, special_tokens(tokenizer)?)?
            } else {
                ChatTemplate::built_in(name)?
            })
        }
        None => of_tokenizer(tokenizer)?,
    };
    Ok(Method { template, train_on: config.train_on() })
}

impl ChatTemplate {
    /// The template beside a tokenizer, that of its model or of the records that it was given: what [`ChatTemplate::of_directory`] finds
    /// where the tokenizer has been saved.
    ///
    /// # Errors
    /// [`Error::Template`] where it is no template, [`Error::Tokenizer`] for a configuration that cannot be read.
    pub fn of_tokenizer(tokenizer: &Tokenizer) -> Result<Option<Self>> {
        let saved = tokenizer.config_json()?;
        let saved =
            serde_json::from_str(&saved).map_err(|e| Error::tokenizer(CONFIG, format!("not valid JSON: {e}")))?;
        beside(tokenizer, special_tokens_of(saved))
    }
}

/// The template that came with a tokenizer from a model's folder.
fn of_tokenizer(tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>> {
    beside(tokenizer, special_tokens(tokenizer)?)
}

/// The template beside a tokenizer, with the special tokens that it may name.
fn beside(tokenizer: &Tokenizer, special: Map<String, Value>) -> Result<Option<ChatTemplate>> {
    if let Some(text) = tokenizer.companion("chat_template.jinja") {
        return ChatTemplate::from_source("chat_template.jinja", text, special).map(Some);
    }
    let of_config = match tokenizer_config(tokenizer)?.remove("chat_template") {
        Some(Value::String(text)) => Some(text),
        Some(Value::Array(named)) => {
            let default = named.iter().find(|item| item.get("name").and_then(Value::as_str) == Some("default"));
            default.and_then(|item| item.get("template")).and_then(Value::as_str).map(str::to_owned)
        }
        _ => None,
    };
    of_config.map(|text| ChatTemplate::from_source(CONFIG, &text, special)).transpose()
}

/// The special tokens that a template may name, `bos_token` and its like.
fn special_tokens(tokenizer: &Tokenizer) -> Result<Map<String, Value>> {
    Ok(special_tokens_of(tokenizer_config(tokenizer)?))
}

/// Those of a configuration.
fn special_tokens_of(config: Map<String, Value>) -> Map<String, Value> {
    let token = |value: &Value| value.as_str().or_else(|| value.get("content")?.as_str()).map(Value::from);
    let named = config.into_iter().filter(|(key, _)| key.ends_with("_token"));
    named.filter_map(|(key, value)| Some((key, token(&value)?))).collect()
}

const CONFIG: &str = "tokenizer_config.json";

/// The configuration that came with a tokenizer; empty where there is none.
fn tokenizer_config(tokenizer: &Tokenizer) -> Result<Map<String, Value>> {
    let Some(text) = tokenizer.companion(CONFIG) else { return Ok(Map::new()) };
    serde_json::from_str(text).map_err(|e| Error::tokenizer(CONFIG, format!("not valid JSON: {e}")))
}
