//! One small run that works; every bad case is a copy of it with something broken.

use std::fs;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

/// Where a run keeps its best checkpoint.
const BEST: &str = "run/checkpoints/best";
/// The one shard of the model `split`.
pub(super) const SHARD: &str = "model-00001-of-00001.safetensors";

/// A run file whose run takes a tenth of a second.
pub(super) const RUN: &str = r#"[run]
name = "tiny"
seed = 1

[model]
attention = "mla"
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
kv_lora_rank = 8
qk_nope_head_dim = 4
qk_rope_head_dim = 4
v_head_dim = 4
intermediate_size = 32

[data]
path = "text.txt"
seq_len = 16

[optimizer]
lr = 1e-2

[training]
steps = 4
batch_size = 2
threads = 1

[checkpoint]
every = 2
"#;

/// The same text as a dataset of one token per character.
pub(super) const CHARACTERS: &str = r#"name = "chars"
[source]
kind = "text"
paths = ["text.txt"]
[tokenizer]
kind = "chars"
"#;

/// An experiment of two runs.
const EXPERIMENT: &str = r#"name = "tiny"
question = "Does it run?"
base = "run.toml"
seeds = [1]
metric = "val_loss"
baseline = "a"
[rule]
kind = "margin"
margin = 0.01
[[arms]]
name = "a"
set = { "model.kv_lora_rank" = 4 }
[[arms]]
name = "b"
set = { "model.kv_lora_rank" = 8 }
"#;

/// A dataset file on one file of text.
pub(super) fn source(kind: &str, path: &str) -> String {
    format!("name = \"d\"\n[source]\nkind = \"{kind}\"\npaths = [\"{path}\"]\n")
}

/// A folder with `text.txt`, `run.toml`, `chars.toml`, the run `run` on bytes, the run `chars` on characters, the shards
/// `prepared`, what was made of the run (`model` without checksums, `split` in a shard, `exported`, `gguf`, `converted`),
/// the experiment `exp.toml` with its runs `lab`, and a small file of each further kind.
pub(super) struct Fixture {
    root: TempDir,
}

impl Fixture {
    pub(super) fn new() -> Self {
        let root = TempDir::new().unwrap();
        let dir = root.path();
        let words =
            ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "it", "sleeps"];
        let text: Vec<&str> = (0..1000usize).map(|i| words[i * i * 7 % 11 + i % 3]).collect();
        fs::write(dir.join("text.txt"), text.join(" ")).unwrap();
        fs::write(dir.join("run.toml"), RUN).unwrap();
        fs::write(dir.join("chars.toml"), CHARACTERS).unwrap();
        let (head, rest) = RUN.split_once("[model]").unwrap();
        let ids: Vec<u8> = [1i64, 2].into_iter().flat_map(i64::to_le_bytes).collect();
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::I64, vec![1, 2], &ids).unwrap();
        let tokens = format!("{}[tokenizer]\nkind = \"file\"\npath = \"t.json\"\n", source("text", "text.txt"));
        for (name, text) in [
            ("exp.toml", EXPERIMENT.to_owned()),
            ("tune.toml", format!("{head}[init]\nfrom = \"model\"\n[data]{}", rest.split_once("[data]").unwrap().1)),
            ("data-run.toml", RUN.replace("path = \"text.txt\"", "dataset = \"d.toml\"")),
            ("d.toml", source("text", "text.txt")),
            ("lines.toml", source("jsonl", "a.jsonl")),
            ("gz.toml", source("jsonl", "a.jsonl.gz")),
            ("zst.toml", source("text", "a.txt.zst")),
            ("table.toml", source("parquet", "a.parquet")),
            ("tokens.toml", tokens),
            ("a.jsonl", "{\"text\":\"one two\"}\n".repeat(40)),
            ("prompt.txt", "the".to_owned()),
        ] {
            fs::write(dir.join(name), text).unwrap();
        }
        fs::write(dir.join("ids.safetensors"), safetensors::serialize([("input_ids", view)], None).unwrap()).unwrap();
        fs::write(dir.join("chars-run.toml"), RUN.replace("path = \"text.txt\"", "dataset = \"chars.toml\"")).unwrap();
        for arguments in [
            &["train", "run.toml", "--out", "run"][..],
            &["train", "chars-run.toml", "--out", "chars"],
            &["data", "prepare", "chars.toml", "--out", "tokens"],
            &["export", BEST, "--to", "fused", "--form", "fused", "--out", "exported"],
            &["export", BEST, "--to", "gguf", "--out", "gguf"],
            &["convert", BEST, "--data", "text.txt", "--kv-rank-budget", "50%", "--out", "converted"],
            &["lab", "run", "exp.toml", "--out", "lab"],
        ] {
            let output = Command::new(env!("CARGO_BIN_EXE_lowkey")).args(arguments).current_dir(dir).output().unwrap();
            assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        // The run has put its own folder into this one.
        fs::remove_dir_all(dir.join("prepared")).unwrap();
        fs::rename(dir.join("tokens"), dir.join("prepared")).unwrap();
        let fixture = Self { root };
        fixture.give_model("run", fixture.root());
        let split = fixture.root().join("split");
        copy(&fixture.root().join("model"), &split);
        fs::rename(split.join("model.safetensors"), split.join(SHARD)).unwrap();
        fs::write(split.join("model.safetensors.index.json"), index(&split.join(SHARD)).to_string()).unwrap();
        copy(&fixture.root().join("prepared/tokenizer.json"), &fixture.root().join("t.json"));
        fixture
    }

    pub(super) fn root(&self) -> &Path {
        self.root.path()
    }

    /// Copies files and folders of the fixture into `dir`.
    pub(super) fn give(&self, dir: &Path, names: &[&str]) {
        for name in names {
            copy(&self.root().join(name), &dir.join(name));
        }
    }

    /// Copies the last checkpoint of the run `run` to `dir/model`, as a model directory without checksums.
    pub(super) fn give_model(&self, run: &str, dir: &Path) {
        copy(&self.root().join(run).join("checkpoints/step-000004"), &dir.join("model"));
        fs::remove_file(dir.join("model/checksums.json")).unwrap();
    }
}

fn copy(from: &Path, to: &Path) {
    if from.is_symlink() {
        // `best`: relative, so that it points into the copy.
        #[cfg(unix)]
        std::os::unix::fs::symlink(fs::read_link(from).unwrap(), to).unwrap();
        return;
    }
    if from.is_dir() {
        fs::create_dir(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            copy(&entry.path(), &to.join(entry.file_name()));
        }
    } else {
        fs::copy(from, to).unwrap();
    }
}

/// The index of a model whose tensors lie in one shard.
pub(super) fn index(shard: &Path) -> serde_json::Value {
    let bytes = fs::read(shard).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let map: serde_json::Map<String, serde_json::Value> =
        tensors.names().into_iter().map(|name| (name.to_string(), SHARD.into())).collect();
    serde_json::json!({ "weight_map": map })
}

/// Changes a file's bytes in place.
pub(super) fn edit(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// Changes the keys of a JSON file.
pub(super) fn edit_json(path: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}
