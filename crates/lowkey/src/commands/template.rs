//! `lowkey template`.

use std::path::Path;

use anyhow::Context;
use lowkey_data::Tokenizer;
use lowkey_data::chat::{Answers, ChatTemplate, Conversation, Now, Options};
use serde_json::{Map, Value, json};

use super::WrongUse;
use crate::cli::TemplateArguments;
use crate::output::{say_json, stream};

/// Bytes of a conversation at most.
const LONGEST: u64 = 1 << 28;

pub(crate) fn template(arguments: &TemplateArguments) -> anyhow::Result<()> {
    let template = open(&arguments.template, arguments.name.as_deref())?;
    let file = arguments.messages.display();
    let text = lowkey_files::read_text(&arguments.messages, LONGEST)?;
    let value: Value = serde_json::from_str(&text).with_context(|| format!("{file}: not valid JSON"))?;
    let conversation = Conversation::from_json(value).with_context(|| file.to_string())?;
    let now = arguments.now.map_or(Now::Clock, Now::At);
    let options = Options { add_generation_prompt: arguments.add_generation_prompt, now, ..Options::default() };
    let text = template.render(&conversation, &options)?.text;
    if !arguments.json {
        stream(&text);
        return Ok(());
    }
    let mut out = Map::new();
    out.insert("template".into(), template.name().into());
    // What can be rendered is shown, even where nobody can tell whose it is.
    let (answers, unsure) = match template.answers(&conversation, now) {
        Ok(answers) if text.starts_with(&answers.text) => (Answers { text, ..answers }, None),
        Ok(_) => {
            (Answers { text, spans: Vec::new() }, Some("the generation prompt changes what comes before it".to_owned()))
        }
        Err(e) => (Answers { text, spans: Vec::new() }, Some(e.to_string())),
    };
    out.insert("text".into(), answers.text.as_str().into());
    let spans: Vec<Value> = answers
        .spans
        .iter()
        .map(|span| json!({ "message": span.message, "bytes": [span.bytes.start, span.bytes.end], "text": answers.text[span.bytes.clone()] }))
        .collect();
    out.insert("spans".into(), spans.into());
    out.extend(unsure.map(|why| ("spans_unknown".into(), Value::String(why))));
    if arguments.template.join("tokenizer.json").is_file() {
        let tokens = Tokenizer::from_model_dir(&arguments.template)?.encode_placed(&answers.text)?;
        let messages = answers.messages_of(tokens.iter().map(|token| &token.bytes));
        out.insert("ids".into(), tokens.iter().map(|token| token.id).collect());
        out.insert("mask".into(), messages.iter().map(|message| u8::from(message.is_some())).collect());
    }
    say_json(&out)
}

/// A model's template, a file's, or a built-in one.
fn open(from: &Path, name: Option<&str>) -> anyhow::Result<ChatTemplate> {
    let built_in = ChatTemplate::built_in_names();
    if from.is_dir() {
        let found = ChatTemplate::of_directory(from, name)?;
        return Ok(found.ok_or_else(|| {
            let which = name.map_or_else(String::new, |name| format!(" called {name}"));
            WrongUse(format!(
                "{}: has no chat template{which}; a built-in one may do: {}",
                from.display(),
                built_in.join(", ")
            ))
        })?);
    }
    if let Some(name) = name {
        Err(WrongUse(format!("--name {name}: {} is no model directory, and has one template only", from.display())))?;
    }
    match from.to_str().filter(|name| built_in.contains(name)) {
        Some(name) => Ok(ChatTemplate::built_in(name)?),
        None if from.exists() || from.extension().is_some() => {
            let text = lowkey_files::read_text(from, LONGEST)?;
            Ok(ChatTemplate::from_source(&from.display().to_string(), &text, Map::new())?)
        }
        None => Err(WrongUse(format!(
            "{}: neither a model directory, nor a file, nor a built-in template ({})",
            from.display(),
            built_in.join(", ")
        )))?,
    }
}
