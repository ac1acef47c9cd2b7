//! Logits at every position, rows of unequal length, the cache itself.

use super::*;
use crate::{Cache, CacheDtype, Decoder, Error};

fn decoder(model: &CausalLm, batch: usize, capacity: usize, form: Form) -> Decoder {
    let plain = Decoder::new(model, batch, capacity, form, &Device::flex()).unwrap();
    plain.with_fused(fused_layers(model)).unwrap()
}

/// Logits of all positions of one sequence that passes through a cache in chunks.
fn chunked(model: &CausalLm, ids: &[u32], chunk: usize, form: Form) -> Vec<Vec<f32>> {
    let mut decoder = decoder(model, 1, ids.len(), form);
    ids.chunks(chunk).flat_map(|part| rows(model.logits(decoder.advance(&[part]).unwrap()))).collect()
}

#[test]
fn every_position_agrees_with_the_forward_pass() {
    for (seed, (name, config)) in zoo().into_iter().enumerate() {
        let model = random_model(&config, seed as u64);
        let ids = tokens(23, 100);
        let expected = uncached(&model, &ids);
        for form in FORMS {
            for chunk in [1, 3, 7, 23] {
                let found = chunked(&model, &ids, chunk, form);
                assert_eq!(found.len(), ids.len());
                for (position, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    assert_close(found, expected, &format!("{name}, {form}, chunk {chunk}, position {position}"));
                }
            }
        }
    }
}

fn relative_error(found: Tensor<3>, expected: Tensor<3>) -> f64 {
    let square = |x: Tensor<3>| x.square().sum().into_scalar::<f64>();
    (square(found - expected.clone()) / square(expected)).sqrt()
}

/// In f64 rounding is out of the way: what differs then differs in the mathematics. YaRN goes past its original context here.
#[test]
fn all_forms_are_one_function_in_f64() {
    for (seed, (name, config)) in zoo().into_iter().enumerate() {
        let model = widened(&random_model(&config, seed as u64));
        let sequences = [tokens(40, 120), tokens(40, 121)];
        let device = Device::flex();
        let expected = model.forward(ids_tensor(&sequences.concat(), 2, 40, &device));
        assert_eq!(expected.dtype(), DType::F64);
        for form in FORMS {
            for chunk in [1, 7, 40] {
                let mut decoder = decoder(&model, 2, 40, form);
                let parts: Vec<Tensor<3>> = (0..40)
                    .step_by(chunk)
                    .map(|from| {
                        let rows: Vec<&[u32]> =
                            sequences.iter().map(|ids| &ids[from..(from + chunk).min(40)]).collect();
                        model.logits(decoder.advance(&rows).unwrap())
                    })
                    .collect();
                let error = relative_error(Tensor::cat(parts, 1), expected.clone());
                assert!(error <= 1e-12, "{name}, {form}, chunk {chunk}: {error:e}");
            }
        }
    }
}

#[test]
fn a_layer_without_fused_weights_is_absorbed() {
    let model = random_model(&mla(3, |m| m.q_lora_rank = Some(11)), 30);
    let ids = tokens(20, 130);
    let expected = uncached(&model, &ids);
    let mut layers = fused_layers(&model);
    (layers[0], layers[2]) = (None, None);
    let plain = Decoder::new(&model, 1, 20, Form::Fused, &Device::flex()).unwrap();
    let mut decoder = plain.with_fused(layers).unwrap();
    for (position, expected) in expected.iter().enumerate() {
        let found = rows(decoder.step(&ids[position..=position]).unwrap());
        assert_close(&found[0], expected, &format!("position {position}"));
    }
}

#[test]
fn fused_weights_that_do_not_go_with_the_model_are_refused() {
    let model = random_model(&mla(3, |_| {}), 31);
    let device = Device::flex();
    let decoder = || Decoder::new(&model, 1, 20, Form::Fused, &device).unwrap();
    let refused = |layers| decoder().with_fused(layers).unwrap_err().to_string();
    let layers = fused_layers(&model);
    let text = refused(layers[..2].to_vec());
    assert!(text.contains("2 layers for 3") && text.contains("export"), "{text}");
    let mut wrong = layers.clone();
    wrong[1] = wrong[1].take().map(|fused| FusedMla { output: fused.output.transpose(), ..fused });
    let text = refused(wrong);
    assert!(text.contains("output of layer 1") && text.contains("[57, 23]") && text.contains("[23, 57]"), "{text}");
    let mut wrong = layers.clone();
    wrong[2] = wrong[2].take().map(|fused| FusedMla { query: fused.query.cast(FloatDType::F64), ..fused });
    assert!(refused(wrong).contains("F64"));
    let grouped = random_model(&config(4, AttentionConfig::Grouped(grouped(2))), 1);
    let of_grouped = Decoder::new(&grouped, 1, 20, Form::Fused, &device).unwrap();
    assert!(matches!(of_grouped.with_fused(layers), Err(Error::Fused { .. })));
    for mut without in [decoder(), decoder().with_fused(vec![None, None, None]).unwrap()] {
        match without.step(&[1]) {
            Err(e @ Error::NoFused) => assert!(e.to_string().contains("lowkey export --to fused"), "{e}"),
            other => panic!("{other:?}"),
        }
    }
}

/// The comparison above would pass on models that ignore their past or their positions; these do not.
#[test]
fn the_models_depend_on_their_past() {
    for (seed, (name, config)) in zoo().into_iter().enumerate() {
        let model = random_model(&config, seed as u64);
        let ids = tokens(23, 100);
        let last = |ids: &[u32]| uncached(&model, ids).pop().unwrap();
        let furthest =
            |other: &[u32]| last(&ids).iter().zip(last(other)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let mut changed = ids.clone();
        changed[0] = (changed[0] + 1) % 53;
        assert!(furthest(&changed) > 1e-3, "{name}: the first token changes the last logits by {}", furthest(&changed));
        let mut swapped = ids.clone();
        swapped.swap(3, 9);
        assert!(furthest(&swapped) > 1e-3, "{name}: order changes the last logits by {}", furthest(&swapped));
    }
}

/// Positions past the original context of 32 under YaRN, and masks and tables far from 0.
#[test]
fn positions_far_from_zero_agree() {
    for (seed, (name, config)) in zoo().into_iter().enumerate() {
        let model = random_model(&config, seed as u64);
        let ids = tokens(150, 200);
        let expected = uncached(&model, &ids);
        for form in FORMS {
            let mut decoder = decoder(&model, 1, 192, form);
            let prefilled = rows(decoder.prefill(&[&ids[..140]], 64).unwrap());
            assert_close(&prefilled[0], &expected[139], &format!("{name}, {form}, prefill"));
            for position in 140..150 {
                let found = rows(decoder.step(&ids[position..=position]).unwrap());
                assert_close(&found[0], &expected[position], &format!("{name}, {form}, position {position}"));
            }
        }
    }
}

/// Chunks that take several blocks of keys and queries, behind a past that ends inside a block, and rows of different lengths; on any
/// number of threads to the same bits.
#[test]
fn long_chunks_agree_with_the_forward_pass_in_every_form() {
    for (seed, (name, mut config)) in zoo().into_iter().enumerate() {
        config.max_position_embeddings = 400;
        let model = random_model(&config, seed as u64);
        let (long, short) = (tokens(310, 210), tokens(90, 211));
        let expected = [uncached(&model, &long), uncached(&model, &short)];
        for form in FORMS {
            for chunk in [7, 65, 300] {
                let what = |position| format!("{name}, {form}, chunk {chunk}, position {position}");
                let mut decoder = decoder(&model, 2, 400, form);
                let prefilled = rows(decoder.prefill(&[&long[..307], &short[..70]], chunk).unwrap());
                assert_close(&prefilled[0], &expected[0][306], &what(306));
                assert_close(&prefilled[1], &expected[1][69], &what(69));
                for i in 0..3 {
                    let found = rows(decoder.step(&[long[307 + i], short[70 + i]]).unwrap());
                    assert_close(&found[0], &expected[0][307 + i], &what(307 + i));
                    assert_close(&found[1], &expected[1][70 + i], &what(70 + i));
                }
            }
            let whole = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| {
                    let mut decoder = decoder(&model, 1, 400, form);
                    let first = rows(model.logits(decoder.advance(&[&long[..65]]).unwrap()));
                    [first, rows(model.logits(decoder.advance(&[&long[65..]]).unwrap()))].concat()
                })
            };
            let one = whole(1);
            assert_eq!(one, whole(3), "{name}, {form}: one thread and three");
            for (position, (found, expected)) in one.iter().zip(&expected[0]).enumerate() {
                // Of so many positions one may be off by more than the others; what counts is how far beside the largest logit.
                let largest = expected.iter().fold(1f32, |largest, x| largest.max(x.abs()));
                let close = found.iter().zip(expected).all(|(a, b)| (a - b).abs() <= 5e-5 * largest);
                assert!(close, "{name}, {form}, in two, position {position}: {found:?}, expected {expected:?}");
            }
        }
    }
}

#[test]
fn rows_of_unequal_length_equal_each_row_alone() {
    for (seed, (name, config)) in zoo().into_iter().enumerate() {
        let model = random_model(&config, seed as u64);
        let sequences: Vec<Vec<u32>> = (0..4).map(|row| tokens(30, 300 + row)).collect();
        let expected: Vec<Vec<Vec<f32>>> = sequences.iter().map(|ids| uncached(&model, ids)).collect();
        for form in FORMS {
            for chunk in [1, 3, 7, 100] {
                // `at[i]` tokens of sequence `order[i]` have been fed.
                let mut order = vec![0, 1, 2, 3];
                let mut at = vec![5, 1, 12, 9];
                let mut decoder = decoder(&model, 4, 30, form);
                let assert_rows = |found: Tensor<2>, order: &[usize], at: &[usize], when: &str| {
                    for ((found, row), at) in rows(found).iter().zip(order).zip(at) {
                        let what = format!("{name}, {form}, chunk {chunk}, {when}, row {row}, {at} tokens");
                        assert_close(found, &expected[*row][at - 1], &what);
                    }
                };
                let parts: Vec<&[u32]> = sequences.iter().zip(&at).map(|(ids, at)| &ids[..*at]).collect();
                assert_rows(decoder.prefill(&parts, chunk).unwrap(), &order, &at, "prompt");
                for _ in 0..3 {
                    let next: Vec<u32> = order.iter().zip(&at).map(|(row, at)| sequences[*row][*at]).collect();
                    at.iter_mut().for_each(|at| *at += 1);
                    assert_rows(decoder.step(&next).unwrap(), &order, &at, "step");
                }
                // A second turn of unequal lengths; the longest row fills its capacity, the padding of others must not spill.
                let more = [2, 9, 15, 1];
                let parts: Vec<&[u32]> = (0..4).map(|row| &sequences[row][at[row]..at[row] + more[row]]).collect();
                at.iter_mut().zip(more).for_each(|(at, more)| *at += more);
                assert_rows(decoder.prefill(&parts, chunk).unwrap(), &order, &at, "second turn");
                // Rows leave and change places.
                decoder.keep(&[3, 0]).unwrap();
                (order, at) = (vec![3, 0], vec![at[3], at[0]]);
                assert_eq!(decoder.cache().lengths(), at);
                let next: Vec<u32> = order.iter().zip(&at).map(|(row, at)| sequences[*row][*at]).collect();
                at.iter_mut().for_each(|at| *at += 1);
                assert_rows(decoder.step(&next).unwrap(), &order, &at, "after keep");
            }
        }
    }
}

#[test]
fn the_cache_is_as_large_as_the_formula_says() {
    let device = Device::flex();
    let (batch, capacity, layers) = (5, 37, 3);
    for (name, config) in zoo() {
        let model = CausalLm::init(&config, 0, &device);
        let per_token = match config.attention() {
            AttentionConfig::Mla(mla) => match config.kv_cache_ranks() {
                Some(ranks) => ranks.iter().sum::<usize>() + layers * mla.qk_rope_head_dim,
                None => layers * (mla.kv_lora_rank + mla.qk_rope_head_dim),
            },
            AttentionConfig::Grouped(grouped) => layers * 2 * grouped.num_key_value_heads * grouped.head_dim,
        };
        let cache = Cache::new(&model, batch, capacity, CacheDtype::F32, &device).unwrap();
        assert_eq!(cache.bytes(), batch * capacity * per_token * 4, "{name}");
        assert_eq!(per_token, config.cache_numbers(), "{name}");
    }
    let cache = Cache::new(&random_model(&mla(3, |_| {}), 0), 1, 10, CacheDtype::F32, &device).unwrap();
    assert_eq!(cache.bytes(), 10 * 3 * (19 + 10) * 4);
}

/// A second owner of a buffer would turn every append into a copy of the whole cache; under test, appends assert it too.
#[test]
fn a_step_leaves_the_cache_the_only_owner_of_its_buffers() {
    let device = Device::flex();
    for config in [mla(3, |_| {}), config(4, AttentionConfig::Grouped(grouped(2)))] {
        let model = random_model(&config, 1);
        for form in FORMS {
            for dtype in CacheDtype::ALL {
                let decoder = Decoder::with_cache(&model, [2, 40], dtype, form, &device).unwrap();
                let mut decoder = decoder.with_fused(fused_layers(&model)).unwrap();
                let bytes = decoder.cache().bytes();
                let mut logits = decoder.prefill(&[&[1, 2, 3], &[4]], 2).unwrap();
                assert!(decoder.cache().owns_its_buffers());
                for _ in 0..3 {
                    logits = decoder.step(&[5, 6]).unwrap();
                    assert!(decoder.cache().owns_its_buffers());
                }
                assert_eq!(logits.dims(), [2, 53]);
                assert_eq!((decoder.cache().bytes(), decoder.cache().dtype()), (bytes, dtype));
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_with_both_numbers_and_leaves_no_trace() {
    let model = random_model(&mla(3, |_| {}), 2);
    let device = Device::flex();
    match Cache::new(&model, 1, 193, CacheDtype::F32, &device) {
        Err(Error::Positions { needed: 193, limit: 192 }) => {}
        other => panic!("{other:?}"),
    }
    for (batch, capacity) in [(0, 4), (4, 0)] {
        assert!(matches!(Cache::new(&model, batch, capacity, CacheDtype::F32, &device), Err(Error::Setting { .. })));
    }
    let mut decoder = decoder(&model, 2, 8, Form::Absorbed);
    decoder.prefill(&[&[1, 2, 3, 4, 5, 6], &[7, 8]], 4).unwrap();
    let message = |result: crate::Result<Tensor<2>>| result.unwrap_err().to_string();
    let text = message(decoder.prefill(&[&[1], &[1, 2, 3, 4, 5, 6, 7]], 1));
    assert!(text.contains("row 1") && text.contains("9 slots") && text.contains("capacity of 8"), "{text}");
    assert!(matches!(decoder.prefill(&[&[1], &[]], 1), Err(Error::NoToken { row: 1 })));
    assert!(matches!(decoder.prefill(&[&[1]], 1), Err(Error::Rows { expected: 2, found: 1 })));
    assert!(matches!(decoder.prefill(&[&[1], &[2]], 0), Err(Error::Setting { field: "prefill_chunk", .. })));
    assert!(matches!(decoder.step(&[52, 53]), Err(Error::Token { row: 1, token: 53, vocab_size: 53 })));
    assert!(matches!(decoder.step(&[1, 2, 3]), Err(Error::Rows { expected: 2, found: 3 })));
    assert!(decoder.keep(&[2]).is_err() && decoder.keep(&[]).is_err());
    assert_eq!(decoder.cache().lengths(), [6, 2]);
    // Nothing was written: the next tokens see the past that was there.
    decoder.step(&[9, 10]).unwrap();
    let found = rows(decoder.step(&[11, 12]).unwrap());
    assert_close(&found[0], &uncached(&model, &[1, 2, 3, 4, 5, 6, 9, 11])[7], "row 0");
    assert_close(&found[1], &uncached(&model, &[7, 8, 10, 12])[3], "row 1");
    assert!(matches!(decoder.step(&[1, 1]), Err(Error::Capacity { row: 0, needed: 9, capacity: 8 })));
}
