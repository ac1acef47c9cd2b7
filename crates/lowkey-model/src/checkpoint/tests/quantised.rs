//! Checkpoints of 8 and 4 bits against the dense ones that they stand for.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

const WEIGHTS: &str = "model.safetensors";

/// Which codes, how many rows and columns share a scale, and how scales and zeros are written.
#[derive(Clone, Copy)]
struct Form {
    codes: Codes,
    /// Rows and columns; 0 for all.
    block: (usize, usize),
    scale: &'static str,
    scales: Dtype,
    zeros: bool,
    /// Columns are dealt to their groups by a table.
    ordered: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Codes {
    E4m3,
    Int8,
    Packed(u32),
}

const FP8: Form = Form {
    codes: Codes::E4m3,
    block: (128, 128),
    scale: "weight_scale_inv",
    scales: Dtype::F32,
    zeros: false,
    ordered: false,
};

/// A DeepSeek-V3 whose matrices are no multiple of 128 in either direction: `kv_a_proj_with_mqa` has 168 rows, 1.3 blocks.
fn shaped_like_deepseek() -> ModelConfig {
    let config = json!({
        "model_type": "deepseek_v3", "vocab_size": 40, "hidden_size": 192, "intermediate_size": 264, "num_hidden_layers": 2,
        "first_k_dense_replace": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "kv_lora_rank": 160,
        "q_lora_rank": 24, "qk_nope_head_dim": 32, "qk_rope_head_dim": 8, "v_head_dim": 40,
    });
    ModelConfig::from_json(config.as_object().unwrap()).unwrap()
}

/// Sign, exponent and mantissa as OFP8 has them.
fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code / 8 % 16), f32::from(code % 8));
    let size = if exponent == 0 { mantissa * 2f32.powi(-9) } else { (8.0 + mantissa) * 2f32.powi(exponent - 10) };
    if code < 128 { size } else { -size }
}

fn pack(codes: &[u8], bits: u32) -> u32 {
    codes.iter().enumerate().map(|(at, code)| u32::from(*code) << (at as u32 * bits)).sum()
}

/// What is written of a matrix, and the values that it stands for.
fn coded(
    module: &str,
    (rows, columns): (usize, usize),
    form: Form,
    random: &mut ChaCha8Rng,
) -> (Vec<Stored>, Vec<f32>) {
    let (r, c) =
        (if form.block.0 == 0 { rows } else { form.block.0 }, if form.block.1 == 0 { columns } else { form.block.1 });
    let (down, across) = (rows.div_ceil(r), columns.div_ceil(c));
    let part = |name: &str, dtype, shape: Vec<usize>, bytes| (format!("{module}.{name}"), dtype, shape, bytes);
    let exponents: Vec<u8> = (0..down * across).map(|_| random.random_range(110..125)).collect();
    let mut scales: Vec<f32> = exponents.iter().map(|e| 2f32.powi(i32::from(*e) - 127)).collect();
    let bytes = match form.scales {
        Dtype::F8_E8M0 | Dtype::U8 => exponents,
        Dtype::BF16 => {
            scales.iter_mut().for_each(|s| *s = bf16::from_f32(*s * random.random_range(1.0f32..2.0)).to_f32());
            scales.iter().flat_map(|s| bf16::from_f32(*s).to_le_bytes()).collect()
        }
        _ => {
            scales.iter_mut().for_each(|s| *s *= random.random_range(1.0f32..2.0));
            scales.iter().flat_map(|s| s.to_le_bytes()).collect()
        }
    };
    let mut stored = vec![part(form.scale, form.scales, vec![down, across], bytes)];
    let bits = if let Codes::Packed(bits) = form.codes { bits } else { 8 };
    // As a whole number that is raised by half the range.
    let zeros: Vec<u8> = (0..down * across).map(|_| random.random_range(0..=(1u16 << bits) - 1) as u8).collect();
    let mut groups: Vec<usize> = (0..columns).map(|j| j / c).collect();
    if form.ordered {
        groups.reverse();
        let table = groups.iter().flat_map(|g| (*g as i32).to_le_bytes()).collect();
        stored.push(part("weight_g_idx", Dtype::I32, vec![columns], table));
    }
    let (mut codes, mut values) = (Vec::new(), Vec::new());
    for i in 0..rows {
        for group in &groups {
            let at = i / r * across + group;
            let zero = if form.zeros { f32::from(zeros[at]) } else { f32::from(1u8 << (bits - 1)) };
            let code = match form.codes {
                Codes::E4m3 => loop {
                    let code: u8 = random.random();
                    if code & 0x7f != 0x7f {
                        break code;
                    }
                },
                _ => random.random_range(0..=(1u16 << bits) - 1) as u8,
            };
            codes.push(code);
            values.push(if form.codes == Codes::E4m3 { e4m3(code) } else { f32::from(code) - zero } * scales[at]);
        }
    }
    match form.codes {
        Codes::E4m3 => stored.push(part("weight", Dtype::F8_E4M3, vec![rows, columns], codes)),
        Codes::Int8 => {
            let signed = |codes: &[u8]| codes.iter().map(|code| code ^ 0x80).collect::<Vec<u8>>();
            stored.push(part("weight", Dtype::I8, vec![rows, columns], signed(&codes)));
            if form.zeros {
                stored.push(part("weight_zero_point", Dtype::I8, vec![down, across], signed(&zeros)));
            }
        }
        Codes::Packed(bits) => {
            let per_word = 32 / bits as usize;
            let words = codes
                .chunks(columns)
                .flat_map(|row| row.chunks(per_word))
                .flat_map(|word| pack(word, bits).to_le_bytes());
            let shape = vec![rows, columns.div_ceil(per_word)];
            stored.push(part("weight_packed", Dtype::I32, shape, words.collect()));
            let whole = [rows as i64, columns as i64].iter().flat_map(|n| n.to_le_bytes()).collect();
            stored.push(part("weight_shape", Dtype::I64, vec![2], whole));
            if form.zeros {
                // Along the rows.
                let mut words = Vec::new();
                for rows in zeros.chunks(per_word * across) {
                    for group in 0..across {
                        let column: Vec<u8> = rows.iter().skip(group).step_by(across).copied().collect();
                        words.extend(pack(&column, bits).to_le_bytes());
                    }
                }
                stored.push(part("weight_zero_point", Dtype::I32, vec![down.div_ceil(per_word), across], words));
            }
        }
    }
    (stored, values)
}

/// A checkpoint in that form, and beside it the dense one that it stands for.
fn both(form: Form, method: Value) -> (tempfile::TempDir, tempfile::TempDir) {
    let model = scrambled(&shaped_like_deepseek(), 4, &Device::flex());
    let (quantised, dense) = (saved(&model, ALL_IN_ONE), saved(&model, ALL_IN_ONE));
    let mut random = ChaCha8Rng::seed_from_u64(6);
    let (mut written, mut plain) = (Vec::new(), Vec::new());
    for stored in read_tensors(&dense.path().join(WEIGHTS)) {
        let module = stored.0.strip_suffix(".weight").filter(|name| name.ends_with("_proj") || name.ends_with("_mqa"));
        let (Some(module), &[rows, columns]) = (module, &stored.2[..]) else {
            written.push(stored.clone());
            plain.push(stored);
            continue;
        };
        let (parts, values) = coded(module, (rows, columns), form, &mut random);
        written.extend(parts);
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        plain.push((stored.0, Dtype::F32, stored.2, bytes));
    }
    write_tensors(&quantised.path().join(WEIGHTS), &written);
    write_tensors(&dense.path().join(WEIGHTS), &plain);
    change_config(quantised.path(), method);
    (quantised, dense)
}

fn change_config(dir: &Path, method: Value) {
    let path = dir.join(CONFIG);
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    config["quantization_config"] = method;
    std::fs::write(&path, config.to_string()).unwrap();
}

fn deepseek() -> Value {
    json!({ "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic" })
}

fn compressed(format: &str, weights: Value) -> Value {
    let group = json!({ "targets": ["Linear"], "weights": weights });
    json!({ "quant_method": "compressed-tensors", "format": format, "config_groups": { "group_0": group }, "ignore": ["lm_head"] })
}

/// Two models that compute the same.
fn assert_same(quantised: &Path, dense: &Path, name: &str) {
    let model = load(quantised).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert!(bits(&model) == bits(&load(dense).unwrap()), "{name}: other values");
    // What is written afterwards is a plain model.
    let again = saved(&model, ALL_IN_ONE);
    assert!(!std::fs::read_to_string(again.path().join(CONFIG)).unwrap().contains("quantization"), "{name}");
    assert!(bits(&load(again.path()).unwrap()) == bits(&model), "{name}");
}

#[test]
fn a_checkpoint_of_deepseek_is_read_whatever_its_scales_are_written_in() {
    for scales in [Dtype::F32, Dtype::BF16, Dtype::F8_E8M0, Dtype::U8] {
        for scale in ["weight_scale_inv", "weight_scale"] {
            let (quantised, dense) = both(Form { scales, scale, ..FP8 }, deepseek());
            assert_same(quantised.path(), dense.path(), &format!("{scale} {scales:?}"));
        }
    }
}

#[test]
fn each_form_of_compressed_tensors_is_read() {
    let form = Form { scale: "weight_scale", scales: Dtype::BF16, ..FP8 };
    let row = (1, 0);
    for (name, form, format, weights) in [
        (
            "8-bit floats, a scale for each row",
            Form { block: row, ..form },
            "float-quantized",
            json!({ "num_bits": 8, "type": "float", "strategy": "channel" }),
        ),
        (
            "8-bit floats, one scale",
            Form { block: (0, 0), scales: Dtype::F32, ..form },
            "float-quantized",
            json!({ "num_bits": 8, "type": "float", "strategy": "tensor" }),
        ),
        (
            "8-bit floats in blocks",
            Form { block: (128, 64), ..form },
            "float-quantized",
            json!({ "num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 64] }),
        ),
        (
            "bytes with zeros",
            Form { codes: Codes::Int8, block: row, zeros: true, ..form },
            "int-quantized",
            json!({ "num_bits": 8, "type": "int", "strategy": "channel", "symmetric": false }),
        ),
        (
            "packed bytes",
            Form { codes: Codes::Packed(8), block: row, ..form },
            "pack-quantized",
            json!({ "num_bits": 8, "type": "int", "strategy": "channel" }),
        ),
        (
            "four bits in groups with zeros",
            Form { codes: Codes::Packed(4), block: (1, 8), zeros: true, ..form },
            "pack-quantized",
            json!({ "num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": false }),
        ),
        (
            "four bits in groups that a table deals",
            Form { codes: Codes::Packed(4), block: (1, 8), ordered: true, ..form },
            "pack-quantized",
            json!({ "num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "actorder": "group" }),
        ),
    ] {
        let (quantised, dense) = both(form, compressed(format, weights));
        assert_same(quantised.path(), dense.path(), name);
    }
}

const O: &str = "model.layers.1.self_attn.o_proj";

/// Why a DeepSeek checkpoint is refused after a change to its tensors, which are sorted by name.
fn refusal(change: impl FnOnce(&mut Vec<Stored>)) -> String {
    refusal_of(FP8, deepseek(), change)
}

fn refusal_of(form: Form, method: Value, change: impl FnOnce(&mut Vec<Stored>)) -> String {
    let (dir, _dense) = both(form, method);
    let path = dir.path().join(WEIGHTS);
    let mut tensors = read_tensors(&path);
    change(&mut tensors);
    write_tensors(&path, &tensors);
    load_error(dir.path()).to_string()
}

fn part<'a>(tensors: &'a mut [Stored], name: &str) -> &'a mut Stored {
    let name = format!("{O}.{name}");
    tensors.iter_mut().find(|stored| stored.0 == name).unwrap()
}

fn number(name: &str, values: &[f32]) -> Stored {
    (name.to_owned(), Dtype::F32, vec![values.len()], values.iter().flat_map(|x| x.to_le_bytes()).collect())
}

#[test]
fn what_a_scale_lacks_is_an_error_that_names_the_tensor() {
    let missing = refusal(|tensors| tensors.retain(|stored| stored.0 != format!("{O}.weight_scale_inv")));
    assert!(
        missing.contains(&format!("tensor {O}.weight has no scale: there is no {O}.weight_scale_inv")),
        "{missing}"
    );
    let turned = refusal(|tensors| part(tensors, "weight_scale_inv").2.push(1));
    assert!(turned.contains(&format!("{O}.weight_scale_inv of shape [2, 2, 1]; expected [2, 2]")), "{turned}");
    let scale = |value: f32| {
        let why = refusal(|tensors| part(tensors, "weight_scale_inv").3[..4].copy_from_slice(&value.to_le_bytes()));
        assert!(why.contains(&format!("tensor {O}.weight ")), "{why}");
        why
    };
    assert!(scale(f32::NAN).contains("a scale that is NaN, at place 0"));
    assert!(scale(f32::INFINITY).contains("a scale that is inf"));
    assert!(scale(f32::MAX).contains("too large for 32 bits"));
    let integers = refusal(|tensors| part(tensors, "weight_scale_inv").1 = Dtype::I32);
    assert!(integers.contains("a scale of I32"), "{integers}");
    // A scale of what is stored plainly is nothing that the model knows.
    let name = "model.norm.weight_scale_inv";
    let unmatched = refusal(|tensors| tensors.push(number(name, &[1.0])));
    assert!(unmatched.contains("unexpected (1)") && unmatched.contains(name), "{unmatched}");
}

#[test]
fn codes_that_cannot_be_read_are_an_error_that_names_the_tensor() {
    for code in [0x7f, 0xff] {
        let why = refusal(|tensors| part(tensors, "weight").3[161] = code);
        assert!(
            why.contains(&format!("tensor {O}.weight holds a code that is no number (NaN) in row 1, column 1")),
            "{why}"
        );
    }
    let why = refusal(|tensors| part(tensors, "weight").1 = Dtype::I8);
    assert!(why.contains(&format!("tensor {O}.weight is stored as I8 [192, 160], which is no form")), "{why}");
    let why = refusal(|tensors| part(tensors, "weight").2 = vec![192 * 160]);
    assert!(why.contains(&format!("tensor {O}.weight has shape [30720]: only matrices")), "{why}");

    let form =
        Form { codes: Codes::Packed(4), block: (1, 8), scale: "weight_scale", zeros: true, ordered: true, ..FP8 };
    let method = json!({ "num_bits": 4, "type": "int", "strategy": "group", "group_size": 8 });
    let refusal = |change: &dyn Fn(&mut Vec<Stored>)| {
        let why = refusal_of(form, compressed("pack-quantized", method.clone()), change);
        assert!(why.contains(O), "{why}");
        why
    };
    let shapeless = refusal(&|tensors| tensors.retain(|stored| stored.0 != format!("{O}.weight_shape")));
    assert!(shapeless.contains("has no model.layers.1.self_attn.o_proj.weight_shape beside it"), "{shapeless}");
    let claim = |rows: i64, columns: i64| {
        refusal(&|tensors| {
            part(tensors, "weight_shape").3 = [rows, columns].iter().flat_map(|n| n.to_le_bytes()).collect();
        })
    };
    assert!(claim(192, i64::MAX).contains("which is no form"));
    assert!(claim(-1, 160).contains("not two whole numbers"));
    // As many words as the files have, and another matrix.
    assert!(claim(192, 153).contains("expected I32 [153]"));
    assert!(refusal(&|tensors| part(tensors, "weight_g_idx").3[0] = 20).contains("column of group 20 in weight_g_idx"));
    assert!(refusal(&|tensors| part(tensors, "weight_g_idx").2 = vec![1, 160]).contains("expected I32 [160]"));
    assert!(refusal(&|tensors| part(tensors, "weight_zero_point").2 = vec![20, 24]).contains("does not fit its scale"));
    let both = refusal(&|tensors| tensors.push(number(&format!("{O}.weight"), &[1.0])));
    assert!(both.contains("both plain and packed"), "{both}");
}

#[test]
fn columns_whose_groups_are_not_dealt_stand_in_order() {
    let form = Form { codes: Codes::Packed(4), block: (1, 8), scale: "weight_scale", ..FP8 };
    let method = json!({ "num_bits": 4, "type": "int", "strategy": "group", "group_size": 8 });
    let (quantised, dense) = both(form, compressed("pack-quantized", method));
    let path = quantised.path().join(WEIGHTS);
    let mut tensors = read_tensors(&path);
    tensors.push((format!("{O}.weight_g_idx"), Dtype::I32, vec![160], [0xff; 640].to_vec()));
    // What is said of activations is of no use here.
    tensors.push(number(&format!("{O}.input_scale"), &[0.5]));
    write_tensors(&path, &tensors);
    assert_same(quantised.path(), dense.path(), "no order");
}

#[test]
fn pickled_weights_are_not_opened() {
    let dir = saved(&model(1), ALL_IN_ONE);
    std::fs::rename(dir.path().join(WEIGHTS), dir.path().join("pytorch_model-00001-of-00002.bin")).unwrap();
    std::fs::write(dir.path().join("optimizer.bin"), "").unwrap();
    let why = load_error(dir.path()).to_string();
    assert!(why.contains("pytorch_model-00001-of-00002.bin alone") && why.contains("save_pretrained"), "{why}");
    let index = json!({ "weight_map": { "lm_head.weight": "weights.bin" } });
    std::fs::write(dir.path().join(INDEX), index.to_string()).unwrap();
    let why = load_error(dir.path()).to_string();
    assert!(why.contains("names weights.bin") && why.contains("a pickle is a program"), "{why}");
    std::fs::remove_file(dir.path().join(INDEX)).unwrap();
    std::fs::remove_file(dir.path().join("pytorch_model-00001-of-00002.bin")).unwrap();
    let why = load_error(dir.path()).to_string();
    assert!(why.contains("needs one of them"), "{why}");
}
