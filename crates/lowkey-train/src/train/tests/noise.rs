//! Runs with noise on their embeddings.

use super::*;

const NOISE: &str = "training.neftune_noise_alpha=0.1";

#[test]
fn noise_goes_on_to_the_same_bits_and_is_in_steps_alone() {
    let (plain, unbroken) = (TinyRun::new(), TinyRun::new());
    plain.train(&[]).unwrap();
    let evaluation = unbroken.train(&[NOISE]).unwrap().evaluation.unwrap();
    assert!(evaluation.loss < unigram_entropy(), "{}", evaluation.loss);
    assert_ne!(weights(&unbroken.checkpoint(STEPS)), weights(&plain.checkpoint(STEPS)));
    TinyRun::new().interrupted(&[NOISE], &[5, 16]).assert_ends_as(&unbroken, &END);

    // Of a model that stands still.
    let still = [
        "training.steps=2",
        "optimizer.lr=1e-30",
        "optimizer.weight_decay=0",
        "eval.every=1",
        "lr_scheduler.warmup_steps=0",
    ];
    let losses = |more: &[&str]| {
        let run = TinyRun::new();
        run.train(&[&still[..], more].concat()).unwrap();
        let metrics = run.metrics();
        (
            metrics.iter().map(|m| m.train_loss).collect::<Vec<_>>(),
            metrics.iter().map(|m| m.val_loss).collect::<Vec<_>>(),
        )
    };
    let (plain, noisy) = (losses(&[]), losses(&[NOISE]));
    assert_eq!(plain.1, noisy.1, "what is measured has no noise");
    assert!(plain.0.iter().zip(&noisy.0).all(|(plain, noisy)| plain != noisy));
    // Whoever computes a row, its noise is the same: what differs is the order of sums.
    for shares in [
        &["training.threads=3"][..],
        &["training.micro_batch_size=2"],
        &["training.threads=1", "training.micro_batch_size=3"],
    ] {
        let other = losses(&[&[NOISE], shares].concat());
        let apart = noisy.0.iter().zip(&other.0).map(|(a, b)| (a / b - 1.0).abs()).fold(0.0, f64::max);
        assert!(apart < 1e-6, "{shares:?}: {apart}");
    }
    for bad in ["0", "-1", "inf"] {
        let overrides = [format!("training.neftune_noise_alpha={bad}")];
        let refused = RunConfig::load(&unbroken.file(), &overrides).unwrap_err().to_string();
        assert!(refused.contains("training.neftune_noise_alpha"), "{refused}");
    }
}
