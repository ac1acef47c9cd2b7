//! Attention from a cache in every format against its reference, on odd shapes.

use super::*;
use crate::fixtures::{assert_close, host, is_cpu, plain_device};
use burn::tensor::Distribution;

fn random(n: usize) -> Tensor<1> {
    Tensor::random([n], Distribution::Normal(0.0, 1.0), &plain_device())
}

/// The numbers in every format that a cache has.
fn formats<const D: usize>(x: &Tensor<D>, split: usize) -> Vec<(&'static str, Stored<D>)> {
    // Graphics APIs have no integers of 8 bits, and some GPUs no bf16.
    let has = |dtype| is_cpu() || plain_device().supports_dtype(dtype);
    let mut all = vec![("f32", Stored::Float(x.clone()))];
    if has(DType::BF16) {
        all.push(("bf16", Stored::Float(x.clone().cast(FloatDType::BF16))));
    }
    if has(DType::F16) {
        all.push(("f16", Stored::Float(x.clone().cast(FloatDType::F16))));
    }
    if has(DType::I8) {
        all.push(("int8", Stored::quantise(x.clone(), split)));
    }
    all
}

/// The filled part of a longer buffer, as a cache gives it.
fn filled(stored: Stored<3>, keys: usize) -> Stored<3> {
    match stored {
        Stored::Float(x) => Stored::Float(x.narrow(1, 0, keys)),
        Stored::Int8 { codes, scales, split } => {
            Stored::Int8 { codes: codes.narrow(1, 0, keys), scales: scales.narrow(1, 0, keys), split }
        }
    }
}

/// The numbers as plain tensor operations read them.
fn plain<const D: usize>(stored: Stored<D>) -> Tensor<D> {
    match stored {
        Stored::Float(x) => x.cast(FloatDType::F32),
        Stored::Int8 { codes, scales, split } => reference::widen(codes, scales, split),
    }
}

#[test]
fn absorbed_attention_agrees_for_one_query_and_for_many_in_every_format() {
    plain_device().seed(25);
    for (seq, heads, [nope, rope, value, rank]) in [
        (1, 1, [1, 0, 1, 1]),
        (1, 16, [32, 16, 32, 128]),
        (1, 3, [24, 12, 12, 20]),
        (1, 70, [4, 3, 5, 33]),
        (5, 3, [24, 12, 12, 20]),
        (30, 7, [4, 2, 3, 16]),
    ] {
        let (latent_scale, latent_eps, interleave) = (1.0, 1e-6, false);
        let dims = MlaDims { heads, nope, rope, value, rank, scale: 0.3, latent_scale, latent_eps, interleave };
        for (offsets, capacity) in [(vec![0], 30), (vec![127], 200), (vec![128, 3, 700], 800), (vec![1500], 1600)] {
            let (batch, width) = (offsets.len(), rank + rope);
            let keys = offsets.iter().max().unwrap() + seq;
            let q = random(batch * seq * heads * (nope + rope)).reshape([batch, seq, heads, nope + rope]);
            let kv_b = random(heads * (nope + value) * rank).reshape([heads * (nope + value), rank]);
            let mapped = random(batch * seq * heads * width).reshape([batch, seq, heads, width]);
            let cache = random(batch * capacity * width).reshape([batch, capacity, width]);
            for (format, cache) in formats(&cache, rank) {
                let cache = filled(cache, keys);
                for (q, kv_b) in [(q.clone(), Some(kv_b.clone())), (mapped.clone(), None)] {
                    let latents = plain(cache.clone());
                    let expected = reference::absorbed_attention(q.clone(), latents, kv_b.clone(), &offsets, dims);
                    for threads in [1, 2, 5] {
                        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                        let run = || absorbed_attention(q.clone(), cache.clone(), kv_b.clone(), &offsets, dims);
                        let found = pool.install(run);
                        let what = format!("{seq} {dims:?} {offsets:?} {format}, maps: {}, {threads}", kv_b.is_some());
                        assert_close(&what, host(found), host(expected.clone()));
                    }
                }
            }
        }
    }
}

#[test]
fn numbers_of_every_format_widen_as_plain_operations_widen_them() {
    plain_device().seed(26);
    for split in [1, 5, 7] {
        let x = random(2 * 3 * 600 * 7).reshape([2, 3, 600, 7]);
        for (format, stored) in formats(&x, split) {
            let view = match stored {
                Stored::Float(x) => Stored::Float(x.narrow(2, 0, 555)),
                Stored::Int8 { codes, scales, split } => {
                    Stored::Int8 { codes: codes.narrow(2, 0, 555), scales: scales.narrow(2, 0, 555), split }
                }
            };
            let expected = host(plain(view.clone()));
            assert_eq!(host(view.clone().widen(DType::F32)), expected, "{format}, split {split}");
            assert_eq!(host(view.widen(DType::F64)), expected, "{format}, split {split}, through f64");
        }
    }
}

#[test]
fn codes_and_scales_are_those_of_plain_operations() {
    let device = plain_device();
    if !is_cpu() && !device.supports_dtype(DType::I8) {
        return;
    }
    device.seed(27);
    let x = random(11 * 9).reshape([11, 9]);
    let odd = Tensor::<2>::from_floats([[0.0, 0.0, 1.0, f32::NAN, 2.0, 0.0, 0.0, f32::INFINITY, 1.0]], &device);
    let x = Tensor::cat(vec![x, odd, Tensor::zeros([1, 9], &device)], 0);
    for split in [3, 9] {
        let Stored::Int8 { codes, scales, .. } = Stored::quantise(x.clone(), split) else { panic!() };
        let (expected_codes, expected_scales) = reference::quantise(x.clone(), split);
        let integers = |codes: Tensor<2, Int>| codes.try_into_vec_as::<i64>().unwrap();
        assert_eq!(integers(codes), integers(expected_codes));
        for (found, expected) in host(scales).into_iter().zip(host(expected_scales)) {
            assert!(found == expected || found.is_nan() && expected.is_nan(), "{found} {expected}");
        }
        let wide = Stored::quantise(x.clone().cast(FloatDType::F64), split);
        let Stored::Int8 { codes, scales, .. } = wide else { panic!() };
        assert_eq!((codes.dtype(), scales.dtype()), (DType::I8, DType::F32));
    }
}
