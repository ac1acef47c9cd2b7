use super::*;
use crate::fixtures;

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        other => panic!("{other}"),
    }
}

fn written(config: &ModelConfig) -> Map<String, Value> {
    object(config.to_json("float32"))
}

fn with(mut map: Map<String, Value>, key: &str, value: Value) -> Map<String, Value> {
    map.insert(key.into(), value);
    map
}

fn without(mut map: Map<String, Value>, key: &str) -> Map<String, Value> {
    assert!(map.remove(key).is_some(), "{key} is not there");
    map
}

/// The key that an error names.
fn refused(map: &Map<String, Value>) -> &'static str {
    match ModelConfig::from_json(map) {
        Err(Error::Config { key, .. } | Error::MissingKey { key, .. }) => key,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn reading_what_was_written_is_the_identity() {
    for (name, config) in fixtures::every_kind() {
        for (initializer_range, bos_token_id, eos_token_id) in
            [(None, None, vec![]), (Some(0.006), Some(0), vec![1]), (Some(0.02), Some(4_000_000_000), vec![5, 6])]
        {
            let config = ModelConfig { initializer_range, bos_token_id, eos_token_id, ..config.clone() };
            // Through text, as a file does.
            let text = config.to_json("bfloat16").to_string();
            let map = object(serde_json::from_str(&text).unwrap());
            assert_eq!(ModelConfig::from_json(&map).unwrap(), config, "{name}");
            assert_eq!(map["dtype"], "bfloat16");
            assert_eq!(map["torch_dtype"], "bfloat16");
        }
    }
}

#[test]
fn a_file_is_read_and_its_faults_carry_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    let config = fixtures::mla_with(|_| ());
    std::fs::write(&path, config.to_json("float32").to_string()).unwrap();
    assert_eq!(ModelConfig::read(&path).unwrap(), config);
    for (text, part) in [("{", "not valid JSON"), ("[]", "JSON object"), (r#"{"model_type": "gpt2"}"#, "gpt2")] {
        std::fs::write(&path, text).unwrap();
        let error = ModelConfig::read(&path).unwrap_err().to_string();
        assert!(error.contains("config.json") && error.contains(part), "{error}");
    }
    assert!(matches!(ModelConfig::read(&dir.path().join("none.json")), Err(Error::Io { .. })));
}

#[test]
fn every_key_is_written_that_transformers_would_default_wrongly() {
    let mla = written(&fixtures::mla_with(|_| ()));
    assert_eq!(mla["num_key_value_heads"], 3);
    assert_eq!(mla["q_lora_rank"], Value::Null);
    assert_eq!(mla["first_k_dense_replace"], 2);
    assert_eq!(mla["head_dim"], 6);
    assert_eq!(mla["num_nextn_predict_layers"], 0);
    assert!(mla.contains_key("rope_interleave") && !mla.contains_key("n_routed_experts"));
    // transformers' strict types: a float must have a point, and null is no float.
    assert!(mla["rms_norm_eps"].is_f64() && mla["rope_theta"].is_f64() && !mla.contains_key("initializer_range"));
    assert_eq!((&mla["scoring_func"], &mla["topk_method"]), (&json!("sigmoid"), &json!("noaux_tc")));
    assert!(mla["routed_scaling_factor"].is_f64() && mla["n_group"] == 1 && mla["topk_group"] == 1);
    let v2 = written(&ModelConfig { family: Family::DeepseekV2, ..fixtures::mla_with(|_| ()) });
    assert_eq!((&v2["scoring_func"], &v2["topk_method"]), (&json!("softmax"), &json!("greedy")));
    let yarn = written(&ModelConfig { rope: fixtures::yarn(), ..fixtures::mla_with(|_| ()) });
    assert_eq!(yarn["rope_scaling"]["type"], "yarn");
    assert_eq!(yarn["rope_parameters"]["rope_type"], "yarn");
    assert!(yarn["rope_parameters"]["original_max_position_embeddings"].is_u64());
    assert!(!mla.contains_key("rope_scaling"));
}

#[test]
fn the_old_spelling_the_new_one_and_both_mean_the_same() {
    let rope = RopeConfig { rope_theta: 50_000.0, ..fixtures::yarn() };
    let config = ModelConfig { rope, ..fixtures::mla_with(|_| ()) };
    let both = written(&config);
    let new = without(without(both.clone(), "rope_scaling"), "rope_theta");
    let mut scaling = object(both["rope_scaling"].clone());
    for key in ["rope_theta", "rope_type"] {
        scaling.remove(key);
    }
    let old = with(without(both.clone(), "rope_parameters"), "rope_scaling", Value::Object(scaling));
    for map in [&both, &new, &old] {
        assert_eq!(ModelConfig::from_json(map).unwrap(), config);
    }

    let plain = ModelConfig { rope: RopeConfig { rope_theta: 700.0, ..RopeConfig::default() }, ..config };
    let both = written(&plain);
    let new = without(both.clone(), "rope_theta");
    let old = with(without(both.clone(), "rope_parameters"), "rope_scaling", Value::Null);
    // An empty object is none.
    let empty = with(both.clone(), "rope_scaling", json!({}));
    for map in [&both, &new, &old, &empty] {
        assert_eq!(ModelConfig::from_json(map).unwrap(), plain);
    }
}

#[test]
fn contradictions_are_settled_as_transformers_settles_them() {
    let base = without(written(&fixtures::mla_with(|_| ())), "rope_theta");
    let rope = |map: &Map<String, Value>| ModelConfig::from_json(map).unwrap().rope;
    // rope_scaling replaces rope_parameters as a whole, its θ included.
    let map = with(base.clone(), "rope_parameters", json!({ "rope_theta": 5.0, "rope_type": "linear", "factor": 3.0 }));
    let map = with(map, "rope_scaling", json!({ "type": "yarn", "factor": 2.0 }));
    assert_eq!((rope(&map).rope_type, rope(&map).factor, rope(&map).rope_theta), (RopeType::Yarn, Some(2.0), 10_000.0));
    assert_eq!(rope(&with(map.clone(), "rope_theta", json!(9.0))).rope_theta, 9.0);
    // But an empty one, which is false in Python, replaces nothing.
    assert_eq!(rope(&with(map, "rope_scaling", json!({}))).rope_type, RopeType::Linear);
    // rope_parameters.rope_theta beats the one outside.
    let map = with(with(base.clone(), "rope_parameters", json!({ "rope_theta": 5.0 })), "rope_theta", json!(9.0));
    assert_eq!(rope(&map).rope_theta, 5.0);
    // rope_type beats type; integers and foreign keys are fine; no θ anywhere is 10000.
    let both = json!({ "type": "linear", "rope_type": "yarn", "factor": 2, "beta_fast": 16, "mrope_section": [1] });
    let map = with(without(base, "rope_parameters"), "rope_scaling", both);
    assert_eq!(
        rope(&map),
        RopeConfig { rope_type: RopeType::Yarn, factor: Some(2.0), beta_fast: Some(16.0), ..RopeConfig::default() }
    );
}

#[test]
fn what_is_not_implemented_is_refused() {
    let mla = written(&fixtures::mla_with(|_| ()));
    let llama = written(&fixtures::grouped_with(|_| ()));
    let v2 = with(mla.clone(), "model_type", json!("deepseek_v2"));
    for (key, value) in [
        ("model_type", json!("mixtral")),
        ("model_type", json!("qwen3_moe")),
        ("quantization_config", json!({ "quant_method": "awq" })),
        ("hidden_act", json!("gelu")),
        ("first_k_dense_replace", json!(1)),
        ("head_dim", json!(11)),
        ("num_key_value_heads", json!(1)),
    ] {
        assert_eq!(refused(&with(mla.clone(), key, value.clone())), key);
        assert_eq!(refused(&with(v2.clone(), key, value)), key);
    }
    for (key, value) in
        [("quantization_config", json!({})), ("hidden_act", json!("relu")), ("num_key_value_heads", json!(2))]
    {
        assert_eq!(refused(&with(llama.clone(), key, value)), key);
    }
    assert_eq!(refused(&with(mla.clone(), "mlp_bias", json!(true))), "mlp_bias");
    // Absent, the key means experts: from layer 0 in V2, from layer 3 in V3.
    assert_eq!(refused(&without(v2.clone(), "first_k_dense_replace")), "first_k_dense_replace");
    assert!(
        ModelConfig::from_json(&without(mla.clone(), "first_k_dense_replace")).is_ok(),
        "two layers are below three"
    );
    let deep = with(without(mla.clone(), "first_k_dense_replace"), "num_hidden_layers", json!(4));
    assert_eq!(refused(&deep), "first_k_dense_replace");
    assert_eq!(
        refused(&with(mla.clone(), "rope_scaling", json!({ "type": "dynamic", "factor": 2.0 }))),
        "rope_parameters"
    );
    // A rotated width of 0 is read as "not given" by transformers.
    assert_eq!(refused(&with(with(mla, "qk_rope_head_dim", json!(0)), "head_dim", json!(0))), "model_type");
}

#[test]
fn null_counts_as_absent() {
    let mla = written(&fixtures::mla_with(|_| ()));
    let config = ModelConfig::from_json(&mla).unwrap();
    for key in ["num_key_value_heads", "head_dim", "quantization_config", "mlp_bias", "attention_bias", "hidden_act"] {
        assert_eq!(ModelConfig::from_json(&with(mla.clone(), key, Value::Null)).unwrap(), config, "{key}");
    }
}

#[test]
fn missing_keys_are_named() {
    let mla = written(&fixtures::mla_with(|_| ()));
    let llama = written(&fixtures::grouped_with(|_| ()));
    let shared =
        ["model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"];
    for key in shared {
        assert_eq!(refused(&without(mla.clone(), key)), key);
        assert_eq!(refused(&without(llama.clone(), key)), key);
    }
    let lowkey = written(&fixtures::mla_with(|m| m.latent_scale = true));
    assert_eq!(refused(&without(lowkey, "max_position_embeddings")), "max_position_embeddings");
    for key in ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"] {
        assert_eq!(refused(&without(mla.clone(), key)), key);
    }
    let map = with(without(llama, "head_dim"), "num_attention_heads", json!(5));
    assert_eq!(refused(&with(map, "num_key_value_heads", json!(5))), "head_dim");
}

#[test]
fn wrong_types_are_named() {
    let mla = written(&fixtures::mla_with(|_| ()));
    for (key, value) in [
        ("model_type", json!(3)),
        ("hidden_size", json!("12")),
        ("hidden_size", json!(12.0)),
        ("num_hidden_layers", json!(-2)),
        ("kv_lora_rank", json!([9])),
        ("q_lora_rank", json!(false)),
        ("rms_norm_eps", json!("1e-6")),
        ("tie_word_embeddings", json!("false")),
        ("rope_interleave", json!(1)),
        ("attention_bias", json!(0)),
        ("hidden_act", json!(["silu"])),
        ("rope_parameters", json!("yarn")),
        ("rope_scaling", json!([1])),
        ("bos_token_id", json!("<s>")),
        ("bos_token_id", json!(1u64 << 40)),
        ("eos_token_id", json!("</s>")),
        ("eos_token_id", json!([1, "</s>"])),
        ("eos_token_id", json!(1.5)),
    ] {
        assert_eq!(refused(&with(mla.clone(), key, value)), key);
    }
    let map = with(without(mla.clone(), "rope_parameters"), "rope_theta", json!("10000"));
    assert_eq!(refused(&map), "rope_theta");
    assert_eq!(refused(&with(mla, "rope_parameters", json!({ "rope_theta": "10000" }))), "rope_parameters");
}

#[test]
fn each_family_keeps_its_own_rules() {
    let from = |map: Map<String, Value>| ModelConfig::from_json(&map).unwrap();
    let mla = written(&fixtures::mla_with(|m| m.rope_interleave = false));
    let latent = |map: Map<String, Value>| from(map).attention().latent().unwrap().clone();
    let v2 = latent(with(mla.clone(), "model_type", json!("deepseek_v2")));
    assert!(v2.rope_interleave, "DeepSeek-V2 rotates pairs whatever the file says");
    let v3 = latent(with(mla, "latent_scale", json!(true)));
    assert!(!v3.rope_interleave && !v3.latent_scale, "transformers knows no latent_scale");

    let llama = with(written(&fixtures::grouped_with(|_| ())), "attention_bias", json!(true));
    let flags = |map: Map<String, Value>| match from(map).attention() {
        AttentionConfig::Grouped(g) => (g.qkv_bias, g.o_bias, g.qk_norm),
        other => panic!("{other:?}"),
    };
    assert_eq!(flags(llama.clone()), (true, true, false));
    assert_eq!(flags(with(llama.clone(), "model_type", json!("qwen2"))), (true, false, false));
    assert_eq!(flags(with(llama.clone(), "model_type", json!("qwen3"))), (true, true, true));
    // A key of another architecture makes no MLA of a Llama.
    assert_eq!(flags(with(llama.clone(), "kv_lora_rank", json!(4))), (true, true, false));

    let width = |map: Map<String, Value>| match from(map).attention() {
        AttentionConfig::Grouped(g) => g.head_dim,
        other => panic!("{other:?}"),
    };
    let bare = without(llama, "head_dim");
    assert_eq!(width(bare.clone()), 4);
    assert_eq!(width(with(bare, "model_type", json!("qwen3"))), 128);
}

#[test]
fn both_spellings_of_every_reference_case_are_one_configuration() {
    for case in fixtures::dense_cases() {
        let new = ModelConfig::read(&case.join("config.json")).unwrap();
        let old = ModelConfig::read(&case.join("config_legacy.json")).unwrap();
        assert_eq!(new, old, "{}", case.display());
        assert_eq!(ModelConfig::from_json(&written(&new)).unwrap(), new, "{}", case.display());
    }
}

#[test]
fn a_message_shows_no_more_of_a_value_than_helps() {
    let map = with(written(&fixtures::mla_with(|_| ())), "hidden_size", json!(vec![7; 100_000]));
    let message = ModelConfig::from_json(&map).unwrap_err().to_string();
    assert!(message.contains("hidden_size = [7,7,7,") && message.len() < 500, "{} bytes", message.len());
}

#[test]
fn what_is_no_file_of_a_configuration_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    let message = || ModelConfig::read(&path).unwrap_err().to_string();
    std::fs::create_dir(&path).unwrap();
    assert!(message().contains("config.json: is not a regular file"), "{}", message());
    std::fs::remove_dir(&path).unwrap();
    // Nothing but white space, and more of it than any configuration has.
    std::fs::File::create(&path).unwrap().set_len(5 << 20).unwrap();
    assert!(message().contains("config.json: has 5242880 bytes"), "{}", message());
}

#[cfg(unix)]
#[test]
fn a_file_without_an_end_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
    let message = ModelConfig::read(&path).unwrap_err().to_string();
    assert!(message.contains("config.json: is not a regular file"), "{message}");
}

#[test]
fn what_transformers_takes_is_taken() {
    let from = |map: &Map<String, Value>| ModelConfig::from_json(map).unwrap();
    let plain = fixtures::grouped_with(|_| ());
    let llama = written(&plain);
    assert_eq!(from(&with(llama.clone(), "hidden_act", json!("swish"))), plain);
    // Of a family without windows the key says nothing.
    assert_eq!(from(&with(llama.clone(), "use_sliding_window", json!(true))), plain);
    for (ids, expected) in
        [(json!(-1), vec![]), (json!([-1, 7]), vec![7]), (json!([]), vec![]), (json!([5, 6]), vec![5, 6])]
    {
        assert_eq!(from(&with(llama.clone(), "eos_token_id", ids.clone())).eos_token_id, expected, "{ids}");
    }
    assert_eq!(from(&with(llama.clone(), "bos_token_id", json!(-1))).bos_token_id, None);
    for (model_type, longest) in [("llama", 2048), ("qwen2", 32768), ("qwen3", 32768)] {
        let map = with(without(llama.clone(), "max_position_embeddings"), "model_type", json!(model_type));
        assert_eq!(from(&map).max_position_embeddings, longest, "{model_type}");
    }
    let mla = written(&fixtures::mla_with(|_| ()));
    for (model_type, longest) in [("deepseek_v2", 2048), ("deepseek_v3", 4096)] {
        let map = with(without(mla.clone(), "max_position_embeddings"), "model_type", json!(model_type));
        assert_eq!(from(&map).max_position_embeddings, longest, "{model_type}");
    }
    let yarn = ModelConfig { rope: fixtures::yarn(), ..fixtures::mla_with(|_| ()) };
    let mut map = without(written(&yarn), "rope_scaling");
    map["rope_parameters"]["original_max_position_embeddings"] = json!(16.0);
    assert_eq!(from(&map), yarn);
    map["rope_parameters"]["original_max_position_embeddings"] = json!(16.5);
    assert_eq!(refused(&map), "rope_parameters");
}

#[test]
fn a_window_is_refused_only_where_it_hides_something() {
    let mut qwen = written(&fixtures::grouped_with(|g| g.qkv_bias = true));
    qwen.insert("use_sliding_window".into(), json!(true));
    assert_eq!(qwen["model_type"], "qwen2");
    let taken = |keys: &[(&str, Value)]| {
        let mut map = qwen.clone();
        map.extend(keys.iter().map(|(key, value)| (key.to_string(), value.clone())));
        match ModelConfig::from_json(&map) {
            Ok(_) => true,
            Err(Error::Config { key: "use_sliding_window", .. }) => false,
            other => panic!("{other:?}"),
        }
    };
    // Two layers of 128 positions; windows begin at layer 28 unless the file says otherwise.
    assert!(taken(&[]) && taken(&[("max_window_layers", json!(2)), ("sliding_window", json!(16))]));
    assert!(!taken(&[("max_window_layers", json!(1)), ("sliding_window", json!(16))]));
    assert!(taken(&[("max_window_layers", json!(1)), ("sliding_window", json!(128))]));
    assert!(taken(&[("max_window_layers", json!(0)), ("sliding_window", Value::Null)]));
    let types = |last: &str| ("layer_types", json!(["full_attention", last]));
    assert!(taken(&[types("full_attention"), ("max_window_layers", json!(0)), ("sliding_window", json!(16))]));
    assert!(!taken(&[types("sliding_attention"), ("sliding_window", json!(16))]));
}

#[test]
fn feed_forward_biases_are_those_of_the_families_that_have_them() {
    let with_bias = |map: Map<String, Value>| with(map, "mlp_bias", json!(true));
    let config = |map: Map<String, Value>| ModelConfig::from_json(&map).unwrap();
    let llama = config(with_bias(written(&fixtures::grouped_with(|_| ()))));
    assert!(llama.mlp().bias && llama.family == Family::Llama && llama.natural_family() == Family::Llama);
    let v2 = ModelConfig { family: Family::DeepseekV2, ..fixtures::mla_with(|_| ()) };
    let v2 = config(with_bias(written(&v2)));
    assert!(v2.mlp().bias && v2.family == Family::DeepseekV2 && v2.natural_family() == Family::DeepseekV2);
    assert_eq!(written(&v2)["mlp_bias"], true);
    assert!(!written(&fixtures::mla_with(|_| ())).contains_key("mlp_bias"));
    for other in [fixtures::mla_with(|_| ()), fixtures::grouped_with(|g| g.qk_norm = true)] {
        assert_eq!(refused(&with_bias(written(&other))), "mlp_bias");
    }
}
