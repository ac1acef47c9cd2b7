//! The special tokens that stand around a text: those that transformers' `tokenizer(text)` adds.
//!
//! Two places say which. The post-processor of `tokenizer.json` puts them there; `add_bos_token` and `add_eos_token` of
//! `tokenizer_config.json`, where they stand, take its place, as in transformers 5 (and in the Llama classes of version 4):
//! DeepSeek's files have only those.

use std::sync::Arc;

use serde_json::Value;
use tokenizers::tokenizer::{Encoding, PostProcessor, Token, Tokenizer as HfTokenizer};

/// In `tokenizer_config.json` of a model that was trained here: whether its documents had these tokens around them.
pub(super) const RECORD: &str = "documents_have_special_tokens";

/// Stands for the text while a post-processor is asked what it puts around one. No vocabulary is that large.
const TEXT: u32 = u32::MAX;

/// What stands before a text and after it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Around {
    pub(super) before: Arc<[u32]>,
    pub(super) after: Arc<[u32]>,
}

impl Around {
    /// What the post-processor of a loaded tokenizer puts around a text.
    pub(super) fn of_post_processor(hf: &HfTokenizer) -> Result<Self, String> {
        let Some(processor) = hf.get_post_processor() else { return Ok(Self::default()) };
        let text = Encoding::from_tokens(vec![Token::new(TEXT, "text".to_owned(), (0, 4))], 0);
        let around = processor.process(text, None, true).map_err(|e| format!("its post_processor fails: {e}"))?;
        let ids = around.get_ids();
        let [before, after] = ids.split(|id| *id == TEXT).collect::<Vec<_>>()[..] else {
            return Err("its post_processor leaves the text out or repeats it".to_owned());
        };
        if let Some(id) = before.iter().chain(after).find(|id| hf.id_to_token(**id).is_none()) {
            return Err(format!("its post_processor adds token {id}, which its vocabulary lacks"));
        }
        Ok(Self { before: before.into(), after: after.into() })
    }

    /// The same after `tokenizer_config.json` has had its say; `id` finds the token that one of its keys names.
    pub(super) fn configured(self, config: &Value, id: impl Fn(&str) -> Option<u32>) -> Self {
        let recorded = config.get(RECORD).is_some();
        let side = |key: &str, token: &str, given: Arc<[u32]>| match config.get(key).and_then(Value::as_bool) {
            Some(true) => id(token).into_iter().collect(),
            // Written together with the record, which says the same and can be overruled.
            Some(false) if !recorded => Arc::default(),
            Some(false) | None => given,
        };
        Self {
            before: side("add_bos_token", "bos_token", self.before),
            after: side("add_eos_token", "eos_token", self.after),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.before.is_empty() && self.after.is_empty()
    }
}

/// The text of a token that a configuration names, which stands there as a string or as an object.
pub(super) fn named<'a>(config: &'a Value, key: &str) -> Option<&'a str> {
    match config.get(key)? {
        Value::String(token) => Some(token),
        token => token.get("content")?.as_str(),
    }
}
