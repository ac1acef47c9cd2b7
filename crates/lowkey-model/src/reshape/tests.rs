use burn::tensor::Device;
use serde_json::json;

use super::*;
use crate::adapter::{AdapterConfig, AdapterDir};
use crate::checkpoint::WeightDtype;
use crate::fixtures::{self, scrambled, values};
use crate::rope::RopeTable;
use crate::{ModelDir, ids_tensor};

fn change(keys: Value) -> RopeChange {
    serde_json::from_value(keys).unwrap()
}

fn logits(model: &CausalLm) -> Vec<Vec<f32>> {
    let ids: Vec<u32> = (0..22).map(|i| i * 7 % 29).collect();
    let found = model.forward(ids_tensor(&ids, 2, 11, &Device::flex()));
    let [_, _, vocab] = found.dims();
    values(found).chunks(vocab).map(<[f32]>::to_vec).collect()
}

/// To the bit: what the model says of the tokens that it had, on a text of these.
#[test]
fn new_tokens_change_nothing_for_the_others_and_begin_as_their_mean() {
    let device = Device::flex();
    for (name, config) in fixtures::every_kind() {
        let old = scrambled(&config, 5, &device);
        let dir = tempfile::tempdir().unwrap();
        old.save(dir.path(), WeightDtype::F32, usize::MAX).unwrap();
        let read = ModelDir::open(dir.path()).unwrap().config().unwrap();
        let larger = ModelConfig { vocab_size: 34, ..read.clone() };
        assert!(CausalLm::load_with(dir.path(), &larger, &device).is_err(), "{name}: files that lack rows are damaged");
        let new = CausalLm::load_growing(dir.path(), &larger, &device).unwrap().with_new_rows(29..34);
        assert_eq!(new.config.vocab_size, 34);
        for (found, expected) in logits(&new).iter().zip(logits(&old)) {
            assert_eq!(found.len(), 34, "{name}");
            assert_eq!(found[..29], expected, "{name}");
            assert!(found[29..].iter().all(|x| *x == found[29] && x.is_finite()), "{name}: {found:?}");
        }
        let parts = new.parameters().into_iter().zip(old.parameters());
        for (found, expected) in parts.filter(|(found, _)| found.shape[0] == 34) {
            let (found, expected) = (values(found.value), values(expected.value));
            assert_eq!(found[..expected.len()], expected, "{name}");
            for j in 0..12 {
                let mean = (0..29).map(|v| f64::from(expected[v * 12 + j])).sum::<f64>() / 29.0;
                assert!((0..5).all(|i| (f64::from(found[(29 + i) * 12 + j]) - mean).abs() < 1e-6), "{name}");
            }
        }
        // A vocabulary that is wider than the tokenizer's already has room for them.
        let room = old.clone().with_new_rows(25..27);
        let (found, expected) = (values(room.model.embed_tokens.table()), values(old.model.embed_tokens.table()));
        assert_eq!((&found[..25 * 12], &found[27 * 12..]), (&expected[..25 * 12], &expected[27 * 12..]), "{name}");
        assert_eq!(found[25 * 12..26 * 12], found[26 * 12..27 * 12], "{name}");
        assert_ne!(found[25 * 12..27 * 12], expected[25 * 12..27 * 12], "{name}");
        // Written and read like any other.
        let there = tempfile::tempdir().unwrap();
        new.save(there.path(), WeightDtype::F32, usize::MAX).unwrap();
        let back = CausalLm::load(there.path(), &device).unwrap();
        assert_eq!((logits(&back), back.config.vocab_size), (logits(&new), 34), "{name}");
    }
}

#[test]
fn an_adapter_keeps_new_tokens_where_it_saves_their_rows_and_is_refused_where_not() {
    let device = Device::flex();
    for (name, config) in fixtures::every_kind() {
        let dir = tempfile::tempdir().unwrap();
        let (base, there) = (dir.path().join("base"), dir.path().join("adapter"));
        scrambled(&config, 5, &device).save(&base, WeightDtype::F32, usize::MAX).unwrap();
        let read = ModelDir::open(&base).unwrap().config().unwrap();
        let larger = ModelConfig { vocab_size: 31, ..read.clone() };
        let keys = |saved: &[&str]| -> AdapterConfig {
            serde_json::from_value(json!({ "target_modules": ["o_proj"], "modules_to_save": saved })).unwrap()
        };
        for saved in [&[][..], &["norm"], if config.tie_word_embeddings { &["norm"] } else { &["embed_tokens"] }] {
            let why = CausalLm::begin_adapter(&base, &larger, &keys(saved), 1, &device).unwrap_err().to_string();
            assert!(why.contains("modules_to_save = [\"embed_tokens\""), "{name}: {why}");
            assert_eq!(why.contains("\"lm_head\"]"), !config.tie_word_embeddings, "{name}: {why}");
        }
        let both: &[&str] = if config.tie_word_embeddings { &["embed_tokens"] } else { &["embed_tokens", "lm_head"] };
        let begun = CausalLm::begin_adapter(&base, &larger, &keys(both), 1, &device).unwrap().with_new_rows(29..31);
        let plain = CausalLm::load_growing(&base, &larger, &device).unwrap().with_new_rows(29..31);
        // The feed-forward layers are computed the same way: no adapter of theirs.
        assert_eq!(logits(&begun), logits(&plain), "{name}");
        std::fs::create_dir(&there).unwrap();
        begun.save_adapter(&there).unwrap();
        assert!(crate::adapter::is_adapter(&there), "{name}");
        let opened = ModelDir::open(&there).unwrap();
        assert_eq!(opened.config().unwrap().vocab_size, 31, "{name}");
        let back = opened.load(&device).unwrap();
        assert_eq!(logits(&back), logits(&begun), "{name}");
        assert_eq!(back.trained_parameters().len(), begun.trained_parameters().len(), "{name}");
        let hashed: Vec<String> = opened.hashes().unwrap().into_iter().map(|file| file.name).collect();
        assert!(hashed.contains(&"adapter/config.json".to_string()), "{name}: {hashed:?}");
        // Merged it is a model of its own.
        let merged = dir.path().join("merged");
        back.merged().save(&merged, WeightDtype::F32, usize::MAX).unwrap();
        assert_eq!(CausalLm::load(&merged, &device).unwrap().config.vocab_size, 31);
        // A file beside an adapter that says more rows than the adapter brings.
        let wrong = ModelConfig { vocab_size: 40, ..larger.clone() }.to_json("float32");
        std::fs::write(there.join("config.json"), wrong.to_string()).unwrap();
        assert!(ModelDir::open(&there).unwrap().load(&device).is_err(), "{name}");
    }
}

#[test]
fn positions_reach_further_with_the_frequencies_of_a_configuration_that_says_so() {
    for (name, config) in fixtures::every_kind() {
        if config.rotary_dim() == 0 {
            continue;
        }
        let rope = change(
            json!({ "rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "mscale_all_dim": 0.7, "mscale": 0.9 }),
        );
        let original = config.rope.original_max_position_embeddings.unwrap_or(128);
        let longer = config.clone().with_positions(Some(512), Some(&rope)).unwrap();
        // What a configuration with these keys says.
        let mut json = config.to_json("float32");
        let keys = json.as_object_mut().unwrap();
        keys.shift_remove("rope_parameters");
        keys.insert("max_position_embeddings".into(), 512.into());
        keys.insert("rope_theta".into(), config.rope.rope_theta.into());
        let scaling = json!({
            "type": "yarn", "factor": 4.0, "beta_fast": 16, "mscale_all_dim": 0.7, "mscale": 0.9,
            "original_max_position_embeddings": original,
        });
        keys.insert("rope_scaling".into(), scaling);
        let expected = ModelConfig::from_json(keys).unwrap();
        assert_eq!(longer.rope, expected.rope, "{name}");
        assert_eq!(longer.softmax_scale(), expected.softmax_scale(), "{name}");
        let table = |config: &ModelConfig| {
            let positions = [(0..512).collect()];
            let (frequencies, factor) = (config.inverse_frequencies(), config.rope.table_factor());
            let table = RopeTable::new(&frequencies, factor, &positions, &Device::flex());
            (values(table.cos), values(table.sin))
        };
        assert_eq!(table(&longer), table(&expected), "{name}");
        // And back from the files of a model that has them.
        let model = scrambled(&longer, 3, &Device::flex());
        let dir = tempfile::tempdir().unwrap();
        model.save(dir.path(), WeightDtype::F32, usize::MAX).unwrap();
        let back = CausalLm::load(dir.path(), &Device::flex()).unwrap();
        assert_eq!((table(&back.config), logits(&back)), (table(&longer), logits(&model)), "{name}");
    }
}

#[test]
fn a_change_of_positions_keeps_what_it_does_not_name() {
    let plain = fixtures::mla_with(|_| ());
    let base = ModelConfig { rope: RopeConfig { rope_theta: 5e5, ..RopeConfig::default() }, ..plain.clone() };
    let changed = |keys: Value| base.clone().with_positions(Some(256), Some(&change(keys))).unwrap().rope;
    let yarn = changed(json!({ "rope_type": "yarn", "factor": 2 }));
    assert_eq!((yarn.rope_theta, yarn.factor), (5e5, Some(2.0)));
    assert_eq!(yarn.original_max_position_embeddings, Some(128), "that of the model, not the new one");
    assert_eq!(changed(json!({ "rope_theta": 1e6 })).rope_theta, 1e6);
    let given = changed(json!({ "rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 64 }));
    assert_eq!(given.original_max_position_embeddings, Some(64));
    // YaRN on a model that has it already begins at the same original.
    let twice = ModelConfig { rope: fixtures::yarn(), ..plain.clone() };
    let further =
        twice.with_positions(Some(512), Some(&change(json!({ "rope_type": "yarn", "factor": 8 })))).unwrap().rope;
    assert_eq!((further.original_max_position_embeddings, further.beta_fast), (Some(16), None));
    // More positions alone leave frequencies as they are, also where they follow from a length that was not written.
    let unwritten = RopeConfig { original_max_position_embeddings: None, ..fixtures::yarn() };
    let unwritten = ModelConfig { rope: unwritten, ..plain };
    let longer = unwritten.clone().with_positions(Some(512), None).unwrap();
    let frequencies = |config: &ModelConfig| config.rope.inverse_frequencies(6, config.max_position_embeddings);
    assert_eq!(frequencies(&longer), frequencies(&unwritten));
    for (keys, key) in [
        (json!({ "rope_type": "yarn", "factor": 0.5 }), "rope_parameters.factor"),
        (json!({ "rope_type": "yarn", "factor": -1 }), "rope_parameters.factor"),
        (json!({ "rope_theta": 0 }), "rope_theta"),
    ] {
        let why = base.clone().with_positions(None, Some(&change(keys))).unwrap_err().to_string();
        assert!(why.contains(key), "{why}");
    }
    for wrong in [json!({ "rope_type": "dynamic" }), json!({ "base": 3 }), json!(3)] {
        assert!(serde_json::from_value::<RopeChange>(wrong).is_err());
    }
    // As it was written.
    for keys in [json!({ "rope_type": "yarn", "factor": 2.0 }), json!({ "rope_theta": 1000.0, "rope_type": "default" })]
    {
        assert_eq!(serde_json::to_value(change(keys.clone())).unwrap(), keys);
    }
}

#[test]
fn positions_of_an_adapter_are_those_that_it_was_trained_with() {
    let device = Device::flex();
    let config = fixtures::mla_with(|_| ());
    let dir = tempfile::tempdir().unwrap();
    let (base, there) = (dir.path().join("base"), dir.path().join("adapter"));
    scrambled(&config, 5, &device).save(&base, WeightDtype::F32, usize::MAX).unwrap();
    let rope = change(json!({ "rope_type": "yarn", "factor": 4 }));
    let longer = config.with_positions(Some(512), Some(&rope)).unwrap();
    let keys = serde_json::from_value(json!({ "target_modules": ["o_proj"] })).unwrap();
    let begun = CausalLm::begin_adapter(&base, &longer, &keys, 1, &device).unwrap();
    std::fs::create_dir(&there).unwrap();
    begun.save_adapter(&there).unwrap();
    let back = ModelDir::open(&there).unwrap().load(&device).unwrap();
    assert_eq!((&back.config.rope, back.config.max_position_embeddings), (&longer.rope, 512));
    assert_eq!(logits(&back), logits(&begun));
    // What else stands in such a file, of whatever program, is not this model's.
    let path = there.join("config.json");
    let mut json: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    json["quantization_config"] = json!({ "quant_method": "bitsandbytes" });
    json["hidden_size"] = 7.into();
    json["vocab_size"] = 40.into();
    std::fs::write(&path, json.to_string()).unwrap();
    assert_eq!(logits(&ModelDir::open(&there).unwrap().load(&device).unwrap()), logits(&begun));
    let foreign = AdapterDir::open(&there).unwrap();
    assert_eq!(foreign.shape(longer.clone()).unwrap().vocab_size, 29, "rows that it does not bring are the base's");
    json["max_position_embeddings"] = "many".into();
    std::fs::write(&path, json.to_string()).unwrap();
    assert!(ModelDir::open(&there).unwrap().config().unwrap_err().to_string().contains("max_position_embeddings"));
}
