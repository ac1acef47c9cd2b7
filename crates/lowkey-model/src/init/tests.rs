use std::collections::BTreeMap;

use burn::module::Module;

use super::*;
use crate::fixtures::{self, values};

fn tensors(model: &CausalLm) -> BTreeMap<String, Vec<f32>> {
    model.parameters().into_iter().map(|p| (p.name, values(p.value))).collect()
}

fn wide(attention: ModelConfig) -> ModelConfig {
    let mut config = ModelConfig { vocab_size: 512, hidden_size: 192, ..attention };
    config.layers.resize(3).unwrap();
    config.layers.iter_mut().for_each(|layer| layer.mlp.intermediate_size = 400);
    config
}

fn mean_and_std(values: &[f32]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
    let variance = values.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / n;
    (mean, variance.sqrt())
}

#[test]
fn the_seed_decides_and_the_device_does_not() {
    for (kind, config) in fixtures::every_kind() {
        let model = CausalLm::init(&config, 7, &Device::flex());
        assert_eq!(tensors(&model), tensors(&CausalLm::init(&config, 7, &Device::flex())), "{kind}");
        let trainable = CausalLm::init(&config, 7, &Device::flex().autodiff());
        assert_eq!(tensors(&model), tensors(&trainable), "{kind}");
        assert_eq!(tensors(&model), tensors(&trainable.valid()), "{kind}");
        let other = tensors(&CausalLm::init(&config, 8, &Device::flex()));
        for (name, values) in tensors(&model) {
            let constant = name.ends_with("norm.weight") || name.ends_with(".bias");
            assert_eq!(values == other[&name], constant, "{kind}: {name}");
        }
    }
}

#[test]
fn tensors_of_one_shape_differ() {
    let model = tensors(&CausalLm::init(&fixtures::grouped_with(|_| ()), 7, &Device::flex()));
    assert_ne!(model["model.layers.0.mlp.gate_proj.weight"], model["model.layers.0.mlp.up_proj.weight"]);
    assert_ne!(model["model.layers.0.mlp.gate_proj.weight"], model["model.layers.1.mlp.gate_proj.weight"]);
    assert_ne!(model["model.embed_tokens.weight"], model["lm_head.weight"]);
}

#[test]
fn each_tensor_has_the_spread_of_its_row_in_the_table() {
    let mla = fixtures::mla_with(|m| {
        (m.q_lora_rank, m.kv_lora_rank, m.attention_bias) = (Some(96), 64, true);
        (m.qk_nope_head_dim, m.qk_rope_head_dim, m.v_head_dim) = (32, 16, 48);
    });
    let grouped = fixtures::grouped_with(|g| {
        (g.head_dim, g.rotary_dim, g.qk_norm, g.qkv_bias, g.o_bias) = (64, 64, true, true, true);
    });
    for config in [wide(mla), wide(grouped)] {
        for range in [None, Some(0.05)] {
            let config = ModelConfig { initializer_range: range, ..config.clone() };
            for parameter in CausalLm::init(&config, 3, &Device::flex()).parameters() {
                let name = parameter.name;
                let numbers = values(parameter.value);
                let part = name.rsplit('.').nth(1).unwrap();
                let [_, d_in] = parameter.shape[..] else {
                    let constant = if name.ends_with(".bias") { 0.0 } else { 1.0 };
                    assert!(numbers.iter().all(|x| *x == constant), "{name}");
                    continue;
                };
                // Written out by hand: the table of the module's documentation.
                let fan_in = 1.0 / (d_in as f64).sqrt();
                let expected = match (part, range) {
                    ("embed_tokens" | "lm_head", None) => 0.02,
                    ("embed_tokens" | "lm_head", Some(range)) => range,
                    ("o_proj" | "down_proj", range) => range.unwrap_or(fan_in) / 6f64.sqrt(),
                    (_, range) => range.unwrap_or(fan_in),
                };
                let n = numbers.len() as f64;
                let (mean, std) = mean_and_std(&numbers);
                assert!(mean.abs() < 5.0 * expected / n.sqrt(), "{name}: mean {mean}");
                // The standard error of a standard deviation is σ/√(2n).
                assert!((std / expected - 1.0).abs() < 5.0 / (2.0 * n).sqrt(), "{name}: {std} instead of {expected}");
                let outside = numbers.iter().filter(|x| f64::from(x.abs()) > 2.0 * expected).count() as f64 / n;
                assert!((outside - 0.0455).abs() < 0.012, "{name}: {outside} beyond two sigma");
            }
        }
    }
}

#[test]
fn changing_one_size_leaves_the_other_tensors_alone() {
    let base = fixtures::mla_with(|m| m.q_lora_rank = Some(8));
    let before = tensors(&CausalLm::init(&base, 5, &Device::flex()));
    let same_but = |changed: ModelConfig, touched: &[&str]| {
        let after = tensors(&CausalLm::init(&changed, 5, &Device::flex()));
        for (name, values) in &before {
            let Some(other) = after.get(name) else { panic!("{name} is gone") };
            let expected = touched.iter().any(|part| name.contains(part));
            assert_eq!(values != other, expected, "{name}");
        }
    };
    let mut wider = base.clone();
    wider.layers.iter_mut().for_each(|layer| layer.mlp.intermediate_size = 18);
    same_but(wider, &["mlp."]);
    same_but(ModelConfig { vocab_size: 30, ..base.clone() }, &["embed_tokens", "lm_head"]);
    let mut ranked = base.clone();
    ranked.latents_mut().for_each(|mla| mla.kv_lora_rank = 10);
    same_but(ranked, &["kv_a_", "kv_b_"]);
    // Only the tensors that write to the residual stream know how deep the model is.
    let mut deeper = base.clone();
    deeper.layers.resize(3).unwrap();
    same_but(deeper, &["o_proj", "down_proj"]);
    same_but(base.clone(), &[]);
}
