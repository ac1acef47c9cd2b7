//! Every decoder of the tokenizers crate: a text in pieces is the text as a whole.

use serde_json::{Value, json};

use super::*;

/// A vocabulary of whole tokens under a decoder.
fn decoder(tokens: &[&str], decoder: Value) -> Tokenizer {
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().zip(0..).map(|(token, id)| ((*token).to_owned(), json!(id))).collect();
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [{ "id": 0, "content": tokens[0], "single_word": false, "lstrip": false, "rstrip": false,
                           "normalized": false, "special": true }],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": decoder,
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": tokens[0] }
    });
    Tokenizer::from_json(json.to_string(), "x").unwrap()
}

fn ids(tokenizer: &Tokenizer, tokens: &[&str]) -> Vec<u32> {
    tokens.iter().map(|token| tokenizer.token_to_id(token).unwrap_or_else(|| panic!("{token}"))).collect()
}

/// Decoders, each with a vocabulary whose first token is special, tokens of a text with the place where its prompt ends, and
/// what text they stand for on either side of it.
#[expect(clippy::type_complexity, reason = "a table")]
fn all() -> Vec<(&'static str, Tokenizer, Vec<&'static str>, usize, [&'static str; 2])> {
    let metaspace =
        |scheme: &str| json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true });
    let words = ["<s>", "▁The", "▁cat", "▁sat", "s", "▁", "▁on"];
    let sentence = vec!["<s>", "▁The", "▁cat", "s", "▁sat", "▁", "▁on"];
    let replace = json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " });
    let llama = json!({ "type": "Sequence", "decoders": [
        replace, { "type": "ByteFallback" }, { "type": "Fuse" }, { "type": "Strip", "content": " ", "start": 1, "stop": 0 } ] });
    let bytes = ["<s>", "▁The", "▁cat", "<0xF0>", "<0x9F>", "<0xA6>", "<0x80>", "<0xC3>", "<0xA9>"];
    let crab =
        vec!["<s>", "▁The", "<0xC3>", "<0xA9>", "<0xF0>", "<0x9F>", "<0xA6>", "<0x80>", "<0xC3>", "<0xA9>", "▁cat"];
    let pieces = ["[CLS]", "un", "##aff", "##able", "cat", ".", ","];
    let word_piece = json!({ "type": "WordPiece", "prefix": "##", "cleanup": true });
    let level = json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true });
    let level_tokens = ["<s>", "The", "Ġcat", "Ġsat", "Ã", "©"];
    let ctc = json!({ "type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": true });
    vec![
        ("Metaspace always", decoder(&words, metaspace("always")), sentence.clone(), 4, ["The cats", " sat  on"]),
        ("Metaspace first", decoder(&words, metaspace("first")), sentence.clone(), 2, ["The", " cats sat  on"]),
        ("Metaspace never", decoder(&words, metaspace("never")), sentence.clone(), 3, [" The cat", "s sat  on"]),
        ("Strip in a sequence", decoder(&words, llama.clone()), sentence.clone(), 3, ["The cat", "s sat  on"]),
        ("ByteFallback in a sequence", decoder(&bytes, llama), crab.clone(), 4, ["Theé", "🦀é cat"]),
        ("ByteFallback", decoder(&bytes, json!({ "type": "ByteFallback" })), crab, 4, ["▁Theé", "🦀é▁cat"]),
        ("Replace", decoder(&words, replace), sentence.clone(), 4, [" The cats", " sat  on"]),
        ("Fuse", decoder(&words, json!({ "type": "Fuse" })), sentence, 4, ["▁The▁cats", "▁sat▁▁on"]),
        (
            "WordPiece",
            decoder(&pieces, word_piece.clone()),
            vec!["[CLS]", "cat", "un", "##aff", "##able", "cat", "."],
            3,
            ["cat un", "affable cat."],
        ),
        (
            "WordPiece between words",
            decoder(&pieces, word_piece),
            vec!["cat", ",", "cat", "cat"],
            3,
            ["cat, cat", " cat"],
        ),
        ("ByteLevel", decoder(&level_tokens, level), vec!["The", "Ġcat", "Ã", "©", "Ġsat"], 1, ["The", " caté sat"]),
        (
            "BPEDecoder",
            decoder(&["<s>", "th", "e</w>", "cat</w>"], json!({ "type": "BPEDecoder", "suffix": "</w>" })),
            vec!["<s>", "th", "e</w>", "cat</w>", "th", "e</w>"],
            3,
            ["the", " cat the"],
        ),
        (
            "CTC",
            decoder(&["<s>", "<pad>", "|", "h", "i", "l", "o"], ctc),
            vec!["h", "h", "i", "|", "l", "<pad>", "l", "l", "o"],
            5,
            ["hi l", "lo"],
        ),
        (
            "none",
            decoder(&["<s>", "The", "cat", "sat"], Value::Null),
            vec!["<s>", "The", "cat", "sat"],
            2,
            ["The", " cat sat"],
        ),
    ]
}

#[test]
fn every_decoder_goes_on_from_the_text_before() {
    for (name, tokenizer, tokens, cut, [before, after]) in all() {
        let ids = ids(&tokenizer, &tokens);
        let (prompt, rest) = ids.split_at(cut);
        assert_eq!(tokenizer.decode(prompt).unwrap(), before, "{name}");
        assert_eq!(tokenizer.decode_after(prompt, rest).unwrap(), after, "{name}");
        assert_eq!(tokenizer.decode(&ids).unwrap(), format!("{before}{after}"), "{name}");
    }
}

#[test]
fn wherever_a_text_is_cut_its_pieces_make_the_whole() {
    for (name, tokenizer, tokens, ..) in all() {
        let known = ids(&tokenizer, &tokens);
        // Bytes of a character stay together, everything else comes in any order.
        let byte = |id: &u32| {
            let token = tokens[known.iter().position(|k| k == id).unwrap()];
            token.starts_with("<0x") || ["Ã", "©"].contains(&token)
        };
        let units: Vec<&[u32]> = known.chunk_by(|a, b| byte(a) && byte(b)).collect();
        for seed in 0..60u64 {
            let drawn = (0..12).map(|i| units[(mix(seed * 1000 + i) % units.len() as u64) as usize]);
            let drawn: Vec<&[u32]> = drawn.collect();
            let whole = tokenizer.decode(&drawn.concat()).unwrap();
            for cut in 0..drawn.len() {
                let (prompt, rest) = (drawn[..cut].concat(), drawn[cut..].concat());
                let before = tokenizer.decode(&prompt).unwrap();
                let text = tokenizer.decode_after(&prompt, &rest).unwrap();
                assert_eq!(before + &text, whole, "{name}, cut before unit {cut} of {drawn:?}");
            }
        }
    }
}

#[test]
fn texts_come_back_from_their_tokens() {
    let metaspace = json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true });
    let vocab = json!({ "<unk>": 0, "▁The": 1, "▁cat": 2, "▁sat": 3, "▁.": 4 });
    let words = json!({ "type": "WordLevel", "vocab": vocab, "unk_token": "<unk>" });
    let unigram = json!({ "type": "Unigram", "unk_id": 0, "byte_fallback": false,
        "vocab": [["<unk>", 0.0], ["▁The", -1.0], ["▁c", -1.5], ["at", -1.5], ["▁sat", -2.0], ["▁.", -2.0]] });
    let suffixed = json!({ "type": "BPE", "unk_token": "<unk>", "end_of_word_suffix": "</w>", "continuing_subword_prefix": null,
        "vocab": { "<unk>": 0, "T": 1, "h": 2, "e</w>": 3, "c": 4, "a": 5, "t</w>": 6, "s": 7, ".</w>": 8, "at</w>": 9 },
        "merges": [["a", "t</w>"]] });
    let pieces = json!({ "type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
        "vocab": { "<unk>": 0, "The": 1, "c": 2, "##at": 3, "s": 4, ".": 5 } });
    let space = json!({ "type": "WhitespaceSplit" });
    let cases = [
        (words, metaspace.clone(), metaspace.clone()),
        (unigram, metaspace.clone(), metaspace),
        (suffixed, space.clone(), json!({ "type": "BPEDecoder", "suffix": "</w>" })),
        (pieces, space, json!({ "type": "WordPiece", "prefix": "##", "cleanup": false })),
    ];
    for (model, pre_tokenizer, decoder) in cases {
        let json = json!({ "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
                           "pre_tokenizer": pre_tokenizer, "post_processor": null, "decoder": decoder, "model": model });
        let tokenizer = Tokenizer::from_json(json.to_string(), "x").unwrap();
        let text = "The cat sat .";
        let ids = tokenizer.encode(text).unwrap();
        assert!(!ids.contains(&0), "{model}: {ids:?}");
        assert_eq!(tokenizer.decode(&ids).unwrap(), text, "{model}");
        let prompt = tokenizer.encode("The cat").unwrap();
        assert_eq!(ids[..prompt.len()], prompt, "{model}");
        assert_eq!(tokenizer.decode_after(&prompt, &ids[prompt.len()..]).unwrap(), " sat .", "{model}");
    }
}

#[test]
fn an_id_past_the_vocabulary_takes_no_space_away() {
    let (_, tokenizer, ..) = all().swap_remove(0);
    let ids = ids(&tokenizer, &["▁The", "▁cat", "▁sat"]);
    assert_eq!(
        tokenizer.decode(&[ids[0], 999, ids[1], 999, 999, ids[2]]).unwrap(),
        "The\u{FFFD} cat\u{FFFD}\u{FFFD} sat"
    );
    assert_eq!(tokenizer.decode_after(&ids[..1], &[999, ids[1]]).unwrap(), "\u{FFFD} cat");
}

#[test]
fn an_unfinished_character_is_shown_at_the_end() {
    let (_, tokenizer, ..) = all().swap_remove(4);
    let prompt = ids(&tokenizer, &["▁The"]);
    let unfinished = ids(&tokenizer, &["<0xC3>", "<0xA9>", "▁cat", "<0xC3>"]);
    assert_eq!(tokenizer.decode_after(&prompt, &unfinished).unwrap(), "é cat\u{FFFD}");
    assert_eq!(Tokenizer::bytes().decode_after(&[84], &[0xC3, 0xA9, 0xC3]).unwrap(), "é\u{FFFD}");
}
