//! `lowkey template` as a user runs it.

use std::fs;

use lowkey_data::Tokenizer;
use serde_json::json;

use crate::commands::{json, lowkey, succeed, text};

const CHAT: &str = r#"{"messages": [{"role": "user", "content": "Hé?"}, {"role": "assistant", "content": "漢."}]}"#;

#[test]
fn a_conversation_is_printed_to_the_byte() {
    let dir = tempfile::tempdir().unwrap();
    let (chat, file) = (dir.path().join("chat.json"), dir.path().join("own.jinja"));
    fs::write(&chat, CHAT).unwrap();
    fs::write(&file, "{{ messages | length }} on {{ strftime_now('%d %b %Y') }}").unwrap();
    let out = succeed(&["template", "chatml", "--messages", text(&chat), "--add-generation-prompt"]);
    let said = "<|im_start|>user\nHé?<|im_end|>\n<|im_start|>assistant\n漢.<|im_end|>\n";
    assert_eq!(out, format!("{said}<|im_start|>assistant\n"));
    let out = succeed(&["template", text(&file), "--messages", text(&chat), "--now", "2026-01-15"]);
    assert_eq!(out, "2 on 15 Jan 2026");
}

#[test]
fn a_model_adds_its_tokens_and_which_of_them_are_answers() {
    let dir = tempfile::tempdir().unwrap();
    let chat = dir.path().join("chat.json");
    fs::write(&chat, CHAT).unwrap();
    let model = dir.path().join("model");
    Tokenizer::bytes().save(&model).unwrap();
    fs::write(model.join("chat_template.jinja"), "{% for m in messages %}{{ m.role[0] ~ ':' ~ m.content ~ '\n' }}{% endfor %}{{ 'a:' if add_generation_prompt }}").unwrap();
    let out = json(&["template", text(&model), "--messages", text(&chat), "--json"]);
    assert_eq!(out["text"], "u:Hé?\na:漢.\n");
    assert_eq!(out["spans"], json!([{ "message": 1, "bytes": [9, 14], "text": "漢.\n" }]));
    let ids = out["ids"].as_array().unwrap();
    assert_eq!(ids.len(), out["text"].as_str().unwrap().len());
    assert_eq!(out["mask"], json!([0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]));
}

#[test]
fn what_cannot_be_rendered_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let (chat, bad) = (dir.path().join("chat.json"), dir.path().join("bad.json"));
    fs::write(&chat, CHAT).unwrap();
    fs::write(&bad, r#"[{"content": "x"}]"#).unwrap();
    for (arguments, code, word) in [
        (vec!["template", "vicuna", "--messages", text(&chat)], 2, "nor a built-in template"),
        (vec!["template", text(dir.path()), "--messages", text(&chat)], 2, "has no chat template"),
        (vec!["template", "chatml", "--messages", text(&chat), "--name", "rag"], 2, "has one template only"),
        (vec!["template", "chatml", "--messages", text(&chat), "--now", "noon"], 2, "2026-01-15T12:00:00"),
        (vec!["template", "chatml", "--messages", text(&bad)], 1, "message 1: has no role"),
    ] {
        let (found, _, why) = lowkey(&arguments);
        assert_eq!(found, code, "{why}");
        assert!(why.contains(word), "{why}");
    }
}
