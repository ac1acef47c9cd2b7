//! Writing a checkpoint: `config.json`, and weights in one file or in shards with an index.

use std::collections::{BTreeSet, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};

use burn::tensor::Tensor;
use lowkey_files::{
    NewFile,
    write::{create_dir, remove},
};
use serde_json::{Map, Value, json};

use super::file::{Pending, write_into, write_tensors};
use super::{CONFIG, INDEX, Raw, SINGLE, WeightDtype, nf4};
use crate::adapter::{AdapterPlan, Quantization};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::model::CausalLm;
use crate::params::Parameter;
use crate::tensor::TensorSpec;

/// A checkpoint that is being written, shard by shard, so that a model need never be whole in memory.
///
/// A checkpoint that lies there already is replaced as a whole: nothing changes before [`NewCheckpoint::commit`], by when every new file
/// is on disk. `config.json` is away while files are exchanged, so that a directory caught half way does not load, and weight files of
/// the old checkpoint that have no successor are removed, because readers would prefer them. Dropped before, it leaves nothing.
pub struct NewCheckpoint {
    dir: PathBuf,
    dtype: WeightDtype,
    /// Shards in all.
    count: usize,
    staged: Vec<Staged>,
    weight_map: Map<String, Value>,
    total: usize,
}

impl NewCheckpoint {
    /// One of `count` files of weights.
    ///
    /// # Errors
    /// [`Error::Io`] where the folder cannot be made.
    pub fn begin(dir: &Path, dtype: WeightDtype, count: usize) -> Result<Self> {
        create_dir(dir)?;
        let (staged, weight_map) = (Vec::with_capacity(count + 1), Map::new());
        Ok(Self { dir: dir.to_path_buf(), dtype, count, staged, weight_map, total: 0 })
    }

    /// Writes the next shard.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file that cannot be written; [`Error::File`] where a value does not fit the format.
    pub fn add(&mut self, shard: Vec<Parameter>) -> Result<()> {
        self.add_packing(shard, &BTreeSet::new())
    }

    /// The same with the matrices of these names in 4 bits.
    fn add_packing(&mut self, shard: Vec<Parameter>, packed: &BTreeSet<&str>) -> Result<()> {
        let file = match self.count {
            1 => SINGLE.to_string(),
            count => format!("model-{:05}-of-{count:05}.safetensors", self.staged.len() + 1),
        };
        let path = self.dir.join(&file);
        let mut tensors = Vec::with_capacity(shard.len());
        for parameter in shard {
            let packs = packed.contains(parameter.name.as_str());
            tensors.extend(pending(&path, parameter, self.dtype, packs)?);
        }
        for tensor in &tensors {
            self.weight_map.insert(tensor.name.clone(), json!(file));
            self.total += tensor.len();
        }
        self.staged.push(Staged::write(&path, |file| write_into(file, &path, tensors, tag()))?);
        Ok(())
    }

    /// Puts it in its place, with the configuration of the model that its shards are of.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file.
    pub fn commit(self, config: &ModelConfig) -> Result<()> {
        let config = config.to_json(self.dtype.name());
        self.commit_with(&config)
    }

    fn commit_with(mut self, config: &Value) -> Result<()> {
        if self.count > 1 {
            let index = json!({ "metadata": { "total_size": self.total }, "weight_map": self.weight_map });
            self.staged.push(Staged::write_json(self.dir.join(INDEX), &index)?);
        }
        let config = Staged::write_json(self.dir.join(CONFIG), config)?;
        remove(&config.path)?;
        let mut written = BTreeSet::new();
        for file in self.staged {
            written.insert(file.path.clone());
            file.commit()?;
        }
        remove_stale_weights(&self.dir, &written)?;
        config.commit()
    }
}

impl CausalLm {
    /// Writes `config.json` and the weights into `dir`, as [`NewCheckpoint`] does. Weights larger than `max_shard_bytes` are split into
    /// shards with an index; a tensor is never cut, so that a shard of one tensor may be larger.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file that cannot be written; [`Error::File`] where a value does not fit `dtype`.
    pub fn save(&self, dir: &Path, dtype: WeightDtype, max_shard_bytes: usize) -> Result<()> {
        self.save_as(dir, dtype, None, max_shard_bytes)
    }

    /// The same with the matrices between hidden states but `kv_b_proj` in 4 bits, as bitsandbytes stores nf4 and transformers opens
    /// it; what is left has the format `dtype`, matrices among it whose rows are no multiple of 32. [`CausalLm::load`] reads it, too.
    ///
    /// # Errors
    /// As [`CausalLm::save`].
    pub fn save_nf4(&self, dir: &Path, dtype: WeightDtype, max_shard_bytes: usize) -> Result<()> {
        self.save_as(dir, dtype, Some(Quantization::Nf4), max_shard_bytes)
    }

    fn save_as(
        &self,
        dir: &Path,
        dtype: WeightDtype,
        quantization: Option<Quantization>,
        max_shard_bytes: usize,
    ) -> Result<()> {
        if self.adapter().is_some() {
            let why = "a model with adapters is not one set of weights; merge it, or save the adapter";
            return Err(Error::file(dir, why));
        }
        if !self.quantized_layers().is_empty() {
            return Err(Error::file(
                dir,
                "a model with packed matrices cannot be written here; merge it, which unpacks them",
            ));
        }
        let plan = quantization.map(AdapterPlan::packing);
        let meant = self.tensors().iter().filter(|spec| plan.as_ref().is_some_and(|plan| plan.packs(spec).is_some()));
        let (packed, whole): (Vec<&TensorSpec>, Vec<&TensorSpec>) = meant.partition(|spec| nf4::fits(&spec.shape));
        let packed: BTreeSet<&str> = packed.into_iter().map(|spec| spec.name.as_str()).collect();
        let shards = split(self.parameters(), dtype, max_shard_bytes);
        let mut new = NewCheckpoint::begin(dir, dtype, shards.len())?;
        for shard in shards {
            new.add_packing(shard, &packed)?;
        }
        let mut config = self.config.to_json(dtype.name());
        if let (Some(_), Value::Object(config)) = (quantization, &mut config) {
            let whole: Vec<&str> = whole.iter().filter_map(|spec| spec.name.strip_suffix(".weight")).collect();
            config.insert("quantization_config".into(), nf4::config(dtype, &whole));
        }
        new.commit_with(&config)
    }
}

/// Distributes the parameters, in order, over shards of at most `max_bytes`.
fn split(parameters: Vec<Parameter>, dtype: WeightDtype, max_bytes: usize) -> Vec<Vec<Parameter>> {
    let mut shards = vec![Vec::new()];
    let mut in_shard = 0;
    for parameter in parameters {
        let bytes = parameter.shape.iter().product::<usize>() * dtype.bytes_per_value();
        if in_shard > 0 && in_shard + bytes > max_bytes {
            shards.push(Vec::new());
            in_shard = 0;
        }
        in_shard += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push(parameter);
        }
    }
    shards
}

/// Writes these parameters as one file: whole, or not at all.
pub(crate) fn write_parameters(path: &Path, parameters: Vec<Parameter>, dtype: WeightDtype) -> Result<()> {
    let tensors = parameters.into_iter().map(|parameter| pending(path, parameter, dtype, false));
    write_tensors(path, tensors.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect(), tag())
}

/// transformers asks for it.
fn tag() -> Option<HashMap<String, String>> {
    Some(HashMap::from([("format".to_owned(), "pt".to_owned())]))
}

/// The tensors that a parameter becomes: one, or those of a packed matrix.
fn pending(path: &Path, parameter: Parameter, dtype: WeightDtype, packs: bool) -> Result<Vec<Pending<'_>>> {
    let Parameter { name, shape, value, .. } = parameter;
    let read = move |name: &str, value: Tensor<1>| {
        let values = value.try_into_vec_as::<f32>();
        values.map_err(|e| Error::file(path, format!("tensor {name} cannot be read back: {e:?}")))
    };
    if let (true, [d_out, d_in]) = (packs, &shape[..]) {
        let packed = nf4::encode(&name, &read(&name, value)?, [*d_out, *d_in], dtype);
        let ready = |Raw { name, dtype, shape, bytes }| Pending::new(name, dtype, shape, || Ok(bytes));
        return Ok(packed.into_iter().map(ready).collect());
    }
    let called = name.clone();
    let bytes = move || {
        dtype.encode(&read(&called, value)?).map_err(|value| {
            let why = format!("tensor {called} holds {value}, too large for {}; save as float32", dtype.name());
            Error::file(path, why)
        })
    };
    Ok(vec![Pending::new(name, dtype.format(), shape, bytes)])
}

/// A file whose content is on disk but that does not bear its name yet; dropped, it leaves nothing behind.
struct Staged {
    path: PathBuf,
    file: NewFile,
}

impl Staged {
    fn write(path: &Path, content: impl FnOnce(&mut NewFile) -> Result<()>) -> Result<Self> {
        let mut file = NewFile::create(path)?;
        content(&mut file)?;
        // Synced now rather than at the rename, so that the renames of a checkpoint follow one another at once.
        file.sync().map_err(|e| Error::io(path, e))?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    fn write_json(path: PathBuf, value: &Value) -> Result<Self> {
        let text = serde_json::to_string_pretty(value).map_err(|e| Error::file(&path, e.to_string()))?;
        Self::write(&path, |file| file.write_all((text + "\n").as_bytes()).map_err(|e| Error::io(&path, e)))
    }

    /// Gives the file its name, in place of an older one.
    fn commit(self) -> Result<()> {
        Ok(self.file.commit()?)
    }
}

/// Removes the weight files of an older checkpoint: a single file hides shards from transformers and from
/// [`CausalLm::load`], and an index hides a single file from vLLM.
fn remove_stale_weights(dir: &Path, written: &BTreeSet<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(dir).map_err(|source| Error::io(dir, source))? {
        let name = entry.map_err(|source| Error::io(dir, source))?.file_name();
        let Some(name) = name.to_str() else { continue };
        let path = dir.join(name);
        if (name == SINGLE || name == INDEX || is_shard(name)) && !written.contains(&path) {
            remove(&path)?;
        }
    }
    Ok(())
}

/// Whether a file name has the form `model-00001-of-00002.safetensors`.
pub(super) fn is_shard(name: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    name.strip_prefix("model-")
        .and_then(|rest| rest.strip_suffix(".safetensors"))
        .and_then(|rest| rest.split_once("-of-"))
        .is_some_and(|(i, count)| digits(i) && digits(count))
}
