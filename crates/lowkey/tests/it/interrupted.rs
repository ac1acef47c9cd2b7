//! Every call that changes the disk, stopped once: by SIGKILL before it is made, and by a disk that is full at that moment.
//!
//! A small library, put before the C library, counts the calls that write, sync, rename, remove or create anything below a
//! folder, and stops the k-th one. Whatever k is, afterwards what stood under a name is there whole, old or new; the same command
//! run again ends well; and nothing hidden is left. `LOWKEY_STOP_EVERY=1` takes every k; without it each command is stopped at
//! some twenty calls, spread evenly.

#![cfg(target_os = "linux")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use lowkey_model::{ModelDir, checksums::has_checksums};
use tempfile::TempDir;

/// Calls of each command that are stopped where not all of them are.
const SOME: usize = 20;
const THREADS: usize = 2;

const RUN: &str = r#"
[run]
name = "run"
seed = 3

[model]
attention = "mla"
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
kv_lora_rank = 8
qk_nope_head_dim = 6
qk_rope_head_dim = 4
v_head_dim = 5
intermediate_size = 20

[data]
path = "story.txt"
seq_len = 16

[optimizer]
lr = 1e-2

[training]
steps = 6
batch_size = 2
threads = 1

[eval]
every = 2
batches = 1

[checkpoint]
every = 2
keep = 1

[metrics]
tensorboard = true
"#;

const DATASET: &str = "name = \"story\"\n[source]\nkind = \"text\"\npaths = [\"story.txt\"]\n[split]\nby = \"tail\"\n";

const EXPERIMENT: &str = r#"
name = "tiny"
question = "Does it run?"
base = "run.toml"
seeds = [1]
metric = "val_loss"
baseline = "r8"
x = "model.kv_lora_rank"

[rule]
kind = "margin"
margin = 0.01

[[arms]]
name = "r8"
set = { "model.kv_lora_rank" = 8 }

[[arms]]
name = "r4"
set = { "model.kv_lora_rank" = 4 }
"#;

/// A command with the state of the disk that it starts from.
struct Case {
    name: &'static str,
    /// Run before, undisturbed.
    before: &'static [&'static [&'static str]],
    /// The command that is stopped.
    stopped: &'static [&'static str],
    /// The same command again; a run goes on only when it is told to.
    again: &'static [&'static str],
    /// What must be whole at any moment, old or new.
    whole: &'static [&'static str],
    /// Files whose content differs from one undisturbed run to the next, because they tell the time.
    timed: &'static [&'static str],
}

const TRAIN: &[&str] = &["train", "run.toml", "--out", "run"];
const RESUME: &[&str] = &["train", "run.toml", "--out", "run", "--resume"];
const BEST: &str = "run/checkpoints/best";
const TIMED: &[&str] = &[
    "metrics.jsonl",
    "environment.json",
    "trainer.json",
    "checksums.json",
    "evaluation.json",
    "tfevents",
    "results.csv",
];

const CASES: &[Case] = &[
    Case { name: "train", before: &[], stopped: TRAIN, again: RESUME, whole: &[], timed: TIMED },
    Case {
        name: "train --resume",
        before: &[&["train", "run.toml", "--out", "run", "--set", "training.steps=4"]],
        stopped: RESUME,
        again: RESUME,
        whole: &[],
        timed: TIMED,
    },
    Case {
        name: "train --overwrite",
        before: &[TRAIN],
        stopped: &["train", "run.toml", "--out", "run", "--overwrite"],
        again: &["train", "run.toml", "--out", "run", "--overwrite"],
        whole: &[],
        timed: TIMED,
    },
    Case {
        name: "data prepare",
        before: &[],
        stopped: &["data", "prepare", "data.toml", "--out", "tokens"],
        again: &["data", "prepare", "data.toml", "--out", "tokens"],
        whole: &["tokens"],
        timed: &[],
    },
    Case {
        name: "data prepare, anew",
        before: &[&["data", "prepare", "other.toml", "--out", "tokens"]],
        stopped: &["data", "prepare", "data.toml", "--out", "tokens"],
        again: &["data", "prepare", "data.toml", "--out", "tokens"],
        whole: &["tokens"],
        timed: &[],
    },
    Case {
        name: "export",
        before: &[TRAIN],
        stopped: &["export", BEST, "--to", "hf", "--out", "out", "--overwrite"],
        again: &["export", BEST, "--to", "hf", "--out", "out", "--overwrite"],
        whole: &["out"],
        timed: TIMED,
    },
    Case {
        name: "export --overwrite",
        before: &[TRAIN, &["export", BEST, "--to", "gguf", "--out", "out"]],
        stopped: &["export", BEST, "--to", "hf", "--out", "out", "--overwrite"],
        again: &["export", BEST, "--to", "hf", "--out", "out", "--overwrite"],
        whole: &["out"],
        timed: TIMED,
    },
    Case {
        name: "convert",
        before: &[TRAIN],
        stopped: &["convert", BEST, "--kv-rank-budget", "50%", "--tokens", "64", "--out", "out", "--overwrite"],
        again: &["convert", BEST, "--kv-rank-budget", "50%", "--tokens", "64", "--out", "out", "--overwrite"],
        whole: &["out"],
        timed: TIMED,
    },
    Case {
        name: "convert --overwrite",
        before: &[TRAIN, &["convert", BEST, "--kv-rank", "2", "--out", "out"]],
        stopped: &["convert", BEST, "--kv-rank", "4", "--out", "out", "--overwrite"],
        again: &["convert", BEST, "--kv-rank", "4", "--out", "out", "--overwrite"],
        whole: &["out"],
        timed: TIMED,
    },
    Case {
        name: "lab run",
        before: &[],
        stopped: &["lab", "run", "study/experiment.toml"],
        again: &["lab", "run", "study/experiment.toml"],
        whole: &[],
        timed: TIMED,
    },
];

/// The library that stops calls, compiled once.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<TempDir> = OnceLock::new();
    let dir = LIBRARY.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/interrupted/stop.c");
        let built = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .arg(dir.path().join("stop.so"))
            .arg(source)
            .arg("-ldl")
            .output()
            .unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        dir
    });
    dir.path()
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    Kill,
    Full,
}

/// Runs the program in a folder, stopped at the k-th call; `None`: not at all. Returns how it ended.
fn run(dir: &Path, arguments: &[&str], stop: Option<(usize, How)>) -> (Output, usize) {
    let count = tempfile::NamedTempFile::new().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_lowkey"));
    command.args(arguments).current_dir(dir).stdin(Stdio::null());
    command.env("LD_PRELOAD", library().join("stop.so")).env("STOP_BELOW", dir).env("STOP_COUNT", count.path());
    if let Some((at, how)) = stop {
        command.env("STOP_AT", at.to_string()).env("STOP_HOW", if how == How::Kill { "kill" } else { "full" });
    }
    let output = command.output().unwrap();
    let calls = std::fs::read_to_string(count.path()).unwrap().parse().unwrap_or_default();
    (output, calls)
}

fn succeed(dir: &Path, arguments: &[&str], when: &str) -> usize {
    let (output, calls) = run(dir, arguments, None);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{when}: {arguments:?} ended with {}\n{said}", output.status);
    calls
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let (from, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        let found = from.symlink_metadata().unwrap();
        if found.is_symlink() {
            std::os::unix::fs::symlink(std::fs::read_link(&from).unwrap(), to).unwrap();
        } else if found.is_dir() {
            copy(&from, &to);
        } else {
            std::fs::copy(&from, &to).unwrap();
        }
    }
}

/// All files below a folder with their content; links with their target. `None` where there is no such folder.
fn tree(dir: &Path) -> Option<BTreeMap<PathBuf, Vec<u8>>> {
    fn walk(dir: &Path, below: &Path, found: &mut BTreeMap<PathBuf, Vec<u8>>) {
        for entry in std::fs::read_dir(dir.join(below)).unwrap() {
            let name = below.join(entry.unwrap().file_name());
            let path = dir.join(&name);
            let kind = path.symlink_metadata().unwrap();
            if kind.is_symlink() {
                found.insert(name, std::fs::read_link(path).unwrap().into_os_string().into_encoded_bytes());
            } else if kind.is_dir() {
                walk(dir, &name, found);
            } else {
                found.insert(name, std::fs::read(path).unwrap());
            }
        }
    }
    dir.symlink_metadata().ok()?;
    let mut found = BTreeMap::new();
    walk(dir, Path::new(""), &mut found);
    Some(found)
}

/// A tree with the content of files that tell the time left out, and whatever holds their hashes.
fn without_times(tree: Option<BTreeMap<PathBuf, Vec<u8>>>, timed: &[&str]) -> Option<BTreeMap<PathBuf, Vec<u8>>> {
    let timed = |path: &Path| {
        let name = path.to_string_lossy();
        // An export's card and certificate, and every mark, hold hashes or figures of such files.
        let follows = ["README.md", "CERTIFICATE.md", "certificate.json", "lowkey.json", ".html", ".md"];
        !timed.is_empty() && timed.iter().chain(&follows).any(|end| name.contains(end))
    };
    let keep = |(path, content): (PathBuf, Vec<u8>)| {
        let content = if timed(&path) { Vec::new() } else { content };
        // The events' file is named after the time and the process.
        let path = if path.to_string_lossy().contains("tfevents") { PathBuf::from("tfevents") } else { path };
        (path, content)
    };
    tree.map(|tree| tree.into_iter().map(keep).collect())
}

/// Each checkpoint that can be seen is whole.
fn check_checkpoints(dir: &Path, when: &str) {
    for path in tree(dir).unwrap_or_default().keys() {
        let mut parts = path.components().map(|part| part.as_os_str().to_string_lossy());
        let hidden = parts.any(|part| part.starts_with('.'));
        if hidden || path.file_name().is_none_or(|name| name != "config.json") {
            continue;
        }
        let model = dir.join(path.parent().unwrap());
        if model.parent().unwrap().ends_with("checkpoints") {
            assert!(has_checksums(&model), "{when}: {} has no checksums", model.display());
            ModelDir::open(&model).unwrap_or_else(|e| panic!("{when}: {e}"));
        }
    }
}

/// Stops one command at many calls; returns how many it makes and how many were stopped.
fn stop(case: &Case) -> (usize, usize) {
    let template = tempfile::tempdir().unwrap();
    let root = template.path().canonicalize().unwrap();
    let story: String =
        (0..60).map(|i| format!("The cat number {i} sat on the mat and saw {} mice.\n", i * 7)).collect();
    std::fs::write(root.join("story.txt"), &story).unwrap();
    std::fs::write(root.join("other.txt"), story.replace("cat", "dog")).unwrap();
    std::fs::write(root.join("run.toml"), RUN).unwrap();
    std::fs::write(root.join("data.toml"), DATASET).unwrap();
    std::fs::write(root.join("other.toml"), DATASET.replace("story.txt", "other.txt")).unwrap();
    std::fs::create_dir(root.join("study")).unwrap();
    std::fs::write(root.join("study/experiment.toml"), EXPERIMENT).unwrap();
    std::fs::write(root.join("study/run.toml"), RUN.replace("story.txt", "../story.txt")).unwrap();
    for arguments in case.before {
        succeed(&root, arguments, case.name);
    }
    // An old model directory must be one that --overwrite may replace; where there is none, the option does nothing.
    let start = || {
        let dir = tempfile::tempdir().unwrap();
        copy(&root, dir.path());
        dir
    };
    let undisturbed = start();
    let dir = undisturbed.path().canonicalize().unwrap();
    let calls = succeed(&dir, case.stopped, case.name);
    assert!(calls > 5, "{}: only {calls} calls were seen", case.name);
    let expected = without_times(tree(&dir), case.timed);
    let olds: Vec<_> = case.whole.iter().map(|name| without_times(tree(&root.join(name)), case.timed)).collect();
    let news: Vec<_> = case.whole.iter().map(|name| without_times(tree(&dir.join(name)), case.timed)).collect();

    let every = std::env::var_os("LOWKEY_STOP_EVERY").is_some();
    let stride = if every { 1 } else { calls.div_ceil(SOME) };
    let points: Vec<(usize, How)> =
        (1..=calls).step_by(stride).flat_map(|at| [(at, How::Kill), (at, How::Full)]).collect();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while let Some(&(at, how)) = points.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let when = format!("{}, stopped at call {at} of {calls} ({how:?})", case.name);
                    let dir = start();
                    let dir = dir.path().canonicalize().unwrap();
                    let (output, _) = run(&dir, case.stopped, Some((at, how)));
                    let said = String::from_utf8_lossy(&output.stderr);
                    assert!(!said.contains("internal error"), "{when}: {said}");
                    for ((name, old), new) in case.whole.iter().zip(&olds).zip(&news) {
                        let found = without_times(tree(&dir.join(name)), case.timed);
                        assert!(
                            found == *old || found == *new,
                            "{when}: {name} is neither the old one nor the new one"
                        );
                    }
                    check_checkpoints(&dir, &when);
                    if output.status.success() {
                        // What was stopped did not matter; then all is done.
                        let found = without_times(tree(&dir), case.timed).unwrap_or_default();
                        // A run stands without its page.
                        let mut needed = expected.iter().flatten().filter(|(path, _)| !path.ends_with("report.html"));
                        let missing = needed.find(|(path, content)| found.get(*path) != Some(content));
                        assert!(
                            missing.is_none(),
                            "{when}: exit 0, and {:?} is not as it should be",
                            missing.map(|m| m.0)
                        );
                    }
                    succeed(&dir, case.again, &when);
                    let found = without_times(tree(&dir), case.timed);
                    let (found, expected) = (found.unwrap_or_default(), expected.as_ref().unwrap());
                    let (names, wanted): (Vec<_>, Vec<_>) = (found.keys().collect(), expected.keys().collect());
                    assert_eq!(names, wanted, "{when}");
                    let other = found.iter().find(|(path, content)| expected[*path] != **content);
                    assert!(other.is_none(), "{when}: {:?} differs from an undisturbed run", other.map(|o| o.0));
                }
            });
        }
    });
    (calls, points.len())
}

macro_rules! cases {
    ($($test:ident: $name:literal,)*) => {
        $(
            #[test]
            fn $test() {
                let case = CASES.iter().find(|case| case.name == $name).unwrap();
                let (calls, stopped) = stop(case);
                println!("{}: {calls} calls, {stopped} stops", case.name);
            }
        )*

        #[test]
        fn every_case_is_a_test() {
            let tested = [$($name),*];
            let cases: Vec<&str> = CASES.iter().map(|case| case.name).collect();
            assert_eq!(cases, tested);
        }
    };
}

cases! {
    a_run: "train",
    a_run_that_goes_on: "train --resume",
    a_run_that_is_replaced: "train --overwrite",
    a_preparation: "data prepare",
    a_preparation_of_another_text: "data prepare, anew",
    an_export: "export",
    an_export_that_is_replaced: "export --overwrite",
    a_conversion: "convert",
    a_conversion_that_is_replaced: "convert --overwrite",
    a_study: "lab run",
}
