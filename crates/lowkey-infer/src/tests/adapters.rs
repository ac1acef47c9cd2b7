//! Models with adapters: what is kept from token to token is what a pass over all of them computes.

use lowkey_model::adapter::AdapterConfig;
use lowkey_model::checkpoint::WeightDtype;

use super::*;
use crate::Decoder;

/// A model with an adapter of random values beside each of its maps.
fn adapted(config: &ModelConfig, keys: serde_json::Value, seed: u64) -> CausalLm {
    let (dir, device) = (tempfile::tempdir().unwrap(), Device::flex());
    random_model(config, seed).save(dir.path(), WeightDtype::F32, usize::MAX).unwrap();
    let keys: AdapterConfig = serde_json::from_value(keys).unwrap();
    let begun = CausalLm::begin_adapter(dir.path(), config, &keys, seed, &device).unwrap();
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let values = begun.parameters().into_iter().map(|parameter| {
        let mut values = parameter.value.try_into_vec_as::<f32>().unwrap();
        if parameter.role.is_adapter() {
            values.iter_mut().for_each(|x| *x += random.random_range(-0.1f32..0.1));
        }
        Tensor::from_floats(&values[..], &device)
    });
    let values = values.collect();
    begun.with_values(values)
}

#[test]
fn a_decoder_of_an_adapted_model_agrees_with_its_forward_pass_in_every_form() {
    for (seed, (name, config)) in zoo().into_iter().enumerate() {
        for use_dora in [false, true] {
            let keys = serde_json::json!({
                "target_modules": "everything", "r": 2, "lora_alpha": 3.0, "use_dora": use_dora, "lora_dropout": 0.5
            });
            let model = adapted(&config, keys, seed as u64);
            let ids = tokens(17, 200);
            let expected = uncached(&model, &ids);
            let plain = uncached(&model.unadapted(), &ids);
            let moved = expected.iter().flatten().zip(plain.iter().flatten()).any(|(a, b)| (a - b).abs() > 1e-2);
            assert!(moved, "{name}: the adapter does something");
            for form in FORMS {
                for chunk in [1, 7] {
                    let decoder = Decoder::new(&model, 1, ids.len(), form, &Device::flex()).unwrap();
                    let mut decoder = decoder.with_fused(fused_layers(&model)).unwrap();
                    let parts = ids.chunks(chunk).flat_map(|part| rows(decoder.forward(&[part]).unwrap()));
                    for (position, (found, expected)) in parts.zip(&expected).enumerate() {
                        let what = format!("{name}, DoRA {use_dora}, {form}, chunk {chunk}, position {position}");
                        assert_close(&found, expected, &what);
                    }
                }
            }
        }
    }
}
