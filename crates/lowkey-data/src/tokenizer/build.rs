//! Making `tokenizer.json` for the tokenizers built here, and knowing them again.

use serde_json::{Map, Value, json};
use tokenizers::DecoderWrapper;
use tokenizers::tokenizer::Tokenizer as HfTokenizer;

use super::{END_OF_TEXT, Entry};

/// The character that GPT-2's byte-level alphabet writes for a byte: printable bytes are themselves, the rest are
/// moved past U+0100 in order, so that a vocabulary is readable and holds no white space.
pub fn byte_character(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        char::from(byte)
    } else {
        let moved_before = (0..byte).filter(|&b| !printable(b)).count() as u32;
        char::from_u32(256 + moved_before).unwrap_or(char::REPLACEMENT_CHARACTER)
    }
}

/// Pretty JSON. A `Value` whose keys are strings always serialises.
pub(super) fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

/// The declaration of [`END_OF_TEXT`].
fn end_of_text(id: usize) -> Value {
    json!([{ "id": id, "content": END_OF_TEXT, "single_word": false, "lstrip": false, "rstrip": false,
             "normalized": false, "special": true }])
}

/// The byte tokenizer: BPE over the byte-level alphabet with no merge, so that ids are byte values.
pub(super) fn bytes_json() -> Value {
    let vocab: Map<String, Value> =
        (0..=255u8).map(|byte| (byte_character(byte).to_string(), Value::from(byte))).collect();
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": end_of_text(256),
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                   "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                   "vocab": vocab, "merges": [] }
    })
}

/// One split per character, white space and line ends included.
fn each_character() -> Value {
    json!({ "type": "Split", "pattern": { "Regex": "[\\s\\S]" }, "behavior": "Isolated", "invert": false })
}

/// A character tokenizer: a word-level vocabulary whose words are single characters. WordLevel, not BPE without
/// merges: BPE would drop an unknown character in silence, WordLevel without its unknown token refuses it.
pub(super) fn chars_json(alphabet: &[char]) -> Value {
    let vocab: Map<String, Value> =
        alphabet.iter().enumerate().map(|(id, c)| (c.to_string(), Value::from(id))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": end_of_text(alphabet.len()),
        "normalizer": null, "pre_tokenizer": each_character(), "post_processor": null, "decoder": { "type": "Fuse" },
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "<|unknown|>" }
    })
}

/// A vocabulary of words between white space. An unknown word is refused, as in [`chars_json`].
pub(super) fn words_json(words: &[String]) -> Value {
    let vocab: Map<String, Value> =
        words.iter().enumerate().map(|(id, word)| (word.clone(), Value::from(id))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": { "type": "WhitespaceSplit" }, "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "<|unknown|>" }
    })
}

/// A file that this crate could have written and that therefore has a fast path.
pub(super) enum Known {
    Bytes,
    Chars(Vec<char>),
}

/// Recognises by structure, not by text, so that a file survives being saved again by transformers.
pub(super) fn recognise(json: &Value) -> Option<Known> {
    let kind = |key: &str| json.get(key)?.get("type")?.as_str();
    let is_false = |value: &Value, key: &str| value.get(key).and_then(Value::as_bool) == Some(false);
    let null = |value: Option<&Value>| value.is_none_or(Value::is_null);

    let model = json.get("model")?;
    let vocab = model.get("vocab")?.as_object()?;
    let [end] = json.get("added_tokens")?.as_array()?.as_slice() else { return None };
    let ours = end.get("content")?.as_str()? == END_OF_TEXT
        && end.get("id")?.as_u64()? == vocab.len() as u64
        && end.get("special")?.as_bool()?
        && ["single_word", "lstrip", "rstrip"].iter().all(|key| is_false(end, key));
    // The byte level's own only moves offsets; any other adds tokens.
    let adds = !null(json.get("post_processor")) && kind("post_processor") != Some("ByteLevel");
    if !ours || adds || !null(json.get("normalizer")) {
        return None;
    }
    match model.get("type")?.as_str()? {
        "BPE" => {
            let plain = model.get("merges")?.as_array()?.is_empty()
                && ["unk_token", "continuing_subword_prefix", "end_of_word_suffix"].iter().all(|k| null(model.get(k)));
            let levels = kind("pre_tokenizer")? == "ByteLevel"
                && is_false(json.get("pre_tokenizer")?, "add_prefix_space")
                && kind("decoder")? == "ByteLevel";
            let identity = vocab.len() == 256
                && (0..=255u8).all(|byte| {
                    vocab.get(&byte_character(byte).to_string()).and_then(Value::as_u64) == Some(u64::from(byte))
                });
            (plain && levels && identity).then_some(Known::Bytes)
        }
        "WordLevel" => {
            if json.get("pre_tokenizer")? != &each_character() || kind("decoder")? != "Fuse" {
                return None;
            }
            let mut alphabet = vec![None; vocab.len()];
            for (token, id) in vocab {
                let mut chars = token.chars();
                let (character, None) = (chars.next()?, chars.next()) else { return None };
                *alphabet.get_mut(usize::try_from(id.as_u64()?).ok()?)? = Some(character);
            }
            alphabet.into_iter().collect::<Option<Vec<char>>>().map(Known::Chars)
        }
        _ => None,
    }
}

/// What every id of a loaded tokenizer stands for, and whether decoding only joins those bytes.
pub(super) fn entries(hf: &HfTokenizer) -> Result<(Vec<Entry>, bool), String> {
    let bytewise = matches!(hf.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
    let byte_of: std::collections::HashMap<char, u8> = (0..=255u8).map(|byte| (byte_character(byte), byte)).collect();
    let text = |token: &str| -> Vec<u8> {
        if bytewise {
            let bytes: Option<Vec<u8>> = token.chars().map(|c| byte_of.get(&c).copied()).collect();
            return bytes.unwrap_or_else(|| token.as_bytes().to_vec());
        }
        if let Some(byte) = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'))
            && let Ok(byte) = u8::from_str_radix(byte, 16)
        {
            return vec![byte];
        }
        // SentencePiece writes a space as U+2581; WordPiece marks a continuation.
        token.strip_prefix("##").unwrap_or(token).replace('\u{2581}', " ").into_bytes()
    };
    let vocab = hf.get_vocab(true);
    let added = hf.get_added_tokens_decoder();
    // A few holes are usual; one stray id must not fill the memory with them.
    let bound = 2 * vocab.len() + (1 << 16);
    let size = vocab.values().max().map_or(0, |&id| id as usize + 1);
    if size > bound {
        return Err(format!("its largest id is {}, but it has {} tokens only: an id is wrong", size - 1, vocab.len()));
    }
    let mut entries = vec![Entry::Unused; size];
    for (token, id) in &vocab {
        let entry = match added.get(id) {
            Some(token) if token.special => Entry::Special,
            Some(token) => Entry::Text(token.content.as_bytes().into()),
            None => Entry::Text(text(token).into()),
        };
        if let Some(slot) = entries.get_mut(*id as usize) {
            *slot = entry;
        }
    }
    Ok((entries, bytewise))
}
