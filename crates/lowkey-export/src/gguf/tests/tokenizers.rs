use std::collections::HashMap;

use lowkey_data::tokenizer::{END_OF_TEXT, byte_character};
use serde_json::json;

use super::*;

const SAMPLES: [&str; 4] = [
    "Hello, world!\n\n  Two  spaces\tand a tab.",
    "Grüße, Καλημέρα, 你好, 🦀👩‍👩‍👧!",
    "\r\n\u{0}\u{7f}\u{a0}|",
    "it's 1234 <0x41>",
];

/// What is embedded for a model with this many rows, and the notes.
pub(super) fn embedded(tokenizer: &Tokenizer, rows: usize) -> Result<(Metadata, Vec<String>)> {
    let config = config_with(|c, _| (c.vocab_size, c.bos_token_id, c.eos_token_id) = (rows, None, Vec::new()));
    let (mut metadata, mut notes) = (Metadata::default(), Vec::new());
    tokenizer::embed(tokenizer, &config, &mut metadata, &mut notes)?;
    Ok((metadata, notes))
}

pub(super) fn texts(metadata: &Metadata, key: &str) -> Vec<String> {
    match metadata.get(key) {
        Some(Value::Array(Array::String(texts))) => texts.clone(),
        other => panic!("{key}: {other:?}"),
    }
}

pub(super) fn types(metadata: &Metadata) -> Vec<i32> {
    match metadata.get("tokenizer.ggml.token_type") {
        Some(Value::Array(Array::I32(types))) => types.clone(),
        other => panic!("{other:?}"),
    }
}

/// The merging of llama.cpp's `gpt2` on a whole text, without a pattern that cuts it first: the applicable merge of the lowest
/// rank, the leftmost of equals, until there is none.
fn merged(metadata: &Metadata, text: &str) -> Vec<u32> {
    let tokens = texts(metadata, "tokenizer.ggml.tokens");
    let ids: HashMap<&str, u32> = tokens.iter().map(String::as_str).zip(0..).collect();
    let merges = texts(metadata, "tokenizer.ggml.merges");
    let ranks: HashMap<&str, usize> = merges.iter().map(String::as_str).zip(0..).collect();
    let mut pieces: Vec<String> = text.bytes().map(|byte| byte_character(byte).to_string()).collect();
    loop {
        let rank = |i: &usize| ranks.get(format!("{} {}", pieces[*i], pieces[*i + 1]).as_str()).copied();
        let best = (0..pieces.len().saturating_sub(1)).filter(|i| rank(i).is_some()).min_by_key(|i| (rank(i), *i));
        let Some(at) = best else { break };
        let right = pieces.remove(at + 1);
        pieces[at] += &right;
    }
    pieces.iter().map(|piece| ids[piece.as_str()]).collect()
}

#[test]
fn bytes_are_their_own_tokens() {
    let (metadata, notes) = embedded(&Tokenizer::bytes(), 260).unwrap();
    let tokens = texts(&metadata, "tokenizer.ggml.tokens");
    assert_eq!((tokens.len(), tokens[65].as_str(), tokens[32].as_str()), (260, "A", "Ġ"));
    assert_eq!(
        (tokens[256].as_str(), tokens[257].as_str(), tokens[259].as_str()),
        (END_OF_TEXT, "[PAD257]", "[PAD259]")
    );
    let kinds = types(&metadata);
    assert!(kinds[..256].iter().all(|kind| *kind == 1));
    assert_eq!(kinds[256..], [3, 5, 5, 5]);
    assert!(notes[0].starts_with("3 of 260 rows"), "{notes:?}");
    for text in SAMPLES {
        assert_eq!(merged(&metadata, text), Tokenizer::bytes().encode(text).unwrap());
    }
    assert_eq!(metadata.text("tokenizer.ggml.model"), Some("gpt2"));
    assert_eq!(metadata.text("tokenizer.ggml.pre"), Some("gpt-2"));
    for (key, value) in [("eos_token_id", 256u32), ("bos_token_id", 256)] {
        assert_eq!(metadata.get(&format!("tokenizer.ggml.{key}")), Some(&Value::U32(value)), "{key}");
    }
    for key in ["add_bos_token", "add_eos_token"] {
        assert_eq!(metadata.get(&format!("tokenizer.ggml.{key}")), Some(&Value::Bool(false)), "{key}");
    }
    let error = embedded(&Tokenizer::bytes(), 256).unwrap_err().to_string();
    assert!(error.contains("257 tokens") && error.contains("256 rows"), "{error}");
}

#[test]
fn characters_are_merged_from_their_bytes() {
    let tokenizer = Tokenizer::chars(&SAMPLES.concat()).unwrap();
    let (metadata, notes) = embedded(&tokenizer, tokenizer.vocab_size()).unwrap();
    assert!(notes.is_empty(), "{notes:?}");
    for text in SAMPLES {
        assert_eq!(merged(&metadata, text), tokenizer.encode(text).unwrap(), "{text}");
    }
    let tokens = texts(&metadata, "tokenizer.ggml.tokens");
    assert_eq!(tokens.last().unwrap(), END_OF_TEXT);
    assert!(tokens.contains(&"Ã¼".to_owned()), "ü is C3 BC");
}

#[test]
fn a_trained_bpe_keeps_its_ids_and_merges() {
    let corpus = (0..60).map(|i| format!("the quick brown fox number {i} jumps over the lazy dog; {}", SAMPLES[1]));
    let tokenizer = Tokenizer::train_bpe(corpus, 330).unwrap();
    let (metadata, _) = embedded(&tokenizer, 330).unwrap();
    assert_eq!(metadata.text("tokenizer.ggml.pre"), Some("gpt-2"));
    // One piece of the pattern at a time, because this merging knows no pattern.
    for piece in [" quick", "the", " Grüße", "你好", " jumps", "12", "🦀"] {
        assert_eq!(merged(&metadata, piece), tokenizer.encode(piece).unwrap(), "{piece}");
    }
    let end = tokenizer.eos_id().unwrap() as usize;
    assert_eq!((texts(&metadata, "tokenizer.ggml.tokens")[end].as_str(), types(&metadata)[end]), (END_OF_TEXT, 3));
}

/// A byte-level BPE with one merge, as transformers saves it, after `change`.
fn hugging_face(change: impl FnOnce(&mut serde_json::Value)) -> (Folder, Tokenizer) {
    let mut vocab: serde_json::Map<String, serde_json::Value> =
        (0..=255u8).map(|byte| (byte_character(byte).to_string(), json!(byte))).collect();
    vocab.insert("th".into(), json!(256));
    let added = |id: u32, content: &str, special: bool| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": special })
    };
    let mut json = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(257, "<s>", true), added(258, "</s>", true), added(259, "<tool>", false)],
        "normalizer": null,
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        "post_processor": null,
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
                   "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                   "vocab": vocab, "merges": [["t", "h"]] }
    });
    change(&mut json);
    let folder = Folder::new();
    std::fs::write(folder.file("tokenizer.json"), json.to_string()).unwrap();
    std::fs::write(
        folder.file("tokenizer_config.json"),
        json!({ "eos_token": "</s>", "chat_template": "{{ messages }}" }).to_string(),
    )
    .unwrap();
    let tokenizer = Tokenizer::from_model_dir(folder.0.path()).unwrap();
    (folder, tokenizer)
}

fn pre_of(change: impl FnOnce(&mut serde_json::Value)) -> Result<String> {
    let (_folder, tokenizer) = hugging_face(change);
    embedded(&tokenizer, 300).map(|(metadata, _)| metadata.text("tokenizer.ggml.pre").unwrap().to_owned())
}

#[test]
fn a_tokenizer_json_is_embedded_with_its_holes_and_its_template() {
    let (_folder, tokenizer) = hugging_face(|_| ());
    let (metadata, _) = embedded(&tokenizer, 262).unwrap();
    let tokens = texts(&metadata, "tokenizer.ggml.tokens");
    assert_eq!(tokens[256..], ["th", "<s>", "</s>", "<tool>", "[PAD260]", "[PAD261]"]);
    assert_eq!(types(&metadata)[256..], [1, 3, 3, 4, 5, 5]);
    assert_eq!(texts(&metadata, "tokenizer.ggml.merges"), ["t h"]);
    assert_eq!(metadata.integer("tokenizer.ggml.eos_token_id"), Some(258));
    assert_eq!(metadata.text("tokenizer.chat_template"), Some("{{ messages }}"));
    let (folder, _) = hugging_face(|json| json["model"]["merges"] = json!(["t h"]));
    let template = || {
        let (metadata, _) = embedded(&Tokenizer::from_model_dir(folder.0.path()).unwrap(), 262).unwrap();
        metadata.text("tokenizer.chat_template").map(str::to_owned)
    };
    std::fs::write(folder.file("chat_template.json"), r#"{"chat_template": "{{ third }}"}"#).unwrap();
    assert_eq!(template().as_deref(), Some("{{ third }}"));
    std::fs::write(folder.file("chat_template.jinja"), "{{ other }}").unwrap();
    let (metadata, _) = embedded(&Tokenizer::from_model_dir(folder.0.path()).unwrap(), 262).unwrap();
    assert_eq!(metadata.text("tokenizer.chat_template"), Some("{{ other }}"));
    assert_eq!(texts(&metadata, "tokenizer.ggml.merges"), ["t h"]);
}

#[test]
fn tokens_that_were_added_later_are_embedded_as_control_tokens() {
    let tokens = ["<|user|>".to_owned(), "<|bot|>".to_owned()];
    let (_folder, hugging_face) = hugging_face(|_| ());
    for (name, old) in [("bytes", Tokenizer::bytes()), ("bpe", hugging_face)] {
        let size = old.vocab_size();
        let (metadata, _) = embedded(&old.with_new_tokens(&tokens).unwrap(), size + 2).unwrap();
        assert_eq!(texts(&metadata, "tokenizer.ggml.tokens")[size..], ["<|user|>", "<|bot|>"], "{name}");
        assert_eq!(types(&metadata)[size..], [3, 3], "{name}");
        let (before, _) = embedded(&old, size).unwrap();
        assert_eq!(
            before.integer("tokenizer.ggml.eos_token_id"),
            metadata.integer("tokenizer.ggml.eos_token_id"),
            "{name}"
        );
        assert_eq!(before.text("tokenizer.ggml.pre"), metadata.text("tokenizer.ggml.pre"), "{name}");
    }
}

#[test]
fn ids_are_those_that_the_tokenizer_gives() {
    // A hole at 256, and ids in the list of added tokens that the library does not keep.
    let (_folder, tokenizer) = hugging_face(|json| {
        json["model"]["vocab"]["th"] = json!(258);
        for (token, id) in json["added_tokens"].as_array_mut().unwrap().iter_mut().zip(270..) {
            token["id"] = json!(id);
        }
    });
    match embedded(&tokenizer, 300) {
        Ok((metadata, _)) => {
            let tokens = texts(&metadata, "tokenizer.ggml.tokens");
            for name in ["th", "<s>", "</s>", "<tool>"] {
                assert_eq!(tokens[tokenizer.token_to_id(name).unwrap() as usize], name);
            }
        }
        // Where it lets two of them share an id, that is said.
        Err(error) => assert!(error.to_string().contains("the same id 258"), "{error}"),
    }
}

/// Split steps with these patterns, then the byte level without a pattern of its own.
fn splits(patterns: &[&str]) -> serde_json::Value {
    let split = |pattern: &&str| json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
    let mut steps: Vec<serde_json::Value> = patterns.iter().map(split).collect();
    steps.push(json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false }));
    json!({ "type": "Sequence", "pretokenizers": steps })
}

#[test]
fn patterns_have_names_or_are_refused() {
    let llama = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
    let qwen = llama.replace("{1,3}", "");
    let deepseek = "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+";
    let digits = json!({ "type": "Sequence", "pretokenizers": [
        { "type": "Digits", "individual_digits": true },
        { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true } ] });
    assert_eq!(pre_of(|_| ()).unwrap(), "gpt-2");
    assert_eq!(pre_of(|json| json["pre_tokenizer"] = digits).unwrap(), "smollm");
    assert_eq!(pre_of(|json| json["pre_tokenizer"] = splits(&[&qwen])).unwrap(), "qwen2");
    let three = ["\\p{N}{1,3}", "[一-龥\u{3040}-ゟ゠-ヿ]+", deepseek];
    assert_eq!(pre_of(|json| json["pre_tokenizer"] = splits(&three)).unwrap(), "deepseek-v3");
    let with_lookup = |json: &mut serde_json::Value| {
        json["pre_tokenizer"] = splits(&[llama]);
        json["model"]["ignore_merges"] = json!(true);
    };
    assert_eq!(pre_of(with_lookup).unwrap(), "llama-bpe");
    for (error, part) in [
        (pre_of(|json| json["pre_tokenizer"] = splits(&[llama])), "ignore_merges = false"),
        (pre_of(|json| json["model"]["ignore_merges"] = json!(true)), "ignore_merges = true"),
        (pre_of(|json| json["pre_tokenizer"] = splits(&["\\p{N}+"])), "\\\\p{N}+"),
        (pre_of(|json| json["pre_tokenizer"] = splits(&[])), "pattern"),
        (pre_of(|json| json["pre_tokenizer"] = json!(null)), "byte-level"),
        (pre_of(|json| json["pre_tokenizer"]["add_prefix_space"] = json!(true)), "prefix space"),
        (pre_of(|json| json["normalizer"] = json!({ "type": "Lowercase" })), "Lowercase"),
        (pre_of(|json| json["model"]["byte_fallback"] = json!(true)), "byte_fallback"),
        (pre_of(|json| json["model"]["end_of_word_suffix"] = json!("</w>")), "end_of_word_suffix"),
    ] {
        let error = error.unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains(part), "{part}: {error}");
    }
    // Without merges it does not matter where a text is cut.
    let none = |json: &mut serde_json::Value| {
        json["pre_tokenizer"] = splits(&["\\p{N}+"]);
        json["model"]["merges"] = json!([]);
    };
    assert_eq!(pre_of(none).unwrap(), "gpt-2");
}

#[test]
fn other_kinds_of_tokenizer_are_refused() {
    let (_folder, tokenizer) = hugging_face(|json| {
        json["model"] = json!({ "type": "WordLevel", "vocab": { "a": 0, "b": 1 }, "unk_token": "a" });
    });
    let error = embedded(&tokenizer, 300).unwrap_err().to_string();
    assert!(error.contains("wordlevel"), "{error}");
}

#[test]
fn what_the_post_processor_adds_is_written() {
    let template = |single: serde_json::Value| {
        json!({ "type": "Sequence", "processors": [
            { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true },
            { "type": "TemplateProcessing", "single": single,
              "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
              "special_tokens": { "<s>": { "id": "<s>", "ids": [257], "tokens": ["<s>"] },
                                  "</s>": { "id": "</s>", "ids": [258], "tokens": ["</s>"] } } } ] })
    };
    let special = |token: &str| json!({ "SpecialToken": { "id": token, "type_id": 0 } });
    let text = json!({ "Sequence": { "id": "A", "type_id": 0 } });
    let with = |single: serde_json::Value| {
        let (_folder, tokenizer) = hugging_face(|json| json["post_processor"] = template(single));
        embedded(&tokenizer, 300)
    };
    let (metadata, notes) = with(json!([special("<s>"), text, special("</s>")])).unwrap();
    assert_eq!(metadata.integer("tokenizer.ggml.bos_token_id"), Some(257));
    assert_eq!(metadata.get("tokenizer.ggml.add_bos_token"), Some(&Value::Bool(true)));
    // Between a prompt and its continuation there is no end.
    assert_eq!(metadata.get("tokenizer.ggml.add_eos_token"), Some(&Value::Bool(false)));
    assert!(notes.iter().any(|note| note.contains("post-processor")), "{notes:?}");
    let (metadata, _) = with(json!([text])).unwrap();
    assert_eq!(metadata.get("tokenizer.ggml.add_bos_token"), Some(&Value::Bool(false)));
    for single in [json!([special("<s>"), special("<s>"), text]), json!([text, special("<s>")])] {
        assert!(with(single).unwrap_err().to_string().contains("post-processor"));
    }
}

#[test]
fn prompts_begin_as_the_model_was_trained() {
    // As DeepSeek's files have it: no post-processor adds the beginning, the configuration does.
    let (folder, _) = hugging_face(|_| ());
    let config = json!({ "eos_token": "</s>", "bos_token": "<s>", "add_bos_token": true });
    std::fs::write(folder.file("tokenizer_config.json"), config.to_string()).unwrap();
    let tokenizer = Tokenizer::from_model_dir(folder.0.path()).unwrap();
    for (add, begins) in [(None, true), (Some(true), true), (Some(false), false)] {
        let (metadata, _) = embedded(&tokenizer.clone().with_special_tokens(add), 300).unwrap();
        assert_eq!(metadata.get("tokenizer.ggml.add_bos_token"), Some(&Value::Bool(begins)), "{add:?}");
    }
}

#[test]
fn ends_come_from_the_model_first() {
    let (_folder, tokenizer) = hugging_face(|_| ());
    let config =
        config_with(|c, _| (c.vocab_size, c.bos_token_id, c.eos_token_id) = (300, Some(257), vec![7, 8, 9, 10]));
    let (mut metadata, mut notes) = (Metadata::default(), Vec::new());
    tokenizer::embed(&tokenizer, &config, &mut metadata, &mut notes).unwrap();
    let id = |key: &str| metadata.integer(&format!("tokenizer.ggml.{key}_token_id")).unwrap();
    assert_eq!([id("bos"), id("eos"), id("eot"), id("eom")], [257, 7, 8, 9]);
    assert!(notes.iter().any(|note| note.contains("of 4 end-of-text tokens")), "{notes:?}");
    // A tokenizer without an end is no use to a program that stops at one.
    let (folder, _) = hugging_face(|json| json["added_tokens"] = json!([]));
    std::fs::remove_file(folder.file("tokenizer_config.json")).unwrap();
    let error = embedded(&Tokenizer::from_model_dir(folder.0.path()).unwrap(), 300).unwrap_err().to_string();
    assert!(error.contains("end-of-text"), "{error}");
}

#[test]
fn what_llama_cpp_does_otherwise_is_noted() {
    let (_folder, tokenizer) = hugging_face(|json| {
        json["normalizer"] = json!({ "type": "Sequence", "normalizers": [{ "type": "NFC" }] });
        json["added_tokens"][2]["lstrip"] = json!(true);
    });
    let (_, notes) = embedded(&tokenizer, 300).unwrap();
    assert!(notes.iter().any(|note| note.contains("NFC")), "{notes:?}");
    assert!(notes.iter().any(|note| note.contains("<tool>")), "{notes:?}");
}

/// The whole way: a model with its tokenizer, and its end of text in the configuration that is read back.
#[test]
fn a_model_brings_its_tokenizer() {
    let folder = Folder::new();
    let path = folder.file("x.gguf");
    let config = config_with(|c, _| (c.vocab_size, c.bos_token_id, c.eos_token_id) = (257, None, vec![256]));
    write(&path, &random_model(&config, 1), Some(&Tokenizer::bytes()), TensorType::F32).unwrap();
    let again = read_model(&path, &Device::flex()).unwrap();
    assert_eq!(again.config, ModelConfig { bos_token_id: Some(256), ..config });
    assert_eq!(read(&path).unwrap().metadata().text("tokenizer.ggml.model"), Some("gpt2"));
}
