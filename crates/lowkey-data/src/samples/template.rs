//! The chat template of a dataset.

use super::Method;
use crate::chat::{ChatTemplate, special_tokens_of};
use crate::dataset::DatasetConfig;
use crate::error::Result;
use crate::tokenizer::{Tokenizer, read_text};

/// How the records of a dataset become tokens.
pub(crate) fn method(config: &DatasetConfig, tokenizer: &Tokenizer) -> Result<Method> {
    let template = match &config.chat.template {
        Some(name) => {
            let path = config.template_file(name);
            Some(if path.is_file() {
                let text = read_text(&path)?;
                ChatTemplate::from_source(&path.display().to_string(), &text, special_tokens_of(tokenizer)?)?
            } else {
                ChatTemplate::built_in(name)?
            })
        }
        None => ChatTemplate::of_tokenizer(tokenizer)?,
    };
    Ok(Method { template, train_on: config.train_on() })
}
