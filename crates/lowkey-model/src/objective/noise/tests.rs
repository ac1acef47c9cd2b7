use burn::module::Module;
use burn::tensor::Device;
use lowkey_batch::Batch;

use super::*;
use crate::fixtures::{self, distance, scrambled, values};
use crate::gradients::Recompute;
use crate::objective::{Against, Objective, Term};

const NOISE: EmbeddingNoise = EmbeddingNoise { alpha: 5.0, seed: 7, step: 3, first_row: 0 };

/// Rows of documents of 4, 1 and 7 tokens.
fn batch(rows: usize) -> Batch {
    let mut batch = Batch { rows, seq_len: 12, ..Batch::default() };
    for row in 0..rows {
        batch.input_ids.extend((0..12).map(|at| ((row * 5 + at * 3) % 7) as u32));
        batch.targets.extend((0..12).map(|at| ((row + at * 2) % 7) as i64));
        batch.document_starts.extend([0, 0, 0, 0, 4, 5, 5, 5, 5, 5, 5, 5]);
    }
    batch
}

#[test]
fn each_documents_noise_is_even_up_to_the_bound_of_its_own_length() {
    let d = 512;
    let noise = NOISE.values(batch(2).all(), d);
    for row in noise.chunks(12 * d) {
        for (range, len) in [(0..4, 4), (4..5, 1), (5..12, 7)] {
            let bound = 5.0 / f64::from(len * d as u32).sqrt();
            let part: Vec<f64> = row[range.start * d..range.end * d].iter().map(|x| f64::from(*x)).collect();
            let count = part.len() as f64;
            assert!(part.iter().all(|x| x.abs() <= bound * (1.0 + 1e-6)));
            assert!(part.iter().any(|x| *x > 0.95 * bound) && part.iter().any(|x| *x < -0.95 * bound));
            // Of an even distribution: four standard deviations of the mean, and of the mean square.
            assert!((part.iter().sum::<f64>() / count).abs() < 4.0 * bound / (3.0 * count).sqrt());
            let square = part.iter().map(|x| x * x).sum::<f64>() / count / (bound * bound);
            assert!((square - 1.0 / 3.0).abs() < 4.0 * (4.0 / 45.0 / count).sqrt(), "{square}");
        }
    }
    let rest = EmbeddingNoise { step: 4, ..NOISE }.values(batch(2).all(), d);
    assert!(noise.iter().zip(&rest).filter(|(a, b)| a == b).count() < 10, "each step has its own");
    assert_ne!(noise[..12 * d], noise[12 * d..], "and so has each row");
    assert_ne!(EmbeddingNoise { seed: 8, ..NOISE }.values(batch(1).all(), d), noise[..12 * d]);
}

#[test]
fn a_row_has_the_same_noise_whoever_computes_it() {
    let (batch, d) = (batch(5), 6);
    let whole = NOISE.values(batch.all(), d);
    for cut in 0..5 {
        let later = EmbeddingNoise { first_row: cut, ..NOISE };
        assert_eq!(later.values(batch.rows(cut..5), d), whole[cut * 12 * d..]);
    }
}

#[test]
fn a_pass_with_noise_learns_from_embeddings_that_are_shifted_by_it() {
    let device = Device::flex().autodiff();
    for (kind, config) in fixtures::every_kind() {
        let model = scrambled(&config, 4, &device);
        let batch = batch(2);
        let objective = Objective { scale: 0.1, terms: &[Term::NEXT] };
        let learn =
            |noise, recompute| model.learn(batch.all(), objective, Against::default(), noise, recompute, &device);
        let shifted = NOISE.added(model.embed(batch.all(), &device), batch.all());
        let hidden = model.last_hidden_of(shifted, batch.all(), None, &device, None);
        let expected = model.loss_of(hidden, batch.all(), 0.0).nats;
        let told = values(expected.clone());
        let expected = model.take_gradients(&mut (expected * 0.1).backward());
        for recompute in [Recompute::None, Recompute::Block] {
            let found = learn(Some(NOISE), recompute);
            assert_eq!(values(found.loss.nats), told, "{kind}");
            for (found, expected) in found.gradients.into_iter().zip(&expected) {
                let (found, expected) = (values(found), values(expected.clone()));
                let size = expected.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
                assert!(distance(&found, &expected) <= 1e-6 * size, "{kind}, {recompute:?}");
            }
            assert_ne!(values(learn(None, recompute).loss.nats), told, "{kind}");
        }
        // What is measured has none.
        let measured = values(model.valid().losses(batch.all(), &Device::flex(), None));
        let sum: f32 = measured.iter().sum();
        let plain = values(learn(None, Recompute::None).loss.nats)[0];
        assert!((sum / plain - 1.0).abs() < 1e-5, "{kind}");
    }
}
