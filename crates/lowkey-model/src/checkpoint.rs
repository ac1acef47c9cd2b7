//! Hugging Face model directories: `config.json` and safetensors, in one file or in shards with an index.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::Device;
use half::{bf16, f16};
use lowkey_files::{is_plain_name, open, printable, read_text};
use lowkey_kernels::quantized_linear::Quantization;
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::adapter::AdapterPlan;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::hf_config::dialect::Dialect;
use crate::model::CausalLm;
use crate::tensor::{Role, TensorSpec};
use quantisation::Quantisation;

mod apart;
mod file;
pub(crate) mod nf4;
pub(crate) mod quantisation;
mod quantised;
pub(crate) mod stored;
mod write;

pub use apart::LayerReader;
pub use file::{Pending, write_tensors};
pub use write::NewCheckpoint;
pub(crate) use write::write_parameters;

const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";
pub(crate) const CONFIG: &str = "config.json";

/// Largest index that is read: seven times that of a model of ninety thousand tensors.
const LARGEST_INDEX: u64 = 64 << 20;

/// The number format of saved weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightDtype {
    /// 32-bit floating point: what training keeps.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl WeightDtype {
    /// Name in `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    fn format(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::BF16,
            Self::F16 => Dtype::F16,
        }
    }

    /// Bytes of a value.
    pub fn bytes_per_value(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// The little-endian bytes; `Err` with a finite value that this format would turn into an infinity.
    fn encode(self, values: &[f32]) -> std::result::Result<Vec<u8>, f32> {
        let lost = |x: &&f32| match self {
            Self::F32 => false,
            Self::Bf16 => x.is_finite() && bf16::from_f32(**x).is_infinite(),
            Self::F16 => x.is_finite() && f16::from_f32(**x).is_infinite(),
        };
        if let Some(value) = values.iter().find(lost) {
            return Err(*value);
        }
        Ok(match self {
            Self::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Self::Bf16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
            Self::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        })
    }
}

/// The files of a checkpoint, mapped into memory, and where each tensor lies.
pub(crate) struct Weights {
    files: Vec<(PathBuf, Mmap)>,
    /// tensor name → (file, dtype, shape, byte range)
    tensors: BTreeMap<String, Entry>,
    /// Whether it is a model without an output head ([`stored::settle_names`]).
    base: bool,
    /// Whether embedding and output head may have fewer rows than are asked for.
    growing: bool,
    /// What its `config.json` asks for of names and values.
    dialect: Dialect,
}

#[derive(Clone)]
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    range: std::ops::Range<usize>,
    /// What turns its bytes into values, where they are codes.
    quantised: Option<Arc<quantised::Quantised>>,
}

/// A tensor as a file holds it.
struct Raw {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Weights {
    pub(crate) fn open(dir: &Path, config: &ModelConfig) -> Result<Self> {
        let dialect = Dialect::of_directory(dir)?;
        let mut weights = Self { files: Vec::new(), tensors: BTreeMap::new(), base: false, growing: false, dialect };
        let mut aliases = BTreeMap::new();
        for path in weight_files(dir)? {
            weights.add(path, &mut aliases)?;
        }
        nf4::settle(&mut weights.tensors, &weights.files)?;
        let tied = config.tie_word_embeddings || weights.dialect.unties();
        weights.base = stored::settle_names(&mut weights.tensors, aliases, tied);
        if weights.dialect.unties() {
            stored::untie(&mut weights.tensors);
            weights.base = false;
        }
        quantised::settle(&mut weights, &Quantisation::of_directory(dir)?)?;
        Ok(weights)
    }

    /// Refuses weights beside which an adapter would be one of another model than that of the files.
    pub(crate) fn check_adaptable(&self, dir: &Path) -> Result<()> {
        match self.dialect.against_adapters() {
            None => Ok(()),
            Some(why) => Err(Error::file(
                dir,
                format!(
                    "no adapter can stand beside it: {why}; lowkey export --to hf writes a model that has them in its weights"
                ),
            )),
        }
    }

    /// The same for a model that is asked for a larger vocabulary: the rows of further tokens are zeros.
    pub(crate) fn growing(self) -> Self {
        Self { growing: true, ..self }
    }

    /// Whether a model of that configuration has more tokens than the files.
    pub(crate) fn grows(&self, config: &ModelConfig) -> bool {
        config
            .tensors()
            .iter()
            .filter(|spec| has_rows(spec))
            .any(|spec| self.tensors.get(&spec.name).is_some_and(|entry| entry.shape.first() < spec.shape.first()))
    }

    fn add(&mut self, path: PathBuf, aliases: &mut BTreeMap<String, String>) -> Result<()> {
        let file = open(&path)?;
        // SAFETY: the mapping is read-only; a file that another process truncates meanwhile is outside what a reader of
        // checkpoints can guard against, and checkpoints are replaced by rename, never rewritten in place.
        let map = unsafe { Mmap::map(&file) }.map_err(|source| Error::io(&path, source))?;
        let parsed = SafeTensors::deserialize(&map).map_err(|e| {
            Error::file(
                &path,
                format!("not a readable safetensors file ({e}); it may be cut short: fetch or save it again"),
            )
        })?;
        if let Ok((_, header)) = SafeTensors::read_metadata(&map) {
            aliases.extend(header.metadata().clone().unwrap_or_default());
        }
        let start = map.as_ptr() as usize;
        for (name, view) in parsed.tensors() {
            let Some(name) = self.dialect.name(&name) else { continue };
            let at = view.data().as_ptr() as usize - start;
            let entry = Entry {
                file: self.files.len(),
                dtype: view.dtype(),
                shape: view.shape().to_vec(),
                range: at..at + view.data().len(),
                quantised: None,
            };
            if self.tensors.insert(name.clone(), entry).is_some() {
                return Err(Error::file(&path, format!("tensor {name} stands in another shard too")));
            }
        }
        self.files.push((path, map));
        Ok(())
    }

    /// Compares names and shapes with those that `config` asks for, before a value is read: what a wrong `config.json` claims
    /// costs nothing but the names of tensors, and no more of those than the files hold tensors, give or take a layer.
    pub(crate) fn check(&self, dir: &Path, config: &ModelConfig, device: &Device) -> Result<()> {
        let (mut missing, mut mismatched, mut used) = (Vec::new(), Vec::new(), BTreeSet::new());
        // Of more layers than the files name, one of the first is missing: to look at those is enough to refuse.
        let layers: BTreeSet<&str> = self.tensors.keys().filter_map(|name| layer_of(name)).collect();
        let looked_at = config.layers.len().min(layers.len() + 1);
        if looked_at < config.layers.len() {
            missing.push(format!("layers {looked_at} to {} (num_hidden_layers)", config.layers.len() - 1));
        }
        let mut first_layers = config.clone();
        first_layers.layers.resize(looked_at)?;
        CausalLm::build(&first_layers, device, &mut |spec| {
            let TensorSpec { name, shape, .. } = spec;
            used.insert(name.clone());
            match self.tensors.get(name) {
                None if self.base && name == "lm_head.weight" => missing.push(format!(
                    "{name} (the files hold a base model, saved without its output head: save the model that has one, or \
                     set tie_word_embeddings = true where the embedding is its head)"
                )),
                None => missing.push(name.to_string()),
                Some(entry) if self.growing && has_rows(spec) && is_taller(shape, &entry.shape) => {}
                Some(entry) if entry.shape != *shape => {
                    mismatched.push(format!("{name}: expected {shape:?}, found {:?}", entry.shape));
                }
                Some(_) => {}
            }
            Vec::new()
        });
        let mut unexpected = Vec::new();
        for (name, entry) in &self.tensors {
            let past_the_first = looked_at < config.layers.len() && layer_of(name).is_some();
            if used.contains(name) || is_derived(name) || past_the_first {
                continue;
            }
            if name == "lm_head.weight" && config.tie_word_embeddings {
                if missing.is_empty() && mismatched.is_empty() {
                    check_tied(self, entry)?;
                }
                continue;
            }
            unexpected.push(name.clone());
        }
        if missing.is_empty() && unexpected.is_empty() && mismatched.is_empty() {
            return Ok(());
        }
        Err(Error::Tensors { path: dir.to_path_buf(), missing, unexpected, mismatched })
    }

    /// The values of a tensor; none where no file has it, which [`Weights::check`] has ruled out for what a model needs.
    pub(crate) fn of(&self, spec: &TensorSpec) -> Result<Vec<f32>> {
        let Some(entry) = self.tensors.get(&spec.name) else { return Ok(Vec::new()) };
        let mut values = self.values(&spec.name, entry)?;
        let scale = self.dialect.scale(spec);
        if scale != 1.0 {
            values.iter_mut().for_each(|value| *value = (f64::from(*value) * scale) as f32);
        }
        if self.growing && has_rows(spec) {
            values.resize(spec.shape.iter().product(), 0.0);
        }
        Ok(values)
    }

    fn values(&self, name: &str, entry: &Entry) -> Result<Vec<f32>> {
        let bytes = self.bytes(entry);
        let values = match &entry.quantised {
            Some(quantised) => quantised.decode(&entry.shape, bytes, |part| self.bytes(part)),
            None => stored::decode(entry.dtype, bytes),
        };
        values.map_err(|why| Error::file(&self.files[entry.file].0, format!("tensor {name} {why}")))
    }

    fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.files[entry.file].1[entry.range.clone()]
    }
}

/// Whether each token of the vocabulary has a row in it.
fn has_rows(spec: &TensorSpec) -> bool {
    matches!(spec.role, Role::Embedding | Role::Head)
}

/// Whether a matrix has the rows of another and further ones.
fn is_taller(shape: &[usize], than: &[usize]) -> bool {
    matches!((shape, than), ([rows, width], [fewer, same]) if width == same && fewer <= rows)
}

/// The safetensors files of a model directory: the single one, or those that the index names.
///
/// # Errors
/// [`Error::File`] where there is neither, or where the index is malformed or names a file outside the directory.
pub fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
    if single.is_file() {
        return Ok(vec![single]);
    }
    if !index.is_file() {
        if let Some(name) = pickled(dir) {
            let why = format!("holds its weights as {} alone; {PICKLED}", printable(&name));
            return Err(Error::file(dir, why));
        }
        let why = format!("no {SINGLE} and no {INDEX} here; a model directory needs one of them");
        return Err(Error::file(dir, why));
    }
    let text = read_text(&index, LARGEST_INDEX)?;
    let value: Value = serde_json::from_str(&text).map_err(|e| Error::file(&index, format!("not valid JSON: {e}")))?;
    let map = value
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| Error::file(&index, "has no object \"weight_map\""))?;
    let mut names = BTreeSet::new();
    for (tensor, file) in map {
        let file =
            file.as_str().ok_or_else(|| Error::file(&index, format!("weight_map.{tensor} is not a file name")))?;
        if !is_plain_name(file) {
            let why = format!("weight_map.{} points outside the directory: {}", printable(tensor), printable(file));
            return Err(Error::file(&index, why));
        }
        if is_pickled(file) {
            return Err(Error::file(&index, format!("names {}; {PICKLED}", printable(file))));
        }
        names.insert(file.to_string());
    }
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}

/// Why files of Python's pickles are not opened, and what to do.
const PICKLED: &str = "a pickle is a program that runs when it is read, and is not opened here. Fetch the model's safetensors (most \
                       have them, some on the branch refs/pr/1), or, where you trust the file, save it with transformers: \
                       from_pretrained(DIR).save_pretrained(NEW)";

fn is_pickled(name: &str) -> bool {
    [".bin", ".pt", ".pth", ".ckpt", ".pkl"].iter().any(|end| name.ends_with(end))
}

/// A file of pickled weights in a folder; the first by name.
fn pickled(dir: &Path) -> Option<String> {
    let names = std::fs::read_dir(dir).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    // Other programs leave `training_args.bin` and the like.
    let weights = |name: &String| {
        is_pickled(name) && !["training_args", "optimizer", "scheduler"].iter().any(|n| name.starts_with(n))
    };
    names.filter(weights).min()
}

/// Compares the names and shapes of the tensors in `dir` with those that `config` asks for; no value is read.
///
/// # Errors
/// As [`CausalLm::load`].
pub fn check_weights(dir: &Path, config: &ModelConfig) -> Result<()> {
    Weights::open(dir, config)?.check(dir, config, &Device::flex())
}

impl CausalLm {
    /// Loads a Hugging Face directory; weights become f32, quantised ones too (`fp8` in blocks, and of `compressed-tensors` 8-bit
    /// floats and integers of 8 and 4 bits), one tensor at a time.
    ///
    /// # Errors
    /// [`Error::Tensors`] lists every missing, unexpected and mis-shaped tensor; [`Error::File`] and [`Error::Io`] name the
    /// file that cannot be read.
    pub fn load(dir: &Path, device: &Device) -> Result<Self> {
        let config = ModelConfig::read(&dir.join(CONFIG))?;
        Self::load_with(dir, &config, device)
    }

    /// Loads the weights of `dir` into a model of the given configuration.
    ///
    /// # Errors
    /// As [`CausalLm::load`].
    pub fn load_with(dir: &Path, config: &ModelConfig, device: &Device) -> Result<Self> {
        Self::of_weights(Weights::open(dir, config)?, dir, config, device)
    }

    /// The same where `config` may have more tokens than the files: their rows are zeros, and [`CausalLm::with_new_rows`] says what is
    /// to stand there.
    ///
    /// # Errors
    /// As [`CausalLm::load`].
    pub fn load_growing(dir: &Path, config: &ModelConfig, device: &Device) -> Result<Self> {
        Self::of_weights(Weights::open(dir, config)?.growing(), dir, config, device)
    }

    fn of_weights(weights: Weights, dir: &Path, config: &ModelConfig, device: &Device) -> Result<Self> {
        weights.check(dir, config, device)?;
        Self::try_build(config, None, device, |spec| weights.of(spec))
    }

    /// Loads a directory with its matrices packed, each as soon as it is read, so that they are never whole in memory all together. Nothing
    /// of the model can be trained.
    ///
    /// # Errors
    /// As [`CausalLm::load`].
    pub(crate) fn load_packed(
        dir: &Path,
        config: &ModelConfig,
        quantization: Quantization,
        device: &Device,
    ) -> Result<Self> {
        let weights = Weights::open(dir, config)?;
        weights.check(dir, config, device)?;
        let plan = AdapterPlan::packing(quantization);
        Ok(Self::try_build(config, Some(&plan), device, |spec| weights.of(spec))?.with_trained(|_| false))
    }

    /// [`CausalLm::build_adapted`] with values that may not be there.
    fn try_build(
        config: &ModelConfig,
        adapters: Option<&AdapterPlan>,
        device: &Device,
        mut fill: impl FnMut(&TensorSpec) -> Result<Vec<f32>>,
    ) -> Result<Self> {
        let mut failure = None;
        let model = Self::build_adapted(config, adapters, device, &mut |spec| {
            fill(spec).unwrap_or_else(|e| {
                failure = failure.take().or(Some(e));
                Vec::new()
            })
        });
        failure.map_or(Ok(model), Err)
    }
}

/// The number of the layer that a tensor belongs to, as its name spells it.
fn layer_of(name: &str) -> Option<&str> {
    name.strip_prefix("model.layers.")?.split_once('.').map(|(layer, _)| layer)
}

/// Tables that old checkpoints carry and that follow from the configuration.
fn is_derived(name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq")
}

/// A tied checkpoint may repeat the embedding as head, but not contradict it: transformers would silently untie the two.
fn check_tied(weights: &Weights, head: &Entry) -> Result<()> {
    let Some(embedding) = weights.tensors.get("model.embed_tokens.weight") else { return Ok(()) };
    if weights.values("lm_head.weight", head)? == weights.values("model.embed_tokens.weight", embedding)? {
        return Ok(());
    }
    Err(Error::file(
        &weights.files[head.file].0,
        "lm_head.weight differs from model.embed_tokens.weight although config.json says tie_word_embeddings = true; \
         set it to false to keep both",
    ))
}

#[cfg(test)]
mod tests;
