use super::*;

/// The keys that are written for PEFT, or for an engine.
fn written(adapter: &AdapterConfig, config: &ModelConfig, engine: bool) -> (serde_json::Value, AdapterDir) {
    let device = Device::flex();
    let dir = tempfile::tempdir().unwrap();
    let model = beside(dir.path(), config, adapter, 3, &device);
    let reader = if engine { Reader::Engine } else { Reader::Peft(config) };
    let there = dir.path().join("adapter");
    std::fs::create_dir(&there).unwrap();
    model.save_adapter_as(&there, adapter.clone(), reader).unwrap();
    let text = std::fs::read_to_string(there.join("adapter_config.json")).unwrap();
    (serde_json::from_str(&text).unwrap(), AdapterDir::open(&there).unwrap())
}

fn names(keys: &serde_json::Value, key: &str) -> Vec<String> {
    let names = keys.get(key).and_then(|names| names.as_array()).into_iter().flatten();
    names.map(|name| name.as_str().unwrap().to_owned()).collect()
}

#[test]
fn peft_is_told_of_feed_forward_layers_beside_latent_attention_by_their_matrices() {
    let config = fixtures::mla_with(|_| ());
    let ranks = ByPattern(vec![("layers.1.mlp.up_proj".to_string(), 5), ("o_proj".into(), 2)]);
    let alphas = ByPattern(vec![(r".*\.1\..*".to_string(), 2.5)]);
    let adapter = AdapterConfig { rank_pattern: ranks, alpha_pattern: alphas, ..everything() };
    let (keys, back) = written(&adapter, &config, false);
    let (modules, matrices) = (names(&keys, "target_modules"), names(&keys, "target_parameters"));
    let plan = adapter.plan(&config).unwrap();
    assert!(modules.iter().all(|name| !name.contains(".mlp.")) && modules.iter().any(|name| name == "lm_head"));
    assert!(matrices.iter().all(|name| name.contains(".mlp.") && name.ends_with("_proj.weight")));
    assert_eq!((matrices.len(), modules.len() + matrices.len()), (6, plan.modules().count()));
    // PEFT fits a pattern to the name of the matrix where it found that.
    assert_eq!(keys["rank_pattern"]["model.layers.1.mlp.up_proj.weight"], 5);
    assert_eq!(keys["rank_pattern"]["model.layers.0.self_attn.o_proj"], 2);
    assert_eq!(keys["alpha_pattern"]["model.layers.1.mlp.down_proj.weight"], 2.5);
    assert!(keys["alpha_pattern"].get("model.layers.0.mlp.down_proj.weight").is_none());
    assert_eq!(back.plan(&config).unwrap(), plan);
}

#[test]
fn where_peft_knows_no_such_adapter_or_needs_no_telling_modules_are_named() {
    let latent = fixtures::mla_with(|_| ());
    for (adapter, config, engine) in [
        (AdapterConfig { use_dora: true, ..everything() }, &latent, false),
        (AdapterConfig { lora_dropout: 0.1, ..everything() }, &latent, false),
        (everything(), &latent, true),
        (everything(), &fixtures::grouped_with(|_| ()), false),
        (AdapterConfig { target_modules: Modules::Ends(vec!["o_proj".into()]), ..everything() }, &latent, false),
    ] {
        let (keys, back) = written(&adapter, config, engine);
        assert!(keys.get("target_parameters").is_none(), "{adapter:?}");
        assert_eq!(back.plan(config).unwrap(), adapter.plan(config).unwrap());
    }
    let dora = AdapterConfig { use_dora: true, ..everything() };
    let why = |module: &str, adapter: &AdapterConfig| overlooked_by_peft(module, adapter, &latent);
    assert!(why("model.layers.0.mlp.up_proj", &dora).unwrap().contains("DoRA"));
    assert_eq!(why("model.layers.0.self_attn.o_proj", &dora), None);
    assert_eq!(why("model.layers.0.mlp.shared_experts.up_proj", &everything()), None);
    assert!(why("model.layers.0.mlp.experts.3.up_proj", &everything()).unwrap().contains("one tensor"));
}

#[test]
fn matrices_that_a_file_names_are_taken_for_their_maps_or_refused() {
    let config = fixtures::mla_with(|_| ());
    let opened = |keys: serde_json::Value| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("adapter_config.json"), keys.to_string()).unwrap();
        AdapterDir::open(dir.path())
    };
    // As PEFT writes one of matrices alone.
    let alone = opened(serde_json::json!({
        "peft_type": "LORA", "target_modules": [], "target_parameters": ["mlp.up_proj.weight"], "r": 4, "rank_pattern": {},
    }));
    let plan = alone.unwrap().plan(&config).unwrap();
    assert_eq!(
        plan.modules().map(|(name, _)| name).collect::<Vec<_>>(),
        ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    );
    for (key, other) in [
        ("target_parameters", serde_json::json!({ "target_parameters": ["mlp.experts.down_proj"] })),
        ("target_parameters", serde_json::json!({ "target_parameters": "up_proj.weight" })),
        ("target_modules", serde_json::json!({ "target_modules": "all-linear" })),
        // To PEFT this says nothing of the matrix.
        ("alpha_pattern", serde_json::json!({ "alpha_pattern": { "up_proj": 3 } })),
    ] {
        let mut keys = serde_json::json!({
            "peft_type": "LORA", "target_modules": ["o_proj"], "target_parameters": ["up_proj.weight"], "r": 4,
        });
        keys.as_object_mut().unwrap().extend(other.as_object().unwrap().clone());
        let why = opened(keys).unwrap_err().to_string();
        assert!(why.contains(key), "{why}");
    }
}
