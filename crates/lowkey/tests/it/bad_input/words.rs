//! Names and words that hold control characters: a terminal that shows them as they are obeys them. (That none reaches
//! standard error is asked of each case.)

use std::fs;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::fixture::{edit_json, source};
use super::{Case, case};

/// Clears the screen and forges a line.
pub(super) const ESCAPE: &str = "\u{1b}[2Jdone\u{1b}[0m";

/// A command line that names something in control characters.
pub(super) fn spoken(arguments: &[&str]) -> Case {
    let shown: Vec<String> = arguments.iter().map(|word| word.escape_debug().to_string()).collect();
    case(format!("control characters: {}", shown.join(" ")), arguments)
        .with(|fixture, dir| fixture.give(dir, &["model", "exp.toml"]))
        .refused()
}

/// A dataset file whose words hold control characters. In TOML they are written as escapes.
pub(super) fn dataset(name: &str, text: &str) -> Case {
    case(format!("control characters in a dataset: {name}"), &["data", "prepare", "d.toml", "--out", "new"])
        .file("d.toml", text)
        .file("a.jsonl", "{\"\\u001b[2J\": \"x\"}\n")
        .refused()
}

/// A key of `config.json` in control characters.
pub(super) fn config(key: &'static str) -> Case {
    case(format!("control characters in config.json: {key}"), &["info", "model"])
        .with(move |fixture, dir| {
            fixture.give(dir, &["model"]);
            edit_json(&dir.join("model/config.json"), |config| config[key] = ESCAPE.into());
        })
        .refused()
        .says(&["config.json", key])
}

/// A tensor whose name holds control characters.
pub(super) fn tensor(arguments: &[&str]) -> Case {
    case(format!("control characters in a tensor's name: {}", arguments[0]), arguments)
        .with(|fixture, dir| {
            fixture.give(dir, &["model"]);
            let path = dir.join("model/model.safetensors");
            let bytes = fs::read(&path).unwrap();
            let tensors = SafeTensors::deserialize(&bytes).unwrap();
            let extra = (ESCAPE.to_owned(), TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap());
            let all: Vec<(String, TensorView<'_>)> = tensors.tensors().into_iter().chain([extra]).collect();
            fs::write(&path, safetensors::serialize(all, None).unwrap()).unwrap();
        })
        .refused()
        .says(&["model"])
}

pub(super) fn cases() -> Vec<Case> {
    let hub = |key: &str, value: &str| {
        let mut keys =
            [("repo", "\"a/b\""), ("files", "[\"a.txt\"]"), ("revision", "\"main\""), ("format", "\"text\"")];
        keys.iter_mut().filter(|(name, _)| *name == key).for_each(|pair| pair.1 = value);
        let keys: String = keys.iter().map(|(name, value)| format!("{name} = {value}\n")).collect();
        dataset(&format!("hub {key}"), &format!("name = \"d\"\n[source]\nkind = \"hub\"\n{keys}"))
            .says(&["d.toml", key])
    };
    vec![
        hub("repo", "\"a/\\u001b[2J\""),
        hub("files", "[\"\\u001b[2J\"]"),
        hub("revision", "\"\\u001b[2J\""),
        dataset("name", &source("text", "text.txt").replace("\"d\"", "\"\\u001b[2J\"")).says(&["d.toml", "name"]),
        dataset("digest", &format!("{}[sha256]\n\"\\u001b[2J\" = \"0\"\n", source("text", "text.txt")))
            .says(&["d.toml"]),
        dataset("digest's value", &format!("{}[sha256]\n\"a\" = \"\\u001b\"\n", source("text", "text.txt")))
            .says(&["d.toml"]),
        spoken(&["train", ESCAPE]),
        spoken(&["plan", ESCAPE]),
        spoken(&["generate", ESCAPE, "--prompt", "x"]),
        spoken(&["generate", "model", "--prompt-file", ESCAPE]),
        spoken(&["info", ESCAPE]),
        spoken(&["eval", "model", "--data", ESCAPE]),
        spoken(&["export", ESCAPE, "--to", "hf"]),
        spoken(&["verify", ESCAPE]),
        spoken(&["convert", ESCAPE, "--kv-rank-budget", "50%"]),
        spoken(&["lab", "run", ESCAPE]),
        spoken(&["lab", "report", ESCAPE]),
        spoken(&["data", "prepare", ESCAPE]),
        spoken(&["data", "info", ESCAPE]),
        spoken(&["data", "prepare", "text.txt", "--tokenizer", ESCAPE]),
        spoken(&["logits", "model", "--ids", ESCAPE, "--out", "x"]),
        spoken(&["train", "run.toml", "--set", ESCAPE]),
        spoken(&["train", "run.toml", "--set", "run.device=\u{1b}[2J"]),
        spoken(&["train", "run.toml", "--set", "run.name=\u{1b}[2J"]),
        spoken(&["train", "run.toml", "--set", "data.path=\u{1b}[2J"]),
        spoken(&["train", "run.toml", "--set", "optimizer.lr=\u{1b}[2J"]),
        spoken(&["train", "run.toml", "--set", "optimizer.\u{1b}[2J=1"]),
        spoken(&["train", "run.toml", "--set", "model.attention=\u{1b}[2J"]),
        spoken(&["bench", "train", "--shape", ESCAPE]),
        spoken(&["bench", "decode", "--way", ESCAPE]),
        spoken(&[ESCAPE]),
        dataset("paths", &source("text", "\\u001b[2J")),
        dataset("field", &source("jsonl", "a.jsonl")).says(&["a.jsonl"]),
        dataset("kind", &source("\\u001b[2J", "a.jsonl")).says(&["d.toml"]),
        dataset(
            "tokenizer",
            &format!("{}[tokenizer]\nkind = \"file\"\npath = \"\\u001b[2J\"\n", source("text", "text.txt")),
        ),
        dataset("key", &format!("{}\"\\u001b[2J\" = 1\n", source("text", "text.txt"))).says(&["d.toml"]),
        config("model_type"),
        config("hidden_act"),
        config("hidden_size"),
        tensor(&["generate", "model", "--prompt", "the", "--max-new-tokens", "2"]),
        tensor(&["export", "model", "--to", "hf", "--data", "text.txt", "--out", "out"]),
    ]
}
