//! Sweeps as a user runs them: killed, resumed, split, and refused.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::commands::{json, lowkey, succeed, text};

const RUN: &str = r#"
[run]
name = "base"
seed = 1

[model]
attention = "mla"
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
kv_lora_rank = 8
qk_nope_head_dim = 6
qk_rope_head_dim = 2
v_head_dim = 8
intermediate_size = 24

[data]
dataset = "book.toml"
seq_len = 48

[optimizer]
lr = 1e-2

[training]
steps = 40
batch_size = 4

[eval]
every = 20
batches = 2

[checkpoint]
every = 5
keep = 1
"#;

const BOOK: &str = r#"
name = "book"

[source]
kind = "storybook"
seed = 3
documents = 200
validation_documents = 8
"#;

const EXPERIMENT: &str = r#"
name = "tiny"
question = "Does it run?"
base = "run.toml"
seeds = [1, 2]
metric = "gap"
baseline = "mha"
x = "model.kv_lora_rank"
quantised = true

[match]
by = "parameters"
with = "model.intermediate_size"

[rule]
kind = "margin"
margin = 0.01

[[arms]]
name = "mha"
set = { "model.attention" = "mha" }

[[axes]]
key = "model.kv_lora_rank"
values = [2, 8]
"#;

fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, content) in [("run.toml", RUN), ("book.toml", BOOK), ("experiment.toml", EXPERIMENT)] {
        fs::write(dir.path().join(name), content).unwrap();
    }
    dir
}

/// Runs the sweep and reports it; the bytes of all that is written.
fn whole(dir: &Path, runs: &str) -> [Vec<u8>; 3] {
    let (experiment, runs) = (dir.join("experiment.toml"), dir.join(runs));
    succeed(&["lab", "run", text(&experiment), "--out", text(&runs), "--jobs", "2"]);
    report(dir, &runs)
}

fn report(dir: &Path, runs: &Path) -> [Vec<u8>; 3] {
    let (experiment, out) = (dir.join("experiment.toml"), runs.join("report"));
    succeed(&["lab", "report", text(&experiment), "--runs", text(runs), "--out", text(&out)]);
    ["results.csv", "table.md", "report.html"].map(|file| fs::read(out.join(file)).unwrap())
}

/// Whether anything below a folder has been written: something to interrupt.
fn steps_logged(runs: &Path) -> usize {
    let mut logged = 0;
    let mut folders = vec![runs.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let path: PathBuf = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.ends_with("metrics.jsonl") {
                logged += fs::read_to_string(path).map_or(0, |text| text.lines().count());
            }
        }
    }
    logged
}

/// Ten kills at moments spread over the sweep; what is reported in the end is what an uninterrupted sweep reports.
#[test]
fn a_sweep_that_is_killed_ten_times_ends_the_same() {
    let dir = folder();
    let expected = whole(dir.path(), "calm");
    let (experiment, runs) = (dir.path().join("experiment.toml"), dir.path().join("killed"));
    let all = 6 * 40;
    let mut killed = 0;
    for round in 1..=10 {
        let arguments = ["lab", "run", text(&experiment), "--out", text(&runs), "--jobs", "2"];
        let mut child = Command::new(env!("CARGO_BIN_EXE_lowkey"))
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // A different part of the way each time, and a few milliseconds more.
        let goal = round * all / 11;
        let started = Instant::now();
        while steps_logged(&runs) < goal && child.try_wait().unwrap().is_none() {
            assert!(started.elapsed() < Duration::from_secs(60), "the sweep does not advance");
            sleep(Duration::from_millis(1));
        }
        sleep(Duration::from_millis(round as u64 * 7 % 11));
        killed += usize::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert!(killed >= 7, "only {killed} kills met a running sweep");
    assert_eq!(whole(dir.path(), "killed"), expected);
}

#[test]
fn shards_are_the_whole_and_share_nothing() {
    let dir = folder();
    let experiment = dir.path().join("experiment.toml");
    let runs = dir.path().join("shards");
    for i in 0..4 {
        let shard = format!("{i}/4");
        let out = json(&["lab", "run", text(&experiment), "--out", text(&runs), "--shard", &shard, "--json"]);
        assert_eq!((&out["failed"].as_array().unwrap().len(), &out["left"]), (&0, &0.into()), "{out}");
    }
    let report = report(dir.path(), &runs);
    let csv = String::from_utf8(report[0].clone()).unwrap();
    assert_eq!(csv.lines().count(), 1 + 6, "{csv}");
    assert!(csv.lines().next().unwrap().contains("int8.val_loss"), "{csv}");
    let table = String::from_utf8(report[1].clone()).unwrap();
    assert!(table.contains("Does it run?") && table.contains("kv_lora_rank-8 against mha"), "{table}");
    let page = String::from_utf8(report[2].clone()).unwrap();
    assert!(page.contains("<svg") && page.contains("cache in int8") && !page.contains("Decoded tokens per second"));

    // Speed belongs to the machine: only where it is asked for.
    let arguments = ["lab", "report", text(&experiment), "--runs", text(&runs), "--out", text(&runs)];
    succeed(&[&arguments[..], &["--decode", "16,24"]].concat());
    let page = fs::read_to_string(runs.join("report.html")).unwrap();
    assert!(page.contains("Decoded tokens per second") && page.contains("<th>at 24</th>"), "{page}");
    assert!(!page.contains("is not what it was when"), "{page}");

    // A rule that was made up afterwards is called that.
    fs::write(&experiment, EXPERIMENT.replace("margin = 0.01", "margin = 9.0")).unwrap();
    assert!(succeed(&arguments).contains("The rule, the metric or the baseline is not what it was"));
}

#[test]
fn arms_are_matched_to_the_nearest_width() {
    let dir = folder();
    let experiment = dir.path().join("experiment.toml");
    let plan = json(&["lab", "run", text(&experiment), "--dry-run", "--json"]);
    let arms = plan["arms"].as_array().unwrap();
    assert_eq!((arms.len(), &plan["runs"]), (3, &6.into()));
    let base = arms[0]["parameters"].as_f64().unwrap();
    for arm in arms {
        // One more unit of the feed-forward layer is 3·16 parameters.
        let apart = (arm["parameters"].as_f64().unwrap() - base).abs();
        assert!(apart <= 24.0, "{arm}");
        assert!((arm["mismatch"].as_f64().unwrap().abs() - apart / base).abs() < 1e-12, "{arm}");
    }
    assert_eq!((&arms[1]["x"], &arms[2]["x"]), (&2.0.into(), &8.0.into()));
}

#[test]
fn what_makes_no_sense_is_refused() {
    let dir = folder();
    let experiment = dir.path().join("experiment.toml");
    let cases: &[(&str, &str, &str)] = &[
        ("seeds = [1, 2]", "seeds = []", "at least one seed"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "twice"),
        ("baseline = \"mha\"", "baseline = \"mla\"", "the arms are mha, kv_lora_rank-2, kv_lora_rank-8"),
        ("key = \"model.kv_lora_rank\"", "key = \"model.rank\"", "unknown field `rank`"),
        ("key = \"model.kv_lora_rank\"", "key = \"run.seed\"", "belongs to the experiment"),
        ("values = [2, 8]", "values = [0, 8]", "arm kv_lora_rank-0"),
        ("kind = \"margin\"", "kind = \"guess\"", "unknown variant `guess`"),
        ("base = \"run.toml\"", "base = \"gone.toml\"", "gone.toml"),
        ("with = \"model.intermediate_size\"", "with = \"model.vocab_size\"", "arm"),
        ("question", "questions", "unknown field `questions`"),
    ];
    for (from, to, says) in cases {
        fs::write(&experiment, EXPERIMENT.replacen(from, to, 1)).unwrap();
        let (code, _, message) = lowkey(&["lab", "run", text(&experiment), "--dry-run"]);
        assert_eq!(code, 2, "{to}: {message}");
        assert!(message.contains(says) && message.contains("experiment.toml"), "{to}: {message}");
    }
    fs::write(&experiment, EXPERIMENT).unwrap();
    for shard in ["2", "4/4", "-1/2", "a/b"] {
        let (code, _, message) = lowkey(&["lab", "run", text(&experiment), "--dry-run", &format!("--shard={shard}")]);
        assert!(code == 2 && message.contains("shard"), "{shard}: {message}");
    }
    fs::write(&experiment, EXPERIMENT.to_string() + "\n[budget]\nruns = 5\n").unwrap();
    let (code, _, message) = lowkey(&["lab", "run", text(&experiment)]);
    assert!(code == 2 && message.contains("6 runs are more than budget.runs = 5"), "{message}");
}
