//! Models without latents, in the architectures `llama`, `qwen2` and `qwen3`.

use lowkey_model::attention::GroupedConfig;

use super::models::altered;
use super::*;

/// Four query heads of 6 over two key heads, in a width of 24.
fn grouped_with(change: impl FnOnce(&mut ModelConfig, &mut GroupedConfig)) -> ModelConfig {
    let mut grouped = GroupedConfig {
        num_key_value_heads: 2,
        head_dim: 6,
        rotary_dim: 6,
        qkv_bias: false,
        o_bias: false,
        qk_norm: false,
    };
    let mut config =
        ModelConfig { hidden_size: 24, num_attention_heads: 4, rms_norm_eps: 1e-5, ..config_with(|_, _| ()) };
    change(&mut config, &mut grouped);
    config.layers.iter_mut().for_each(|layer| layer.attention = AttentionConfig::Grouped(grouped.clone()));
    config.family = config.natural_family();
    config.check().unwrap();
    config
}

fn llama3() -> RopeConfig {
    RopeConfig {
        rope_type: RopeType::Llama3,
        factor: Some(8.0),
        low_freq_factor: Some(1.0),
        high_freq_factor: Some(4.0),
        original_max_position_embeddings: Some(32),
        // So that all three parts of the ramp have a pair.
        rope_theta: 100.0,
        ..RopeConfig::default()
    }
}

fn longrope() -> RopeConfig {
    // One of them does not turn, as in models that were made of latents.
    let divisors = Some(vec![1.0, 2.5, 2f64.powi(80)]);
    RopeConfig {
        rope_type: RopeType::Longrope,
        factor: Some(1.0),
        attention_factor: Some(1.0),
        original_max_position_embeddings: Some(200),
        short_factor: divisors.clone(),
        long_factor: divisors,
        ..RopeConfig::default()
    }
}

fn linear() -> RopeConfig {
    RopeConfig { rope_type: RopeType::Linear, factor: Some(2.5), ..RopeConfig::default() }
}

/// Name, architecture, configuration, and whether it reads back as it was.
fn zoo() -> Vec<(&'static str, &'static str, ModelConfig, bool)> {
    let wide = |g: &mut GroupedConfig| (g.head_dim, g.rotary_dim) = (10, 10);
    let rope = |rope: RopeConfig| grouped_with(|c, _| c.rope = rope);
    let longer = RopeConfig { factor: Some(8.0), original_max_position_embeddings: Some(16), ..yarn(None, None) };
    vec![
        ("GQA", "llama", grouped_with(|_, _| ()), true),
        ("MHA", "llama", grouped_with(|_, g| g.num_key_value_heads = 4), true),
        ("MQA", "llama", grouped_with(|_, g| g.num_key_value_heads = 1), true),
        ("tied", "llama", grouped_with(|c, _| c.tie_word_embeddings = true), true),
        ("wide heads", "llama", grouped_with(|_, g| wide(g)), true),
        ("heads of 2", "llama", grouped_with(|_, g| (g.head_dim, g.rotary_dim) = (2, 2)), true),
        ("Llama's biases", "llama", grouped_with(|_, g| (g.qkv_bias, g.o_bias) = (true, true)), true),
        ("a bias of the output alone", "llama", grouped_with(|_, g| g.o_bias = true), true),
        ("another base", "llama", grouped_with(|c, _| c.rope.rope_theta = 5e5), true),
        ("linear", "llama", rope(linear()), true),
        ("YaRN", "llama", rope(yarn(None, None)), true),
        ("YaRN, attention_factor", "llama", rope(RopeConfig { attention_factor: Some(0.8), ..longer.clone() }), false),
        ("YaRN, mixed mscales", "llama", rope(yarn(Some(1.3), Some(0.6))), false),
        ("YaRN, factor 1", "llama", rope(RopeConfig { factor: Some(1.0), ..yarn(None, None) }), true),
        ("llama3", "llama", rope(llama3()), true),
        ("LongRoPE", "llama", rope(longrope()), true),
        ("Qwen2", "qwen2", grouped_with(|_, g| g.qkv_bias = true), true),
        (
            "Qwen2, YaRN, tied",
            "qwen2",
            grouped_with(|c, g| {
                (c.rope, c.tie_word_embeddings, g.qkv_bias) = (longer.clone(), true, true);
            }),
            true,
        ),
        (
            "Qwen2's biases, wide heads",
            "llama",
            grouped_with(|_, g| {
                wide(g);
                g.qkv_bias = true;
            }),
            true,
        ),
        ("Qwen2's biases, llama3", "llama", grouped_with(|c, g| (c.rope, g.qkv_bias) = (llama3(), true)), true),
        ("Qwen3", "qwen3", grouped_with(|_, g| g.qk_norm = true), true),
        (
            "Qwen3, wide heads",
            "qwen3",
            grouped_with(|_, g| {
                wide(g);
                g.qk_norm = true;
            }),
            true,
        ),
        ("Qwen3, biases of q, k, v", "qwen3", grouped_with(|_, g| (g.qk_norm, g.qkv_bias) = (true, true)), true),
        ("Qwen3, linear", "qwen3", grouped_with(|c, g| (c.rope, g.qk_norm) = (linear(), true)), true),
        ("Qwen3, YaRN", "qwen3", grouped_with(|c, g| (c.rope, g.qk_norm) = (longer, true)), true),
    ]
}

#[test]
fn every_model_without_latents_comes_back_to_the_last_bit() {
    let folder = Folder::new();
    let path = folder.file("x.gguf");
    let ids: Vec<u32> = (0..70).map(|i| (i * i + 3) % 29).collect();
    for (seed, (name, architecture, config, plain)) in zoo().into_iter().enumerate() {
        let model = random_model(&config, seed as u64 + 1);
        let summary = write(&path, &model, None, TensorType::F32).unwrap_or_else(|e| panic!("{name}: {e}"));
        let file = read(&path).unwrap();
        assert_eq!(file.metadata().text("general.architecture"), Some(architecture), "{name}");
        assert_eq!(summary.tensors, file.tensors().len());
        assert_eq!(summary.notes.len(), 1, "{name}: {:?}", summary.notes);
        let again = read_model(&path, &Device::flex()).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(bits(&again) == bits(&model), "{name}");
        assert!(bits(&as_stored(&model).unwrap()) == bits(&model), "{name}");
        if plain {
            // Without a tokenizer no token that begins or ends a text is named.
            let (bos_token_id, eos_token_id) = (again.config.bos_token_id, again.config.eos_token_id.clone());
            assert_eq!(again.config, ModelConfig { bos_token_id, eos_token_id, ..config }, "{name}");
        }
        let off = distance(&logits(&again, &ids), &logits(&model, &ids));
        assert!(off <= if plain { 0.0 } else { 2e-5 }, "{name}: {off:e}");
        assert_eq!(differences(&path, &model, None, TensorType::F32).unwrap(), [""; 0], "{name}");
    }
}

/// Row by row: pair i of a head is (i, i + D/2) here, (2i, 2i + 1) in `llama`, and in `qwen2` as it is here.
#[test]
fn only_llama_has_its_rotated_rows_in_adjacent_pairs() {
    let folder = Folder::new();
    let path = folder.file("x.gguf");
    let biased = |o_bias| grouped_with(|_, g| (g.qkv_bias, g.o_bias) = (true, o_bias));
    for (config, pairs) in [(biased(true), true), (biased(false), false)] {
        let model = random_model(&config, 5);
        write(&path, &model, None, TensorType::F32).unwrap();
        let file = read(&path).unwrap();
        let parameters = model.parameters();
        let ours = |name: &str| -> Vec<f32> {
            let found = parameters.iter().find(|p| p.name == format!("model.layers.1.self_attn.{name}")).unwrap();
            found.value.clone().try_into_vec_as::<f32>().unwrap()
        };
        for (name, source, heads) in [("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2), ("attn_v", "v_proj", 2)] {
            for (end, width) in [("weight", 24), ("bias", 1)] {
                let (found, ours) =
                    (file.values(&format!("blk.1.{name}.{end}")).unwrap(), ours(&format!("{source}.{end}")));
                for (head, i, half) in (0..heads).flat_map(|h| (0..3).flat_map(move |i| [(h, i, 0), (h, i, 1)])) {
                    let here = head * 6 + i + half * 3;
                    let there = if pairs && name != "attn_v" { head * 6 + 2 * i + half } else { here };
                    let row = |values: &[f32], at: usize| values[at * width..(at + 1) * width].to_vec();
                    assert_eq!(row(&found, there), row(&ours, here), "{name}.{end}, head {head}, pair {i}");
                }
            }
        }
    }
}

#[test]
fn the_keys_of_a_grouped_model_are_those_that_the_loader_reads() {
    let folder = Folder::new();
    let path = folder.file("tiny.gguf");
    let config = grouped_with(|c, g| {
        (g.head_dim, g.rotary_dim) = (10, 10);
        c.rope = RopeConfig { attention_factor: Some(0.5), ..yarn(None, None) };
    });
    write(&path, &random_model(&config, 1), None, TensorType::F32).unwrap();
    let file = read(&path).unwrap();
    let metadata = file.metadata();
    for (key, value) in [
        ("block_count", 2),
        ("context_length", 128),
        ("embedding_length", 24),
        ("feed_forward_length", 17),
        ("vocab_size", 29),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("attention.key_length", 10),
        ("attention.value_length", 10),
        ("rope.dimension_count", 10),
        ("rope.scaling.original_context_length", 32),
    ] {
        assert_eq!(metadata.get(&format!("llama.{key}")), Some(&Value::U32(value)), "{key}");
    }
    assert_eq!(metadata.number("llama.attention.layer_norm_rms_epsilon"), Some(1e-5));
    assert_eq!(metadata.text("llama.rope.scaling.type"), Some("yarn"));
    assert_eq!(metadata.number("llama.rope.scaling.factor"), Some(4.0));
    // Cosines and sines are to be halved, and llama.cpp multiplies them by 0.1·ln 4 + 1 first.
    let ratio = metadata.number("llama.rope.scaling.attn_factor").unwrap();
    assert!((ratio * (0.1 * 4f64.ln() + 1.0) - 0.5).abs() < 1e-7, "{ratio}");
    // Each pair's frequency over the plain one: 1 for the fast pair, 8 for the slow one, between them for the one between.
    write(&path, &random_model(&grouped_with(|c, _| c.rope = llama3()), 1), None, TensorType::F32).unwrap();
    let divisors = read(&path).unwrap().values("rope_freqs.weight").unwrap();
    assert!(divisors[0] == 1.0 && divisors[1] > 1.0 && divisors[1] < 8.0 && divisors[2] == 8.0, "{divisors:?}");
}

#[test]
fn what_no_architecture_computes_is_refused_by_name() {
    let folder = Folder::new();
    let path = folder.file("x.gguf");
    for (config, part) in [
        (grouped_with(|_, g| g.rotary_dim = 4), "partial_rotary_factor"),
        (grouped_with(|_, g| g.rotary_dim = 0), "partial_rotary_factor"),
        (grouped_with(|_, g| (g.qk_norm, g.qkv_bias, g.o_bias) = (true, true, true)), "attention_bias"),
        (grouped_with(|_, g| (g.qk_norm, g.o_bias) = (true, true)), "attention_bias"),
        (grouped_with(|c, g| (c.rope, g.qk_norm) = (llama3(), true)), "llama3"),
        (grouped_with(|c, _| c.layers.resize(513).unwrap()), "513"),
        (grouped_with(|c, _| c.rope = RopeConfig { factor: Some(0.5), ..yarn(None, None) }), "factor = 0.5"),
        (
            grouped_with(|c, g| {
                (g.head_dim, g.rotary_dim) = (64, 64);
                let original = Some(2000);
                c.rope = RopeConfig {
                    truncate: Some(false),
                    original_max_position_embeddings: original,
                    ..yarn(None, None)
                };
            }),
            "truncate = false",
        ),
    ] {
        let error = write(&path, &CausalLm::init(&config, 1, &Device::flex()), None, TensorType::F32).unwrap_err();
        assert!(matches!(error, Error::Unsupported { format: "GGUF", .. }), "{error}");
        let error = error.to_string();
        assert!(error.contains(part), "{part}: {error}");
        // llama.cpp's own converter knows the tokenizers of published models alone.
        assert!(!error.contains("converter"), "{error}");
    }
    assert_eq!(std::fs::read_dir(folder.0.path()).unwrap().count(), 0);
}

#[test]
fn narrow_formats_hold_grouped_models_too() {
    let folder = Folder::new();
    let path = folder.file("x.gguf");
    // Rows of 32, which are whole blocks.
    let config = grouped_with(|c, g| {
        (c.hidden_size, g.qk_norm) = (32, true);
        c.layers.iter_mut().for_each(|layer| layer.mlp.intermediate_size = 64);
        (g.head_dim, g.rotary_dim) = (8, 8);
    });
    let model = random_model(&config, 1);
    for (kind, tolerance) in [(TensorType::F16, 3e-3), (TensorType::Bf16, 2e-2), (TensorType::Q8_0, 5e-2)] {
        let summary = write(&path, &model, None, kind).unwrap();
        assert!(summary.fallbacks.is_empty(), "{:?}", summary.fallbacks);
        let again = read_model(&path, &Device::flex()).unwrap();
        let off = distance(&logits(&again, &[3, 1, 4, 1, 5]), &logits(&model, &[3, 1, 4, 1, 5]));
        assert!(off > 0.0 && off < tolerance, "{kind}: {off}");
        for (name, kind) in [("blk.0.attn_q.weight", kind), ("blk.0.attn_q_norm.weight", TensorType::F32)] {
            assert_eq!(read(&path).unwrap().tensor(name).unwrap().kind, kind, "{name}");
        }
    }
}

#[test]
fn a_grouped_file_that_does_not_fit_its_keys_is_refused() {
    let folder = Folder::new();
    let path = folder.file("x.gguf");
    write(&path, &random_model(&grouped_with(|c, _| c.rope = llama3()), 1), None, TensorType::F32).unwrap();
    let key = |key: &'static str, value: Value| {
        let path = &path;
        altered(path, move |metadata, _| metadata.set(key, value))
    };
    for (error, part) in [
        (key("llama.attention.sliding_window", Value::U32(16)), "attention.sliding_window"),
        (key("llama.expert_count", Value::U32(8)), "expert_count"),
        (key("llama.attention.head_count_kv", Value::U32(3)), "num_key_value_heads"),
        (key("llama.attention.head_count_kv", Value::U32(1)), "attn_k.weight"),
        (key("llama.attention.head_count", Value::U32(6)), "attn_q.weight"),
        (key("llama.attention.value_length", Value::U32(4)), "value_length"),
        (key("llama.rope.dimension_count", Value::U32(4)), "dimension_count"),
        (key("llama.attention.layer_norm_rms_epsilon", Value::F32(0.0)), "rms_norm_eps"),
        (key("llama.block_count", Value::U32(400)), "400 layers"),
        (key("lowkey.rope.factor", Value::F64(4.0)), "rope_freqs.weight"),
        (key("lowkey.rope.low_freq_factor", Value::from("1")), "low_freq_factor"),
        (key("general.architecture", Value::from("gemma")), "gemma"),
        (key("general.architecture", Value::from("qwen3")), "qwen3.attention.head_count"),
        (altered(&path, |_, t| t.retain(|t| t.name != "blk.1.attn_k.weight")), "attn_k.weight is missing"),
        (altered(&path, |_, t| t.push(TensorInfo { name: "blk.1.attn_q.bias".into(), ..t[1].clone() })), "attn_q.bias"),
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
    // One bit of one divisor.
    let mut bytes = std::fs::read(&path).unwrap();
    let divisor = read(&path).unwrap().values("rope_freqs.weight").unwrap()[1].to_le_bytes();
    let at = bytes.windows(4).position(|four| four == divisor).unwrap();
    bytes[at] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert!(read_model(&path, &Device::flex()).unwrap_err().to_string().contains("rope_freqs.weight"));
}

/// llama.cpp caches as much in every layer: what a cut leaves out is there with weights of zero.
#[test]
fn a_cut_latent_is_written_whole() {
    let folder = Folder::new();
    let path = folder.file("x.gguf");
    let whole = random_model(&config_with(|_, _| ()), 3);
    let cut = whole.with_kv_ranks(&[4, 9]).unwrap();
    write(&path, &cut, None, TensorType::F32).unwrap();
    let again = read_model(&path, &Device::flex()).unwrap();
    let ids = [3, 1, 4, 1, 5, 9, 2, 6];
    let off = distance(&logits(&again, &ids), &logits(&cut, &ids));
    assert!(off <= 2e-5 && distance(&logits(&again, &ids), &logits(&whole, &ids)) > 1e-3, "{off:e}");
    assert_eq!(bits(&as_stored(&cut).unwrap()), bits(&again));
}
