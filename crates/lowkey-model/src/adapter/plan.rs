//! Which maps of a model get an adapter, and what it is: PEFT's rules of matching, without its silences.

use std::collections::BTreeMap;

use lowkey_kernels::quantized_linear::Quantization;
use regex::Regex;

use super::config::{AdapterConfig, ByPattern, Modules};
use super::kind::Planned;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::tensor::{Role, TensorSpec, layer_of};

/// A map that gets an adapter.
pub(super) struct Target<'a> {
    /// Its name.
    pub(super) name: &'a str,
    /// Whether it is the embedding.
    pub(super) embeds: bool,
}

/// What [`AdapterConfig`] means for one model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdapterPlan {
    /// Adapters by the name of their map, such as `model.layers.0.self_attn.kv_b_proj`.
    adapters: BTreeMap<String, Planned>,
    /// Names of the tensors that are trained whole.
    saved: Vec<String>,
    /// How the frozen matrices are packed.
    pub(super) quantization: Option<Quantization>,
}

impl AdapterPlan {
    /// A plan without adapters.
    pub(crate) fn packing(quantization: Quantization) -> Self {
        Self { adapters: BTreeMap::new(), saved: Vec::new(), quantization: Some(quantization) }
    }

    /// The adapter of the map of that name, where it has one.
    pub fn of(&self, module: &str) -> Option<&Planned> {
        self.adapters.get(module)
    }

    /// The map that a tensor belongs to whose name is that of a map with something behind it, where that map has an adapter: of a tensor of
    /// an adapter the one that it stands beside.
    pub fn adapted<'t>(&self, tensor: &'t str) -> Option<(&'t str, &Planned)> {
        let modules = tensor.match_indices('.').map(|(at, _)| &tensor[..at]);
        modules.into_iter().find_map(|module| Some((module, self.of(module)?)))
    }

    /// The maps that have an adapter, by name.
    pub fn modules(&self) -> impl Iterator<Item = (&str, &Planned)> {
        self.adapters.iter().map(|(name, planned)| (name.as_str(), planned))
    }

    /// The adapters of a model with these tensors before it has any, each with the name of its map and the shape of that one's matrix.
    pub(super) fn beside<'a>(
        &'a self,
        tensors: &'a [TensorSpec],
    ) -> impl Iterator<Item = (&'a str, [usize; 2], &'a Planned)> {
        tensors.iter().filter_map(|spec| {
            let module = spec.name.strip_suffix(".weight")?;
            let shape = <[usize; 2]>::try_from(&spec.shape[..]).ok()?;
            Some((module, shape, self.of(module)?))
        })
    }

    /// Numbers of adapters that a token is multiplied by, for a model with these tensors before it has adapters: of the embedding's all
    /// but those in which it is looked up.
    pub fn factor_numbers(&self, tensors: &[TensorSpec]) -> usize {
        self.beside(tensors).map(|(_, shape, planned)| planned.products(shape)).sum()
    }

    /// Numbers of all adapters, for such a model.
    pub fn numbers(&self, tensors: &[TensorSpec]) -> usize {
        let specs = self.beside(tensors).flat_map(|(module, shape, planned)| planned.tensors(module, shape));
        specs.map(|spec| spec.shape.iter().product::<usize>()).sum()
    }

    /// Whether a tensor is trained: those of adapters, and those that are saved whole.
    pub fn trains(&self, spec: &TensorSpec) -> bool {
        spec.role.is_adapter() || self.saves(&spec.name)
    }

    /// Whether a tensor of the base is trained whole and saved with the adapter.
    pub fn saves(&self, tensor: &str) -> bool {
        self.saved.iter().any(|name| name == tensor)
    }
}

impl AdapterConfig {
    /// What gets an adapter in a model of that configuration.
    ///
    /// # Errors
    /// [`Error::Adapter`] for a name or pattern that fits nothing, and for values that no adapter can have.
    pub fn plan(&self, model: &ModelConfig) -> Result<AdapterPlan> {
        self.plan_for(&model.tensors())
    }

    /// [`AdapterConfig::plan`] for the tensors of a model.
    pub(crate) fn plan_for(&self, tensors: &[TensorSpec]) -> Result<AdapterPlan> {
        let is_map = |spec: &&TensorSpec| match spec.role {
            Role::Matrix | Role::Residual | Role::Head | Role::Embedding => true,
            Role::Norm | Role::Bias | Role::Adapter(_) => false,
        };
        let maps: Vec<(&str, &TensorSpec)> =
            tensors.iter().filter(is_map).map(|spec| (module_of(&spec.name), spec)).collect();
        let saved = self.saved(tensors)?;
        let mut chosen = chosen("target_modules", &self.target_modules, &maps)?;
        if let Some(excluded) = &self.exclude_modules {
            let excluded = self::chosen("exclude_modules", excluded, &maps)?;
            chosen.retain(|name| !excluded.contains(name));
        }
        if let Some(layers) = &self.layers_to_transform {
            let there: Vec<usize> = maps.iter().filter_map(|(name, _)| layer_of(name)).collect();
            if let Some(missing) = layers.each().iter().find(|layer| !there.contains(layer)) {
                let count = there.iter().max().map_or(0, |last| last + 1);
                return Err(Error::adapter("layers_to_transform", missing, format!("the model has {count} layers")));
            }
            chosen.retain(|name| layer_of(name).is_some_and(|layer| layers.each().contains(&layer)));
        }
        // What is trained whole needs no adapter.
        chosen.retain(|name| !saved.iter().any(|tensor| module_of(tensor) == *name));
        if chosen.is_empty() && saved.is_empty() {
            return Err(Error::adapter("target_modules", "…", "no map is left that would get an adapter"));
        }
        let embedding = tensors.iter().find(|spec| spec.role == Role::Embedding).map(|spec| module_of(&spec.name));
        check_embedding(tensors, embedding.filter(|name| chosen.contains(name)))?;
        let targets = chosen.iter().map(|name| Target { name, embeds: embedding == Some(*name) });
        let adapters = self.peft_type.plan(self, &targets.collect::<Vec<_>>())?;
        Ok(AdapterPlan { adapters, saved, quantization: self.quantization })
    }

    /// Refuses an adapter of a model with new tokens that would not save their rows.
    ///
    /// # Errors
    /// [`Error::Adapter`] naming the part that is to be trained whole.
    pub fn check_new_rows(&self, model: &ModelConfig) -> Result<()> {
        let (tensors, plan) = (model.tensors(), self.plan(model)?);
        let has_rows = |spec: &&TensorSpec| matches!(spec.role, Role::Embedding | Role::Head);
        let parts: Vec<&TensorSpec> = tensors.iter().filter(has_rows).collect();
        match parts.iter().find(|spec| !plan.saves(&spec.name)) {
            None => Ok(()),
            Some(missing) => {
                let ends = parts.iter().filter_map(|spec| module_of(&spec.name).rsplit('.').next());
                let ends: Vec<String> = ends.map(|end| format!("\"{end}\"")).collect();
                let why = format!(
                    "new tokens have rows of their own in {}, which an adapter beside it neither trains nor saves; write \
                     modules_to_save = [{}]",
                    module_of(&missing.name),
                    ends.join(", ")
                );
                Err(Error::adapter(
                    "modules_to_save",
                    &format!("{:?}", self.modules_to_save.iter().flatten().collect::<Vec<_>>()),
                    why,
                ))
            }
        }
    }

    /// The tensors that `modules_to_save` names.
    fn saved(&self, tensors: &[TensorSpec]) -> Result<Vec<String>> {
        let mut saved = Vec::new();
        for end in self.modules_to_save.iter().flatten() {
            let before = saved.len();
            // Here PEFT asks for no dot: `norm` is every norm.
            let of = |spec: &&TensorSpec| module_of(&spec.name).ends_with(end.as_str());
            saved.extend(tensors.iter().filter(of).map(|spec| spec.name.clone()));
            if saved.len() == before {
                let tied = if ends_with("lm_head", end) { " (the output head is the embedding)" } else { "" };
                return Err(Error::adapter("modules_to_save", end, format!("no part of the model ends so{tied}")));
            }
        }
        saved.sort();
        saved.dedup();
        Ok(saved)
    }
}

/// Refuses an adapter of the embedding where it cannot be had right.
fn check_embedding(tensors: &[TensorSpec], chosen: Option<&str>) -> Result<()> {
    let Some(name) = chosen else { return Ok(()) };
    if tensors.iter().any(|spec| spec.role == Role::Head) {
        return Ok(());
    }
    let why = "the embedding is the output head, too, and PEFT applies such an adapter to one of them alone, so that it could not be \
               merged; train it whole: modules_to_save = [\"embed_tokens\"]";
    Err(Error::adapter("target_modules", name, why))
}

/// Numbers by pattern, each of which fits something.
pub(super) struct Patterns<T>(Vec<(Regex, T)>);

impl<T: Copy> Patterns<T> {
    pub(super) fn new(key: &'static str, patterns: &ByPattern<T>, targets: &[Target]) -> Result<Self> {
        let parsed = |(pattern, value): &(String, T)| {
            let regex = regex(key, pattern, &format!(r"^(?:.*\.)?(?:{pattern})$"))?;
            if !targets.iter().any(|target| regex.is_match(target.name)) {
                return Err(Error::adapter(key, pattern, "fits no map that gets an adapter"));
            }
            Ok((regex, *value))
        };
        Ok(Self(patterns.0.iter().map(parsed).collect::<Result<_>>()?))
    }

    pub(super) fn of(&self, name: &str) -> Option<T> {
        self.0.iter().find(|(pattern, _)| pattern.is_match(name)).map(|(_, value)| *value)
    }
}

/// The maps that a key names, in the model's order.
fn chosen<'a>(key: &'static str, modules: &Modules, maps: &[(&'a str, &TensorSpec)]) -> Result<Vec<&'a str>> {
    let names = |keep: &dyn Fn(&str, &TensorSpec) -> bool| -> Vec<&'a str> {
        maps.iter().filter(|(name, spec)| keep(name, spec)).map(|(name, _)| *name).collect()
    };
    let inner = |spec: &TensorSpec| !matches!(spec.role, Role::Head | Role::Embedding);
    let text = match modules {
        Modules::Ends(ends) => {
            for end in ends {
                if !maps.iter().any(|(name, _)| ends_with(name, end)) {
                    return Err(nothing(key, end, maps));
                }
            }
            return Ok(names(&|name, _| ends.iter().any(|end| ends_with(name, end))));
        }
        Modules::One(text) => text,
    };
    Ok(match text.to_ascii_lowercase().as_str() {
        "all-linear" => names(&|_, spec| inner(spec)),
        "vllm-safe" => names(&|name, spec| inner(spec) && !ends_with(name, "kv_b_proj")),
        "everything" => names(&|_, spec| spec.role != Role::Embedding),
        _ => {
            let regex = regex(key, text, &format!("^(?:{text})$"))?;
            let found = names(&|name, _| regex.is_match(name));
            if found.is_empty() {
                return Err(nothing(key, text, maps));
            }
            found
        }
    })
}

fn regex(key: &'static str, written: &str, pattern: &str) -> Result<Regex> {
    /// Compiled, far more than names of tensors need.
    const LARGEST: usize = 1 << 20;
    let built = regex::RegexBuilder::new(pattern).size_limit(LARGEST).build();
    built.map_err(|_| Error::adapter(key, written, "is no regular expression (look-around is not understood)"))
}

fn nothing(key: &'static str, written: &str, maps: &[(&str, &TensorSpec)]) -> Error {
    let mut ends: Vec<&str> = maps.iter().filter_map(|(name, _)| name.rsplit('.').next()).collect();
    ends.sort_unstable();
    ends.dedup();
    Error::adapter(key, written, format!("fits no map of the model; their names end in {}", ends.join(", ")))
}

/// Whether a name is `end`, or ends in it behind a dot.
fn ends_with(name: &str, end: &str) -> bool {
    name == end || name.strip_suffix(end).is_some_and(|rest| rest.ends_with('.'))
}

/// The module of a tensor: its name without the last part.
pub(crate) fn module_of(tensor: &str) -> &str {
    tensor.rsplit_once('.').map_or(tensor, |(module, _)| module)
}
