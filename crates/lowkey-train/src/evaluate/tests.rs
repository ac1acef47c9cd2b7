use burn::tensor::Tensor;
use lowkey_model::ids_tensor;

use super::*;
use crate::fixtures::{Lcg, model, uneven_batch};

const VOCAB: usize = 19;
const LONGEST: usize = 24;

fn workers() -> Workers {
    Workers::new(2, 2).unwrap()
}

fn lengths() -> Vec<u32> {
    (0..VOCAB as u32).map(|id| id % 4).collect()
}

/// `log p(ids[t + 1] | ids[..= t])` for each t, from the logits, in f64.
fn log_probabilities(model: &CausalLm, ids: &[u32]) -> Vec<f64> {
    let logits = model.forward(ids_tensor(ids, 1, ids.len(), &Device::flex())).try_into_vec_as::<f32>().unwrap();
    let log_p = |(logits, next): (&[f32], &u32)| {
        let sum: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
        f64::from(logits[*next as usize]) - sum.ln()
    };
    logits.chunks(VOCAB).zip(&ids[1..]).map(log_p).collect()
}

/// Documents of different lengths, for which `truth` says the log-probabilities of all tokens but the first.
fn documents(lens: &[usize], truth: impl Fn(&[u32]) -> Vec<f64>) -> Vec<OracleDocument> {
    let mut random = Lcg(17);
    lens.iter()
        .map(|len| {
            let ids: Vec<u32> = (0..*len).map(|_| random.below(VOCAB) as u32).collect();
            // The first token is not predicted, so that its entry must not be read.
            let log_probs = std::iter::once(f64::NAN).chain(truth(&ids)).take(*len).collect();
            let classes = (0..*len).map(|_| [Class::Syntax, Class::Name, Class::End][random.below(3)]).collect();
            OracleDocument { learnt: vec![true; ids.len()], ids, log_probs, classes }
        })
        .collect()
}

fn half(ids: &[u32]) -> Vec<f64> {
    vec![-0.5; ids.len() - 1]
}

fn measure(model: &CausalLm, held: &Held) -> Evaluation {
    evaluate(model, held, &lengths(), &workers(), &Device::flex()).unwrap()
}

/// A model whose head is sharp enough that its losses differ.
fn sharp_model(device: &Device) -> CausalLm {
    let model = model(VOCAB, LONGEST, 9, device);
    let values = model.parameters().into_iter().map(|p| if p.is_matrix() { p.value * 2.0 } else { p.value }).collect();
    model.with_values(values)
}

#[test]
fn the_loss_of_batches_is_the_mean_over_their_targets() {
    let model = sharp_model(&Device::flex());
    let mut batches = Vec::new();
    let (mut nats, mut tokens, mut bytes) = (0.0, 0, 0u64);
    for seed in 0..3 {
        let mut batch = uneven_batch(3, 11, VOCAB, seed);
        batch.document_starts.fill(0);
        for (row, targets) in batch.input_ids.chunks(11).zip(batch.targets.chunks(11)) {
            let logits = model.forward(ids_tensor(row, 1, 11, &Device::flex())).try_into_vec_as::<f32>().unwrap();
            for (logits, target) in logits.chunks(VOCAB).zip(targets).filter(|(_, target)| **target != IGNORE) {
                let sum: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
                nats += sum.ln() - f64::from(logits[*target as usize]);
                tokens += 1;
                bytes += u64::from(lengths()[*target as usize]);
            }
        }
        batches.push(batch);
    }
    let found = measure(&model, &Held::Batches(batches));
    let loss = nats / tokens as f64;
    assert_eq!((found.tokens, found.bytes), (tokens, bytes));
    assert!((found.loss / loss - 1.0).abs() < 1e-6, "{} for {loss}", found.loss);
    assert!((found.perplexity.unwrap() / loss.exp() - 1.0).abs() < 1e-6);
    assert!((found.bits_per_byte.unwrap() / (nats / std::f64::consts::LN_2 / bytes as f64) - 1.0).abs() < 1e-6);
    assert!(found.gap.is_none() && found.classes.is_empty() && found.accuracy.is_none() && found.mse.is_none());
}

#[test]
fn a_model_on_an_autodiff_device_gives_the_same() {
    let device = Device::flex().autodiff();
    let held = Held::Batches(vec![uneven_batch(3, 11, VOCAB, 1)]);
    let tracked = evaluate(&sharp_model(&device), &held, &lengths(), &workers(), &device).unwrap();
    let plain = measure(&sharp_model(&Device::flex()), &held);
    assert_eq!(tracked.loss.to_bits(), plain.loss.to_bits());
    assert!(tracked.max_logit.is_finite());
}

#[test]
fn documents_together_are_each_alone() {
    let model = sharp_model(&Device::flex());
    let lens: Vec<usize> = (2..=20).chain([1, 3, 2]).collect();
    let documents = documents(&lens, half);
    let together = measure(&model, &Held::Documents(documents.clone()));
    let (mut nats, mut tokens, mut bytes) = (0.0, 0, 0);
    for document in &documents {
        let alone = measure(&model, &Held::Documents(vec![document.clone()]));
        assert_eq!(alone.tokens, document.ids.len() - 1);
        nats += alone.loss * alone.tokens as f64;
        tokens += alone.tokens;
        bytes += alone.bytes;
        if alone.tokens > 0 {
            let expected: f64 = -log_probabilities(&model, &document.ids).iter().sum::<f64>() / alone.tokens as f64;
            assert!((alone.loss / expected - 1.0).abs() < 1e-6, "{} for {expected}", alone.loss);
        }
    }
    assert_eq!((together.tokens, together.bytes), (tokens, bytes));
    assert!((together.loss / (nats / tokens as f64) - 1.0).abs() < 1e-6);
}

#[test]
fn the_gap_to_a_generator_that_is_the_model_is_zero() {
    let model = sharp_model(&Device::flex());
    let documents = documents(&[14, 3, 24, 1, 9], |ids| log_probabilities(&model, ids));
    let found = measure(&model, &Held::Documents(documents));
    assert!(found.gap.unwrap().abs() < 1e-6, "{:?}", found.gap);
    assert_eq!(found.classes.iter().map(|c| c.class.as_str()).collect::<Vec<_>>(), ["syntax", "name", "end"]);
    assert!(found.classes.iter().all(|c| c.gap.abs() < 1e-6 && c.loss > 0.1), "{:?}", found.classes);
}

#[test]
fn classes_add_up_to_the_whole() {
    let model = sharp_model(&Device::flex());
    let documents = documents(&[14, 3, 22, 1, 9, 17], half);
    let found = measure(&model, &Held::Documents(documents));
    assert_eq!(found.classes.iter().map(|c| c.tokens).sum::<usize>(), found.tokens);
    let sum = |of: fn(&ClassEvaluation) -> f64| -> f64 { found.classes.iter().map(|c| of(c) * c.tokens as f64).sum() };
    assert!((sum(|c| c.loss) / (found.loss * found.tokens as f64) - 1.0).abs() < 1e-9);
    assert!((found.gap.unwrap() - sum(|c| c.gap) / found.tokens as f64).abs() < 1e-9);
    for class in &found.classes {
        assert!((class.entropy - 0.5).abs() < 1e-9 && (class.gap - (class.loss - 0.5)).abs() < 1e-9, "{class:?}");
    }
}

#[test]
fn nothing_to_predict_is_not_a_number_made_up() {
    let model = sharp_model(&Device::flex());
    for held in [Held::Batches(Vec::new()), Held::Documents(documents(&[1], half)), Held::Documents(Vec::new())] {
        let found = measure(&model, &held);
        assert_eq!((found.tokens, found.bytes, found.loss, found.gap), (0, 0, 0.0, None));
    }
}

#[test]
fn the_largest_logit_is_that_of_the_first_two_rows() {
    let model = sharp_model(&Device::flex());
    let batch = uneven_batch(3, 11, VOCAB, 4);
    let mut trace = Trace::default();
    model.losses(batch.rows(0..2), &Device::flex(), Some(&mut trace));
    let expected = trace.max_logit.into_iter().map(Tensor::into_scalar::<f32>).fold(f32::NEG_INFINITY, f32::max);
    assert_eq!(measure(&model, &Held::Batches(vec![batch])).max_logit, f64::from(expected));
}

#[test]
fn the_first_part_is_counted_in_rows() {
    let batches = Held::Batches((0..5).map(|seed| uneven_batch(3, 4, VOCAB, seed)).collect());
    for (count, batch_size, expected) in
        [(0, 3, 0), (1, 3, 1), (2, 3, 2), (1, 6, 2), (1, 4, 2), (9, 9, 5), (usize::MAX, 3, 5)]
    {
        let Held::Batches(first) = batches.first(count, batch_size) else { panic!("still batches") };
        assert_eq!(first.len(), expected, "{count} batches of {batch_size}");
        assert!(first.iter().enumerate().all(|(i, batch)| *batch == uneven_batch(3, 4, VOCAB, i as u64)));
    }
    let documents = documents(&[2, 3, 4, 5, 6], half);
    for (count, batch_size, expected) in [(1, 2, 2), (2, 2, 4), (3, 2, 5), (usize::MAX, 2, 5)] {
        let Held::Documents(first) = Held::Documents(documents.clone()).first(count, batch_size) else {
            panic!("still documents")
        };
        assert_eq!(first.len(), expected, "{count} batches of {batch_size}");
        assert!(first.iter().zip(&documents).all(|(a, b)| a.ids == b.ids));
    }
}
