//! What is refused before the first step, by name and once.

use std::process::Command;

use super::job::{Bench, Ended, Job};

const LOWKEY: &str = env!("CARGO_BIN_EXE_lowkey");

/// Two programs as ranks 0 and 1.
fn unlike(bench: &Bench, first: &[&str], second: &[&str]) -> Ended {
    Job::start(bench.mpirun(&[&["-n", "1"], first, &[":", "-n", "1"], second].concat()), &bench.path("")).wait()
}

const TRAIN: [&str; 5] = [LOWKEY, "train", "run.toml", "--out", "out"];

#[test]
fn a_world_that_does_not_divide_the_batch() {
    let printed = Bench::new().train(5, "out", &[]).fails();
    assert!(printed.contains("training.batch_size = 24: must be a multiple of 5, the number of ranks"), "{printed}");
}

#[test]
fn several_devices_on_each_rank() {
    let printed = Bench::new().train(2, "out", &["--set", "run.devices=[\"cpu\", \"cpu\"]"]).fails();
    assert!(printed.contains("run.devices = cpu: each of 2 ranks has one device"), "{printed}");
}

#[test]
fn a_key_that_is_wrong_is_said_once() {
    let printed = Bench::new().train(3, "out", &["--set", "optimizer.lr=-1"]).fails();
    assert!(printed.contains("run.toml: optimizer.lr = -1"), "{printed}");
}

#[test]
fn run_files_that_differ() {
    let bench = Bench::new();
    let printed = unlike(&bench, &TRAIN, &[&TRAIN[..], &["--set", "optimizer.lr=0.5"]].concat()).fails();
    assert!(printed.contains("rank 1 of 2 (on "), "{printed}");
    assert!(
        printed.contains("has another run file than rank 0: optimizer.lr = 0.5 there, 0.01 on rank 0"),
        "{printed}"
    );
    assert!(!bench.path("out").exists());
}

#[test]
fn programs_that_differ() {
    let bench = Bench::new();
    let other = bench.path("other-lowkey");
    std::fs::copy(LOWKEY, &other).unwrap();
    // What lies behind a program's end is not run.
    let appended = Command::new("sh").args(["-c", "echo more >> \"$0\""]).arg(&other).status().unwrap();
    assert!(appended.success());
    let printed = unlike(&bench, &TRAIN, &[&[other.to_str().unwrap()], &TRAIN[1..]].concat()).fails();
    assert!(printed.contains("rank 1 of 2 (on ") && printed.contains("is another build than rank 0"), "{printed}");
}

#[test]
fn folders_that_differ() {
    let bench = Bench::new();
    let printed = unlike(&bench, &TRAIN, &[LOWKEY, "train", "run.toml", "--out", "elsewhere"]).fails();
    assert!(
        printed.contains("rank 1 of 2") && printed.contains("elsewhere: is not the folder that rank 0 sees"),
        "{printed}"
    );
}

#[test]
fn data_that_differ() {
    let bench = Bench::new();
    // The same run file in another folder, with another text beside it.
    let other = bench.path("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::copy(bench.path("run.toml"), other.join("run.toml")).unwrap();
    let text = std::fs::read_to_string(bench.path("text.txt")).unwrap();
    std::fs::write(other.join("text.txt"), text.replace("cat", "cow")).unwrap();
    let (out, other) = (bench.path("out"), other.to_str().unwrap());
    let train = [LOWKEY, "train", "run.toml", "--out", out.to_str().unwrap()];
    let printed = unlike(&bench, &train, &[&["-wdir", other][..], &train].concat()).fails();
    assert!(printed.contains("rank 1 of 2 has other tokens of "), "{printed}");
}

#[test]
fn a_text_that_one_rank_does_not_have() {
    let bench = Bench::new();
    let other = bench.path("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::copy(bench.path("run.toml"), other.join("run.toml")).unwrap();
    let (out, other) = (bench.path("out"), other.to_str().unwrap());
    let train = [LOWKEY, "train", "run.toml", "--out", out.to_str().unwrap()];
    let printed = unlike(&bench, &train, &[&["-wdir", other][..], &train].concat()).fails();
    assert!(printed.contains("rank 1 of 2 (on ") && printed.contains("text.txt"), "{printed}");
}

#[test]
fn a_run_that_is_already_there() {
    let bench = Bench::new();
    let arguments = ["--set", "training.steps=2"];
    bench.train(2, "out", &arguments).succeeds();
    let printed = bench.train(2, "out", &arguments).fails();
    assert!(printed.contains("this run is already here"), "{printed}");
    bench.train(2, "out", &[&arguments[..], &["--overwrite"]].concat()).succeeds();
}

#[test]
fn commands_that_are_the_work_of_one_process() {
    let bench = Bench::new();
    for arguments in [&["plan", "run.toml"][..], &["lab", "report", "nowhere.toml"]] {
        let printed = Job::start(bench.command(2, arguments), &bench.path("")).wait().fails();
        assert!(printed.contains("has started 2 processes, and this command is the work of one"), "{printed}");
    }
}

#[test]
fn devices_are_shown_once() {
    let bench = Bench::new();
    let printed = Job::start(bench.command(2, &["devices"]), &bench.path("")).wait().succeeds();
    assert!(printed.matches("MPI: ").count() == 1 && printed.contains("; 2 ranks"), "{printed}");
}
