//! Writing the container.

use std::io::{BufWriter, Write};
use std::path::Path;

use lowkey_files::NewFile;

use super::metadata::{Array, Metadata, Value, code};
use super::read::{TensorInfo, padded};
use super::{ALIGNMENT, ALIGNMENT_KEY, MAGIC, MAX_DIMS, MAX_KEY_BYTES, MAX_NAME_BYTES, VERSION};
use crate::error::{Error, Result};

/// Writes a file: to a temporary one beside it, to the disk, and then under its name, so that a file of that name is whole or
/// the old one. `values` is asked for each tensor in order and gives its values, slowest axis first. Returns the file's size in
/// bytes.
///
/// # Errors
/// [`Error::Io`]; [`Error::File`] where a tensor cannot be described or does not have as many values as its shape says;
/// [`Error::Unsupported`] where a value does not fit its type.
pub(crate) fn write_container(
    path: &Path,
    metadata: &Metadata,
    tensors: &[TensorInfo],
    values: &mut dyn FnMut(&TensorInfo) -> Result<Vec<f32>>,
) -> Result<u64> {
    let header = header(metadata, tensors).map_err(|why| Error::file(path, why))?;
    let io = |source| Error::io(path, source);
    let mut file = BufWriter::with_capacity(1 << 20, NewFile::create(path)?);
    let mut written = header.len();
    file.write_all(&header).map_err(io)?;
    for info in tensors {
        let values = values(info)?;
        let expected: usize = info.shape.iter().product();
        if values.len() != expected {
            let why = format!("tensor {}: {} values for the shape {:?}", info.name, values.len(), info.shape);
            return Err(Error::file(path, why));
        }
        let bytes = info.kind.encode(&values).map_err(|value| Error::Unsupported {
            format: "GGUF",
            why: format!(
                "tensor {} holds {value}, which {} cannot represent; export as bf16 or f32",
                info.name, info.kind
            ),
        })?;
        file.write_all(&bytes).map_err(io)?;
        let end = padded(written + bytes.len(), ALIGNMENT);
        file.write_all(&vec![0; end - written - bytes.len()]).map_err(io)?;
        written = end;
    }
    let file = file.into_inner().map_err(|e| io(e.into_error()))?;
    file.commit()?;
    Ok(written as u64)
}

/// Everything before the data, padded.
fn header(metadata: &Metadata, tensors: &[TensorInfo]) -> std::result::Result<Vec<u8>, String> {
    let mut out = Vec::new();
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata.iter() {
        if key.is_empty() || key.len() > MAX_KEY_BYTES {
            return Err(format!("a key of {} bytes; 1 to {MAX_KEY_BYTES} are allowed", key.len()));
        }
        if key == ALIGNMENT_KEY && *value != Value::U32(ALIGNMENT as u32) {
            return Err(format!("{ALIGNMENT_KEY} = {value:?}; tensors are always aligned to {ALIGNMENT} bytes"));
        }
        put_string(&mut out, key);
        put_value(&mut out, value);
    }
    let mut offset = 0;
    for (index, info) in tensors.iter().enumerate() {
        let TensorInfo { name, shape, kind } = info;
        if name.is_empty() || name.len() > MAX_NAME_BYTES || tensors[..index].iter().any(|other| other.name == *name) {
            return Err(format!("the tensor name {name:?} is too long or stands twice"));
        }
        let elements = shape.iter().try_fold(1u64, |product, dim| product.checked_mul(*dim as u64));
        let row = shape.last().copied().unwrap_or(0);
        let size = elements
            .filter(|n| *n > 0 && (1..=MAX_DIMS as usize).contains(&shape.len()))
            .and_then(|n| kind.bytes(n, row as u64))
            .and_then(|size| usize::try_from(size).ok())
            .ok_or_else(|| format!("tensor {name} cannot have the shape {shape:?} in {kind}"))?;
        put_string(&mut out, name);
        out.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|dim| out.extend((*dim as u64).to_le_bytes()));
        out.extend(kind.code().to_le_bytes());
        out.extend((offset as u64).to_le_bytes());
        offset = padded(offset + size, ALIGNMENT);
    }
    out.resize(padded(out.len(), ALIGNMENT), 0);
    Ok(out)
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    macro_rules! number {
        ($code:ident, $number:expr) => {{
            out.extend(code::$code.to_le_bytes());
            out.extend($number.to_le_bytes());
        }};
    }
    match value {
        Value::U8(x) => number!(U8, x),
        Value::I8(x) => number!(I8, x),
        Value::U16(x) => number!(U16, x),
        Value::I16(x) => number!(I16, x),
        Value::U32(x) => number!(U32, x),
        Value::I32(x) => number!(I32, x),
        Value::F32(x) => number!(F32, x),
        Value::U64(x) => number!(U64, x),
        Value::I64(x) => number!(I64, x),
        Value::F64(x) => number!(F64, x),
        Value::Bool(x) => number!(BOOL, u8::from(*x)),
        Value::String(text) => {
            out.extend(code::STRING.to_le_bytes());
            put_string(out, text);
        }
        Value::Array(array) => {
            out.extend(code::ARRAY.to_le_bytes());
            put_array(out, array);
        }
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    macro_rules! numbers {
        ($code:ident, $numbers:expr) => {{
            out.extend(code::$code.to_le_bytes());
            out.extend(($numbers.len() as u64).to_le_bytes());
            $numbers.iter().for_each(|x| out.extend(x.to_le_bytes()));
        }};
    }
    match array {
        Array::U8(x) => numbers!(U8, x),
        Array::I8(x) => numbers!(I8, x),
        Array::U16(x) => numbers!(U16, x),
        Array::I16(x) => numbers!(I16, x),
        Array::U32(x) => numbers!(U32, x),
        Array::I32(x) => numbers!(I32, x),
        Array::F32(x) => numbers!(F32, x),
        Array::U64(x) => numbers!(U64, x),
        Array::I64(x) => numbers!(I64, x),
        Array::F64(x) => numbers!(F64, x),
        Array::Bool(x) => {
            out.extend(code::BOOL.to_le_bytes());
            out.extend((x.len() as u64).to_le_bytes());
            out.extend(x.iter().map(|flag| u8::from(*flag)));
        }
        Array::String(x) => {
            out.extend(code::STRING.to_le_bytes());
            out.extend((x.len() as u64).to_le_bytes());
            x.iter().for_each(|text| put_string(out, text));
        }
    }
}
