use burn::module::Module;
use lowkey_data::DatasetConfig;
use lowkey_data::tasks::{RowLayout, TaskCorpus};
use lowkey_model::ids_tensor;

use super::*;
use crate::evaluate::{Held, evaluate};
use crate::fixtures::model;

fn corpus(task: &str) -> TaskCorpus {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.toml");
    let source = "kind = \"task\"\nseed = 2\nvalidation_examples = 13";
    std::fs::write(&path, format!("name = \"t\"\n[source]\n{source}\n[source.task]\n{task}\n")).unwrap();
    TaskCorpus::new(&DatasetConfig::load(&path).unwrap()).unwrap().unwrap()
}

/// A model whose logits are far apart.
fn sharp_model(vocab: usize, positions: usize, device: &Device) -> CausalLm {
    let model = model(vocab, positions, 9, device);
    let values = model.parameters().into_iter().map(|p| if p.is_matrix() { p.value * 3.0 } else { p.value }).collect();
    model.with_values(values)
}

fn measure(model: &CausalLm, held: &HeldExamples) -> Evaluation {
    let workers = Workers::new(2, 2).unwrap();
    evaluate(model, &Held::Examples(held.clone()), &[], &workers, &Device::flex()).unwrap()
}

/// Loss and hit of each answer of a row, from the logits of the row alone.
fn naive(model: &CausalLm, row: &[u32], targets: &[i64]) -> Vec<(f64, bool)> {
    let vocab = model.config.vocab_size;
    let logits = model.forward(ids_tensor(row, 1, row.len(), &Device::flex())).try_into_vec_as::<f32>().unwrap();
    let asked = logits.chunks(vocab).zip(targets).filter(|(_, target)| **target != IGNORE);
    asked
        .map(|(logits, target)| {
            let sum: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
            let at = logits[*target as usize];
            (sum.ln() - f64::from(at), logits.iter().all(|x| *x <= at))
        })
        .collect()
}

#[test]
fn loss_and_accuracy_are_those_of_the_logits_by_class() {
    let corpus = corpus("kind = \"dyck\"\nkinds = 3\nlength = 12\ndepth = 3");
    let model = sharp_model(corpus.width(), 11, &Device::flex());
    let held = corpus.held(RowLayout { seq_len: 11, mask_documents: true }, 4);
    let HeldExamples::Tokens(batches, names) = &held else { panic!("brackets are tokens") };
    let mut all: Vec<(u8, f64, bool)> = Vec::new();
    for AnswerBatch { batch, classes } in batches {
        for row in 0..batch.rows {
            let range = row * 11..(row + 1) * 11;
            let found = naive(&model, &batch.input_ids[range.clone()], &batch.targets[range.clone()]);
            let asked = range.filter(|at| batch.targets[*at] != IGNORE).map(|at| classes[at]);
            all.extend(asked.zip(found).map(|(class, (loss, hit))| (class, loss, hit)));
        }
    }
    let found = measure(&model, &held);
    let near = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-5, "{found} for {expected}");
    let mean = |of: &dyn Fn(&(u8, f64, bool)) -> f64, answers: &[(u8, f64, bool)]| {
        answers.iter().map(of).sum::<f64>() / answers.len() as f64
    };
    let hit = |answer: &(u8, f64, bool)| f64::from(u8::from(answer.2));
    assert_eq!(found.tokens, all.len());
    near(found.loss, mean(&|answer| answer.1, &all));
    near(found.accuracy.unwrap(), mean(&hit, &all));
    assert!((0.05..0.95).contains(&found.accuracy.unwrap()), "hits and misses must both occur: {:?}", found.accuracy);
    assert_eq!(found.classes.len(), 3);
    for (i, class) in found.classes.iter().enumerate() {
        let answers: Vec<_> = all.iter().copied().filter(|answer| usize::from(answer.0) == i).collect();
        assert_eq!((class.class.as_str(), class.tokens), (names[i], answers.len()));
        near(class.loss, mean(&|answer| answer.1, &answers));
        near(class.accuracy.unwrap(), mean(&hit, &answers));
        assert_eq!((class.entropy, class.gap), (0.0, class.loss));
    }
    assert!(found.max_logit.is_finite() && found.bits_per_byte.is_none() && found.mse.is_none());
}

#[test]
fn examples_that_share_a_row_count_as_examples_alone() {
    for task in ["kind = \"copy\"\nsymbols = 5\nlength = 3", "kind = \"linear-recall\"\nwidth = 4\nitems = 3"] {
        let corpus = corpus(task);
        let model = sharp_model(corpus.width(), 24, &Device::flex());
        let at = |seq_len: usize, rows: usize| {
            measure(&model, &corpus.held(RowLayout { seq_len, mask_documents: true }, rows))
        };
        // Thirteen examples: alone, and three to a row that is padded.
        let (alone, together) = (at(6, 5), at(21, 2));
        assert_eq!((alone.tokens, together.tokens), (39, 39));
        assert!((alone.loss / together.loss - 1.0).abs() < 1e-5, "{task}: {} {}", alone.loss, together.loss);
        assert_eq!((alone.accuracy, alone.mse.is_some()), (together.accuracy, together.mse.is_some()));
    }
}

#[test]
fn the_first_rows_are_the_first_batches() {
    let corpus = corpus("kind = \"copy\"\nsymbols = 5\nlength = 3");
    let held = Held::Examples(corpus.held(RowLayout { seq_len: 6, mask_documents: true }, 4));
    let rows = |held: &Held| match held {
        Held::Examples(HeldExamples::Tokens(batches, _)) => batches.iter().map(|answers| answers.batch.rows).collect(),
        _ => Vec::new(),
    };
    assert_eq!(rows(&held), [4, 4, 4, 1]);
    assert_eq!((rows(&held.first(1, 5)), rows(&held.first(9, 9))), (vec![4, 4], vec![4, 4, 4, 1]));
}

#[test]
fn a_model_with_gradients_and_one_without_are_measured_alike() {
    let device = Device::flex().autodiff();
    let corpus = corpus("kind = \"linear-recall\"\nwidth = 4\nitems = 3");
    let held = corpus.held(RowLayout { seq_len: 6, mask_documents: true }, 4);
    let model = sharp_model(corpus.width(), 6, &device);
    let workers = Workers::new(1, 1).unwrap();
    let tracked = evaluate(&model, &Held::Examples(held.clone()), &[], &workers, &device).unwrap();
    assert_eq!(tracked.loss.to_bits(), measure(&model.valid(), &held).loss.to_bits());
}

#[test]
fn an_answer_of_zero_has_an_error_of_about_one() {
    let corpus = corpus("kind = \"linear-recall\"\nwidth = 40\nitems = 8");
    let model = model(corpus.width(), 16, 9, &Device::flex());
    let values = model.parameters().into_iter().map(|p| p.value * 0.0).collect();
    let found = measure(&model.with_values(values), &corpus.held(RowLayout { seq_len: 16, mask_documents: true }, 4));
    assert!((found.mse.unwrap() - 1.0).abs() < 0.1, "{:?}", found.mse);
}
