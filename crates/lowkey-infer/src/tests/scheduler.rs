//! Requests that come and go.

use std::collections::BTreeMap;

use super::*;
use crate::{CacheDtype, Error, Finish, Generation, Request, RequestId, SamplingConfig, Scheduler, Slots, Update};

fn slots(count: usize, form: Form, cache_dtype: CacheDtype) -> Slots {
    Slots { count, capacity: 64, prefill_chunk: 4, form, cache_dtype }
}

fn request(prompt: &[u32], max_new_tokens: usize) -> Request {
    let sampling = SamplingConfig::default();
    Request { prompt: prompt.to_vec(), max_new_tokens, sampling, stream: 0, eos: Vec::new() }
}

fn scheduler<'a>(model: &'a CausalLm, slots: Slots) -> Scheduler<'a> {
    Scheduler::new(model, slots, &Device::flex()).unwrap()
}

/// Steps until nothing is left; what became of each request, and its tokens as they came.
fn run(scheduler: &mut Scheduler) -> BTreeMap<RequestId, (Vec<u32>, Generation)> {
    let (mut tokens, mut ended) = (BTreeMap::<RequestId, Vec<u32>>::new(), BTreeMap::new());
    while !scheduler.is_idle() {
        for (id, update) in scheduler.step().unwrap() {
            match update {
                Update::Token(token) => tokens.entry(id).or_default().push(token),
                Update::Ended(generation) => {
                    let came = tokens.remove(&id).unwrap_or_default();
                    assert!(ended.insert(id, (came, generation)).is_none(), "{id:?} ended twice");
                }
                Update::Failed(e) => panic!("{e}"),
            }
        }
    }
    ended
}

#[test]
fn requests_that_come_while_others_run_get_the_tokens_that_they_get_alone() {
    let prompts: Vec<Vec<u32>> = [5, 13, 1, 9, 2].iter().map(|len| tokens(*len, 900 + *len as u64)).collect();
    let lengths = [9, 3, 12, 1, 6];
    for (seed, (name, config)) in zoo().into_iter().enumerate() {
        let model = random_model(&config, seed as u64);
        let fused = fused_layers(&model);
        for form in FORMS {
            let weights = crate::Weights { model: &model, fused: &fused };
            let mut scheduler = Scheduler::new(weights, slots(5, form, CacheDtype::F32), &Device::flex()).unwrap();
            let (mut ids, mut found) = (Vec::new(), BTreeMap::new());
            // Each comes two steps after the one before, while that one is read or continued.
            for (prompt, length) in prompts.iter().zip(lengths) {
                ids.push(scheduler.admit(request(prompt, length)).unwrap().unwrap());
                for _ in 0..2 {
                    for (id, update) in scheduler.step().unwrap() {
                        if let Update::Ended(generation) = update {
                            found.insert(id, generation.ids);
                        }
                    }
                }
            }
            found.extend(run(&mut scheduler).into_iter().map(|(id, (_, generation))| (id, generation.ids)));
            for ((id, prompt), length) in ids.iter().zip(&prompts).zip(lengths) {
                assert_eq!(found[id], greedy_uncached(&model, prompt, length), "{name}, {form}, {id:?}");
            }
        }
    }
}

#[test]
fn a_quantised_cache_is_joined_and_left_like_any_other() {
    let model = random_model(&mla(3, |_| {}), 11);
    let prompts: Vec<Vec<u32>> = [6, 3, 11].iter().map(|len| tokens(*len, 40 + *len as u64)).collect();
    let alone = |prompt: &[u32]| {
        let mut scheduler = scheduler(&model, slots(1, Form::Absorbed, CacheDtype::Int8));
        scheduler.admit(request(prompt, 8)).unwrap();
        run(&mut scheduler).into_values().next().unwrap().1.ids
    };
    let mut together = scheduler(&model, slots(3, Form::Absorbed, CacheDtype::Int8));
    for prompt in &prompts {
        together.admit(request(prompt, 8)).unwrap();
        together.step().unwrap();
    }
    let found = run(&mut together);
    assert_eq!(found.len(), 3);
    for ((_, generation), prompt) in found.values().zip(&prompts) {
        assert_eq!(generation.ids, alone(prompt));
    }
}

#[test]
fn a_slot_is_free_again_when_its_request_is_over() {
    let model = random_model(&mla(3, |_| {}), 12);
    let mut scheduler = scheduler(&model, slots(2, Form::Auto, CacheDtype::F32));
    let first = scheduler.admit(request(&[1, 2, 3], 20)).unwrap().unwrap();
    let second = scheduler.admit(request(&[4], 20)).unwrap().unwrap();
    assert_eq!((scheduler.free(), scheduler.admit(request(&[5], 2)).unwrap()), (0, None));
    for _ in 0..3 {
        scheduler.step().unwrap();
    }
    let stopped = scheduler.cancel(first).unwrap();
    assert_eq!((stopped.finish, stopped.ids.len(), stopped.prompt_tokens), (Finish::Stopped, 3, 3));
    assert_eq!(stopped.ids, greedy_uncached(&model, &[1, 2, 3], 3));
    assert!(scheduler.cancel(first).is_none(), "it is over");
    assert_eq!(scheduler.free(), 1);
    let third = scheduler.admit(request(&[5], 2)).unwrap().unwrap();
    let ended = run(&mut scheduler);
    assert_eq!(ended[&third].1.ids, greedy_uncached(&model, &[5], 2));
    assert_eq!(ended[&second].1.ids, greedy_uncached(&model, &[4], 20));
    assert!(!ended.contains_key(&first) && scheduler.free() == 2);
}

#[test]
fn what_is_cancelled_before_its_prompt_is_read_leaves_nothing() {
    let model = random_model(&mla(3, |_| {}), 13);
    let mut scheduler = scheduler(&model, slots(3, Form::Auto, CacheDtype::F32));
    let unread = scheduler.admit(request(&[1, 2], 5)).unwrap().unwrap();
    let never = scheduler.cancel(unread).unwrap();
    assert_eq!((never.ids.len(), never.prefill.is_zero(), never.decode.is_zero()), (0, true, true));
    // A prompt of nine is read in three chunks; it goes in the middle.
    let half_read = scheduler.admit(request(&tokens(9, 1), 5)).unwrap().unwrap();
    let other = scheduler.admit(request(&tokens(10, 2), 5)).unwrap().unwrap();
    assert!(scheduler.step().unwrap().is_empty());
    assert!(scheduler.cancel(half_read).is_some());
    let ended = run(&mut scheduler);
    assert_eq!(ended.keys().copied().collect::<Vec<_>>(), [other]);
    assert_eq!(ended[&other].1.ids, greedy_uncached(&model, &tokens(10, 2), 5));
}

#[test]
fn a_long_prompt_keeps_the_others_waiting_for_a_chunk_at_most() {
    let model = random_model(&mla(3, |_| {}), 14);
    let mut scheduler = scheduler(&model, slots(2, Form::Auto, CacheDtype::F32));
    let short = scheduler.admit(request(&[7], 30)).unwrap().unwrap();
    scheduler.step().unwrap();
    scheduler.admit(request(&tokens(40, 3), 2)).unwrap().unwrap();
    for _ in 0..9 {
        let updates = scheduler.step().unwrap();
        assert!(matches!(updates[..], [(id, Update::Token(_))] if id == short), "{updates:?}");
    }
    assert_eq!(scheduler.step().unwrap().len(), 2, "the tenth chunk was the last");
}

#[test]
fn what_cannot_be_continued_is_refused_when_it_comes() {
    let model = random_model(&mla(3, |_| {}), 15);
    let mut scheduler = scheduler(&model, slots(1, Form::Auto, CacheDtype::F32));
    let mut refused = |request: Request| scheduler.admit(request).unwrap_err();
    assert!(matches!(refused(request(&[], 1)), Error::NoToken { .. }));
    assert!(matches!(refused(request(&[53], 1)), Error::Token { token: 53, .. }));
    assert!(matches!(refused(request(&[1], 0)), Error::Setting { field: "max_new_tokens", .. }));
    assert!(matches!(refused(request(&[1], 64)), Error::Capacity { needed: 65, capacity: 64, .. }));
    assert!(matches!(refused(request(&[1], usize::MAX)), Error::Positions { .. }));
    let hot = SamplingConfig { temperature: -1.0, ..SamplingConfig::default() };
    assert!(matches!(refused(Request { sampling: hot, ..request(&[1], 1) }), Error::Setting { .. }));
    assert!(scheduler.is_idle() && scheduler.step().unwrap().is_empty());
    let new = |slots| Scheduler::new(&model, slots, &Device::flex()).err().unwrap();
    let usual = slots(1, Form::Auto, CacheDtype::F32);
    assert!(matches!(new(Slots { count: 0, ..usual }), Error::Setting { field: "slots", .. }));
    assert!(matches!(new(Slots { capacity: 193, ..usual }), Error::Positions { needed: 193, limit: 192 }));
    assert!(matches!(new(Slots { form: Form::Fused, ..usual }), Error::NoFused));
}
