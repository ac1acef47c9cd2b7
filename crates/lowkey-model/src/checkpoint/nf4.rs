//! Matrices in 4 bits as bitsandbytes stores them. Of a matrix `P.weight` there are its codes under that name, `P.weight.absmax` (the
//! scales), `P.weight.quant_map` (the levels) and `P.weight.quant_state.bitsandbytes__nf4`, JSON that says format and shape.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use lowkey_kernels::quantized_linear::{GROUP, NF4, Packed, Quantization};
use memmap2::Mmap;
use safetensors::Dtype;
use serde::Deserialize;
use serde_json::{Value, json};

use super::quantised::Quantised;
use super::{Entry, Raw, WeightDtype, stored};
use crate::error::{Error, Result};

const STATE: &str = ".quant_state.bitsandbytes__nf4";
const ABSMAX: &str = ".absmax";
const MAP: &str = ".quant_map";

/// Bytes of a description that is read.
const LARGEST_STATE: usize = 1 << 12;

/// Ends of the names of maps that hold no packed matrix; of the others those do not that [`fits`] says no to.
const WHOLE: [&str; 2] = ["lm_head", "kv_b_proj"];

/// Whether bitsandbytes multiplies by a packed matrix of that shape on every processor: on those with AVX512-BF16 it lays rows out by 32 and
/// columns by two (0.50, `_convert_weight_packed_for_cpu`), and stops at the first product where they are not so many.
pub(super) fn fits(shape: &[usize]) -> bool {
    matches!(shape, [d_out, d_in] if d_out.is_multiple_of(32) && d_in.is_multiple_of(2))
}

/// `quantization_config` of such a directory, in which these maps are whole, too. What is not packed has the format `dtype`, which products
/// are computed in, too.
pub(super) fn config(dtype: WeightDtype, whole: &[&str]) -> Value {
    let whole: Vec<&str> = WHOLE.iter().chain(whole).copied().collect();
    json!({
        "quant_method": "bitsandbytes",
        "load_in_4bit": true,
        "load_in_8bit": false,
        "bnb_4bit_quant_type": Quantization::Nf4.name(),
        "bnb_4bit_use_double_quant": false,
        "bnb_4bit_compute_dtype": dtype.name(),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": whole,
        "llm_int8_threshold": 6.0,
    })
}

/// Whether a `quantization_config` is of files that are read here.
pub(crate) fn is_read(config: &Value) -> bool {
    config.get("quant_method").and_then(Value::as_str) == Some("bitsandbytes")
        && config.get("load_in_4bit").and_then(Value::as_bool) == Some(true)
        && config.get("bnb_4bit_quant_type").and_then(Value::as_str) == Some(Quantization::Nf4.name())
}

/// The tensors of a matrix that is packed from numbers of the format `dtype`.
pub(super) fn encode(name: &str, values: &[f32], shape: [usize; 2], dtype: WeightDtype) -> Vec<Raw> {
    let Packed { codes, scales, .. } = Packed::new(values, shape, Quantization::Nf4);
    let little = |numbers: &[f32]| -> Vec<u8> { numbers.iter().flat_map(|x| x.to_le_bytes()).collect() };
    let state = json!({
        "quant_type": Quantization::Nf4.name(),
        "blocksize": GROUP,
        "dtype": dtype.name(),
        "shape": shape,
    });
    let state = state.to_string().into_bytes();
    let raw = |end: &str, dtype, shape, bytes| Raw { name: format!("{name}{end}"), dtype, shape, bytes };
    vec![
        raw("", Dtype::U8, vec![codes.len(), 1], codes),
        raw(ABSMAX, Dtype::F32, vec![scales.len()], little(&scales)),
        raw(MAP, Dtype::F32, vec![NF4.len()], little(&NF4)),
        raw(STATE, Dtype::U8, vec![state.len()], state),
    ]
}

/// What a description says.
#[derive(Deserialize)]
struct State {
    quant_type: String,
    blocksize: usize,
    shape: Vec<usize>,
    /// Of scales that are packed themselves.
    nested_blocksize: Option<usize>,
}

/// Makes one tensor of each packed matrix, of the shape that it has as numbers.
///
/// # Errors
/// [`Error::File`] where one is described as what is not read here, or its tensors do not fit each other.
pub(super) fn settle(tensors: &mut BTreeMap<String, Entry>, files: &[(PathBuf, Mmap)]) -> Result<()> {
    let described: Vec<String> =
        tensors.keys().filter_map(|name| name.strip_suffix(STATE)).map(str::to_string).collect();
    for name in described {
        let mut take = |end: &str| tensors.remove(&format!("{name}{end}"));
        let parts = (take(STATE), take(ABSMAX), take(MAP), tensors.get_mut(&name));
        let (Some(state), Some(absmax), Some(map), Some(codes)) = parts else {
            let path = files.first().map(|(path, _)| path.clone()).unwrap_or_default();
            let why =
                format!("tensor {name} is packed, and one of {ABSMAX}, {MAP} and its codes is missing; save it again");
            return Err(Error::file(path, why));
        };
        let refuse = |why: String| Error::file(&files[state.file].0, format!("tensor {name}{why}"));
        let bytes = |entry: &Entry| &files[entry.file].1[entry.range.clone()];
        let text = Some(bytes(&state)).filter(|text| text.len() <= LARGEST_STATE && state.dtype == Dtype::U8);
        let read = text.and_then(|text| serde_json::from_slice::<State>(text).ok());
        let Some(State { quant_type, blocksize, shape, nested_blocksize }) = read else {
            return Err(refuse(format!("{STATE} is not the JSON of bitsandbytes")));
        };
        if quant_type != Quantization::Nf4.name() || blocksize != GROUP || nested_blocksize.is_some() {
            let why = format!(
                " is packed in another way than nf4 in blocks of {GROUP} with scales of 32 bits \
                 (bnb_4bit_use_double_quant = false); save it so, or in bf16"
            );
            return Err(refuse(why));
        }
        let numbers = match &shape[..] {
            [d_out, d_in] => d_out.checked_mul(*d_in),
            _ => None,
        };
        let fits = numbers.is_some_and(|numbers| {
            codes.dtype == Dtype::U8
                && codes.range.len() == numbers.div_ceil(2)
                && absmax.dtype == Dtype::F32
                && absmax.range.len() == 4 * numbers.div_ceil(GROUP)
        });
        if !fits {
            return Err(refuse(format!(": codes and scales are not those of a matrix {shape:?}")));
        }
        if stored::decode(map.dtype, bytes(&map)).ok().as_deref() != Some(&NF4) {
            return Err(refuse(format!("{MAP} has other levels than nf4")));
        }
        codes.shape = shape;
        codes.quantised = Some(Arc::new(Quantised::nf4(absmax)));
    }
    Ok(())
}

/// The numbers of a packed matrix, whose parts fit as [`settle`] has seen.
pub(super) fn decode(codes: &[u8], scales: &[u8], shape: &[usize]) -> std::result::Result<Vec<f32>, String> {
    let scales = stored::decode(Dtype::F32, scales)?;
    let packed = match shape {
        [d_out, d_in] => Packed::from_parts(codes.to_vec(), scales, [*d_out, *d_in], Quantization::Nf4),
        _ => None,
    };
    packed.map(|packed| packed.values()).ok_or_else(|| "has parts that do not fit each other".to_string())
}
