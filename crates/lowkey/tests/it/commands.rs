//! Each command as a user runs it, on models that a run of a second has trained.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use safetensors::SafeTensors;
use serde_json::Value;

/// Runs the program; returns exit code, standard output and standard error.
pub(crate) fn lowkey(arguments: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_lowkey")).args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

pub(crate) fn succeed(arguments: &[&str]) -> String {
    let (code, out, err) = lowkey(arguments);
    assert_eq!(code, 0, "{arguments:?}\n{out}\n{err}");
    out
}

pub(crate) fn json(arguments: &[&str]) -> Value {
    serde_json::from_str(&succeed(arguments)).unwrap()
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub(crate) const RUN: &str = r#"
[run]
name = "tiny"
seed = 3

[model]
attention = "mla"
hidden_size = 24
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
kv_lora_rank = 10
q_lora_rank = 14
qk_nope_head_dim = 6
qk_rope_head_dim = 4
v_head_dim = 5
intermediate_size = 40

[data]
path = "story.txt"
seq_len = 32

[optimizer]
lr = 1e-2
grad_clip = 1.0

[lr_scheduler]
kind = "cosine"
warmup_steps = 2

[training]
steps = 12
batch_size = 4
threads = 2

[eval]
every = 6
batches = 2
prompts = ["The"]
sample_tokens = 8

[checkpoint]
every = 6

[metrics]
tensorboard = true
"#;

/// A folder with a text, a run file, and the run that it describes.
pub(crate) fn fixture() -> &'static Path {
    static FIXTURE: OnceLock<tempfile::TempDir> = OnceLock::new();
    let dir = FIXTURE.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let story: String =
            (0..120).map(|i| format!("The cat number {i} sat on the mat and saw {} mice.\n", i * 7)).collect();
        std::fs::write(dir.path().join("story.txt"), story).unwrap();
        std::fs::write(dir.path().join("tiny.toml"), RUN).unwrap();
        train(dir.path(), "run", &[]);
        dir
    });
    dir.path()
}

fn train(dir: &Path, out: &str, set: &[&str]) -> (PathBuf, String) {
    let (run, out) = (dir.join("tiny.toml"), dir.join(out));
    let mut arguments = vec!["train", text(&run), "--out", text(&out)];
    arguments.extend(set.iter().flat_map(|set| ["--set", set]));
    let printed = succeed(&arguments);
    (out, printed)
}

pub(crate) fn best() -> PathBuf {
    fixture().join("run/checkpoints/best")
}

/// The model of a run of three steps with other settings.
pub(crate) fn best_of(folder: &str, set: &[&str]) -> PathBuf {
    let (out, _) = train(fixture(), folder, &[&["training.steps=3"], set].concat());
    out.join("checkpoints/best")
}

#[test]
fn a_run_leaves_what_the_readme_promises() {
    let run = fixture().join("run");
    for file in ["run.toml", "environment.json", "metrics.jsonl", "evaluation.json", "tensorboard"] {
        assert!(run.join(file).exists(), "{file}");
    }
    for file in ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "checksums.json"] {
        assert!(run.join("checkpoints/step-000012").join(file).exists(), "{file}");
    }
    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 12);
    for key in ["step", "tokens", "time_s", "train_loss", "lr", "grad_norm", "tokens_per_s", "mfu"] {
        assert!(lines.iter().all(|line| line[key].is_number()), "{key}");
    }
    assert!(
        lines[5]["val_loss"].is_number() && lines[5]["bits_per_byte"].is_number() && lines[4]["val_loss"].is_null()
    );
    assert!(lines[11]["train_loss"].as_f64() < lines[0]["train_loss"].as_f64());
}

#[test]
fn one_line_turns_one_attention_into_another() {
    let caches: Vec<u64> = ["mla", "mha", "gqa", "mqa"]
        .iter()
        .map(|kind| {
            let set = format!("model.attention={kind}");
            let (out, printed) = train(fixture(), &format!("run-{kind}"), &[&set, "training.steps=3"]);
            assert!(printed.contains("does not use"), "{kind}: unused keys are named\n{printed}");
            let info = json(&["info", text(&out.join("checkpoints/best")), "--json"]);
            info["cache_bytes_per_token_bf16"].as_u64().unwrap()
        })
        .collect();
    // Two layers of two bytes: L + R = 14, then 2·G·6 for G = 4, 2, 1.
    assert_eq!(caches, vec![4 * 14, 4 * 48, 4 * 24, 4 * 12]);
}

#[test]
fn plan_counts_what_training_will_hold() {
    let run = fixture().join("tiny.toml");
    let plan = json(&["plan", text(&run), "--out", text(&fixture().join("planned")), "--json"]);
    let file = std::fs::read(best().join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let held: usize = tensors.tensors().iter().map(|(_, view)| view.data().len() / 4).sum();
    assert_eq!(plan["parameters"].as_u64().unwrap() as usize, held);
    assert_eq!(plan["cache_bytes_latent"], 4 * 14);
    assert_eq!(plan["cache_bytes_expanded"], 4 * 4 * (6 + 4 + 5));
    assert_eq!(plan["tokens_per_step"], 4 * 32);
    for key in ["train_flops_per_token", "train_bytes", "seconds", "matmul_flops_per_s"] {
        assert!(plan[key].as_f64().unwrap() > 0.0, "{key}");
    }
}

#[test]
fn both_forms_of_decoding_and_every_repetition_give_the_same_text() {
    let model = best();
    let run = |more: &[&str]| {
        let mut arguments = vec!["generate", text(&model), "--prompt", "The cat", "--max-new-tokens", "24", "--json"];
        arguments.extend(more);
        json(&arguments)
    };
    let greedy = run(&["--temperature", "0", "--decode", "expanded"]);
    assert_eq!(greedy["ids"], run(&["--temperature", "0", "--decode", "absorbed"])["ids"]);
    // 2 layers × (L + R) × 4 bytes for each of the 7 + 24 positions.
    assert_eq!(greedy["cache_bytes"].as_u64().unwrap(), 2 * 14 * 4 * (7 + 24));
    let warm = ["--temperature", "1.2", "--top-p", "0.95", "--top-k", "50", "--seed", "4"];
    assert_eq!(run(&warm)["ids"], run(&warm)["ids"]);
    assert_ne!(run(&warm)["ids"], run(&["--temperature", "1.2", "--seed", "5"])["ids"]);
    let streamed =
        succeed(&["generate", text(&model), "--prompt", "The cat", "--max-new-tokens", "24", "--temperature", "0"]);
    assert_eq!(streamed.trim_end(), format!("The cat{}", greedy["text"].as_str().unwrap()).trim_end());
    let whole = greedy["text"].as_str().unwrap();
    let stop = &whole[4..6];
    let cut = run(&["--temperature", "0", "--stop", stop]);
    assert_eq!(cut["text"].as_str().unwrap(), &whole[..whole.find(stop).unwrap()]);
    assert_eq!(cut["finish"], "stop");
}

#[test]
fn eval_repeats_the_figure_that_the_run_ended_with() {
    let ended: Value =
        serde_json::from_str(&std::fs::read_to_string(fixture().join("run/evaluation.json")).unwrap()).unwrap();
    let last = fixture().join("run/checkpoints/step-000012");
    let story = fixture().join("story.txt");
    let of_split =
        ["eval", text(&last), "--data", text(&story), "--batch-size", "4", "--split", "validation", "--json"];
    let again = json(&of_split);
    assert_eq!((&again["tokens"], &again["split"]), (&ended["tokens"], &Value::from("validation")));
    let (a, b) = (again["loss"].as_f64().unwrap(), ended["loss"].as_f64().unwrap());
    assert!((a - b).abs() < 1e-6, "{a} {b}");
    // Who names a text means all of it, and is told where the model has seen it.
    let all = json(&["eval", text(&last), "--data", text(&story), "--json"]);
    assert_eq!(all, json(&["eval", text(&last), "--data", text(&story), "--split", "all", "--json"]));
    assert_eq!(all["split"], "all");
    let (_, shown, noted) = lowkey(&["eval", text(&last), "--data", text(&story)]);
    assert!(shown.starts_with(&format!("all of {}:\n", story.display())), "{shown}");
    assert!(noted.contains("trained on this text; --split validation"), "{noted}");
    assert!(all["tokens"].as_u64().unwrap() > 8 * again["tokens"].as_u64().unwrap());
    // One byte is one token here.
    assert!((again["bits_per_byte"].as_f64().unwrap() - a / std::f64::consts::LN_2).abs() < 1e-9);
}

#[test]
fn a_storybook_model_is_told_its_gap_by_class() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dir.path().join("book.toml");
    std::fs::write(
        &dataset,
        "name = \"book\"\n[source]\nkind = \"storybook\"\nseed = 5\ndocuments = 200\nvalidation_documents = 20\n[tokenizer]\nkind = \"bytes\"\n",
    )
    .unwrap();
    let run = RUN.replace("path = \"story.txt\"\nseq_len = 32", "dataset = \"book.toml\"\nseq_len = 256");
    std::fs::write(dir.path().join("tiny.toml"), run).unwrap();
    let (out, printed) = train(dir.path(), "run", &["training.steps=4", "eval.batches=1", "eval.every=2"]);
    assert!(printed.contains("gap to the true entropy") && printed.contains("answer"), "{printed}");
    let model = out.join("checkpoints/best");
    let eval = json(&["eval", text(&model), "--data", text(&dataset), "--json"]);
    let classes = eval["classes"].as_array().unwrap();
    let sum = |key: &str| -> f64 {
        classes.iter().map(|c| c[key].as_f64().unwrap() * c["tokens"].as_f64().unwrap()).sum::<f64>()
            / eval["tokens"].as_f64().unwrap()
    };
    assert!((sum("loss") - eval["loss"].as_f64().unwrap()).abs() < 1e-9);
    assert!((sum("gap") - eval["gap"].as_f64().unwrap()).abs() < 1e-9);
    let answer = classes.iter().find(|c| c["class"] == "answer").unwrap();
    assert_eq!(answer["entropy"].as_f64(), Some(0.0));
    // Half a trained model is far from the truth, and a loss below the truth would be a leak.
    assert!(eval["gap"].as_f64().unwrap() > 0.5);
}

#[test]
fn a_corpus_of_json_lines_trains_a_tokenizer_and_a_model_that_can_be_fine_tuned() {
    let dir = tempfile::tempdir().unwrap();
    let lines: String = (0..150)
        .map(|i| format!("{{\"id\": {i}, \"body\": \"Die Maus {i} läuft über den Käse und frisst {i}.\"}}\n"))
        .collect();
    std::fs::write(dir.path().join("corpus.jsonl"), lines).unwrap();
    let dataset = dir.path().join("mice.toml");
    std::fs::write(
        &dataset,
        "name = \"mice\"\n[source]\nkind = \"jsonl\"\npaths = [\"*.jsonl\"]\nfield = \"body\"\n[tokenizer]\nkind = \"bpe\"\nvocab_size = 300\n[split]\nvalidation_fraction = 0.2\nby = \"documents\"\n",
    )
    .unwrap();
    succeed(&["data", "prepare", text(&dataset)]);
    let prepared = dir.path().join("prepared/mice");
    assert!(succeed(&["data", "info", text(&prepared), "--show", "1"]).contains("Käse"));
    let manifest = json(&["data", "info", text(&prepared), "--json"]);
    assert_eq!(
        manifest["train"]["documents"].as_u64().unwrap() + manifest["validation"]["documents"].as_u64().unwrap(),
        150
    );

    std::fs::write(dir.path().join("tiny.toml"), RUN.replace("path = \"story.txt\"", "dataset = \"mice.toml\""))
        .unwrap();
    let (out, _) = train(dir.path(), "base", &["eval.prompts=[\"Die\"]"]);
    let base = out.join("checkpoints/best");
    let before =
        json(&["eval", text(&base), "--data", text(&dataset), "--seq-len", "32", "--batch-size", "4", "--json"]);

    let start = RUN.find("[model]").unwrap()..RUN.find("[data]").unwrap();
    let tune = RUN.replace(&RUN[start], &format!("[init]\nfrom = \"{}\"\n\n", text(&base)));
    std::fs::write(dir.path().join("tiny.toml"), tune.replace("path = \"story.txt\"", "dataset = \"mice.toml\""))
        .unwrap();
    // A rate of almost nothing: the model that comes out is the one that went in.
    train(dir.path(), "tuned", &["training.steps=1", "optimizer.lr=1e-12", "lr_scheduler.warmup_steps=0"]);
    let after: Value =
        serde_json::from_str(&std::fs::read_to_string(dir.path().join("tuned/evaluation.json")).unwrap()).unwrap();
    let (before, after) = (before["loss"].as_f64().unwrap(), after["loss"].as_f64().unwrap());
    assert!((before - after).abs() < 1e-5, "{before} {after}");
    let tokenizer = |dir: &Path| std::fs::read(dir.join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer(&base), tokenizer(&dir.path().join("tuned/checkpoints/best")));
}

#[test]
fn logits_are_those_of_transformers() {
    let case = crate::reference::own().join("cases/v3_yarn");
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("logits.safetensors");
    let expected = case.join("expected.safetensors");
    succeed(&["logits", text(&case), "--ids", text(&expected), "--out", text(&out)]);
    let read = |path: &Path| {
        let bytes = std::fs::read(path).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let view = tensors.tensor("logits").unwrap();
        let values: Vec<f32> = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        (view.shape().to_vec(), values)
    };
    let ((shape, found), (expected_shape, expected)) = (read(&out), read(&expected));
    assert_eq!(shape, expected_shape);
    assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 2e-4));
}

#[test]
fn help_shows_examples_and_fits_a_hundred_columns() {
    for command in [vec!["--help"], vec!["train", "--help"], vec!["generate", "--help"], vec!["eval", "--help"]] {
        let help = succeed(&command);
        assert!(help.contains("Example"), "{command:?}");
        assert!(help.lines().all(|line| line.chars().count() <= 100), "{command:?}\n{help}");
    }
    assert_eq!(lowkey(&["no-such-command"]).0, 2);
}
