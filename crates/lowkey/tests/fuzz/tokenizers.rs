//! `tokenizer.json` and the files beside it.

use std::path::Path;

use lowkey_data::Tokenizer;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use crate::driver::{Entry, Input, Target};
use crate::models::{folder, json_limit};
use crate::mutate::{self, below, once_in, one_of};

const TOKENIZER: &str = "tokenizer.json";
const COMPANIONS: [&str; 4] =
    ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"];

/// What is encoded with every tokenizer that is read.
const TEXT: &str = "the Cat sat\n on 12345 mats; <|endoftext|>grüße 你好 🦀\u{0}\r\n  ab abc";

fn token(id: u64, content: &str, special: bool) -> Value {
    json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": !special,
            "special": special })
}

/// A `tokenizer.json` around a model.
fn around(model: Value, normalizer: Value, pre_tokenizer: Value, decoder: Value) -> Input {
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [token(0, "<unk>", true), token(9, "</s>", true), token(10, "Cat", false)],
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
        "post_processor": { "type": "TemplateProcessing", "single": [{ "Sequence": { "id": "A", "type_id": 0 } }],
                            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }], "special_tokens": {} },
        "decoder": decoder, "model": model,
    });
    let config = json!({ "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": { "content": "</s>" } });
    Input::from([
        (TOKENIZER.to_string(), Entry::File(json.to_string().into_bytes())),
        ("tokenizer_config.json".to_string(), Entry::File(config.to_string().into_bytes())),
        ("config.json".to_string(), Entry::File(br#"{"eos_token_id": [9, 1]}"#.to_vec())),
    ])
}

fn bpe(prefix: Value) -> Value {
    let prefix_text = prefix.as_str().unwrap_or_default().to_string();
    let second = |text: &str| format!("{prefix_text}{text}");
    json!({
        "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": prefix,
        "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
        "vocab": { "<unk>": 0, "a": 1, "b": 2, second("b"): 3, second("c"): 4, "ab": 5, "abc": 6, "<0x41>": 7, "▁": 8 },
        "merges": [["a", second("b")], ["ab", second("c")]],
    })
}

/// A SentencePiece table of 256 units, which maps nothing: its size, and zeros.
fn charsmap() -> String {
    format!("AAQA{}AAA=", "A".repeat(341 * 4))
}

/// Parts of every kind, which damage puts where they do not belong.
fn parts() -> Vec<Value> {
    let mut parts = vec![
        json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true }),
        json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true }),
        json!({ "type": "Split", "pattern": { "Regex": "\\p{L}+|\\s+(?!\\S)|." }, "behavior": "Isolated", "invert": false }),
        json!({ "type": "Split", "pattern": { "String": "" }, "behavior": "MergedWithNext", "invert": true }),
        json!({ "type": "Split", "pattern": { "Regex": "(a*)*b" }, "behavior": "Removed", "invert": false }),
        json!({ "type": "Split", "pattern": { "Regex": "\\p{L}{1000}{1000}" }, "behavior": "Removed", "invert": false }),
        json!({ "type": "Split", "pattern": { "Regex": "(?<=x)\\1(" }, "behavior": "Contiguous", "invert": false }),
        json!({ "type": "FixedLength", "length": 0 }),
        // As much as `vet` lets pass, in one piece and in four.
        json!({ "type": "Split", "pattern": { "Regex": "\\w{700}" }, "behavior": "Removed", "invert": false }),
        json!({ "type": "Sequence", "pretokenizers": (0..4).map(|_| json!({
            "type": "Split", "pattern": { "Regex": "\\w".repeat(240) }, "behavior": "Removed", "invert": false,
        })).collect::<Vec<Value>>() }),
        json!({ "type": "Digits", "individual_digits": true }),
        json!({ "type": "Punctuation", "behavior": "Isolated" }),
        json!({ "type": "BertPreTokenizer" }),
        json!({ "type": "Whitespace" }),
        json!({ "type": "UnicodeScripts" }),
        json!({ "type": "CharDelimiterSplit", "delimiter": " " }),
        json!({ "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
                "lowercase": true }),
        json!({ "type": "NFKC" }),
        json!({ "type": "NFD" }),
        json!({ "type": "StripAccents" }),
        json!({ "type": "Strip", "strip_left": true, "strip_right": true }),
        json!({ "type": "Prepend", "prepend": "▁" }),
        json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" }),
        json!({ "type": "Replace", "pattern": { "Regex": "" }, "content": "xy" }),
        json!({ "type": "Replace", "pattern": { "String": "a" }, "content": "aaaaaaaaaaaaaaaa" }),
        json!({ "type": "Precompiled", "precompiled_charsmap": charsmap() }),
        json!({ "type": "Precompiled", "precompiled_charsmap": "////fwAAAAA=" }),
        json!({ "type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAAA" }),
        json!({ "type": "Strip", "content": " ", "start": 1, "stop": 1_000_000 }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
        json!({ "type": "WordPiece", "prefix": "##", "cleanup": true }),
        json!({ "type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": true }),
        json!({ "type": "BPEDecoder", "suffix": "</w>" }),
        json!({ "type": "BertProcessing", "sep": ["x", 1], "cls": ["y", 2] }),
        json!({ "direction": "Left", "max_length": 1, "strategy": "OnlyFirst", "stride": 5 }),
        json!({ "strategy": { "Fixed": 1_000_000_000u64 }, "direction": "Left", "pad_to_multiple_of": 0, "pad_id": 0,
                "pad_type_id": 0, "pad_token": "x" }),
        token(4_000_000_000, "far", false),
        token(3, "", true),
        token(5, "\u{10FFFF}", false),
        bpe(Value::Null),
        bpe("##".into()),
    ];
    for list in ["normalizers", "pretokenizers", "decoders", "processors"] {
        parts.push(json!({ "type": "Sequence", list: parts.clone() }));
    }
    parts
}

pub(crate) struct Tokenizers {
    parts: Vec<Value>,
}

impl Tokenizers {
    pub(crate) fn new() -> Self {
        Self { parts: parts() }
    }
}

impl Target for Tokenizers {
    fn name(&self) -> &'static str {
        "tokenizer"
    }

    fn seeds(&self) -> Vec<Input> {
        let built = |tokenizer: &Tokenizer| {
            let dir = tempfile::tempdir().unwrap();
            tokenizer.save(dir.path()).unwrap();
            folder(dir.path())
        };
        let words = json!({ "<unk>": 0, "the": 1, "Cat": 2, "##t": 3, "sa": 4, "a": 5 });
        let pieces = json!([["<unk>", 0.0], ["▁", -2.0], ["a", -3.5], ["ab", -4.0], ["▁the", -5.25], ["<0x0A>", -9.0]]);
        let sequence = |key: &str, of: &[usize]| {
            let steps: Vec<Value> = of.iter().map(|i| self.parts[*i].clone()).collect();
            json!({ "type": "Sequence", key: steps })
        };
        vec![
            built(&Tokenizer::bytes()),
            built(&Tokenizer::chars(TEXT).unwrap()),
            built(&Tokenizer::train_bpe((0..20).map(|i| format!("{TEXT} {i}")), 280).unwrap()),
            around(
                bpe(Value::Null),
                sequence("normalizers", &[17, 21, 22]),
                Value::Null,
                sequence("decoders", &[29, 30]),
            ),
            around(bpe("##".into()), self.parts[16].clone(), self.parts[13].clone(), Value::Null),
            around(
                json!({ "type": "Unigram", "unk_id": 0, "byte_fallback": true, "vocab": pieces }),
                sequence("normalizers", &[25, 20]),
                self.parts[1].clone(),
                self.parts[1].clone(),
            ),
            around(
                json!({ "type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##",
                        "max_input_chars_per_word": 100, "vocab": words }),
                self.parts[16].clone(),
                self.parts[12].clone(),
                self.parts[31].clone(),
            ),
            around(
                json!({ "type": "WordLevel", "unk_token": "<unk>", "vocab": words }),
                Value::Null,
                sequence("pretokenizers", &[2, 10, 11]),
                Value::Null,
            ),
        ]
    }

    fn main_file(&self) -> &'static str {
        TOKENIZER
    }

    fn damage(&self, input: &mut Input, random: &mut ChaCha8Rng) {
        let name = if once_in(random, 8) { one_of(random, &COMPANIONS) } else { TOKENIZER };
        let Some(Entry::File(file)) = input.get_mut(name) else { return };
        match serde_json::from_slice::<Value>(file) {
            // One step for another, where steps stand.
            Ok(mut root) if name == TOKENIZER && once_in(random, 3) => {
                let step = one_of(
                    random,
                    &["normalizer", "pre_tokenizer", "decoder", "post_processor", "truncation", "padding"],
                );
                root[step] = one_of(random, &self.parts).clone();
                if once_in(random, 2) {
                    mutate::value(&mut root[step], &self.parts, random);
                }
                if once_in(random, 2) {
                    mutate::value(&mut root["model"], &self.parts, random);
                }
                *file = mutate::text(&root, random);
            }
            _ => mutate::json(file, &self.parts, random),
        }
        if once_in(random, 64) {
            let name = one_of(random, &[TOKENIZER, COMPANIONS[0], COMPANIONS[3]]);
            let entry = one_of(random, &[Entry::Folder, Entry::Link(name.into()), Entry::Link("/dev/zero".into())]);
            input.insert(name.into(), entry.clone());
        }
    }

    fn read(&self, dir: &Path) -> Result<(), String> {
        let tokenizer = Tokenizer::from_model_dir(dir).map_err(|e| e.to_string())?;
        let size = tokenizer.vocab_size();
        assert_eq!(tokenizer.byte_lengths().len(), size);
        assert!(tokenizer.eos_id().is_none_or(|id| (id as usize) < size));
        // What it makes of a text may be an error, but no more than that.
        for ids in [tokenizer.encode(TEXT), tokenizer.encode_ordinary(TEXT)].into_iter().flatten() {
            let _ = tokenizer.decode(&ids);
            let mut stream = tokenizer.stream(&[]);
            ids.iter().for_each(|id| drop(stream.push(*id)));
        }
        let _ = tokenizer.decode(&[0, 1, size as u32, u32::MAX]);
        if below(&mut rand::SeedableRng::seed_from_u64(size as u64), 8) == 0 {
            let copy = dir.join("copy");
            tokenizer.save(&copy).map_err(|e| e.to_string())?;
            let again = Tokenizer::from_model_dir(&copy).map_err(|e| e.to_string())?;
            assert_eq!((again.fingerprint(), again.vocab_size()), (tokenizer.fingerprint(), size));
            std::fs::remove_dir_all(copy).unwrap();
        }
        Ok(())
    }

    fn is_deep(&self, refusal: &str) -> bool {
        !refusal.contains("not valid JSON")
    }

    /// The file is held as text and as a tree ([`json_limit`]), and then each token in four tables and a Unigram token in a trie
    /// of one small table for each byte. Compiled patterns are bounded by what `vet` lets pass, half of the constant, and not by the file; so are
    /// the tables for added tokens and the holes between ids.
    fn limit(&self, bytes: usize) -> usize {
        (64 << 20) + json_limit(bytes)
    }

    fn inputs(&self) -> u64 {
        15_000
    }
}
