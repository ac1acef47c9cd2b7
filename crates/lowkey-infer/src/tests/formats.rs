//! Caches in fewer bits: their size, and how far they move the logits.

use std::ops::ControlFlow;

use super::*;
use crate::{Cache, CacheDtype, Decoder, GenerateConfig, generate};

/// Root of the mean square difference over that of the expected numbers.
pub(super) fn error(found: &[Vec<f32>], expected: &[Vec<f32>]) -> f64 {
    let square = |x: f32| f64::from(x).powi(2);
    let pairs = || found.iter().flatten().zip(expected.iter().flatten());
    let (off, size) = pairs().fold((0.0, 0.0), |(off, size), (a, b)| (off + square(a - b), size + square(*b)));
    (off / size).sqrt()
}

/// A bound on [`error`], about twice what is seen, where weights are of a usual size. Large ones amplify what rounding does.
fn bound(dtype: CacheDtype) -> f64 {
    match dtype {
        CacheDtype::F32 => 1e-6,
        CacheDtype::F16 => 1e-3,
        CacheDtype::Bf16 => 8e-3,
        CacheDtype::Int8 => 2e-2,
    }
}

fn decoder(model: &CausalLm, sizes: [usize; 2], dtype: CacheDtype, form: Form) -> Decoder {
    let plain = Decoder::with_cache(model, sizes, dtype, form, &Device::flex()).unwrap();
    plain.with_fused(fused_layers(model)).unwrap()
}

#[test]
fn a_cache_takes_the_bytes_of_its_format() {
    let (device, [batch, capacity, layers]) = (Device::flex(), [5, 37, 3]);
    for (name, config) in zoo() {
        let model = CausalLm::init(&config, 0, &device);
        let (numbers, scales) = match config.attention() {
            AttentionConfig::Mla(mla) => {
                let ranks: usize = config.kv_ranks().iter().sum();
                (ranks + layers * mla.qk_rope_head_dim, layers * if mla.qk_rope_head_dim > 0 { 2 } else { 1 })
            }
            AttentionConfig::Grouped(g) => {
                (layers * 2 * g.num_key_value_heads * g.head_dim, layers * 2 * g.num_key_value_heads)
            }
        };
        for (dtype, bytes) in [
            (CacheDtype::F32, 4 * numbers),
            (CacheDtype::Bf16, 2 * numbers),
            (CacheDtype::F16, 2 * numbers),
            (CacheDtype::Int8, numbers + 4 * scales),
        ] {
            let cache = Cache::new(&model, batch, capacity, dtype, &device).unwrap();
            assert_eq!(cache.bytes(), batch * capacity * bytes, "{name}, {dtype}");
            assert_eq!(dtype.bytes_per_token(&model.config), bytes, "{name}, {dtype}");
        }
    }
}

#[test]
fn fewer_bits_move_the_logits_by_little() {
    for (seed, (name, config)) in zoo().into_iter().enumerate() {
        let ids = tokens(60, 1000);
        let usual = ModelConfig { initializer_range: Some(0.2), ..config.clone() };
        let models =
            [(1.0, CausalLm::init(&usual, seed as u64, &Device::flex())), (5.0, random_model(&config, seed as u64))];
        for ((kind, model), dtype) in models.iter().flat_map(|model| CacheDtype::ALL.map(|dtype| (model, dtype))) {
            let expected = uncached(model, &ids);
            for form in FORMS {
                for chunk in [1, 25] {
                    let mut decoder = decoder(model, [1, 60], dtype, form);
                    let parts = ids.chunks(chunk);
                    let found: Vec<Vec<f32>> =
                        parts.flat_map(|part| rows(model.logits(decoder.advance(&[part]).unwrap()))).collect();
                    let error = error(&found, &expected);
                    assert!(error < kind * bound(dtype), "{name}, {dtype}, {form}, chunk {chunk}: {error:.1e}");
                    let moved = dtype != CacheDtype::F32;
                    assert!(!moved || error > 1e-6, "{name}, {dtype}: stored as they are? {error:.1e}");
                }
            }
        }
    }
}

/// On the same cache, the ways differ by the rounding of f32 alone: what narrow numbers cost is in the cache, not in a way.
#[test]
fn all_forms_read_the_same_numbers_from_a_narrow_cache() {
    for (seed, (name, config)) in zoo().into_iter().enumerate() {
        let model = random_model(&config, seed as u64);
        for dtype in CacheDtype::ALL {
            let logits = |form| {
                let mut decoder = decoder(&model, [2, 140], dtype, form);
                Device::flex().seed(5);
                decoder.fill_at_random(137).unwrap();
                rows(decoder.step(&[1, 2]).unwrap())
            };
            let expected = logits(Form::Expanded);
            for form in [Form::Absorbed, Form::Fused, Form::Auto] {
                let error = error(&logits(form), &expected);
                // Of the layers after the first, the new token's latents differ by rounding, and so may their codes by one.
                assert!(error < 1e-3, "{name}, {dtype}, {form}: {error:.1e}");
            }
        }
    }
}

#[test]
fn rows_of_unequal_length_keep_their_own_numbers() {
    for dtype in CacheDtype::ALL {
        for (name, config) in [("mla", mla(3, |_| {})), ("gqa", config(4, AttentionConfig::Grouped(grouped(2))))] {
            let model = random_model(&config, 40);
            let sequences: Vec<Vec<u32>> = (0..3).map(|row| tokens(30, 1100 + row)).collect();
            // Each row alone, one token at a time.
            let alone: Vec<Vec<Vec<f32>>> = sequences
                .iter()
                .map(|ids| {
                    let mut decoder = decoder(&model, [1, 30], dtype, Form::Absorbed);
                    ids.iter().map(|id| rows(decoder.step(&[*id]).unwrap()).remove(0)).collect()
                })
                .collect();
            let mut decoder = decoder(&model, [3, 30], dtype, Form::Auto);
            let mut at = [9, 2, 14];
            let parts: Vec<&[u32]> = sequences.iter().zip(at).map(|(ids, at)| &ids[..at]).collect();
            decoder.prefill(&parts, 5).unwrap();
            let next: Vec<u32> = (0..3).map(|row| sequences[row][at[row]]).collect();
            at = at.map(|at| at + 1);
            let found = rows(decoder.step(&next).unwrap());
            for row in 0..3 {
                let error = error(&found[row..=row], &alone[row][at[row] - 1..at[row]]);
                assert!(error < 1e-2, "{name}, {dtype}, row {row}: {error:.1e}");
            }
            decoder.keep(&[2, 1]).unwrap();
            let found = rows(decoder.step(&[sequences[2][at[2]], sequences[1][at[1]]]).unwrap());
            for (i, row) in [2, 1].into_iter().enumerate() {
                let error = error(&found[i..=i], &alone[row][at[row]..=at[row]]);
                assert!(error < 1e-2, "{name}, {dtype}, row {row} after keep: {error:.1e}");
            }
        }
    }
}

/// A model with decided preferences, as training leaves them: greedy tokens survive the rounding of a cache.
#[test]
fn greedy_tokens_of_a_decided_model_are_the_same_in_every_format() {
    let config = ModelConfig { tie_word_embeddings: false, ..mla(3, |m| m.q_lora_rank = Some(11)) };
    let model = random_model(&config, 41);
    let values =
        model.parameters().into_iter().map(|p| if p.name == "lm_head.weight" { p.value * 4.0 } else { p.value });
    let values = values.collect();
    let model = model.with_values(values);
    let prompt = tokens(20, 1200);
    let run = |cache_dtype| {
        let config = GenerateConfig { max_new_tokens: 24, cache_dtype, ..GenerateConfig::default() };
        generate(&model, &prompt, &config, &Device::flex(), &mut |_| ControlFlow::Continue(())).unwrap()
    };
    let expected = run(CacheDtype::F32);
    for dtype in [CacheDtype::Bf16, CacheDtype::F16, CacheDtype::Int8] {
        let found = run(dtype);
        assert_eq!(found.ids, expected.ids, "{dtype}");
        assert!(found.cache_bytes < expected.cache_bytes);
    }
}

#[test]
fn a_cache_filled_at_random_is_full_and_takes_no_more_than_it_holds() {
    let model = random_model(&mla(3, |_| {}), 42);
    let mut decoder = decoder(&model, [2, 20], CacheDtype::Int8, Form::Absorbed);
    decoder.fill_at_random(19).unwrap();
    assert_eq!(decoder.cache().lengths(), [19, 19]);
    assert!(rows(decoder.step(&[1, 2]).unwrap()).iter().flatten().all(|x| x.is_finite()));
    assert!(matches!(decoder.fill_at_random(21), Err(crate::Error::Capacity { needed: 21, capacity: 20, .. })));
}
