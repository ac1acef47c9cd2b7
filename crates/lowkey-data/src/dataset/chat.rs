//! `[chat]` of a dataset file: how records become tokens, and which of these are learnt.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{DatasetConfig, Source, StorybookForm, TokenizerConfig};
use crate::error::Result;
use crate::records::Records;
use crate::tokenizer::Tokenizer;

/// How records become tokens, and which of these are learnt.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ChatConfig {
    /// The chat template: a built-in one by its name, or a file; relative to the folder of this file. Absent: that of the model which the
    /// tokenizer comes from. A run file may name another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// Which tokens are learnt. Absent: `completion` where a record says what its prompt is, else `assistant`. A run file may say
    /// otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train_on: Option<TrainOn>,
    /// Whether a record that cannot be used (broken JSON, an unknown role, no token to learn, …) is left out and counted. With `false` it
    /// is an error that names its place.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skip_bad: bool,
}

/// Which tokens of a record are learnt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TrainOn {
    /// Every answer of the assistant, with the token that ends it.
    Assistant,
    /// The last answer alone.
    Last,
    /// What follows the prompt, in records that say what it is.
    Completion,
    /// Everything: prompts, too.
    All,
}

impl TrainOn {
    /// Its name in a dataset file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Assistant => "assistant",
            Self::Last => "last",
            Self::Completion => "completion",
            Self::All => "all",
        }
    }
}

impl ChatConfig {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl DatasetConfig {
    /// What a record of the source is; none where documents are plain text.
    pub fn records(&self) -> Option<Records> {
        match self.source {
            Source::Jsonl { records, .. } | Source::Parquet { records, .. } | Source::Hub { records, .. } => records,
            Source::Storybook { form: StorybookForm::Pairs, .. } => Some(Records::Preference),
            Source::Storybook { .. } | Source::Task { .. } | Source::Text { .. } => None,
        }
    }

    /// Whether documents are records or conversations, of which some tokens are learnt and others are not.
    pub fn is_chat(&self) -> bool {
        let told = matches!(self.source, Source::Storybook { form: StorybookForm::Chat, .. });
        told || self.records().is_some()
    }

    /// Which tokens are learnt.
    pub fn train_on(&self) -> TrainOn {
        let usual = match self.records() {
            Some(Records::Completion | Records::Alpaca | Records::Preference) => TrainOn::Completion,
            Some(Records::Messages | Records::ShareGpt) | None => TrainOn::Assistant,
        };
        self.chat.train_on.unwrap_or(usual)
    }

    /// The name of the list of messages in a record.
    pub(crate) fn list(&self) -> &str {
        let (Source::Jsonl { field, .. }
        | Source::Parquet { column: field, .. }
        | Source::Hub { field: Some(field), .. }) = &self.source
        else {
            return self.records().and_then(Records::list).unwrap_or_default();
        };
        // What holds plain text unless said otherwise holds messages under their usual name.
        match self.records().and_then(Records::list) {
            Some(usual) if field == "text" => usual,
            _ => field,
        }
    }

    /// The file that `chat.template` names: beside the dataset file, or where it was said.
    pub(crate) fn template_file(&self, template: &str) -> PathBuf {
        let beside = self.base.join(template);
        if beside.is_file() { beside } else { Path::new(template).to_path_buf() }
    }

    /// What sets the tokens of records apart in the name of their folder: the template, and what is learnt.
    pub(super) fn chat_key(&self, tokenizer: Option<&Tokenizer>) -> Option<String> {
        if !self.is_chat() {
            return None;
        }
        let own = |name| tokenizer.and_then(|tokenizer| tokenizer.companion(name)).unwrap_or_default();
        let mut hash = Sha256::new();
        hash.update(format!("{:?} {}\n", self.chat.template, self.train_on().name()));
        if self.chat.template.is_none() {
            hash.update(own("chat_template.jinja"));
            hash.update(own("chat_template.json"));
            hash.update(own("tokenizer_config.json"));
        }
        Some(lowkey_files::hash::hex(&hash.finalize()).chars().take(8).collect())
    }

    /// Checks what is said of records.
    pub(super) fn check_chat(&self) -> Result<()> {
        let refuse = |message: String| Err(self.error(message));
        if !self.is_chat() {
            if !self.chat.is_default() {
                return refuse(
                    "[chat] has a meaning for records alone: set source.records (or source.form = \"chat\" of a storybook), or \
                     remove it"
                        .to_owned(),
                );
            }
            return Ok(());
        }
        if matches!(self.tokenizer, TokenizerConfig::Bpe { .. } | TokenizerConfig::Chars) {
            return refuse(
                "tokenizer.kind must be \"file\" or \"bytes\" for records: a tokenizer is built from plain text, and brings no chat \
                 template"
                    .to_owned(),
            );
        }
        let list = self.records().and_then(Records::list);
        let plain = list.is_none() && self.records().is_some();
        if plain && !matches!(self.list(), "text" | "") {
            let field = self.list();
            return refuse(format!("the name {field:?} of a field has no meaning for these records: remove it"));
        }
        let on = self.train_on();
        match self.records() {
            Some(Records::Preference) if on != TrainOn::Completion => refuse(format!(
                "train_on = {:?}: of a pair its answers alone are compared; remove it, or write \"completion\"",
                on.name()
            )),
            Some(Records::Messages | Records::ShareGpt) | None if on == TrainOn::Completion => refuse(
                "train_on = \"completion\" needs records that say what their prompt is; write \"assistant\", \"last\" or \"all\""
                    .to_owned(),
            ),
            _ => Ok(()),
        }
    }
}
