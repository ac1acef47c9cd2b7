//! The generation loop.

use std::ops::ControlFlow;

use super::*;
use crate::{Error, Finish, GenerateConfig, Generation, SamplingConfig, Weights, generate, generate_batch};

fn run(model: &CausalLm, prompt: &[u32], config: &GenerateConfig) -> Generation {
    let weights = Weights { model, fused: &fused_layers(model) };
    generate(weights, prompt, config, &Device::flex(), &mut |_| ControlFlow::Continue(())).unwrap()
}

fn greedy(max_new_tokens: usize, form: Form, prefill_chunk: usize) -> GenerateConfig {
    GenerateConfig { max_new_tokens, form, prefill_chunk, ..GenerateConfig::default() }
}

fn sampled(seed: u64) -> GenerateConfig {
    let sampling = SamplingConfig { temperature: 1.0, top_p: Some(0.9), seed, ..SamplingConfig::default() };
    GenerateConfig { max_new_tokens: 20, sampling, ..GenerateConfig::default() }
}

#[test]
fn greedy_continuations_are_those_of_the_forward_pass() {
    for (seed, (name, config)) in zoo().into_iter().enumerate() {
        let model = random_model(&config, seed as u64);
        for length in [1, 40] {
            let prompt = tokens(length, 400);
            let expected = greedy_uncached(&model, &prompt, 12);
            for form in FORMS {
                for chunk in [3, 512] {
                    let found = run(&model, &prompt, &greedy(12, form, chunk));
                    assert_eq!(found.ids, expected, "{name}, {form}, prompt of {length}, chunk {chunk}");
                    assert_eq!((found.finish, found.prompt_tokens), (Finish::Length, length));
                }
            }
        }
    }
}

#[test]
fn a_batch_gives_what_each_prompt_gives_alone() {
    for (seed, (name, config)) in zoo().into_iter().enumerate() {
        let model = random_model(&config, seed as u64);
        let prompts: Vec<Vec<u32>> = [4, 17, 1, 9].iter().map(|len| tokens(*len, 500 + *len as u64)).collect();
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let alone: Vec<Vec<u32>> = prompts.iter().map(|prompt| greedy_uncached(&model, prompt, 10)).collect();
        for form in FORMS {
            // Row 1 ends at its fourth token or earlier; others end where the same token happens to come.
            let eos = alone[1][3];
            let config = GenerateConfig { eos: vec![eos], ..greedy(10, form, 5) };
            let mut seen = vec![Vec::new(); 4];
            let weights = Weights { model: &model, fused: &fused_layers(&model) };
            let all = generate_batch(weights, &prompts, &config, &Device::flex(), &mut |row, token| {
                seen[row].push(token);
                ControlFlow::Continue(())
            });
            for ((found, alone), seen) in all.unwrap().iter().zip(&alone).zip(seen) {
                let end = alone.iter().position(|token| *token == eos);
                assert_eq!(found.ids, alone[..end.unwrap_or(10)], "{name}, {form}");
                assert_eq!(found.finish, if end.is_some() { Finish::Eos } else { Finish::Length });
                assert_eq!(found.ids, seen);
            }
        }
    }
}

#[test]
fn a_generation_says_what_it_cost() {
    let model = random_model(&mla(3, |_| {}), 3);
    let prompts: [&[u32]; 2] = [&[1, 2, 3, 4], &[5]];
    let config = greedy(6, Form::Absorbed, 512);
    let all =
        generate_batch(&model, &prompts, &config, &Device::flex(), &mut |_, _| ControlFlow::Continue(())).unwrap();
    for (found, prompt_tokens) in all.iter().zip([4, 1]) {
        // Slots for the longest prompt and its continuation; 3 layers of L + R = 29 floats.
        assert_eq!(found.cache_bytes, (4 + 6) * 3 * 29 * 4);
        assert_eq!(found.prompt_tokens, prompt_tokens);
        assert!(!found.prefill.is_zero() && !found.decode.is_zero());
    }
}

#[test]
fn the_callback_ends_its_own_sequence() {
    let model = random_model(&mla(3, |_| {}), 4);
    let prompts: [&[u32]; 2] = [&[1, 2, 3], &[4, 5]];
    let config = greedy(8, Form::Auto, 512);
    let mut calls = 0;
    let all = generate_batch(&model, &prompts, &config, &Device::flex(), &mut |row, _| {
        calls += 1;
        if row == 0 && calls >= 5 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
    .unwrap();
    // Calls 1, 3, 5 are row 0's.
    assert_eq!((all[0].finish, all[0].ids.len()), (Finish::Stopped, 3));
    assert_eq!((all[1].finish, all[1].ids.len()), (Finish::Length, 8));
    for (found, prompt) in all.iter().zip(prompts) {
        assert_eq!(found.ids, greedy_uncached(&model, prompt, 8)[..found.ids.len()]);
    }
}

#[test]
fn a_first_token_that_ends_the_text_leaves_an_empty_continuation() {
    let model = random_model(&mla(3, |_| {}), 5);
    let eos = greedy_uncached(&model, &[7, 8], 1);
    let mut called = false;
    let config = GenerateConfig { eos, ..greedy(8, Form::Auto, 512) };
    let found = generate(&model, &[7, 8], &config, &Device::flex(), &mut |_| {
        called = true;
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!((found.finish, found.ids.len(), called), (Finish::Eos, 0, false));
}

#[test]
fn sampling_is_a_function_of_the_seed() {
    let model = random_model(&mla(3, |_| {}), 6);
    let prompt = tokens(6, 600);
    let first = run(&model, &prompt, &sampled(1)).ids;
    assert_eq!(first.len(), 20);
    assert_eq!(run(&model, &prompt, &sampled(1)).ids, first);
    assert_ne!(run(&model, &prompt, &sampled(2)).ids, first);
    assert_ne!(run(&model, &prompt, &greedy(20, Form::Auto, 512)).ids, first);
    // Equal prompts of a batch differ, and the first is the one of `generate`.
    let prompts = [prompt.as_slice(), prompt.as_slice()];
    let both =
        generate_batch(&model, &prompts, &sampled(1), &Device::flex(), &mut |_, _| ControlFlow::Continue(())).unwrap();
    assert_eq!(both[0].ids, first);
    assert_ne!(both[1].ids, first);
}

#[test]
fn the_repetition_penalty_covers_prompt_and_continuation() {
    let model = random_model(&mla(3, |_| {}), 7);
    let prompt = tokens(20, 700);
    let sampling = SamplingConfig { repetition_penalty: 1e9, ..SamplingConfig::default() };
    let found = run(&model, &prompt, &GenerateConfig { sampling, ..greedy(8, Form::Auto, 512) });
    // Enough unseen tokens have positive logits, and a seen one has next to none.
    let mut all = [prompt.clone(), found.ids.clone()].concat();
    let repeated = found.ids.iter().any(|token| prompt.contains(token));
    all.sort_unstable();
    all.dedup();
    let mut distinct = prompt;
    distinct.sort_unstable();
    distinct.dedup();
    assert!(!repeated && all.len() == distinct.len() + 8, "{:?}", found.ids);
}

/// A model under training records gradients; decoding from it must not.
#[test]
fn a_model_that_records_gradients_generates_the_same() {
    let config = mla(3, |m| m.q_lora_rank = Some(11));
    let prompt = tokens(5, 800);
    let plain = CausalLm::init(&config, 8, &Device::flex());
    let device = Device::flex().autodiff();
    let training = CausalLm::init(&config, 8, &device);
    let generate_on = |model: &CausalLm, device: &Device| {
        generate(model, &prompt, &greedy(10, Form::Auto, 2), device, &mut |_| ControlFlow::Continue(())).unwrap().ids
    };
    assert_eq!(generate_on(&training, &device), generate_on(&plain, &Device::flex()));
    let mut decoder = crate::Decoder::new(&training, 1, 5, Form::Auto, &device).unwrap();
    assert!(!decoder.prefill(&[&prompt], 5).unwrap().is_autodiff());
}

#[test]
fn a_request_out_of_range_is_refused_before_anything_is_computed() {
    let model = random_model(&mla(3, |_| {}), 9);
    let prompt = tokens(100, 900);
    let refused = |prompts: &[&[u32]], config: &GenerateConfig| {
        generate_batch(&model, prompts, config, &Device::flex(), &mut |_, _| panic!("a token was computed"))
            .unwrap_err()
    };
    let error = refused(&[&prompt[..2], &prompt], &greedy(93, Form::Auto, 512));
    assert!(matches!(error, Error::Positions { needed: 193, limit: 192 }));
    let text = error.to_string();
    assert!(text.contains("193") && text.contains("192") && text.contains("max_position_embeddings"), "{text}");
    assert!(matches!(refused(&[&prompt], &greedy(usize::MAX, Form::Auto, 512)), Error::Positions { .. }));
    let field = |error| match error {
        Error::Setting { field, .. } => field,
        other => panic!("{other:?}"),
    };
    assert_eq!(field(refused(&[&prompt], &greedy(0, Form::Auto, 512))), "max_new_tokens");
    assert_eq!(field(refused(&[&prompt], &greedy(1, Form::Auto, 0))), "prefill_chunk");
    assert_eq!(field(refused(&[], &greedy(1, Form::Auto, 1))), "number of prompts");
    let sampling = SamplingConfig { top_p: Some(2.0), ..SamplingConfig::default() };
    assert_eq!(field(refused(&[&prompt], &GenerateConfig { sampling, ..greedy(1, Form::Auto, 1) })), "top_p");
    assert!(matches!(refused(&[&[1], &[]], &greedy(1, Form::Auto, 1)), Error::NoToken { row: 1 }));
    assert!(matches!(refused(&[&[1]], &greedy(1, Form::Fused, 1)), Error::NoFused));
    assert!(matches!(refused(&[&[53]], &greedy(1, Form::Auto, 1)), Error::Token { token: 53, .. }));
    assert!(matches!(refused(&[&[1], &[2], &[3, 53]], &greedy(1, Form::Auto, 1)), Error::Token { row: 2, .. }));
    // The last position is usable.
    assert_eq!(run(&model, &prompt, &greedy(92, Form::Auto, 64)).ids, greedy_uncached(&model, &prompt, 92));
}

#[test]
fn a_model_with_a_nan_is_an_error_and_not_a_token() {
    let model = random_model(&mla(3, |_| {}), 10);
    let device = Device::flex();
    let values = model.parameters().into_iter().map(|p| p.value * f32::NAN).collect();
    let broken = model.with_values(values);
    let config = greedy(4, Form::Auto, 512);
    let result = generate(&broken, &[1, 2], &config, &device, &mut |_| ControlFlow::Continue(()));
    assert!(matches!(result, Err(Error::Logit { .. })), "{result:?}");
}
