use super::*;

/// Name, configuration, and whether weights come back to the last bit.
fn zoo() -> Vec<(&'static str, ModelConfig, bool)> {
    let layers = |n| config_with(|c, _| c.layers.resize(n).unwrap());
    let rope = |rope: RopeConfig| config_with(|c, m| (c.rope, m.q_lora_rank) = (rope, Some(11)));
    vec![
        ("plain", config_with(|_, _| ()), true),
        ("q_lora_rank", config_with(|_, m| m.q_lora_rank = Some(8)), true),
        ("tied", config_with(|c, _| c.tie_word_embeddings = true), true),
        ("one head", config_with(|c, _| c.num_attention_heads = 1), true),
        ("L = 1", config_with(|_, m| m.kv_lora_rank = 1), true),
        (
            "R = 2, N = V = 1",
            config_with(|_, m| (m.qk_rope_head_dim, m.qk_nope_head_dim, m.v_head_dim) = (2, 1, 1)),
            true,
        ),
        ("1 layer", layers(1), true),
        ("27 layers", layers(27), true),
        ("30 layers", layers(30), true),
        ("30 layers, q_lora_rank", lite(30, 5), true),
        ("another base", config_with(|c, _| c.rope.rope_theta = 1.6e6), true),
        ("YaRN, equal mscales", rope(yarn(Some(0.707), Some(0.707))), true),
        ("YaRN, mscale_all_dim 1", rope(yarn(Some(1.0), Some(1.0))), true),
        ("YaRN, mixed mscales", rope(yarn(Some(1.3), Some(0.6))), false),
        ("YaRN, mscale_all_dim alone", rope(yarn(None, Some(0.6))), false),
        ("YaRN without mscale", rope(yarn(None, None)), false),
        ("YaRN, attention_factor", rope(RopeConfig { attention_factor: Some(0.8), ..yarn(None, None) }), false),
        ("YaRN, factor 1", rope(RopeConfig { factor: Some(1.0), ..yarn(None, None) }), true),
        (
            "YaRN over the whole context",
            rope(RopeConfig { original_max_position_embeddings: None, ..yarn(None, None) }),
            false,
        ),
        ("halves", config_with(|_, m| m.rope_interleave = false), false),
        ("halves, YaRN", config_with(|c, m| (c.rope, m.rope_interleave) = (yarn(Some(1.3), None), false)), false),
        ("latent_scale", config_with(|_, m| m.latent_scale = true), false),
        ("latent without a norm", config_with(|_, m| m.latent_norm = false), false),
        ("latent_scale, tied", config_with(|c, m| (m.latent_scale, c.tie_word_embeddings) = (true, true)), false),
    ]
}

/// So many layers with a query latent of that width.
fn lite(layers: usize, q_lora_rank: usize) -> ModelConfig {
    config_with(|c, m| {
        c.layers.resize(layers).unwrap();
        m.q_lora_rank = Some(q_lora_rank);
    })
}

#[test]
fn every_model_computes_the_same_after_the_round_trip() {
    let folder = Folder::new();
    let path = folder.file("x.gguf");
    let ids: Vec<u32> = (0..70).map(|i| (i * i + 3) % 29).collect();
    for (seed, (name, config, exact)) in zoo().into_iter().enumerate() {
        let model = random_model(&config, seed as u64 + 1);
        let summary = write(&path, &model, None, TensorType::F32).unwrap();
        let again = read_model(&path, &Device::flex()).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(summary.bytes, std::fs::metadata(&path).unwrap().len());
        assert_eq!(summary.tensors, read(&path).unwrap().tensors().len());
        assert_eq!(bits(&again) == bits(&model), exact, "{name}");
        let off = distance(&logits(&again, &ids), &logits(&model, &ids));
        assert!(off <= 2e-5, "{name}: {off:e}");
        let relative = (again.config.softmax_scale() / config.softmax_scale() - 1.0).abs();
        assert!(relative < 1e-7, "{name}: {relative:e}");
        let told = |note: &String| ["folded", "permuted", "no norm"].iter().any(|word| note.contains(word));
        assert_eq!(summary.notes.iter().any(told), !exact, "{name}");
        // A second pass has nothing left to fold.
        write(&path, &again, None, TensorType::F32).unwrap();
        assert_eq!(bits(&read_model(&path, &Device::flex()).unwrap()), bits(&again), "{name}");
    }
}

#[test]
fn a_plain_configuration_reads_back_as_it_was() {
    let folder = Folder::new();
    let path = folder.file("x.gguf");
    let config = config_with(|c, m| {
        m.q_lora_rank = Some(8);
        c.tie_word_embeddings = true;
        c.rope.rope_theta = 12_345.5;
        (c.bos_token_id, c.eos_token_id) = (None, Vec::new());
    });
    write(&path, &random_model(&config, 1), None, TensorType::F32).unwrap();
    assert_eq!(read_model(&path, &Device::flex()).unwrap().config, config);
}

#[test]
fn half_formats_are_rounded_once() {
    let folder = Folder::new();
    let path = folder.file("x.gguf");
    let model = random_model(&config_with(|_, m| m.q_lora_rank = Some(8)), 1);
    for (kind, tolerance) in [(TensorType::F16, 3e-3), (TensorType::Bf16, 2e-2)] {
        write(&path, &model, None, kind).unwrap();
        let again = read_model(&path, &Device::flex()).unwrap();
        let off = distance(&logits(&again, &[3, 1, 4, 1, 5]), &logits(&model, &[3, 1, 4, 1, 5]));
        assert!(off > 0.0 && off < tolerance, "{kind}: {off}");
        write(&path, &again, None, kind).unwrap();
        assert_eq!(bits(&read_model(&path, &Device::flex()).unwrap()), bits(&again), "{kind}");
    }
}

/// The shapes that llama.cpp's loader asks for, and the values in them, element by element.
#[test]
fn keys_are_transposed_per_head_and_values_are_not() {
    let folder = Folder::new();
    let path = folder.file("x.gguf");
    let model = random_model(&config_with(|_, _| ()), 1);
    write(&path, &model, None, TensorType::F32).unwrap();
    let file = read(&path).unwrap();
    let parameters = model.parameters();
    let kv_b = parameters.iter().find(|p| p.name == "model.layers.1.self_attn.kv_b_proj.weight").unwrap();
    let kv_b = kv_b.value.clone().try_into_vec_as::<f32>().unwrap();
    let (heads, latent, nope, value) = (3, 9, 5, 7);
    assert_eq!(file.tensor("blk.1.attn_k_b.weight").unwrap().shape, [heads, latent, nope]);
    assert_eq!(file.tensor("blk.1.attn_v_b.weight").unwrap().shape, [heads, value, latent]);
    let (k_b, v_b) = (file.values("blk.1.attn_k_b.weight").unwrap(), file.values("blk.1.attn_v_b.weight").unwrap());
    for h in 0..heads {
        for l in 0..latent {
            for n in 0..nope {
                assert_eq!(k_b[(h * latent + l) * nope + n], kv_b[(h * (nope + value) + n) * latent + l]);
            }
            for v in 0..value {
                assert_eq!(v_b[(h * value + v) * latent + l], kv_b[(h * (nope + value) + nope + v) * latent + l]);
            }
        }
    }
}

#[test]
fn the_keys_are_those_that_the_loader_requires() {
    let folder = Folder::new();
    let path = folder.file("tiny.gguf");
    let config = config_with(|c, _| c.rope = yarn(Some(0.707), Some(0.707)));
    write(&path, &random_model(&config, 1), None, TensorType::F32).unwrap();
    let file = read(&path).unwrap();
    let metadata = file.metadata();
    for (key, value) in [
        ("block_count", 2),
        ("context_length", 128),
        ("embedding_length", 12),
        ("feed_forward_length", 17),
        ("vocab_size", 29),
        ("attention.head_count", 3),
        ("attention.head_count_kv", 1),
        ("attention.key_length", 15),
        ("attention.value_length", 9),
        ("attention.key_length_mla", 11),
        ("attention.value_length_mla", 7),
        ("attention.kv_lora_rank", 9),
        ("attention.q_lora_rank", 0),
        ("rope.dimension_count", 6),
        ("leading_dense_block_count", 2),
        ("expert_feed_forward_length", 0),
        ("expert_shared_count", 0),
        ("rope.scaling.original_context_length", 32),
    ] {
        assert_eq!(metadata.get(&format!("deepseek2.{key}")), Some(&Value::U32(value)), "{key}");
    }
    assert_eq!(metadata.text("general.architecture"), Some("deepseek2"));
    assert_eq!(metadata.text("general.name"), Some("tiny"));
    assert_eq!(metadata.text("deepseek2.rope.scaling.type"), Some("yarn"));
    assert_eq!(metadata.number("deepseek2.rope.scaling.factor"), Some(4.0));
    assert_eq!(metadata.number("deepseek2.rope.scaling.yarn_log_multiplier"), Some(0.0707));
    assert_eq!(metadata.number("deepseek2.attention.layer_norm_rms_epsilon"), Some(1e-6));
    // llama.cpp insists that a dense model has none of these.
    for key in ["expert_count", "expert_used_count", "expert_group_count"] {
        assert!(metadata.get(&format!("deepseek2.{key}")).is_none(), "{key}");
    }
    assert!(file.tensor("output.weight").is_some());
}

#[test]
fn what_the_architecture_cannot_express_is_refused_by_name() {
    let folder = Folder::new();
    let path = folder.file("x.gguf");
    let rope = |change: fn(&mut RopeConfig)| {
        config_with(|c, m| {
            m.qk_rope_head_dim = 64;
            c.rope = yarn(None, None);
            change(&mut c.rope);
        })
    };
    let lite = |layers| lite(layers, 8);
    for (config, part) in [
        (config_with(|_, m| m.attention_bias = true), "attention_bias"),
        (config_with(|c, _| c.rms_norm_eps = 1e-5), "rms_norm_eps = 0.00001"),
        (config_with(|_, m| m.qk_rope_head_dim = 0), "qk_rope_head_dim"),
        (lite(26), "26 layers"),
        (lite(27), "27 layers"),
        (config_with(|c, _| c.layers.resize(513).unwrap()), "513"),
        (rope(|r| (r.beta_fast, r.original_max_position_embeddings) = (Some(1000.0), Some(9000))), "beta_fast = 1000"),
        (rope(|r| (r.beta_slow, r.original_max_position_embeddings) = (Some(20.0), Some(2000))), "beta_slow = 20"),
        (rope(|r| r.factor = Some(0.5)), "factor = 0.5"),
        (rope(|r| (r.truncate, r.original_max_position_embeddings) = (Some(false), Some(2000))), "truncate = false"),
        (rope(|r| r.original_max_position_embeddings = Some(4)), "YaRN frequencies"),
        (rope(|r| r.rope_type = RopeType::Linear), "linear"),
        (
            rope(|r| (r.rope_type, r.low_freq_factor, r.high_freq_factor) = (RopeType::Llama3, Some(1.0), Some(4.0))),
            "llama3",
        ),
    ] {
        let model = CausalLm::init(&config, 1, &Device::flex());
        let error = write(&path, &model, None, TensorType::F32).unwrap_err();
        assert!(matches!(error, Error::Unsupported { format: "GGUF", .. }), "{error}");
        assert!(error.to_string().contains(part), "{part}: {error}");
    }
    // Numbers that are too small for halves.
    let idle = CausalLm::init(&config_with(|_, m| m.latent_norm = false), 1, &Device::flex());
    for kind in [TensorType::F16, TensorType::Q8_0] {
        let error = write(&path, &idle, None, kind).unwrap_err().to_string();
        assert!(error.contains("too small for halves"), "{error}");
    }
    assert_eq!(std::fs::read_dir(folder.0.path()).unwrap().count(), 0);
    let expressible = |config: &ModelConfig| Architecture::of(config).map(drop);
    // What llama.cpp takes for lite without a query latent is no different.
    let mut large = lite(48);
    large.vocab_size = 128_256;
    assert!(expressible(&large).unwrap_err().to_string().contains("48 layers"));
    expressible(&lite(48)).unwrap();
    // Bounds that come to the same are none.
    expressible(&rope(|r| r.beta_fast = Some(16.0))).unwrap();
    expressible(&rope(|r| (r.beta_fast, r.beta_slow) = (Some(32.0), Some(0.0)))).unwrap();
}

/// Copies a file with other keys or tensors.
pub(super) fn altered(path: &Path, change: impl FnOnce(&mut Metadata, &mut Vec<TensorInfo>)) -> String {
    let file = read(path).unwrap();
    let (mut metadata, mut tensors) = (file.metadata().clone(), file.tensors().cloned().collect());
    change(&mut metadata, &mut tensors);
    let copy = path.with_extension("altered");
    write_container(&copy, &metadata, &tensors, &mut |info| {
        let mut values = file.values(&info.name).unwrap_or_default();
        values.resize(info.shape.iter().product(), 0.0);
        Ok(values)
    })
    .unwrap();
    read_model(&copy, &Device::flex()).unwrap_err().to_string()
}

#[test]
fn a_file_that_does_not_fit_its_keys_is_refused() {
    let folder = Folder::new();
    let path = folder.file("x.gguf");
    write(&path, &random_model(&config_with(|c, _| c.rope = yarn(None, None)), 1), None, TensorType::F32).unwrap();
    let key = |key: &'static str, value: Value| {
        let path = &path;
        altered(path, move |metadata, _| metadata.set(format!("deepseek2.{key}"), value))
    };
    for (error, part) in [
        (key("block_count", Value::U32(3)), "experts"),
        (key("leading_dense_block_count", Value::U32(1)), "experts"),
        (key("attention.head_count_kv", Value::U32(3)), "head_count_kv"),
        (key("attention.key_length", Value::U32(3)), "key_length"),
        (key("attention.key_length_mla", Value::U32(3)), "key_length_mla"),
        (key("attention.layer_norm_rms_epsilon", Value::F32(1e-5)), "epsilon"),
        (key("attention.head_count", Value::U32(u32::MAX)), "num_attention_heads"),
        (key("attention.head_count", Value::U32(4)), "attn_q.weight"),
        (key("embedding_length", Value::U64(u64::MAX)), "hidden_size"),
        (key("embedding_length", Value::F32(12.0)), "embedding_length"),
        (key("vocab_size", Value::U32(1 << 24)), "token_embd"),
        (key("rope.freq_base", Value::F32(f32::NAN)), "rope_theta"),
        (key("rope.scaling.type", Value::from("linear")), "linear"),
        (key("rope.scaling.factor", Value::F32(-1.0)), "factor"),
        (altered(&path, |m, _| m.set("general.architecture", "llama")), "llama.attention.head_count"),
        (altered(&path, |_, t| t.truncate(5)), "missing"),
        (altered(&path, |_, t| t[1].name = "blk.9.attn_norm.weight".into()), "missing"),
        (altered(&path, |_, t| t.push(TensorInfo { name: "more".into(), ..t[1].clone() })), "more"),
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
    let none = altered(&path, |m, t| {
        m.set("deepseek2.block_count", 4096u32);
        m.set("deepseek2.leading_dense_block_count", 4096u32);
        t.truncate(1);
    });
    assert!(none.contains("4096"), "{none}");
}

/// Damaged keys of a model's file: an answer each time, whether the container or the model is at fault.
#[test]
fn no_damaged_model_ends_the_program() {
    let folder = Folder::new();
    let path = folder.file("x.gguf");
    write(&path, &random_model(&config_with(|c, _| c.layers.resize(1).unwrap()), 1), None, TensorType::F32).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let mut state = 9;
    for _ in 0..2_000 {
        let mut damaged = bytes.clone();
        let at = 24 + next(&mut state) as usize % 1_800;
        damaged[at] ^= 1 << (next(&mut state) % 8);
        std::fs::write(&path, &damaged).unwrap();
        let _ = read_model(&path, &Device::flex());
    }
}
