//! n ranks are one process that takes each step in n passes, to the last bit.

use super::job::{Bench, Job, Starter};

/// Holds runs on so many ranks to those of one process with as many passes.
fn same_bits(bench: &Bench, arguments: &[&str], ranks: &[usize]) {
    same_bits_by(bench, arguments, ranks, |ranks, out, arguments| bench.train(ranks, out, arguments).succeeds());
}

/// The same, for ranks that are started in another way; `train` returns what they print.
pub(crate) fn same_bits_by(
    bench: &Bench,
    arguments: &[&str],
    ranks: &[usize],
    train: impl Fn(usize, &str, &[&str]) -> String,
) {
    for ranks in ranks {
        let passes = format!("training.micro_batch_size={}", 24 / ranks);
        let arguments = [arguments, &["--set", &passes]].concat();
        let (one, several) = (format!("one-{ranks}"), format!("ranks-{ranks}"));
        bench.train(1, &one, &arguments).succeeds();
        let printed = train(*ranks, &several, &arguments);
        bench.assert_same(&one, &several, 12);
        assert!(printed.contains(&format!("{ranks} ranks of 1 threads each")), "{printed}");
        // One of them speaks and writes.
        for said in ["saved several/checkpoints/step-000008", "all steps taken"] {
            let said = said.replace("several", &several);
            assert_eq!(printed.matches(&said).count(), 1, "{said}: {printed}");
        }
        assert_eq!(bench.names(&one), bench.names(&several));
    }
}

#[test]
fn adamw() {
    same_bits(&Bench::new(), &[], &[2, 3, 4]);
}

#[test]
fn muon_with_an_average_and_noise() {
    let more = ["optimizer.kind=muon", "training.ema_decay=0.9", "training.neftune_noise_alpha=5"];
    same_bits(&Bench::new(), &more.map(|set| ["--set", set]).concat(), &[2, 4]);
}

#[test]
fn elastic_ranks_and_a_latent_for_queries() {
    let more =
        ["model.elastic.ranks=[2, 5]", "training.elastic_start=0.2", "model.q_lora_rank=6", "training.z_loss=1e-3"];
    same_bits(&Bench::new(), &more.map(|set| ["--set", set]).concat(), &[2, 4]);
}

#[test]
fn documents_that_share_sequences() {
    let bench = Bench::new();
    let file = std::fs::read_to_string(bench.path("run.toml")).unwrap();
    bench.write("run.toml", &file.replace("path = \"text.txt\"", "dataset = \"lines.toml\""));
    same_bits(&bench, &["--set", "data.seq_len=40"], &[2, 4]);
}

#[test]
fn an_adapter_beside_a_frozen_model() {
    let adapter = "[adapter]\ntarget_modules = \"all-linear\"\nr = 3\nlora_dropout = 0.1\n";
    same_bits(&Bench::beside_a_model(adapter, "path = \"text.txt\"\nseq_len = 24\n"), &[], &[2, 4]);
}

#[test]
fn pairs_of_answers() {
    let data = "dataset = \"pairs.toml\"\nseq_len = 24\n";
    let bench = Bench::beside_a_model("", data);
    let file = std::fs::read_to_string(bench.path("run.toml")).unwrap();
    bench.write("run.toml", &format!("{file}[[objective]]\nkind = \"preference\"\nloss_type = \"sigmoid\"\n"));
    same_bits(&bench, &["--set", "eval.prompts=[]"], &[2, 4]);
}

#[test]
fn an_optimiser_that_is_divided() {
    for kind in ["optimizer.kind=adamw", "optimizer.kind=muon"] {
        let more = [kind, "ranks.zero=1", "optimizer.layer_lr_decay=0.8", "training.ema_decay=0.9"];
        same_bits(&Bench::new(), &more.map(|set| ["--set", set]).concat(), &[2, 4]);
    }
    let adapter = "[adapter]\ntarget_modules = \"all-linear\"\nr = 3\n";
    let bench = Bench::beside_a_model(adapter, "path = \"text.txt\"\nseq_len = 24\n");
    same_bits(&bench, &["--set", "ranks.zero=1"], &[3]);
}

#[test]
fn a_divided_optimiser_goes_on_whole_and_the_other_way_round() {
    let bench = Bench::new();
    bench.train(3, "unbroken", &[]).succeeds();
    for (out, first, then) in [("divided", "ranks.zero=1", "ranks.zero=0"), ("whole", "ranks.zero=0", "ranks.zero=1")] {
        let job = bench.start(3, out, &["--set", first]);
        job.until(&bench, out, 5);
        job.signal(1, "-USR1");
        job.wait().succeeds();
        bench.train(3, out, &["--set", then, "--resume"]).succeeds();
        bench.assert_same("unbroken", out, 12);
    }
}

#[test]
fn what_a_teacher_says_is_kept_by_each_rank() {
    let bench = Bench::beside_a_model("", "path = \"text.txt\"\nseq_len = 24\n");
    let file = std::fs::read_to_string(bench.path("run.toml")).unwrap();
    let teacher = "kind = \"distillation\"\nteacher = \"base/checkpoints/step-000004\"\ntop_k = 8\ncache = \"kept\"\n";
    bench.write("run.toml", &format!("{file}[[objective]]\n{teacher}"));
    same_bits(&bench, &["--set", "run.seed=4"], &[2]);
    assert_eq!(std::fs::read_dir(bench.path("kept")).unwrap().count(), 3);
}

#[test]
fn over_tcp_as_over_memory() {
    let bench = Bench::new();
    bench.train(2, "memory", &[]).succeeds();
    let arguments = ["train", "run.toml", "--out", "tcp"];
    let mut command = bench.command(2, &arguments);
    command.envs(Starter::of_this_build().over_tcp.iter().copied());
    Job::start(command, &bench.path("")).wait().succeeds();
    bench.assert_same("memory", "tcp", 12);
}

#[test]
fn the_fastest_sum_is_the_same_but_for_rounding() {
    let bench = Bench::new();
    bench.train(4, "ordered", &[]).succeeds();
    let printed = bench.train(4, "fastest", &["--set", "ranks.sum=fastest"]).succeeds();
    assert!(printed.contains("gradients are added up by MPI, in its own order"), "{printed}");
    let (ordered, fastest) = (bench.losses("ordered"), bench.losses("fastest"));
    assert_eq!((ordered.len(), fastest.len()), (12, 12));
    for (a, b) in ordered.iter().zip(&fastest) {
        assert!((a / b - 1.0).abs() < 1e-5, "{ordered:?}\n{fastest:?}");
    }
}

#[test]
fn a_run_goes_on_with_another_number_of_ranks() {
    let bench = Bench::new();
    bench.train(4, "unbroken", &[]).succeeds();
    // The learning rate is that of 12 steps throughout, which a run file with fewer of them would not have: they are stopped.
    for (ranks, step) in [(4, 3), (2, 6), (3, 12)] {
        let arguments: &[&str] = if ranks == 4 { &[] } else { &["--resume"] };
        if step == 12 {
            bench.train(ranks, "changing", arguments).succeeds();
        } else {
            let job = bench.start(ranks, "changing", arguments);
            job.until(&bench, "changing", step);
            job.signal(ranks - 1, "-USR1");
            job.wait().succeeds();
        }
    }
    let (unbroken, changing) = (bench.losses("unbroken"), bench.losses("changing"));
    assert_eq!((unbroken.len(), changing.len()), (12, 12), "{changing:?}");
    for (a, b) in unbroken.iter().zip(&changing) {
        assert!((a / b - 1.0).abs() < 1e-6, "{unbroken:?}\n{changing:?}");
    }
}
