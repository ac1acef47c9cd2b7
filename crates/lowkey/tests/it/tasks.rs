//! Diagnostic tasks as a user meets them: described, trained on, measured, and refused where they have no meaning.

use std::path::Path;

use serde_json::Value;
use tempfile::TempDir;

use crate::commands::{json, lowkey, succeed, text};

const WORDS: &str = "kind = \"copy\"\nsymbols = 6\nlength = 4\n";
const VECTORS: &str = "kind = \"linear-recall\"\nwidth = 4\nitems = 4\n";

fn write(dir: &Path, name: &str, task: &str) {
    let source = "[source]\nkind = \"task\"\nseed = 3\nvalidation_examples = 40\n[source.task]\n";
    std::fs::write(dir.join(format!("{name}.toml")), format!("name = \"{name}\"\n{source}{task}")).unwrap();
    let run = format!(
        "[run]\nname = \"{name}\"\n[model]\nattention = \"mla\"\nhidden_size = 16\nnum_hidden_layers = 1\n\
         num_attention_heads = 2\nkv_lora_rank = 8\nqk_nope_head_dim = 4\nqk_rope_head_dim = 4\nv_head_dim = 8\n\
         intermediate_size = 16\n[data]\ndataset = \"{name}.toml\"\nseq_len = 8\n[optimizer]\nlr = 1e-2\n\
         [training]\nsteps = 8\nbatch_size = 8\nthreads = 2\n[eval]\nevery = 4\n"
    );
    std::fs::write(dir.join(format!("{name}-run.toml")), run).unwrap();
}

/// A folder with both tasks and a trained run of each, `words` and `vectors`.
fn folder() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, task) in [("words", WORDS), ("vectors", VECTORS)] {
        write(dir.path(), name, task);
        let (run, out) = (dir.path().join(format!("{name}-run.toml")), dir.path().join(name));
        let plan = json(&["plan", text(&run), "--json"]);
        assert_eq!(plan["tokens_per_step"].as_u64(), Some(64));
        let said = succeed(&["train", text(&run), "--out", text(&out)]);
        let figure = if name == "words" { "accuracy" } else { "mean square per number" };
        assert!(said.contains(figure) && said.contains("lowkey eval"), "{said}");
        assert!(!said.contains("bits") && !said.contains("lowkey generate"), "{said}");
    }
    dir
}

#[test]
fn a_task_is_described_trained_on_and_measured_again() {
    let dir = folder();
    let path = |name: &str| dir.path().join(name);
    for (name, figure) in [("words", "accuracy"), ("vectors", "mse")] {
        let evaluation: Value =
            serde_json::from_str(&std::fs::read_to_string(path(name).join("evaluation.json")).unwrap()).unwrap();
        let last = path(name).join("checkpoints/step-000008");
        let data = path(&format!("{name}.toml"));
        for batch_size in ["3", "64"] {
            let again = json(&["eval", text(&last), "--data", text(&data), "--batch-size", batch_size, "--json"]);
            let (found, expected) = (again[figure].as_f64().unwrap(), evaluation[figure].as_f64().unwrap());
            assert!((found - expected).abs() < 1e-6, "{name}: {found} for {expected}");
            assert_eq!((again["tokens"].as_u64(), again["tokens"].clone()), (Some(160), evaluation["tokens"].clone()));
        }
        let fewer = json(&["eval", text(&last), "--data", text(&data), "--batches", "2", "--json"]);
        assert_eq!(fewer["tokens"].as_u64(), Some(64));

        let info = json(&["data", "info", text(&data), "--json"]);
        assert_eq!((info["positions"].as_u64(), info["answers"].as_u64()), (Some(8), Some(4)));
        assert_eq!(info["task"]["kind"], if name == "words" { "copy" } else { "linear-recall" });
        assert!(succeed(&["data", "info", text(&data)]).contains("40 examples"));
    }
    let shown = succeed(&["data", "info", text(&path("words.toml")), "--show", "2"]);
    assert!(shown.contains("| (s") && shown.contains("\n[1] s"), "{shown}");
}

#[test]
fn what_a_task_has_not_is_refused_by_name() {
    let dir = folder();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (words, vectors) = (path("words/checkpoints/best"), path("vectors/checkpoints/best"));
    let cases: [(&[&str], i32, &[&str]); 11] = [
        (&["data", "prepare", &path("words.toml")], 2, &["words.toml", "nothing to prepare", "data info"]),
        (&["data", "info", &path("vectors.toml"), "--show", "1"], 1, &["vectors, not words"]),
        (&["eval", &words, "--data", &path("vectors.toml")], 1, &["was not trained on this task", "vectors.toml"]),
        (&["eval", &vectors, "--data", &path("words.toml")], 1, &["tokenizer.json"]),
        (&["eval", &words, "--data", &path("words.toml"), "--split", "all"], 2, &["--split all", "a task has no end"]),
        (&["eval", &words, "--data", &path("words.toml"), "--seq-len", "7"], 2, &["--seq-len 7", "between 8 and 8"]),
        (&["eval", &words, "--data", &path("words.toml"), "--batch-size", "0"], 2, &["--batch-size 0"]),
        (&["generate", &vectors, "--prompt", "a"], 1, &["tokenizer.json"]),
        (&["train", &path("words-run.toml"), "--set", "eval.prompts=[\"s1\"]"], 2, &["words-run.toml", "eval.prompts"]),
        (&["train", &path("words-run.toml"), "--set", "data.seq_len=7"], 2, &["data.seq_len = 7", "8 positions"]),
        (&["plan", &path("vectors-run.toml"), "--set", "training.z_loss=0.1"], 2, &["training.z_loss = 0.1"]),
    ];
    for (arguments, code, fragments) in cases {
        let (found, out, err) = lowkey(arguments);
        assert_eq!(found, code, "{arguments:?}\n{out}{err}");
        for fragment in fragments {
            assert!(err.contains(fragment), "{arguments:?}: {fragment:?} is not in {err}");
        }
    }
}
