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
    assert!(page.contains("Rule, as written before the runs") && !page.contains("No verdict"), "{page}");
}

/// What decides is written down when the runs begin, and nothing that was changed since decides anything.
#[test]
fn a_rule_that_changed_after_the_runs_voids_the_verdict() {
    let dir = folder();
    let experiment = dir.path().join("experiment.toml");
    let runs = dir.path().join("runs");
    whole(dir.path(), "runs");
    let arguments = ["lab", "report", text(&experiment), "--runs", text(&runs), "--out", text(&runs)];
    let told = succeed(&arguments);
    assert!(told.contains("kv_lora_rank-8 against mha") && !told.contains("No verdict"), "{told}");
    for (from, to, says) in [
        ("margin = 0.01", "margin = 9.0", "rule.margin was 0.01, is 9.0"),
        ("margin = 0.01", "margin = 0.01\nconfidence = 0.8", "rule.confidence was 0.95, is 0.8"),
        ("seeds = [1, 2]", "seeds = [1]", "seeds was [1,2], is [1]"),
        ("metric = \"gap\"", "metric = \"val_loss\"", "metric was \"gap\", is \"val_loss\""),
        ("baseline = \"mha\"", "baseline = \"kv_lora_rank-8\"", "baseline was \"mha\", is \"kv_lora_rank-8\""),
        ("values = [2, 8]", "values = [2]", "arms.kv_lora_rank-8.x was 8.0, and is gone"),
        ("metric = \"gap\"", "metric = \"max_logit\"\nbetter = \"higher\"", "better was \"lower\", is \"higher\""),
        (
            "[match]",
            "[[theory]]\nname = \"late\"\npoints = [[0.0, 1.0], [9.0, 0.0]]\n\n[match]",
            "theory.late was not there",
        ),
    ] {
        fs::write(&experiment, EXPERIMENT.replacen(from, to, 1)).unwrap();
        let told = succeed(&arguments);
        assert!(told.contains("No verdict: what decides is not what it was") && told.contains(says), "{to}: {told}");
        assert!(!told.contains(" against mha: "), "{to}: {told}");
    }
    // The run file decides, too.
    fs::write(&experiment, EXPERIMENT).unwrap();
    fs::write(dir.path().join("run.toml"), RUN.replace("lr = 1e-2", "lr = 2e-2")).unwrap();
    let told = succeed(&arguments);
    assert!(
        told.contains("No verdict: runs were made with other settings") && told.contains("([optimizer])"),
        "{told}"
    );
    fs::write(dir.path().join("run.toml"), RUN).unwrap();
    // Nor is it known of runs beside which nothing was kept, or only later.
    fs::remove_file(runs.join("rule.json")).unwrap();
    let told = succeed(&arguments);
    assert!(told.contains("No verdict: nothing beside the runs (rule.json) says"), "{told}");
    succeed(&["lab", "run", text(&experiment), "--out", text(&runs)]);
    let told = succeed(&arguments);
    assert!(told.contains("first written down when there were 6 runs already"), "{told}");
    let page = fs::read_to_string(runs.join("report.html")).unwrap();
    assert!(!page.contains("as written before the runs") && page.contains("No verdict"), "{page}");
}

/// One arm is run again on a text that has changed: what differs then need not come from the arms.
#[test]
fn arms_on_other_text_are_not_compared() {
    let dir = folder();
    let book = dir.path().join("book.toml");
    let experiment = dir.path().join("experiment.toml");
    let runs = dir.path().join("runs");
    whole(dir.path(), "runs");
    fs::write(&book, BOOK.replace("documents = 200", "documents = 190")).unwrap();
    fs::remove_dir_all(runs.join("kv_lora_rank-2")).unwrap();
    succeed(&["lab", "run", text(&experiment), "--out", text(&runs)]);
    let arguments = ["lab", "report", text(&experiment), "--runs", text(&runs), "--out", text(&runs), "--json"];
    let verdict = json(&arguments)["verdict"].to_string();
    assert!(verdict.contains("No verdict: runs were trained on different text: "), "{verdict}");
    assert!(verdict.contains("kv_lora_rank-2/seed-1, kv_lora_rank-2/seed-2 ("), "{verdict}");
    assert!(!verdict.contains("against mha:"), "{verdict}");
    // Back on the one text it is compared again. What another version of lowkey made is, too, and that is said.
    fs::write(&book, BOOK).unwrap();
    fs::remove_dir_all(runs.join("kv_lora_rank-2")).unwrap();
    succeed(&["lab", "run", text(&experiment), "--out", text(&runs)]);
    let environment = runs.join("mha/seed-1/environment.json");
    let mut made: serde_json::Value = serde_json::from_slice(&fs::read(&environment).unwrap()).unwrap();
    made["commit"] = "0000000".into();
    fs::write(&environment, made.to_string()).unwrap();
    let verdict = json(&arguments)["verdict"].to_string();
    assert!(verdict.contains("against mha:") && !verdict.contains("No verdict"), "{verdict}");
    assert!(verdict.contains("made by different versions") && verdict.contains("(0000000): 1"), "{verdict}");
    // An evaluation that holds no loss is none, and its run is not finished.
    for empty in ["", "{}", "[1]"] {
        fs::write(runs.join("mha/seed-2/evaluation.json"), empty).unwrap();
        let told = json(&arguments);
        assert_eq!((&told["finished"], &told["planned"]), (&5.into(), &6.into()), "{empty}");
    }
    succeed(&["lab", "run", text(&experiment), "--out", text(&runs)]);
    assert_eq!(json(&arguments)["finished"], 6);
}

#[test]
fn a_metric_that_no_run_has_is_refused_with_those_there_are() {
    let dir = folder();
    let experiment = dir.path().join("experiment.toml");
    let runs = dir.path().join("runs");
    whole(dir.path(), "runs");
    fs::write(&experiment, EXPERIMENT.replace("\"gap\"", "\"class.nobody.gap\"")).unwrap();
    let (code, _, message) = lowkey(&["lab", "report", text(&experiment), "--runs", text(&runs)]);
    assert_eq!(code, 2, "{message}");
    assert!(
        message.contains("metric = \"class.nobody.gap\": no run has it; there are bits_per_byte, class."),
        "{message}"
    );
}

/// A step of an elastic run costs one pass, and three once its narrower ranks have joined.
#[test]
fn an_elastic_arm_gets_the_steps_that_cost_as_much() {
    let dir = folder();
    let experiment = dir.path().join("experiment.toml");
    let run = RUN.replace("steps = 40", "steps = 100").replace("[eval]", "[lr_scheduler]\nwarmup_steps = 5\n\n[eval]");
    fs::write(dir.path().join("run.toml"), run).unwrap();
    let elastic = EXPERIMENT
        .replace(
            "by = \"parameters\"\nwith = \"model.intermediate_size\"",
            "by = \"training_flops\"\nwith = \"training.steps\"",
        )
        .replace("baseline = \"mha\"", "baseline = \"mla\"")
        .replace(
            "name = \"mha\"\nset = { \"model.attention\" = \"mha\" }",
            "name = \"mla\"\n\n[[arms]]\nname = \"elastic\"\nset = { \"model.elastic.ranks\" = [2, 4] }",
        );
    fs::write(&experiment, elastic).unwrap();
    let plan = json(&["lab", "run", text(&experiment), "--dry-run", "--json"]);
    let arms = plan["arms"].as_array().unwrap();
    assert_eq!((&arms[0]["steps"], &arms[1]["name"]), (&100.into(), &"elastic".into()));
    // 13 steps of one pass and 29 of three are the 100 passes of the others.
    assert_eq!((&arms[1]["steps"], &arms[1]["mismatch"]), (&42.into(), &0.0.into()), "{}", arms[1]);
    assert_eq!(arms[0]["training_flops"], arms[1]["training_flops"]);
}

#[test]
fn two_sweeps_of_the_same_runs_do_not_disturb_each_other() {
    let dir = folder();
    let experiment = dir.path().join("experiment.toml");
    let runs = dir.path().join("runs");
    let arguments = ["lab", "run", text(&experiment), "--out", text(&runs)];
    let mut first = Command::new(env!("CARGO_BIN_EXE_lowkey"))
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let started = Instant::now();
    while steps_logged(&runs) == 0 && first.try_wait().unwrap().is_none() {
        assert!(started.elapsed() < Duration::from_secs(60), "the sweep does not advance");
        sleep(Duration::from_millis(1));
    }
    let (code, _, message) = lowkey(&arguments);
    assert_eq!(code, 1, "{message}");
    assert!(message.contains("another process holds this") && message.contains("has changed nothing"), "{message}");
    assert!(first.wait().unwrap().success());
    assert_eq!(report(dir.path(), &runs), whole(dir.path(), "calm"));
    let hidden: Vec<_> = fs::read_dir(&runs).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(hidden.iter().all(|name| !name.to_string_lossy().starts_with('.')), "{hidden:?}");
}

#[test]
fn what_lowkey_did_not_make_is_not_replaced_by_a_study() {
    let dir = folder();
    let experiment = dir.path().join("experiment.toml");
    let runs = dir.path().join("runs");
    fs::create_dir_all(runs.join("mha")).unwrap();
    fs::write(runs.join("mha/notes.txt"), "mine").unwrap();
    let (code, _, message) = lowkey(&["lab", "run", text(&experiment), "--out", text(&runs)]);
    assert!(code == 1 && message.contains("mha: is there, and lowkey did not write it"), "{message}");
    assert_eq!(fs::read_dir(&runs).unwrap().count(), 1);
    fs::remove_dir_all(&runs).unwrap();
    fs::write(dir.path().join("results.csv"), "a,b\n1,2\n").unwrap();
    let (code, _, message) = lowkey(&["lab", "report", text(&experiment), "--runs", text(&runs)]);
    assert!(code == 1 && message.contains("results.csv: is no report of lowkey's"), "{message}");
    assert_eq!(fs::read_to_string(dir.path().join("results.csv")).unwrap(), "a,b\n1,2\n");
    assert!(!dir.path().join("table.md").exists());
}

#[test]
fn a_study_without_held_out_text_is_refused() {
    let dir = folder();
    fs::write(dir.path().join("text.txt"), "one two three four five six seven\n".repeat(400)).unwrap();
    let book =
        "name = \"text\"\n\n[source]\nkind = \"text\"\npaths = [\"text.txt\"]\n\n[split]\nvalidation_fraction = 0.0\n";
    fs::write(dir.path().join("book.toml"), book).unwrap();
    let experiment = dir.path().join("experiment.toml");
    fs::write(&experiment, EXPERIMENT.replace("\"gap\"", "\"val_loss\"").replace("quantised = true", "")).unwrap();
    let (code, _, message) = lowkey(&["lab", "run", text(&experiment), "--out", text(&dir.path().join("runs"))]);
    assert!(code != 0 && message.contains("validation_fraction"), "{message}");
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
