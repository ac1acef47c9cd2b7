//! Models whose frozen matrices are packed, held to those of the unpacked ones.

use burn::module::Module;
use burn::tensor::Tensor;
use lowkey_kernels::quantized_linear::Packed;

use super::*;
use crate::attention::AttentionConfig;
use crate::params::Parameter;

fn named(model: &CausalLm) -> BTreeMap<String, Vec<f32>> {
    model.parameters().into_iter().map(|parameter| (parameter.name, values(parameter.value))).collect()
}

/// A model that is wide enough for several groups in a row.
fn wide() -> ModelConfig {
    let mut config = fixtures::config(AttentionConfig::Mla(fixtures::mla()));
    config.hidden_size = 192;
    config.layers.iter_mut().for_each(|layer| layer.mlp.intermediate_size = 260);
    config
}

/// Ends of the names of what is never packed.
const KEPT: [&str; 5] = ["norm.weight", "kv_b_proj.weight", "lm_head.weight", "embed_tokens.weight", "bias"];

#[test]
fn a_packed_model_computes_what_its_unpacked_matrices_do() {
    for (device, plain) in [(Device::flex(), Device::flex()), (Device::flex().autodiff(), Device::flex())] {
        for (name, config) in fixtures::every_kind() {
            let base = scrambled(&config, 8, &device);
            for quantization in Quantization::ALL {
                let packed = base.quantized(quantization).unwrap();
                let whole = packed.merged();
                let (found, expected) = (logits(&packed, &config), logits(&whole, &config));
                assert!(close(&found, &expected, 1e-5), "{name}, {quantization:?}");
                let (before, after) = (named(&base), named(&whole));
                assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>(), "{name}");
                let shapes = |model: &CausalLm| -> Vec<_> {
                    model.parameters().into_iter().map(|p| (p.name, p.shape, p.role, p.head_rows)).collect()
                };
                assert_eq!(shapes(&base), shapes(&whole), "{name}");
                // Each matrix is what its packed form says, and what is not packed stays as it was, and a parameter.
                let layers: Vec<String> =
                    packed.quantized_layers().iter().map(|layer| format!("{}.weight", layer.name)).collect();
                let kept = named(&packed);
                for Parameter { name: tensor, shape, .. } in base.parameters() {
                    let is_kept = KEPT.iter().any(|end| tensor.ends_with(end));
                    assert_eq!((is_kept, is_kept), (!layers.contains(&tensor), kept.contains_key(&tensor)), "{tensor}");
                    let values = &before[&tensor];
                    let expected = if is_kept {
                        values.clone()
                    } else {
                        Packed::new(values, [shape[0], shape[1]], quantization).values()
                    };
                    assert!(after[&tensor] == expected, "{name}, {quantization:?}: {tensor}");
                }
                assert!(whole.quantized_layers().is_empty() && packed.quantized(quantization).is_err());
                let never = Path::new("never");
                assert!(packed.save(never, WeightDtype::F32, usize::MAX).is_err() && !never.exists());
                // Copies for threads and for evaluation.
                let fork = packed.clone().fork(&device);
                assert_eq!(logits(&fork, &config), found, "{name}");
                let valid = packed.valid();
                assert!(close(&logits(&valid.fork(&plain), &config), &found, 1e-5), "{name}");
            }
        }
    }
}

#[test]
fn gradients_of_adapters_are_those_beside_the_unpacked_matrices() {
    let device = Device::flex().autodiff();
    for (name, config) in fixtures::every_kind().into_iter().chain([("wide", wide())]) {
        let input_ids: Vec<u32> = (0..18).map(|i| i * 5 % config.vocab_size as u32).collect();
        let targets: Vec<i64> = (0..18).map(|i| if i == 7 { IGNORE } else { i * 3 % 7 }).collect();
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
        for ((kind, adapter), quantization) in kinds().into_iter().zip(Quantization::ALL) {
            let saved = AdapterConfig { modules_to_save: Some(vec!["up_proj".into()]), ..adapter };
            let model = adapted(&config, &saved, 4, &device);
            let packed = model.quantized(quantization).unwrap();
            assert!(packed.quantized_layers().iter().all(|layer| !layer.name.ends_with("up_proj")), "{name}");
            let unpacked = named(&packed.unadapted().merged());
            assert_eq!(packed.trained_parameters().len(), model.trained_parameters().len());
            // The same adapters beside the numbers that the packed ones stand for.
            let same = |parameter: Parameter| match unpacked.get(&parameter.name) {
                Some(values) => Tensor::from_floats(values.as_slice(), &parameter.value.device()),
                None => parameter.value,
            };
            let dense = model.clone().with_values(model.parameters().into_iter().map(same).collect());
            assert!(!close(&logits(&dense, &config), &logits(&model, &config), 1e-5), "{name}: packing does something");
            assert!(close(&logits(&packed, &config), &logits(&dense, &config), 1e-5), "{name}, {kind}");
            for recompute in [Recompute::None, Recompute::Block] {
                let (_, found) = packed.loss_and_gradients(batch, objective, recompute, &device);
                let (_, expected) = dense.loss_and_gradients(batch, objective, recompute, &device);
                for ((found, expected), parameter) in found.into_iter().zip(expected).zip(packed.trained_parameters()) {
                    let (found, expected) = (values(found), values(expected));
                    assert!(close(&found, &expected, 1e-5), "{name}, {kind}, {quantization:?}: {}", parameter.name);
                }
            }
        }
    }
}

#[test]
fn a_base_is_packed_while_it_is_loaded_and_its_adapter_says_nothing_of_it() {
    let device = Device::flex();
    let config = fixtures::mla_with(|mla| mla.q_lora_rank = Some(8));
    let dir = tempfile::tempdir().unwrap();
    let base = scrambled(&config, 3, &device);
    let base_dir = dir.path().join("base");
    base.save(&base_dir, WeightDtype::F32, usize::MAX).unwrap();
    let read = ModelDir::open(&base_dir).unwrap().config().unwrap();
    for ((kind, adapter), quantization) in kinds().into_iter().zip(Quantization::ALL) {
        let adapter = AdapterConfig { quantization: Some(quantization), ..adapter };
        let begun = CausalLm::begin_adapter(&base_dir, &read, &adapter, 1, &device).unwrap();
        let packed = base.quantized(quantization).unwrap();
        assert_eq!(begun.quantized_layers(), packed.quantized_layers(), "{kind}");
        // A new adapter changes nothing of the packed base: DoRA's lengths are those of its rows.
        assert!(close(&logits(&begun, &config), &logits(&packed, &config), 1e-5), "{kind}");
        assert!(close(&logits(&begun.unadapted(), &config), &logits(&packed, &config), 1e-6), "{kind}");

        let there = dir.path().join(kind);
        std::fs::create_dir(&there).unwrap();
        begun.save_adapter(&there).unwrap();
        let text = std::fs::read_to_string(there.join(ADAPTER_CONFIG)).unwrap();
        assert!(!text.contains("quantization"), "{text}");
        let mut opened = AdapterDir::open(&there).unwrap();
        assert_eq!(opened.config.quantization, None);
        opened.config.quantization = Some(quantization);
        let back = CausalLm::load_adapted(&base_dir, &read, &opened, &device).unwrap();
        assert_eq!(logits(&back, &config), logits(&begun, &config), "{kind}");
        assert_eq!(named(&back), named(&begun), "{kind}");
    }
}

#[test]
fn each_matrix_tells_how_far_it_is_off_and_what_it_takes() {
    let config = wide();
    let base = scrambled(&config, 2, &Device::flex());
    let before = named(&base);
    let mut errors = Vec::new();
    for quantization in Quantization::ALL {
        let packed = base.quantized(quantization).unwrap();
        let after = named(&packed.merged());
        let (mut bytes, mut whole) = (0, 0);
        for layer in packed.quantized_layers() {
            let tensor = format!("{}.weight", layer.name);
            let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
            let off = before[&tensor].iter().zip(&after[&tensor]).map(|(a, b)| f64::from(a - b));
            let size = norm(&mut before[&tensor].iter().map(|x| f64::from(*x)));
            let expected = norm(&mut off.into_iter()) / size;
            assert!((layer.error - expected).abs() <= 1e-9, "{}: {} for {expected}", layer.name, layer.error);
            (bytes, whole) = (bytes + layer.bytes, whole + 4 * layer.shape[0] * layer.shape[1]);
        }
        let plan = AdapterPlan::packing(quantization);
        assert_eq!(plan.bytes_spared(base.tensors()), whole - bytes);
        let of = |name: &str| packed.quantized_layers().iter().find(|layer| layer.name.ends_with(name)).unwrap();
        errors.push(of("0.mlp.gate_proj").error);
        let share = of("0.mlp.gate_proj").bytes as f64 / (4 * 192 * 260) as f64;
        let most = match quantization {
            Quantization::Bf16 => 0.501,
            Quantization::Int8 => 0.26,
            Quantization::Int4 | Quantization::Nf4 => 0.15,
        };
        assert!(share <= most, "{quantization:?}: {share}");
    }
    // Of normal numbers: a hundredth with 8 bits, a tenth with 4, less of it where levels lie where numbers do.
    assert!(errors[0] < 0.012 && (0.08..0.14).contains(&errors[1]) && (0.06..0.11).contains(&errors[2]), "{errors:?}");
    assert!(errors[2] < errors[1] && errors[3] < 0.003, "{errors:?}");
}

#[test]
fn a_model_that_is_read_in_bf16_has_its_head_so_and_loses_nothing_that_was_bf16() {
    for (name, config) in fixtures::every_kind() {
        let base = scrambled(&config, 3, &Device::flex());
        let rounded: BTreeMap<String, Vec<f32>> = named(&base)
            .into_iter()
            .map(|(name, values)| (name, values.into_iter().map(|x| half::bf16::from_f32(x).to_f32()).collect()))
            .collect();
        let model = CausalLm::build(&config, &Device::flex(), &mut |spec| rounded[&spec.name].clone());
        let packed = model.packed_to_read(Quantization::Bf16).unwrap();
        assert_eq!(packed.quantization(), Some(Quantization::Bf16));
        assert!(close(&logits(&packed, &config), &logits(&model, &config), 1e-5), "{name}");
        let head = config.vocab_size * config.hidden_size;
        let layers = AdapterPlan::packing(Quantization::Bf16).bytes_spared(model.tensors());
        assert_eq!(packed.packed_bytes_spared(), layers + 4 * head - Quantization::Bf16.bytes([head, 1]), "{name}");
        // Whole again, it is what it was.
        let whole = packed.merged();
        assert!(
            named(&whole) == rounded && whole.quantization().is_none() && whole.packed_bytes_spared() == 0,
            "{name}"
        );
        assert!(packed.packed_to_read(Quantization::Bf16).is_err());
        let int8 = model.packed_to_read(Quantization::Int8).unwrap();
        assert_eq!(int8.packed_bytes_spared(), AdapterPlan::packing(Quantization::Int8).bytes_spared(model.tensors()));
    }
}

#[test]
fn a_directory_that_is_packed_while_it_is_read_is_what_it_is_packed_afterwards() {
    let device = Device::flex();
    let config = fixtures::mla_with(|mla| mla.q_lora_rank = Some(8));
    let dir = tempfile::tempdir().unwrap();
    let (base, beside) = (dir.path().join("base"), dir.path().join("beside"));
    scrambled(&config, 3, &device).save(&base, WeightDtype::F32, usize::MAX).unwrap();
    std::fs::create_dir(&beside).unwrap();
    let dora = AdapterConfig { use_dora: true, modules_to_save: Some(vec!["norm".into()]), ..everything() };
    super::beside(&base, &config, &dora, 3, &device).save_adapter(&beside).unwrap();
    let several = |weights: [f64; 2]| {
        let lora = dir.path().join("lora");
        if !lora.exists() {
            std::fs::create_dir(&lora).unwrap();
            super::beside(&base, &config, &everything(), 5, &device).save_adapter(&lora).unwrap();
        }
        ModelDir::open(&base).unwrap().with_adapters(&weights.map(|weight| (lora.clone(), weight))).unwrap()
    };
    for quantization in Quantization::ALL {
        for found in [ModelDir::open(&base).unwrap(), ModelDir::open(&beside).unwrap(), several([0.7, -0.3])] {
            let afterwards = found.load(&device).unwrap().packed_to_read(quantization).unwrap();
            let packed = found.load_packed(quantization, &device).unwrap();
            assert_eq!(logits(&packed, &config), logits(&afterwards, &config), "{quantization:?}");
            assert_eq!(packed.packed_bytes_spared(), afterwards.packed_bytes_spared());
            assert_eq!(packed.quantized_layers().len(), afterwards.quantized_layers().len());
            // Read at fewer ranks as well.
            let ranks = vec![3; config.layers.len()];
            let narrow = [&packed, &afterwards].map(|model| logits(&model.with_kv_ranks(&ranks).unwrap(), &config));
            assert!(narrow[0] == narrow[1] && narrow[0] != logits(&packed, &config));
        }
    }
}
