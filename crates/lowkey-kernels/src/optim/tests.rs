//! Each pass against its reference and against f64, in place, and the same bits on any number of threads.

use std::slice::from_ref;

use burn::tensor::{DType, Device, FloatDType, TensorData};

use super::*;

/// Around one piece, several pieces with a rest, and none.
const LENGTHS: [usize; 6] = [0, 1, 37, 1 << 14, (1 << 14) + 1, 100_003];

fn tensor(values: Vec<f32>) -> Tensor<1> {
    let len = values.len();
    Tensor::from_data(TensorData::new(values, [len]), &Device::flex())
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
            let (a, b, c) = adamw(value.clone(), gradient.clone(), m.clone(), v.clone(), step);
            let (d, e, f) = reference::adamw(value, gradient, m, v, step);
            for (what, found, expected) in [("value", a, d), ("m", b, e), ("v", c, f)] {
                for (i, (found, expected)) in host(&found).into_iter().zip(host(&expected)).enumerate() {
                    let off = (found - expected).abs();
                    assert!(off <= 1e-6 * expected.abs().max(1e-6), "{what}[{i}] of {len}: {found} for {expected}");
                }
            }
        }
    }
}

#[test]
fn a_tensor_with_one_handle_is_updated_where_it_lies() {
    let [value, gradient, m, v] = adamw_inputs(1000);
    let all = |tensors: [&Tensor<1>; 3]| tensors.map(|tensor| address(tensor).unwrap());
    let before = all([&value, &m, &v]);
    let (value, m, v) = adamw(value, gradient.clone(), m, v, STEP);
    assert_eq!(all([&value, &m, &v]), before);
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
        let (value, m, v) = adamw(x(), x(), x(), x().square(), STEP);
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
        let x = wide(len, 6) * 1e18;
        let (found, expected) = (sum_of_squares(x.clone()), reference::sum_of_squares(x));
        assert!((found - expected).abs() <= 1e-12 * expected, "{len}: {found} for {expected}");
    }
    assert!(sum_of_squares(tensor(vec![1.0, f32::NAN])).is_nan());
    assert_eq!(sum_of_squares(tensor(vec![1.0, f32::NEG_INFINITY])), f64::INFINITY);
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let all = || {
        let [value, gradient, m, v] = adamw_inputs(100_003);
        let (value, m, v) = adamw(value, gradient.clone(), m, v, STEP);
        let sum = accumulate(gradient.clone(), vec![value.clone(), m.clone()]);
        (bits(&[value, m, v, sum]), sum_of_squares(gradient).to_bits())
    };
    let one = on_threads(1, all);
    assert!([2, 3, 7].into_iter().all(|threads| on_threads(threads, all) == one));
}

#[test]
fn other_formats_take_the_reference() {
    let wider = |x: &Tensor<1>| x.clone().cast(FloatDType::F64);
    let [value, gradient, m, v] = adamw_inputs(50);
    let (found, ..) = adamw(wider(&value), wider(&gradient), wider(&m), wider(&v), STEP);
    let (expected, ..) = adamw(value.clone(), gradient, m, v, STEP);
    assert_eq!(found.dtype(), DType::F64);
    for (found, expected) in host(&found.cast(FloatDType::F32)).into_iter().zip(host(&expected)) {
        assert!((found - expected).abs() <= 1e-6 * expected.abs().max(1.0), "{found} for {expected}");
    }
    assert_eq!(accumulate(wider(&value), vec![wider(&value)]).dtype(), DType::F64);
    assert!(sum_of_squares(wider(&value)) > 0.0);
}
