//! A model that answers, from conversations to what is shipped.

use std::fs;

use serde_json::Value;

use crate::commands::{RUN, lowkey, succeed, text};

const CHAT: &str = r#"
name = "answers"
description = "Told by the user, answered by the assistant"
license = "MIT"

[tokenizer]
kind = "bytes"

[source]
kind = "storybook"
seed = 2
documents = 60
validation_documents = 8
form = "chat"

[chat]
template = "turns.jinja"
"#;

const TURNS: &str = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %} {{ m.content }}{{ eos_token }}\
                     {% endgeneration %}{% else %} {{ m.content }}{% endif %}{% endfor %}";

/// Of what a run on conversations has learnt the certificates are computed on its own held-out conversations, of which most tokens are
/// no targets.
#[test]
fn an_adapter_that_learnt_from_conversations_is_merged_exported_and_verified_on_them() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("story.txt"), "The cat sat on the mat and saw seven mice.\n".repeat(120)).unwrap();
    fs::write(at("answers.toml"), CHAT).unwrap();
    fs::write(at("turns.jinja"), TURNS).unwrap();
    let base = RUN.replace("intermediate_size = 40\n", "intermediate_size = 40\nmax_position_embeddings = 512\n");
    fs::write(at("base.toml"), base).unwrap();
    succeed(&["train", text(&at("base.toml")), "--out", text(&at("base")), "--set", "training.steps=3"]);
    let from = at("base/checkpoints/best");

    let (model, data) = (RUN.find("[model]").unwrap(), RUN.find("[data]").unwrap());
    let init = format!("[init]\nfrom = \"{}\"\n\n[adapter]\ntarget_modules = \"all-linear\"\nr = 4\n\n", text(&from));
    let tune = RUN.replace(&RUN[model..data], &init);
    let tune = tune.replace(
        "path = \"story.txt\"\nseq_len = 32",
        &format!("dataset = \"{}\"\nseq_len = 512", text(&at("answers.toml"))),
    );
    fs::write(at("tune.toml"), tune).unwrap();
    succeed(&["train", text(&at("tune.toml")), "--out", text(&at("tuned"))]);
    let tuned = at("tuned/checkpoints/best");

    // PEFT is told of feed-forward layers by their matrices.
    let keys: Value = serde_json::from_slice(&fs::read(tuned.join("adapter_config.json")).unwrap()).unwrap();
    assert!(keys["target_parameters"].as_array().unwrap().iter().all(|name| name.as_str().unwrap().contains(".mlp.")));

    let merged = at("merged");
    let printed = succeed(&["merge", text(&from), "--adapter", text(&tuned), "--out", text(&merged)]);
    assert!(printed.contains("held-out split of answers"), "{printed}");
    for (to, out) in [("hf", "hf"), ("absorbed", "absorbed"), ("gguf", "gguf")] {
        let out = at(out);
        let printed = succeed(&["export", text(&tuned), "--to", to, "--out", text(&out)]);
        assert!(printed.contains("held-out split of answers"), "{printed}");
        assert!(succeed(&["verify", text(&out), "--source", text(&tuned)]).contains("the certificate holds"));
    }
    let greedy = |model: &str| {
        let story = "Once Hugo left an oak hat in the till. Where was the hat?";
        succeed(&["generate", model, "--prompt", story, "--temperature", "0", "--max-new-tokens", "24", "--json"])
    };
    let ids = |model: &str| serde_json::from_str::<Value>(&greedy(model)).unwrap()["ids"].clone();
    assert_eq!(ids(text(&tuned)), ids(text(&merged)));

    let (code, _, message) = lowkey(&["export", text(&tuned), "--for", "vllm", "--out", text(&at("vllm"))]);
    assert!(code == 1 && message.contains("kv_b_proj"), "{message}");
    succeed(&["export", text(&tuned), "--for", "transformers", "--out", text(&at("peft"))]);
    assert_eq!(ids(text(&at("peft"))), ids(text(&tuned)));
}
