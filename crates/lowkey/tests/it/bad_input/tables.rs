//! Tables that name other files, and binary files that end too early.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::fixture::{edit, edit_json};
use super::places::{Place, put};
use super::{Case, case};

const BEST: &str = "run/checkpoints/best";
const STEP: &str = "run/checkpoints/step-000004";

/// Commands that look at a checkpoint's checksums.
const CHECKED: [&[&str]; 3] = [
    &["generate", BEST, "--prompt", "the", "--max-new-tokens", "2"],
    &["info", BEST],
    &["export", BEST, "--to", "hf", "--out", "out"],
];
/// Commands that follow a model's index.
const INDEXED: [&[&str]; 2] = [&["generate", "split", "--prompt", "the", "--max-new-tokens", "2"], &["info", "split"]];

/// `checksums.json` with a change, for each command that checks it.
pub(super) fn checksums(name: &str, change: impl Fn(&mut Value) + Send + Sync + Copy + 'static) -> Vec<Case> {
    let of = |command: &&[&str]| {
        case(format!("checksums.json: {name}: {}", command.join(" ")), command)
            .with(move |fixture, dir| {
                fixture.give(dir, &["run"]);
                put(&dir.join(STEP).join("pipe"), Place::Pipe);
                edit_json(&dir.join(STEP).join("checksums.json"), change);
            })
            .refused()
            .says(&["checksums.json"])
    };
    CHECKED.iter().map(of).collect()
}

/// One more name in `checksums.json`.
pub(super) fn named(file: &'static str) -> Vec<Case> {
    checksums(&format!("names {file:?}"), move |table| table[file] = "0".repeat(64).into())
}

/// Another index of a model whose tensors lie in one shard.
pub(super) fn index(name: &str, change: impl Fn(&mut Value) + Send + Sync + Copy + 'static) -> Vec<Case> {
    let of = |command: &&[&str]| {
        case(format!("index: {name}: {}", command.join(" ")), command)
            .with(move |fixture, dir| {
                fixture.give(dir, &["split"]);
                put(&dir.join("split/pipe"), Place::Pipe);
                fs::create_dir(dir.join("split/folder")).unwrap();
                edit_json(&dir.join("split/model.safetensors.index.json"), change);
            })
            .refused()
            .says(&["split"])
    };
    INDEXED.iter().map(of).collect()
}

/// One tensor that lies elsewhere.
pub(super) fn moved(to: Value) -> Vec<Case> {
    let text = to.to_string();
    // Leaked: the cases of a test live as long as the test.
    let to: &'static Value = Box::leak(Box::new(to));
    index(&format!("leads to {text}"), move |index| index["weight_map"]["model.norm.weight"] = to.clone())
}

/// A file that ends after `length` bytes.
pub(super) fn cut(file: &'static str, length: usize, command: &str) -> Case {
    let words: Vec<&str> = command.split(' ').collect();
    let (folder, base) = file.split_once('/').unwrap_or((file, file));
    case(format!("{file} of {length} bytes: {command}"), &words)
        .with(move |fixture, dir| {
            let gives: &[&str] = if folder == "gguf" || folder == "exported" { &["run", folder] } else { &[folder] };
            fixture.give(dir, gives);
            if folder == "ids.safetensors" {
                fixture.give(dir, &["model"]);
            }
            edit(&dir.join(file), |bytes| bytes.truncate(length));
        })
        .refused()
        .says(&[base])
}

/// Another text in a JSON file of the run's checkpoints, or of the run.
pub(super) fn json_file(file: &'static str, text: &'static str, command: &str) -> Case {
    let words: Vec<&str> = command.split(' ').collect();
    let base = Path::new(file).file_name().unwrap().to_str().unwrap();
    case(format!("{file} holds {text}: {command}"), &words)
        .with(move |fixture, dir| {
            fixture.give(dir, &["run"]);
            if let Some(folder) = file.split('/').next().filter(|folder| *folder != "run") {
                fixture.give(dir, &[folder]);
            }
            for step in ["step-000002", "step-000004"] {
                fs::write(dir.join(file.replace('*', step)), text).unwrap();
            }
        })
        .refused()
        .says(&[base])
}

const GENERATE: &str = "generate model --prompt the --max-new-tokens 2";
const RESUME: &str = "train run.toml --out run --resume --set training.steps=8";
const VERIFY: &str = "verify exported --source run/checkpoints/best";

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, value) in [("a list", json!([])), ("nothing", Value::Null), ("a text", json!("sha256"))] {
        let value: &'static Value = Box::leak(Box::new(value));
        cases.extend(checksums(&format!("is {name}"), move |table| *table = value.clone()));
        cases.extend(index(&format!("is {name}"), move |index| *index = value.clone()));
    }
    cases.extend(checksums("a number for a hash", |table| table["model.safetensors"] = 5.into()));
    cases.extend(checksums("another hash", |table| table["model.safetensors"] = "0".repeat(64).into()));
    cases.extend(checksums("no hash", |table| table["model.safetensors"] = "zz".into()));
    for file in ["../text.txt", "/etc/hostname", "/dev/zero", "a/../../text.txt", "", ".", "a\\b", "\u{1b}[2J"] {
        cases.extend(named(file));
    }
    cases.extend(checksums("is empty", |table| *table = json!({})));
    for file in ["config.json", "model.safetensors", "tokenizer.json", "trainer.json"] {
        cases.extend(checksums(&format!("does not list {file}"), move |table| {
            table.as_object_mut().unwrap().remove(file);
        }));
    }
    for to in [json!(""), json!("."), json!(".."), json!("/etc/hostname"), json!("/dev/zero"), json!("../text.txt")] {
        cases.extend(moved(to));
    }
    for to in [json!("a/../../text.txt"), json!("absent.safetensors"), json!(7), json!(null), json!(["a"]), json!({})] {
        cases.extend(moved(to));
    }
    cases.extend(index("no weight_map", |index| *index = json!({})));
    cases.extend(index("weight_map a list", |index| index["weight_map"] = json!([])));
    cases.extend(index("weight_map empty", |index| index["weight_map"] = json!({})));
    for length in [0, 1, 7, 8, 9, 100, 4000] {
        cases.push(cut("model/model.safetensors", length, GENERATE));
    }
    for length in [1, 8, 31, 200] {
        cases.push(cut("prepared/train.tokens", length, "data info prepared"));
        cases.push(cut("prepared/validation.tokens", length, "data info prepared"));
        cases.push(cut("prepared/manifest.json", length, "data info prepared"));
        cases.push(cut("model/tokenizer.json", length, GENERATE));
        cases.push(cut("model/config.json", length, GENERATE));
        cases.push(cut("gguf/model.gguf", length, "verify gguf --source run/checkpoints/best"));
        cases.push(cut("exported/certificate.json", length, VERIFY));
        cases.push(cut("exported/fused.safetensors", length, VERIFY));
    }
    for length in [4, 12, 90] {
        cases.push(cut("ids.safetensors", length, "logits model --ids ids.safetensors --out out.safetensors"));
    }
    for text in ["", "{", "{}", "[]", "null", "{\"step\": -1}"] {
        cases.push(json_file("run/checkpoints/*/trainer.json", text, RESUME));
        cases.push(json_file("run/checkpoints/*/config.json", text, RESUME));
        cases.push(json_file("exported/certificate.json", text, VERIFY));
    }
    cases
}
