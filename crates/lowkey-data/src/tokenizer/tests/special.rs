//! Special tokens around a text.

use serde_json::{Value, json};

use super::*;

const WORDS: [&str; 5] = ["<unk>", "<s>", "</s>", "a", "b"];

/// Words between white space under a post-processor.
fn with(post_processor: Value) -> Result<Tokenizer> {
    Tokenizer::from_json(json_with(post_processor), "DIR/tokenizer.json")
}

fn json_with(post_processor: Value) -> String {
    let vocab: serde_json::Map<String, Value> =
        WORDS.iter().zip(0..).map(|(word, id)| ((*word).to_owned(), json!(id))).collect();
    let special = |id: u32| {
        json!({ "id": id, "content": WORDS[id as usize], "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true })
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special(0), special(1), special(2)],
        "normalizer": null, "pre_tokenizer": { "type": "WhitespaceSplit" }, "post_processor": post_processor, "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "<unk>" }
    })
    .to_string()
}

fn template(single: &[&str]) -> Value {
    let piece = |name: &&str| match *name {
        "$" => json!({ "Sequence": { "id": "A", "type_id": 0 } }),
        name => json!({ "SpecialToken": { "id": name, "type_id": 0 } }),
    };
    let single: Vec<Value> = single.iter().map(piece).collect();
    json!({ "type": "TemplateProcessing", "single": single,
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] },
                                "</s>": { "id": "</s>", "ids": [2], "tokens": ["</s>"] },
                                "<x>": { "id": "<x>", "ids": [77], "tokens": ["<x>"] },
                                "<many>": { "id": "<many>", "ids": vec![1; 200], "tokens": vec!["<s>"; 200] } } })
}

fn byte_level() -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true })
}

#[test]
fn a_prompt_begins_as_the_post_processor_says() {
    let sequence = json!({ "type": "Sequence", "processors": [byte_level(), template(&["<s>", "$"])] });
    let roberta = json!({ "type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1], "trim_offsets": true, "add_prefix_space": true });
    let bert = json!({ "type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1] });
    for (post_processor, start, end) in [
        (Value::Null, &[][..], &[2][..]),
        (byte_level(), &[], &[2]),
        (template(&["$"]), &[], &[2]),
        (template(&["<s>", "$"]), &[1], &[2]),
        // An end that the tokenizer adds is the document's; it stands there once.
        (template(&["<s>", "$", "</s>"]), &[1], &[2]),
        (template(&["$", "</s>", "<s>"]), &[], &[2, 1, 2]),
        (template(&["<s>", "<s>", "$"]), &[1, 1], &[2]),
        (sequence, &[1], &[2]),
        (roberta, &[1], &[2]),
        (bert, &[1], &[2]),
    ] {
        let tokenizer = with(post_processor.clone()).unwrap();
        assert_eq!(tokenizer.text_start(), start, "{post_processor}");
        assert_eq!(tokenizer.text_end(), end, "{post_processor}");
        assert_eq!(tokenizer.encode_prompt("a b").unwrap(), [start, &[3, 4]].concat(), "{post_processor}");
        assert_eq!(tokenizer.encode_prompt("").unwrap(), start, "{post_processor}");
        // What transformers gives, less what it puts after the text.
        let hf = HfTokenizer::from_bytes(json_with(post_processor)).unwrap();
        let theirs = hf.encode("a b", true).unwrap().get_ids().to_vec();
        assert!(theirs.starts_with(&tokenizer.encode_prompt("a b").unwrap()), "{theirs:?}");
        assert_eq!(tokenizer.encode("a b").unwrap(), [3, 4]);
        let plain = tokenizer.with_special_tokens(Some(false));
        assert_eq!((plain.text_start(), plain.text_end()), (&[][..], vec![2]));
        assert_eq!(plain.with_special_tokens(Some(true)).text_start(), start);
    }
}

#[test]
fn a_beginning_that_is_spelled_out_is_not_doubled() {
    let tokenizer = with(template(&["<s>", "$"])).unwrap();
    assert_eq!(tokenizer.encode_prompt("<s> a").unwrap(), [1, 3]);
    assert_eq!(tokenizer.encode_prompt("a <s>").unwrap(), [1, 3, 1]);
}

#[test]
fn add_bos_token_stands_in_for_the_post_processor() {
    let dir = tempfile::tempdir().unwrap();
    let start = |post_processor: Value, config: Value| {
        std::fs::write(dir.path().join("tokenizer.json"), json_with(post_processor)).unwrap();
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        let tokenizer = Tokenizer::from_model_dir(dir.path()).unwrap();
        (tokenizer.text_start().to_vec(), tokenizer.text_end())
    };
    // As DeepSeek-V3 has it: the class adds what the file does not.
    let deepseek = json!({ "tokenizer_class": "LlamaTokenizerFast", "add_bos_token": true, "add_eos_token": false,
                           "bos_token": { "__type": "AddedToken", "content": "<s>" }, "eos_token": "</s>" });
    assert_eq!(start(byte_level(), deepseek), (vec![1], vec![2]));
    let template = template(&["<s>", "$", "</s>"]);
    assert_eq!(start(template.clone(), json!({ "eos_token": "</s>" })), (vec![1], vec![2]));
    let none = json!({ "add_bos_token": false, "add_eos_token": false, "bos_token": "<s>", "eos_token": "</s>" });
    assert_eq!(start(template.clone(), none), (vec![], vec![2]));
    assert_eq!(start(Value::Null, json!({ "add_bos_token": true, "eos_token": "b" })), (vec![], vec![4]));
    assert_eq!(start(template, json!({ "add_bos_token": null, "bos_token": "<s>" })), (vec![1], vec![2]));
}

#[test]
fn a_saved_tokenizer_says_how_its_documents_began() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), json_with(template(&["<s>", "$"]))).unwrap();
    let tokenizer = Tokenizer::from_model_dir(dir.path()).unwrap();
    assert!(tokenizer.special_tokens_are_assumed() && tokenizer.adds_special_tokens());
    // Nothing is claimed of a model that somebody else trained.
    assert!(reopened(&tokenizer).special_tokens_are_assumed());
    for add in [true, false] {
        let again = reopened(&tokenizer.clone().with_special_tokens(Some(add)));
        assert!(!again.special_tokens_are_assumed());
        assert_eq!((again.adds_special_tokens(), again.omits_special_tokens()), (add, !add));
        // It survives being saved once more, and can be overruled.
        assert_eq!(reopened(&again).adds_special_tokens(), add);
        assert_eq!(again.with_special_tokens(Some(!add)).adds_special_tokens(), !add);
    }
    // Tokenizers that add nothing have nothing to say.
    let bytes = Tokenizer::bytes().with_special_tokens(Some(true));
    assert!(!bytes.adds_special_tokens() && !bytes.config_json().unwrap().contains(RECORD));
    assert_eq!(bytes.config_json().unwrap(), Tokenizer::bytes().config_json().unwrap());
}

#[test]
fn our_own_kinds_with_a_post_processor_are_read_as_any_other() {
    let mut json: Value = serde_json::from_str(Tokenizer::bytes().json()).unwrap();
    json["post_processor"] = template(&["<s>", "$"]);
    json["post_processor"]["special_tokens"]["<s>"]["ids"] = json!([256]);
    let tokenizer = Tokenizer::from_json(json.to_string(), "x").unwrap();
    assert_eq!((tokenizer.name(), tokenizer.encode_prompt("a").unwrap()), ("bpe", vec![256, 97]));
    json["post_processor"] = byte_level();
    assert_eq!(Tokenizer::from_json(json.to_string(), "x").unwrap().name(), "bytes");
}

#[test]
fn post_processors_that_repeat_a_text_or_add_what_there_is_not_are_refused() {
    let refusal = |post_processor| {
        let message = with(post_processor).unwrap_err().to_string();
        assert!(message.contains("DIR/tokenizer.json"), "{message}");
        message
    };
    let doubling = json!({ "type": "Sequence", "processors": vec![template(&["$", "$"]); 60] });
    for processor in [template(&["$", "$"]), template(&["<s>"]), doubling] {
        assert!(refusal(processor).contains("leaves the text out or repeats it"));
    }
    assert!(refusal(template(&["<many>", "$", "<many>"])).contains("400 tokens around a text"));
    assert!(refusal(template(&["<x>", "$"])).contains("token 77"));
    let odd = json!({ "type": "BertProcessing", "sep": ["</s>", 99], "cls": ["<s>", 1] });
    assert!(refusal(odd).contains("token 99"));
}
