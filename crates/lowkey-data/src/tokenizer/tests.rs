mod decoding;
mod special;

use super::*;
use crate::sampler::mix;

const SAMPLES: [&str; 6] = [
    "",
    "Hello, world!\n\n  Two  spaces\tand a tab.",
    "Grüße, Καλημέρα, 你好, 🦀👩‍👩‍👧!",
    "\r\n\u{0}\u{7f}\u{ad}\u{a0}|",
    "it's 1234 <0x41> ##x ▁y <|endof text|>",
    " leading and trailing ",
];

fn loaded(tokenizer: &Tokenizer) -> HfTokenizer {
    HfTokenizer::from_bytes(tokenizer.json.as_bytes()).unwrap()
}

fn reopened(tokenizer: &Tokenizer) -> Tokenizer {
    let dir = tempfile::tempdir().unwrap();
    tokenizer.save(dir.path()).unwrap();
    Tokenizer::from_model_dir(dir.path()).unwrap()
}

fn bpe() -> Tokenizer {
    let texts = (0..40).map(|i| format!("the quick brown fox number {i} jumps over the lazy dog; {}", SAMPLES[2]));
    Tokenizer::train_bpe(texts, 330).unwrap()
}

fn chars() -> Tokenizer {
    Tokenizer::chars(&SAMPLES.concat()).unwrap()
}

/// A small SentencePiece-like vocabulary: spaces as U+2581, bytes for what it lacks, a normaliser that adds a space.
fn sentencepiece() -> Tokenizer {
    let mut vocab = serde_json::Map::new();
    for token in ["<unk>", "</s>"] {
        vocab.insert(token.into(), vocab.len().into());
    }
    for byte in 0..=255u8 {
        vocab.insert(format!("<0x{byte:02X}>"), vocab.len().into());
    }
    for token in ["\u{2581}", "a", "b", "c", "\u{2581}a", "\u{2581}ab"] {
        vocab.insert(token.into(), vocab.len().into());
    }
    let special = |id: u32, content: &str| {
        serde_json::json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                            "normalized": false, "special": true })
    };
    let json = serde_json::json!({
        "version": "1.0", "truncation": { "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0 },
        "padding": null, "added_tokens": [special(0, "<unk>"), special(1, "</s>")],
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "\u{2581}" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "\u{2581}" } ] },
        "pre_tokenizer": null, "post_processor": null,
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "\u{2581}" }, "content": " " },
            { "type": "ByteFallback" }, { "type": "Fuse" },
            { "type": "Strip", "content": " ", "start": 1, "stop": 0 } ] },
        "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                   "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
                   "merges": ["\u{2581} a", "\u{2581}a b"] }
    });
    Tokenizer::from_json(json.to_string(), "sentencepiece").unwrap()
}

#[test]
fn every_tokenizer_round_trips_and_survives_its_file() {
    for (tokenizer, name, size) in [(Tokenizer::bytes(), "bytes", 257), (chars(), "chars", 0), (bpe(), "bpe", 330)] {
        let again = reopened(&tokenizer);
        assert_eq!((tokenizer.name(), again.name()), (name, name));
        assert!(size == 0 || tokenizer.vocab_size() == size, "{tokenizer:?}");
        assert_eq!(tokenizer.fingerprint(), again.fingerprint());
        assert_eq!((again.vocab_size(), again.eos_id()), (tokenizer.vocab_size(), tokenizer.eos_id()));
        assert!(tokenizer.eos_id().is_some());
        for text in SAMPLES {
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(tokenizer.decode(&ids).unwrap(), text, "{name}");
            assert_eq!(again.encode(text).unwrap(), ids);
            assert_eq!(again.decode(&ids).unwrap(), text);
            let lengths = tokenizer.byte_lengths();
            let bytes: u32 = ids.iter().map(|&id| lengths[id as usize]).sum();
            assert_eq!(bytes as usize, text.len());
            let joined: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id)).copied().collect();
            assert_eq!(joined, text.as_bytes());
        }
        assert_eq!(tokenizer.byte_lengths().len(), tokenizer.vocab_size());
    }
}

#[test]
fn the_saved_file_gives_other_tools_the_same_ids() {
    for tokenizer in [Tokenizer::bytes(), chars(), bpe()] {
        let hf = loaded(&tokenizer);
        assert_eq!(hf.get_vocab_size(true), tokenizer.vocab_size());
        assert_eq!(hf.token_to_id(END_OF_TEXT), tokenizer.eos_id());
        for text in SAMPLES.iter().map(|s| (*s).to_owned()).chain([format!("a{END_OF_TEXT}b{END_OF_TEXT}")]) {
            let ids = tokenizer.encode(&text).unwrap();
            assert_eq!(hf.encode(text.as_str(), false).unwrap().get_ids(), ids, "{tokenizer:?} {text:?}");
            assert_eq!(hf.decode(&ids, true).unwrap(), tokenizer.decode(&ids).unwrap());
        }
    }
    let (bytes, hf) = (Tokenizer::bytes(), loaded(&Tokenizer::bytes()));
    for byte in 0..=255u8 {
        assert_eq!(hf.id_to_token(u32::from(byte)), Some(byte_character(byte).to_string()));
        assert_eq!(bytes.token_bytes(u32::from(byte)), [byte]);
    }
}

#[test]
fn a_file_saved_again_by_another_tool_is_still_recognised() {
    for tokenizer in [Tokenizer::bytes(), chars()] {
        let json = loaded(&tokenizer).to_string(false).unwrap();
        assert_ne!(json.as_str(), &*tokenizer.json);
        let again = Tokenizer::from_json(json, "again").unwrap();
        assert_eq!(again.name(), tokenizer.name());
    }
    // A file that merges is no byte tokenizer, and one that strips around its special token keeps its own rules.
    for (from, to) in [("\"merges\": []", "\"merges\": [\"a b\"]"), ("\"lstrip\": false", "\"lstrip\": true")] {
        let json = Tokenizer::bytes().json.replace(from, to).replace("\"vocab\": {", "\"vocab\": { \"ab\": 257,");
        assert!(build::recognise(&serde_json::from_str(&json).unwrap()).is_none(), "{to}");
    }
}

#[test]
fn a_document_cannot_forge_its_own_end() {
    let text = format!("a{END_OF_TEXT}b");
    for tokenizer in [Tokenizer::bytes(), Tokenizer::chars(&text).unwrap(), bpe()] {
        let eos = tokenizer.eos_id().unwrap();
        assert_eq!(tokenizer.encode(&text).unwrap().iter().filter(|&&id| id == eos).count(), 1);
        let ordinary = tokenizer.encode_ordinary(&text).unwrap();
        assert!(!ordinary.contains(&eos), "{tokenizer:?}");
        assert_eq!(tokenizer.decode(&ordinary).unwrap(), text);
        assert_eq!(tokenizer.encode_documents(std::slice::from_ref(&text)).unwrap(), [ordinary]);
        assert_eq!(tokenizer.decode(&tokenizer.encode(&text).unwrap()).unwrap(), "ab");
        assert_eq!(tokenizer.byte_lengths()[eos as usize], 0);
    }
}

#[test]
fn unknown_characters_are_named() {
    let tokenizer = Tokenizer::chars("abc").unwrap();
    assert_eq!(tokenizer.encode("cab").unwrap(), [2, 0, 1]);
    assert_eq!((tokenizer.vocab_size(), tokenizer.eos_id()), (4, Some(3)));
    let message = tokenizer.encode("abé").unwrap_err().to_string();
    assert!(message.contains("'é' (U+00E9)"), "{message}");
    assert!(loaded(&tokenizer).encode("abé", false).is_err());
    assert!(Tokenizer::chars("").is_err());
    assert!(Tokenizer::train_bpe(std::iter::empty(), 256).unwrap_err().to_string().contains("257"));
}

#[test]
fn bytes_that_are_no_text_and_padded_ids_decode_to_replacement_characters() {
    let tokenizer = Tokenizer::bytes();
    assert_eq!(tokenizer.decode(&[104, 0xC3, 105, 256, 300]).unwrap(), "h\u{FFFD}i\u{FFFD}");
    let sentencepiece = sentencepiece();
    let a = sentencepiece.token_to_id("a").unwrap();
    assert_eq!(sentencepiece.decode(&[a, 9999, a, a]).unwrap(), "a\u{FFFD}aa");
}

#[test]
fn a_long_text_in_parts_has_the_tokens_of_the_whole() {
    const SIZE: usize = 1 << 13;
    let line = |i: u64| match mix(i) % 4 {
        0 => format!("the quick brown fox {i}\n"),
        1 => format!("  jumps, over\n\n\n the lazy dog ü{i}!\n"),
        2 => "\n".to_owned(),
        _ => "number\r\n".to_owned(),
    };
    let text: String = (0..5_000).map(line).collect();
    let parts = |text: &str| documents::parts(text, SIZE).into_iter().map(str::to_owned).collect::<Vec<_>>();
    assert!(text.len() > 3 * SIZE && parts(&text).len() > 2);
    assert!(parts(&text).iter().all(|part| part.len() < 2 * SIZE));
    let tokenizer = bpe();
    for text in [text, "short".to_owned(), String::new(), "b ".repeat(SIZE + 1)] {
        let in_parts = tokenizer.encode_documents(&parts(&text)).unwrap().concat();
        assert!(in_parts == tokenizer.encode_ordinary(&text).unwrap());
    }
    // Paragraphs between blank lines have no line end that stands alone; they are cut all the same.
    assert!(parts(&"a paragraph\n\n".repeat(SIZE / 5)).len() > 1);
}

#[test]
fn training_twice_gives_the_same_vocabulary() {
    assert_eq!(bpe().fingerprint(), bpe().fingerprint());
    assert_ne!(bpe().fingerprint(), Tokenizer::bytes().fingerprint());
    assert_eq!(Tokenizer::bytes().fingerprint().len(), 64);
    assert!(bpe().encode("the quick brown").unwrap().len() < 10);
}

#[test]
fn truncation_in_a_file_does_not_cut_a_corpus() {
    let tokenizer = sentencepiece();
    let ids = tokenizer.encode("ab abc ab abc").unwrap();
    assert!(ids.len() > 3);
    assert_eq!(tokenizer.decode(&ids).unwrap(), "ab abc ab abc");
    assert_eq!((tokenizer.name(), tokenizer.eos_id()), ("bpe", Some(1)));
    let lengths = tokenizer.byte_lengths();
    assert_eq!(lengths[tokenizer.token_to_id("\u{2581}ab").unwrap() as usize], 3);
    assert_eq!(lengths[tokenizer.token_to_id("<0xE2>").unwrap() as usize], 1);
}

#[test]
fn a_stream_adds_up_to_the_decoded_text_and_never_splits_a_character() {
    for tokenizer in [Tokenizer::bytes(), chars(), bpe(), sentencepiece()] {
        for text in SAMPLES {
            let ids = tokenizer.encode(text).unwrap();
            let mut stream = tokenizer.stream(&[]);
            let mut whole = String::new();
            for &id in &ids {
                let part = stream.push(id).unwrap();
                assert!(!part.contains(char::REPLACEMENT_CHARACTER), "{tokenizer:?} {part:?}");
                whole += &part;
            }
            assert_eq!(whole, tokenizer.decode(&ids).unwrap(), "{tokenizer:?}");
            assert_eq!(stream.finish().unwrap(), "");
        }
    }
}

#[test]
fn a_stream_holds_back_and_then_gives_up() {
    let mut stream = Tokenizer::bytes().stream(&[]);
    assert_eq!([0xF0, 0x9F, 0xA6].map(|id| stream.push(id).unwrap()), ["", "", ""]);
    assert_eq!(stream.push(0x80).unwrap(), "🦀");
    assert_eq!(stream.push(0xC3).unwrap(), "");
    assert_eq!(stream.push(65).unwrap(), "\u{FFFD}A");
    assert_eq!(stream.push(0xE2).unwrap(), "");
    assert_eq!((stream.finish().unwrap(), stream.finish().unwrap()), ("\u{FFFD}".to_owned(), String::new()));

    let tokenizer = sentencepiece();
    let byte = |byte: u8| tokenizer.token_to_id(&format!("<0x{byte:02X}>")).unwrap();
    let mut stream = tokenizer.stream(&[]);
    let broken: String = std::iter::repeat_n(byte(0xFF), 12).map(|id| stream.push(id).unwrap()).collect();
    assert!(!broken.is_empty() && broken.chars().all(|c| c == char::REPLACEMENT_CHARACTER));
    let more: String = tokenizer.encode("ab").unwrap().iter().map(|&id| stream.push(id).unwrap()).collect();
    assert!((more + &stream.finish().unwrap()).ends_with("ab"), "text after broken bytes must appear");
}

#[test]
fn streams_of_random_bytes_equal_the_decoded_whole() {
    let tokenizer = Tokenizer::bytes();
    for seed in 0..200u64 {
        let ids: Vec<u32> = (0..40).map(|i| (mix(seed * 100 + i) % 300) as u32).collect();
        let mut stream = tokenizer.stream(&[]);
        let mut text: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        text += &stream.finish().unwrap();
        assert_eq!(text, tokenizer.decode(&ids).unwrap());
    }
}

#[test]
fn a_model_folder_declares_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    let eos = || Tokenizer::from_model_dir(dir.path()).unwrap().eos_id();
    let json = Tokenizer::bytes().json.replace(END_OF_TEXT, "<|fin|>");
    write("tokenizer.json", &json);
    assert_eq!(eos(), None);
    write("config.json", "{\"eos_token_id\": 65}");
    assert_eq!(eos(), Some(65));
    write("generation_config.json", "{\"eos_token_id\": [66, 67]}");
    assert_eq!(eos(), Some(66));
    write("tokenizer_config.json", "{\"eos_token\": null, \"chat_template\": \"x\"}");
    assert_eq!(eos(), Some(66));
    write("chat_template.jinja", "{{ x }}");

    // Saved elsewhere, without the configurations that declared it, the end and the template are still known.
    let tokenizer = Tokenizer::from_model_dir(dir.path()).unwrap();
    let again = reopened(&tokenizer);
    assert_eq!(again.eos_id(), Some(66));
    assert!(again.companions.iter().any(|(name, text)| name == "tokenizer_config.json" && text.contains("\"x\"")));
    assert!(again.companions.iter().any(|(_, text)| text == "{{ x }}"));

    write("tokenizer_config.json", "{\"eos_token\": {\"content\": \"<|fin|>\"}}");
    assert_eq!(eos(), Some(256));
    write("tokenizer_config.json", "{");
    assert!(Tokenizer::from_model_dir(dir.path()).unwrap_err().to_string().contains("tokenizer_config.json"));
}

#[test]
fn unusable_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    assert!(Tokenizer::from_file(&path).unwrap_err().to_string().contains("tokenizer.json"));
    for text in ["", "{", "[]", "{}", "{\"model\": {\"type\": \"BPE\"}}"] {
        std::fs::write(&path, text).unwrap();
        assert!(Tokenizer::from_file(&path).unwrap_err().to_string().contains("tokenizer.json"), "{text}");
    }
}

/// A BPE `tokenizer.json` with some of its parts replaced.
fn hostile(changes: Value) -> Result<Tokenizer> {
    let mut json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [{ "id": 0, "content": "abc", "single_word": false, "lstrip": false, "rstrip": false,
                           "normalized": true, "special": false }],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": { "type": "BPE", "vocab": { "a": 0, "é": 1, "aé": 2 }, "merges": [["a", "é"]] },
    });
    for (key, value) in changes.as_object().unwrap() {
        json[key] = value.clone();
    }
    Tokenizer::from_json(json.to_string(), "DIR/tokenizer.json")
}

fn refusal(changes: Value) -> String {
    let message = hostile(changes).unwrap_err().to_string();
    assert!(message.contains("DIR/tokenizer.json"), "{message}");
    message
}

#[test]
fn a_table_that_claims_gigabytes_is_refused_before_they_are_reserved() {
    assert!(hostile(serde_json::json!({})).is_ok());
    // Length 0xfffffffc of a table of no bytes at all.
    let table = serde_json::json!({ "type": "Precompiled", "precompiled_charsmap": "/P///wAAAAA=" });
    let message = refusal(serde_json::json!({ "normalizer": { "type": "Sequence", "normalizers": [table] } }));
    assert!(message.contains("precompiled_charsmap") && message.contains("4294967292"), "{message}");
}

#[test]
fn patterns_that_compile_to_gigabytes_are_refused() {
    let split = |pattern: &str| {
        let split = serde_json::json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
        serde_json::json!({ "type": "Sequence", "pretokenizers": vec![split; 40] })
    };
    for pattern in [r"\p{L}{60000}", r"(?:\p{L}{100}){100}", r"\p{L}{2,900}", &r"\p{L}".repeat(1000)] {
        let message = refusal(serde_json::json!({ "pre_tokenizer": split(pattern) }));
        assert!(message.contains("regular expressions are too large"), "{pattern}: {message}");
    }
    assert!(hostile(serde_json::json!({ "pre_tokenizer": split(r"\p{N}{1,3}| ?[^\s\p{L}]+|\s+(?!\S)") })).is_ok());
}

#[test]
fn steps_that_grow_a_text_without_bound_are_refused() {
    let steps = |step: Value, n: usize| vec![step; n];
    let double = serde_json::json!({ "type": "Replace", "pattern": { "String": "a" }, "content": "aa" });
    let bytes = serde_json::json!({ "type": "ByteLevel" });
    let anywhere = serde_json::json!({ "type": "Replace", "pattern": { "Regex": "" }, "content": "b" });
    for step in [&double, &bytes, &anywhere] {
        let many = serde_json::json!({ "type": "Sequence", "normalizers": steps(step.clone(), 40) });
        assert!(refusal(serde_json::json!({ "normalizer": many })).contains("times longer"));
    }
    let decoders = serde_json::json!({ "type": "Sequence", "decoders": steps(double, 40) });
    assert!(refusal(serde_json::json!({ "decoder": decoders })).contains("decoder can make a text"));
    // One character for one, however often.
    let space = serde_json::json!({ "type": "Replace", "pattern": { "String": " " }, "content": "\u{2581}" });
    let many = serde_json::json!({ "type": "Sequence", "normalizers": steps(space, 100) });
    assert!(hostile(serde_json::json!({ "normalizer": many })).is_ok());
}

#[test]
fn merges_without_the_prefix_that_they_are_to_lose_are_refused() {
    let model = |prefix: &str, merges: Value| {
        let vocab = serde_json::json!({ "a": 0, "é": 1, "aé": 2, "##é": 3 });
        serde_json::json!({ "model": { "type": "BPE", "continuing_subword_prefix": prefix, "vocab": vocab,
                                       "merges": merges } })
    };
    // Longer than the token, and into the middle of its character.
    for prefix in ["######", "x"] {
        for merges in [serde_json::json!([["a", "é"]]), serde_json::json!(["a é"])] {
            assert!(refusal(model(prefix, merges)).contains("continuing_subword_prefix"));
        }
    }
    assert!(hostile(model("##", serde_json::json!([["a", "##é"]]))).is_ok());
}

#[test]
fn a_panic_of_the_parser_or_of_a_step_is_an_error() {
    // A table of one unit, asked for the unit of a byte: already when the added token is normalised.
    let table = serde_json::json!({ "type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAAA" });
    assert!(refusal(serde_json::json!({ "normalizer": table })).contains("contradict each other"));
    let fixed = hostile(serde_json::json!({ "pre_tokenizer": { "type": "FixedLength", "length": 0 } })).unwrap();
    for ids in [fixed.encode("aé"), fixed.encode_ordinary("aé")] {
        assert!(ids.unwrap_err().to_string().contains("contradict each other"));
    }
    assert!(fixed.encode_documents(&["aé".to_owned()]).is_err());
    let strip = serde_json::json!({ "type": "Strip", "content": "a", "start": 0, "stop": 9 });
    assert!(hostile(serde_json::json!({ "decoder": strip })).unwrap().decode(&[0, 0]).is_err());
}

#[test]
fn a_key_given_twice_hides_nothing() {
    let bomb = r#"{ "type": "Precompiled", "precompiled_charsmap": "/P///wAAAAA=" }"#;
    let json = format!(
        r#"{{ "version": "1.0", "added_tokens": [], "normalizer": {bomb}, "normalizer": null,
              "model": {{ "type": "WordLevel", "vocab": {{ "a": 0 }}, "unk_token": "a" }} }}"#
    );
    assert_eq!(Tokenizer::from_json(json, "x").unwrap().encode("a").unwrap(), [0]);
}

#[cfg(unix)]
#[test]
fn a_tokenizer_file_without_an_end_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/dev/zero", dir.path().join("tokenizer.json")).unwrap();
    let message = Tokenizer::from_model_dir(dir.path()).unwrap_err().to_string();
    assert!(message.contains("tokenizer.json: is not a regular file"), "{message}");
}

#[test]
fn strings_of_a_file_cannot_make_a_prompt_a_thousand_times_longer() {
    let long = "x".repeat(1_000_000);
    let prepend = serde_json::json!({ "type": "Prepend", "prepend": long });
    let message = refusal(serde_json::json!({ "normalizer": prepend }));
    assert!(message.contains("can make a text 1024 times longer"), "{message}");
    let word =
        serde_json::json!({ "type": "BPE", "continuing_subword_prefix": long, "vocab": { "a": 0 }, "merges": [] });
    assert!(refusal(serde_json::json!({ "model": word })).contains("continuing_subword_prefix has 1000000 bytes"));
    let piece = serde_json::json!({ "type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##",
                                    "max_input_chars_per_word": 1_000_000, "vocab": { "a": 0 } });
    assert!(refusal(serde_json::json!({ "model": piece })).contains("max_input_chars_per_word"));
    // Rewritten when the file is loaded.
    let token = serde_json::json!({ "id": 0, "content": "a".repeat(1 << 20), "single_word": false, "lstrip": false,
                                    "rstrip": false, "normalized": true, "special": false });
    let twice = serde_json::json!({ "type": "Prepend", "prepend": "y".repeat(100) });
    assert!(refusal(serde_json::json!({ "normalizer": twice, "added_tokens": [token] })).contains("added tokens"));
    // An index of no entries, then a string of 40 characters.
    let table = "AAAAAGFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWE=";
    let table = serde_json::json!({ "type": "Precompiled", "precompiled_charsmap": table });
    assert!(refusal(serde_json::json!({ "normalizer": table })).contains("characters for one"));
    let decoder = serde_json::json!({ "type": "Replace", "pattern": { "String": "a" }, "content": "b".repeat(2000) });
    assert!(refusal(serde_json::json!({ "decoder": decoder })).contains("decoder can make a text"));

    // What is left is bounded where a text is read.
    let hundred = serde_json::json!({ "type": "Prepend", "prepend": "é".repeat(99) });
    let tokenizer = hostile(serde_json::json!({ "normalizer": hundred, "added_tokens": [] })).unwrap();
    assert!(tokenizer.encode("aé").unwrap().len() >= 99);
    let long = "a".repeat(1 << 20);
    assert!(tokenizer.encode(&long).unwrap_err().to_string().contains("too long for it"));
    assert!(!tokenizer.encode_documents(&[long]).unwrap()[0].is_empty());
}
