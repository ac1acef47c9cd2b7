use half::f16;

use super::*;

#[test]
fn a_type_reads_back_from_its_name_and_its_code() {
    for kind in TensorType::ALL {
        assert_eq!(kind.to_string().parse::<TensorType>().unwrap(), kind);
        assert_eq!(TensorType::from_code(kind.code()), Some(kind));
    }
    let message = "q4_k".parse::<TensorType>().unwrap_err().to_string();
    assert!(message.contains("q4_k") && message.contains("q8_0"), "{message}");
    assert_eq!(TensorType::from_code(2), None);
}

/// d = 127/127 = 1: the quotients are the values themselves, and halves are rounded away from zero, not to even.
#[test]
fn q8_0_rounds_halves_away_from_zero() {
    let mut block = vec![0f32; 32];
    block[..8].copy_from_slice(&[127.0, 0.5, -0.5, 1.5, -2.5, 0.49999997, -126.5, 3.25]);
    let bytes = TensorType::Q8_0.encode(&block).unwrap();
    assert_eq!(bytes.len(), 34);
    assert_eq!(bytes[..2], f16::from_f32(1.0).to_le_bytes());
    let expected: [i8; 8] = [127, 1, -1, 2, -3, 0, -127, 3];
    assert_eq!(bytes[2..10].iter().map(|b| *b as i8).collect::<Vec<_>>(), expected);
    assert_eq!(TensorType::Q8_0.decode(&bytes)[..5], [127.0, 1.0, -1.0, 2.0, -3.0]);
}

/// A block of the figures 0.1·i − 1.5, i = 0 … 31; the bytes are those that `gguf.quantize` of llama.cpp's Python package gives.
#[test]
fn q8_0_is_that_of_ggml() {
    let block: Vec<f32> = (0..32).map(|i| (f64::from(i) * 0.1 - 1.5) as f32).collect();
    let bytes = TensorType::Q8_0.encode(&block).unwrap();
    assert_eq!(bytes[..2], [0x73, 0x22], "1.6/127 in half precision");
    // −0.8/d is −63.49999… exactly, but −63.5 in f32, and so it is there.
    let expected: [i8; 32] = [
        -119, -111, -103, -95, -87, -79, -71, -64, -56, -48, -40, -32, -24, -16, -8, 0, 8, 16, 24, 32, 40, 48, 56, 64,
        71, 79, 87, 95, 103, 111, 119, 127,
    ];
    assert_eq!(bytes[2..].iter().map(|b| *b as i8).collect::<Vec<_>>(), expected);
    let zero = TensorType::Q8_0.encode(&[0.0; 64]).unwrap();
    assert!(zero.iter().all(|byte| *byte == 0) && zero.len() == 68);
}

#[test]
fn what_a_type_cannot_hold_is_named() {
    assert_eq!(TensorType::F16.encode(&[1.0, -70_000.0]), Err(-70_000.0));
    assert_eq!(TensorType::F16.encode(&[65_519.0]).unwrap().len(), 2);
    assert_eq!(TensorType::Bf16.encode(&[f32::MAX]), Err(f32::MAX));
    assert_eq!(TensorType::F32.encode(&[f32::MAX]).unwrap().len(), 4);
    let mut block = [0f32; 32];
    block[3] = 127.0 * 70_000.0;
    assert_eq!(TensorType::Q8_0.encode(&block), Err(block[3]));
    block[3] = f32::INFINITY;
    assert_eq!(TensorType::Q8_0.encode(&block), Err(f32::INFINITY));
    block[3] = f32::NAN;
    assert!(TensorType::Q8_0.encode(&block).unwrap_err().is_nan());
    // Infinities that are there already are kept by the floating-point types.
    assert!(TensorType::F16.decode(&TensorType::F16.encode(&[f32::INFINITY]).unwrap())[0].is_infinite());
}

#[test]
fn the_error_names_tensor_value_and_mend() {
    let folder = Folder::new();
    let mut model = random_model(&config_with(|_, _| ()), 3);
    model.update(|parameters| {
        let spoil = |parameter: Parameter| {
            if !parameter.name.ends_with("layers.1.mlp.up_proj.weight") {
                return parameter.value;
            }
            parameter.value.mul_scalar(0.0).add_scalar(1e5)
        };
        parameters.into_iter().map(spoil).collect()
    });
    let error = write(&folder.file("x.gguf"), &model, None, TensorType::F16).unwrap_err().to_string();
    for part in ["blk.1.ffn_up.weight", "100000", "f16", "bf16 or f32"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert_eq!(std::fs::read_dir(folder.0.path()).unwrap().count(), 0);
    write(&folder.file("x.gguf"), &model, None, TensorType::Bf16).unwrap();
}

#[test]
fn rows_that_do_not_divide_into_blocks_fall_back_to_half_precision() {
    let folder = Folder::new();
    let path = folder.file("x.gguf");
    let config = config_with(|config, mla| {
        config.hidden_size = 64;
        config.layers.iter_mut().for_each(|layer| layer.mlp.intermediate_size = 96);
        (mla.kv_lora_rank, mla.v_head_dim) = (32, 33);
    });
    let model = random_model(&config, 3);
    let summary = write(&path, &model, None, TensorType::Q8_0).unwrap();
    let expected: Vec<String> =
        (0..2).flat_map(|i| [format!("blk.{i}.attn_k_b.weight"), format!("blk.{i}.attn_output.weight")]).collect();
    assert_eq!(summary.fallbacks, expected);
    let file = read(&path).unwrap();
    for info in file.tensors() {
        let kind = match info.shape.len() {
            1 => TensorType::F32,
            _ if expected.contains(&info.name) => TensorType::F16,
            _ => TensorType::Q8_0,
        };
        assert_eq!(info.kind, kind, "{}", info.name);
    }
    assert_eq!(file.metadata().integer("general.file_type"), Some(7));
    let ids = [1, 5, 9, 2, 28];
    let again = read_model(&path, &Device::flex()).unwrap();
    let off = distance(&logits(&again, &ids), &logits(&model, &ids));
    assert!(off > 1e-5 && off < 0.05, "{off}");
}
