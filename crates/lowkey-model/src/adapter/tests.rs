mod by_matrix;
mod dropping;
mod quantization;
mod several;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use burn::tensor::{Device, Tensor};
use lowkey_batch::{IGNORE, Rows};

use super::*;
use crate::config::ModelConfig;
use crate::fixtures::{self, distance, normal, scrambled, values};
use crate::model::CausalLm;
use crate::objective::{Objective, Term};
use crate::tensor::{Part, Role, TensorSpec};
use crate::{Error, ModelDir, Recompute, checkpoint::WeightDtype, ids_tensor};

fn keys(json: serde_json::Value) -> AdapterConfig {
    serde_json::from_value(json).unwrap()
}

fn everything() -> AdapterConfig {
    keys(serde_json::json!({ "target_modules": "everything", "r": 3, "lora_alpha": 5.0 }))
}

/// The kinds of adapters, each on all maps.
fn kinds() -> [(&'static str, AdapterConfig); 3] {
    let rank = ByPattern(vec![("o_proj".to_string(), 2)]);
    let alpha = ByPattern(vec![(r"layers\.0\..*".to_string(), 2.5)]);
    [
        ("LoRA", AdapterConfig { rank_pattern: rank, alpha_pattern: alpha, ..everything() }),
        ("rsLoRA", AdapterConfig { use_rslora: true, ..everything() }),
        ("DoRA", AdapterConfig { use_dora: true, ..everything() }),
    ]
}

/// The model that `scrambled` gives, with adapters of random values beside it.
fn adapted(config: &ModelConfig, adapter: &AdapterConfig, seed: u64, device: &Device) -> CausalLm {
    beside(Path::new("base"), config, adapter, seed, device)
}

/// The same, which is told that its base lies there.
fn beside(base_dir: &Path, config: &ModelConfig, adapter: &AdapterConfig, seed: u64, device: &Device) -> CausalLm {
    let base = scrambled(config, seed, device);
    let base: BTreeMap<String, Vec<f32>> =
        base.parameters().into_iter().map(|parameter| (parameter.name, values(parameter.value))).collect();
    let plan = adapter.plan(config).unwrap();
    let mut tensors = 0;
    let mut model =
        CausalLm::build_adapted(config, Some(&plan), device, &mut |TensorSpec { name, shape, role, .. }| {
            tensors += 1;
            let random = normal(seed * 777 + tensors, shape.iter().product());
            match role {
                Role::Adapter(Part::Reads | Part::Writes) => random.iter().map(|x| 0.2 * x).collect(),
                Role::Adapter(Part::Rows) => random.iter().map(|x| 1.0 + 0.3 * x.tanh()).collect(),
                _ => base[name].clone(),
            }
        });
    model.adapter = Some(Arc::new((adapter.clone(), base_dir.to_path_buf())));
    model.with_trained(|spec| plan.trains(spec))
}

fn logits(model: &CausalLm, config: &ModelConfig) -> Vec<f32> {
    let ids: Vec<u32> = (0..22).map(|i| i * 7 % config.vocab_size as u32).collect();
    let device = model.model.norm.gain().device();
    values(model.forward(ids_tensor(&ids, 2, 11, &device)))
}

fn close(found: &[f32], expected: &[f32], most: f32) -> bool {
    let size = expected.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
    distance(found, expected) <= most * size
}

#[test]
fn an_adapted_model_computes_what_its_merged_one_does_and_without_adapters_what_its_base_did() {
    let device = Device::flex();
    for (name, config) in fixtures::every_kind() {
        let base = scrambled(&config, 5, &device);
        for (kind, adapter) in kinds() {
            let model = adapted(&config, &adapter, 5, &device);
            let found = logits(&model, &config);
            let merged = model.merged();
            assert!(close(&found, &logits(&merged, &config), 1e-5), "{name}, {kind}");
            assert!(merged.adapter().is_none(), "{name}, {kind}");
            let shapes = |model: &CausalLm| -> Vec<_> {
                model.tensors().iter().map(|spec| (spec.name.clone(), spec.shape.clone(), spec.role)).collect()
            };
            assert_eq!(shapes(&merged), shapes(&base), "{name}, {kind}");
            assert!(!close(&found, &logits(&base, &config), 1e-2), "{name}, {kind}: the adapter does something");
            let without = model.unadapted();
            assert_eq!(logits(&without, &config), logits(&base, &config), "{name}, {kind}");
            let names = |model: &CausalLm| {
                model.parameters().into_iter().map(|p| (p.name, values(p.value))).collect::<Vec<_>>()
            };
            assert_eq!(names(&without), names(&base), "{name}, {kind}: the base is untouched");
        }
    }
}

/// dA = s·Bᵀ·dW', dB = s·dW'·Aᵀ, and for DoRA with V = W + s·B·A, W' = (m/|V|)·V and constant |V|.
#[test]
fn gradients_of_adapters_follow_from_those_of_the_merged_matrices() {
    let device = Device::flex().autodiff();
    for (name, config) in fixtures::every_kind() {
        let input_ids: Vec<u32> = (0..18).map(|i| i * 5 % config.vocab_size as u32).collect();
        let targets: Vec<i64> = (0..18).map(|i| if i == 7 { IGNORE } else { i * 3 % 7 }).collect();
        let document_starts: Vec<u32> = (0..18).map(|i| if i % 9 < 4 { 0 } else { 4 }).collect();
        let batch = Rows {
            vectors: None,
            pairs: false,
            rows: 2,
            seq_len: 9,
            input_ids: &input_ids,
            targets: &targets,
            document_starts: &document_starts,
        };
        let objective = Objective { scale: 0.1, terms: &[Term::Next { z_loss: 0.01 }] };
        for (kind, adapter) in kinds() {
            let model = adapted(&config, &adapter, 4, &device);
            let merged = model.merged().with_trained(|_| true);
            let (_, whole) = merged.loss_and_gradients(batch, objective, Recompute::None, &device);
            let whole: BTreeMap<String, Vec<f32>> =
                merged.parameters().into_iter().map(|p| p.name).zip(whole.into_iter().map(values)).collect();
            let parts: BTreeMap<String, (Vec<usize>, Vec<f32>)> =
                model.parameters().into_iter().map(|p| (p.name, (p.shape, values(p.value)))).collect();
            let plan = adapter.plan(&config).unwrap();
            for recompute in [Recompute::None, Recompute::Block] {
                let (_, gradients) = model.loss_and_gradients(batch, objective, recompute, &device);
                let trained = model.trained_parameters();
                assert_eq!(gradients.len(), trained.len());
                assert!(trained.iter().all(|parameter| parameter.role.is_adapter()), "{name}: the base has none");
                for (gradient, parameter) in gradients.into_iter().zip(trained) {
                    let found = values(gradient);
                    let module = parameter.name.split(".lora_").next().unwrap();
                    let LowRank { r, scale, use_dora, .. } = *plan.of(module).and_then(Planned::as_low_rank).unwrap();
                    let (shape, weight) = &parts[&format!("{module}.weight")];
                    let (d_out, d_in) = (shape[0], shape[1]);
                    let (a, b) =
                        (&parts[&format!("{module}.lora_A.weight")].1, &parts[&format!("{module}.lora_B.weight")].1);
                    let sum = |i: usize, j: usize| {
                        let product: f64 = (0..r).map(|k| f64::from(b[i * r + k]) * f64::from(a[k * d_in + j])).sum();
                        f64::from(weight[i * d_in + j]) + scale * product
                    };
                    let length = |i: usize| (0..d_in).map(|j| sum(i, j).powi(2)).sum::<f64>().sqrt();
                    let of_merged = &whole[&format!("{module}.weight")];
                    let factor = |i: usize| {
                        if use_dora {
                            f64::from(parts[&format!("{module}.lora_magnitude_vector")].1[i]) / length(i)
                        } else {
                            1.0
                        }
                    };
                    let d_sum: Vec<f64> = (0..d_out)
                        .flat_map(|i| (0..d_in).map(move |j| (i, j)))
                        .map(|(i, j)| f64::from(of_merged[i * d_in + j]) * factor(i))
                        .collect();
                    let expected: Vec<f32> = match parameter.role {
                        Role::Adapter(Part::Reads) => (0..r)
                            .flat_map(|k| (0..d_in).map(move |j| (k, j)))
                            .map(|(k, j)| {
                                (0..d_out).map(|i| f64::from(b[i * r + k]) * d_sum[i * d_in + j]).sum::<f64>()
                            })
                            .map(|x| (scale * x) as f32)
                            .collect(),
                        Role::Adapter(Part::Writes) => (0..d_out)
                            .flat_map(|i| (0..r).map(move |k| (i, k)))
                            .map(|(i, k)| {
                                (0..d_in).map(|j| f64::from(a[k * d_in + j]) * d_sum[i * d_in + j]).sum::<f64>()
                            })
                            .map(|x| (scale * x) as f32)
                            .collect(),
                        _ => (0..d_out)
                            .map(|i| {
                                let along = |j: usize| f64::from(of_merged[i * d_in + j]) * sum(i, j);
                                ((0..d_in).map(along).sum::<f64>() / length(i)) as f32
                            })
                            .collect(),
                    };
                    assert!(close(&found, &expected, 2e-5), "{name}, {kind}, {recompute:?}: {}", parameter.name);
                }
            }
        }
    }
}

#[test]
fn an_adapter_comes_back_from_its_directory_and_a_new_one_changes_nothing() {
    let device = Device::flex();
    let config = fixtures::mla_with(|mla| mla.q_lora_rank = Some(8));
    let dir = tempfile::tempdir().unwrap();
    let base = scrambled(&config, 3, &device);
    let base_dir = dir.path().join("base");
    base.save(&base_dir, WeightDtype::F32, usize::MAX).unwrap();
    let read = ModelDir::open(&base_dir).unwrap().config().unwrap();
    for (kind, adapter) in kinds() {
        let adapter = AdapterConfig { modules_to_save: Some(vec!["norm".into()]), ..adapter };
        let begun = CausalLm::begin_adapter(&base_dir, &read, &adapter, 1, &device).unwrap();
        let expected = logits(&base, &config);
        let new = logits(&begun, &config);
        // The feed-forward layer is computed step by step beside adapters, and DoRA divides by what it multiplies with.
        assert!(close(&new, &expected, 1e-5), "{kind}");
        let of_a = begun.trained_parameters().into_iter().find(|p| p.role == Role::Adapter(Part::Reads)).unwrap();
        assert!(values(of_a.value).iter().any(|x| *x != 0.0), "{kind}: B alone is zero");

        let model = beside(&base_dir, &config, &adapter, 3, &device);
        let there = dir.path().join(kind);
        std::fs::create_dir(&there).unwrap();
        model.save_adapter(&there).unwrap();
        assert!(is_adapter(&there) && !is_adapter(&base_dir));
        let opened = AdapterDir::open(&there).unwrap();
        assert_eq!(opened.base, base_dir);
        let back = CausalLm::load_adapted(&base_dir, &read, &opened, &device).unwrap();
        assert_eq!(logits(&back, &config), logits(&model, &config), "{kind}");
        let names = |model: &CausalLm| {
            model.trained_parameters().into_iter().map(|p| (p.name, values(p.value))).collect::<Vec<_>>()
        };
        assert_eq!(names(&back), names(&model), "{kind}");
        assert!(names(&back).iter().any(|(name, _)| name.ends_with("layernorm.weight")), "{kind}");
        // What loads a directory finds the base by itself.
        let found = ModelDir::open(&there).unwrap().load(&device).unwrap();
        assert_eq!(logits(&found, &config), logits(&model, &config), "{kind}");
        assert!(back.save(&dir.path().join("never"), WeightDtype::F32, usize::MAX).is_err());
    }
}

#[test]
fn patterns_choose_as_peft_does_and_what_fits_nothing_is_an_error() {
    let config = fixtures::mla_with(|mla| mla.q_lora_rank = Some(8));
    let chosen = |json: serde_json::Value| -> Vec<String> {
        keys(json).plan(&config).unwrap().modules().map(|(name, _)| name.to_string()).collect()
    };
    let ends = |names: &[String]| {
        let mut ends: Vec<String> = names.iter().map(|name| name.rsplit('.').next().unwrap().to_string()).collect();
        ends.sort();
        ends.dedup();
        ends
    };
    let all = chosen(serde_json::json!({ "target_modules": "all-linear" }));
    assert_eq!(
        ends(&all),
        ["down_proj", "gate_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj", "up_proj"]
    );
    assert_eq!(all.len(), 16);
    let safe = chosen(serde_json::json!({ "target_modules": "vllm-safe" }));
    assert!(!ends(&safe).contains(&"kv_b_proj".to_string()) && safe.len() == 14);
    assert!(chosen(serde_json::json!({ "target_modules": "everything" })).contains(&"lm_head".to_string()));
    assert_eq!(chosen(serde_json::json!({ "target_modules": ["o_proj"] })).len(), 2);
    // The end of a name begins behind a dot.
    assert_eq!(chosen(serde_json::json!({ "target_modules": ["self_attn.o_proj", "lm_head"] })).len(), 3);
    let refused = |json: serde_json::Value| match keys(json).plan(&config) {
        Err(Error::Adapter { key, why, .. }) => (key, why),
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(serde_json::json!({ "target_modules": ["proj"] })).0, "target_modules");
    assert_eq!(refused(serde_json::json!({ "target_modules": ["o_proj", "k_proj"] })).0, "target_modules");
    assert_eq!(refused(serde_json::json!({ "target_modules": "model.layers.0.self_attn" })).0, "target_modules");
    assert_eq!(refused(serde_json::json!({ "target_modules": "(" })).0, "target_modules");
    let one = serde_json::json!({ "target_modules": "model\\.layers\\.1\\.self_attn\\.o_proj" });
    assert_eq!(chosen(one), ["model.layers.1.self_attn.o_proj"]);
    let layers = serde_json::json!({ "target_modules": ["o_proj"], "layers_to_transform": 1 });
    assert_eq!(chosen(layers), ["model.layers.1.self_attn.o_proj"]);
    let layer = serde_json::json!({ "target_modules": ["o_proj"], "layers_to_transform": [0, 2] });
    assert_eq!(refused(layer).0, "layers_to_transform");
    let without = serde_json::json!({ "target_modules": "all-linear", "exclude_modules": ["kv_b_proj"] });
    assert_eq!(chosen(without), safe);
    let none = serde_json::json!({ "target_modules": ["o_proj"], "exclude_modules": ["o_proj"] });
    assert_eq!(refused(none).0, "target_modules");
    let unfit = serde_json::json!({ "target_modules": ["o_proj"], "rank_pattern": { "up_proj": 4 } });
    assert_eq!(refused(unfit).0, "rank_pattern");
    assert_eq!(refused(serde_json::json!({ "target_modules": ["o_proj"], "r": 0 })).0, "r");
    assert_eq!(
        refused(serde_json::json!({ "target_modules": ["o_proj"], "modules_to_save": ["x"] })).0,
        "modules_to_save"
    );
    let saved = serde_json::json!({ "target_modules": ["o_proj", "lm_head"], "modules_to_save": ["lm_head"] });
    assert_eq!(chosen(saved).len(), 2, "what is trained whole needs no adapter");
    // The first pattern that fits counts, behind a dot or at the beginning.
    let ranks = keys(serde_json::json!({
        "target_modules": ["o_proj", "up_proj"], "r": 8, "lora_alpha": 16.0,
        "rank_pattern": { "layers.0.self_attn.o_proj": 2, "o_proj": 4, "up_.*": 6 }, "alpha_pattern": { "o_proj": 4.0 },
    }));
    let plan = ranks.plan(&config).unwrap();
    let of = |name: &str| plan.of(name).and_then(Planned::as_low_rank).map(|low| (low.r, low.scale)).unwrap();
    assert_eq!(of("model.layers.0.self_attn.o_proj"), (2, 2.0));
    assert_eq!(of("model.layers.1.self_attn.o_proj"), (4, 1.0));
    assert_eq!(of("model.layers.1.mlp.up_proj"), (6, 16.0 / 6.0));
}

#[test]
fn files_that_say_something_else_are_refused_by_name() {
    let device = Device::flex();
    let config = fixtures::mla_with(|_| ());
    let dir = tempfile::tempdir().unwrap();
    let (base, there) = (dir.path().join("base"), dir.path().join("adapter"));
    scrambled(&config, 3, &device).save(&base, WeightDtype::F32, usize::MAX).unwrap();
    std::fs::create_dir(&there).unwrap();
    beside(&base, &config, &everything(), 3, &device).save_adapter(&there).unwrap();
    let path = there.join("adapter_config.json");
    let good: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let opened = |key: &str, value: serde_json::Value| {
        let mut keys = good.clone();
        keys[key] = value;
        std::fs::write(&path, keys.to_string()).unwrap();
        AdapterDir::open(&there)
    };
    for (key, value) in [
        ("peft_type", serde_json::json!("IA3")),
        ("bias", serde_json::json!("all")),
        ("fan_in_fan_out", serde_json::json!(true)),
        ("lora_bias", serde_json::json!(true)),
        ("layer_replication", serde_json::json!([[0, 2]])),
        ("target_parameters", serde_json::json!(["mlp.experts.down_proj"])),
        ("r", serde_json::json!(-1)),
    ] {
        assert!(opened(key, value).is_err(), "{key}");
    }
    // Keys of newer versions that compute nothing else are no matter.
    let opened = opened("some_new_key", serde_json::json!(false)).unwrap();
    let narrow = AdapterDir { config: AdapterConfig { r: 2, ..opened.config.clone() }, ..opened.clone() };
    assert!(matches!(CausalLm::load_adapted(&base, &config, &narrow, &device), Err(Error::Tensors { .. })));
    let fewer = AdapterConfig { target_modules: Modules::Ends(vec!["o_proj".into()]), ..opened.config.clone() };
    let fewer = AdapterDir { config: fewer, ..opened };
    match CausalLm::load_adapted(&base, &config, &fewer, &device) {
        Err(Error::Tensors { unexpected, missing, .. }) => assert!(!unexpected.is_empty() && missing.is_empty()),
        other => panic!("{:?}", other.map(|_| ())),
    }
    std::fs::write(there.join("adapter_model.safetensors"), b"nonsense").unwrap();
    assert!(matches!(CausalLm::load_adapted(&base, &config, &fewer, &device), Err(Error::File { .. })));
}
