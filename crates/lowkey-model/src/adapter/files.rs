//! Directories of PEFT: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lowkey_files::{read, read_text, write_json};
use safetensors::SafeTensors;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::config::{AdapterConfig, Modules};
use super::kind::PeftType;
use super::plan::AdapterPlan;
use crate::checkpoint::{CONFIG, WeightDtype, stored, write_parameters};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::params::Parameter;
use crate::tensor::TensorSpec;

pub(crate) const ADAPTER_CONFIG: &str = "adapter_config.json";
pub(crate) const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

/// What PEFT puts before the name of a module.
const PREFIX: &str = "base_model.model.";

/// Largest `adapter_config.json`: one that names each map of a thousand layers is smaller.
const LARGEST_CONFIG: u64 = 4 << 20;
/// Largest file of an adapter: one that saves embedding and head of a large model whole.
const LARGEST_WEIGHTS: u64 = 64 << 30;

/// Whether a directory holds an adapter and no model of its own.
pub fn is_adapter(dir: &Path) -> bool {
    let there = |name: &str| dir.join(name).symlink_metadata().is_ok();
    there(ADAPTER_CONFIG) && !there("model.safetensors") && !there("model.safetensors.index.json")
}

/// The folder that a companion of a model directory is read from, such as `generation_config.json`, or `tokenizer.json` and what is read
/// with it: the directory itself, or that of the base where an adapter came without it.
///
/// # Errors
/// As [`AdapterDir::open`] and [`AdapterDir::base_dir`].
pub fn companion_dir(dir: &Path, companion: &str) -> Result<PathBuf> {
    if !is_adapter(dir) || dir.join(companion).is_file() {
        return Ok(dir.to_path_buf());
    }
    AdapterDir::open(dir)?.base_dir()
}

/// An adapter in a directory: what it is and which model it belongs to.
#[derive(Clone, Debug)]
pub struct AdapterDir {
    /// The directory.
    pub path: PathBuf,
    /// Its keys.
    pub config: AdapterConfig,
    /// The directory of its base, as `base_model_name_or_path` says.
    pub base: PathBuf,
}

/// Who reads the directory of an adapter.
#[derive(Clone, Copy, Debug)]
pub enum Reader<'a> {
    /// PEFT, beside a model of this configuration; and lowkey.
    Peft(&'a ModelConfig),
    /// A serving engine, which looks for modules by name.
    Engine,
}

/// The tensors of an adapter by the names that they have here.
pub(crate) struct AdapterTensors {
    path: PathBuf,
    values: BTreeMap<String, Vec<f32>>,
}

impl AdapterTensors {
    /// The values of a tensor, which are then gone from here.
    pub(crate) fn take(&mut self, name: &str) -> Result<Vec<f32>> {
        let missing = || Error::file(&self.path, format!("tensor {name} is missing"));
        self.values.remove(name).ok_or_else(missing)
    }
}

impl AdapterDir {
    /// What its keys mean for a model.
    ///
    /// # Errors
    /// As [`AdapterConfig::plan`], with the file.
    pub fn plan(&self, model: &ModelConfig) -> Result<AdapterPlan> {
        self.config.plan(model).map_err(|e| Error::file(self.path.join(ADAPTER_CONFIG), e.to_string()))
    }

    /// Reads `adapter_config.json`.
    ///
    /// # Errors
    /// [`Error::File`] where it is of no kind that lowkey knows, or asks for what lowkey does not compute.
    pub fn open(path: &Path) -> Result<Self> {
        let file = path.join(ADAPTER_CONFIG);
        let text = read_text(&file, LARGEST_CONFIG)?;
        let refuse = |why: String| Error::file(&file, why);
        let Value::Object(mut keys) =
            serde_json::from_str(&text).map_err(|e| refuse(format!("not valid JSON: {e}")))?
        else {
            return Err(refuse("is no JSON object".into()));
        };
        let kind = match keys.get("peft_type") {
            Some(kind) => PeftType::deserialize(kind).map_err(|e| refuse(format!("peft_type: {e}")))?,
            None => return Err(refuse("has no peft_type; an adapter of PEFT says \"LORA\"".into())),
        };
        kind.read(&mut keys).map_err(&refuse)?;
        let base = match keys.get("base_model_name_or_path") {
            Some(Value::String(base)) => PathBuf::from(base),
            _ => PathBuf::new(),
        };
        keys.retain(|key, value| known(kind, key) && !value.is_null());
        let config = serde_json::from_value(Value::Object(keys)).map_err(|e| refuse(e.to_string()))?;
        Ok(Self { path: path.to_path_buf(), config, base })
    }

    /// The directory of its base.
    ///
    /// # Errors
    /// [`Error::File`] where the configuration names none, or where there is none of that name.
    pub fn base_dir(&self) -> Result<PathBuf> {
        let file = self.path.join(ADAPTER_CONFIG);
        // As PEFT reads it; or beside the adapter, for folders that were moved together.
        let beside = self.path.join(&self.base);
        if self.base.as_os_str().is_empty() {
            return Err(Error::file(
                file,
                "base_model_name_or_path names no model; write the folder of the base there",
            ));
        }
        [&self.base, &beside].into_iter().find(|path| path.is_dir()).cloned().ok_or_else(|| {
            let base = self.base.display();
            let why = format!(
                "base_model_name_or_path = {base}: no such folder; fetch the base model and write its folder there"
            );
            Error::file(file, why)
        })
    }

    /// The configuration of a model with this adapter beside it: that of its base, with other tokens or positions where the adapter was
    /// trained with such. A `config.json` beside the adapter says it, which PEFT does not read.
    ///
    /// # Errors
    /// [`Error::File`] where that file cannot be read, or says what no model can have.
    pub fn shape(&self, base: ModelConfig) -> Result<ModelConfig> {
        let path = self.path.join(CONFIG);
        if path.symlink_metadata().is_err() {
            return Ok(base);
        }
        let rows = self.config.check_new_rows(&base).is_ok();
        base.with_shape_of(&path, rows)
    }

    /// The tensors of its file, which are those that `plan` asks for of a model with `tensors`.
    ///
    /// # Errors
    /// [`Error::Tensors`] with what is missing, unexpected or of another shape; [`Error::File`] where the file cannot be read.
    pub(crate) fn open_tensors(&self, plan: &AdapterPlan, tensors: &[TensorSpec]) -> Result<AdapterTensors> {
        let path = self.path.join(ADAPTER_WEIGHTS);
        let bytes = read(&path, LARGEST_WEIGHTS)?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| {
            Error::file(&path, format!("not a readable safetensors file ({e}); fetch or save it again"))
        })?;
        let mut expected = expected(plan, tensors);
        let (mut values, mut unexpected, mut mismatched) = (BTreeMap::new(), Vec::new(), Vec::new());
        for (stored_name, view) in file.tensors() {
            let name = stored_name.strip_prefix(PREFIX).unwrap_or(&stored_name).to_string();
            // PEFT writes the matrix of an adapted output head, too; it is the base's.
            if name.strip_suffix(".base_layer.weight").is_some_and(|module| plan.of(module).is_some()) {
                continue;
            }
            let Some(shape) = expected.remove(&name) else {
                unexpected.push(stored_name);
                continue;
            };
            if view.shape() != shape {
                mismatched.push(format!("{stored_name}: expected {shape:?}, found {:?}", view.shape()));
                continue;
            }
            let decoded = stored::decode(view.dtype(), view.data());
            let decoded = decoded.map_err(|why| Error::file(&path, format!("tensor {stored_name} {why}")))?;
            values.insert(name, decoded);
        }
        let missing: Vec<String> = expected.into_keys().map(|name| format!("{PREFIX}{name}")).collect();
        if missing.is_empty() && unexpected.is_empty() && mismatched.is_empty() {
            return Ok(AdapterTensors { path, values });
        }
        Err(Error::Tensors { path, missing, unexpected, mismatched })
    }

    /// Writes both files into the directory: of the tensors those that are given, by their names in a model.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Io`] where one cannot be written.
    pub fn write(&self, parameters: Vec<Parameter>, plan: &AdapterPlan, reader: Reader) -> Result<()> {
        let path = self.path.join(ADAPTER_WEIGHTS);
        let named = |parameter: Parameter| Parameter { name: format!("{PREFIX}{}", parameter.name), ..parameter };
        write_parameters(&path, parameters.into_iter().map(named).collect(), WeightDtype::F32)?;
        Ok(write_json(&self.path.join(ADAPTER_CONFIG), &self.to_json(plan, reader)?)?)
    }

    /// `adapter_config.json`, with all that PEFT and the engines ask for. Modules stand there by whole name: presets are not known
    /// elsewhere, and an engine that splits names by their ends reads these all the same.
    fn to_json(&self, plan: &AdapterPlan, reader: Reader) -> Result<Value> {
        let mut keys = match serde_json::to_value(&self.config) {
            Ok(Value::Object(keys)) => keys,
            // A struct of plain fields is an object.
            _ => Map::new(),
        };
        // What is of another kind, or says how a run held its base, changes nothing of what the adapter is.
        keys.retain(|key, _| known(self.config.peft_type, key));
        if !matches!(self.config.target_modules, Modules::Ends(_)) || self.config.exclude_modules.is_some() {
            keys.insert("target_modules".into(), plan.modules().map(|(name, _)| name).collect());
            keys.remove("exclude_modules");
        }
        if self.config.layers_to_transform.is_some() {
            keys.insert("target_modules".into(), plan.modules().map(|(name, _)| name).collect());
            keys.remove("layers_to_transform");
        }
        let fixed = [
            ("peft_type", json!(self.config.peft_type)),
            ("task_type", json!("CAUSAL_LM")),
            ("base_model_name_or_path", json!(self.base.display().to_string())),
            ("bias", json!("none")),
            ("fan_in_fan_out", json!(false)),
            ("inference_mode", json!(true)),
        ];
        for (key, value) in fixed {
            keys.insert(key.into(), value);
        }
        keys.entry("modules_to_save").or_insert(Value::Null);
        self.config.peft_type.write(&mut keys, &self.config, plan, reader)?;
        keys.sort_keys();
        Ok(Value::Object(keys))
    }
}

/// The keys of `adapter_config.json` that lowkey knows of every kind.
const KEYS: [&str; 5] = ["peft_type", "target_modules", "exclude_modules", "layers_to_transform", "modules_to_save"];

/// Whether a key says what an adapter of that kind is.
fn known(kind: PeftType, key: &str) -> bool {
    KEYS.contains(&key) || kind.keys().contains(&key)
}

/// Names and shapes of the tensors that an adapter has.
fn expected(plan: &AdapterPlan, tensors: &[TensorSpec]) -> BTreeMap<String, Vec<usize>> {
    let saved = tensors.iter().filter(|spec| plan.saves(&spec.name)).cloned();
    let own = plan.beside(tensors).flat_map(|(module, shape, planned)| planned.tensors(module, shape));
    saved.chain(own).map(|spec| (spec.name, spec.shape)).collect()
}
