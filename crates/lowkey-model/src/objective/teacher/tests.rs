//! Distances and their slopes against torch's (`tests/reference/objectives.py`).

use burn::tensor::TensorData;
use serde::Deserialize;

use super::*;
use crate::fixtures::values;

#[derive(Deserialize)]
struct Case {
    beta: f64,
    temperature: f64,
    /// 0: the whole vocabulary.
    top: usize,
    student: Vec<f32>,
    teacher: Vec<f32>,
    loss: f64,
    slopes: Vec<f64>,
}

#[derive(Deserialize)]
struct Cases {
    distances: Vec<Case>,
}

#[test]
fn distances_are_those_of_torch_to_six_digits() {
    let text = include_str!("../../../../../tests/reference/objectives.json");
    let cases = serde_json::from_str::<Cases>(text).unwrap().distances;
    assert!(cases.iter().filter(|case| case.top > 0).count() >= 30);
    let device = Device::flex().autodiff();
    for case in cases {
        let vocab = case.student.len();
        let row = |logits: &[f32]| Tensor::<2>::from_data(TensorData::new(logits.to_vec(), [1, vocab]), &device);
        // A head that is the identity: hidden states are logits.
        let head = Tensor::<2>::eye(vocab, &device);
        let hidden = row(&case.student).require_grad();
        let mut top = TopTokens { k: case.top, ..TopTokens::default() };
        if case.top > 0 {
            push_top(&mut top, &case.teacher, case.temperature);
        }
        let teacher = match case.top {
            0 => loss::Teacher::Whole(row(&case.teacher), head.clone()),
            _ => loss::Teacher::Top(&top),
        };
        let divergence = Divergence { beta: case.beta, temperature: case.temperature, share: 1.0 };
        let sum = diverge_sum(hidden.clone(), head, teacher, &[1], divergence);
        let slopes = values(hidden.grad(&sum.backward()).unwrap().reshape([vocab]));
        let what = format!("beta {}, temperature {}, top {} of {vocab}", case.beta, case.temperature, case.top);
        let found = f64::from(values(sum)[0]);
        assert!((found - case.loss).abs() < 1e-6 * case.loss.max(1.0), "{what}: {found} {}", case.loss);
        for (found, expected) in slopes.iter().zip(&case.slopes) {
            assert!(
                (f64::from(*found) - expected).abs() < 1e-6 * expected.abs().max(1.0),
                "{what}: {found} {expected}"
            );
        }
    }
}

#[test]
fn the_likeliest_tokens_come_first_and_everything_adds_up_to_one() {
    let mut top = TopTokens { k: 2, ..TopTokens::default() };
    push_top(&mut top, &[0.5, 3.0, -1.0, 3.0, 2.0], 2.0);
    push_top(&mut top, &[0.0, -1000.0, -1000.0, -1001.0, -1000.0], 1.0);
    assert_eq!(top.ids, [1, 3, 0, 1]);
    let sums: Vec<f32> = top.log_probs.chunks(3).map(|row| row.iter().map(|x| x.exp()).sum()).collect();
    assert!(sums.iter().all(|sum| (sum - 1.0).abs() < 1e-6), "{sums:?}");
    assert_eq!(top.log_probs[5], -80.0);
}
