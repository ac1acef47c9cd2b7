//! The scripts of `configs/cluster`, as far as one machine can start them.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use super::job::{Bench, Job, Starter};

fn recipe(name: &str) -> String {
    format!("{}/../../configs/cluster/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// A program of this name in a folder that comes first in the `PATH`.
fn program(bench: &Bench, name: &str, text: &str) {
    let path = bench.path("bin").join(name);
    std::fs::create_dir_all(bench.path("bin")).unwrap();
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

fn command(bench: &Bench, script: &str, arguments: &[&str]) -> Command {
    let path = std::env::var("PATH").unwrap();
    let mut command = Command::new("bash");
    command.arg(recipe(script)).args(arguments).current_dir(bench.path(""));
    command.env("PATH", format!("{}:{path}", bench.path("bin").display()));
    let starter = Starter::of_this_build();
    command.env("LOWKEY", env!("CARGO_BIN_EXE_lowkey")).env("MPIRUN", starter.program);
    command.envs(starter.environment.iter().copied());
    command
}

#[test]
fn a_job_of_slurm_that_is_out_of_time_is_queued_again_and_goes_on() {
    let bench = Bench::new();
    let starter = Starter::of_this_build().program;
    // What srun does with its own arguments is for a cluster to show: they come before the first word that is none.
    let rest = "while [ \"${1#-}\" != \"$1\" ]; do shift; done";
    program(&bench, "srun", &format!("{rest}\nexec {starter} -n 2 \"$@\""));
    program(&bench, "scontrol", "echo \"$@\" >> scontrol.log");
    let job = |restarts: &str| {
        let mut command = command(&bench, "slurm.sh", &["run.toml"]);
        command.env("SLURM_CPUS_PER_TASK", "1").env("SLURM_JOB_ID", "77").env("SLURM_RESTART_COUNT", restarts);
        Job::start(command, &bench.path(""))
    };
    let out = "runs/ranks";
    let first = job("0");
    first.until(&bench, out, 5);
    first.signal(1, "-USR1");
    first.wait().succeeds();
    assert_eq!(std::fs::read_to_string(bench.path("scontrol.log")).unwrap(), "requeue 77\n");
    job("1").wait().succeeds();
    // All steps are taken: it is not queued a third time.
    assert_eq!(std::fs::read_to_string(bench.path("scontrol.log")).unwrap(), "requeue 77\n");
    bench.train(2, "unbroken", &[]).succeeds();
    bench.assert_same("unbroken", out, 12);
}

#[test]
fn two_laptops_are_two_ranks() {
    let bench = Bench::new();
    // Both on this machine.
    let arguments = ["localhost", "localhost", "lo", "run.toml", "--out", "two"];
    Job::start(command(&bench, "two-laptops.sh", &arguments), &bench.path("")).wait().succeeds();
    bench.train(2, "ranks", &[]).succeeds();
    bench.assert_same("ranks", "two", 12);
}
