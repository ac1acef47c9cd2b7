use std::path::PathBuf;

use burn::tensor::Device;
use safetensors::SafeTensors;

use super::*;
use crate::config::Family;
use crate::{CausalLm, ModelConfig, ids_tensor};

/// Checkpoints of transformers with its logits (`tests/reference/make.py`), and the family that each is read as.
const CASES: [(&str, Family); 5] = [
    ("minicpm3", Family::DeepseekV3),
    ("minicpm3_untied", Family::Lowkey),
    ("mistral", Family::Llama),
    ("mistral4", Family::DeepseekV3),
    ("mistral3", Family::DeepseekV3),
];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/reference/dialects").join(name)
}

fn config(name: &str) -> Map<String, Value> {
    serde_json::from_str(&std::fs::read_to_string(folder(name).join("config.json")).unwrap()).unwrap()
}

/// Ids `[2, 13]`, and the logits of a model over those that transformers computed.
fn off(dir: &Path, name: &str) -> (f32, CausalLm) {
    let bytes = std::fs::read(folder(name).join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let ids = expected.tensor("input_ids").unwrap();
    let [rows, seq] = ids.shape() else { panic!("ids have a row for each text") };
    let numbers: Vec<u32> =
        ids.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect();
    let logits = expected.tensor("logits").unwrap();
    let logits: Vec<f32> = logits.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let device = Device::flex();
    let model = CausalLm::load(dir, &device).unwrap_or_else(|e| panic!("{name}: {e}"));
    let found = model.forward(ids_tensor(&numbers, *rows, *seq, &device)).try_into_vec_as::<f32>().unwrap();
    assert_eq!(found.len(), logits.len(), "{name}");
    let most = logits.iter().fold(1.0f32, |most, x| most.max(x.abs()));
    (found.iter().zip(&logits).fold(0.0f32, |worst, (a, b)| worst.max((a - b).abs())) / most, model)
}

#[test]
fn models_of_other_keys_compute_what_transformers_does() {
    for (name, family) in CASES {
        let (worst, model) = off(&folder(name), name);
        assert!(worst <= 1e-5, "{name}: {worst}");
        assert_eq!(model.config.family, family, "{name}");
        // Saved it is a plain model of its family, with the factors in its weights.
        let dir = tempfile::tempdir().unwrap();
        model.save(dir.path(), crate::checkpoint::WeightDtype::F32, usize::MAX).unwrap();
        let (worst, again) = off(dir.path(), name);
        assert!(worst <= 1e-5, "{name}, saved: {worst}");
        assert_eq!(again.config, model.config, "{name}");
    }
}

#[test]
fn factors_are_those_of_the_configuration() {
    let scales = |map: &Map<String, Value>| Dialect::of(map).unwrap().unwrap().scales;
    let map = config("minicpm3");
    // Two layers, 24 numbers.
    let close = |a: f64, b: f64| (a - b).abs() < 1e-12;
    let found = scales(&map);
    assert!(close(found.residual, 1.4 / 2f64.sqrt()) && close(found.head, 8.0 / 24.0) && found.embedding == 12.0);
    assert!(found.untied);
    let mut none = map.clone();
    for (key, value) in [("scale_emb", json!(1)), ("scale_depth", Value::Null), ("dim_model_base", Value::Null)] {
        none.insert(key.into(), value);
    }
    assert_eq!(scales(&none), NONE);
    assert!(ModelConfig::from_json(&none).unwrap().tie_word_embeddings);
    // The defaults of its class where keys are absent.
    let mut absent = map;
    ["scale_emb", "scale_depth", "dim_model_base"].iter().for_each(|key| drop(absent.remove(*key)));
    let found = scales(&absent);
    assert!(close(found.residual, 1.4 / 2f64.sqrt()) && close(found.head, 256.0 / 24.0) && found.embedding == 12.0);
}

#[test]
fn what_is_not_computed_is_refused_by_its_key() {
    let refused = |name: &str, change: &dyn Fn(&mut Map<String, Value>)| {
        let mut map = config(name);
        change(&mut map);
        match ModelConfig::from_json(&map) {
            Err(Error::Config { key, why, .. } | Error::MissingKey { key, why }) => (key, why),
            other => panic!("{name} is not refused: {other:?}"),
        }
    };
    fn set(map: &mut Map<String, Value>, path: &[&str], value: Value) {
        let (last, before) = path.split_last().unwrap();
        let mut at = map;
        for key in before {
            at = at.get_mut(*key).unwrap().as_object_mut().unwrap();
        }
        at.insert((*last).into(), value);
    }
    let cases: [(&str, &[&str], Value, &str, &str); 12] = [
        ("minicpm3", &["scale_emb"], json!(0), "scale_emb", "> 0"),
        ("minicpm3", &["scale_depth"], json!("x"), "scale_depth", "a number"),
        ("minicpm3", &["hidden_act"], json!("gelu"), "hidden_act", "SwiGLU"),
        ("minicpm3", &["num_key_value_heads"], json!(2), "num_key_value_heads", "no key heads"),
        ("minicpm3", &["max_position_embeddings"], json!(65), "rope_parameters.long_factor", "no cache can follow"),
        (
            "minicpm3",
            &["rope_parameters", "short_factor"],
            json!([1.0]),
            "rope_parameters.short_factor",
            "2 rotated pairs",
        ),
        ("mistral", &["sliding_window"], json!(63), "sliding_window", "max_position_embeddings = 63"),
        ("mistral", &["layer_types"], json!(["sliding_attention"]), "", ""),
        (
            "mistral4",
            &["max_position_embeddings"],
            json!(65),
            "rope_parameters.llama_4_scaling_beta",
            "from position 64 on",
        ),
        ("mistral4", &["first_k_dense_replace"], json!(1), "first_k_dense_replace", "mixture-of-experts"),
        (
            "mistral4",
            &["rope_parameters", "partial_rotary_factor"],
            json!(0.5),
            "rope_parameters.partial_rotary_factor",
            "0.4",
        ),
        ("mistral3", &["text_config", "model_type"], json!("mistral3"), "text_config.model_type", "around another"),
    ];
    for (name, path, value, key, fragment) in cases {
        if key.is_empty() {
            // Without a window there is none, whatever the kinds of layers are called.
            let mut map = config(name);
            set(&mut map, path, value);
            assert!(ModelConfig::from_json(&map).is_ok());
            continue;
        }
        let (found, why) = refused(name, &|map| set(map, path, value.clone()));
        assert!(found == key && why.contains(fragment), "{name}, {path:?}: {found}, {why}");
    }
    let (key, _) = refused("mistral3", &|map| drop(map.remove("text_config")));
    assert_eq!(key, "text_config");
    let (key, why) = refused("mistral", &|map| drop(map.insert("model_type".into(), json!("mixtral"))));
    assert!(key == "model_type" && why.contains("minicpm3"), "{why}");
}

#[test]
fn no_adapter_stands_beside_weights_that_were_changed() {
    let device = Device::flex();
    let adapter: crate::adapter::AdapterConfig =
        serde_json::from_value(json!({ "r": 2, "lora_alpha": 2, "target_modules": ["o_proj"] })).unwrap();
    for (name, fragment) in
        [("minicpm3", Some("multiplied by factors")), ("mistral3", Some("images and text")), ("mistral4", None)]
    {
        let config = ModelConfig::read(&folder(name).join("config.json")).unwrap();
        let begun = CausalLm::begin_adapter(&folder(name), &config, &adapter, 1, &device);
        match (begun, fragment) {
            (Ok(_), None) => {}
            (Err(e), Some(fragment)) => assert!(e.to_string().contains(fragment), "{e}"),
            (other, _) => panic!("{name}: {:?}", other.map(|_| ())),
        }
    }
}
