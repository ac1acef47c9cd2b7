//! GGUF, the file format of llama.cpp: a container of typed metadata and tensors, and MLA models in it.
//!
//! **The container** is GGUF version 3, little-endian: [`Gguf`] reads it ([`read`]), `write_container` writes it. The
//! reader maps the file and trusts nothing in it.
//!
//! **Models** are written by [`write()`] under an architecture of llama.cpp's: MLA as `deepseek2` in its latent (absorbed) layout,
//! other attention as `llama`, `qwen2` or `qwen3`. [`read_model`] reads them back, so that the model inside the file can be compared
//! with its source, and `differences` compares everything before the weights. What the architecture cannot express is refused
//! by name; what `deepseek2` expresses elsewhere (a scale on the latent, YaRN's factor on cosines and sines, a rotation of halves)
//! is folded into the weights, which costs at most one rounding per value.
//!
//! | quantity of MLA | in the file |
//! |---|---|
//! | token ids | those of the tokenizer, which is embedded |
//! | ε of all norms | `attention.layer_norm_rms_epsilon`, 1e-6 always |
//! | layers | all dense: `leading_dense_block_count = block_count` |
//! | YaRN's m² on the attention logits | `rope.scaling.yarn_log_multiplier` = 0.1 · `mscale_all_dim` |
//!
//! Source: llama.cpp of November 2026, whose loader and graph were read and whose logits agree with lowkey's.

mod architecture;
mod deepseek2;
mod grouped;
mod metadata;
mod pre_tokenizer;
mod read;
mod rope;
mod sentence_piece;
mod tensor_type;
mod tokenizer;
mod weights;
mod write;

use std::collections::{HashMap, HashSet};
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use lowkey_data::Tokenizer;
use lowkey_files::printable;
use lowkey_model::{
    CausalLm, ModelConfig, Parameter,
    adapter::AdapterPlan,
    tensor::{Part, Role},
};

use crate::error::{Error, Result};
use crate::idle_norm::{lacks_norms, with_idle_norms};
use architecture::Architecture;
pub use metadata::{Array, Metadata, Value};
pub use read::{Gguf, TensorInfo};
pub use tensor_type::TensorType;
use weights::{Change, Origin, Plan, join_kv_b, plan, undone};
pub(crate) use write::write_container;

const MAGIC: [u8; 4] = *b"GGUF";
const VERSION: u32 = 3;
/// Tensors begin at multiples of this many bytes.
const ALIGNMENT: usize = 32;
const ALIGNMENT_KEY: &str = "general.alignment";
/// The format's limit on keys, and ggml's on names and dimensions of tensors.
const MAX_KEY_BYTES: usize = 65_535;
const MAX_NAME_BYTES: usize = 63;
const MAX_DIMS: u32 = 4;

/// What was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Size of the file.
    pub bytes: u64,
    /// Number of tensors.
    pub tensors: usize,
    /// The type that was asked for.
    pub kind: TensorType,
    /// Matrices stored in half precision because their rows do not divide into blocks of [`TensorType::Q8_0`].
    pub fallbacks: Vec<String>,
    /// What a user should know: where the file holds the model in another form, and where llama.cpp's tokenizer differs.
    pub notes: Vec<String>,
}

/// A file before its weights: what [`write()`] is going to write.
struct Outline {
    metadata: Metadata,
    plans: Vec<Plan>,
    tensors: Vec<TensorInfo>,
    notes: Vec<String>,
}

/// Writes a model as a GGUF file that llama.cpp loads. Matrices are stored in `kind`, vectors always in f32. The file appears whole
/// or not at all.
///
/// Without a tokenizer the file holds none: llama.cpp then takes and gives token ids only. A tokenizer that was read from a model
/// directory brings its chat template.
///
/// # Errors
/// [`Error::Unsupported`] naming the property of the model or of its tokenizer that the format has no way to say, or the tensor
/// with a value that `kind` cannot hold, with the mend; [`Error::Io`] where the file cannot be written.
pub fn write(path: &Path, model: &CausalLm, tokenizer: Option<&Tokenizer>, kind: TensorType) -> Result<Summary> {
    let idle = lacks_norms(model);
    if idle && matches!(kind, TensorType::F16 | TensorType::Q8_0) {
        let why = "its latents have no norm, and the numbers by which one that does nothing is written are too small for halves: use f32 \
                   or bf16";
        return Err(Error::unsupported("GGUF in f16 or q8_0", why));
    }
    let model = &writable(model)?;
    let Outline { metadata, plans, tensors, mut notes } = outline(path, model, tokenizer, kind)?;
    notes.extend(idle.then(|| "its latents have no norm: the file has one that does nothing".into()));
    let fallen = |info: &&TensorInfo| info.shape.len() > 1 && info.kind != kind;
    let fallbacks = tensors.iter().filter(fallen).map(|info| info.name.clone()).collect();
    let parameters: HashMap<String, Parameter> =
        model.parameters().into_iter().map(|parameter| (parameter.name.clone(), parameter)).collect();
    let mut plans = plans.iter();
    let bytes = write_container(path, &metadata, &tensors, &mut |info| {
        // One plan for each description, in the same order.
        let plan = plans.next().ok_or_else(|| Error::file(path, "more tensors than planned"))?;
        let (source, change) = match &plan.origin {
            Origin::Given(values) => return Ok(values.clone()),
            Origin::Parameter(source, change) => (source, change),
        };
        let parameter =
            parameters.get(source).ok_or_else(|| Error::file(path, format!("the model has no tensor {source}")))?;
        let values = parameter.value.clone().try_into_vec_as::<f32>();
        let values = values.map_err(|e| Error::file(path, format!("{} cannot be read back: {e:?}", info.name)))?;
        Ok(change.apply(values, &parameter.shape))
    })?;
    Ok(Summary { bytes, tensors: tensors.len(), kind, fallbacks, notes })
}

/// Writes an adapter of low rank as llama.cpp reads it with `--lora`: a pair of tensors for each adapted matrix, in its layout there, each
/// with the same rank; the product is multiplied by `alpha` through that rank.
///
/// # Errors
/// [`Error::Unsupported`] naming the matrix that the file's architecture stores otherwise; [`Error::Io`] where the file cannot be written.
pub(crate) fn write_adapter(
    path: &Path,
    config: &ModelConfig,
    adapters: &AdapterPlan,
    alpha: f64,
    parameters: Vec<Parameter>,
) -> Result<()> {
    let architecture = Architecture::of(config)?;
    let mut metadata = Metadata::default();
    metadata.set("general.type", "adapter");
    metadata.set("general.architecture", architecture.name());
    metadata.set("adapter.type", "lora");
    metadata.set("adapter.lora.alpha", alpha as f32);
    let plans = plan(config, architecture);
    let places: HashMap<&str, (&str, Change)> = plans
        .iter()
        .filter_map(|plan| plan.parameter().map(|(of, change)| (of, (plan.name.as_str(), change))))
        .collect();
    let mut tensors = Vec::new();
    for Parameter { name, shape, role, value, .. } in parameters {
        let module = adapters.adapted(&name).map_or(name.as_str(), |(module, _)| module);
        let place = places.get(format!("{module}.weight").as_str());
        let (stored, change) = match place {
            Some((_, Change::Keys { .. } | Change::Values { .. })) | None => {
                return Err(Error::unsupported(
                    "GGUF",
                    format!("{module}: stored in another shape than its adapter's"),
                ));
            }
            Some(place) => *place,
        };
        let values = value.try_into_vec_as::<f32>().map_err(|e| Error::device(&name, e))?;
        // Rows are moved and multiplied as the matrix's are: those of B.
        let (end, values) = match role {
            Role::Adapter(Part::Writes) => ("lora_b", change.apply(values, &shape)),
            Role::Adapter(Part::Reads) => ("lora_a", values),
            Role::Embedding | Role::Head | Role::Matrix | Role::Residual | Role::Norm | Role::Bias => {
                return Err(Error::unsupported("GGUF", format!("{name}: no factor of an adapter")));
            }
            Role::Adapter(Part::Rows) => {
                return Err(Error::unsupported(
                    "GGUF",
                    format!("{name}: adapters of llama.cpp have two factors alone"),
                ));
            }
        };
        tensors.push((TensorInfo { name: format!("{stored}.{end}"), shape, kind: TensorType::F32 }, values));
    }
    let infos: Vec<TensorInfo> = tensors.iter().map(|(info, _)| info.clone()).collect();
    let mut values = tensors.into_iter();
    write_container(path, &metadata, &infos, &mut |_| Ok(values.next().map(|(_, values)| values).unwrap_or_default()))?;
    Ok(())
}

/// The model that is written: what llama.cpp has no way to cut is whole, with weights of zero for what was cut, and latents have norms.
fn writable(model: &CausalLm) -> Result<CausalLm> {
    let mut whole = model.with_whole_latents();
    with_idle_norms(&mut whole, "GGUF")?;
    Ok(whole)
}

/// Everything but the weights of the file that a model is written to.
fn outline(path: &Path, model: &CausalLm, tokenizer: Option<&Tokenizer>, kind: TensorType) -> Result<Outline> {
    let config = &model.config;
    let architecture = Architecture::of(config)?;
    let mut notes = Vec::new();
    let mut metadata = Metadata::default();
    architecture.metadata(config, &mut metadata)?;
    metadata.set("general.type", "model");
    if let Some(name) = path.file_stem().and_then(|name| name.to_str()) {
        metadata.set("general.name", name);
    }
    metadata.set("general.file_type", kind.file_type());
    if kind == TensorType::Q8_0 {
        metadata.set("general.quantization_version", 2u32);
    }
    match tokenizer {
        Some(tokenizer) => tokenizer::embed(tokenizer, config, &mut metadata, &mut notes)?,
        None => {
            metadata.set("tokenizer.ggml.model", "no_vocab");
            notes.push("no tokenizer is embedded: llama.cpp takes and gives token ids only".into());
        }
    }
    notes.extend(folds(model));
    let plans = plan(config, architecture);
    let planned: HashSet<&str> = plans.iter().filter_map(|plan| Some(plan.parameter()?.0)).collect();
    if let Some(left) = model.parameters().into_iter().find(|parameter| !planned.contains(parameter.name.as_str())) {
        let (name, architecture) = (left.name, architecture.name());
        return Err(Error::unsupported("GGUF", format!("{name}: {architecture} has no place for it; use --to hf")));
    }
    let tensors = plans.iter().map(|plan| info(plan, kind)).collect();
    Ok(Outline { metadata, plans, tensors, notes })
}

/// In what a file differs from the one that [`write()`] makes of the same, weights aside: a line for each key, for the first
/// differing element of each list, and for each tensor's name, shape and type. Empty where nothing does.
///
/// # Errors
/// As [`Gguf::open`] and [`write()`].
pub(crate) fn differences(
    path: &Path,
    model: &CausalLm,
    tokenizer: Option<&Tokenizer>,
    kind: TensorType,
) -> Result<Vec<String>> {
    let file = Gguf::open(path)?;
    let expected = outline(path, &writable(model)?, tokenizer, kind)?;
    let mut lines = file.metadata().differences(&expected.metadata);
    let mut found: HashMap<&str, &TensorInfo> = file.tensors().map(|info| (info.name.as_str(), info)).collect();
    for info in &expected.tensors {
        match found.remove(info.name.as_str()) {
            Some(other) if other == info => {}
            Some(TensorInfo { shape, kind, .. }) => lines.push(format!(
                "tensor {} is {shape:?} in {kind}, its source gives {:?} in {}",
                info.name, info.shape, info.kind
            )),
            None => lines.push(format!("tensor {} is missing", info.name)),
        }
    }
    lines.extend(found.into_keys().map(|name| format!("tensor {} is none of its source's", printable(name))));
    Ok(lines)
}

fn info(plan: &Plan, kind: TensorType) -> TensorInfo {
    let kind = match plan.shape.as_slice() {
        [.., row] if plan.shape.len() > 1 => kind.for_rows(*row),
        // llama.cpp multiplies by vectors in f32.
        _ => TensorType::F32,
    };
    TensorInfo { name: plan.name.clone(), shape: plan.shape.clone(), kind }
}

/// What the file holds in another place than the model.
fn folds(model: &CausalLm) -> Vec<String> {
    let Some(mla) = model.config.attention().latent() else { return Vec::new() };
    let mut notes = Vec::new();
    if mla.latent_scale {
        notes.push("latent_scale is folded into attn_kv_a_norm".into());
    }
    if !mla.rope_interleave {
        notes.push("rope_interleave = false: the rotated rows of q and kv_a are permuted into adjacent pairs".into());
    }
    let table = model.config.rope.table_factor();
    if table != 1.0 {
        notes.push(format!(
            "YaRN's factor {table:.6} on cosines and sines is folded into the rotated rows of q and kv_a"
        ));
    }
    notes
}

/// The model with its constant factors and permutations where the file has them: what [`read_model`] gives back of an f32 file. The
/// values are the file's, the configuration stays the model's own.
///
/// # Errors
/// [`Error::Unsupported`] as [`write()`], [`Error::Device`] where a tensor cannot be read back.
pub(crate) fn as_stored(model: &CausalLm) -> Result<CausalLm> {
    let model = writable(model)?;
    let plans = plan(&model.config, Architecture::of(&model.config)?);
    let changes: HashMap<&str, Change> = plans
        .iter()
        .filter_map(Plan::parameter)
        .filter(|(_, change)| matches!(change, Change::Scale(_) | Change::Rotated { .. }))
        .collect();
    let values = model.parameters().into_iter().map(|Parameter { name, shape, value, .. }| {
        let Some(change) = changes.get(name.as_str()) else { return Ok(value) };
        let device = value.device();
        let values = value.try_into_vec_as::<f32>().map_err(|e| Error::device(&name, e))?;
        let changed = change.apply(values, &shape);
        let len = changed.len();
        Ok(Tensor::from_data(TensorData::new(changed, [len]), &device))
    });
    let values = values.collect::<Result<_>>()?;
    Ok(model.with_values(values))
}

/// Opens a GGUF file: its keys and tensors, checked against its size.
///
/// # Errors
/// As [`Gguf::open`].
pub fn read(path: &Path) -> Result<Gguf> {
    Gguf::open(path)
}

/// The model inside a file that [`write()`] made, or another in the same layout, with its weights as f32. What was folded into the
/// weights of MLA stays there: the configuration says `rope_interleave = true` and `latent_scale = false`, and YaRN's factor on
/// cosines and sines is 1.
///
/// # Errors
/// [`Error::File`] naming the key or the tensor that is missing, unexpected or of another shape.
pub fn read_model(path: &Path, device: &Device) -> Result<CausalLm> {
    let file = Gguf::open(path)?;
    let refuse = |why: String| Error::file(path, why);
    let config = Architecture::config(&file).map_err(refuse)?;
    let architecture = Architecture::named(&file, &config).ok_or_else(|| refuse("no architecture".into()))?;
    // A file has less than one layer per tensor: what it claims must not decide how much is planned.
    if config.layers.len() > file.tensors().len() {
        return Err(refuse(format!("{} layers in {} tensors", config.layers.len(), file.tensors().len())));
    }
    let plans = plan(&config, architecture);
    check_tensors(&file, &plans).map_err(refuse)?;
    let mut parts: HashMap<&str, Vec<(&str, Change)>> = HashMap::new();
    for plan in &plans {
        if let Some((parameter, change)) = plan.parameter() {
            parts.entry(parameter).or_default().push((plan.name.as_str(), change));
        }
    }
    let missing = |name: &str| refuse(format!("tensor {name} is missing"));
    let stored = |name: &str| file.values(name).ok_or_else(|| missing(name));
    let values =
        |Parameter { name, shape, .. }: &Parameter| match (parts.get(name.as_str()).map(Vec::as_slice), architecture) {
            (Some([(keys, Change::Keys { .. }), (values, _)]), Architecture::Deepseek2(mla)) => {
                Ok(join_kv_b(&stored(keys)?, &stored(values)?, mla))
            }
            (Some([(part, change)]), _) => Ok(undone(*change, stored(part)?, shape)),
            _ => Err(missing(name)),
        };
    let mut failure = None;
    let mut model = CausalLm::init(&config, 0, device);
    model.update(|parameters| {
        let value = |parameter: Parameter| match values(&parameter) {
            Ok(values) => Tensor::from_data(TensorData::new(values, parameter.value.dims()), device),
            Err(error) => {
                failure.get_or_insert(error);
                parameter.value
            }
        };
        parameters.into_iter().map(value).collect()
    });
    match failure {
        Some(failure) => Err(failure),
        None => Ok(model),
    }
}

/// Whether a file has the planned tensors and no other, and what follows from its keys as it follows.
fn check_tensors(file: &Gguf, plans: &[Plan]) -> std::result::Result<(), String> {
    let shapes: HashMap<&str, &[usize]> =
        file.tensors().map(|info| (info.name.as_str(), info.shape.as_slice())).collect();
    for Plan { name, shape, origin } in plans {
        match shapes.get(name.as_str()) {
            Some(found) if found == shape => {}
            Some(found) => {
                return Err(format!("tensor {name} has the shape {found:?}, expected {shape:?}"));
            }
            None => return Err(format!("tensor {name} is missing")),
        }
        if let Origin::Given(values) = origin
            && file.values(name).as_ref() != Some(values)
        {
            return Err(format!("tensor {name} is not what the keys under lowkey.rope. give"));
        }
    }
    let known: HashSet<&str> = plans.iter().map(|plan| plan.name.as_str()).collect();
    match file.tensors().find(|info| !known.contains(info.name.as_str())) {
        Some(info) => Err(format!("tensor {} is not part of this model", printable(&info.name))),
        None => Ok(()),
    }
}

#[cfg(test)]
pub(crate) mod tests;
