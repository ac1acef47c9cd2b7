//! `quantization_config` of `config.json`: in which ways the matrices of a checkpoint may be stored.
//!
//! Three methods are read: `fp8`, the one of DeepSeek's own files (8-bit floats in blocks of 128×128 with a scale each), and
//! `compressed-tensors`, that of llm-compressor (8-bit floats, and integers of 8 or 4 bits), and of `bitsandbytes` nf4. What is read
//! becomes f32.

use std::path::Path;

use lowkey_files::read_text;
use serde_json::{Map, Value};

use super::nf4;
use crate::error::{Error, Result, shortened};
use crate::hf_config::LARGEST;

const KEY: &str = "quantization_config";

const KNOWN: &str = "fp8, compressed-tensors and bitsandbytes";

/// More kinds of layers than any model has.
const MOST_GROUPS: usize = 1000;

/// The ways in which a matrix may be stored; none where the weights are plain numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Quantisation {
    pub(super) schemes: Vec<Scheme>,
}

/// One way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Scheme {
    pub(super) codes: Codes,
    pub(super) grain: Grain,
}

/// What stands for a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Codes {
    /// A byte: sign, four bits of exponent, three of mantissa, no infinities.
    E4m3,
    /// A signed byte.
    Int8,
    /// Half a byte: one of 16 levels of bitsandbytes.
    Nf4,
    /// So many bits of a 32-bit word, the lowest first, each number raised by half their range.
    Packed(u32),
}

/// Which numbers share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Grain {
    /// All.
    Tensor,
    /// A row.
    Row,
    /// So many neighbours of a row.
    Group(usize),
    /// So many rows and columns.
    Block(usize, usize),
}

impl Grain {
    /// Rows and columns that share a scale in a matrix of this shape; 1 at least.
    pub(super) fn block(self, rows: usize, columns: usize) -> (usize, usize) {
        let (r, c) = match self {
            Self::Tensor => (rows, columns),
            Self::Row => (1, columns),
            Self::Group(size) => (1, size),
            Self::Block(r, c) => (r, c),
        };
        (r.max(1), c.max(1))
    }
}

impl Quantisation {
    /// What the `config.json` of a model directory says; none where it has no such file.
    ///
    /// # Errors
    /// [`Error::File`] where it cannot be read, or asks for what is not read here.
    pub(crate) fn of_directory(dir: &Path) -> Result<Self> {
        let path = dir.join(super::CONFIG);
        if path.symlink_metadata().is_err() {
            return Ok(Self::default());
        }
        let text = read_text(&path, LARGEST)?;
        match serde_json::from_str(&text).map_err(|e| Error::file(&path, format!("not valid JSON: {e}")))? {
            Value::Object(map) => Self::of_config(&map).map_err(|e| Error::file(&path, e.to_string())),
            _ => Err(Error::file(&path, "must hold a JSON object")),
        }
    }

    /// What a `config.json` object says.
    ///
    /// # Errors
    /// [`Error::Config`] for a method, a format or a key that is not understood.
    pub(crate) fn of_config(map: &Map<String, Value>) -> Result<Self> {
        let Some(found) = map.get(KEY).filter(|value| !value.is_null()) else { return Ok(Self::default()) };
        let refuse = |why: String| {
            let mend = "convert it to bf16, f16 or f32 first";
            Error::config(KEY, found, format!("such quantised weights are not read: {}; {mend}", shortened(why)))
        };
        let schemes = match found.get("quant_method").and_then(Value::as_str) {
            Some("fp8") => fp8(found),
            Some("compressed-tensors") => compressed(found),
            // What is packed says so beside its codes.
            Some("bitsandbytes") if nf4::is_read(found) => Ok(Vec::new()),
            Some("bitsandbytes") => Err("of bitsandbytes nf4 alone is known".to_owned()),
            Some(other) => Err(format!("quant_method = {other:?}, and known are {KNOWN}")),
            None => Err(format!("quant_method is missing, and known are {KNOWN}")),
        };
        Ok(Self { schemes: schemes.map_err(refuse)? })
    }
}

/// A key's value; null counts as absent.
fn get<'a>(object: &'a Value, key: &str) -> Option<&'a Value> {
    object.get(key).filter(|value| !value.is_null())
}

/// Two whole numbers of rows and columns.
fn block(value: &Value) -> Option<Grain> {
    let [rows, columns] = &value.as_array()?[..] else { return None };
    let size = |n: &Value| usize::try_from(n.as_u64()?).ok().filter(|n| *n > 0);
    Some(Grain::Block(size(rows)?, size(columns)?))
}

/// The keys of DeepSeek's files. Without blocks there is one scale for a matrix, or one for each of its rows.
fn fp8(config: &Value) -> std::result::Result<Vec<Scheme>, String> {
    if let Some(format) = get(config, "fmt")
        && format != "e4m3"
    {
        return Err(format!("fmt = {format}, and known is e4m3"));
    }
    let grains = match get(config, "weight_block_size") {
        None => vec![Grain::Tensor, Grain::Row],
        Some(size) => {
            vec![block(size).ok_or_else(|| format!("weight_block_size = {size} is no list of two whole numbers"))?]
        }
    };
    Ok(grains.into_iter().map(|grain| Scheme { codes: Codes::E4m3, grain }).collect())
}

/// The keys of compressed-tensors: each group of layers has its own way. Which layers a group has is not looked at: what a tensor and
/// its scale look like tells the same.
fn compressed(config: &Value) -> std::result::Result<Vec<Scheme>, String> {
    if let Some(sparsity) = get(config, "sparsity_config").and_then(|sparsity| get(sparsity, "format"))
        && sparsity != "dense"
    {
        return Err(format!("sparsity_config.format = {sparsity}, and only dense matrices are read"));
    }
    let groups = get(config, "config_groups").and_then(Value::as_object).ok_or("config_groups is no object")?;
    if groups.len() > MOST_GROUPS {
        return Err(format!("config_groups has more than {MOST_GROUPS} groups"));
    }
    let mut schemes = Vec::new();
    for (name, group) in groups {
        let Some(weights) = get(group, "weights") else { continue };
        let format = get(group, "format").or(get(config, "format"));
        let scheme = scheme(weights, format).map_err(|why| format!("config_groups.{name}: {why}"))?;
        if !schemes.contains(&scheme) {
            schemes.push(scheme);
        }
    }
    match schemes.is_empty() {
        true => Err("config_groups says nothing of weights".to_owned()),
        false => Ok(schemes),
    }
}

fn scheme(weights: &Value, format: Option<&Value>) -> std::result::Result<Scheme, String> {
    let format = format.map_or(Some("naive-quantized"), Value::as_str).unwrap_or_default();
    let kind = get(weights, "type").and_then(Value::as_str).unwrap_or("int");
    let bits = get(weights, "num_bits").map_or(Some(8), Value::as_u64);
    let codes = match (format, kind, bits) {
        ("float-quantized" | "naive-quantized", "float", Some(8)) => Codes::E4m3,
        ("int-quantized" | "naive-quantized", "int", Some(8)) => Codes::Int8,
        ("pack-quantized", "int", Some(bits @ (4 | 8))) => Codes::Packed(bits as u32),
        _ => {
            let bits = get(weights, "num_bits").map_or_else(|| "8".to_owned(), Value::to_string);
            return Err(format!("{bits} bits of type {kind} in the format {format:?}"));
        }
    };
    let size = get(weights, "group_size").and_then(Value::as_i64);
    let strategy = match get(weights, "strategy") {
        Some(strategy) => strategy.as_str().unwrap_or_default(),
        None if size.is_some_and(|size| size > 0) => "group",
        None if size == Some(-1) => "channel",
        None => "tensor",
    };
    let grain = match strategy {
        "tensor" => Some(Grain::Tensor),
        "channel" => Some(Grain::Row),
        "group" => size.and_then(|size| usize::try_from(size).ok()).filter(|size| *size > 0).map(Grain::Group),
        "block" => get(weights, "block_structure").and_then(block),
        _ => None,
    };
    let grain = grain.ok_or_else(|| format!("strategy {strategy:?} with group_size or block_structure as they are"))?;
    Ok(Scheme { codes, grain })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(config: Value) -> Result<Vec<Scheme>> {
        let Value::Object(map) = json!({ "quantization_config": config }) else { unreachable!() };
        Quantisation::of_config(&map).map(|found| found.schemes)
    }

    fn group(weights: Value) -> Value {
        json!({ "targets": ["Linear"], "weights": weights, "input_activations": null })
    }

    #[test]
    fn each_published_form_is_understood() {
        let deepseek = json!({ "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
                               "weight_block_size": [128, 128] });
        assert_eq!(read(deepseek).unwrap(), [Scheme { codes: Codes::E4m3, grain: Grain::Block(128, 128) }]);
        let whole = [Grain::Tensor, Grain::Row].map(|grain| Scheme { codes: Codes::E4m3, grain });
        assert_eq!(read(json!({ "quant_method": "fp8", "weight_block_size": null })).unwrap(), whole);
        for (format, weights, codes, grain) in [
            (
                "pack-quantized",
                json!({ "num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": true }),
                Codes::Packed(4),
                Grain::Group(128),
            ),
            (
                "pack-quantized",
                json!({ "num_bits": 8, "type": "int", "strategy": "channel" }),
                Codes::Packed(8),
                Grain::Row,
            ),
            ("int-quantized", json!({ "num_bits": 8, "type": "int", "strategy": "channel" }), Codes::Int8, Grain::Row),
            (
                "float-quantized",
                json!({ "num_bits": 8, "type": "float", "strategy": "tensor" }),
                Codes::E4m3,
                Grain::Tensor,
            ),
            (
                "float-quantized",
                json!({ "num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 64] }),
                Codes::E4m3,
                Grain::Block(128, 64),
            ),
            ("naive-quantized", json!({ "num_bits": 8, "type": "float", "group_size": -1 }), Codes::E4m3, Grain::Row),
        ] {
            let config = json!({ "quant_method": "compressed-tensors", "format": format,
                                 "config_groups": { "group_0": group(weights.clone()), "group_1": group(weights.clone()) } });
            assert_eq!(read(config).unwrap(), [Scheme { codes, grain }], "{format} {weights}");
        }
        let own = json!({ "quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": { "a": {
            "weights": { "num_bits": 8, "type": "int", "strategy": "channel" }, "format": "int-quantized" } } });
        assert_eq!(read(own).unwrap(), [Scheme { codes: Codes::Int8, grain: Grain::Row }]);
        assert_eq!(read(Value::Null).unwrap(), []);
    }

    #[test]
    fn what_is_not_understood_is_refused_with_its_key() {
        let compressed = |format: &str, weights: Value| json!({ "quant_method": "compressed-tensors", "format": format, "config_groups": { "group_0": group(weights) } });
        for (config, word) in [
            (json!({}), "quant_method is missing"),
            (json!({ "quant_method": "gptq", "bits": 4 }), "quant_method = \"gptq\""),
            (json!({ "quant_method": "fp8", "fmt": "e5m2" }), "fmt = \"e5m2\""),
            (json!({ "quant_method": "fp8", "weight_block_size": [128, 0] }), "weight_block_size = [128,0]"),
            (json!({ "quant_method": "fp8", "weight_block_size": 128 }), "weight_block_size = 128"),
            (json!({ "quant_method": "compressed-tensors" }), "config_groups is no object"),
            (
                json!({ "quant_method": "compressed-tensors", "config_groups": { "W8A8": ["Linear"] } }),
                "says nothing of weights",
            ),
            (
                compressed("nvfp4-pack-quantized", json!({ "num_bits": 4, "type": "float" })),
                "group_0: 4 bits of type float",
            ),
            (
                compressed("pack-quantized", json!({ "num_bits": 3, "type": "int", "strategy": "channel" })),
                "3 bits of type int",
            ),
            (
                compressed("pack-quantized", json!({ "num_bits": 4, "type": "int", "strategy": "group" })),
                "strategy \"group\"",
            ),
            (compressed("int-quantized", json!({ "num_bits": 8, "strategy": "token" })), "strategy \"token\""),
            (
                json!({ "quant_method": "compressed-tensors", "sparsity_config": { "format": "sparse-24-bitmask" } }),
                "sparse-24",
            ),
        ] {
            let why = read(config.clone()).unwrap_err().to_string();
            assert!(why.contains("model.quantization_config") && why.contains(word), "{config}: {why}");
            assert!(why.contains("convert it to bf16"), "{why}");
        }
    }
}
