use serde_json::{Value, json};

use super::*;
use crate::fixtures;
use crate::rope::{RopePairs, RopeType};

/// A section that has the keys of every kind of attention.
fn full(attention: &str) -> Value {
    json!({
        "attention": attention,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 96,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 10,
    })
}

fn with(mut section: Value, key: &str, value: Value) -> Value {
    section[key] = value;
    section
}

fn section(value: Value) -> ModelSection {
    serde_json::from_value(value).unwrap()
}

fn resolve(value: Value) -> Result<(ModelConfig, Vec<&'static str>)> {
    section(value).resolve(100, 64)
}

/// The key that an error names.
fn refused(result: Result<(ModelConfig, Vec<&'static str>)>) -> &'static str {
    match result {
        Err(Error::Config { key, .. } | Error::MissingKey { key, .. }) => key,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn one_line_turns_one_attention_into_another() {
    let (mla, unused) = resolve(full("mla")).unwrap();
    assert_eq!(unused, ["num_key_value_heads"]);
    assert_eq!(mla.attention_name(), "MLA");
    assert_eq!((mla.vocab_size, mla.max_position_embeddings, mla.family), (100, 64, Family::DeepseekV3));
    let AttentionConfig::Mla(sizes) = mla.attention() else { panic!("{mla:?}") };
    assert_eq!((sizes.q_lora_rank, sizes.kv_lora_rank, sizes.qk_nope_head_dim), (Some(24), 16, 6));
    assert_eq!((sizes.qk_rope_head_dim, sizes.v_head_dim, sizes.rope_interleave), (4, 10, true));

    let latent = ["kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"];
    for (kind, name, kv_heads) in [("mha", "MHA", 8), ("gqa", "GQA-4", 4), ("mqa", "MQA", 1)] {
        let (config, mut unused) = resolve(full(kind)).unwrap();
        assert_eq!(config.attention_name(), name);
        if kind != "gqa" {
            assert_eq!(unused.remove(0), "num_key_value_heads");
        }
        assert_eq!(unused, latent);
        let AttentionConfig::Grouped(grouped) = config.attention() else { panic!("{config:?}") };
        assert_eq!((grouped.num_key_value_heads, grouped.head_dim, grouped.rotary_dim), (kv_heads, 6, 6));
        // What does not belong to the attention is the same in all of them.
        assert_eq!(config.mlp(), mla.mlp());
        assert_eq!(ModelConfig { layers: mla.layers.clone(), family: mla.family, ..config }, mla);
    }
}

#[test]
fn keys_without_use_are_named() {
    let mut grouped_keys = full("mla");
    for (key, value) in [("head_dim", json!(6)), ("partial_rotary_factor", json!(0.5)), ("qk_norm", json!(true))] {
        grouped_keys[key] = value;
    }
    let (_, unused) = resolve(grouped_keys).unwrap();
    assert_eq!(unused, ["num_key_value_heads", "head_dim", "partial_rotary_factor", "qk_norm"]);
    let (_, unused) = resolve(with(full("gqa"), "latent_scale", json!(true))).unwrap();
    assert_eq!(unused.last(), Some(&"latent_scale"));
}

#[test]
fn absent_keys_get_their_defaults() {
    let mut gqa = full("gqa");
    gqa.as_object_mut().unwrap().remove("num_key_value_heads");
    assert_eq!(resolve(gqa).unwrap().0.attention_name(), "GQA-2");
    let (config, _) = resolve(with(full("mha"), "head_dim", json!(10))).unwrap();
    let AttentionConfig::Grouped(grouped) = config.attention() else { panic!("{config:?}") };
    assert_eq!((grouped.head_dim, grouped.rotary_dim), (10, 10));
    let (config, _) =
        resolve(with(with(full("mha"), "vocab_size", json!(128)), "max_position_embeddings", json!(7))).unwrap();
    assert_eq!((config.vocab_size, config.max_position_embeddings), (128, 7));
    assert_eq!((config.rms_norm_eps, config.tie_word_embeddings, config.initializer_range), (1e-6, false, None));
    let rope = json!({ "rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0 });
    let (config, _) = resolve(with(full("mla"), "rope_parameters", rope)).unwrap();
    assert_eq!((config.rope.rope_type, config.rope.rope_theta), (RopeType::Yarn, 500.0));
}

#[test]
fn a_section_survives_being_written() {
    let first = section(with(full("mla"), "rope_parameters", json!({ "rope_type": "linear", "factor": 2.0 })));
    let second: ModelSection = serde_json::from_value(serde_json::to_value(&first).unwrap()).unwrap();
    assert_eq!(first.resolve(9, 9).unwrap(), second.resolve(9, 9).unwrap());
}

#[test]
fn unknown_keys_and_wrong_types_are_refused() {
    for (key, value) in [
        ("kv_lora_rnak", json!(3)),
        ("attention", json!("linear")),
        ("hidden_size", json!(-4)),
        ("hidden_size", json!("48")),
        ("rope_parameters", json!({ "theta": 3.0 })),
        ("rope_parameters", json!({ "rope_type": "dynamic" })),
    ] {
        let bad = with(full("mla"), key, value.clone());
        assert!(serde_json::from_value::<ModelSection>(bad).is_err(), "{key} = {value}");
    }
}

#[test]
fn every_rule_of_a_section_names_its_key() {
    for kind in ["mla", "gqa"] {
        for key in
            ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings"]
        {
            // Where the head width follows from it, the number of heads is part of another rule.
            let section = with(full(kind), "head_dim", json!(6));
            assert_eq!(refused(resolve(with(section.clone(), key, json!(0)))), key);
            assert_eq!(refused(resolve(with(section, key, json!(1usize << 40)))), key);
        }
        assert_eq!(refused(resolve(with(full(kind), "vocab_size", json!(0)))), "vocab_size");
        assert_eq!(refused(resolve(with(full(kind), "vocab_size", json!(99)))), "vocab_size");
        assert_eq!(refused(resolve(with(full(kind), "rms_norm_eps", json!(-1e-6)))), "rms_norm_eps");
        assert_eq!(refused(resolve(with(full(kind), "initializer_range", json!(0.0)))), "initializer_range");
        let rope = json!({ "rope_theta": -1.0 });
        assert_eq!(refused(resolve(with(full(kind), "rope_parameters", rope))), "rope_theta");
        let rope = json!({ "rope_type": "yarn" });
        assert_eq!(refused(resolve(with(full(kind), "rope_parameters", rope))), "rope_parameters.factor");
    }
    for key in ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"] {
        assert_eq!(refused(resolve(with(full("mla"), key, Value::Null))), key);
        if key != "qk_rope_head_dim" {
            assert_eq!(refused(resolve(with(full("mla"), key, json!(0)))), key);
        }
    }
    assert_eq!(refused(resolve(with(full("mla"), "q_lora_rank", json!(0)))), "q_lora_rank");
    assert_eq!(refused(resolve(with(full("mla"), "qk_rope_head_dim", json!(3)))), "qk_rope_head_dim");
    assert_eq!(refused(resolve(with(full("mla"), "qk_nope_head_dim", json!(1 << 19)))), "num_attention_heads");
    assert_eq!(refused(resolve(with(full("gqa"), "num_key_value_heads", json!(3)))), "num_key_value_heads");
    assert_eq!(refused(resolve(with(full("gqa"), "num_key_value_heads", json!(0)))), "num_key_value_heads");
    assert_eq!(refused(resolve(with(full("mha"), "head_dim", json!(0)))), "head_dim");
    assert_eq!(refused(resolve(with(full("mha"), "head_dim", json!(5)))), "head_dim");
    assert_eq!(refused(resolve(with(full("mha"), "head_dim", json!(1 << 19)))), "num_attention_heads");
    assert_eq!(refused(resolve(with(full("mha"), "num_attention_heads", json!(5)))), "hidden_size");
    assert_eq!(refused(resolve(with(full("mha"), "num_attention_heads", json!(0)))), "hidden_size");
    for factor in [-0.1, 1.1, 0.5] {
        // Half of 6 is odd.
        assert_eq!(
            refused(resolve(with(full("mha"), "partial_rotary_factor", json!(factor)))),
            "partial_rotary_factor"
        );
    }
}

#[test]
fn a_width_of_zero_is_allowed_where_it_means_no_rotation() {
    assert_eq!(resolve(with(full("mla"), "qk_rope_head_dim", json!(0))).unwrap().0.rotary_dim(), 0);
    assert_eq!(resolve(with(full("mha"), "partial_rotary_factor", json!(0.0))).unwrap().0.rotary_dim(), 0);
}

#[test]
fn the_family_is_the_class_that_computes_the_model() {
    let family = |config: ModelConfig| config.natural_family();
    assert_eq!(family(fixtures::mla_with(|_| ())), Family::DeepseekV3);
    assert_eq!(family(fixtures::mla_with(|m| m.rope_interleave = false)), Family::DeepseekV3);
    assert_eq!(family(fixtures::mla_with(|m| m.latent_scale = true)), Family::Lowkey);
    assert_eq!(family(fixtures::mla_with(|m| m.qk_rope_head_dim = 0)), Family::Lowkey);
    let grouped = |qk_norm, qkv_bias, o_bias| {
        family(fixtures::grouped_with(|g| (g.qk_norm, g.qkv_bias, g.o_bias) = (qk_norm, qkv_bias, o_bias)))
    };
    assert_eq!(grouped(false, false, false), Family::Llama);
    assert_eq!(grouped(false, true, true), Family::Llama);
    assert_eq!(grouped(false, true, false), Family::Qwen2);
    assert_eq!(grouped(true, false, false), Family::Qwen3);
    assert_eq!(grouped(true, true, true), Family::Qwen3);
    assert_eq!(grouped(true, true, false), Family::Lowkey);
    assert_eq!(grouped(false, false, true), Family::Lowkey);
    assert_eq!(family(fixtures::grouped_with(|g| g.rotary_dim = 4)), Family::Lowkey);
}

#[test]
fn a_family_that_computes_something_else_is_refused() {
    for (name, config) in fixtures::every_kind() {
        config.check().unwrap_or_else(|e| panic!("{name}: {e}"));
        let natural = config.natural_family();
        for family in [Family::DeepseekV3, Family::Llama, Family::Qwen2, Family::Qwen3] {
            let relabelled = ModelConfig { family, ..config.clone() };
            assert_eq!(relabelled.check().is_ok(), family == natural, "{name} as {family:?}");
        }
        assert!(ModelConfig { family: Family::Lowkey, ..config }.check().is_ok(), "{name}");
    }
    let halves = fixtures::mla_with(|m| m.rope_interleave = false);
    let error = ModelConfig { family: Family::DeepseekV2, ..halves }.check().unwrap_err();
    assert!(error.to_string().starts_with("model.model_type = deepseek_v2:"), "{error}");
}

#[test]
fn more_than_the_whole_head_cannot_be_rotated() {
    let config = ModelConfig { family: Family::Lowkey, ..fixtures::grouped_with(|g| g.rotary_dim = 8) };
    assert!(matches!(config.check(), Err(Error::Config { key: "partial_rotary_factor", .. })));
}

#[test]
fn the_largest_sizes_that_pass_do_not_overflow_the_counts() {
    let mut config = fixtures::mla_with(|m| (m.kv_lora_rank, m.q_lora_rank) = (1 << 20, Some(1 << 20)));
    (config.vocab_size, config.hidden_size, config.num_attention_heads) = (1 << 24, 1 << 20, 1 << 16);
    config.layers.resize(1 << 12).unwrap();
    config.layers.iter_mut().for_each(|layer| layer.mlp.intermediate_size = 1 << 20);
    config.check().unwrap();
    let exact = {
        let (d, h, layers) = (1u128 << 20, 1u128 << 16, 1u128 << 12);
        let attention = d * d + d + d * h * 11 + d * (d + 6) + d + d * h * 12 + h * 7 * d;
        layers * (attention + 3 * d * d + 2 * d) + d + 2 * (d << 24)
    };
    assert_eq!(config.parameter_count().total as u128, exact);
}

#[test]
fn the_scale_follows_the_width_and_under_yarn_mscale() {
    let plain = fixtures::mla_with(|_| ());
    assert!((plain.softmax_scale() - 1.0 / 11f64.sqrt()).abs() < 1e-15);
    let m = 0.06 * 4f64.ln() + 1.0;
    let yarn = ModelConfig { rope: fixtures::yarn(), ..plain };
    assert!((yarn.softmax_scale() - m * m / 11f64.sqrt()).abs() < 1e-15);
    // Llama's and Qwen's classes know no such factor.
    let grouped = ModelConfig { rope: fixtures::yarn(), ..fixtures::grouped_with(|_| ()) };
    assert!((grouped.softmax_scale() - 1.0 / 6f64.sqrt()).abs() < 1e-15);
}

#[test]
fn layers_differ_in_what_they_cache_and_in_nothing_else() {
    let mut config = fixtures::mla_with(|_| ());
    config.set_kv_cache_ranks(Some(&[4, 9]));
    config.family = config.natural_family();
    config.check().unwrap();
    assert_eq!((config.kv_ranks(), config.kv_cache_ranks()), (vec![4, 9], Some(vec![4, 9])));
    config.layers[1].mlp.intermediate_size += 1;
    assert!(matches!(config.check(), Err(Error::Config { key: "num_hidden_layers", .. })));
}

#[test]
fn repeated_frequencies_are_those_of_the_width_that_they_come_from() {
    let with = |width, frequencies| fixtures::mla_with(|m| m.rope_pairs = Some(RopePairs { width, frequencies }));
    let config = with(8, vec![2, 0, 2]);
    config.check().unwrap();
    assert_eq!(config.inverse_frequencies(), [0.01, 1.0, 0.01]);
    assert_eq!(fixtures::mla_with(|_| ()).inverse_frequencies().len(), 3);
    for (width, frequencies, key) in [
        (8, vec![0, 1], "rope_pairs"),
        (8, vec![0, 4, 1], "rope_pairs"),
        (7, vec![0; 3], "rope_pairs_width"),
        (0, vec![0; 3], "rope_pairs_width"),
    ] {
        let refused = with(width, frequencies.clone()).check().unwrap_err();
        assert!(matches!(refused, Error::Config { key: named, .. } if named == key), "{frequencies:?}: {refused}");
    }
    let both = fixtures::mla_with(|m| (m.latent_norm, m.latent_scale) = (false, true));
    assert!(matches!(both.check(), Err(Error::Config { key: "latent_scale", .. })));
}

#[test]
fn there_is_no_model_without_layers_nor_one_that_no_machine_holds() {
    let layer = fixtures::mla_with(|_| ()).layers[0].clone();
    for count in [0, (1 << 12) + 1, usize::MAX] {
        assert!(matches!(Layers::equal(layer.clone(), count), Err(Error::Config { key: "num_hidden_layers", .. })));
    }
    let mut layers = Layers::equal(layer, 3).unwrap();
    assert!(layers.resize(0).is_err());
    layers.resize(1).unwrap();
    layers.resize(5).unwrap();
    assert_eq!(layers.len(), 5);
}

#[test]
fn what_only_lowkey_computes_is_said_until_weights_have_taken_it_in() {
    let plain = fixtures::mla();
    assert_eq!((plain.beyond_deepseek(), plain.fuses()), (None, true));
    assert_eq!(MlaConfig::deepseek(9, [5, 6, 7]), plain);
    for (key, mla) in [
        ("latent_scale", MlaConfig { latent_scale: true, ..plain.clone() }),
        ("kv_cache_ranks", MlaConfig { kv_cache_rank: Some(4), ..plain.clone() }),
        ("latent_norm", MlaConfig { latent_norm: false, ..plain.clone() }),
        ("query_bias", MlaConfig { query_bias: true, ..plain.clone() }),
        (
            "rope_pairs",
            MlaConfig { rope_pairs: Some(RopePairs { width: 6, frequencies: vec![0; 3] }), ..plain.clone() },
        ),
    ] {
        assert!(mla.beyond_deepseek().unwrap().contains(key));
        assert_eq!(fixtures::config(AttentionConfig::Mla(mla.clone())).natural_family(), Family::Lowkey);
        assert_eq!(mla.folded() == plain, ["latent_scale", "kv_cache_ranks"].contains(&key), "{key}");
        assert_eq!(mla.fuses(), key != "query_bias");
    }
    let unrotated = MlaConfig { qk_rope_head_dim: 0, latent_scale: true, ..plain };
    assert!(unrotated.folded().beyond_deepseek().unwrap().contains("qk_rope_head_dim = 0"));
    // Other kinds of attention have no such form, and a cost of none.
    let grouped = fixtures::config(AttentionConfig::Grouped(fixtures::grouped()));
    assert!(!grouped.attention().fuses() && grouped.decode_costs(0, 9).fused.is_none());
}
