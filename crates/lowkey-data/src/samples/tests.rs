use serde_json::{Map, json};

use super::*;
use crate::records::Records;

fn method(train_on: TrainOn) -> Method {
    Method { template: Some(ChatTemplate::built_in("chatml").unwrap()), train_on }
}

fn record(records: Records, value: Value) -> Record {
    let Value::Object(object) = value else { panic!() };
    records.read(&object, records.list().unwrap_or_default()).unwrap()
}

fn one(record: Record, method: &Method, tokenizer: &Tokenizer) -> Document {
    let mut documents = documents(record, method, tokenizer).unwrap();
    assert_eq!(documents.len(), 1);
    documents.remove(0)
}

/// What is learnt, special tokens spelled out.
fn learnt(document: &Document, tokenizer: &Tokenizer) -> Vec<String> {
    let parts = tokenizer.parts(&document.ids, &document.learnt).unwrap();
    parts.into_iter().filter(|part| part.learnt).map(|part| part.text).collect()
}

fn talk() -> Value {
    json!({"messages": [
        {"role": "user", "content": "ä?"},
        {"role": "assistant", "content": "eins"},
        {"role": "user", "content": "und?"},
        {"role": "assistant", "content": "zwei"}
    ]})
}

/// A byte-level vocabulary in which the tokens of ChatML are special, and the one that pads is the one that ends a turn.
fn chat_tokenizer(dir: &std::path::Path) -> Tokenizer {
    let bpe = Tokenizer::train_bpe(["some text of words".to_owned()].into_iter(), 300).unwrap();
    let mut json: Value = serde_json::from_str(bpe.json()).unwrap();
    let mut special = json["added_tokens"][0].clone();
    let from = bpe.vocab_size() as u64;
    for (i, content) in ["<|im_start|>", "<|im_end|>"].into_iter().enumerate() {
        special["content"] = json!(content);
        special["id"] = json!(from + i as u64);
        json["added_tokens"].as_array_mut().unwrap().push(special.clone());
    }
    std::fs::write(dir.join("tokenizer.json"), json.to_string()).unwrap();
    let config = json!({"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"});
    std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
    Tokenizer::from_model_dir(dir).unwrap()
}

#[test]
fn answers_are_learnt_with_the_token_that_ends_them_even_where_it_pads() {
    let dir = tempfile::tempdir().unwrap();
    for tokenizer in [Tokenizer::bytes(), chat_tokenizer(dir.path())] {
        for (train_on, expected) in
            [(TrainOn::Assistant, &["eins<|im_end|>", "zwei<|im_end|>"][..]), (TrainOn::Last, &["zwei<|im_end|>"])]
        {
            let document = one(record(Records::Messages, talk()), &method(train_on), &tokenizer);
            let found = learnt(&document, &tokenizer);
            assert_eq!(found.len(), expected.len());
            // Whether a line end behind a turn belongs to it is the template's to say.
            assert!(found.iter().zip(expected).all(|(found, expected)| found.trim_end() == *expected), "{found:?}");
        }
        let all = one(record(Records::Messages, talk()), &method(TrainOn::All), &tokenizer);
        assert!(all.learnt.iter().all(|learnt| *learnt));
    }
}

#[test]
fn a_template_without_marks_for_answers_learns_them_all_the_same() {
    let template = "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";
    let template = ChatTemplate::from_source("plain", template, Map::new()).unwrap();
    let method = Method { template: Some(template), train_on: TrainOn::Assistant };
    let document = one(record(Records::Messages, talk()), &method, &Tokenizer::bytes());
    assert_eq!(learnt(&document, &Tokenizer::bytes()), ["eins;", "zwei;"]);
}

#[test]
fn a_weight_of_0_takes_a_message_out() {
    let tokenizer = Tokenizer::bytes();
    let mut talk = talk();
    talk["messages"][1]["weight"] = json!(0);
    for (train_on, omitted) in [(TrainOn::Assistant, true), (TrainOn::All, true), (TrainOn::Last, true)] {
        let document = one(record(Records::Messages, talk.clone()), &method(train_on), &tokenizer);
        let learnt = learnt(&document, &tokenizer).concat();
        assert_eq!(!learnt.contains("eins"), omitted, "{train_on:?}: {learnt}");
        assert!(learnt.contains("zwei"));
    }
    talk["messages"][3]["training"] = json!(false);
    let why = documents(record(Records::Messages, talk.clone()), &method(TrainOn::Assistant), &tokenizer).unwrap_err();
    assert!(why.contains("no token of it is learnt"), "{why}");
    talk["messages"][0]["weight"] = json!(1);
    let why = documents(record(Records::Messages, talk.clone()), &method(TrainOn::Assistant), &tokenizer).unwrap_err();
    assert!(why.contains("message 1 is to be learnt"), "{why}");
    talk["messages"][0]["weight"] = json!(0);
    let why = documents(record(Records::Messages, talk), &method(TrainOn::All), &tokenizer).unwrap_err();
    assert!(why.contains("message 1 is not to be learnt"), "{why}");
}

#[test]
fn of_a_prompt_with_messages_the_completion_alone_is_learnt() {
    let tokenizer = Tokenizer::bytes();
    let messages = talk()["messages"].as_array().unwrap().clone();
    let value = json!({"prompt": messages[..3], "completion": messages[3..]});
    let document = one(record(Records::Completion, value.clone()), &method(TrainOn::Completion), &tokenizer);
    assert_eq!(learnt(&document, &tokenizer).concat().trim_end(), "zwei<|im_end|>");
    let document = one(record(Records::Completion, value), &method(TrainOn::Assistant), &tokenizer);
    assert!(learnt(&document, &tokenizer).concat().contains("eins"));
}

#[test]
fn a_plain_completion_ends_and_its_end_is_learnt() {
    let tokenizer = Tokenizer::bytes();
    let value = json!({"prompt": "2 + 2 =", "completion": " 4"});
    for (train_on, expected) in [(TrainOn::Completion, " 4<|endoftext|>"), (TrainOn::All, "2 + 2 = 4<|endoftext|>")] {
        let method = Method { template: None, train_on };
        let document = one(record(Records::Completion, value.clone()), &method, &tokenizer);
        assert_eq!(learnt(&document, &tokenizer), [expected]);
        assert_eq!((document.ids.last(), document.bytes), (Some(&256), 9));
    }
}

#[test]
fn no_text_begins_twice() {
    let dir = tempfile::tempdir().unwrap();
    let bpe = Tokenizer::train_bpe(["some text of words".to_owned()].into_iter(), 300).unwrap();
    let mut json: Value = serde_json::from_str(bpe.json()).unwrap();
    let (id, begin) = (bpe.eos_id().unwrap(), "<|endoftext|>");
    json["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {(begin): {"id": begin, "ids": [id], "tokens": [begin]}}
    });
    std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    let tokenizer = Tokenizer::from_file(&dir.path().join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer.text_start(), [id]);
    let begins = |document: &Document| document.ids.iter().take_while(|found| **found == id).count();
    // The template spells it out.
    let template = "<|endoftext|>{% for m in messages %}{{ m.content }}!{% endfor %}";
    let template = ChatTemplate::from_source("begins", template, Map::new()).unwrap();
    let with = Method { template: Some(template), train_on: TrainOn::Assistant };
    let chat = json!({"messages": [{"role": "user", "content": "some"}, {"role": "assistant", "content": "words"}]});
    assert_eq!(begins(&one(record(Records::Messages, chat.clone()), &with, &tokenizer)), 1);
    // One that does not is not given one.
    let without = Method { template: Some(ChatTemplate::built_in("chatml").unwrap()), ..with };
    assert_eq!(begins(&one(record(Records::Messages, chat), &without, &tokenizer)), 0);
    // A plain prompt has one, whether it spells it out or not.
    for prompt in ["some", "<|endoftext|>some"] {
        let value = json!({"prompt": prompt, "completion": " words"});
        let method = Method { template: None, train_on: TrainOn::Completion };
        let document = one(record(Records::Completion, value), &method, &tokenizer);
        assert_eq!(begins(&document), 1, "{prompt}");
        assert_eq!(learnt(&document, &tokenizer), [" words<|endoftext|>"]);
    }
}

#[test]
fn a_token_is_learnt_if_any_of_its_bytes_is() {
    let ranges = [3..5, 8..9];
    for (token, expected) in [
        (0..3, false),
        (2..4, true),
        (4..8, true),
        (5..8, false),
        (5..9, true),
        (9..12, false),
        (3..3, true),
        (5..5, false),
    ] {
        assert_eq!(lies_in(&token, &ranges), expected, "{token:?}");
    }
    assert!(!lies_in(&(0..9), &[]));
}

#[test]
fn a_pair_has_two_documents_and_a_conversation_needs_a_template() {
    let tokenizer = Tokenizer::bytes();
    let value = json!({"prompt": "Q:", "chosen": " yes", "rejected": " no"});
    let pair = documents(record(Records::Preference, value), &method(TrainOn::Completion), &tokenizer).unwrap();
    let answers: Vec<String> = pair.iter().map(|document| learnt(document, &tokenizer).concat()).collect();
    assert_eq!(answers, [" yes<|endoftext|>", " no<|endoftext|>"]);
    let none = Method { template: None, train_on: TrainOn::Assistant };
    let why = documents(record(Records::Messages, talk()), &none, &tokenizer).unwrap_err();
    assert!(why.contains("data.chat_template"), "{why}");
}
