use burn::tensor::{Device, Tensor};
use lowkey_model::{
    CausalLm, ModelConfig, ModelDir,
    adapter::{AdapterConfig, AdapterDir},
    checkpoint::WeightDtype,
};

use super::*;
use crate::gguf::tests::{Folder, config_with, distance, logits, noise, random_model};
use crate::{Options, Target, Text, verify};

/// A model with an adapter of random values beside it.
fn adapted(folder: &Folder, config: &ModelConfig, keys: serde_json::Value) -> Source {
    let (base, adapter, device) = (folder.file("base"), folder.file("adapter"), Device::flex());
    random_model(config, 3).save(&base, WeightDtype::F32, usize::MAX).unwrap();
    let keys: AdapterConfig = serde_json::from_value(keys).unwrap();
    let config = ModelDir::open(&base).unwrap().config().unwrap();
    let begun = CausalLm::begin_adapter(&base, &config, &keys, 1, &device).unwrap();
    let mut seed = 0;
    let values = begun.parameters().into_iter().map(|parameter| {
        seed += 1;
        let len = parameter.shape.iter().product();
        let random: Vec<f32> = noise(seed, len).into_iter().map(|x| 0.3 * x).collect();
        if parameter.role.is_adapter() { Tensor::from_floats(&random[..], &device) } else { parameter.value }
    });
    let values = values.collect();
    let model = begun.with_values(values);
    std::fs::create_dir(&adapter).unwrap();
    model.save_adapter(&adapter).unwrap();
    Source::open(&adapter, &device).unwrap()
}

fn ids() -> Vec<u32> {
    (0..20).map(|i| (i * i + 3) % 29).collect()
}

fn close(found: &[f32], expected: &[f32]) -> bool {
    let size = expected.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
    distance(found, expected) <= 1e-5 * size
}

fn everything() -> serde_json::Value {
    serde_json::json!({
        "target_modules": "everything", "r": 3, "lora_alpha": 6.0,
        "rank_pattern": { "o_proj": 5, "kv_b_proj": 2 }, "alpha_pattern": { "up_proj": 2.0 },
    })
}

#[test]
fn every_export_of_an_adapted_model_is_certified_against_it() {
    for (to, form) in [("hf", None), ("absorbed", None), ("fused", Some("fused")), ("gguf", None)] {
        for dora in [false, true] {
            let folder = Folder::new();
            let mut keys = everything();
            keys["use_dora"] = dora.into();
            let source = adapted(&folder, &config_with(|_, m| m.q_lora_rank = Some(8)), keys);
            let expected = logits(&source.model, &ids());
            let base = logits(&source.model.unadapted(), &ids());
            assert!(!close(&expected, &base), "the adapter does something");
            let target = Target::parse(to, "f32").unwrap();
            let options = Options {
                out: folder.file("out"),
                overwrite: false,
                form: form.map(|form: &str| form.parse().unwrap()),
                context: None,
                text: Text { description: "squares".into(), sequences: vec![ids()] },
                bounds: target.bounds(),
                max_shard_bytes: usize::MAX,
                target,
            };
            let certificate = crate::export(&source, &options, &Device::flex(), &mut |_| {}).unwrap();
            assert!(certificate.evidence.logits.max_relative < 1e-5, "{to}, {dora}");
            let names: Vec<&str> = certificate.source.files.iter().map(|file| file.name.as_str()).collect();
            assert!(names.contains(&"adapter_model.safetensors") && names.contains(&"model.safetensors"), "{names:?}");
            if to != "gguf" {
                let merged = ModelDir::open(&options.out).unwrap().load(&Device::flex()).unwrap();
                assert!(merged.adapter().is_none() && close(&logits(&merged, &ids()), &expected), "{to}, {dora}");
            }
            assert!(verify(&options.out, Some(&source), &Device::flex(), &mut |_| {}).unwrap().failures.is_empty());
        }
    }
}

#[test]
fn several_adapters_are_merged_with_their_weights_and_certified_against_their_sum() {
    let config = config_with(|_, m| m.q_lora_rank = Some(8));
    let (first, second) = (Folder::new(), Folder::new());
    adapted(&first, &config, everything());
    adapted(&second, &config, serde_json::json!({ "target_modules": ["embed_tokens", "kv_b_proj"], "r": 2 }));
    let open = |weights: [f64; 2]| {
        let adapters = [(first.file("adapter"), weights[0]), (second.file("adapter"), weights[1])];
        let dir = ModelDir::open(&first.file("base")).unwrap().with_adapters(&adapters).unwrap();
        Source::read(dir, &Device::flex()).unwrap()
    };
    let source = open([0.7, -0.3]);
    let expected = logits(&source.model, &ids());
    assert!(!close(&expected, &logits(&open([0.7, 0.3]).model, &ids())), "the weights do something");
    for to in ["hf", "absorbed", "gguf"] {
        let target = Target::parse(to, "f32").unwrap();
        let options = Options {
            out: first.file(to),
            overwrite: false,
            form: None,
            context: None,
            text: Text { description: "squares".into(), sequences: vec![ids()] },
            bounds: target.bounds(),
            max_shard_bytes: usize::MAX,
            target,
        };
        let certificate = crate::export(&source, &options, &Device::flex(), &mut |_| {}).unwrap();
        assert!(certificate.evidence.logits.max_relative < 1e-5, "{to}");
        let check =
            |source: &Source| verify(&options.out, Some(source), &Device::flex(), &mut |_| {}).unwrap().failures;
        assert!(check(&source).is_empty(), "{to}");
        assert!(check(&open([0.6, -0.3])).iter().any(|line| line.contains("adapter 1 times 0.7")), "{to}");
        if to != "gguf" {
            let merged = ModelDir::open(&options.out).unwrap().load(&Device::flex()).unwrap();
            assert!(close(&logits(&merged, &ids()), &expected), "{to}");
        }
    }
}

#[test]
fn an_adapter_with_new_tokens_is_exported_with_them() {
    let folder = Folder::new();
    let (base, adapter, device) = (folder.file("base"), folder.file("adapter"), Device::flex());
    let config = config_with(|_, _| ());
    random_model(&config, 3).save(&base, WeightDtype::F32, usize::MAX).unwrap();
    let rows = config.vocab_size;
    let keys = serde_json::json!({ "target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "lm_head"] });
    let keys: AdapterConfig = serde_json::from_value(keys).unwrap();
    let larger = ModelConfig { vocab_size: rows + 2, ..ModelDir::open(&base).unwrap().config().unwrap() };
    let begun = CausalLm::begin_adapter(&base, &larger, &keys, 1, &device).unwrap().with_new_rows(rows..rows + 2);
    std::fs::create_dir(&adapter).unwrap();
    begun.save_adapter(&adapter).unwrap();
    let source = Source::open(&adapter, &device).unwrap();
    let target = Target::parse("hf", "f32").unwrap();
    let options = Options {
        out: folder.file("out"),
        overwrite: false,
        form: None,
        context: None,
        text: Text { description: "new".into(), sequences: vec![vec![1, rows as u32, 2, rows as u32 + 1]] },
        bounds: target.bounds(),
        max_shard_bytes: usize::MAX,
        target,
    };
    crate::export(&source, &options, &device, &mut |_| {}).unwrap();
    assert!(verify(&options.out, Some(&source), &device, &mut |_| {}).unwrap().failures.is_empty());
    assert_eq!(ModelDir::open(&options.out).unwrap().config().unwrap().vocab_size, rows + 2);
}

#[test]
fn what_an_engine_would_ignore_is_refused_by_name() {
    let refused = |keys: serde_json::Value, engine: Engine| {
        let folder = Folder::new();
        let source = adapted(&folder, &config_with(|_, m| m.q_lora_rank = Some(8)), keys);
        export_adapter(&source, engine, &folder.file("out"), false).err().map(|e| e.to_string())
    };
    let on = |modules: &str| serde_json::json!({ "target_modules": modules });
    let ends = |modules: &[&str]| serde_json::json!({ "target_modules": modules });
    let all = refused(on("all-linear"), Engine::Vllm).unwrap();
    assert!(all.contains("model.layers.0.self_attn.kv_b_proj") && all.contains("lowkey merge"), "{all}");
    assert_eq!(refused(on("vllm-safe"), Engine::Vllm), None);
    assert_eq!(refused(on("all-linear"), Engine::Sglang), None);
    assert!(refused(on("everything"), Engine::Sglang).unwrap().contains("lm_head"));
    assert_eq!(refused(on("everything"), Engine::Transformers), None);
    let feed_forward = serde_json::json!({ "target_modules": ["o_proj", "up_proj"], "use_dora": true });
    assert!(refused(feed_forward, Engine::Transformers).unwrap().contains("mlp.up_proj"));
    assert_eq!(refused(ends(&["kv_b_proj", "o_proj", "lm_head"]), Engine::Transformers), None);
    for module in ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "lm_head"] {
        assert!(refused(ends(&[module, "o_proj"]), Engine::LlamaCpp).unwrap().contains(module), "{module}");
    }
    assert_eq!(refused(ends(&["o_proj", "up_proj", "gate_proj", "down_proj"]), Engine::LlamaCpp), None);
    let dora = serde_json::json!({ "target_modules": ["o_proj"], "use_dora": true });
    let saved = serde_json::json!({ "target_modules": ["o_proj"], "modules_to_save": ["norm"] });
    for engine in [Engine::Vllm, Engine::Sglang, Engine::LlamaCpp] {
        assert!(refused(dora.clone(), engine).unwrap().contains("use_dora"));
        assert!(refused(saved.clone(), engine).unwrap().contains("modules_to_save"));
        assert!(refused(ends(&["embed_tokens", "o_proj"]), engine).unwrap().contains("embed_tokens"));
    }
    assert_eq!(refused(ends(&["embed_tokens", "o_proj"]), Engine::Transformers), None);
    assert_eq!(refused(dora, Engine::Transformers), None);
    assert_eq!(refused(saved, Engine::Transformers), None);
}

#[test]
fn each_engine_finds_the_maps_by_the_names_that_it_looks_for() {
    let folder = Folder::new();
    let keys = serde_json::json!({ "target_modules": "vllm-safe", "r": 3, "lora_dropout": 0.1 });
    let source = adapted(&folder, &config_with(|_, _| ()), keys);
    for (engine, by_matrix) in [(Engine::Transformers, true), (Engine::Vllm, false), (Engine::Sglang, false)] {
        let out = folder.file(&engine.to_string());
        export_adapter(&source, engine, &out, false).unwrap();
        let text = std::fs::read_to_string(out.join("adapter_config.json")).unwrap();
        let written: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(written.get("target_parameters").is_some(), by_matrix, "{engine}");
        // PEFT refuses dropout beside a matrix.
        assert_eq!(written["lora_dropout"] == 0.0, by_matrix, "{engine}");
        let same = ModelDir::open(&out).unwrap().load(&Device::flex()).unwrap();
        assert_eq!(logits(&same, &ids()), logits(&source.model, &ids()), "{engine}");
    }
}

#[test]
fn an_engine_that_cannot_compute_the_base_gets_no_adapter() {
    let keys = || serde_json::json!({ "target_modules": ["o_proj"] });
    for (name, config) in [
        ("latent_norm", config_with(|_, m| m.latent_norm = false)),
        ("query_bias", config_with(|_, m| m.query_bias = true)),
    ] {
        let folder = Folder::new();
        let source = adapted(&folder, &config, keys());
        let why = export_adapter(&source, Engine::Vllm, &folder.file("out"), false).unwrap_err().to_string();
        assert!(why.contains(name) && why.contains("its base"), "{why}");
        assert!(!folder.file("out").exists());
    }
    // What the export of the base takes into its weights is no obstacle.
    let folder = Folder::new();
    let source = adapted(&folder, &config_with(|_, m| m.latent_scale = true), keys());
    export_adapter(&source, Engine::Vllm, &folder.file("out"), false).unwrap();
}

#[test]
fn what_an_export_of_the_base_folds_into_a_module_leaves_no_adapter_of_it() {
    let scaled = config_with(|_, m| m.latent_scale = true);
    let cut = config_with(|_, m| m.kv_cache_rank = Some(m.kv_lora_rank - 1));
    let saved = |module: &str| serde_json::json!({ "target_modules": ["o_proj"], "modules_to_save": [module] });
    let on = |module: &str| serde_json::json!({ "target_modules": [module] });
    for (config, keys, why) in [
        (&scaled, saved("norm"), Some("kv_a_layernorm")),
        (&scaled, saved("post_attention_layernorm"), None),
        (&scaled, on("kv_b_proj"), None),
        (&cut, on("kv_b_proj"), Some("kv_b_proj")),
        (&cut, saved("kv_b_proj"), Some("kv_b_proj")),
        (&cut, saved("kv_a_layernorm"), None),
    ] {
        let folder = Folder::new();
        let source = adapted(&folder, config, keys.clone());
        let refused = export_adapter(&source, Engine::Transformers, &folder.file("out"), false);
        let refused = refused.err().map(|e| e.to_string());
        match why {
            Some(module) => assert!(refused.unwrap().contains(&format!("{module} is not the same")), "{keys}"),
            None => assert_eq!(refused, None, "{keys}"),
        }
    }
}

#[test]
fn an_adapter_of_one_rank_and_factor_computes_what_that_of_many_does() {
    let folder = Folder::new();
    let mut keys = everything();
    keys["target_modules"] = "all-linear".into();
    let source = adapted(&folder, &config_with(|_, m| m.q_lora_rank = Some(8)), keys);
    let out = folder.file("out");
    export_adapter(&source, Engine::Sglang, &out, false).unwrap();
    let written = AdapterDir::open(&out).unwrap();
    assert!(written.config.rank_pattern.is_empty() && written.config.alpha_pattern.is_empty());
    assert_eq!(written.config.r, 5);
    let same = ModelDir::open(&out).unwrap().load(&Device::flex()).unwrap();
    assert!(close(&logits(&same, &ids()), &logits(&source.model, &ids())));
}

/// The tensors of the file, multiplied out as llama.cpp does, are what the merged model's file has more than the base's.
#[test]
fn a_file_for_llama_cpp_adds_what_merging_adds() {
    for interleaved in [true, false] {
        let folder = Folder::new();
        let config = config_with(|_, m| m.rope_interleave = interleaved);
        let keys = serde_json::json!({
            "target_modules": ["o_proj", "up_proj", "gate_proj", "down_proj"], "r": 3, "rank_pattern": { "o_proj": 5 },
        });
        let source = adapted(&folder, &config, keys);
        let out = folder.file("out");
        export_adapter(&source, Engine::LlamaCpp, &out, false).unwrap();
        let adapter = gguf::read(&out.join(GGUF)).unwrap();
        assert_eq!(adapter.metadata().text("general.type"), Some("adapter"));
        let alpha = adapter.metadata().number("adapter.lora.alpha").unwrap();
        let [base, merged] = [source.model.unadapted(), source.model.merged()].map(|model| {
            let path = folder.file("model.gguf");
            gguf::write(&path, &model, None, gguf::TensorType::F32).unwrap();
            gguf::read(&path).unwrap()
        });
        let mut pairs = 0;
        for tensor in base.tensors() {
            let values = |file: &gguf::Gguf, name: &str| file.values(name);
            let (before, after) = (values(&base, &tensor.name).unwrap(), values(&merged, &tensor.name).unwrap());
            let name = |end: &str| format!("{}.{end}", tensor.name);
            let Some(a) = values(&adapter, &name("lora_a")) else {
                assert!(before == after, "{}: an adapter is missing", tensor.name);
                continue;
            };
            pairs += 1;
            let b = values(&adapter, &name("lora_b")).unwrap();
            let rank = adapter.tensor(&name("lora_a")).unwrap().shape[0];
            let (rows, columns) = (tensor.shape[0], tensor.shape[1]);
            for i in 0..rows {
                for j in 0..columns {
                    let sum: f64 = (0..rank).map(|k| f64::from(b[i * rank + k]) * f64::from(a[k * columns + j])).sum();
                    let expected = f64::from(after[i * columns + j]) - f64::from(before[i * columns + j]);
                    assert!((alpha / rank as f64 * sum - expected).abs() < 1e-5, "{}", tensor.name);
                }
            }
        }
        assert_eq!(pairs, 4 * config.layers.len());
    }
}
