//! Safetensors files, alone and in shards with an index.

use std::path::Path;

use lowkey_model::checkpoint::WeightDtype;
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

use crate::driver::{Entry, Input, Target};
use crate::models::{MODEL, config, json_limit, llama, load, saved, yarn};
use crate::mutate::{self, below, number, once_in, one_of, weird};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

const DTYPES: [&str; 18] = [
    "F32", "BF16", "F16", "F64", "I64", "U64", "I32", "U8", "I8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "F6_E2M3", "C64",
    "", "f32", "F128",
];

/// Bits of a value of the formats that the shape attack keeps consistent.
fn bits(dtype: &str) -> u128 {
    match dtype {
        "F64" | "I64" | "U64" | "C64" => 64,
        "F32" | "I32" => 32,
        "BF16" | "F16" => 16,
        "F4" => 4,
        "F6_E2M3" => 6,
        _ => 8,
    }
}

/// The header and the values of a well-formed file.
fn open(file: &[u8]) -> Option<(Map<String, Value>, Vec<u8>)> {
    let len = usize::try_from(u64::from_le_bytes(*file.first_chunk()?)).ok()?;
    let header = file.get(8..8 + len)?;
    Some((serde_json::from_slice(header).ok()?, file[8 + len..].to_vec()))
}

fn close(header: &[u8], values: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, values].concat()
}

/// Changes tensors in a way that leaves the file well-formed: only what the model asks for can be violated.
fn rearrange(header: &mut Map<String, Value>, values: &mut Vec<u8>, random: &mut ChaCha8Rng) {
    for _ in 0..one_of(random, &[0, 1, 1, 2]) {
        let names: Vec<String> = header.keys().filter(|name| *name != "__metadata__").cloned().collect();
        if names.is_empty() {
            return;
        }
        let name = one_of(random, &names);
        match below(random, 7) {
            0 => drop(header.shift_remove(&name)),
            1 | 2 => {
                let part = |i: u64| format!("model.layers.{i}.self_attn.o_proj.weight");
                let other = match below(random, 4) {
                    0 => part(number(random)),
                    1 => "lm_head.weight".to_string(),
                    2 => name.replace(".0.", ".1."),
                    _ => mutate_name(&name, random),
                };
                let info = header.get(&name).cloned().unwrap_or_default();
                if once_in(random, 2) {
                    header.shift_remove(&name);
                }
                header.insert(other, info);
            }
            3 => header[&name]["dtype"] = one_of(random, &DTYPES).into(),
            4 => {
                let shape: Vec<u64> = (0..below(random, 5)).map(|_| one_of(random, &[0, 1, 1, 2, 3, 8, 20])).collect();
                header[&name]["shape"] = shape.into();
            }
            5 => {
                if let Some(shape) = header[&name]["shape"].as_array_mut() {
                    shape.reverse();
                }
            }
            // Nothing in it, and yet far too large.
            _ => header[&name]["shape"] = json!([0, number(random)]),
        }
    }
    // Offsets that fit, in the order of the header.
    let mut end = 0u128;
    for (name, info) in header.iter_mut().filter(|(name, _)| *name != "__metadata__") {
        let count: u128 = info["shape"]
            .as_array()
            .map_or(0, |shape| shape.iter().map(|n| u128::from(n.as_u64().unwrap_or(0))).fold(1, u128::saturating_mul));
        let size = count.saturating_mul(bits(info["dtype"].as_str().unwrap_or(name))) / 8;
        let start = end;
        end = end.saturating_add(size);
        info["data_offsets"] = json!([start as u64, end as u64]);
    }
    if end < 1 << 20 {
        values.resize(end as usize, 0x3c);
    }
}

fn mutate_name(name: &str, random: &mut ChaCha8Rng) -> String {
    let mut bytes = name.as_bytes().to_vec();
    mutate::bytes(&mut bytes, random);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Says something else about one tensor than its bytes do.
fn contradict(header: &mut Map<String, Value>, random: &mut ChaCha8Rng) {
    let at = below(random, header.len());
    let other = below(random, header.len());
    let other = header.values().nth(other).cloned().unwrap_or_default();
    let Some(info) = header.values_mut().nth(at).and_then(Value::as_object_mut) else { return };
    match below(random, 6) {
        0 => {
            let offsets = [number(random), number(random)];
            info.insert("data_offsets".into(), json!(offsets));
        }
        1 => drop(info.insert("data_offsets".into(), other["data_offsets"].clone())),
        2 => {
            // A product that overflows, to something small if no one looks.
            let shape = one_of(
                random,
                &[[1 << 32, 1 << 32], [u64::MAX, u64::MAX], [1 << 63, 2], [u64::MAX, 0], [0, u64::MAX], [1 << 61, 8]],
            );
            info.insert("shape".into(), json!(shape));
        }
        3 => drop(info.insert("shape".into(), weird(random))),
        4 => drop(info.insert("dtype".into(), one_of(random, &DTYPES).into())),
        _ => {
            let shift = number(random);
            for offset in info.get_mut("data_offsets").and_then(Value::as_array_mut).into_iter().flatten() {
                *offset = offset.as_u64().unwrap_or(0).wrapping_add(shift).into();
            }
        }
    }
}

pub(crate) fn damage_weights(file: &mut Vec<u8>, random: &mut ChaCha8Rng) {
    let Some((mut header, mut values)) = open(file) else { return mutate::bytes(file, random) };
    match below(random, 14) {
        0 => mutate::bytes(file, random),
        1 => {
            let any = number(random);
            let len = one_of(random, &[any, file.len() as u64, file.len() as u64 - 8, 100_000_000, 0]);
            file.splice(0..8, len.to_le_bytes());
        }
        2 => {
            let mut header = Value::Object(header).to_string().into_bytes();
            mutate::bytes(&mut header, random);
            *file = close(&header, &values);
        }
        3 | 4 => {
            let mut header = Value::Object(header);
            mutate::value(&mut header, &[], random);
            *file = close(&mutate::text(&header, random), &values);
        }
        5 | 6 => {
            contradict(&mut header, random);
            *file = close(Value::Object(header).to_string().as_bytes(), &values);
        }
        7 => {
            // As much header as a file can have for its size.
            let many = one_of(random, &[10, 300, 5000]);
            let end = values.len();
            header.extend(
                (0..many).map(|i| (i.to_string(), json!({"dtype": "F32", "shape": [0], "data_offsets": [end, end]}))),
            );
            *file = close(Value::Object(header).to_string().as_bytes(), &values);
        }
        _ => {
            rearrange(&mut header, &mut values, random);
            *file = close(Value::Object(header).to_string().as_bytes(), &values);
        }
    }
}

/// `CausalLm::load` of one weight file.
pub(crate) struct Single;

impl Target for Single {
    fn name(&self) -> &'static str {
        "weights"
    }

    fn seeds(&self) -> Vec<Input> {
        vec![
            saved(&config(json!({})), WeightDtype::F32, usize::MAX),
            saved(&config(yarn()), WeightDtype::Bf16, usize::MAX),
            saved(&config(llama()), WeightDtype::F16, usize::MAX),
        ]
    }

    fn main_file(&self) -> &'static str {
        SINGLE
    }

    fn damage(&self, input: &mut Input, random: &mut ChaCha8Rng) {
        if let Some(Entry::File(file)) = input.get_mut(SINGLE) {
            damage_weights(file, random);
        }
    }

    fn read(&self, dir: &Path) -> Result<(), String> {
        load(dir)
    }

    fn is_deep(&self, refusal: &str) -> bool {
        !refusal.contains("not a readable safetensors file")
    }

    /// Half formats double as f32. A tensor of the header, of fifty bytes at least, becomes entries in two tables, a name in
    /// two more and a list of sizes.
    fn limit(&self, bytes: usize) -> usize {
        MODEL + 24 * bytes
    }

    fn inputs(&self) -> u64 {
        20_000
    }
}

/// `CausalLm::load` of weights of 8 and 4 bits.
pub(crate) struct Quantised;

/// The saved model with its maps as codes, each with a scale for a row: floats of 8 bits, or four bits packed in words.
fn coded(packed: bool) -> Input {
    let group = json!({ "targets": ["Linear"], "weights": { "num_bits": if packed { 4 } else { 8 },
                        "type": if packed { "int" } else { "float" }, "strategy": "channel" } });
    let method = json!({ "quant_method": "compressed-tensors", "format": if packed { "pack-quantized" } else { "float-quantized" },
                         "config_groups": { "group_0": group }, "ignore": ["lm_head"] });
    let mut input = saved(&config(json!({ "quantization_config": null })), WeightDtype::F32, usize::MAX);
    let Some(Entry::File(file)) = input.get_mut("config.json") else { panic!("no config.json") };
    let mut keys: Value = serde_json::from_slice(file).unwrap();
    keys["quantization_config"] = method;
    *file = keys.to_string().into_bytes();
    let Some(Entry::File(file)) = input.get_mut(SINGLE) else { panic!("no weights") };
    let (header, values) = open(file).unwrap();
    let (mut new, mut bytes) = (Map::new(), Vec::new());
    let mut add = |name: String, dtype: &str, shape: Value, data: &[u8]| {
        let start = bytes.len();
        bytes.extend_from_slice(data);
        new.insert(name, json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, bytes.len()] }));
    };
    for (name, info) in header.iter().filter(|(name, _)| *name != "__metadata__") {
        let at = |i: usize| info["data_offsets"][i].as_u64().unwrap() as usize;
        let Some(module) = name.strip_suffix(".weight").filter(|module| module.contains("proj")) else {
            add(name.clone(), "F32", info["shape"].clone(), &values[at(0)..at(1)]);
            continue;
        };
        let size = |i: usize| info["shape"][i].as_u64().unwrap() as usize;
        let (rows, columns) = (size(0), size(1));
        if packed {
            let words = columns.div_ceil(8);
            add(format!("{module}.weight_packed"), "I32", json!([rows, words]), &vec![0x5a; rows * words * 4]);
            let shape: Vec<u8> = [rows as u64, columns as u64].iter().flat_map(|n| n.to_le_bytes()).collect();
            add(format!("{module}.weight_shape"), "I64", json!([2]), &shape);
        } else {
            add(name.clone(), "F8_E4M3", info["shape"].clone(), &vec![0x31; rows * columns]);
        }
        add(format!("{module}.weight_scale"), "BF16", json!([rows, 1]), &vec![0x3c; rows * 2]);
    }
    *file = close(Value::Object(new).to_string().as_bytes(), &bytes);
    input
}

impl Target for Quantised {
    fn name(&self) -> &'static str {
        "quantised"
    }

    fn seeds(&self) -> Vec<Input> {
        vec![coded(false), coded(true)]
    }

    fn main_file(&self) -> &'static str {
        SINGLE
    }

    fn damage(&self, input: &mut Input, random: &mut ChaCha8Rng) {
        if once_in(random, 3)
            && let Some(Entry::File(file)) = input.get_mut("config.json")
        {
            let mut keys: Value = serde_json::from_slice(file).unwrap();
            let known =
                [json!("group"), json!("tensor"), json!(8), json!("int-quantized"), json!([128, 128]), json!("fp8")];
            mutate::value(&mut keys["quantization_config"], &known, random);
            *file = keys.to_string().into_bytes();
            return;
        }
        if let Some(Entry::File(file)) = input.get_mut(SINGLE) {
            // The shape that a packed matrix claims, among other bytes.
            if once_in(random, 3)
                && let Some((header, mut values)) = open(file)
            {
                mutate::bytes(&mut values, random);
                *file = close(Value::Object(header).to_string().as_bytes(), &values);
            } else {
                damage_weights(file, random);
            }
        }
    }

    fn read(&self, dir: &Path) -> Result<(), String> {
        load(dir)
    }

    fn is_deep(&self, refusal: &str) -> bool {
        !refusal.contains("not a readable safetensors file")
    }

    /// Four bits become 32. Names are put together for the parts of each matrix.
    fn limit(&self, bytes: usize) -> usize {
        MODEL + json_limit(bytes)
    }

    fn inputs(&self) -> u64 {
        10_000
    }
}

/// `CausalLm::load` of shards, from the index on.
pub(crate) struct Index;

const NAMES: [&str; 22] = [
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00009-of-00003.safetensors",
    SINGLE,
    INDEX,
    "config.json",
    "absent",
    "",
    ".",
    "..",
    "/",
    "../config.json",
    "../../../../../../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "./config.json",
    "config.json/",
    "config.json/x",
    "folder",
    "loop",
    "a\u{0}b",
    "*",
];

impl Target for Index {
    fn name(&self) -> &'static str {
        "index"
    }

    fn seeds(&self) -> Vec<Input> {
        vec![saved(&config(json!({})), WeightDtype::F32, 2500), saved(&config(yarn()), WeightDtype::Bf16, 2000)]
    }

    fn main_file(&self) -> &'static str {
        INDEX
    }

    fn damage(&self, input: &mut Input, random: &mut ChaCha8Rng) {
        let shards: Vec<String> = input.keys().filter(|name| name.contains("-of-")).cloned().collect();
        let long = "x".repeat(5000);
        let mut names: Vec<Value> = NAMES.iter().map(|name| (*name).into()).collect();
        names.push(long.into());
        if once_in(random, 3) {
            let shard = one_of(random, &shards);
            let other = input.get(&one_of(random, &shards)).cloned();
            match below(random, 9) {
                0 => drop(input.remove(&shard)),
                1 => drop(input.insert(shard, Entry::Folder)),
                2 => drop(input.insert(shard.clone(), Entry::Link(shard))),
                3 => {
                    // Two links that point at each other.
                    input.insert(shard.clone(), Entry::Link("loop".into()));
                    input.insert("loop".into(), Entry::Link(shard));
                }
                4 => drop(input.insert(shard, Entry::Link("/dev/zero".into()))),
                5 => drop(input.insert(shard, Entry::Link(one_of(random, &NAMES[3..6]).into()))),
                6 => drop(input.insert(INDEX.into(), Entry::Link(shard))),
                7 => input.extend(other.map(|other| (shard, other))),
                _ => {
                    if let Some(Entry::File(file)) = input.get_mut(&shard) {
                        damage_weights(file, random);
                    }
                }
            }
            if once_in(random, 2) {
                return;
            }
        }
        if once_in(random, 20) {
            let entry = one_of(random, &[Entry::Folder, Entry::Link(SINGLE.into()), Entry::Link("config.json".into())]);
            let name = one_of(random, &[SINGLE, "folder", "absent"]);
            input.insert(name.into(), entry);
        }
        if let Some(Entry::File(file)) = input.get_mut(INDEX) {
            let parsed: Result<Value, _> = serde_json::from_slice(file);
            match parsed {
                // One shard under another name, all over the map or for one tensor.
                Ok(mut index) if once_in(random, 2) => {
                    let all = once_in(random, 2);
                    let files = index["weight_map"].as_object_mut().unwrap();
                    let at = below(random, files.len());
                    let old = files.values().nth(at).cloned();
                    let new = one_of(random, &names);
                    for (i, file) in files.values_mut().enumerate() {
                        if i == at || all && Some(&*file) == old.as_ref() {
                            *file = new.clone();
                        }
                    }
                    *file = index.to_string().into_bytes();
                }
                _ => mutate::json(file, &names, random),
            }
        }
    }

    fn read(&self, dir: &Path) -> Result<(), String> {
        load(dir)
    }

    fn is_deep(&self, refusal: &str) -> bool {
        !refusal.contains("not valid JSON")
    }

    fn limit(&self, bytes: usize) -> usize {
        MODEL + json_limit(bytes)
    }

    fn inputs(&self) -> u64 {
        20_000
    }
}
