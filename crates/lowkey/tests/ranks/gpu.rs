//! Ranks on GPUs, in builds that know any: the environment variable `LOWKEY_TEST_DEVICE` names the kind. Where there is one device of the
//! kind, all ranks use it.

use super::job::Bench;

/// Holds a run on 2 ranks to one of a single process with as many passes.
fn same_bits(bench: &Bench, more: &[&str]) {
    let device = std::env::var("LOWKEY_TEST_DEVICE").expect("LOWKEY_TEST_DEVICE names the kind of GPU");
    let sets = more.iter().flat_map(|set| ["--set", set]);
    let arguments: Vec<&str> =
        ["--device", &device, "--set", "training.micro_batch_size=12"].into_iter().chain(sets).collect();
    bench.train(1, "one", &arguments).succeeds();
    let printed = bench.train(2, "ranks", &arguments).succeeds();
    assert!(printed.contains("2 ranks of one device each; gradients are added up by MPI"), "{printed}");
    bench.assert_same("one", "ranks", 12);
}

#[test]
fn two_ranks_on_gpus_are_one_process_on_one() {
    same_bits(&Bench::new(), &[]);
}

#[test]
fn so_they_are_with_muon_and_an_optimiser_that_is_divided() {
    same_bits(&Bench::new(), &["optimizer.kind=muon", "ranks.zero=1", "training.ema_decay=0.9"]);
}

#[test]
fn so_they_are_with_an_adapter() {
    let adapter = "[adapter]\ntarget_modules = \"all-linear\"\nr = 3\nlora_dropout = 0.1\n";
    same_bits(&Bench::beside_a_model(adapter, "path = \"text.txt\"\nseq_len = 24\n"), &[]);
}
