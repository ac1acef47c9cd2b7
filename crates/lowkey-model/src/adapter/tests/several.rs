//! Adapters of the embedding, and several adapters together.

use super::*;

fn with_embedding() -> AdapterConfig {
    keys(serde_json::json!({ "target_modules": ["embed_tokens", "lm_head", "o_proj"], "r": 3, "lora_alpha": 5.0 }))
}

#[test]
fn an_adapter_of_the_embedding_adds_its_rows_and_is_merged_trained_and_saved_like_others() {
    let device = Device::flex();
    for (name, config) in fixtures::every_kind() {
        let adapter = with_embedding();
        if config.tie_word_embeddings {
            // It has no output head of its own, which another message says first.
            let alone = keys(serde_json::json!({ "target_modules": ["embed_tokens"] }));
            let why = alone.plan(&config).unwrap_err().to_string();
            assert!(why.contains("modules_to_save"), "{why}");
            continue;
        }
        let model = adapted(&config, &adapter, 5, &device);
        let found = logits(&model, &config);
        let merged = model.merged();
        assert!(close(&found, &logits(&merged, &config), 1e-5), "{name}");
        assert_eq!(logits(&model.unadapted(), &config), logits(&scrambled(&config, 5, &device), &config), "{name}");
        assert!(close(&found, &logits(&model.settled(), &config), 1e-6), "{name}");
        // Row v of W + s·(B·A)ᵀ.
        let parts: BTreeMap<String, Vec<f32>> =
            model.parameters().into_iter().map(|p| (p.name, values(p.value))).collect();
        let of = |part: &str| &parts[&format!("model.embed_tokens.{part}")];
        let (w, a, b) = (of("weight"), of("lora_embedding_A"), of("lora_embedding_B"));
        let table = values(merged.model.embed_tokens.table());
        for v in 0..29 {
            for j in 0..12 {
                let product: f32 = (0..3).map(|k| b[j * 3 + k] * a[k * 29 + v]).sum();
                let expected = w[v * 12 + j] + 5.0 / 3.0 * product;
                assert!((table[v * 12 + j] - expected).abs() < 1e-5, "{name}");
            }
        }
        let plan = adapter.plan(&config).unwrap();
        let of_embedding = plan.of("model.embed_tokens").and_then(Planned::as_low_rank);
        assert_eq!(of_embedding.map(|low| (low.r, low.embeds)), Some((3, true)));
        // Gradients: those of the merged table, taken apart.
        let autodiff = Device::flex().autodiff();
        let model = adapted(&config, &adapter, 5, &autodiff);
        let merged = model.merged().with_trained(|_| true);
        let input_ids: Vec<u32> = (0..18).map(|i| i * 5 % 29).collect();
        let targets: Vec<i64> = (0..18).map(|i| i * 3 % 7).collect();
        let batch = Rows {
            vectors: None,
            pairs: false,
            rows: 2,
            seq_len: 9,
            input_ids: &input_ids,
            targets: &targets,
            document_starts: &[0; 18],
        };
        let objective = Objective { scale: 0.1, terms: &[Term::Next { z_loss: 0.01 }] };
        let (_, whole) = merged.loss_and_gradients(batch, objective, Recompute::None, &autodiff);
        let d_table = values(whole[0].clone());
        for recompute in [Recompute::None, Recompute::Block] {
            let (_, found) = model.loss_and_gradients(batch, objective, recompute, &autodiff);
            let trained = model.trained_parameters();
            assert_eq!(found.len(), trained.len(), "{name}");
            let at = trained.iter().position(|p| p.name.ends_with("lora_embedding_B")).unwrap();
            let expected: Vec<f32> = (0..12)
                .flat_map(|j| (0..3).map(move |k| (j, k)))
                .map(|(j, k)| (0..29).map(|v| d_table[v * 12 + j] * a[k * 29 + v]).sum::<f32>() * 5.0 / 3.0)
                .collect();
            assert!(close(&values(found[at].clone()), &expected, 2e-5), "{name}, {recompute:?}");
        }
    }
    let config = fixtures::mla_with(|_| ());
    let dora = AdapterConfig { use_dora: true, ..with_embedding() };
    assert!(dora.plan(&config).unwrap_err().to_string().contains("use_dora"));
}

#[test]
fn an_adapter_of_the_embedding_has_the_names_and_shapes_of_peft_and_begins_as_nothing() {
    let device = Device::flex();
    let config = fixtures::mla_with(|_| ());
    let dir = tempfile::tempdir().unwrap();
    let (base, there) = (dir.path().join("base"), dir.path().join("adapter"));
    scrambled(&config, 3, &device).save(&base, WeightDtype::F32, usize::MAX).unwrap();
    let begun = CausalLm::begin_adapter(&base, &config, &with_embedding(), 1, &device).unwrap();
    assert_eq!(logits(&begun, &config), logits(&scrambled(&config, 3, &device), &config));
    let spread = |end: &str| {
        let found = begun.parameters().into_iter().find(|p| p.name.ends_with(end)).unwrap();
        values(found.value).iter().any(|x| *x != 0.0)
    };
    assert!(!spread("lora_embedding_A") && spread("lora_embedding_B"));
    let model = beside(&base, &config, &with_embedding(), 3, &device);
    std::fs::create_dir(&there).unwrap();
    model.save_adapter(&there).unwrap();
    let bytes = std::fs::read(there.join("adapter_model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let shape =
        |name: &str| file.tensor(&format!("base_model.model.model.embed_tokens.{name}")).unwrap().shape().to_vec();
    assert_eq!(shape("lora_embedding_A"), [3, 29]);
    assert_eq!(shape("lora_embedding_B"), [12, 3]);
    let back = ModelDir::open(&there).unwrap().load(&device).unwrap();
    assert_eq!(logits(&back, &config), logits(&model, &config));
    assert!(!there.join("config.json").exists(), "what is as in the base is not said twice");
}

#[test]
fn several_adapters_with_weights_add_up_what_each_would_add() {
    let device = Device::flex();
    for (name, config) in fixtures::every_kind() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base");
        scrambled(&config, 3, &device).save(&base, WeightDtype::F32, usize::MAX).unwrap();
        let mut kinds: Vec<AdapterConfig> = kinds().into_iter().map(|(_, keys)| keys).take(2).collect();
        if !config.tie_word_embeddings {
            kinds.push(with_embedding());
        }
        let weights = [0.7, -1.3, 0.5];
        let mut adapters = Vec::new();
        let mut alone = Vec::new();
        for (i, (keys, weight)) in kinds.iter().zip(weights).enumerate() {
            let there = dir.path().join(format!("adapter-{i}"));
            std::fs::create_dir(&there).unwrap();
            // Of one base, with factors of their own.
            let plan = keys.plan(&config).unwrap();
            let of_base = scrambled(&config, 3, &device).parameters();
            let model = beside(&base, &config, keys, 3, &device);
            let parameters = model.parameters().into_iter().zip(0u64..).map(|(p, n)| match p.role.is_adapter() {
                true => p.value * (0.5 + 0.1 * i as f64 + 0.01 * n as f64),
                false => of_base.iter().find(|own| own.name == p.name).unwrap().value.clone(),
            });
            let values: Vec<_> = parameters.collect();
            let model = model.with_values(values).with_trained(|spec| plan.trains(spec));
            model.save_adapter(&there).unwrap();
            alone.push(model.merged());
            adapters.push((there, weight));
        }
        let dir = ModelDir::open(&base).unwrap().with_adapters(&adapters).unwrap();
        let together = dir.load(&device).unwrap();
        let merged = together.merged();
        let of_base = scrambled(&config, 3, &device).parameters();
        for (at, (found, own)) in merged.parameters().into_iter().zip(of_base).enumerate() {
            let own = values(own.value);
            let mut expected = own.clone();
            for (model, weight) in alone.iter().zip(weights) {
                let other = values(model.parameters().swap_remove(at).value);
                expected.iter_mut().zip(other.iter().zip(&own)).for_each(|(x, (other, own))| {
                    *x += weight as f32 * (other - own);
                });
            }
            assert!(close(&values(found.value), &expected, 1e-5), "{name}: {}", found.name);
        }
        assert!(close(&logits(&together, &config), &logits(&merged, &config), 3e-5), "{name}");
        // What the certificate names: every file, and the weight of each adapter.
        let names: Vec<String> = dir.hashes().unwrap().into_iter().map(|file| file.name).collect();
        assert!(names.contains(&"adapter 2 times -1.3/adapter_model.safetensors".to_string()), "{names:?}");
        assert!(dir.adapter().is_none() && dir.given() == dir.path());
        // One with a weight of 1 is what it was.
        let one = ModelDir::open(dir.path()).unwrap().with_adapters(&[(adapters[0].0.clone(), 1.0)]).unwrap();
        assert_eq!(logits(&one.load(&device).unwrap().merged(), &config), logits(&alone[0], &config), "{name}");
    }
}

#[test]
fn what_does_not_add_up_is_refused() {
    let device = Device::flex();
    let config = fixtures::mla_with(|_| ());
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    scrambled(&config, 3, &device).save(&base, WeightDtype::F32, usize::MAX).unwrap();
    let refused = |keys: AdapterConfig, weight: f64| {
        let there = tempfile::tempdir().unwrap();
        beside(&base, &config, &keys, 3, &device).save_adapter(there.path()).unwrap();
        let dir = ModelDir::open(&base).unwrap().with_adapters(&[(there.path().to_path_buf(), weight)]).unwrap();
        match dir.load(&device) {
            Err(Error::Adapter { key, .. }) => key,
            other => panic!("{:?}", other.map(drop)),
        }
    };
    assert_eq!(refused(AdapterConfig { use_dora: true, ..everything() }, 0.5), "use_dora");
    assert_eq!(
        refused(AdapterConfig { modules_to_save: Some(vec!["norm".into()]), ..everything() }, 0.5),
        "modules_to_save"
    );
    for weight in [0.0, f64::NAN, f64::INFINITY] {
        assert_eq!(refused(everything(), weight), "weight");
    }
}
