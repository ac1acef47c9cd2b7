//! Latents as full keys and values: exact where a head is affine in the hidden state, refused where it is not.

use burn::tensor::Tensor;
use faer::Mat;
use lowkey_infer::{Form as Way, GenerateConfig};
use lowkey_model::ModelConfig;
use lowkey_model::attention::{AttentionConfig, GroupedConfig, MlaConfig};
use lowkey_model::checkpoint::WeightDtype;
use lowkey_model::config::Family;
use lowkey_model::rope::{RopeConfig, RopePairs, RopeType};

use super::*;
use crate::loss;
use crate::matrix::to_mat;
use crate::tests::{config, device, distance, logits, model, text, wide};
use crate::to_mla::tests::{config as grouped, far, ids, zoo as sources};
use crate::to_mla::{Inputs, Keep, exact as to_latent, narrowed};

const FORMS: [Form; 2] = [Form::Heads, Form::Single];

fn yarn() -> RopeConfig {
    RopeConfig {
        rope_type: RopeType::Yarn,
        factor: Some(4.0),
        original_max_position_embeddings: Some(40),
        mscale: Some(0.7),
        mscale_all_dim: Some(1.0),
        ..RopeConfig::default()
    }
}

/// Three heads of 5 + 4 and 7 numbers over an unnormalised latent of 9, in a stream of 14.
fn linear(change: impl FnOnce(&mut ModelConfig, &mut MlaConfig)) -> ModelConfig {
    config(|c, m| {
        c.max_position_embeddings = 300_000;
        m.latent_norm = false;
        change(c, m);
    })
}

fn repeated() -> RopePairs {
    RopePairs { width: 8, frequencies: vec![2, 0, 0] }
}

/// Every option of latents that has an exact form, the width of a head, and the pairs of it that turn.
fn zoo() -> Vec<(&'static str, ModelConfig, [usize; 2])> {
    vec![
        ("plain", linear(|_, _| ()), [10, 2]),
        ("halves", linear(|_, m| m.rope_interleave = false), [10, 2]),
        ("biases of queries", linear(|_, m| m.query_bias = true), [10, 2]),
        ("all biases", linear(|_, m| (m.query_bias, m.attention_bias) = (true, true)), [10, 2]),
        (
            "biases of feed-forward layers",
            linear(|c, m| {
                c.layers.iter_mut().for_each(|layer| layer.mlp.bias = true);
                m.query_bias = true;
            }),
            [10, 2],
        ),
        ("wide values", linear(|_, m| m.v_head_dim = 13), [14, 2]),
        (
            "a frequency that comes twice",
            linear(|_, m| (m.qk_rope_head_dim, m.rope_pairs) = (6, Some(repeated()))),
            [12, 3],
        ),
        ("no rotation", linear(|_, m| m.qk_rope_head_dim = 0), [8, 0]),
        ("YaRN", linear(|c, _| c.rope = yarn()), [10, 2]),
        ("tied, one head", linear(|c, _| (c.tie_word_embeddings, c.num_attention_heads) = (true, 1)), [10, 2]),
        ("a latent wider than d", linear(|_, m| m.kv_lora_rank = 19), [10, 2]),
    ]
}

fn heads(model: &CausalLm) -> &GroupedConfig {
    match model.config.attention() {
        AttentionConfig::Grouped(grouped) => grouped,
        AttentionConfig::Mla(_) => panic!("still latents"),
    }
}

fn check(name: &str, source: &CausalLm, made: &CausalLm, most: f64) {
    let tokens = ids(80);
    for (where_, apart) in [
        ("near", distance(&logits(source, &tokens), &logits(made, &tokens))),
        ("far", distance(&far(source, &tokens), &far(made, &tokens))),
    ] {
        assert!(apart < most, "{name}, {where_}: {apart}");
    }
}

#[test]
fn a_latent_without_a_norm_has_an_exact_form_with_full_keys_and_values() {
    for (seed, (name, config, [width, pairs])) in zoo().into_iter().enumerate() {
        let narrow = model(&config, seed as u64);
        let wide = wide(&narrow);
        for form in FORMS {
            let made = exact(&narrow, form, &device()).unwrap();
            let name = format!("{name}, {form:?}");
            check(&name, &narrow, &made, 2e-5);
            // What differs in f64 differs in the mathematics. Frequencies are rounded once, which positions of 200,000 show.
            check(&name, &wide, &exact(&wide, form, &device()).unwrap(), 1e-9);
            let text = text(3, 40);
            let losses = [&narrow, &made].map(|model| loss(model, &text, &device()).unwrap());
            assert!((losses[0] - losses[1]).abs() < 1e-5, "{name}: {losses:?}");
            assert!([Family::Llama, Family::Qwen2].contains(&made.config.family), "{name}: {:?}", made.config.family);
            let found = heads(&made);
            let still = 2f64.powi(-60);
            let turning = made.config.inverse_frequencies().into_iter().filter(|f| *f > still).count();
            match form {
                Form::Heads => {
                    assert_eq!(
                        (found.num_key_value_heads, found.head_dim, turning),
                        (config.num_attention_heads, width, pairs),
                        "{name}"
                    );
                }
                Form::Single => {
                    let mla = config.attention().latent().unwrap();
                    let both = (mla.kv_lora_rank + mla.qk_rope_head_dim).next_multiple_of(2);
                    assert_eq!((found.num_key_value_heads, found.head_dim), (1, both), "{name}");
                    assert_eq!(2 * turning, mla.qk_rope_head_dim, "{name}");
                }
            }
        }
    }
}

#[test]
fn latents_that_were_cut_have_their_exact_form_too() {
    let narrow = model(&linear(|_, m| m.query_bias = true), 5).with_kv_ranks(&[4, 9, 6]).unwrap();
    for form in FORMS {
        let made = exact(&narrow, form, &device()).unwrap();
        check("cut", &narrow, &made, 2e-5);
        if form == Form::Single {
            assert_eq!(heads(&made).head_dim, 14, "the widest of them beside four that turn");
        }
    }
}

#[test]
fn a_model_with_heads_is_saved_read_and_decoded() {
    for (seed, (name, config, _)) in zoo().into_iter().enumerate() {
        let config = ModelConfig { max_position_embeddings: 300, ..config };
        let narrow = model(&config, seed as u64 + 20);
        let continued = |model: &CausalLm| {
            let config =
                GenerateConfig { max_new_tokens: 40, form: Way::Auto, prefill_chunk: 7, ..GenerateConfig::default() };
            lowkey_infer::generate(model, &ids(20), &config, &device(), &mut |_| std::ops::ControlFlow::Continue(()))
                .unwrap()
                .ids
        };
        let expected = continued(&narrow);
        for form in FORMS {
            let made = exact(&narrow, form, &device()).unwrap();
            let dir = tempfile::tempdir().unwrap();
            made.save(dir.path(), WeightDtype::F32, usize::MAX).unwrap();
            let read = CausalLm::load(dir.path(), &device()).unwrap();
            assert_eq!(read.config, made.config, "{name}");
            assert_eq!(logits(&read, &ids(30)), logits(&made, &ids(30)), "{name}");
            assert_eq!(continued(&read), expected, "{name}, {form:?}");
        }
    }
}

/// There and back: the same function, and where all of a head turned the same sizes and the same rotation.
#[test]
fn full_keys_and_values_come_back_from_their_latent_form() {
    for (seed, (name, config, _)) in sources().into_iter().enumerate() {
        let narrow = model(&config, seed as u64 + 40);
        let back = exact(&to_latent(&narrow, &device()).unwrap(), Form::Heads, &device()).unwrap();
        check(name, &narrow, &back, 2e-5);
        let (before, after) = (heads(&narrow), heads(&back));
        assert_eq!(after.num_key_value_heads, before.num_key_value_heads, "{name}");
        assert_eq!(after.head_dim, before.head_dim, "{name}");
        assert_eq!(back.config.cache_numbers(), narrow.config.cache_numbers(), "{name}");
        let whole = before.rotary_dim == before.head_dim;
        assert_eq!(back.config.rope == narrow.config.rope, whole, "{name}");
        let wide = wide(&narrow);
        let back = exact(&to_latent(&wide, &device()).unwrap(), Form::Heads, &device()).unwrap();
        check(name, &wide, &back, 1e-9);
        let one = exact(&to_latent(&wide, &device()).unwrap(), Form::Single, &device()).unwrap();
        check(name, &wide, &one, 1e-9);
    }
}

/// Keys of several heads that were mixed within each frequency are one pair for each head again.
#[test]
fn mixed_directions_of_a_frequency_are_one_pair_of_each_head() {
    let whole = wide(&model(&grouped(|_, g| (g.num_key_value_heads, g.qkv_bias) = (2, true)), 6));
    let inputs = Inputs::measure(&whole, &text(4, 60), &device(), &mut |_| {}).unwrap();
    for rotated in [2, 6, 8] {
        let latent = narrowed(&whole, rotated, Keep::Energy, &inputs, &device()).unwrap();
        let made = exact(&latent, Form::Heads, &device()).unwrap();
        check("mixed", &latent, &made, 1e-9);
        let mut turns = latent.config.inverse_frequencies();
        turns.sort_by(f64::total_cmp);
        turns.dedup();
        let turning = made.config.inverse_frequencies().into_iter().filter(|f| *f > 2f64.powi(-60)).count();
        assert_eq!((heads(&made).num_key_value_heads, turning), (2, turns.len()), "{rotated}");
    }
}

/// A norm so far below its ε that it does nothing, as exports of models without one have it.
#[test]
fn a_norm_that_does_nothing_is_no_obstacle() {
    let small = |model: &mut CausalLm, by: f32| {
        for block in &mut model.model.layers {
            let mla = block.self_attn.latent_mut().unwrap();
            mla.kv_a_proj_with_mqa.set_matrix(mla.kv_a_proj_with_mqa.matrix() * by);
            let down = mla.q_a_proj.as_mut().unwrap();
            down.set_matrix(down.matrix() * by);
            for norm in [&mut mla.kv_a_layernorm, mla.q_a_layernorm.as_mut().unwrap()] {
                norm.set_gain(norm.gain() * (1e-3 / by));
            }
        }
    };
    let mut idle = model(&config(|_, m| m.q_lora_rank = Some(8)), 3);
    small(&mut idle, 2f32.powi(-30));
    for form in FORMS {
        let made = exact(&idle, form, &device()).unwrap();
        let apart = distance(&logits(&idle, &ids(80)), &logits(&made, &ids(80)));
        assert!(apart < 2e-5, "{form:?}: {apart}");
    }
    let mut working = model(&config(|_, m| m.q_lora_rank = Some(8)), 3);
    small(&mut working, 2f32.powi(-12));
    assert!(exact(&working, Form::Heads, &device()).is_err());
}

#[test]
fn what_has_no_exact_form_is_refused() {
    let message = |model: &CausalLm, form| exact(model, form, &device()).unwrap_err().to_string();
    for form in FORMS {
        let normed = message(&model(&config(|_, _| ()), 1), form);
        assert!(normed.contains("layer 0 normalises its latent of keys and values"), "{normed}");
        let compressed = message(&model(&linear(|_, m| m.q_lora_rank = Some(8)), 1), form);
        assert!(compressed.contains("layer 0 normalises its latent of queries (q_lora_rank)"), "{compressed}");
        let full = message(&model(&grouped(|_, _| ()), 1), form);
        assert!(full.contains("GQA-3 attention has them already"), "{full}");
        let mut broken = model(&linear(|_, _| ()), 1);
        let mla = broken.model.layers[2].self_attn.latent_mut().unwrap();
        mla.kv_b_proj.set_matrix(mla.kv_b_proj.matrix() * f32::INFINITY);
        let broken = message(&broken, form);
        assert!(broken.contains("layers.2.self_attn.kv_b_proj.weight holds"), "{broken}");
    }
    let none = nearest(&model(&config(|_, _| ()), 1), Form::Heads, &[], &device(), &mut |_| {}).unwrap_err();
    assert!(none.to_string().contains("no sequence"), "{none}");
}

/// The constant in a norm's place misses least, and a model with an exact form is that one.
#[test]
fn the_nearest_model_has_the_best_constants() {
    let normed = model(&config(|_, m| (m.q_lora_rank, m.latent_scale) = (Some(8), true)), 7);
    let text = text(3, 50);
    let layers = source(&normed).unwrap();
    let found = norms::fitted(&normed, &layers, &text, &device(), &mut |_| {}).unwrap();
    let mut missed = [0.0; 3];
    for ids in &text {
        let ids = lowkey_model::ids_tensor(ids, 1, ids.len(), &device());
        let x = normed.model.layers[0].input_layernorm.forward(normed.model.embed_tokens.forward(ids));
        let rope = normed.rope_table(&[(0..x.dims()[1]).collect()], &device());
        let down = layers[0].kv_a_proj_with_mqa.forward(x.clone()).narrow(2, 0, 9);
        let gained: Tensor<3> = down * layers[0].kv_a_layernorm.gain().reshape([1, 1, 9]);
        let [plain, normed]: [Mat<f64>; 2] = [gained, layers[0].latent(x, &rope).c_kv()]
            .map(|part| to_mat(part.squeeze_dim::<2>(0), "latents").unwrap());
        for (missed, times) in missed.iter_mut().zip([1.0, 0.97, 1.03]) {
            *missed += (faer::Scale(times * found[0].latent) * &plain - &normed).squared_norm_l2();
        }
    }
    assert!(missed[0] < missed[1] && missed[0] < missed[2], "{missed:?}");
    for form in FORMS {
        let made = nearest(&normed, form, &text, &device(), &mut |_| {}).unwrap();
        let losses = [&normed, &made].map(|model| loss(model, &text, &device()).unwrap());
        assert!(losses.iter().all(|loss| loss.is_finite()) && losses[0] != losses[1], "{losses:?}");
    }
    let linear = model(&linear(|_, _| ()), 2);
    let made = nearest(&linear, Form::Heads, &text, &device(), &mut |_| {}).unwrap();
    assert_eq!(logits(&made, &ids(40)), logits(&exact(&linear, Form::Heads, &device()).unwrap(), &ids(40)));
}

/// A head that is a multiple of the rotated width has the model's own frequencies in it, and divides none of them.
#[test]
fn divisors_are_one_where_a_head_has_the_frequency() {
    let narrow = model(&linear(|_, m| (m.qk_nope_head_dim, m.qk_rope_head_dim) = (8, 4)), 4);
    let made = exact(&narrow, Form::Heads, &device()).unwrap();
    let divisors = made.config.rope.short_factor.clone().unwrap();
    assert_eq!(divisors.iter().filter(|x| **x == 1.0).count(), 2, "{divisors:?}");
    assert_eq!(divisors.iter().filter(|x| **x > 1e20).count(), 4, "{divisors:?}");
    assert_eq!((made.config.rope.rope_type, made.config.rope.table_factor()), (RopeType::Longrope, 1.0));
}
