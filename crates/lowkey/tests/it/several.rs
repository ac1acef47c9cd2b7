//! A build without MPI that is started as one of several processes.

#![cfg(not(feature = "mpi"))]

use std::process::{Command, Output};

fn started(variables: &[(&str, &str)], arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lowkey"));
    command.args(arguments).envs(variables.iter().copied()).output().unwrap()
}

#[test]
fn processes_that_know_nothing_of_each_other_do_not_fight_for_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let train = ["train", "configs/quickstart.toml", "--out", out.to_str().unwrap()];
    let mpirun = |rank: &'static str| [("OMPI_COMM_WORLD_SIZE", "2"), ("OMPI_COMM_WORLD_RANK", rank)];
    let srun = |rank: &'static str| [("SLURM_STEP_ID", "0"), ("SLURM_STEP_NUM_TASKS", "2"), ("SLURM_PROCID", rank)];
    let mpiexec = |rank: &'static str| [("PMI_SIZE", "2"), ("PMI_RANK", rank)];
    for (by, variables, speaks) in [
        ("mpirun (Open MPI)", &mpirun("0")[..], true),
        ("mpirun (Open MPI)", &mpirun("1"), false),
        ("mpiexec", &mpiexec("0"), true),
        ("srun", &srun("0"), true),
        ("srun", &srun("1"), false),
    ] {
        for arguments in [&train[..], &["devices"]] {
            let output = started(variables, arguments);
            let said = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(2), "{by}, {arguments:?}: {said}");
            let expected = format!("error: {by} has started 2 processes, and this build has no MPI");
            // The first one speaks for all.
            assert!(if speaks { said.contains(&expected) } else { said.is_empty() }, "{by}, {arguments:?}: {said}");
            assert!(output.stdout.is_empty());
        }
    }
    assert!(!out.exists());
    let other = started(&mpirun("0"), &["plan", "configs/quickstart.toml"]);
    assert!(String::from_utf8(other.stderr).unwrap().contains("is the work of one; start it by itself"));
    // One process under mpirun is a process by itself.
    let alone = started(&[("OMPI_COMM_WORLD_SIZE", "1"), ("OMPI_COMM_WORLD_RANK", "0")], &["devices"]);
    assert!(alone.status.success());
    assert!(String::from_utf8(alone.stdout).unwrap().contains("MPI: not in this build"));
}
