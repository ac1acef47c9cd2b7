//! Matrix units against plain ones.

use super::*;
use crate::fixtures::{is_cpu, plain_device};
use burn::tensor::{Distribution, FloatDType, Int, Tensor, TensorData};

/// Numbers that f16 holds exactly.
fn random<const D: usize>(shape: [usize; D], dtype: FloatDType) -> CubeTensor {
    let x = Tensor::<D>::random(shape, Distribution::Normal(0.0, 1.0), &plain_device());
    x.cast(dtype).cast(FloatDType::F32).try_into_primitive::<CubeBackend>().unwrap()
}

/// `‖a − b‖ / ‖b‖`, with a floor where everything cancels.
fn distance(a: &CubeTensor, b: &CubeTensor) -> f64 {
    let host = |x: &CubeTensor| {
        let count = x.meta.num_elements();
        let flat = cast(reshaped(x.clone(), [count]), DType::F32);
        Tensor::<1>::from_primitive::<CubeBackend>(flat).try_into_vec_as::<f32>().unwrap()
    };
    let (a, b) = (host(a), host(b));
    let square = |x: f32| f64::from(x).powi(2);
    let off: f64 = a.iter().zip(&b).map(|(a, b)| square(a - b)).sum();
    let size: f64 = b.iter().map(|x| square(*x)).sum();
    off.sqrt() / size.sqrt().max(1e-3 * (b.len() as f64).sqrt())
}

struct Case {
    batch: usize,
    seq: usize,
    heads: usize,
    groups: usize,
    nope: usize,
    rope: usize,
    value: usize,
    scale: f64,
    /// Length of the documents; 0: one.
    document: usize,
}

const CASES: [Case; 6] = [
    Case { batch: 1, seq: 1, heads: 1, groups: 1, nope: 8, rope: 8, value: 8, scale: 0.3, document: 0 },
    Case { batch: 2, seq: 7, heads: 2, groups: 2, nope: 16, rope: 8, value: 40, scale: 0.2, document: 0 },
    Case { batch: 1, seq: 130, heads: 2, groups: 2, nope: 24, rope: 0, value: 48, scale: 0.2, document: 37 },
    Case { batch: 1, seq: 257, heads: 4, groups: 2, nope: 40, rope: 8, value: 24, scale: 0.15, document: 0 },
    // Scores of ± 60: the maximum outgrows what the exponentials refer to, again and again.
    Case { batch: 1, seq: 255, heads: 1, groups: 1, nope: 20, rope: 13, value: 31, scale: 3.0, document: 0 },
    Case { batch: 1, seq: 96, heads: 1, groups: 1, nope: 64, rope: 32, value: 96, scale: 0.1, document: 50 },
];

fn starts(case: &Case) -> CubeTensor {
    let of_row = (0..case.seq).map(|t| t.checked_div(case.document).map_or(0, |i| (i * case.document) as i32));
    let values: Vec<i32> = (0..case.batch).flat_map(|_| of_row.clone()).collect();
    let starts = Tensor::<2, Int>::from_data(TensorData::new(values, [case.batch, case.seq]), &plain_device());
    starts.cast(burn::tensor::IntDType::I32).try_into_primitive::<CubeBackend>().unwrap()
}

/// Matrix units against plain ones: values, log-sum-exps, all gradients.
fn check(precision: Precision, dtype: FloatDType, most: f64) {
    let mut seen = 0;
    for (i, case) in CASES.iter().enumerate() {
        let &Case { batch, seq, heads, groups, nope, rope, value, scale, .. } = case;
        let q = random([batch, seq, heads, nope + rope], dtype);
        let kv = random([batch, seq, groups, nope + value], dtype);
        let k_pe = if rope > 0 { random([batch, seq, rope], dtype) } else { random([1, 1, 1], dtype) };
        let grad = random([batch, seq, heads * value], dtype);
        let starts = starts(case);
        let shape = AttentionShape { nope, rope, scale, precision };
        let sizes = Attention::new(&q, &kv, shape);
        let run = |way: Way| {
            let inputs = [q.clone(), kv.clone(), k_pe.clone(), starts.clone()];
            let (out, lse) = sizes.forward_by(way, inputs);
            let [q, kv, k_pe, starts] = [q.clone(), kv.clone(), k_pe.clone(), starts.clone()];
            let saved = AttentionState { q, kv, k_pe, starts, out: out.clone(), lse: lse.clone(), shape };
            let [d_q, d_kv, d_pe] = sizes.backward_by(way, saved, grad.clone());
            [("out", out), ("lse", lse), ("d_q", d_q), ("d_kv", d_kv), ("d_pe", d_pe)]
        };
        let plain = run(Way::Tiles);
        let mut ways: Vec<Way> = sizes.ways(&q).into_iter().skip(1).map(|(_, way)| way).collect();
        // Rows shared by several units, as where planes are larger than rows of a product.
        if let Some(Way::Units(geometry, dtype)) = ways.first().copied() {
            ways.push(Way::Units(Geometry { spread: 2, ..geometry }, dtype));
        }
        for way in ways {
            seen += 1;
            for ((name, found), (_, expected)) in run(way).iter().zip(&plain) {
                let off = distance(found, expected);
                assert!(off <= most, "case {i}, {name}, {way:?}: {off:.1e}");
            }
        }
    }
    println!("{seen} ways compared");
}

#[test]
fn matrix_units_of_f16_follow_plain_ones() {
    if is_cpu() || !plain_device().supports_dtype(DType::F16) {
        return println!("skipped: there is no GPU that calculates in f16");
    }
    check(Precision::F16, FloatDType::F16, 2e-3);
}

#[test]
fn matrix_units_of_bf16_follow_plain_ones() {
    if is_cpu() || !plain_device().supports_dtype(DType::BF16) {
        return println!("skipped: there is no GPU that calculates in bf16");
    }
    check(Precision::Bf16, FloatDType::BF16, 1.5e-2);
}
