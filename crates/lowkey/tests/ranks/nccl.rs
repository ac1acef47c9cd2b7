//! Ranks that meet through NCCL, started as `torchrun` does: meetings, sums in order and how jobs end, on what stands in for NCCL and for
//! GPUs (`stand_in.c`). The models of these runs lie on the CPU; that numbers travel from a GPU's own memory is looked at where there are
//! several GPUs (`experiments/gpu/ranks.sh`).

use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::bits::same_bits_by;
use super::job::{Bench, Job};

/// Starts ranks as `torchrun` does: each finds the others by its environment, and once one has failed, all are ended.
const STARTER: &str = r#"
import os, subprocess, sys, time
count, *command = sys.argv[1:]
variables = lambda rank: {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count}
ranks = [subprocess.Popen(command, env=variables(rank)) for rank in range(int(count))]
while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
    time.sleep(0.01)
failed = [rank.returncode for rank in ranks if rank.poll()]
if failed:
    # The others see it themselves; one that hangs does not.
    until = time.monotonic() + 3
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < until:
        time.sleep(0.01)
    [rank.kill() for rank in ranks]
sys.exit(1 if failed else 0)
"#;

/// A folder with the libraries that stand in for NVIDIA's.
fn libraries() -> &'static PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("stand-in-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/ranks/stand_in.c");
        let driver = dir.join("libcuda.so");
        let mut compiler = Command::new("cc");
        compiler.args(["-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-pthread", source, "-o"]).arg(&driver);
        assert!(compiler.status().unwrap().success(), "{compiler:?}");
        // One file of two names is one library, as both know of what has begun.
        symlink(&driver, dir.join("libnccl.so")).unwrap();
        dir
    })
}

/// `lowkey` with these arguments on so many ranks.
fn start(bench: &Bench, ranks: usize, arguments: &[&str]) -> Job {
    static JOBS: AtomicUsize = AtomicUsize::new(0);
    let messages = bench.path(&format!("messages-{}", JOBS.fetch_add(1, Ordering::Relaxed)));
    std::fs::create_dir(&messages).unwrap();
    let mut command = Command::new("python3");
    command.args(["-c", STARTER, &ranks.to_string(), env!("CARGO_BIN_EXE_lowkey")]).args(arguments);
    command.current_dir(bench.path("")).env("LD_LIBRARY_PATH", libraries()).env("STAND_IN", messages);
    command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", "29500");
    Job::start(command, &bench.path(""))
}

fn train(bench: &Bench, ranks: usize, out: &str, arguments: &[&str]) -> Job {
    start(bench, ranks, &[&["train", "run.toml", "--out", out], arguments].concat())
}

fn same_bits(bench: &Bench, arguments: &[&str], ranks: &[usize]) {
    same_bits_by(bench, arguments, ranks, |ranks, out, arguments| {
        let printed = train(bench, ranks, out, arguments).wait().succeeds();
        assert!(printed.contains("by NCCL, through the hosts, in the order of the ranks"), "{printed}");
        printed
    });
}

#[test]
fn they_give_the_bits_of_one_process() {
    same_bits(&Bench::new(), &[], &[2, 3, 4]);
}

#[test]
fn so_do_those_that_divide_the_optimiser() {
    let more = ["optimizer.kind=muon", "ranks.zero=1", "training.ema_decay=0.9"];
    same_bits(&Bench::new(), &more.map(|set| ["--set", set]).concat(), &[2, 3]);
}

#[test]
fn a_sum_in_nccls_own_order_is_the_same_but_for_rounding() {
    let bench = Bench::new();
    bench.train(1, "one", &[]).succeeds();
    let printed = train(&bench, 3, "fastest", &["--set", "ranks.sum=fastest"]).wait().succeeds();
    assert!(printed.contains("by NCCL, through the hosts, in its own order"), "{printed}");
    let (one, fastest) = (bench.losses("one"), bench.losses("fastest"));
    assert_eq!((one.len(), fastest.len()), (12, 12));
    for (a, b) in one.iter().zip(&fastest) {
        assert!((a / b - 1.0).abs() < 1e-5, "{one:?}\n{fastest:?}");
    }
    assert_ne!(bench.result("one", 12), bench.result("fastest", 12));
}

#[test]
fn a_text_is_shared_among_them() {
    let bench = Bench::new();
    bench.train(1, "base", &["--set", "training.steps=4"]).succeeds();
    let arguments = ["eval", "base/checkpoints/step-000004", "--data", "text.txt", "--device", "cpu"];
    let by_itself = Job::start(bench.command(1, &arguments), &bench.path("")).wait().succeeds();
    assert_eq!(start(&bench, 3, &arguments).wait().succeeds(), by_itself);
}

#[test]
fn a_signal_ends_all_with_one_checkpoint_and_they_go_on() {
    let bench = Bench::new();
    train(&bench, 2, "unbroken", &[]).wait().succeeds();
    let job = train(&bench, 2, "broken", &[]);
    job.until(&bench, "broken", 5);
    job.signal(1, "-USR1");
    job.wait().succeeds();
    train(&bench, 3, "broken", &["--resume", "--set", "training.batch_size=24"]).wait().succeeds();
    assert_eq!(bench.losses("broken").len(), 12);
    for (a, b) in bench.losses("unbroken").iter().zip(&bench.losses("broken")) {
        assert!((a / b - 1.0).abs() < 1e-5);
    }
}

#[test]
fn one_that_is_killed_or_hangs_ends_the_job() {
    let endless: &[&str] = &["--set", "training.steps=100000", "--set", "lr_scheduler.kind=constant"];
    for (signal, patience, said) in [
        ("-KILL", "ranks.patience_s=100", "another rank has ended"),
        ("-STOP", "ranks.patience_s=3", "was not over within 3 s"),
    ] {
        for lost in [1, 0] {
            let bench = Bench::new();
            let job = train(&bench, 2, "out", &[endless, &["--set", patience]].concat());
            job.until(&bench, "out", 5);
            job.signal(lost, signal);
            let begun = Instant::now();
            let printed = job.wait().after_a_loss();
            assert!(printed.contains(said) || (signal, lost) == ("-KILL", 0), "{printed}");
            assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        }
    }
}

#[test]
fn an_error_of_all_is_said_once() {
    let bench = Bench::new();
    let printed = train(&bench, 3, "out", &["--set", "optimizer.lr=1e30", "--set", "optimizer.weight_decay=1e30"]);
    assert!(printed.wait().fails().contains("loss is not finite"));
    let refused = train(&bench, 3, "odd", &["--set", "training.batch_size=25"]).wait().fails();
    assert!(refused.contains("must be a multiple of 3"), "{refused}");
}

#[test]
fn what_cannot_meet_is_refused() {
    let bench = Bench::new();
    let mut command = Command::new("python3");
    command.args(["-c", STARTER, "2", env!("CARGO_BIN_EXE_lowkey"), "train", "run.toml"]);
    command.current_dir(bench.path("")).env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", "29500");
    let printed = Job::start(command, &bench.path("")).wait().fails();
    assert!(printed.contains("libcuda was not found") || printed.contains("NCCL was not found"), "{printed}");
    // Under mpirun, whose ranks compute on the CPU.
    let mut command = bench.command(2, &["train", "run.toml", "--set", "ranks.transport=nccl"]);
    command.env("LD_LIBRARY_PATH", libraries());
    let printed = Job::start(command, &bench.path("")).wait().fails();
    assert!(printed.contains("NCCL moves the gradients of NVIDIA's GPUs alone"), "{printed}");
}
