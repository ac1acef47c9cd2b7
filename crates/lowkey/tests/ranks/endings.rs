//! How a job ends before its time: by a signal, by an error, by a rank that dies or hangs.

use std::time::{Duration, Instant};

use super::job::Bench;

/// A run of more steps than any test waits for.
const LONG: &[&str] =
    &["--set", "training.steps=100000", "--set", "lr_scheduler.kind=constant", "--set", "checkpoint.every=0"];

/// Seconds within which a job is over once a rank is gone.
const SOON: Duration = Duration::from_secs(10);

#[test]
fn a_signal_to_any_rank_ends_all_with_one_checkpoint() {
    for (rank, signal) in [(2, "-USR1"), (0, "-USR1"), (1, "-TERM"), (0, "-INT")] {
        let bench = Bench::new();
        let job = bench.start(3, "out", LONG);
        job.until(&bench, "out", 7);
        job.signal(rank, signal);
        let printed = job.wait().succeeds();
        let steps = bench.figures("out").len();
        assert!(printed.contains(&format!("stopped after step {steps}")), "{signal} to {rank}: {printed}");
        let checkpoint = bench.path("out").join(format!("checkpoints/step-{steps:06}"));
        lowkey_train::checkpoint::verify(&checkpoint).unwrap();
        let saved = bench.names("out").iter().filter(|name| name.starts_with("step-")).count();
        // That of the lowest held-out loss may be another one.
        assert!(saved <= 3, "{:?}", bench.names("out"));
    }
}

#[test]
fn a_run_that_was_stopped_goes_on_to_the_same_bits() {
    let bench = Bench::new();
    bench.train(2, "unbroken", &[]).succeeds();
    let job = bench.start(2, "broken", &[]);
    job.until(&bench, "broken", 5);
    job.signal(1, "-USR1");
    job.wait().succeeds();
    bench.train(2, "broken", &["--resume"]).succeeds();
    // An evaluation is written at its step, which the samples of both name.
    bench.assert_same("unbroken", "broken", 12);
}

#[test]
fn a_rank_that_is_killed_ends_the_job_and_the_run_goes_on_to_the_same_bits() {
    let bench = Bench::new();
    let long: &[&str] = &["--set", "training.steps=300", "--set", "checkpoint.every=20", "--set", "eval.every=0"];
    bench.train(3, "unbroken", long).succeeds();
    for (i, rank) in [1, 0, 2].into_iter().enumerate() {
        let out = format!("killed-{rank}");
        let job = bench.start(3, &out, long);
        job.until(&bench, &out, 30 + 31 * i);
        job.signal(rank, "-KILL");
        let killed = Instant::now();
        job.wait().after_a_loss();
        assert!(killed.elapsed() < SOON, "{:?} after rank {rank} was killed", killed.elapsed());
        bench.train(3, &out, &[long, &["--resume"]].concat()).succeeds();
        bench.assert_same("unbroken", &out, 300);
    }
}

#[test]
fn a_rank_that_hangs_is_named() {
    for (stopped, ranks) in [(1, 3), (0, 2)] {
        let bench = Bench::new();
        let job = bench.start(ranks, "out", &[LONG, &["--set", "ranks.patience_s=3"]].concat());
        job.until(&bench, "out", 5);
        job.signal(stopped, "-STOP");
        let printed = job.wait().fails();
        let expected = format!("rank {stopped} of {ranks} (on ");
        assert!(printed.contains(&expected) && printed.contains("has not answered within 3 s"), "{printed}");
    }
}

#[test]
fn an_error_of_all_is_said_once() {
    let bench = Bench::new();
    let printed =
        bench.train(3, "out", &["--set", "optimizer.lr=1e30", "--set", "optimizer.weight_decay=1e30"]).fails();
    assert!(printed.contains("is not finite") && !printed.contains("rank "), "{printed}");
    // The run knows how it ended.
    let outcome = std::fs::read_to_string(bench.path("out/outcome.json")).unwrap();
    assert!(outcome.contains("\"failed\"") && outcome.contains("is not finite"), "{outcome}");
}

#[test]
fn an_error_of_the_rank_that_writes_ends_all() {
    let bench = Bench::new();
    // Where the next checkpoint belongs lies something else.
    let job = bench.start(2, "out", &["--set", "training.steps=2000"]);
    job.until(&bench, "out", 2);
    // A checkpoint of the running job may make the folder again between the two.
    let (place, aside) = (bench.path("out/checkpoints"), bench.path("aside"));
    std::fs::create_dir(&aside).unwrap();
    let replaced = (0..1000).any(|attempt| {
        std::fs::rename(&place, aside.join(attempt.to_string())).unwrap();
        std::fs::write(&place, "a file").is_ok()
    });
    assert!(replaced);
    let printed = job.wait().fails();
    assert!(printed.contains("out/checkpoints"), "{printed}");
}
