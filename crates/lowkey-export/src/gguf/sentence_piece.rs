//! BPE in SentencePiece's manner, as Llama 2 has it, in llama.cpp's kind `llama`.
//!
//! A `tokenizer.json` lists merges, the first to apply first; llama.cpp gives each token a score and joins any two neighbours that
//! spell a token, the highest score first. The two agree where
//!
//! * all merges that make the same token stand together: its place among them is its score;
//! * any two tokens (or single characters) that spell a third are a merge of it;
//! * all 256 bytes have a token, so that a character that the vocabulary lacks becomes its bytes.
//!
//! Each is checked. Spaces become `▁`, and one is put before a text where the tokenizer does so.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use super::metadata::Metadata;
use super::pre_tokenizer::{flatten, kind, unsupported};
use super::tokenizer::Vocabulary;
use crate::error::Result;

/// `tokenizer.ggml.pre`: none.
pub(super) const PRE: &str = "default";

/// `llama_token_type`
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const BYTE: i32 = 6;

/// A space within tokens.
const SPACE: &str = "▁";

/// Writes the keys of this kind alone, and gives the vocabulary back with a token for each of `rows` rows, where there
/// is one, and their types.
///
/// # Errors
/// [`crate::Error::Unsupported`] where llama.cpp would cut texts differently.
pub(super) fn embed(
    mut vocabulary: Vocabulary,
    json: &Value,
    rows: usize,
    out: &mut Metadata,
    notes: &mut Vec<String>,
) -> Result<Vocabulary> {
    if json.pointer("/model/ignore_merges").and_then(Value::as_bool) == Some(true) {
        return Err(unsupported("its tokenizer has ignore_merges = true with byte_fallback, which llama.cpp does not"));
    }
    let unknown = json.pointer("/model/unk_token").and_then(Value::as_str);
    let mut bytes = 0;
    for (id, token) in vocabulary.tokens.iter_mut().enumerate() {
        let Some((text, kind)) = token else { continue };
        if Some(text.as_str()) == unknown {
            *kind = UNKNOWN;
            out.set("tokenizer.ggml.unknown_token_id", id as u32);
        } else if *kind == NORMAL && is_byte(text) {
            *kind = BYTE;
            bytes += 1;
        }
    }
    if bytes != 256 {
        return Err(unsupported(format!(
            "its tokenizer has byte_fallback and {bytes} of the 256 tokens <0x00> to <0xFF>; use --to hf, or export without a \
             tokenizer"
        )));
    }
    let prefix = space_prefix(json, notes)?;
    vocabulary.tokens.resize(rows, None);
    out.set("tokenizer.ggml.scores", scores(&vocabulary)?);
    out.set("tokenizer.ggml.add_space_prefix", prefix);
    // llama.cpp reads none here, and takes every pair for one.
    vocabulary.merges.clear();
    Ok(vocabulary)
}

fn is_byte(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F')))
}

/// A score for each token: the order in which llama.cpp is to make them.
fn scores(vocabulary: &Vocabulary) -> Result<Vec<f32>> {
    let mut places: HashMap<String, usize> = HashMap::new();
    let mut merges: HashSet<(&str, &str)> = HashSet::new();
    let mut last = String::new();
    for merge in &vocabulary.merges {
        let (left, right) = merge.split_once(' ').unwrap_or((merge, ""));
        let made = format!("{left}{right}");
        if made != last && places.contains_key(&made) {
            return Err(unsupported(format!(
                "the merges of its tokenizer make {made:?} at two places of their order, and llama.cpp knows one place for a \
                 token; use --to hf, or export without a tokenizer"
            )));
        }
        let next = places.len();
        places.entry(made.clone()).or_insert(next);
        merges.insert((left, right));
        last = made;
    }
    let texts = || vocabulary.tokens.iter().flatten();
    let known: HashSet<&str> = texts().map(|(text, _)| text.as_str()).collect();
    let stands = |part: &str| known.contains(part) || part.chars().nth(1).is_none();
    for (text, _) in texts().filter(|(_, kind)| matches!(*kind, NORMAL | BYTE)) {
        let cuts = text.char_indices().skip(1).map(|(at, _)| text.split_at(at));
        if let Some((left, right)) = cuts.into_iter().find(|cut| {
            let (left, right) = *cut;
            stands(left) && stands(right) && !merges.contains(cut)
        }) {
            return Err(unsupported(format!(
                "llama.cpp would join {left:?} and {right:?}, which its tokenizer does not: the merges of a SentencePiece model \
                 hold every such pair; use --to hf, or export without a tokenizer"
            )));
        }
    }
    // What is never made comes last; its score is not read.
    let place = |text: &str| places.get(text).copied().unwrap_or(places.len());
    let score = |token: &Option<(String, i32)>| token.as_ref().map_or(places.len(), |(text, _)| place(text));
    Ok(vocabulary.tokens.iter().map(|token| 0.0 - score(token) as f32).collect())
}

/// Whether a space is put before a text, from the two components that can do so.
fn space_prefix(json: &Value, notes: &mut Vec<String>) -> Result<bool> {
    let refuse = |what: &str, step: &Value| {
        Err(unsupported(format!(
            "its tokenizer has a {what} {step}, which llama.cpp's SentencePiece does not apply; use --to hf, or export without \
             a tokenizer"
        )))
    };
    let text = |step: &Value, key: &str| step.pointer(key).and_then(Value::as_str).map(str::to_owned);
    let (mut prefix, mut spaces) = (false, false);
    for step in flatten(json.get("normalizer").unwrap_or(&Value::Null), "normalizers") {
        match kind(step) {
            "Prepend" if text(step, "/prepend").as_deref() == Some(SPACE) => prefix = true,
            "Replace"
                if text(step, "/pattern/String").as_deref() == Some(" ")
                    && text(step, "/content").as_deref() == Some(SPACE) =>
            {
                spaces = true;
            }
            _ => return refuse("normalizer", step),
        }
    }
    let added = json.get("added_tokens").and_then(Value::as_array).into_iter().flatten();
    let normalized = added.filter(|token| token.get("normalized").and_then(Value::as_bool) == Some(true));
    let names: Vec<&str> = normalized.filter_map(|token| token.get("content").and_then(Value::as_str)).collect();
    if !names.is_empty() && (prefix || spaces) {
        notes.push(format!(
            "the tokenizer looks for {} after it has replaced spaces, llama.cpp before: beside them texts may differ",
            names.join(", ")
        ));
    }
    for step in flatten(json.get("pre_tokenizer").unwrap_or(&Value::Null), "pretokenizers") {
        if kind(step) != "Metaspace" || text(step, "/replacement").as_deref() != Some(SPACE) {
            return refuse("pre-tokenizer", step);
        }
        let splits = step.get("split").and_then(Value::as_bool).unwrap_or(true);
        let vocab = json.pointer("/model/vocab").and_then(Value::as_object).into_iter().flatten();
        if let Some((token, _)) =
            vocab.into_iter().find(|(token, _)| splits && token.strip_prefix(SPACE).unwrap_or(token).contains(SPACE))
        {
            return Err(unsupported(format!(
                "its tokenizer cuts texts at every space, and llama.cpp would join across it to {token:?}; use --to hf, or \
                 export without a tokenizer"
            )));
        }
        let legacy = step.get("add_prefix_space").and_then(Value::as_bool).unwrap_or(true);
        let scheme = text(step, "/prepend_scheme").unwrap_or(if legacy { "always" } else { "never" }.into());
        spaces = true;
        prefix |= scheme != "never";
        if scheme != "never" {
            notes.push(
                "llama.cpp puts a space before a text that begins with one, too, where the tokenizer does not".into(),
            );
        }
        if scheme == "first" {
            notes.push(
                "llama.cpp puts a space after each special token, the tokenizer only before the first text".into(),
            );
        }
    }
    if !spaces {
        return Err(unsupported(
            "its tokenizer has byte_fallback and leaves spaces as they are, where llama.cpp writes ▁; use --to hf, or export \
             without a tokenizer",
        ));
    }
    Ok(prefix)
}
