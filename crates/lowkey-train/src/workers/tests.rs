use lowkey_batch::{Batch, IGNORE};
use lowkey_model::ModelConfig;

use super::*;
use crate::fixtures::{bits, model, model_config, passes, uneven_batch, values};

const VOCAB: usize = 29;

/// Loss and gradients of a batch in one pass, without threads.
fn single_pass(model: &CausalLm, batch: &Batch, device: &Device) -> (f64, Vec<Tensor<1>>) {
    let loss = model.loss(batch.all(), 0.0, device);
    let mean = loss.nats / loss.targets as f64;
    let mut gradients = mean.backward();
    (f64::from(mean.into_scalar::<f32>()), model.take_gradients(&mut gradients))
}

/// ‖a − b‖ / ‖b‖
fn relative(a: &Tensor<1>, b: &Tensor<1>) -> f64 {
    let (a, b) = (values(a), values(b));
    let square = |x: f32| f64::from(x).powi(2);
    let difference: f64 = a.iter().zip(&b).map(|(a, b)| square(a - b)).sum();
    let size: f64 = b.iter().map(|b| square(*b)).sum();
    (difference / size.max(f64::MIN_POSITIVE)).sqrt()
}

fn agree(case: &str, model: &CausalLm, found: &[Tensor<1>], expected: &[Tensor<1>], limit: f64) {
    let parameters = model.parameters();
    assert_eq!((found.len(), expected.len()), (parameters.len(), parameters.len()), "{case}");
    for ((parameter, found), expected) in parameters.iter().zip(found).zip(expected) {
        let error = relative(found, expected);
        assert!(error < limit, "{case}: gradient of {} is off by {error:.1e}", parameter.name);
    }
}

#[test]
fn any_number_of_threads_and_passes_gives_the_gradient_of_the_mean_over_all_targets() {
    let device = Device::flex().autodiff();
    let model = model(VOCAB, 16, 5, &device);
    let batch = uneven_batch(5, 13, VOCAB, 1);
    let per_row: Vec<usize> =
        batch.targets.chunks(13).map(|row| row.iter().filter(|t| **t != IGNORE).count()).collect();
    assert!(per_row[0] == 13 && per_row[4] < 8, "targets must be spread unevenly: {per_row:?}");
    let (loss, gradients) = single_pass(&model, &batch, &device);
    for threads in [1, 2, 3] {
        for micro_batch in [1, 2, 5] {
            let case = format!("{threads} threads, passes of {micro_batch}");
            let workers = Workers::new(threads, micro_batch).unwrap();
            let found = workers.gradients(&model, &batch, passes(micro_batch), &device);
            assert_eq!(found.targets, batch.target_tokens(), "{case}");
            let found_loss = found.loss().unwrap();
            assert!((found_loss / loss - 1.0).abs() < 1e-6, "{case}: loss {found_loss} for {loss}");
            agree(&case, &model, &found.gradients, &gradients, 5e-6);
        }
    }
}

#[test]
fn a_pair_is_never_parted() {
    let device = Device::flex().autodiff();
    let model = model(VOCAB, 16, 5, &device);
    let batch = Batch { pairs: true, ..uneven_batch(8, 9, VOCAB, 1) };
    let (loss, _) = single_pass(&model, &batch, &device);
    for (threads, micro_batch) in [(1, 1), (2, 4), (3, 3), (3, 8), (5, 6)] {
        let workers = Workers::new(threads, micro_batch).unwrap();
        for rows in [2, 4, 6, 8] {
            let shares = workers.shares(rows, batch.unit());
            assert!(shares.iter().all(|(from, to)| from % 2 == 0 && to % 2 == 0 && from < to), "{shares:?}");
            assert_eq!(shares.iter().map(|(from, to)| to - from).sum::<usize>(), rows);
        }
        let found = workers.gradients(&model, &batch, passes(micro_batch), &device);
        assert!((found.loss().unwrap() / loss - 1.0).abs() < 1e-6, "{threads} {micro_batch}");
    }
}

#[test]
fn a_share_without_targets_adds_nothing() {
    let device = Device::flex().autodiff();
    let model = model(VOCAB, 16, 5, &device);
    let mut batch = uneven_batch(3, 9, VOCAB, 2);
    batch.targets[9..18].fill(IGNORE);
    let (loss, gradients) = single_pass(&model, &batch, &device);
    let found = Workers::new(3, 3).unwrap().gradients(&model, &batch, passes(3), &device);
    assert!((found.loss().unwrap() / loss - 1.0).abs() < 1e-6);
    // So few targets cancel less of the rounding.
    agree("a row without targets", &model, &found.gradients, &gradients, 5e-6);

    batch.targets.fill(IGNORE);
    let found = Workers::new(2, 3).unwrap().gradients(&model, &batch, passes(3), &device);
    assert_eq!((found.loss().unwrap(), found.targets), (0.0, 0));
    assert!(found.gradients.iter().all(|g| values(g).iter().all(|x| *x == 0.0)));
}

#[test]
fn the_same_number_of_threads_gives_the_same_bits() {
    let device = Device::flex().autodiff();
    // Large enough for matrix products that several threads share.
    let mut config = ModelConfig { hidden_size: 96, ..model_config(300, 128) };
    config.layers.resize(1).unwrap();
    config.layers.iter_mut().for_each(|layer| layer.mlp.intermediate_size = 640);
    let model = CausalLm::init(&config, 7, &device);
    let batch = uneven_batch(4, 128, 300, 3);
    for (threads, micro_batch) in [(1, 4), (2, 4), (3, 4), (3, 1), (2, 3)] {
        let run = || {
            let workers = Workers::new(threads, micro_batch).unwrap();
            let found = workers.gradients(&model, &batch, passes(micro_batch), &device);
            (found.loss().unwrap().to_bits(), bits(&found.gradients))
        };
        let first = run();
        assert!((0..3).all(|_| run() == first), "{threads} threads, passes of {micro_batch}");
    }
}

#[test]
fn results_come_in_the_order_of_the_items() {
    let workers = Workers::new(3, 3).unwrap();
    let items: Vec<u64> = (0..20).collect();
    let squares = workers.map(&items, |x| {
        // The first ones end last.
        std::thread::sleep(std::time::Duration::from_micros(200 * (20 - x)));
        x * x
    });
    assert_eq!(squares, items.iter().map(|x| x * x).collect::<Vec<_>>());
    assert!(workers.map(&[] as &[u64], |x| *x).is_empty());
}

#[test]
fn the_ceiling_of_matrix_products_is_plausible() {
    for threads in [1, 2] {
        let rate = matmul_ceiling(threads, &Device::flex(), Precision::F32).unwrap();
        assert!(rate.is_finite() && rate > 1e8 && rate < 1e15, "{rate:e} operations per second with {threads} threads");
    }
}
