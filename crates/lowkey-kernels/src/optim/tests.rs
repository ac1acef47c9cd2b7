//! Each pass against its reference and against f64, in place, and the same bits on any number of threads.

use std::slice::from_ref;

use burn::tensor::{DType, FloatDType, TensorData};

use super::*;
use crate::Precision;
use crate::fixtures::{is_cpu, plain_device};
use crate::reference::product;

/// Around one piece, several pieces with a rest, and none.
const LENGTHS: [usize; 6] = [0, 1, 37, 1 << 14, (1 << 14) + 1, 100_003];

fn sum_of_squares(x: Tensor<1>) -> f64 {
    sums_of_squares(&[x])[0]
}

fn tensor(values: Vec<f32>) -> Tensor<1> {
    let len = values.len();
    Tensor::from_data(TensorData::new(values, [len]), &plain_device())
}

fn host(tensor: &Tensor<1>) -> Vec<f32> {
    tensor.try_to_vec_as::<f32>().unwrap()
}

fn bits(tensors: &[Tensor<1>]) -> Vec<u32> {
    tensors.iter().flat_map(|tensor| host(tensor).into_iter().map(f32::to_bits)).collect()
}

/// Numbers of both signs over eight orders of magnitude, with zeros among them.
fn wide(len: usize, seed: u64) -> Tensor<1> {
    let mut state = seed;
    let mut below = |n: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % n
    };
    let mut draw = || (below(2001) as f32 / 1000.0 - 1.0) * 10f32.powi(below(9) as i32 - 6) * below(20).min(1) as f32;
    tensor((0..len).map(|_| draw()).collect())
}

fn on_threads<R: Send>(threads: usize, job: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(job)
}

const STEP: AdamWStep = AdamWStep { clip: 0.37, lr: 3e-3, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, step: 3 };

fn adamw_inputs(len: usize) -> [Tensor<1>; 4] {
    [wide(len, 1), wide(len, 2), wide(len, 3), wide(len, 4).square()]
}

#[test]
fn adamw_is_the_composition_of_its_operations() {
    for len in LENGTHS {
        for step in [STEP, AdamWStep { clip: 1.0, weight_decay: 0.0, step: 1, ..STEP }] {
            let [value, gradient, m, v] = adamw_inputs(len);
            let (a, b, c) = adamw(value.clone(), gradient.clone(), m.clone(), v.clone(), step, None);
            let before = [value.clone(), m.clone(), v.clone()];
            let (d, e, f) = reference::adamw(value, gradient, m, v, step);
            for ((what, found, expected), before) in [("value", a, d), ("m", b, e), ("v", c, f)].into_iter().zip(before)
            {
                let rows = host(&found).into_iter().zip(host(&expected)).zip(host(&before));
                for (i, ((found, expected), before)) in rows.enumerate() {
                    // Where a step nearly undoes what was there, each keeps its own rounding: GPUs divide to two units of it.
                    let size = expected.abs().max((expected - before).abs());
                    let off = (found - expected).abs();
                    assert!(off <= 1e-6 * size.max(1e-6), "{what}[{i}] of {len}: {found} for {expected}");
                }
            }
        }
    }
}

#[test]
fn many_parameters_are_stepped_as_each_by_itself() {
    // More than one launch takes, of uneven lengths, in two groups that lie mixed.
    for count in [1, 2, 17, 40] {
        let inputs = |i: usize| adamw_inputs(1 + i * 613 % 2000);
        let step = |i: usize| AdamWStep { weight_decay: if i.is_multiple_of(3) { 0.0 } else { 0.1 }, ..STEP };
        let found = adamw_each((0..count).map(|i| (inputs(i), step(i))).collect(), None);
        assert_eq!(found.len(), count);
        for (i, found) in found.into_iter().enumerate() {
            let [value, gradient, m, v] = inputs(i);
            let (value, m, v) = adamw(value, gradient, m, v, step(i), None);
            assert_eq!(bits(&found), bits(&[value, m, v]), "{i} of {count}");
        }
    }
    assert!(adamw_each(Vec::new(), None).is_empty());
}

const MUON: MuonStep = MuonStep { clip: 0.37, lr: 3e-3, momentum: 0.95, weight_decay: 0.1, precision: Precision::F32 };

/// Matrices one below the other: width, heights.
const STACKS: [(usize, &[usize]); 7] =
    [(1, &[1]), (7, &[3]), (5, &[12, 5]), (33, &[16, 48, 16, 48]), (64, &[64]), (200, &[31]), (96, &[300])];

fn gaussian(len: usize, seed: u64) -> Vec<f32> {
    // A device's generator would be one for all tests that run at once.
    let mut state = seed;
    let mut even = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f64 + 0.5) / f64::from(1 << 24)
    };
    let mut draw = || ((-2.0 * even().ln()).sqrt() * (std::f64::consts::TAU * even()).cos()) as f32;
    (0..len).map(|_| draw()).collect()
}

/// The iteration on one matrix in f64, the plain way: `x ← a·x + b·x xᵀ x + c·x xᵀ x xᵀ x`.
fn exact_orthogonal(x: &[f32], rows: usize, columns: usize) -> Vec<f64> {
    let times = |a: &[f64], b: &[f64], [m, n, k]: [usize; 3]| -> Vec<f64> {
        (0..m * n).map(|at| (0..k).map(|i| a[at / n * k + i] * b[i * n + at % n]).sum()).collect()
    };
    let norm = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let mut x: Vec<f64> = x.iter().map(|x| f64::from(*x) / norm).collect();
    for _ in 0..5 {
        let t: Vec<f64> = (0..x.len()).map(|at| x[at % rows * columns + at / rows]).collect();
        let gram = times(&x, &t, [rows, rows, columns]);
        let third = times(&gram, &x, [rows, columns, rows]);
        let fifth = times(&gram, &third, [rows, columns, rows]);
        for ((x, third), fifth) in x.iter_mut().zip(third).zip(fifth) {
            *x = 3.4445 * *x - 4.7750 * third + 2.0315 * fifth;
        }
    }
    x
}

/// The squares of the singular values of `x [rows, columns]`, largest first, by Jacobi rotations of the rows: they end
/// orthogonal, each as long as a singular value.
fn singular_values(x: &[f32], rows: usize, columns: usize) -> Vec<f64> {
    let mut x: Vec<Vec<f64>> = x.chunks(columns).map(|row| row.iter().map(|x| f64::from(*x)).collect()).collect();
    let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    for _ in 0..30 {
        for i in 0..rows {
            for j in i + 1..rows {
                let (a, b, c) = (dot(&x[i], &x[i]), dot(&x[j], &x[j]), dot(&x[i], &x[j]));
                let angle = 0.5 * (2.0 * c).atan2(a - b);
                let (sin, cos) = angle.sin_cos();
                let (head, tail) = x.split_at_mut(j);
                for (p, q) in head[i].iter_mut().zip(tail[0].iter_mut()) {
                    (*p, *q) = (cos * *p + sin * *q, cos * *q - sin * *p);
                }
            }
        }
    }
    let mut found: Vec<f64> = x.iter().map(|row| dot(row, row).sqrt()).collect();
    found.sort_by(|a, b| b.total_cmp(a));
    found.truncate(rows.min(columns));
    found
}

fn orthogonal(mut x: Vec<f32>, rows: usize, columns: usize) -> Vec<f32> {
    cpu::muon::orthogonalise(&mut x, rows, columns);
    x
}

#[test]
fn orthogonalising_is_the_iteration_in_double_precision() {
    for (rows, columns) in
        [(1, 1), (1, 9), (9, 1), (3, 5), (17, 17), (40, 23), (23, 40), (128, 64), (31, 200), (150, 300), (270, 260)]
    {
        let x = gaussian(rows * columns, 1);
        let expected = exact_orthogonal(&x, rows, columns);
        let plain = tensor(x.clone()).reshape([rows, columns]);
        let plain = host(&reference::orthogonalise(plain, &product).reshape([rows * columns]));
        let fused = orthogonal(x, rows, columns);
        for (what, found) in [("fused", fused), ("plain", plain)] {
            let off = found.iter().zip(&expected).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>().sqrt();
            let size = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
            assert!(off <= 1e-4 * size, "{what} {rows} × {columns}: off by {:.1e}", off / size);
        }
    }
}

#[test]
fn singular_values_end_near_one() {
    for (rows, columns) in [(1, 1), (1, 9), (9, 1), (3, 50), (24, 96), (96, 24), (32, 80)] {
        for scale in [1.0, 1e-20, 1e15] {
            let x: Vec<f32> = gaussian(rows * columns, 2).into_iter().map(|x| x * scale).collect();
            let found = singular_values(&orthogonal(x, rows, columns), rows, columns);
            assert!(found.iter().all(|s| (0.65..1.25).contains(s)), "{rows} × {columns} · {scale}: {found:?}");
        }
    }
}

#[test]
fn what_a_matrix_lacks_stays_absent() {
    // The product of 20 × 3 and 3 × 30: rank 3.
    let (left, right) = (gaussian(60, 3), gaussian(90, 4));
    let product = |at: usize| (0..3).map(|i| left[at / 30 * 3 + i] * right[i * 30 + at % 30]).sum();
    let found = singular_values(&orthogonal((0..600).map(product).collect(), 20, 30), 20, 30);
    assert!(found[..3].iter().all(|s| (0.65..1.25).contains(s)), "{found:?}");
    assert!(found[3..].iter().all(|s| *s < 1e-3), "{found:?}");
    assert_eq!(orthogonal(vec![0.0; 12], 3, 4), [0.0; 12]);
    assert_eq!(orthogonal(vec![1e-38; 12], 3, 4), [0.0; 12]);
    assert!(orthogonal(vec![f32::NAN; 12], 3, 4).iter().all(|x| x.is_nan()), "a bad number must not vanish");
}

#[test]
fn muon_is_the_composition_of_its_operations() {
    for (width, heights) in STACKS {
        let len = width * heights.iter().sum::<usize>();
        let inputs = || (tensor(gaussian(len, 5)), tensor(gaussian(len, 6)), tensor(gaussian(len, 7)));
        let (value, gradient, buffer) = inputs();
        let (found, found_buffer) = muon(value, gradient, buffer, width, heights, MUON, None);
        let (value, gradient, buffer) = inputs();
        let (expected, expected_buffer) = reference::muon(value, gradient, buffer, width, heights, MUON);
        for (found, expected) in [(found, expected), (found_buffer, expected_buffer)] {
            for (found, expected) in host(&found).into_iter().zip(host(&expected)) {
                assert!((found - expected).abs() <= 1e-5, "{width} {heights:?}: {found} for {expected}");
            }
        }
    }
}

#[test]
fn blocks_are_matrices_of_their_own() {
    let (width, heights) = (33, [16, 48, 5]);
    let len = width * 69;
    let [value, gradient, buffer] = [8, 9, 10].map(|seed| tensor(gaussian(len, seed)));
    let (whole, _) = muon(value.clone(), gradient.clone(), buffer.clone(), width, &heights, MUON, None);
    let mut at = 0;
    let parts = heights.map(|height| {
        let part = |x: &Tensor<1>| x.clone().narrow(0, at * width, height * width);
        let (value, _) = muon(part(&value), part(&gradient), part(&buffer), width, &[height], MUON, None);
        at += height;
        value
    });
    assert_eq!(bits(&[whole]), bits(&parts));
}

#[test]
fn a_tensor_with_one_handle_is_updated_where_it_lies() {
    // A GPU tells no addresses.
    if !is_cpu() {
        return;
    }
    let [value, gradient, m, v] = adamw_inputs(1000);
    let all = |tensors: [&Tensor<1>; 3]| tensors.map(|tensor| address(tensor).unwrap());
    let before = all([&value, &m, &v]);
    let (value, m, v) = adamw(value, gradient.clone(), m, v, STEP, None);
    assert_eq!(all([&value, &m, &v]), before);
    let (value, m) = muon(value, gradient.clone(), m, 50, &[20], MUON, None);
    assert_eq!([&value, &m].map(|tensor| address(tensor).unwrap()), [before[0], before[1]]);
    let sum = accumulate(value, vec![gradient.clone(), m]);
    assert_eq!(address(&sum).unwrap(), before[0]);

    // One that has another owner is not.
    let (kept, shared) = (bits(from_ref(&gradient)), gradient.clone());
    let sum = accumulate(shared, vec![sum]);
    assert_ne!(address(&sum), address(&gradient));
    assert_eq!(bits(&[gradient]), kept);
}

#[test]
fn a_view_counts_as_its_own_numbers() {
    let whole = wide(300, 5);
    let part = || whole.clone().narrow(0, 100, 50);
    let copy = || tensor(host(&part()));
    assert_eq!(bits(&[accumulate(part(), vec![part()])]), bits(&[accumulate(copy(), vec![copy()])]));
    assert_eq!(sum_of_squares(part()).to_bits(), sum_of_squares(copy()).to_bits());
    let step = |x: &dyn Fn() -> Tensor<1>| {
        let (value, m, v) = adamw(x(), x(), x(), x().square(), STEP, None);
        bits(&[value, m, v])
    };
    assert_eq!(step(&part), step(&copy));
}

#[test]
fn gradients_are_added_in_their_order() {
    for len in LENGTHS {
        let parts = || (0..4).map(|seed| wide(len, 10 + seed));
        let mut all = parts();
        let sum = accumulate(all.next().unwrap(), all.collect());
        let expected = parts().reduce(|a, b| a + b).unwrap();
        assert_eq!(bits(&[sum]), bits(&[expected]), "{len}");
    }
    assert_eq!(host(&accumulate(tensor(vec![1.0]), Vec::new())), [1.0]);
}

#[test]
fn squares_are_summed_in_double_precision() {
    for len in LENGTHS {
        // A GPU adds parts of the sum in f32.
        let (size, tolerance) = if is_cpu() { (1e18, 1e-12) } else { (1e12, 1e-6) };
        let x = wide(len, 6) * size;
        let (found, expected) = (sum_of_squares(x.clone()), reference::sum_of_squares(x));
        assert!((found - expected).abs() <= tolerance * expected, "{len}: {found} for {expected}");
    }
    let several = [tensor(vec![3.0, 4.0]), tensor(Vec::new()), tensor(vec![-1.0])];
    assert_eq!(sums_of_squares(&several), [25.0, 0.0, 1.0]);
    assert!(sums_of_squares(&[]).is_empty());
    assert!(sum_of_squares(tensor(vec![1.0, f32::NAN])).is_nan());
    assert_eq!(sum_of_squares(tensor(vec![1.0, f32::NEG_INFINITY])), f64::INFINITY);
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let all = || {
        let [value, gradient, m, v] = adamw_inputs(100_003);
        let (value, m, v) = adamw(value, gradient.clone(), m, v, STEP, None);
        let sum = accumulate(gradient.clone(), vec![value.clone(), m.clone()]);
        // One block that several threads share, and many of which each takes some.
        let [a, b, c] = [1, 2, 3].map(|seed| tensor(gaussian(300 * 200, seed)));
        let (one, _) = muon(a.clone(), b.clone(), c.clone(), 200, &[300], MUON, None);
        let (many, buffer) = muon(a, b, c, 200, &[60; 5], MUON, None);
        (bits(&[value, m, v, sum, one, many, buffer]), sum_of_squares(gradient).to_bits())
    };
    let one = on_threads(1, all);
    assert!([2, 3, 7].into_iter().all(|threads| on_threads(threads, all) == one));
}

#[test]
fn other_formats_take_the_reference() {
    let wider = |x: &Tensor<1>| x.clone().cast(FloatDType::F64);
    let [value, gradient, m, v] = adamw_inputs(50);
    let (found, ..) = adamw(wider(&value), wider(&gradient), wider(&m), wider(&v), STEP, None);
    let (expected, ..) = adamw(value.clone(), gradient, m, v, STEP, None);
    assert_eq!(found.dtype(), DType::F64);
    for (found, expected) in host(&found.cast(FloatDType::F32)).into_iter().zip(host(&expected)) {
        assert!((found - expected).abs() <= 1e-6 * expected.abs().max(1.0), "{found} for {expected}");
    }
    assert_eq!(accumulate(wider(&value), vec![wider(&value)]).dtype(), DType::F64);
    assert!(sum_of_squares(wider(&value)) > 0.0);
}

const TERMS: Terms = Terms { mean: 0.125, scale: 1.0, limit: Some(0.5) };

/// The judgement of gradients on a GPU; none on the CPU, which is said.
fn judged(losses: &[f32], gradients: &[Tensor<1>], terms: Terms, before: Option<&Gate>) -> Option<(Gate, Judgement)> {
    let Some(gate) = Gate::of(&tensor(losses.to_vec()), gradients, terms, before) else {
        assert!(is_cpu(), "a GPU judges its gradients itself");
        println!("skipped: the CPU has nothing to wait for");
        return None;
    };
    let (judgement, beside) = gate.ask(vec![tensor(vec![0.25]), tensor(vec![-8.0])]).wait().unwrap();
    assert_eq!(beside, [0.25, -8.0]);
    Some((gate, judgement))
}

#[test]
fn a_gpu_judges_a_step_as_the_host_does() {
    for count in [1, 3, 300] {
        let gradients: Vec<_> = (0..count).map(|i| wide(1 + (i * 7919) % 3000, i as u64) * 0.01).collect();
        let norm = sums_of_squares(&gradients).iter().sum::<f64>().sqrt();
        for (scale, limit) in [(1.0, None), (1024.0, Some(0.5)), (1.0, Some(norm * 0.5)), (1.0, Some(norm * 2.0))] {
            let terms = Terms { scale, limit, ..TERMS };
            let Some((gate, found)) = judged(&[8.0, 12.0], &gradients, terms, None) else { return };
            let expected = Judgement { loss: 2.5, norm: norm / scale, fault: None };
            assert_eq!((found.loss, found.fault), (expected.loss, None));
            assert!((found.norm / expected.norm - 1.0).abs() < 1e-6, "{} for {}", found.norm, expected.norm);
            let factor = limit.map_or(1.0, |limit| clip_factor(expected.norm, limit)) / scale;
            let numbers = host(&gate.numbers);
            assert!((f64::from(numbers[0]) / factor - 1.0).abs() < 1e-6, "{} for {factor}", numbers[0]);
            assert_eq!(numbers[1], 0.0);
        }
    }
}

#[test]
fn a_shut_gate_keeps_all_as_it_was_until_it_is_judged_anew() {
    let good = [wide(40, 1), wide(300, 2), wide(7, 3)];
    let spoilt = |i: usize, with: &[f32]| {
        let mut all = good.clone();
        all[i] = Tensor::cat(vec![all[i].clone(), tensor(with.to_vec())], 0);
        all
    };
    let cases = [
        (8.0, good.clone(), None),
        (f32::NAN, good.clone(), Some(Fault::Loss)),
        (f32::INFINITY, spoilt(1, &[f32::NAN]), Some(Fault::Loss)),
        (8.0, spoilt(0, &[f32::INFINITY]), Some(Fault::Gradient(0))),
        (8.0, spoilt(2, &[f32::NAN]), Some(Fault::Gradient(2))),
        (8.0, spoilt(1, &[2e19]), Some(Fault::Gradient(1))),
        (8.0, good.clone().map(|_| tensor(vec![1.4e19; 1])), Some(Fault::Norm)),
    ];
    for (loss, gradients, fault) in cases {
        let Some((gate, found)) = judged(&[loss], &gradients, TERMS, None) else { return };
        assert_eq!(found.fault, fault, "{loss} {}", found.norm);
        let (after, next) = judged(&[8.0], &good, TERMS, Some(&gate)).unwrap();
        assert_eq!(next.fault, None, "what follows is not at fault itself");
        for gate in [gate, after] {
            let [value, gradient, m, v] = adamw_inputs(600);
            let before = bits(&[value.clone(), m.clone(), v.clone()]);
            let (a, b, c) = adamw(value.clone(), gradient.clone() * f32::NAN, m.clone(), v, STEP, Some(&gate));
            assert_eq!(bits(&[a, b, c]) == before, fault.is_some());
            let (a, b) = muon(value.clone(), gradient * f32::NAN, m.clone(), 60, &[4, 6], MUON, Some(&gate));
            assert_eq!(bits(&[a, b]) == bits(&[value, m]), fault.is_some());
        }
    }
}

#[test]
fn a_gates_factor_is_one_on_the_gradient() {
    let gradients = [wide(600, 2)];
    let Some((gate, found)) = judged(&[8.0], &gradients, TERMS, None) else { return };
    let factor = clip_factor(found.norm, 0.5);
    assert!(factor < 1.0);
    let [value, gradient, m, v] = adamw_inputs(600);
    let by_gate = adamw(value.clone(), gradient.clone(), m.clone(), v.clone(), STEP, Some(&gate));
    let by_hand = reference::adamw(value.clone(), gradient.clone() * factor, m.clone(), v, STEP);
    let (a, b) = muon(value.clone(), gradient.clone(), m.clone(), 60, &[4, 6], MUON, Some(&gate));
    let (c, d) = reference::muon(value, gradient * factor, m, 60, &[4, 6], MUON);
    for (found, expected) in [(by_gate.0, by_hand.0), (by_gate.1, by_hand.1), (by_gate.2, by_hand.2), (a, c), (b, d)] {
        for (found, expected) in host(&found).into_iter().zip(host(&expected)) {
            assert!((found - expected).abs() <= 2e-5 * expected.abs().max(1e-3), "{found} for {expected}");
        }
    }
}
