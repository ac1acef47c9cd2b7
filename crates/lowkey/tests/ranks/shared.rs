//! Commands beside training that ranks share.

use super::job::{Bench, Ended, Job};

const MODEL: &str = "base/checkpoints/step-000004";

fn run(bench: &Bench, ranks: usize, arguments: &[&str]) -> Ended {
    Job::start(bench.command(ranks, arguments), &bench.path("")).wait()
}

/// A text shared among ranks has the figures of one process, to the last bit, and they are printed once.
#[test]
fn an_evaluation() {
    let bench = Bench::beside_a_model("", "path = \"text.txt\"\nseq_len = 24\n");
    let eval = ["eval", MODEL, "--data", "lines.toml", "--batch-size", "3", "--json"];
    let alone = run(&bench, 1, &eval).succeeds();
    assert!(alone.contains("\"loss\": "), "{alone}");
    for ranks in [2, 3] {
        assert_eq!(run(&bench, ranks, &eval).succeeds(), alone, "{ranks} ranks");
    }
}

#[test]
fn an_evaluation_that_cannot_be() {
    let bench = Bench::beside_a_model("", "path = \"text.txt\"\nseq_len = 24\n");
    let printed = run(&bench, 3, &["eval", "nowhere", "--data", "lines.toml"]).fails();
    assert!(printed.contains("nowhere"), "{printed}");
    let program = env!("CARGO_BIN_EXE_lowkey");
    let eval = ["-n", "1", program, "eval", MODEL, "--data", "lines.toml"];
    let other = [&eval[..], &["--batch-size", "4"]].concat();
    let printed = Job::start(bench.mpirun(&[&eval[..], &[":"], &other].concat()), &bench.path("")).wait().fails();
    assert!(printed.contains("rank 1 of 2 (on ") && printed.contains("has another command than rank 0"), "{printed}");
}

/// Each rank trains its runs, as one process trains them all.
#[test]
fn the_runs_of_a_study() {
    let bench = Bench::new();
    let study = "name = \"study\"\nquestion = \"Which rank?\"\nbase = \"run.toml\"\nseeds = [1, 2]\nbaseline = \"kv_lora_rank-8\"\n\
                 [rule]\nkind = \"margin\"\nmargin = 0.02\n[[axes]]\nkey = \"model.kv_lora_rank\"\nvalues = [4, 8]\n";
    bench.write("study.toml", study);
    let lab = |out| ["lab", "run", "study.toml", "--jobs", "1", "--out", out];
    run(&bench, 1, &lab("alone")).succeeds();
    // Three ranks for four runs.
    let printed = run(&bench, 3, &lab("shared")).succeeds();
    assert!(printed.contains("2 of 2 runs are finished"), "{printed}");
    for arm in ["kv_lora_rank-4", "kv_lora_rank-8"] {
        for seed in ["seed-1", "seed-2"] {
            let [alone, shared] = ["alone", "shared"].map(|out| bench.result(&format!("{out}/{arm}/{seed}"), 12));
            assert!(alone == shared && !alone.is_empty(), "{arm} {seed}");
        }
    }
    let again = run(&bench, 2, &lab("shared")).succeeds();
    assert!(again.contains("2 of 2 runs are finished"), "{again}");
    run(&bench, 1, &["lab", "report", "study.toml", "--out", "shared"]).succeeds();
}

#[test]
fn a_study_that_cannot_be() {
    let bench = Bench::new();
    let printed = run(&bench, 2, &["lab", "run", "nowhere.toml"]).fails();
    assert!(printed.contains("nowhere.toml"), "{printed}");
    bench.write("study.toml", "name = \"study\"\n");
    let printed = run(&bench, 2, &["lab", "run", "study.toml"]).fails();
    assert!(printed.contains("study.toml"), "{printed}");
}
