//! `lowkey generate`.

use std::ops::ControlFlow;
use std::path::Path;

use lowkey_data::chat::{ChatTemplate, Conversation, Options};
use lowkey_data::{Generation, Tokenizer};
use lowkey_infer::{CacheDtype, Finish, Form, GenerateConfig, SamplingConfig, Weights};
use lowkey_model::{ModelDir, adapter::companion_dir};
use serde_json::json;

use super::WrongUse;
use crate::cli::GenerateArguments;
use crate::output::{bytes, complain, say, say_json, stream};

/// Tokens to add where nobody says how many.
const NEW_TOKENS: usize = 200;
/// No context is longer than a prompt of so many bytes.
const LONGEST_PROMPT: u64 = 1 << 28;

pub(crate) fn generate(arguments: &GenerateArguments) -> anyhow::Result<()> {
    let form: Form = arguments.decode.parse().map_err(|e| WrongUse(format!("--decode {}: {e}", arguments.decode)))?;
    let wrong = |e| WrongUse(format!("--cache-dtype {}: {e}", arguments.cache_dtype));
    let cache_dtype: CacheDtype = arguments.cache_dtype.parse().map_err(wrong)?;
    let packing = super::packing(&arguments.weights)?;
    let prompt = match (&arguments.prompt, &arguments.prompt_file) {
        (Some(prompt), _) => prompt.clone(),
        (None, Some(path)) => lowkey_files::read_text(path, LONGEST_PROMPT)?,
        (None, None) => String::new(),
    };
    if arguments.stop.iter().any(String::is_empty) {
        return Err(WrongUse("--stop \"\": an empty text would stop before the first token".into()).into());
    }
    let device = super::open_device(&arguments.device)?;
    let tokenizer = super::open_tokenizer(&arguments.model, arguments.add_special_tokens)?;
    let beside = companion_dir(&arguments.model, "tokenizer.json")?;
    let settings = companion_dir(&arguments.model, "generation_config.json")?;
    let declared = Generation::from_model_dir(&settings, Some(&tokenizer))?;
    let dir = ModelDir::open(&arguments.model)?;
    // Weights that were fused are of the whole latent, and not packed: who packs means to read less.
    let fuses = arguments.kv_rank.is_none() && (packing.is_none() || form == Form::Fused);
    let (model, fused) = match packing {
        Some(packing) if !fuses => (dir.load_packed(packing, &device)?, Vec::new()),
        _ => {
            let whole = dir.load(&device)?;
            let fused =
                if fuses { super::export::fused_weights(&arguments.model, &whole, &device)? } else { Vec::new() };
            (packing.map(|packing| whole.packed_to_read(packing)).transpose()?.unwrap_or(whole), fused)
        }
    };
    let model = super::read_at(model, arguments.kv_rank)?;
    let encoded = if arguments.chat { asked(&prompt, &beside, &tokenizer)? } else { tokenizer.encode_prompt(&prompt) };
    let mut ids = encoded.map_err(|e| WrongUse(format!("the prompt cannot be encoded: {e}")))?;
    if ids.is_empty() {
        // With nothing to continue, a text begins where the last one ended.
        let start = declared.begin.or(tokenizer.eos_id());
        ids.push(start.ok_or_else(|| WrongUse("this model has no token that begins a text; give --prompt".into()))?);
    }
    let limit = model.config.max_position_embeddings;
    // What nobody asked for is no reason to refuse; that there is no room at all is.
    let room = limit.saturating_sub(ids.len()).max(1);
    let config = GenerateConfig {
        max_new_tokens: arguments.max_new_tokens.unwrap_or(NEW_TOKENS.min(room)),
        sampling: sampling(arguments, &declared),
        form,
        cache_dtype,
        eos: if arguments.ignore_eos { Vec::new() } else { declared.ends },
        ..GenerateConfig::default()
    };
    let mut writer = Writer::new(&tokenizer, &ids, &arguments.stop, !arguments.json);
    // Not before the first token: a message about a refused request stands alone.
    let mut unprinted = (!arguments.json && !arguments.chat).then_some(prompt.as_str());
    let mut failure = None;
    let out = lowkey_infer::generate(Weights { model: &model, fused: &fused }, &ids, &config, &device, &mut |id| {
        unprinted.take().into_iter().for_each(stream);
        writer.push(id).unwrap_or_else(|e| {
            failure = Some(e);
            ControlFlow::Break(())
        })
    })?;
    unprinted.into_iter().for_each(stream);
    if let Some(failure) = failure {
        return Err(failure.into());
    }
    let text = writer.finish()?;
    let seconds = out.decode.as_secs_f64();
    // The first token comes with the prefill.
    let rate = out.ids.len().saturating_sub(1) as f64 / seconds.max(1e-9);
    let full = arguments.max_new_tokens.is_none() && room < NEW_TOKENS && out.finish == Finish::Length;
    let full = full.then(|| format!("note: no more: prompt and text fill the model's {limit} positions"));
    if arguments.json {
        full.iter().for_each(|note| complain(note));
        let finish = match out.finish {
            Finish::Length => "length",
            Finish::Eos => "eos",
            Finish::Stopped => "stop",
        };
        return say_json(&json!({
            "prompt": prompt,
            "text": text,
            "ids": out.ids,
            "finish": finish,
            "prompt_tokens": out.prompt_tokens,
            "prefill_s": out.prefill.as_secs_f64(),
            "decode_s": seconds,
            "tokens_per_s": rate,
            "cache_bytes": out.cache_bytes,
        }));
    }
    say("");
    full.iter().for_each(|note| complain(note));
    complain(&format!("[{} tokens, {rate:.0} tokens/s, cache {}]", out.ids.len(), bytes(out.cache_bytes)));
    Ok(())
}

/// A message of the user in the model's chat template, up to where the assistant answers.
fn asked(message: &str, dir: &Path, tokenizer: &Tokenizer) -> anyhow::Result<lowkey_data::Result<Vec<u32>>> {
    let template = ChatTemplate::of_directory(dir, None)?.ok_or_else(|| {
        WrongUse(format!("--chat: {} has no chat template; put its chat_template.jinja there", dir.display()))
    })?;
    let conversation = Conversation::new(vec![json!({ "role": "user", "content": message })]);
    let text = template.render(&conversation, &Options { add_generation_prompt: true, ..Options::default() })?.text;
    Ok(tokenizer.encode_placed(&text).map(|tokens| tokens.into_iter().map(|token| token.id).collect()))
}

/// How tokens are chosen: as the options say, where there is none as the model's files say, else at a temperature of 0.8.
fn sampling(arguments: &GenerateArguments, declared: &Generation) -> SamplingConfig {
    SamplingConfig {
        temperature: arguments.temperature.or(declared.temperature).unwrap_or(0.8),
        top_k: arguments.top_k.or(declared.top_k),
        top_p: arguments.top_p.or(declared.top_p),
        min_p: declared.min_p,
        repetition_penalty: arguments.repetition_penalty.or(declared.repetition_penalty).unwrap_or(1.0),
        seed: arguments.seed,
    }
}

/// Prints text as it comes, up to the first stop text. Text that might yet become a stop text is held back.
struct Writer<'a> {
    tokens: lowkey_data::tokenizer::TextStream,
    stop: &'a [String],
    print: bool,
    text: String,
    printed: usize,
    stopped: bool,
}

impl<'a> Writer<'a> {
    /// For what comes after the prompt, whose text stands already.
    fn new(tokenizer: &Tokenizer, prompt: &[u32], stop: &'a [String], print: bool) -> Self {
        Self { tokens: tokenizer.stream(prompt), stop, print, text: String::new(), printed: 0, stopped: false }
    }

    fn push(&mut self, id: u32) -> lowkey_data::Result<ControlFlow<()>> {
        let more = self.tokens.push(id)?;
        Ok(self.append(&more))
    }

    fn append(&mut self, more: &str) -> ControlFlow<()> {
        self.text += more;
        if let Some(at) = self.stop.iter().filter_map(|stop| self.text.find(stop.as_str())).min() {
            self.text.truncate(at);
            self.print_to(at);
            self.stopped = true;
            return ControlFlow::Break(());
        }
        self.print_to(self.text.len() - self.undecided());
        ControlFlow::Continue(())
    }

    /// Bytes at the end that are the beginning of a stop text.
    fn undecided(&self) -> usize {
        let ends = |stop: &String| {
            let starts = stop.char_indices().map(|(i, _)| i).chain([stop.len()]);
            starts.filter(|at| *at < stop.len() && self.text.ends_with(&stop[..*at])).max().unwrap_or(0)
        };
        self.stop.iter().map(ends).max().unwrap_or(0)
    }

    fn print_to(&mut self, end: usize) {
        if self.print && end > self.printed {
            stream(&self.text[self.printed..end]);
        }
        self.printed = self.printed.max(end);
    }

    /// Prints what was held back, an unfinished character included, and returns the whole text.
    fn finish(mut self) -> lowkey_data::Result<String> {
        if !self.stopped {
            let rest = self.tokens.finish()?;
            let _ = self.append(&rest);
        }
        self.print_to(self.text.len());
        Ok(self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stop: &[&str], text: &str) -> (String, bool) {
        let stop: Vec<String> = stop.iter().map(|s| (*s).to_string()).collect();
        let tokenizer = Tokenizer::bytes();
        let mut writer = Writer::new(&tokenizer, &[], &stop, false);
        for id in tokenizer.encode(text).unwrap() {
            if writer.push(id).unwrap().is_break() {
                return (writer.finish().unwrap(), true);
            }
            // What is printed never holds a part of a stop text that then comes true.
            assert!(stop.iter().all(|s| !writer.text[..writer.printed].contains(s.as_str())));
        }
        (writer.finish().unwrap(), false)
    }

    #[test]
    fn generation_ends_before_the_first_stop_text() {
        assert_eq!(run(&["END"], "one ENEND two"), ("one EN".into(), true));
        assert_eq!(run(&["\n\n", "END"], "a\nb\n\nc END"), ("a\nb".into(), true));
        assert_eq!(run(&["é!"], "café é!x"), ("café ".into(), true));
        assert_eq!(run(&["END"], "one EN"), ("one EN".into(), false));
        assert_eq!(run(&[], "all of it"), ("all of it".into(), false));
    }
}
