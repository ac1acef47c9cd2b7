use safetensors::tensor::TensorView;
use serde_json::json;

use super::write::is_shard;
use super::*;
use crate::adapter::Quantization;
use crate::fixtures::{self, scrambled, values};
use crate::model::ids_tensor;
use crate::params::Parameter;

mod quantised;

const ALL_IN_ONE: usize = usize::MAX;

fn bits(model: &CausalLm) -> Vec<(String, Vec<usize>, Vec<u32>)> {
    let bits = |p: Parameter| (p.name, p.shape, values(p.value).iter().map(|x| x.to_bits()).collect());
    model.parameters().into_iter().map(bits).collect()
}

fn files(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn model(seed: u64) -> CausalLm {
    scrambled(&fixtures::mla_with(|m| m.q_lora_rank = Some(8)), seed, &Device::flex())
}

fn saved(model: &CausalLm, max_shard_bytes: usize) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    model.save(dir.path(), WeightDtype::F32, max_shard_bytes).unwrap();
    dir
}

fn load(dir: &Path) -> Result<CausalLm> {
    CausalLm::load(dir, &Device::flex())
}

fn load_error(dir: &Path) -> Error {
    load(dir).map(|_| ()).unwrap_err()
}

type Stored = (String, Dtype, Vec<usize>, Vec<u8>);

/// The tensors of a file, to be changed and written back.
fn read_tensors(path: &Path) -> Vec<Stored> {
    let bytes = std::fs::read(path).unwrap();
    let parsed = SafeTensors::deserialize(&bytes).unwrap();
    parsed.tensors().into_iter().map(|(name, v)| (name, v.dtype(), v.shape().to_vec(), v.data().to_vec())).collect()
}

fn write_tensors(path: &Path, tensors: &[Stored]) {
    let views = tensors.iter().map(|(n, d, s, b)| (n.as_str(), TensorView::new(*d, s.clone(), b).unwrap()));
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn f32_survives_to_the_last_bit() {
    for (name, config) in fixtures::every_kind() {
        let model = scrambled(&config, 1, &Device::flex());
        let dir = saved(&model, ALL_IN_ONE);
        assert_eq!(files(dir.path()), ["config.json", "model.safetensors"]);
        let loaded = load(dir.path()).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(bits(&loaded), bits(&model), "{name}");
        assert_eq!(loaded.config, model.config, "{name}");
    }
}

#[test]
fn a_trained_model_is_saved_from_the_autodiff_device() {
    let device = Device::flex().autodiff();
    let model = scrambled(&fixtures::mla_with(|_| ()), 2, &device);
    let dir = saved(&model, ALL_IN_ONE);
    assert_eq!(bits(&CausalLm::load(dir.path(), &device).unwrap()), bits(&model));
}

#[test]
fn half_formats_round_once_and_then_stay() {
    for dtype in [WeightDtype::Bf16, WeightDtype::F16] {
        let model = model(3);
        let dir = tempfile::tempdir().unwrap();
        model.save(dir.path(), dtype, ALL_IN_ONE).unwrap();
        let once = load(dir.path()).unwrap();
        for (before, after) in model.parameters().into_iter().zip(once.parameters()) {
            let expected: Vec<f32> = values(before.value)
                .iter()
                .map(|x| match dtype {
                    WeightDtype::Bf16 => bf16::from_f32(*x).to_f32(),
                    _ => f16::from_f32(*x).to_f32(),
                })
                .collect();
            assert_eq!(values(after.value), expected, "{}", before.name);
        }
        assert_ne!(bits(&once), bits(&model));
        once.save(dir.path(), dtype, ALL_IN_ONE).unwrap();
        assert_eq!(bits(&load(dir.path()).unwrap()), bits(&once));
        let config = std::fs::read_to_string(dir.path().join("config.json")).unwrap();
        assert!(config.contains(&format!("\"torch_dtype\": \"{}\"", dtype.name())), "{config}");
    }
}

#[test]
fn a_value_beyond_the_format_is_refused_instead_of_becoming_infinite() {
    let mut model = model(4);
    let (norm, device) = (&mut model.model.norm, Device::flex());
    norm.set_gain(burn::tensor::Tensor::from_data(burn::tensor::TensorData::new(vec![70_000f32; 12], [12]), &device));
    let dir = tempfile::tempdir().unwrap();
    let error = model.save(dir.path(), WeightDtype::F16, ALL_IN_ONE).unwrap_err().to_string();
    assert!(error.contains("model.norm.weight") && error.contains("70000"), "{error}");
    assert!(files(dir.path()).is_empty(), "{:?}", files(dir.path()));
    model.save(dir.path(), WeightDtype::Bf16, ALL_IN_ONE).unwrap();
}

#[test]
fn shards_hold_the_same_as_one_file() {
    let model = model(5);
    let one = saved(&model, ALL_IN_ONE);
    for limit in [0, 1500, 4000] {
        let dir = saved(&model, limit);
        let names = files(dir.path());
        let shards: Vec<&String> = names.iter().filter(|name| is_shard(name)).collect();
        assert!(shards.len() > 1 && names.len() == shards.len() + 2, "{names:?}");
        for shard in shards {
            let tensors = read_tensors(&dir.path().join(shard));
            let bytes: usize = tensors.iter().map(|(.., bytes)| bytes.len()).sum();
            assert!(bytes <= limit || tensors.len() == 1, "{shard} holds {bytes}");
        }
        assert_eq!(bits(&load(dir.path()).unwrap()), bits(&load(one.path()).unwrap()));
        let index: Value = serde_json::from_slice(&std::fs::read(dir.path().join(INDEX)).unwrap()).unwrap();
        assert_eq!(index["metadata"]["total_size"], 4 * model.config.parameter_count().total);
        assert_eq!(index["weight_map"].as_object().unwrap().len(), model.parameters().len());
    }
}

#[test]
fn the_header_names_pytorch_as_format() {
    for limit in [1500, ALL_IN_ONE] {
        let dir = saved(&model(6), limit);
        for path in weight_files(dir.path()).unwrap() {
            let bytes = std::fs::read(path).unwrap();
            let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
            assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
        }
    }
}

#[test]
fn strided_parameters_are_saved_in_their_logical_order() {
    let mut model = model(7);
    let head = model.lm_head.as_mut().unwrap();
    let plain = head.matrix();
    let expected = values(plain.clone());
    // The same matrix, stored by columns; and a gain that is a column of a wider matrix.
    let by_columns = burn::tensor::Tensor::<1>::from_data(
        burn::tensor::TensorData::new(values(plain.transpose()), [29 * 12]),
        &Device::flex(),
    );
    head.set_matrix(by_columns.reshape([12, 29]).transpose());
    let wide = burn::tensor::Tensor::<1>::from_data(
        burn::tensor::TensorData::new((0..36).map(|i| i as f32).collect(), [36]),
        &Device::flex(),
    );
    model.model.norm.set_gain(wide.reshape([12, 3]).narrow(1, 1, 1).squeeze_dim::<1>(1));
    let dir = saved(&model, ALL_IN_ONE);
    let loaded = load(dir.path()).unwrap();
    assert_eq!(values(loaded.lm_head.unwrap().matrix()), expected);
    let gain: Vec<f32> = (0..12).map(|i| (3 * i + 1) as f32).collect();
    assert_eq!(values(loaded.model.norm.gain()), gain);
}

#[test]
fn a_new_checkpoint_replaces_an_old_one_of_any_layout() {
    for (first, second) in [(ALL_IN_ONE, 1500), (1500, ALL_IN_ONE), (1500, 4000), (4000, 1500), (1500, 1500)] {
        let dir = saved(&model(8), first);
        std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
        std::fs::write(dir.path().join("model-of-mine.safetensors"), "mine").unwrap();
        let newer = model(9);
        newer.save(dir.path(), WeightDtype::F32, second).unwrap();
        assert_eq!(bits(&load(dir.path()).unwrap()), bits(&newer), "{first} then {second}");
        // Nothing is left that another reader would prefer, and nothing is gone that is not ours.
        let fresh = saved(&newer, second);
        let mut expected = files(fresh.path());
        expected.extend(["model-of-mine.safetensors".to_string(), "tokenizer.json".to_string()]);
        expected.sort();
        assert_eq!(files(dir.path()), expected, "{first} then {second}");
    }
}

#[test]
fn a_save_that_fails_leaves_the_old_checkpoint_whole() {
    let old = model(10);
    let dir = saved(&old, ALL_IN_ONE);
    let mut new = model(11);
    new.model.norm.set_gain(burn::tensor::Tensor::from_data(
        burn::tensor::TensorData::new(vec![1e9f32; 12], [12]),
        &Device::flex(),
    ));
    assert!(new.save(dir.path(), WeightDtype::F16, 1000).is_err());
    assert_eq!(bits(&load(dir.path()).unwrap()), bits(&old));
    assert_eq!(files(dir.path()), ["config.json", "model.safetensors"]);
}

#[test]
fn what_cannot_be_replaced_is_found_before_anything_is_touched() {
    let dir = saved(&model(12), 1500);
    let config = std::fs::read(dir.path().join("config.json")).unwrap();
    // A folder in the place of the second shard.
    let victim = dir.path().join(files(dir.path()).into_iter().filter(|f| is_shard(f)).nth(1).unwrap());
    std::fs::remove_file(&victim).unwrap();
    std::fs::create_dir_all(victim.join("x")).unwrap();
    let error = model(13).save(dir.path(), WeightDtype::F32, 1500).unwrap_err().to_string();
    assert!(error.contains(&*victim.to_string_lossy()), "{error}");
    std::fs::remove_dir_all(&victim).unwrap();
    assert_eq!(std::fs::read(dir.path().join("config.json")).unwrap(), config);
    let error = load_error(dir.path());
    assert!(matches!(&error, Error::Io { path, .. } if *path == victim), "{error}");
    assert!(files(dir.path()).iter().all(|name| !name.starts_with('.')));
}

#[test]
fn every_missing_unexpected_and_mis_shaped_tensor_is_named_at_once() {
    let dir = saved(&model(14), ALL_IN_ONE);
    let path = dir.path().join(SINGLE);
    let mut tensors = read_tensors(&path);
    tensors.retain(|(name, ..)| name != "lm_head.weight" && name != "model.layers.1.self_attn.o_proj.weight");
    let zeros = |name: &str, len: usize| (name.to_string(), Dtype::F32, vec![len], vec![0; 4 * len]);
    tensors.push(zeros("model.layers.7.input_layernorm.weight", 12));
    tensors.push(zeros("model.layers.0.self_attn.q_proj.weight", 3));
    // A table that follows from the configuration is no weight.
    tensors.push(zeros("model.layers.0.self_attn.rotary_emb.inv_freq", 3));
    for tensor in &mut tensors {
        if tensor.0 == "model.norm.weight" {
            (tensor.2, tensor.3) = (vec![3, 4], tensor.3.clone());
        }
        if tensor.0 == "model.layers.0.mlp.up_proj.weight" {
            tensor.2.reverse();
        }
    }
    write_tensors(&path, &tensors);
    let error = load_error(dir.path());
    let text = error.to_string();
    let Error::Tensors { missing, mut unexpected, mismatched, .. } = error else { panic!("{error}") };
    assert_eq!(missing, ["model.layers.1.self_attn.o_proj.weight", "lm_head.weight"]);
    unexpected.sort();
    assert_eq!(unexpected, ["model.layers.0.self_attn.q_proj.weight", "model.layers.7.input_layernorm.weight"]);
    assert_eq!(
        mismatched,
        [
            "model.layers.0.mlp.up_proj.weight: expected [17, 12], found [12, 17]",
            "model.norm.weight: expected [12], found [3, 4]",
        ]
    );
    for name in missing.iter().chain(&unexpected).chain(&mismatched) {
        assert!(text.contains(name.as_str()), "{name} is not in: {text}");
    }
}

#[test]
fn damaged_files_are_refused_with_their_name() {
    let dir = saved(&model(15), ALL_IN_ONE);
    let path = dir.path().join(SINGLE);
    let whole = std::fs::read(&path).unwrap();
    let mut longer = whole.clone();
    longer.extend([0; 16]);
    let mut huge_header = whole.clone();
    huge_header[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let garbage: Vec<u8> = (0..5000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut damaged = vec![longer, huge_header, garbage, Vec::new(), b"{}".to_vec()];
    damaged.extend([1, 7, 8, 9, 100, whole.len() / 2, whole.len() - 1].map(|len| whole[..len].to_vec()));
    for bytes in damaged {
        std::fs::write(&path, &bytes).unwrap();
        let error = load_error(dir.path());
        let named = matches!(&error, Error::File { path, .. } | Error::Io { path, .. } if path.ends_with(SINGLE));
        assert!(named, "{} bytes: {error}", bytes.len());
    }
}

#[test]
fn other_dtypes_are_refused() {
    let dir = saved(&model(16), ALL_IN_ONE);
    let path = dir.path().join(SINGLE);
    let mut tensors = read_tensors(&path);
    let norm = tensors.iter_mut().find(|(name, ..)| name == "model.norm.weight").unwrap();
    (norm.1, norm.3) = (Dtype::I64, vec![0; 8 * 12]);
    write_tensors(&path, &tensors);
    let error = load_error(dir.path()).to_string();
    assert!(error.contains("model.norm.weight") && error.contains("I64"), "{error}");
}

#[test]
fn wide_and_narrow_numbers_are_read_as_what_they_are() {
    let model = model(16);
    for (dtype, encode, exact) in [
        (Dtype::F64, (|x: f32| f64::from(x).to_le_bytes().to_vec()) as fn(f32) -> Vec<u8>, true),
        (Dtype::F8_E5M2, |x| vec![f16::from_f32(x).to_le_bytes()[1]], false),
    ] {
        let dir = saved(&model, ALL_IN_ONE);
        let path = dir.path().join(SINGLE);
        let mut tensors = read_tensors(&path);
        for tensor in &mut tensors {
            let numbers = tensor.3.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
            tensor.3 = numbers.flat_map(encode).collect();
            tensor.1 = dtype;
        }
        write_tensors(&path, &tensors);
        let loaded = load(dir.path()).unwrap();
        for (before, after) in model.parameters().into_iter().zip(loaded.parameters()) {
            let expected: Vec<f32> = match exact {
                true => values(before.value),
                // Cut to the upper byte of an f16.
                false => {
                    let cut = |x: f32| f16::from_bits(f16::from_f32(x).to_bits() & 0xff00).to_f32();
                    values(before.value).into_iter().map(cut).collect()
                }
            };
            assert_eq!(values(after.value), expected, "{dtype:?} {}", before.name);
        }
    }
}

/// Rewrites the tensors of a model directory, with entries for the header's table of metadata.
fn rewrite(dir: &Path, metadata: &[(&str, &str)], change: impl FnOnce(&mut Vec<Stored>)) {
    let path = dir.join(SINGLE);
    let mut tensors = read_tensors(&path);
    change(&mut tensors);
    let views = tensors.iter().map(|(n, d, s, b)| (n.as_str(), TensorView::new(*d, s.clone(), b).unwrap()));
    let metadata = metadata.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
    std::fs::write(&path, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
}

fn rename(tensors: &mut [Stored], from: &str, to: &str) {
    tensors.iter_mut().find(|tensor| tensor.0 == from).unwrap().0 = to.into();
}

/// `safetensors.torch.save_model` stores what is shared once, under either name.
#[test]
fn a_matrix_that_is_stored_once_for_two_names_is_found_under_both() {
    let tied = ModelConfig { tie_word_embeddings: true, ..fixtures::mla_with(|_| ()) };
    let tied = scrambled(&tied, 21, &Device::flex());
    for metadata in [&[][..], &[("model.embed_tokens.weight", "lm_head.weight")], &[("format", "pt")]] {
        let dir = saved(&tied, ALL_IN_ONE);
        rewrite(dir.path(), metadata, |t| rename(t, "model.embed_tokens.weight", "lm_head.weight"));
        assert_eq!(bits(&load(dir.path()).unwrap()), bits(&tied), "{metadata:?}");
    }
    let dir = saved(&tied, ALL_IN_ONE);
    rewrite(dir.path(), &[("lm_head.weight", "model.embed_tokens.weight")], |_| ());
    assert_eq!(bits(&load(dir.path()).unwrap()), bits(&tied));
    // Untied by its configuration, shared in its file: two parameters of the same values.
    let untied = scrambled(&fixtures::mla_with(|_| ()), 21, &Device::flex());
    let dir = saved(&untied, ALL_IN_ONE);
    rewrite(dir.path(), &[("lm_head.weight", "model.embed_tokens.weight")], |t| {
        t.retain(|tensor| tensor.0 != "lm_head.weight");
    });
    let loaded = load(dir.path()).unwrap();
    let head = values(loaded.lm_head.as_ref().unwrap().matrix());
    assert_eq!(head, values(untied.model.embed_tokens.table()));
    // An alias of nothing is nothing.
    let dir = saved(&untied, ALL_IN_ONE);
    rewrite(dir.path(), &[("lm_head.weight", "elsewhere")], |t| t.retain(|tensor| tensor.0 != "lm_head.weight"));
    assert!(matches!(load_error(dir.path()), Error::Tensors { missing, .. } if missing == ["lm_head.weight"]));
}

#[test]
fn a_base_model_loads_where_its_head_is_its_embedding() {
    let bare = |tensors: &mut Vec<Stored>| {
        tensors.retain(|tensor| tensor.0 != "lm_head.weight");
        tensors.iter_mut().for_each(|tensor| tensor.0 = tensor.0.strip_prefix("model.").unwrap().into());
    };
    let tied = ModelConfig { tie_word_embeddings: true, ..fixtures::grouped_with(|_| ()) };
    let tied = scrambled(&tied, 22, &Device::flex());
    let dir = saved(&tied, ALL_IN_ONE);
    rewrite(dir.path(), &[], bare);
    assert_eq!(bits(&load(dir.path()).unwrap()), bits(&tied));
    let dir = saved(&model(22), ALL_IN_ONE);
    rewrite(dir.path(), &[], bare);
    let error = load_error(dir.path()).to_string();
    assert!(error.contains("lm_head.weight (the files hold a base model") && !error.contains("unexpected"), "{error}");
}

#[test]
fn a_name_from_a_file_does_not_reach_the_terminal_raw() {
    let dir = saved(&model(22), ALL_IN_ONE);
    rewrite(dir.path(), &[], |t| rename(t, "lm_head.weight", "x\u{1b}[2K\nOK all checksums match"));
    let error = load_error(dir.path()).to_string();
    assert!(error.contains("OK all checksums match") && !error.contains('\u{1b}'), "{error}");
    assert!(error.lines().all(|line| !line.starts_with("OK")), "{error}");
    let path = dir.path().join(CONFIG);
    let config = std::fs::read_to_string(&path).unwrap().replace("deepseek_v3", "\\u001b[2K\\nfine");
    std::fs::write(&path, config).unwrap();
    let error = load_error(dir.path()).to_string();
    assert!(error.contains("fine") && !error.contains('\u{1b}') && error.lines().count() == 1, "{error}");
}

#[test]
fn weights_are_compared_with_the_configuration_without_being_read() {
    let model = model(22);
    let dir = saved(&model, ALL_IN_ONE);
    check_weights(dir.path(), &model.config).unwrap();
    let path = dir.path().join(SINGLE);
    let whole = std::fs::read(&path).unwrap();
    for len in [3, 40, whole.len() - 1] {
        std::fs::write(&path, &whole[..len]).unwrap();
        let error = check_weights(dir.path(), &model.config).unwrap_err().to_string();
        assert!(error.contains("cut short"), "{len}: {error}");
    }
}

#[test]
fn a_tensor_in_two_shards_is_refused() {
    let dir = saved(&model(17), 1500);
    let shards: Vec<PathBuf> = weight_files(dir.path()).unwrap();
    let mut second = read_tensors(&shards[1]);
    second.push(read_tensors(&shards[0])[0].clone());
    write_tensors(&shards[1], &second);
    let error = load_error(dir.path()).to_string();
    assert!(error.contains("another shard"), "{error}");
}

#[test]
fn an_index_is_not_trusted() {
    let dir = saved(&model(18), 1500);
    let index = dir.path().join(INDEX);
    let whole = std::fs::read_to_string(&index).unwrap();
    for file in
        ["../elsewhere.safetensors", "/etc/hostname", "..", ".", "", "/", "sub/model.safetensors", "./x.safetensors"]
    {
        let mut value: Value = serde_json::from_str(&whole).unwrap();
        value["weight_map"]["model.norm.weight"] = json!(file);
        std::fs::write(&index, value.to_string()).unwrap();
        let error = load_error(dir.path()).to_string();
        assert!(error.contains("outside the directory"), "{file}: {error}");
    }
    for (text, part) in [
        ("{", "not valid JSON"),
        ("{}", "weight_map"),
        (r#"{"weight_map": {"model.norm.weight": 3}}"#, "model.norm.weight is not a file name"),
    ] {
        std::fs::write(&index, text).unwrap();
        let error = load_error(dir.path()).to_string();
        assert!(error.contains(part) && error.contains(INDEX), "{error}");
    }
    std::fs::write(&index, r#"{"weight_map": {}}"#).unwrap();
    assert!(matches!(load_error(dir.path()), Error::Tensors { .. }));
}

#[test]
fn a_missing_shard_is_named() {
    let dir = saved(&model(19), 1500);
    let shard = weight_files(dir.path()).unwrap().remove(1);
    std::fs::remove_file(&shard).unwrap();
    let error = load_error(dir.path());
    assert!(matches!(&error, Error::Io { path, .. } if *path == shard), "{error}");
}

#[test]
fn a_directory_without_weights_says_what_it_needs() {
    let dir = saved(&model(20), ALL_IN_ONE);
    std::fs::remove_file(dir.path().join(SINGLE)).unwrap();
    let error = load_error(dir.path()).to_string();
    assert!(error.contains(SINGLE) && error.contains(INDEX), "{error}");
}

#[test]
fn a_head_beside_tied_weights_may_repeat_but_not_contradict_them() {
    let config = ModelConfig { tie_word_embeddings: true, ..fixtures::mla_with(|_| ()) };
    let model = scrambled(&config, 21, &Device::flex());
    let dir = saved(&model, ALL_IN_ONE);
    let path = dir.path().join(SINGLE);
    let mut tensors = read_tensors(&path);
    assert!(tensors.iter().all(|(name, ..)| name != "lm_head.weight"), "a tied head is not saved");
    let embedding = tensors.iter().find(|(name, ..)| name == "model.embed_tokens.weight").unwrap().clone();
    tensors.push(("lm_head.weight".into(), embedding.1, embedding.2, embedding.3));
    write_tensors(&path, &tensors);
    assert_eq!(bits(&load(dir.path()).unwrap()), bits(&model));
    tensors.last_mut().unwrap().3[3] ^= 1;
    write_tensors(&path, &tensors);
    let error = load_error(dir.path()).to_string();
    assert!(error.contains("lm_head.weight differs"), "{error}");
}

#[test]
fn weights_load_into_a_configuration_given_outright() {
    let model = model(22);
    let dir = saved(&model, ALL_IN_ONE);
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    let loaded = CausalLm::load_with(dir.path(), &model.config, &Device::flex()).unwrap();
    let ids = || ids_tensor(&[1, 2, 3, 28], 1, 4, &Device::flex());
    assert_eq!(values(loaded.forward(ids())), values(model.forward(ids())));
}

#[test]
fn a_configuration_of_far_more_layers_costs_no_more_than_the_files_hold() {
    let dir = saved(&model(21), ALL_IN_ONE);
    let path = dir.path().join(CONFIG);
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["num_hidden_layers"] = json!(4096);
    config["first_k_dense_replace"] = json!(4096);
    std::fs::write(&path, config.to_string()).unwrap();
    let Error::Tensors { missing, unexpected, mismatched, .. } = load_error(dir.path()) else { panic!("no list") };
    // The two layers that are there, the first that is not, and the rest in a word.
    assert_eq!(missing[0], "layers 3 to 4095 (num_hidden_layers)");
    assert_eq!(missing[1], "model.layers.2.input_layernorm.weight");
    assert!(
        missing.len() < 20 && missing.iter().skip(1).all(|name| name.starts_with("model.layers.2.")),
        "{missing:?}"
    );
    assert!(unexpected.is_empty() && mismatched.is_empty(), "{unexpected:?} {mismatched:?}");
}

#[test]
fn layers_out_of_their_order_are_found_all_the_same() {
    let dir = saved(&model(22), ALL_IN_ONE);
    let path = dir.path().join(SINGLE);
    let mut tensors = read_tensors(&path);
    for tensor in &mut tensors {
        tensor.0 = tensor.0.replace("model.layers.1.", "model.layers.5.");
    }
    write_tensors(&path, &tensors);
    let Error::Tensors { missing, unexpected, .. } = load_error(dir.path()) else { panic!("no list") };
    assert!(missing.iter().all(|name| name.starts_with("model.layers.1.")), "{missing:?}");
    assert!(unexpected.iter().all(|name| name.starts_with("model.layers.5.")), "{unexpected:?}");
    assert_eq!(missing.len(), unexpected.len());
}

#[cfg(unix)]
#[test]
fn a_shard_that_is_no_file_is_named() {
    let dir = saved(&model(23), 1500);
    let shard = weight_files(dir.path()).unwrap().remove(1);
    for target in ["/dev/zero", "."] {
        std::fs::remove_file(&shard).unwrap();
        std::os::unix::fs::symlink(target, &shard).unwrap();
        let error = load_error(dir.path());
        assert!(matches!(&error, Error::File { path, why } if *path == shard && why.contains("regular")), "{error}");
    }
}

#[test]
fn nf4_is_stored_as_bitsandbytes_does_and_read_back() {
    // Of its 17 rows bitsandbytes could multiply by none on some processors.
    let widened = |mut config: ModelConfig| {
        config.layers.iter_mut().for_each(|layer| layer.mlp.intermediate_size = 64);
        config
    };
    for (kind, config) in fixtures::every_kind() {
        let model = scrambled(&widened(config), 4, &Device::flex());
        let dir = tempfile::tempdir().unwrap();
        model.save_nf4(dir.path(), WeightDtype::F32, 4000).unwrap();
        // What comes back is what the packed model computes with, and all else as it was.
        let packed = bits(&model.quantized(Quantization::Nf4).unwrap().merged());
        let of = |(whole, packed): ((String, Vec<usize>, Vec<u32>), _)| {
            let fits = whole.1.len() == 2 && whole.1[0] % 32 == 0;
            if fits { packed } else { whole }
        };
        let expected: Vec<_> = bits(&model).into_iter().zip(packed).map(of).collect();
        assert!(expected != bits(&model), "{kind}");
        assert_eq!(bits(&load(dir.path()).unwrap()), expected, "{kind}");
    }
    let model = scrambled(&widened(fixtures::mla_with(|m| m.q_lora_rank = Some(8))), 4, &Device::flex());
    let dir = tempfile::tempdir().unwrap();
    model.save_nf4(dir.path(), WeightDtype::Bf16, ALL_IN_ONE).unwrap();
    let path = dir.path().join(SINGLE);
    let stored = read_tensors(&path);
    let of = |name: &str| stored.iter().find(|(found, ..)| found == name).unwrap_or_else(|| panic!("no {name}"));
    // Written down here a second time, element by element.
    let (up, matrix) = ("model.layers.1.mlp.up_proj.weight", values(model.model.layers[1].mlp.up_proj.matrix()));
    let count = matrix.len();
    let (_, dtype, shape, codes) = of(up);
    assert_eq!((*dtype, &shape[..]), (Dtype::U8, &[count.div_ceil(2), 1][..]));
    let numbers = |bytes: &[u8]| stored::decode(Dtype::F32, bytes).unwrap();
    let (_, dtype, shape, absmax) = of(&format!("{up}.absmax"));
    assert_eq!((*dtype, &shape[..]), (Dtype::F32, &[count.div_ceil(64)][..]));
    let (_, dtype, shape, map) = of(&format!("{up}.quant_map"));
    assert_eq!((*dtype, &shape[..]), (Dtype::F32, &[16][..]));
    let (absmax, map) = (numbers(absmax), numbers(map));
    for (i, x) in matrix.iter().enumerate() {
        let code = if i % 2 == 0 { codes[i / 2] >> 4 } else { codes[i / 2] & 15 };
        let largest = matrix[i / 64 * 64..(i / 64 * 64 + 64).min(count)].iter().fold(0f32, |m, x| m.max(x.abs()));
        assert_eq!(absmax[i / 64], largest);
        let off = (map[usize::from(code)] * largest - x).abs();
        assert!(map.iter().all(|level| (level * largest - x).abs() >= off - 1e-6), "{i}");
    }
    let (_, dtype, _, state) = of(&format!("{up}.quant_state.bitsandbytes__nf4"));
    let state: Value = serde_json::from_slice(state).unwrap();
    assert_eq!(*dtype, Dtype::U8);
    assert_eq!(state, json!({ "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 12] }));
    let packed = |name: &str| ["gate_proj", "up_proj"].iter().any(|map| name.contains(map));
    assert!(stored.iter().all(|(name, dtype, ..)| (*dtype == Dtype::BF16) != packed(name)));
    let config: Value = serde_json::from_str(&std::fs::read_to_string(dir.path().join(CONFIG)).unwrap()).unwrap();
    assert_eq!(config["quantization_config"]["bnb_4bit_quant_type"], "nf4");
    let skipped: Vec<String> =
        serde_json::from_value(config["quantization_config"]["llm_int8_skip_modules"].clone()).unwrap();
    assert_eq!(skipped[..3], ["lm_head", "kv_b_proj", "model.layers.0.self_attn.q_a_proj"]);
    assert!(
        skipped.iter().any(|name| name == "model.layers.1.mlp.down_proj") && !skipped.iter().any(|name| packed(name))
    );

    // What is damaged or packed in another way is refused by name.
    let refused = |change: &dyn Fn(&mut Stored) -> bool| {
        let mut changed: Vec<Stored> = read_tensors(&path);
        changed.retain_mut(|tensor| change(tensor));
        let other = tempfile::tempdir().unwrap();
        std::fs::copy(dir.path().join(CONFIG), other.path().join(CONFIG)).unwrap();
        write_tensors(&other.path().join(SINGLE), &changed);
        let why = load_error(other.path()).to_string();
        assert!(why.contains(up), "{why}");
        why
    };
    let end = |name: &str, end: &str| name.strip_prefix(up) == Some(end);
    assert!(refused(&|(name, ..)| !end(name, ".absmax")).contains("missing"));
    assert!(refused(&|(name, ..)| !end(name, "")).contains("missing"));
    let state = |state: Value| {
        move |(name, _, shape, bytes): &mut Stored| {
            if end(name, ".quant_state.bitsandbytes__nf4") {
                *bytes = state.to_string().into_bytes();
                *shape = vec![bytes.len()];
            }
            true
        }
    };
    let with = |blocksize: usize, shape: Value, nested: Value| {
        state(json!({ "quant_type": "nf4", "blocksize": blocksize, "shape": shape, "nested_blocksize": nested }))
    };
    assert!(refused(&with(128, json!([64, 12]), Value::Null)).contains("another way"));
    assert!(refused(&with(64, json!([64, 12]), json!(256))).contains("another way"));
    assert!(refused(&with(64, json!([64, 14]), Value::Null)).contains("not those of a matrix"));
    assert!(refused(&with(64, json!([usize::MAX, 3]), Value::Null)).contains("not those of a matrix"));
    assert!(refused(&with(64, json!([12, 64]), Value::Null)).contains("expected"));
    assert!(refused(&state(json!("nf4"))).contains("JSON"));
    assert!(
        refused(&|(name, _, _, bytes)| {
            if end(name, ".quant_map") {
                bytes[1] ^= 64;
            }
            true
        })
        .contains("levels")
    );
}
