//! Runs that learn from a teacher.

use burn::tensor::Device;
use lowkey_model::CausalLm;

use crate::fixtures::{TinyRun, weight_bits};
use crate::metrics::Metrics;

/// A run file with an objective at its end.
fn with_objective(run: &TinyRun, objective: &str) {
    let text = std::fs::read_to_string(run.file()).unwrap();
    std::fs::write(run.file(), format!("{text}[[objective]]\n{objective}\n")).unwrap();
}

fn weights(run: &TinyRun, step: u64) -> Vec<u32> {
    weight_bits(&CausalLm::load(&run.checkpoint(step), &Device::flex()).unwrap())
}

#[test]
fn a_pupil_learns_what_its_teacher_says_and_goes_on_with_the_same_bits() {
    let teacher = TinyRun::new();
    teacher.train(&[]).unwrap();
    let from = teacher.checkpoint(40).display().to_string();
    let kept = tempfile::tempdir().unwrap();
    let cache = format!("top_k = 16\ncache = {:?}\n", kept.path().display().to_string());
    for (more, whole) in
        [("", true), ("beta = 0.5\nshare = 0.7\ntemperature = 1.5\nattention_weight = 0.3\n", true), (&*cache, false)]
    {
        let objective = format!("kind = \"distillation\"\nteacher = {from:?}\n{more}");
        let unbroken = TinyRun::new();
        with_objective(&unbroken, &objective);
        unbroken.train(&["run.seed=4"]).unwrap();
        let metrics = unbroken.metrics();
        let loss = |metrics: &Metrics| metrics.train_loss;
        assert!(loss(metrics.last().unwrap()) < 0.5 * loss(&metrics[0]), "{more}");
        let measured: Vec<f64> = metrics.iter().filter_map(|metrics| metrics.val_loss).collect();
        assert!(measured.last() < measured.first(), "{more}: {measured:?}");
        let broken = TinyRun::new();
        with_objective(&broken, &objective);
        let resumed = broken.interrupted(&["run.seed=4"], &[13]);
        assert!(weights(&resumed, 40) == weights(&unbroken, 40), "{more}");
        assert_eq!(std::fs::read_dir(kept.path()).unwrap().count() > 0, !whole, "{more}");
    }
}

#[test]
fn a_teacher_of_another_vocabulary_is_refused() {
    let teacher = TinyRun::new();
    teacher.train(&["training.steps=2", "model.vocab_size=300"]).unwrap();
    let run = TinyRun::new();
    let from = teacher.checkpoint(2).display().to_string();
    with_objective(&run, &format!("kind = \"distillation\"\nteacher = {from:?}"));
    let message = run.train(&["training.steps=2"]).unwrap_err().to_string();
    assert!(message.contains("objective.teacher") && message.contains("predicts 300 tokens"), "{message}");
    // Layers learn from as many that are as wide.
    let teacher = TinyRun::new();
    teacher.train(&["training.steps=2", "model.num_hidden_layers=3"]).unwrap();
    let run = TinyRun::new();
    let from = teacher.checkpoint(2).display().to_string();
    with_objective(&run, &format!("kind = \"distillation\"\nteacher = {from:?}\nattention_weight = 0.1"));
    let message = run.train(&["training.steps=2"]).unwrap_err().to_string();
    assert!(message.contains("objective.teacher") && message.contains("has 3 layers of width"), "{message}");
    let run = TinyRun::new();
    with_objective(&run, "kind = \"preference\"\nloss_type = \"simpo\"");
    let message = run.train(&["training.steps=2"]).unwrap_err().to_string();
    assert!(message.contains("has no pairs of answers"), "{message}");
}
