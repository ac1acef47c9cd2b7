//! Theorems of conversion as they hold for the models that are made: exact at full width, best below.

mod by_layer;
mod care;

use burn::tensor::{DType, Tensor, TensorData};
use lowkey_infer::{Form, GenerateConfig};
use lowkey_model::config::{LayerConfig, Layers, MlpConfig};
use lowkey_model::model::Context;
use lowkey_model::rope::{RopeConfig, RopeType};
use lowkey_model::{ModelConfig, ids_tensor};

use super::*;
use crate::tests::{device, distance, logits, model, random, text, wide};
use crate::{Importance, Rotated, loss, trimmed};

/// Odd sizes: 6 query heads of 6 numbers in a stream of 26.
pub(crate) fn config(change: impl FnOnce(&mut ModelConfig, &mut GroupedConfig)) -> ModelConfig {
    let mut grouped = GroupedConfig {
        num_key_value_heads: 3,
        head_dim: 6,
        rotary_dim: 6,
        qkv_bias: false,
        o_bias: false,
        qk_norm: false,
    };
    let attention = AttentionConfig::Grouped(grouped.clone());
    let layer = LayerConfig { attention, mlp: MlpConfig { intermediate_size: 20, bias: false } };
    let mut config = ModelConfig {
        vocab_size: 31,
        hidden_size: 26,
        num_attention_heads: 6,
        max_position_embeddings: 300_000,
        layers: Layers::equal(layer, 2).unwrap(),
        kv_elastic_ranks: None,
        rope: RopeConfig::default(),
        rms_norm_eps: 1e-5,
        tie_word_embeddings: false,
        initializer_range: None,
        family: lowkey_model::config::Family::Lowkey,
        bos_token_id: None,
        eos_token_id: vec![],
    };
    change(&mut config, &mut grouped);
    config.layers.iter_mut().for_each(|layer| layer.attention = AttentionConfig::Grouped(grouped.clone()));
    config.family = config.natural_family();
    config
}

fn yarn() -> RopeConfig {
    RopeConfig {
        rope_type: RopeType::Yarn,
        factor: Some(4.0),
        original_max_position_embeddings: Some(40),
        mscale: Some(0.7),
        // A factor on the logits of latent attention alone.
        mscale_all_dim: Some(1.0),
        ..RopeConfig::default()
    }
}

/// Every option of full keys and values that has an exact form, with the width of rotated key and latent that it must come to.
pub(crate) fn zoo() -> Vec<(&'static str, ModelConfig, [usize; 2])> {
    vec![
        ("GQA", config(|_, _| {}), [18, 18]),
        (
            "two groups of wide heads",
            config(|_, g| (g.num_key_value_heads, g.head_dim, g.rotary_dim) = (2, 10, 10)),
            [20, 20],
        ),
        // 36 values of 26 numbers: the rank is that of the hidden state.
        ("MHA", config(|_, g| g.num_key_value_heads = 6), [36, 26]),
        ("MQA", config(|_, g| g.num_key_value_heads = 1), [6, 6]),
        ("Qwen2's biases", config(|_, g| g.qkv_bias = true), [18, 18]),
        ("Llama's biases", config(|_, g| (g.qkv_bias, g.o_bias) = (true, true)), [18, 18]),
        ("an output bias", config(|_, g| g.o_bias = true), [18, 18]),
        ("partial rotation", config(|_, g| (g.rotary_dim, g.qkv_bias) = (4, true)), [12, 24]),
        ("no rotation", config(|_, g| (g.rotary_dim, g.qkv_bias) = (0, true)), [0, 26]),
        ("YaRN, tied", config(|c, _| (c.rope, c.tie_word_embeddings) = (yarn(), true)), [18, 18]),
        ("YaRN, partial rotation", config(|c, g| (c.rope, g.rotary_dim) = (yarn(), 2)), [6, 26]),
    ]
}

/// Logits at positions that begin far from 0.
pub(crate) fn far(model: &CausalLm, ids: &[u32]) -> Vec<f64> {
    let rope = model.rope_table(&[(200_000..200_000 + ids.len()).collect()], &device());
    let context = Context { rope, ..model.context(&vec![0; ids.len()], ids.len(), &device()) };
    let hidden = model.hidden(ids_tensor(ids, 1, ids.len(), &device()), &context, None);
    model.logits(hidden).try_into_vec_as::<f64>().unwrap()
}

pub(crate) fn ids(len: u32) -> Vec<u32> {
    (0..len).map(|i| (i * i + 3) % 31).collect()
}

#[test]
fn full_keys_and_values_have_an_exact_latent_form() {
    for (seed, (name, config, [rotated, latent])) in zoo().into_iter().enumerate() {
        let narrow = model(&config, seed as u64);
        let converted = exact(&narrow, &device()).unwrap();
        let mla = converted.config.attention().latent().unwrap();
        assert_eq!([mla.qk_rope_head_dim, mla.kv_lora_rank], [rotated, latent], "{name}");
        assert!(converted.config.cache_numbers() <= narrow.config.cache_numbers(), "{name}");
        assert_eq!(mla.rope_pairs.is_none(), ["MQA", "no rotation"].contains(&name), "{name}");
        let tokens = ids(90);
        for (form, apart) in [
            ("near", distance(&logits(&narrow, &tokens), &logits(&converted, &tokens))),
            ("far", distance(&far(&narrow, &tokens), &far(&converted, &tokens))),
        ] {
            assert!(apart < 1e-5, "{name}, {form}: {apart}");
        }
        let text = text(3, 40);
        let losses = [&narrow, &converted].map(|model| loss(model, &text, &device()).unwrap());
        assert!((losses[0] - losses[1]).abs() < 1e-5, "{name}: {losses:?}");
        // What differs in f64 differs in the mathematics.
        let wide = wide(&narrow);
        let converted = exact(&wide, &device()).unwrap();
        let apart = distance(&far(&wide, &tokens), &far(&converted, &tokens));
        assert!(apart < 1e-11, "{name} in f64: {apart}");
    }
}

#[test]
fn a_converted_model_is_saved_read_and_decoded_in_latent_space() {
    for (seed, (name, config, _)) in zoo().into_iter().enumerate() {
        let config = ModelConfig { max_position_embeddings: 300, ..config };
        let narrow = model(&config, seed as u64 + 20);
        let converted = exact(&narrow, &device()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        converted.save(dir.path(), lowkey_model::checkpoint::WeightDtype::F32, usize::MAX).unwrap();
        let read = CausalLm::load(dir.path(), &device()).unwrap();
        assert_eq!(read.config, converted.config, "{name}");
        assert_eq!(logits(&read, &ids(30)), logits(&converted, &ids(30)), "{name}");
        let continued = |model: &CausalLm, form| {
            let config = GenerateConfig { max_new_tokens: 40, form, prefill_chunk: 7, ..GenerateConfig::default() };
            lowkey_infer::generate(model, &ids(20), &config, &device(), &mut |_| std::ops::ControlFlow::Continue(()))
                .unwrap()
                .ids
        };
        let expected = continued(&narrow, Form::Auto);
        for form in [Form::Absorbed, Form::Expanded] {
            assert_eq!(continued(&read, form), expected, "{name}, {form:?}");
        }
    }
}

/// A latent is as wide as the rank of what it holds: keys and values that lie in few directions need few numbers.
#[test]
fn a_latent_has_the_rank_of_keys_and_values_that_do_not_turn() {
    let mut narrow = wide(&model(&config(|_, g| g.rotary_dim = 0), 3));
    for (layer, block) in narrow.model.layers.iter_mut().enumerate() {
        let lowkey_model::attention::Attention::Grouped(grouped) = &mut block.self_attn else { unreachable!() };
        // 18 keys and 18 values, all of them of 5 directions of the hidden state.
        let both = random(layer as u64, 36, 5) * random(layer as u64 + 40, 5, 26);
        let part = |from| crate::matrix::to_tensor(&crate::matrix::rows(&both, from, from + 18), DType::F64, &device());
        grouped.k_proj.set_matrix(part(0));
        grouped.v_proj.set_matrix(part(18));
    }
    let converted = exact(&narrow, &device()).unwrap();
    assert_eq!((narrow.config.cache_numbers(), converted.config.cache_numbers()), (2 * 36, 2 * 5));
    let apart = distance(&logits(&narrow, &ids(60)), &logits(&converted, &ids(60)));
    assert!(apart < 1e-11, "{apart}");
}

/// Matrices that mix heads within a frequency, the one of queries the inverse of that of keys, change no score.
#[test]
fn complex_mixtures_of_heads_within_a_frequency_change_nothing() {
    for (seed, config) in
        [config(|_, _| {}), config(|_, g| (g.num_key_value_heads, g.qkv_bias) = (6, true))].iter().enumerate()
    {
        let whole = wide(&model(config, seed as u64));
        let (grouped, layers) = source(&whole).unwrap();
        let inputs = Inputs::measure(&whole, &text(3, 40), &device(), &mut |_| {}).unwrap();
        let turning: Vec<Vec<Turning>> = layers
            .iter()
            .zip(&inputs.moments)
            .map(|(heads, moment)| {
                Directions::of_layer(heads, moment, 1, 0).unwrap().iter().map(Directions::mixed).collect()
            })
            .collect();
        assert!((turning[0][1].key[(0, 1)]).im.abs() > 1e-3, "the mixture is not complex");
        let means = without_mean(&whole);
        let parts = Parts { grouped: &grouped, layers: &layers, turning: &turning, means: &means };
        let mixed = convert(&whole, parts, None, &device()).unwrap();
        let apart = distance(&far(&whole, &ids(70)), &far(&mixed, &ids(70)));
        assert!(apart < 1e-10, "{apart}");
        let plain = exact(&whole, &device()).unwrap();
        let rows = |model: &CausalLm| {
            let mla = model.model.layers[0].self_attn.latent().unwrap();
            crate::matrix::to_mat(mla.kv_a_proj_with_mqa.matrix(), "kv_a").unwrap()
        };
        assert!((rows(&plain) - rows(&mixed)).norm_max() > 0.1, "nothing was mixed");
    }
}

/// What the scores of a frequency miss when directions are left out is the sum of their energies, and no other mixture misses less.
#[test]
fn the_first_directions_of_a_frequency_are_the_best() {
    let whole = wide(&model(&config(|_, g| g.qkv_bias = true), 9));
    let (_, layers) = source(&whole).unwrap();
    let inputs = Inputs::measure(&whole, &text(3, 60), &device(), &mut |_| {}).unwrap();
    let (heads, moment) = (&layers[1], &inputs.moments[1]);
    // E|q̄ e_gᵀ (1 − AB) κ|², with queries and keys of independent tokens, by sums over the heads.
    let missed = |at: usize, left: &Mat<c64>| {
        let half = moment.self_adjoint_eigen(faer::Side::Lower).unwrap();
        let root = Mat::from_fn(27, 27, |i, j| half.U()[(i, j)] * half.S().column_vector()[j].max(0.0).sqrt());
        let mut sum = 0.0;
        for head in 0..6 {
            let query: f64 =
                heads.pair(head, at).iter().map(|row| (heads.query.subrows(*row, 1) * &root).squared_norm_l2()).sum();
            let mut key = Mat::<c64>::zeros(1, 27);
            for g in 0..3 {
                let [re, im] = heads.pair(g, at).map(|row| heads.key.subrows(row, 1) * &root);
                for i in 0..27 {
                    key[(0, i)] += left[(heads.group(head), g)] * c64::new(re[(0, i)], im[(0, i)]);
                }
            }
            sum += query * key.squared_norm_l2();
        }
        sum * heads.dims.scale.powi(2)
    };
    for (at, found) in Directions::of_layer(heads, moment, 1, 1).unwrap().iter().enumerate() {
        for kept in 0..3 {
            let expected: f64 = found.energies[kept..].iter().sum();
            let best = missed(at, &found.keep(kept, &[c64::new(0.0, 0.0); 3])[0].left());
            assert!((best - expected).abs() < 1e-9 * expected, "{at}, {kept}: {best} {expected}");
            for seed in 0..20 {
                let part = |add: u64, rows, columns| {
                    let [re, im] = [0, 500].map(|more| random(seed + add + more, rows, columns));
                    Mat::from_fn(rows, columns, |i, j| c64::new(re[(i, j)], im[(i, j)]))
                };
                let other = Mat::<c64>::identity(3, 3) - part(100, 3, kept) * part(200, kept, 3);
                assert!(missed(at, &other) > best * (1.0 - 1e-9), "{at}, {kept}");
            }
        }
    }
}

#[test]
fn pairs_are_shared_out_as_asked() {
    let costs = [vec![3.0, 0.1], vec![5.0, 4.0], vec![2.0, 1.0], vec![0.0, 0.0]];
    let shared = |pairs, keep| share(&costs, pairs, keep);
    assert_eq!(shared(4, Keep::Energy), [1, 2, 1, 0]);
    assert_eq!(shared(3, Keep::Fastest), [2, 1, 0, 0]);
    assert_eq!(shared(4, Keep::Uniform), [1, 1, 1, 1]);
    assert_eq!(shared(2, Keep::Uniform), [1, 0, 1, 0]);
    assert_eq!(shared(6, Keep::Uniform), [2, 1, 2, 1]);
    for keep in [Keep::Energy, Keep::Uniform, Keep::Fastest] {
        for pairs in 0..=8 {
            let counts = shared(pairs, keep);
            assert!(counts.iter().sum::<usize>() == pairs && counts.iter().all(|n| *n <= 2), "{keep:?}: {counts:?}");
        }
        assert_eq!(shared(8, keep), [2; 4]);
    }
}

/// A constant in place of a rotation: best of all constants, and exact where nothing turns.
#[test]
fn the_mean_turn_is_the_best_constant() {
    let distances = [5.0, 4.0, 3.0, 2.0, 1.0];
    assert_eq!(mean_turn(0.0, &distances), c64::new(1.0, 0.0));
    let turn = mean_turn(0.7, &distances);
    let missed = |constant: c64| -> f64 {
        let at = |(i, weight): (usize, &f64)| weight * (c64::new(0.0, -0.7 * i as f64).exp() - constant).norm_sqr();
        distances.iter().enumerate().map(at).sum()
    };
    let best = missed(turn);
    assert!((best / 15.0 - (1.0 - turn.norm_sqr())).abs() < 1e-12);
    for (re, im) in [(0.1, 0.0), (-0.1, 0.0), (0.0, 0.1), (0.0, -0.1)] {
        assert!(missed(turn + c64::new(re, im)) > best);
    }
}

#[test]
fn fewer_rotated_numbers_are_exact_at_the_most_and_cost_more_below() {
    let whole = wide(&model(&config(|_, g| (g.num_key_value_heads, g.qkv_bias) = (2, true)), 6));
    let text = text(4, 60);
    let inputs = Inputs::measure(&whole, &text, &device(), &mut |_| {}).unwrap();
    let before = logits(&whole, &ids(80));
    for keep in [Keep::Energy, Keep::Uniform, Keep::Fastest] {
        let mut off = Vec::new();
        for rotated in [0, 4, 8, 12] {
            let narrow = narrowed(&whole, rotated, keep, &inputs, &device()).unwrap();
            let mla = narrow.config.attention().latent().unwrap();
            assert_eq!(mla.qk_rope_head_dim, rotated);
            let after = logits(&narrow, &ids(80));
            let apart = before.iter().zip(&after).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
            off.push(apart);
        }
        assert!(off[3] < 1e-9 && off[..3].iter().all(|apart| *apart > 1e-3), "{keep:?}: {off:?}");
        assert!(keep != Keep::Energy || off[2] < off[0], "{off:?}");
    }
    for rotated in [3, 14] {
        let message = narrowed(&whole, rotated, Keep::Energy, &inputs, &device()).unwrap_err().to_string();
        assert!(message.contains("the 12 that turn now"), "{message}");
    }
}

/// Rotated, cut and trimmed: a latent of any importance loses nothing at its full width, and below holds no row that is not read.
#[test]
fn a_converted_latent_is_cut_like_any_other() {
    let whole = model(&config(|_, g| (g.num_key_value_heads, g.qkv_bias) = (2, true)), 8);
    let text = text(4, 60);
    let inputs = Inputs::measure(&whole, &text, &device(), &mut |_| {}).unwrap();
    let latent = narrowed(&whole, 6, Keep::Energy, &inputs, &device()).unwrap();
    let full = latent.config.kv_ranks()[0];
    let before = logits(&latent, &ids(80));
    for importance in [Importance::Weights, Importance::Activations, Importance::Readers] {
        let rotated = Rotated::by(importance, &latent, &text, &device(), &mut |_| {}).unwrap();
        assert!(distance(&before, &logits(&rotated.model, &ids(80))) < 2e-5, "{importance:?}");
        for ranks in [[5, 5], [7, 3], [full, 1]] {
            let cut = rotated.cut(&ranks, &device()).unwrap();
            let small = trimmed(&cut, &device()).unwrap();
            let mla = small.config.attention().latent().unwrap();
            assert_eq!((mla.kv_lora_rank, small.config.kv_ranks()), (*ranks.iter().max().unwrap(), ranks.to_vec()));
            assert!(distance(&logits(&cut, &ids(80)), &logits(&small, &ids(80))) < 1e-6, "{importance:?}, {ranks:?}");
        }
    }
}

/// With whitened inputs and W_O as the identity all three say the same; otherwise what counts the text misses less of it.
#[test]
fn whitening_misses_less_of_a_text_than_the_weights_do() {
    let whole = model(
        &config(|c, g| {
            c.layers.resize(1).unwrap();
            (g.num_key_value_heads, g.rotary_dim) = (2, 0);
        }),
        4,
    );
    let text = text(6, 90);
    let latent = exact(&whole, &device()).unwrap();
    let rebuilt = |model: &CausalLm| {
        let mut all = Vec::new();
        for ids in &text {
            let context = model.context(&vec![0; ids.len()], ids.len(), &device());
            let x = model.model.embed_tokens.forward(ids_tensor(ids, 1, ids.len(), &device()));
            let x = model.model.layers[0].input_layernorm.forward(x);
            let mla = model.model.layers[0].self_attn.latent().unwrap();
            let (keys, values) = mla.expand(mla.latent(x, &context.rope));
            all.extend(Tensor::cat(vec![keys, values], 3).try_into_vec_as::<f64>().unwrap());
        }
        all
    };
    let before = rebuilt(&latent);
    let missed = |importance| {
        let rotated = Rotated::by(importance, &latent, &text, &device(), &mut |_| {}).unwrap();
        let after = rebuilt(&rotated.cut(&[6], &device()).unwrap());
        before.iter().zip(&after).map(|(a, b)| (a - b).powi(2)).sum::<f64>()
    };
    let (weights, activations) = (missed(Importance::Weights), missed(Importance::Activations));
    assert!(activations < weights, "{activations} {weights}");
}

#[test]
fn norms_of_heads_are_refused_and_absorbed() {
    let normed = model(&config(|_, g| (g.qk_norm, g.qkv_bias) = (true, true)), 2);
    let refused = exact(&normed, &device()).unwrap_err().to_string();
    assert!(refused.contains("qk_norm") && refused.contains("calibration text"), "{refused}");
    let text = text(4, 60);
    let plain = absorb_head_norms(&normed, &text, &device(), &mut |_| {}).unwrap();
    let AttentionConfig::Grouped(grouped) = plain.config.attention() else { unreachable!() };
    assert!(!grouped.qk_norm);
    let losses = [&normed, &plain].map(|model| loss(model, &text, &device()).unwrap());
    assert!(losses[0] != losses[1] && (losses[0] - losses[1]).abs() < 1.0, "{losses:?}");
    let latent = exact(&plain, &device()).unwrap();
    assert!(distance(&logits(&plain, &ids(50)), &logits(&latent, &ids(50))) < 1e-5);
    // Where every head has the same length anyway, the constant is the norm.
    let mut even = normed.clone();
    for block in &mut even.model.layers {
        let lowkey_model::attention::Attention::Grouped(grouped) = &mut block.self_attn else { unreachable!() };
        for map in [&mut grouped.q_proj, &mut grouped.k_proj] {
            map.set_matrix(map.matrix() * 0.0);
            let [rows, _] = map.dims();
            let ones: Vec<f32> = (0..rows).map(|i| if i % 2 == 0 { 0.5 } else { -0.5 }).collect();
            map.set_bias(Some(Tensor::from_data(TensorData::new(ones, [rows]), &device())));
        }
    }
    let plain = absorb_head_norms(&even, &text, &device(), &mut |_| {}).unwrap();
    assert!(distance(&logits(&even, &ids(50)), &logits(&plain, &ids(50))) < 1e-5);
    let again = absorb_head_norms(&plain, &text, &device(), &mut |_| {}).unwrap();
    assert_eq!(logits(&plain, &ids(50)), logits(&again, &ids(50)));
}

#[test]
fn what_has_no_latent_form_is_refused() {
    let whole = model(&config(|_, _| {}), 1);
    let latent = exact(&whole, &device()).unwrap();
    let message = exact(&latent, &device()).unwrap_err().to_string();
    assert!(message.contains("latents already"), "{message}");
    let mut broken = whole.clone();
    let lowkey_model::attention::Attention::Grouped(grouped) = &mut broken.model.layers[1].self_attn else {
        unreachable!()
    };
    grouped.k_proj.set_matrix(grouped.k_proj.matrix() * f32::NAN);
    let message = exact(&broken, &device()).unwrap_err().to_string();
    assert!(message.contains("layers.1.self_attn.k_proj.weight holds NaN"), "{message}");
    assert_eq!(widths(&whole.config).unwrap(), [18, 36]);
}

/// From the source to a budget in one go: what is asked is kept to, and a wider cache loses less.
#[test]
fn a_conversion_keeps_to_its_budget() {
    let whole = model(&config(|_, g| (g.num_key_value_heads, g.qkv_bias) = (2, true)), 8);
    let text = text(4, 60);
    let wanted = |width, rotated| Wanted { width, rotated, keep: None, fold: 1, centred: true, importance: None };
    let fitted = |wanted| fit(&whole, wanted, &text, &device(), &mut |_| {});
    // 2 layers of 24 numbers.
    for budget in [2, 9, 24, 48] {
        let made = fitted(wanted(Width::Budget(budget), None)).unwrap();
        assert!(made.model.config.cache_numbers() <= budget, "{budget}");
        assert_eq!(made.model.config.cache_numbers(), made.ranks.iter().sum::<usize>() + 2 * made.rotated);
        assert!((made.loss_after - loss(&made.model, &text, &device()).unwrap()).abs() < 1e-5);
        assert!(made.tried.iter().any(|tried| tried.rotated == made.rotated) && made.curves.len() == 2);
        assert!(made.tried.iter().all(|tried| tried.loss >= made.loss_after - 1e-6), "{:?}", made.tried);
        // The better of two ways, whose losses are what they are by themselves.
        let by = |importance| fitted(Wanted { importance: Some(importance), ..wanted(Width::Budget(budget), None) });
        let each = [Importance::Readers, Importance::Activations].map(|way| (by(way).unwrap().loss_after, way));
        let least = if each[1].0 < each[0].0 { each[1] } else { each[0] };
        assert_eq!((made.loss_after, made.importance), least, "{budget}");
        let cost = made.loss_after - made.loss_before;
        assert!(if budget == 48 { cost < 1e-4 } else { cost.is_finite() }, "{budget}: {cost}");
    }
    // Without the text's mean in biases there are those alone that the source has.
    let plain = model(&config(|_, g| g.num_key_value_heads = 2), 8);
    for centred in [false, true] {
        let wanted = Wanted { centred, ..wanted(Width::Budget(48), Some(6)) };
        let made = fit(&plain, wanted, &text, &device(), &mut |_| {}).unwrap();
        let biased = made.model.parameters().iter().any(|parameter| parameter.name.ends_with("bias"));
        assert_eq!(biased, centred);
        assert!(made.loss_after.is_finite());
    }
    let made = fitted(wanted(Width::Rank(7), None)).unwrap();
    assert_eq!((made.ranks, made.rotated, made.model.config.kv_cache_ranks()), (vec![7, 7], 6, None));
    for (asked, fragment) in [
        (wanted(Width::Rank(40), Some(6)), "kv_rank = 40: with 6 numbers that turn there are"),
        (wanted(Width::Rank(0), None), "kv_rank = 0"),
        (wanted(Width::Budget(1), None), "need 2 numbers per token"),
        (wanted(Width::Budget(13), Some(6)), "2 layers with 6 that turn and at least 1 of a latent need 14"),
        (wanted(Width::Budget(49), None), "caches 48 numbers per token now"),
        (wanted(Width::Budget(30), Some(14)), "the 12 that turn now"),
    ] {
        let message = fitted(asked).unwrap_err().to_string();
        assert!(message.contains(fragment), "{message}");
    }
}

/// Where neighbours turn alike, mixing their numbers changes nothing; and the strongest directions of all of them hold more than those
/// of each by itself.
#[test]
fn frequencies_that_are_taken_for_one_may_be_mixed() {
    let alike = |c: &mut ModelConfig, _: &mut GroupedConfig| c.rope.rope_theta = 1.0;
    let whole = wide(&model(&config(alike), 3));
    let (grouped, layers) = source(&whole).unwrap();
    let inputs = Inputs::measure(&whole, &text(3, 40), &device(), &mut |_| {}).unwrap();
    for fold in [2, 3] {
        let found: Vec<Vec<Directions>> = layers
            .iter()
            .zip(&inputs.moments)
            .map(|(heads, moment)| Directions::of_layer(heads, moment, fold, 0).unwrap())
            .collect();
        let turning: Vec<Vec<Turning>> =
            found.iter().map(|bands| bands.iter().map(Directions::mixed).collect()).collect();
        assert!(turning[0][0].key[(0, 4)].norm() > 1e-3, "frequencies are not mixed");
        let means = without_mean(&whole);
        let parts = Parts { grouped: &grouped, layers: &layers, turning: &turning, means: &means };
        let mixed = convert(&whole, parts, None, &device()).unwrap();
        let apart = distance(&far(&whole, &ids(70)), &far(&mixed, &ids(70)));
        assert!(apart < 1e-10, "{fold}: {apart}");
        let strongest = |directions: &[Directions], count: usize| {
            let mut all: Vec<f64> = directions.iter().flat_map(|band| band.energies.clone()).collect();
            all.sort_by(|a, b| b.total_cmp(a));
            all.iter().take(count).sum::<f64>()
        };
        let apart = Directions::of_layer(&layers[0], &inputs.moments[0], 1, 0).unwrap();
        for count in 1..9 {
            assert!(strongest(&found[0], count) > strongest(&apart, count) * (1.0 - 1e-12), "{fold}: {count}");
        }
    }
}

/// All of them turning are the keys as they are, each with its own frequency, however many are taken for one.
#[test]
fn whole_bands_keep_their_frequencies() {
    let whole = model(&config(|_, g| g.qkv_bias = true), 4);
    let inputs = Inputs::measure(&whole, &text(3, 40), &device(), &mut |_| {}).unwrap();
    for fold in [1, 2, 3, 8] {
        let narrowing = Narrowing::new(&whole, fold, &inputs).unwrap();
        let made = narrowing.narrowed(&whole, 18, Keep::Energy, &device()).unwrap();
        let apart = distance(&far(&whole, &ids(70)), &far(&made, &ids(70)));
        assert!(apart < 1e-5, "{fold}: {apart}");
        // Of fewer the latent holds the rest, and the sizes are those that are asked for.
        let fewer = narrowing.narrowed(&whole, 8, Keep::Energy, &device()).unwrap();
        let mla = fewer.config.attention().latent().unwrap();
        assert_eq!(mla.qk_rope_head_dim, 8);
        assert!(loss(&fewer, &text(2, 40), &device()).unwrap().is_finite());
    }
}
