use super::*;
use crate::fixtures::{self, distance, normal, scrambled, values};
use crate::gradients::Recompute;
use crate::objective::{Objective, Term};
use lowkey_batch::IGNORE;

/// Two rows of two documents each, of three-number answers to inputs of `width` numbers.
struct Vectors {
    inputs: Vec<f32>,
    values: Vec<f32>,
    targets: Vec<i64>,
    starts: Vec<u32>,
}

impl Vectors {
    fn new(width: usize, inputs: Vec<f32>) -> Self {
        let positions = inputs.len() / width;
        let starts = (0..positions).map(|i| if i % 9 < 4 { 0 } else { 4 }).collect();
        let targets = (0..positions).map(|i| if i % 4 == 1 { IGNORE } else { 0 }).collect();
        Self { inputs, values: normal(91, positions * 3), targets, starts }
    }

    fn rows(&self) -> Rows<'_> {
        let positions = self.targets.len();
        let input_width = self.inputs.len() / positions;
        let vectors = VectorRows { input_width, output_width: 3, inputs: &self.inputs, values: &self.values };
        Rows {
            rows: positions / 9,
            seq_len: 9,
            input_ids: &[],
            targets: &self.targets,
            document_starts: &self.starts,
            vectors: Some(vectors),
            pairs: false,
        }
    }
}

#[test]
fn a_vector_with_a_single_one_is_a_token() {
    let device = Device::flex();
    for (kind, config) in fixtures::every_kind() {
        let model = scrambled(&config, 4, &device);
        let ids: Vec<u32> = (0..18).map(|i| i * 5 % 23).collect();
        let one_hot = ids.iter().flat_map(|id| (0..23).map(move |i| f32::from(u8::from(i == *id)))).collect();
        let vectors = Vectors::new(23, one_hot);
        let context = model.context(&vectors.starts, 9, &device);
        let logits = values(model.logits(model.hidden(ids_tensor(&ids, 2, 9, &device), &context, None)));
        let expected: Vec<f32> = (0..18)
            .map(|i| {
                let error = (0..3).map(|j| (logits[i * config.vocab_size + j] - vectors.values[i * 3 + j]).powi(2));
                if vectors.targets[i] == IGNORE { 0.0 } else { error.sum::<f32>() / 3.0 }
            })
            .collect();
        let each = values(model.losses(vectors.rows(), &device, None));
        assert!(distance(&each, &expected) < 1e-4, "{kind}: {each:?} for {expected:?}");
        let sum = model.loss(vectors.rows(), 0.5, &device);
        assert_eq!((sum.targets, values(sum.z_loss)), (13, vec![0.0]), "{kind}");
        let total: f32 = expected.iter().sum();
        assert!((values(sum.nats)[0] / total - 1.0).abs() < 1e-5, "{kind}");
    }
}

#[test]
fn gradients_of_vectors_block_by_block_are_the_gradients() {
    let device = Device::flex().autodiff();
    for (kind, config) in fixtures::every_kind() {
        let model = scrambled(&config, 4, &device);
        let vectors = Vectors::new(7, normal(3, 18 * 7));
        let objective = Objective { scale: 0.1, terms: &[Term::NEXT] };
        let (loss, gradients) = model.loss_and_gradients(vectors.rows(), objective, Recompute::None, &device);
        let (again, anew) = model.loss_and_gradients(vectors.rows(), objective, Recompute::Block, &device);
        assert_eq!((values(loss.nats), loss.targets), (values(again.nats), again.targets), "{kind}");
        for ((gradient, anew), parameter) in gradients.into_iter().zip(anew).zip(model.parameters()) {
            let (gradient, anew) = (values(gradient), values(anew));
            let size = gradient.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
            assert!(distance(&gradient, &anew) <= 1e-6 * size, "{kind}: {}", parameter.name);
        }
    }
}

#[test]
fn answers_are_the_largest_logits_and_the_same_losses() {
    let device = Device::flex();
    for (kind, config) in fixtures::every_kind() {
        let model = scrambled(&config, 8, &device);
        let input_ids: Vec<u32> = (0..18).map(|i| i * 7 % 29).collect();
        let targets: Vec<i64> = (0..18).map(|i| if i % 5 == 0 { IGNORE } else { i % 11 }).collect();
        let starts: Vec<u32> = (0..18).map(|i| if i % 9 < 4 { 0 } else { 4 }).collect();
        let batch = Rows {
            vectors: None,
            pairs: false,
            rows: 2,
            seq_len: 9,
            input_ids: &input_ids,
            targets: &targets,
            document_starts: &starts,
        };
        let context = model.context(&starts, 9, &device);
        let logits = values(model.logits(model.hidden(ids_tensor(&input_ids, 2, 9, &device), &context, None)));
        let largest = |row: &[f32]| (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap() as i64;
        let expected: Vec<i64> = logits.chunks(config.vocab_size).map(largest).collect();
        let (losses, best) = model.answers(batch, &device);
        assert_eq!(best.try_into_vec_as::<i64>().unwrap(), expected, "{kind}");
        assert_eq!(values(losses), values(model.losses(batch, &device, None)), "{kind}");
    }
}
