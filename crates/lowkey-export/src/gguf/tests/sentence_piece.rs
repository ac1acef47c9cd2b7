//! SentencePiece's BPE in llama.cpp's kind `llama`.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

use serde_json::{Value as Json, json};

use super::tokenizers::{embedded, texts, types};
use super::*;

const TEXTS: [&str; 8] = [
    "The cat sat on the mat, and then the other cat sat there.",
    "  two  spaces at both ends  ",
    "thethe ththththeee  hethe",
    "Grüße, Καλημέρα, 你好, 🦀👩‍👩‍👧!",
    "line\nbreaks\r\n\n\tand a tab\u{0}",
    "▁ itself ▁▁",
    "<0x41> <s >",
    "a",
];

/// Pieces in the order of their scores, as SentencePiece learns them; some can be made in several ways.
const PIECES: [&str; 15] =
    ["▁t", "he", "▁a", "th", "▁the", "in", "at", "▁▁", "▁c", "the", "▁cat", "▁▁▁▁", "aaa", "re", "▁there"];

/// A `tokenizer.json` as transformers makes it of a SentencePiece model: every pair of tokens that spells a third is a merge.
fn sentence_piece() -> Json {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    tokens.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend(PIECES.map(str::to_owned));
    tokens.extend("▁aehtincr,.ds".chars().map(String::from));
    let ids: serde_json::Map<String, Json> =
        tokens.iter().zip(0..).map(|(text, id)| (text.clone(), json!(id))).collect();
    let mut merges = Vec::new();
    for piece in PIECES {
        let cuts = piece.char_indices().skip(1).map(|(at, _)| piece.split_at(at));
        merges.extend(
            cuts.filter(|(left, right)| ids.contains_key(*left) && ids.contains_key(*right))
                .map(|(a, b)| json!([a, b])),
        );
    }
    let special = |id: u32, text: &str| {
        json!({ "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": true })
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "▁" }, { "type": "Replace", "pattern": { "String": " " }, "content": "▁" } ] },
        "pre_tokenizer": null,
        "post_processor": { "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 0 } }],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } } },
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " }, { "type": "ByteFallback" }, { "type": "Fuse" },
            { "type": "Strip", "content": " ", "start": 1, "stop": 0 } ] },
        "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                   "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                   "vocab": ids, "merges": merges }
    })
}

fn with(change: impl FnOnce(&mut Json)) -> Result<(Metadata, Vec<String>, Tokenizer)> {
    let mut json = sentence_piece();
    change(&mut json);
    let folder = Folder::new();
    std::fs::write(folder.file("tokenizer.json"), json.to_string()).unwrap();
    let tokenizer = Tokenizer::from_model_dir(folder.0.path()).unwrap();
    let (metadata, notes) = embedded(&tokenizer, 300)?;
    Ok((metadata, notes, tokenizer))
}

/// What llama.cpp's kind `llama` makes of a text: of all neighbours that spell a token the best scored are joined, the leftmost of
/// equals, until there are none; then single characters without a token become bytes.
fn joined(metadata: &Metadata, text: &str) -> Vec<u32> {
    let tokens = texts(metadata, "tokenizer.ggml.tokens");
    let ids: HashMap<&str, u32> = tokens.iter().map(String::as_str).zip(0..).collect();
    let Some(Value::Array(Array::F32(scores))) = metadata.get("tokenizer.ggml.scores") else { panic!("no scores") };
    assert_eq!(scores.len(), tokens.len());
    let prefix = metadata.get("tokenizer.ggml.add_space_prefix") == Some(&Value::Bool(true));
    let text = format!("{}{text}", if prefix { " " } else { "" }).replace(' ', "▁");
    let mut pieces: Vec<String> = text.chars().map(String::from).collect();
    loop {
        let score =
            |i: &usize| ids.get(format!("{}{}", pieces[*i], pieces[*i + 1]).as_str()).map(|id| scores[*id as usize]);
        let pairs = (0..pieces.len().saturating_sub(1)).filter_map(|i| Some((i, score(&i)?)));
        // min_by keeps the first of equals.
        let Some((at, _)) = pairs.min_by(|a, b| b.1.total_cmp(&a.1)) else { break };
        let right = pieces.remove(at + 1);
        pieces[at] += &right;
    }
    let each = pieces.iter().flat_map(|piece| match ids.get(piece.as_str()) {
        Some(id) => vec![*id],
        None => piece.bytes().map(|byte| ids[format!("<0x{byte:02X}>").as_str()]).collect(),
    });
    each.collect()
}

#[test]
fn a_sentence_piece_vocabulary_cuts_texts_as_its_source() {
    let (metadata, notes, tokenizer) = with(|_| ()).unwrap();
    assert_eq!(metadata.text("tokenizer.ggml.model"), Some("llama"));
    assert_eq!(metadata.text("tokenizer.ggml.pre"), Some("default"));
    assert!(metadata.get("tokenizer.ggml.merges").is_none());
    for (key, value) in [("add_space_prefix", true), ("add_bos_token", true), ("add_eos_token", false)] {
        assert_eq!(metadata.get(&format!("tokenizer.ggml.{key}")), Some(&Value::Bool(value)), "{key}");
    }
    for (key, value) in [("bos_token_id", 1), ("eos_token_id", 2), ("unknown_token_id", 0)] {
        assert_eq!(metadata.integer(&format!("tokenizer.ggml.{key}")), Some(value), "{key}");
    }
    let kinds = types(&metadata);
    assert_eq!(kinds[..4], [2, 3, 3, 6]);
    assert!(kinds[3..259].iter().all(|kind| *kind == 6) && kinds[259..287].iter().all(|kind| *kind == 1));
    assert!(kinds[287..].iter().all(|kind| *kind == 5), "{kinds:?}");
    assert!(!notes.iter().any(|note| note.contains("llama.cpp")), "{notes:?}");
    for text in TEXTS {
        assert_eq!(joined(&metadata, text), tokenizer.encode(text).unwrap(), "{text:?}");
    }
}

/// Three ways to put `▁` before a text, and none.
#[test]
fn the_space_before_a_text_is_the_tokenizers() {
    let metaspace =
        |scheme: &str| json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false });
    for (scheme, prefix, notes_of_it) in [("always", true, 1), ("first", true, 2), ("never", false, 0)] {
        let (metadata, notes, tokenizer) = with(|json| {
            json["normalizer"] = json!(null);
            json["pre_tokenizer"] = metaspace(scheme);
        })
        .unwrap();
        assert_eq!(metadata.get("tokenizer.ggml.add_space_prefix"), Some(&Value::Bool(prefix)), "{scheme}");
        assert_eq!(
            notes.iter().filter(|note| note.contains("llama.cpp puts a space")).count(),
            notes_of_it,
            "{notes:?}"
        );
        for text in TEXTS.into_iter().filter(|text| !text.starts_with([' ', '▁'])) {
            assert_eq!(joined(&metadata, text), tokenizer.encode(text).unwrap(), "{scheme}: {text:?}");
        }
    }
    let (metadata, _, tokenizer) =
        with(|json| drop(json["normalizer"]["normalizers"].as_array_mut().unwrap().remove(0))).unwrap();
    assert_eq!(joined(&metadata, TEXTS[0]), tokenizer.encode(TEXTS[0]).unwrap());
}

#[test]
fn a_vocabulary_that_llama_cpp_would_join_otherwise_is_refused() {
    let merges =
        |json: &mut Json, change: &dyn Fn(&mut Vec<Json>)| change(json["model"]["merges"].as_array_mut().unwrap());
    let step = |kind: &str| json!({ "type": kind });
    for (error, part) in [
        // A pair that spells a token and is no merge.
        (with(|json| merges(json, &|m| m.retain(|pair| *pair != json!(["▁t", "he"])))), "\"▁t\" and \"he\""),
        // A token that is made at two places of the order.
        (
            with(|json| {
                merges(json, &|m| {
                    let at = m.iter().position(|pair| *pair == json!(["t", "he"])).unwrap();
                    let pair = m.remove(at);
                    m.push(pair);
                });
            }),
            "at two places",
        ),
        (with(|json| drop(json["model"]["vocab"].as_object_mut().unwrap().remove("<0x41>"))), "255 of the 256"),
        (with(|json| json["model"]["ignore_merges"] = json!(true)), "ignore_merges"),
        (with(|json| json["normalizer"]["normalizers"][0]["prepend"] = json!("_")), "Prepend"),
        (with(|json| json["normalizer"] = step("NFKC")), "NFKC"),
        (with(|json| json["normalizer"] = json!(null)), "leaves spaces"),
        (with(|json| json["pre_tokenizer"] = step("Whitespace")), "Whitespace"),
        (
            with(|json| {
                json["pre_tokenizer"] = json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always",
                                                     "split": true });
            }),
            "cuts texts at every space",
        ),
    ] {
        let error = error.map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains(part), "{part}: {error}");
    }
    let (_, notes, _) = with(|json| json["added_tokens"][1]["normalized"] = json!(true)).unwrap();
    assert!(notes.iter().any(|note| note.contains("<s>") && note.contains("replaced spaces")), "{notes:?}");
}

/// The merges of the committed tokenizer were learnt from a text, and leave out pairs that llama.cpp would join.
#[test]
fn merges_that_leave_a_pair_out_are_refused() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/reference/tokenizers/llama");
    let tokenizer = Tokenizer::from_model_dir(&dir).unwrap();
    let why = embedded(&tokenizer, tokenizer.vocab_size()).map(|_| ()).unwrap_err().to_string();
    assert!(why.contains("llama.cpp would join"), "{why}");
}

/// A pretrained one, where it is there; standard error says which.
#[test]
fn a_real_sentence_piece_vocabulary_cuts_texts_as_its_source() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/reference/real/stories260k");
    let found = dir.is_dir();
    let said = if found { "compared with its source" } else { "not here, and not compared" };
    std::io::stderr()
        .write_all(format!("reference: a pretrained SentencePiece vocabulary: {said}\n").as_bytes())
        .unwrap();
    if !found {
        return;
    }
    let tokenizer = Tokenizer::from_model_dir(&dir).unwrap();
    let (metadata, _) = embedded(&tokenizer, tokenizer.vocab_size()).unwrap();
    let mut seed = 3;
    let tokens = texts(&metadata, "tokenizer.ggml.tokens");
    for _ in 0..300 {
        // Pieces of the vocabulary side by side meet every merge, the spaces among them.
        let drawn = (0..30).map(|_| tokens[259 + next(&mut seed) as usize % (tokens.len() - 259)].replace('▁', " "));
        let text = drawn.collect::<String>();
        assert_eq!(joined(&metadata, &text), tokenizer.encode(&text).unwrap(), "{text:?}");
    }
    for text in TEXTS {
        assert_eq!(joined(&metadata, text), tokenizer.encode(text).unwrap(), "{text:?}");
    }
}
