//! Side files: safetensors with tensors that Hugging Face's layout has no name for.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use half::{bf16, f16};
use lowkey_model::checkpoint::{Pending, WeightDtype, write_tensors};
use lowkey_model::{CausalLm, Parameter, attention::FACTORS};
use safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// A tensor in double precision, before it is rounded once.
#[derive(Clone, Debug)]
pub(crate) struct Exact {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f64>,
}

/// A side file, read whole.
#[derive(Debug)]
pub(crate) struct Side {
    /// Its tensors by name; [`take`] takes them out.
    pub(crate) tensors: BTreeMap<String, Stored>,
    /// The [sum](made_from) of the weights that it was multiplied from, where it says so.
    origin: Option<String>,
}

/// A tensor as it stands in a file.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f32>,
}

/// The key of a side file's metadata that says which weights it was multiplied from.
const MADE_FROM: &str = "lowkey.made_from";

/// SHA-256 of the weights that side files are multiplied from, as a file of the given format holds them: the projections of all
/// attention layers.
///
/// # Errors
/// [`Error::Device`] where a tensor cannot be read back.
pub(crate) fn made_from(model: &CausalLm, dtype: WeightDtype) -> Result<String> {
    let mut hash = Sha256::new();
    for Parameter { name, shape, value, .. } in model.parameters() {
        if !FACTORS.iter().any(|factor| name.ends_with(&format!(".self_attn.{factor}.weight"))) {
            continue;
        }
        hash.update(format!("{name} {shape:?}\n"));
        let values = value.try_into_vec_as::<f32>().map_err(|e| Error::device(&name, e))?;
        for x in values {
            let stored = match dtype {
                WeightDtype::F32 => x,
                WeightDtype::Bf16 => bf16::from_f32(x).to_f32(),
                WeightDtype::F16 => f16::from_f32(x).to_f32(),
            };
            hash.update(stored.to_le_bytes());
        }
    }
    Ok(lowkey_files::hash::hex(&hash.finalize()))
}

/// Rounds tensors once, from f64 to `dtype`, and writes them as one file, with the [sum](made_from) of the weights that they were
/// multiplied from.
///
/// # Errors
/// [`Error::File`] where a finite value does not fit `dtype`, [`Error::Io`] where the file cannot be written.
pub(crate) fn write(
    path: &Path,
    tensors: impl Iterator<Item = Result<Exact>>,
    dtype: WeightDtype,
    made_from: &str,
) -> Result<()> {
    let format = match dtype {
        WeightDtype::F32 => Dtype::F32,
        WeightDtype::Bf16 => Dtype::BF16,
        WeightDtype::F16 => Dtype::F16,
    };
    let mut encoded = Vec::new();
    for tensor in tensors {
        let Exact { name, shape, values } = tensor?;
        let bytes = encode(&values, dtype).map_err(|value| {
            let why = format!("tensor {name} holds {value}, too large for {}; export as f32 or bf16", dtype.name());
            Error::file(path, why)
        })?;
        encoded.push(Pending::new(name, format, shape, || Ok(bytes)));
    }
    Ok(write_tensors(path, encoded, Some(HashMap::from([(MADE_FROM.to_owned(), made_from.to_owned())])))?)
}

/// Little-endian bytes; `Err` with a finite value that would become an infinity.
fn encode(values: &[f64], dtype: WeightDtype) -> std::result::Result<Vec<u8>, f64> {
    let mut bytes = Vec::with_capacity(values.len() * 4);
    for &x in values {
        let finite = match dtype {
            WeightDtype::F32 => {
                bytes.extend((x as f32).to_le_bytes());
                (x as f32).is_finite()
            }
            WeightDtype::Bf16 => {
                bytes.extend(bf16::from_f64(x).to_le_bytes());
                bf16::from_f64(x).is_finite()
            }
            WeightDtype::F16 => {
                bytes.extend(f16::from_f64(x).to_le_bytes());
                f16::from_f64(x).is_finite()
            }
        };
        if x.is_finite() && !finite {
            return Err(x);
        }
    }
    Ok(bytes)
}

/// Reads a side file whole.
///
/// # Errors
/// [`Error::File`] where it is damaged or holds a tensor that is not F32, BF16 or F16, [`Error::Io`] where it cannot be read.
pub(crate) fn read(path: &Path) -> Result<Side> {
    let bytes = lowkey_files::read(path, u64::MAX)?;
    let unreadable = |e| Error::file(path, format!("not a readable safetensors file ({e}); export it again"));
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(unreadable)?;
    let origin = header.metadata().as_ref().and_then(|metadata| metadata.get(MADE_FROM)).cloned();
    let parsed = SafeTensors::deserialize(&bytes).map_err(unreadable)?;
    let mut tensors = BTreeMap::new();
    for (name, view) in parsed.tensors() {
        let pairs = || view.data().chunks_exact(2).map(|b| [b[0], b[1]]);
        let values = match view.dtype() {
            Dtype::F32 => view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Dtype::BF16 => pairs().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
            Dtype::F16 => pairs().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
            other => {
                let why = format!("tensor {name} has dtype {other:?}; only F32, BF16 and F16 are read");
                return Err(Error::file(path, why));
            }
        };
        tensors.insert(name, Stored { shape: view.shape().to_vec(), values });
    }
    Ok(Side { tensors, origin })
}

/// Takes a tensor of the given shape out of what [`read`] found.
///
/// # Errors
/// [`Error::File`] where it is not there or has another shape.
pub(crate) fn take(
    path: &Path,
    tensors: &mut BTreeMap<String, Stored>,
    name: &str,
    shape: &[usize],
) -> Result<Vec<f32>> {
    match tensors.remove(name) {
        None => Err(Error::file(path, format!("tensor {name} is missing; export it again"))),
        Some(found) if found.shape != shape => {
            Err(Error::file(path, format!("tensor {name} has shape {:?}, config.json asks for {shape:?}", found.shape)))
        }
        Some(found) => Ok(found.values),
    }
}

/// Whether a side file was multiplied from the weights of `model`, as it lies beside it.
///
/// # Errors
/// [`Error::File`] where it was not, or does not say.
pub(crate) fn check_origin(path: &Path, side: &Side, model: &CausalLm) -> Result<()> {
    let mend = "export the model again, or remove this file: the weights beside it are complete without it";
    match &side.origin {
        None => {
            let why = format!("does not say which weights it was multiplied from, as earlier versions left it; {mend}");
            Err(Error::file(path, why))
        }
        Some(sum) if *sum != made_from(model, WeightDtype::F32)? => {
            Err(Error::file(path, format!("was multiplied from other weights than those beside it; {mend}")))
        }
        Some(_) => Ok(()),
    }
}

/// What remains when every layer has taken its tensors is not of this model.
///
/// # Errors
/// [`Error::File`] naming the first such tensor.
pub(crate) fn nothing_left(path: &Path, tensors: &BTreeMap<String, Stored>) -> Result<()> {
    match tensors.keys().next() {
        Some(name) => Err(Error::file(path, format!("tensor {name} belongs to no layer of config.json"))),
        None => Ok(()),
    }
}
