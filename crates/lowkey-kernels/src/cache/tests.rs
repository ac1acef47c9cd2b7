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
        (32, 3, [24, 12, 12, 20]),
        (71, 2, [5, 0, 3, 17]),
    ] {
        let (latent_scale, latent_eps, interleave) = (1.0, 1e-6, false);
        let dims = MlaDims { heads, nope, rope, value, rank, scale: 0.3, latent_scale, latent_eps, interleave };
        for (offsets, capacity) in
            [(vec![0], seq.max(30)), (vec![127], 200), (vec![128, 3, 700], 800), (vec![1500], 1600)]
        {
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

/// Queries and keys of a chunk, the keys the filled part of a longer cache.
fn chunk(
    [batch, seq, keys]: [usize; 3],
    [heads, groups]: [usize; 2],
    [nope, rope, value]: [usize; 3],
) -> (Tensor<4>, Keys) {
    let four = |[a, b, c, d]: [usize; 4]| random(a * b * c * d).reshape([a, b, c, d]);
    let capacity = keys + 9;
    // As a map from latents leaves them: token by token, key and value of a head side by side.
    let kv = four([batch, capacity, groups, nope + value]).swap_dims(1, 2).narrow(2, 0, keys);
    let shared = random(batch * capacity * (rope + 3)).reshape([batch, capacity, rope + 3]);
    let shared = (rope > 0).then(|| shared.narrow(1, 0, keys).narrow(2, 3, rope));
    let keys = Keys { own: kv.clone().narrow(3, 0, nope), shared, values: kv.narrow(3, nope, value) };
    (four([batch, seq, heads, nope + rope]), keys)
}

/// In plain tensor operations.
fn plain_chunk(q: Tensor<4>, keys: Keys, offsets: &[usize], scale: f64) -> Tensor<3> {
    let ([batch, seq, heads, _], device) = (q.dims(), q.device());
    let [_, _, of_keys, value] = keys.values.dims();
    let mask = Mask::cached(offsets, seq, of_keys, &device);
    let out = attention(q.swap_dims(1, 2), keys.whole(), keys.values, &mask, scale);
    out.swap_dims(1, 2).reshape([batch, seq, heads * value])
}

#[test]
fn a_chunk_behind_cached_keys_agrees_with_plain_operations_on_any_number_of_threads() {
    plain_device().seed(28);
    for (heads, widths) in [([3, 3], [12, 4, 9]), ([6, 2], [10, 0, 10]), ([5, 1], [7, 5, 16]), ([1, 1], [1, 2, 1])] {
        for seq in [1, 7, 65, 300] {
            for offsets in [vec![0], vec![1], vec![500], vec![0, 500, 191], vec![1, 0]] {
                let of_keys = offsets.iter().max().unwrap() + seq;
                let (q, keys) = chunk([offsets.len(), seq, of_keys], heads, widths);
                let device = q.device();
                let mask = || Mask::cached(&offsets, seq, of_keys, &device);
                let run = |threads| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    pool.install(|| host(chunk_attention(q.clone(), keys.clone(), &offsets, &mask, 0.3)))
                };
                let what = format!("{seq} queries, {heads:?} heads, {widths:?}, {offsets:?}");
                let one = run(1);
                for threads in [3, 16] {
                    assert_eq!(one, run(threads), "{what}: {threads} threads");
                }
                assert_close(&what, one, host(plain_chunk(q.clone(), keys.clone(), &offsets, 0.3)));
            }
        }
    }
}

#[test]
fn keys_and_values_made_of_latents_agree_with_plain_operations_on_any_number_of_threads() {
    plain_device().seed(32);
    for (heads, [nope, rope, value, rank]) in [(3, [12, 4, 9, 20]), (1, [1, 0, 1, 1]), (2, [5, 6, 33, 7])] {
        let (latent_scale, latent_eps, interleave) = (1.0, 1e-6, false);
        let dims = MlaDims { heads, nope, rope, value, rank, scale: 0.3, latent_scale, latent_eps, interleave };
        for seq in [1, 7, 65, 300] {
            for offsets in [vec![0], vec![1], vec![500], vec![0, 500, 191]] {
                let (batch, of_keys) = (offsets.len(), offsets.iter().max().unwrap() + seq);
                let q = random(batch * seq * heads * (nope + rope)).reshape([batch, seq, heads, nope + rope]);
                let latents = random(batch * (of_keys + 5) * (rank + rope));
                let latents = latents.reshape([batch, of_keys + 5, rank + rope]).narrow(1, 0, of_keys);
                let kv_b = random(heads * (nope + value) * rank).reshape([heads * (nope + value), rank]);
                let device = q.device();
                let mask = || Mask::cached(&offsets, seq, of_keys, &device);
                let run = |threads| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    let run = || expanded_attention(q.clone(), latents.clone(), kv_b.clone(), &offsets, &mask, dims);
                    pool.install(|| host(run()))
                };
                let what = format!("{seq} queries, {dims:?}, {offsets:?}");
                let one = run(1);
                for threads in [3, 16] {
                    assert_eq!(one, run(threads), "{what}: {threads} threads");
                }
                let keys = Keys::of_latents(latents.clone(), kv_b.clone(), dims);
                assert_close(&what, one, host(plain_chunk(q.clone(), keys, &offsets, 0.3)));
            }
        }
    }
}

#[test]
fn latents_of_one_head_are_read_where_they_lie() {
    plain_device().seed(31);
    let (latent_scale, latent_eps, interleave) = (1.0, 1e-6, false);
    let dims =
        MlaDims { heads: 3, nope: 5, rope: 2, value: 4, rank: 6, scale: 0.3, latent_scale, latent_eps, interleave };
    for seq in [1, 3, 40] {
        let q = random(2 * seq * 3 * 7).reshape([2, seq, 3, 7]);
        let kv_b = random(3 * 9 * 6).reshape([27, 6]);
        // A part of a longer buffer, whose rows do not lie side by side.
        let buffer = random(2 * 60 * 8).reshape([2, 1, 60, 8]);
        let with_head = buffer.clone().narrow(2, 0, 50);
        let without = buffer.reshape([2, 60, 8]).narrow(1, 0, 50);
        let offsets = [50 - seq, 5];
        let mask = || Mask::cached(&offsets, seq, 50, &plain_device());
        let absorbed =
            |cache: Stored<3>| host(absorbed_attention(q.clone(), cache, Some(kv_b.clone()), &offsets, dims));
        let of_head = |cache: Stored<4>| host(absorbed_attention(q.clone(), cache, Some(kv_b.clone()), &offsets, dims));
        assert_eq!(absorbed(without.clone().into()), of_head(with_head.clone().into()), "{seq}");
        assert_eq!(
            absorbed(Stored::quantise(without.clone(), 6)),
            of_head(Stored::quantise(with_head.clone(), 6)),
            "{seq}"
        );
        let expanded = host(expanded_attention(q.clone(), without, kv_b.clone(), &offsets, &mask, dims));
        assert_eq!(
            expanded,
            host(expanded_attention(q.clone(), with_head, kv_b.clone(), &offsets, &mask, dims)),
            "{seq}"
        );
    }
}

#[test]
fn a_row_of_a_batch_and_a_part_of_a_chunk_are_what_they_are_alone() {
    plain_device().seed(29);
    let (seq, offsets) = (70, [300, 12, 0]);
    let (q, keys) = chunk([3, seq, 370], [4, 2], [9, 6, 11]);
    let device = q.device();
    let run = |q: Tensor<4>, keys: Keys, offsets: &[usize]| {
        let (seq, of_keys) = (q.dims()[1], keys.own.dims()[2]);
        host(chunk_attention(q, keys, offsets, &|| Mask::cached(offsets, seq, of_keys, &device), 0.2))
    };
    let whole = run(q.clone(), keys.clone(), &offsets);
    let per_row = whole.len() / 3;
    for (row, offset) in offsets.into_iter().enumerate() {
        // Slots beyond the row's own end are not there.
        let filled = offset + seq;
        let part = |x: Tensor<4>| x.narrow(0, row, 1).narrow(2, 0, filled);
        let alone = Keys {
            own: part(keys.own.clone()),
            shared: keys.shared.clone().map(|shared| shared.narrow(0, row, 1).narrow(1, 0, filled)),
            values: part(keys.values.clone()),
        };
        let expected = &whole[row * per_row..(row + 1) * per_row];
        let q = q.clone().narrow(0, row, 1);
        assert_close(&format!("row {row}"), run(q.clone(), alone.clone(), &[offset]), expected.to_vec());
        let first = run(q.clone().narrow(1, 0, 33), alone.clone(), &[offset]);
        let rest = run(q.narrow(1, 33, 37), alone, &[offset + 33]);
        assert_close(&format!("row {row} in two parts"), [first, rest].concat(), expected.to_vec());
    }
}

#[test]
fn what_lies_in_slots_that_no_query_sees_does_not_matter() {
    plain_device().seed(30);
    let (q, keys) = chunk([1, 40, 250], [2, 2], [6, 0, 5]);
    let device = q.device();
    let mask = || Mask::cached(&[150], 40, 250, &device);
    let expected = host(chunk_attention(q.clone(), keys.clone(), &[150], &mask, 0.4));
    let spoilt = |x: Tensor<4>| x.slice_fill([0..1, 0..2, 190..250], f32::NAN);
    let keys = Keys { own: spoilt(keys.own), shared: None, values: spoilt(keys.values) };
    assert_eq!(host(chunk_attention(q, keys, &[150], &mask, 0.4)), expected);
}

#[test]
fn the_largest_logit_is_that_of_whole_score_matrices() {
    plain_device().seed(31);
    for (seq, heads, widths) in [(1, [2, 2], [3, 0, 2]), (70, [6, 2], [9, 4, 5]), (400, [3, 1], [8, 2, 3])] {
        let (q, keys) = chunk([2, seq, seq], heads, widths);
        let middle = (seq / 3) as u32;
        let starts: Vec<u32> = (0..2 * seq as u32).map(|t| if t < middle { 0 } else { t.min(middle) }).collect();
        let starts: Vec<u32> = starts.into_iter().enumerate().map(|(i, s)| if i < seq { s } else { 0 }).collect();
        let mask = Mask::documents(&starts, seq, &q.device());
        let expected = host(scores(q.clone().swap_dims(1, 2), keys.whole(), &mask, 0.3).max());
        let found = host(largest_logit(q.clone(), keys.clone(), &starts, 0.3));
        assert_close(&format!("{seq}"), found, expected);
        // One key that is no number among hundreds that are, wherever it lies.
        for at in [0, seq / 2, seq - 1] {
            for spoilt in [f32::NAN, f32::INFINITY] {
                let own = keys.own.clone().slice_fill([1..2, 0..1, at..at + 1], spoilt);
                let spoilt = Keys { own, shared: keys.shared.clone(), values: keys.values.clone() };
                let found = host(largest_logit(q.clone(), spoilt, &starts, 0.3));
                assert!(!found[0].is_finite(), "{seq}, key {at}: {found:?}");
            }
        }
    }
}
