//! A tokenizer in the keys `tokenizer.ggml.*`.
//!
//! Byte-level vocabularies are written as llama.cpp's kind `gpt2`, in which each byte of a text is first written as one character;
//! those in SentencePiece's manner (`▁` for a space, `<0x0A>` for a byte) as its kind `llama`, see [`super::sentence_piece`]. What
//! then holds in llama.cpp, for prompts that are valid UTF-8:
//!
//! * **bytes** – tokens are the 256 characters, with no merge: the same ids as here.
//! * **BPE** – the vocabulary, the merges and the name of the pre-tokenizer's pattern: the same ids as here. A pattern that
//!   llama.cpp has no name for is refused, because a near one would cut some texts otherwise without a word.
//! * **chars** – a token is the bytes of its character, and merges join the bytes of each character from the left, so that
//!   nothing but whole characters remains: the same ids as here. A character that the vocabulary lacks is refused here; llama.cpp
//!   leaves it out in silence.
//! * Rows of the embedding past the vocabulary, and holes in it, are unused tokens named `[PAD<id>]`.

use std::collections::HashSet;

use lowkey_data::{
    Tokenizer,
    chat::ChatTemplate,
    tokenizer::{END_OF_TEXT, byte_character},
};
use lowkey_model::ModelConfig;
use serde_json::Value;

use super::metadata::Metadata;
use super::pre_tokenizer::{Pre, pre_tokenizer, unsupported};
use super::sentence_piece;
use crate::error::Result;

/// `llama_token_type`
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// A vocabulary in llama.cpp's terms.
#[derive(Default)]
pub(super) struct Vocabulary {
    /// By id: spelling and type.
    pub(super) tokens: Vec<Option<(String, i32)>>,
    /// `left right`, the first to apply first.
    pub(super) merges: Vec<String>,
}

/// Writes the keys of `tokenizer` for a model of the given configuration, and appends to `notes` what a user should know.
///
/// # Errors
/// [`crate::Error::Unsupported`] where llama.cpp would cut texts differently, and where the model has fewer rows than the tokenizer
/// tokens.
pub(super) fn embed(
    tokenizer: &Tokenizer,
    config: &ModelConfig,
    out: &mut Metadata,
    notes: &mut Vec<String>,
) -> Result<()> {
    let json: Value = serde_json::from_str(tokenizer.json())
        .map_err(|e| unsupported(format!("its tokenizer.json is not valid JSON: {e}")))?;
    let rows = config.vocab_size;
    if tokenizer.vocab_size() > rows {
        return Err(unsupported(format!(
            "the tokenizer has {} tokens, the model {rows} rows; export with the tokenizer that it was trained with",
            tokenizer.vocab_size()
        )));
    }
    let pieces = json.pointer("/model/byte_fallback").and_then(Value::as_bool) == Some(true);
    let (pre, vocabulary) = match tokenizer.name() {
        "chars" => (Pre::Gpt2.name(), characters(tokenizer)),
        "bpe" if pieces => {
            check_model(&json)?;
            let vocabulary = vocabulary(tokenizer, &json, rows)?;
            (sentence_piece::PRE, sentence_piece::embed(vocabulary, &json, rows, out, notes)?)
        }
        "bytes" | "bpe" => {
            check_model(&json)?;
            (pre_tokenizer(&json, notes)?.name(), vocabulary(tokenizer, &json, rows)?)
        }
        other => {
            return Err(unsupported(format!(
                "its tokenizer is of the kind {other}, and only BPE is embedded; use --to hf, or export without a \
                 tokenizer"
            )));
        }
    };
    out.set("tokenizer.ggml.model", if pieces { "llama" } else { "gpt2" });
    out.set("tokenizer.ggml.pre", pre);
    let (mut texts, mut types, mut seen) = (Vec::new(), Vec::new(), HashSet::new());
    let mut tokens = vocabulary.tokens;
    tokens.resize(rows, None);
    for (id, token) in tokens.into_iter().enumerate() {
        let (text, kind) = token.unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED));
        // llama.cpp ends the program over a repeated text.
        if !seen.insert(text.clone()) {
            return Err(unsupported(format!("two tokens of its vocabulary are spelled {text:?}")));
        }
        texts.push(text);
        types.push(kind);
    }
    let unused = types.iter().filter(|kind| **kind == UNUSED).count();
    if unused > 0 {
        notes.push(format!(
            "{unused} of {rows} rows of the embedding belong to no token; they are written as unused tokens"
        ));
    }
    out.set("tokenizer.ggml.tokens", texts);
    out.set("tokenizer.ggml.token_type", types);
    if !pieces {
        out.set("tokenizer.ggml.merges", vocabulary.merges);
    }
    special_tokens(tokenizer, config, out, notes)?;
    if let Some(template) = ChatTemplate::source_of_tokenizer(tokenizer)? {
        out.set("tokenizer.chat_template", template);
    }
    Ok(())
}

/// The character tokenizer as merges of bytes.
fn characters(tokenizer: &Tokenizer) -> Vocabulary {
    let mut vocabulary = Vocabulary::default();
    let mut known = HashSet::new();
    for id in 0..tokenizer.vocab_size() as u32 {
        let letters: Vec<char> = tokenizer.token_bytes(id).iter().copied().map(byte_character).collect();
        let spelled: String = letters.iter().collect();
        let token = if letters.is_empty() { (END_OF_TEXT.to_owned(), CONTROL) } else { (spelled, NORMAL) };
        vocabulary.tokens.push(Some(token));
        // Continuation bytes begin no merge, so that none crosses from one character into the next.
        for end in 1..letters.len() {
            let left: String = letters[..end].iter().collect();
            let merge = format!("{left} {}", letters[end]);
            if known.insert(merge.clone()) {
                vocabulary.merges.push(merge);
            }
        }
    }
    vocabulary
}

/// Refuses the options of a BPE model that llama.cpp does not have.
fn check_model(json: &Value) -> Result<()> {
    let model = json.get("model").unwrap_or(&Value::Null);
    let plain = |value: Option<&Value>| match value {
        None | Some(Value::Null | Value::Bool(false)) => true,
        Some(Value::String(text)) => text.is_empty(),
        Some(Value::Number(number)) => number.as_f64() == Some(0.0),
        Some(_) => false,
    };
    for key in ["dropout", "continuing_subword_prefix", "end_of_word_suffix"] {
        if !plain(model.get(key)) {
            return Err(unsupported(format!(
                "its tokenizer.json has model.{key} = {}, which llama.cpp does not have; use --to hf, or export without a tokenizer",
                model.get(key).unwrap_or(&Value::Null)
            )));
        }
    }
    Ok(())
}

/// Vocabulary, added tokens and merges of a `tokenizer.json`.
fn vocabulary(tokenizer: &Tokenizer, json: &Value, rows: usize) -> Result<Vocabulary> {
    let malformed = |what: &str| unsupported(format!("its tokenizer.json has no usable {what}"));
    let mut vocabulary = Vocabulary::default();
    let mut place = |id: Option<u64>, text: &str, kind: i32| -> Result<()> {
        let id = id.and_then(|id| usize::try_from(id).ok()).filter(|id| *id < rows).ok_or_else(|| malformed("ids"))?;
        if vocabulary.tokens.len() <= id {
            vocabulary.tokens.resize(id + 1, None);
        }
        if let Some((other, _)) = vocabulary.tokens[id].as_ref().filter(|(other, _)| other != text) {
            return Err(unsupported(format!("in its tokenizer.json {other:?} and {text:?} have the same id {id}")));
        }
        vocabulary.tokens[id] = Some((text.to_owned(), kind));
        Ok(())
    };
    let vocab = json.pointer("/model/vocab").and_then(Value::as_object).ok_or_else(|| malformed("model.vocab"))?;
    for (text, id) in vocab {
        place(id.as_u64(), text, NORMAL)?;
    }
    for token in json.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
        let text = token.get("content").and_then(Value::as_str).ok_or_else(|| malformed("added_tokens"))?;
        let special = token.get("special").and_then(Value::as_bool).unwrap_or(false);
        // Not the id of the list: the tokenizers library counts on from the vocabulary, whatever stands there.
        let id = tokenizer.token_to_id(text).map(u64::from);
        place(id, text, if special { CONTROL } else { USER_DEFINED })?;
    }
    for merge in json.pointer("/model/merges").and_then(Value::as_array).into_iter().flatten() {
        let text = match merge {
            Value::String(text) => Some(text.clone()),
            Value::Array(pair) => match pair.as_slice() {
                [Value::String(left), Value::String(right)] => Some(format!("{left} {right}")),
                _ => None,
            },
            _ => None,
        };
        // No token that is merged holds a space, so that the one between the two is the only one.
        vocabulary
            .merges
            .push(text.filter(|text| text.matches(' ').count() == 1).ok_or_else(|| malformed("model.merges"))?);
    }
    Ok(vocabulary)
}

/// Which tokens begin and end a text, and whether prompts are given one. llama.cpp stops at the three ends that it has keys for,
/// and besides at tokens that are spelled as the ends of well-known models are (`<|im_end|>`, `</s>` and some twenty more).
fn special_tokens(
    tokenizer: &Tokenizer,
    config: &ModelConfig,
    out: &mut Metadata,
    notes: &mut Vec<String>,
) -> Result<()> {
    let mut ends = config.eos_token_id.clone();
    if ends.is_empty() {
        ends.extend(tokenizer.eos_id());
    }
    // llama.cpp takes token 11 for the end of a text where none is named.
    let end = *ends.first().ok_or_else(|| {
        unsupported("neither the model nor its tokenizer names an end-of-text token; set eos_token_id in config.json")
    })?;
    for (key, id) in ["eos_token_id", "eot_token_id", "eom_token_id"].into_iter().zip(&ends) {
        out.set(format!("tokenizer.ggml.{key}"), *id);
    }
    if ends.len() > 3 {
        notes.push(format!("of {} end-of-text tokens only the first 3 can be written: {:?}", ends.len(), &ends[..3]));
    }
    let (begins, closes) = (tokenizer.text_start(), tokenizer.after_text());
    if begins.len() > 1 || closes.len() > 1 || closes.iter().any(|id| *id != end) {
        return Err(unsupported(format!(
            "its post-processor adds the tokens {begins:?} before and {closes:?} after a text; llama.cpp knows one token that \
             begins and one that ends a text at most"
        )));
    }
    // A text begins where the last one ended, unless there is a token for it.
    let begin = begins.first().copied().or(config.bos_token_id).unwrap_or(end);
    out.set("tokenizer.ggml.bos_token_id", begin);
    out.set("tokenizer.ggml.add_bos_token", !begins.is_empty());
    // llama.cpp would set it after a prompt, and its programs that generate refuse a model that asks for this.
    out.set("tokenizer.ggml.add_eos_token", false);
    if !closes.is_empty() {
        let note = "the tokenizer's post-processor adds an end after a text, which is not written: it would stand between a prompt \
                    and its continuation";
        notes.push(note.into());
    }
    Ok(())
}
