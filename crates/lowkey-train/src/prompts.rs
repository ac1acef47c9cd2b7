//! What a model is asked to write at the evaluations of a run: texts to go on with, and messages to answer.

use std::ops::ControlFlow;

use burn::tensor::Device;
use lowkey_data::Tokenizer;
use lowkey_data::chat::{ChatTemplate, Conversation, Options};
use lowkey_infer::{Form, GenerateConfig, SamplingConfig, generate};
use lowkey_model::CausalLm;
use serde_json::json;

use crate::error::{Error, Result};
use crate::run_config::EvalSection;

/// A prompt in tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Prompt {
    /// The key that it stands under, for messages.
    pub(crate) key: &'static str,
    /// As the run file has it.
    pub(crate) text: String,
    /// What the model reads.
    pub(crate) ids: Vec<u32>,
    /// Of an answer: what ends it, beside the tokens that end any text.
    end: Vec<u32>,
    /// Whether it is a message to answer.
    pub(crate) chat: bool,
}

/// The prompts of a run, those of `prompts` first.
///
/// # Errors
/// [`Error::Config`] for one that has no tokens, for messages where there is no chat template, and what the template says of them.
pub(crate) fn prompts(section: &EvalSection, tokenizer: &Tokenizer) -> Result<Vec<Prompt>> {
    let (mut prompts, plain) = (Vec::new(), "eval.prompts");
    for text in &section.prompts {
        let refuse = |why: String| Error::config(plain, format!("{text:?}"), why);
        let ids = tokenizer.encode_prompt(text).map_err(|e| refuse(e.to_string()))?;
        if ids.is_empty() {
            return Err(refuse("has no token to go on from; remove it".into()));
        }
        prompts.push(Prompt { key: plain, text: text.clone(), ids, end: Vec::new(), chat: false });
    }
    let Some(first) = section.chat.first() else { return Ok(prompts) };
    let key = "eval.chat";
    let refuse = |text: &String, why: String| Error::config(key, format!("{text:?}"), why);
    let template = ChatTemplate::of_tokenizer(tokenizer).map_err(|e| refuse(first, e.to_string()))?.ok_or_else(|| {
        let why = "there is no chat template to put it into: train on records of conversations, start from a model that has one, or \
                   write it among eval.prompts as the model is to read it";
        refuse(first, why.into())
    })?;
    let encoded = |text: &str| -> lowkey_data::Result<Vec<u32>> {
        Ok(tokenizer.encode_placed(text)?.into_iter().map(|token| token.id).collect())
    };
    let end = template.end_of_turn().and_then(|end| encoded(&end)).map_err(|e| refuse(first, e.to_string()))?;
    for text in &section.chat {
        let conversation = Conversation::new(vec![json!({ "role": "user", "content": text })]);
        let options = Options { add_generation_prompt: true, ..Options::default() };
        let ids = template.render(&conversation, &options).and_then(|rendered| encoded(&rendered.text));
        let ids = ids.map_err(|e| refuse(text, e.to_string()))?;
        if ids.is_empty() {
            return Err(refuse(text, "the chat template makes nothing of it".into()));
        }
        prompts.push(Prompt { key, text: text.clone(), ids, end: end.clone(), chat: true });
    }
    Ok(prompts)
}

impl Prompt {
    /// What a model writes.
    ///
    /// # Errors
    /// [`Error::Infer`] where the model's output is not usable, [`Error::Data`] where it is no text.
    pub(crate) fn written(
        &self,
        model: &CausalLm,
        section: &EvalSection,
        seed: u64,
        tokenizer: &Tokenizer,
        device: &Device,
    ) -> Result<String> {
        let room = model.config.max_position_embeddings.saturating_sub(self.ids.len());
        let config = GenerateConfig {
            max_new_tokens: section.sample_tokens.min(room),
            sampling: SamplingConfig { temperature: section.temperature, seed, ..SamplingConfig::default() },
            form: Form::Absorbed,
            eos: model.config.eos_token_id.clone(),
            ..GenerateConfig::default()
        };
        let device = device.clone().without_autodiff();
        let mut so_far = Vec::new();
        let mut stop = |id: u32| {
            so_far.push(id);
            if self.ends(&so_far) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let mut ids = generate(model, &self.ids, &config, &device, &mut stop)?.ids;
        if self.ends(&ids) {
            ids.truncate(ids.len() - self.end.len());
        }
        Ok(tokenizer.decode_after(&self.ids, &ids)?)
    }

    /// Whether what ends a turn has been written.
    fn ends(&self, ids: &[u32]) -> bool {
        !self.end.is_empty() && ids.ends_with(&self.end)
    }
}

#[cfg(test)]
mod tests;
