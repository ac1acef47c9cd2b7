//! Which maps of a model get an adapter, and what it is: PEFT's rules of matching, without its silences.

use std::collections::BTreeMap;

use lowkey_kernels::quantized_linear::Quantization;
use regex::Regex;

use super::config::{AdapterConfig, ByPattern, Modules};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::tensor::{HeadRows, Role, TensorSpec, layer_of};

/// The adapter of one map.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LowRank {
    /// Numbers between A and B.
    pub r: usize,
    /// s: α/r, or α/√r.
    pub scale: f64,
    /// Whether the lengths of the rows are trained, too.
    pub use_dora: bool,
    /// The chance that a number is left out in training.
    pub dropout: f64,
    /// Whether the map is the embedding, whose table stands on its side: `[d_in, d_out]`.
    pub embeds: bool,
}

impl LowRank {
    /// Its tensors beside the map of that name, whose matrix has that shape: A, B, and of DoRA the lengths of the rows. The only place
    /// where they are named.
    pub(crate) fn tensors(&self, module: &str, [rows, columns]: [usize; 2]) -> Vec<TensorSpec> {
        let Self { r, use_dora, embeds, .. } = *self;
        let ([d_out, d_in], [a, b]) = match embeds {
            false => ([rows, columns], ["lora_A.weight", "lora_B.weight"]),
            // PEFT writes these without `.weight`, and the lengths.
            true => ([columns, rows], ["lora_embedding_A", "lora_embedding_B"]),
        };
        let of = |part: &str, shape: Vec<usize>, role: Role, rows: usize| TensorSpec {
            name: format!("{module}.{part}"),
            shape,
            role,
            head_rows: HeadRows::one(rows),
            trainable: true,
        };
        let mut tensors = vec![of(a, vec![r, d_in], Role::LoraA, r), of(b, vec![d_out, r], Role::LoraB, d_out)];
        if use_dora {
            tensors.push(of("lora_magnitude_vector", vec![d_out], Role::Magnitude, d_out));
        }
        tensors
    }
}

/// What [`AdapterConfig`] means for one model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdapterPlan {
    /// Adapters by the name of their map, such as `model.layers.0.self_attn.kv_b_proj`.
    adapters: BTreeMap<String, LowRank>,
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
    pub fn of(&self, module: &str) -> Option<&LowRank> {
        self.adapters.get(module)
    }

    /// The maps that have an adapter, by name.
    pub fn modules(&self) -> impl Iterator<Item = (&str, &LowRank)> {
        self.adapters.iter().map(|(name, low_rank)| (name.as_str(), low_rank))
    }

    /// Numbers of the factors that a token is multiplied by, for a model with these tensors before it has adapters: of all but the
    /// embedding's first factor, in which it is looked up.
    pub fn factor_numbers(&self, tensors: &[TensorSpec]) -> usize {
        let of = |spec: &TensorSpec| match (self.of(module_of(&spec.name)), &spec.shape[..]) {
            (Some(LowRank { r, embeds: true, .. }), [_, d_out]) => r * d_out,
            (Some(LowRank { r, .. }), [d_out, d_in]) => r * (d_out + d_in),
            _ => 0,
        };
        tensors.iter().map(of).sum()
    }

    /// Numbers of all adapters, the lengths of rows that DoRA trains included, as [`AdapterPlan::factor_numbers`].
    pub fn numbers(&self, tensors: &[TensorSpec]) -> usize {
        let lengths = |spec: &TensorSpec| match (self.of(module_of(&spec.name)), &spec.shape[..]) {
            (Some(LowRank { use_dora: true, .. }), [d_out, _]) => *d_out,
            _ => 0,
        };
        self.factor_numbers(tensors) + tensors.iter().map(lengths).sum::<usize>()
    }

    /// Whether some adapter trains the lengths of rows (DoRA).
    pub(super) fn has_lengths(&self) -> bool {
        self.adapters.values().any(|low_rank| low_rank.use_dora)
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
            Role::Norm | Role::Bias | Role::LoraA | Role::LoraB | Role::Magnitude => false,
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
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(Error::adapter("lora_dropout", &self.lora_dropout, "must lie in 0 ≤ p < 1"));
        }
        let embedding = tensors.iter().find(|spec| spec.role == Role::Embedding).map(|spec| module_of(&spec.name));
        self.check_embedding(tensors, embedding.filter(|name| chosen.contains(name)))?;
        let ranks = Patterns::new("rank_pattern", &self.rank_pattern, &chosen)?;
        let alphas = Patterns::new("alpha_pattern", &self.alpha_pattern, &chosen)?;
        let mut adapters = BTreeMap::new();
        for name in chosen {
            let (r, alpha) = (ranks.of(name).unwrap_or(self.r), alphas.of(name).unwrap_or(self.lora_alpha));
            if r == 0 || r > 1 << 16 {
                return Err(Error::adapter("r", &r, format!("of {name} must lie between 1 and {}", 1 << 16)));
            }
            if !(alpha.is_finite() && alpha > 0.0) {
                return Err(Error::adapter("lora_alpha", &alpha, format!("of {name} must be a finite number > 0")));
            }
            let per = if self.use_rslora { (r as f64).sqrt() } else { r as f64 };
            let embeds = embedding == Some(name);
            let (use_dora, dropout) = (self.use_dora, self.lora_dropout);
            adapters.insert(name.to_string(), LowRank { r, scale: alpha / per, use_dora, dropout, embeds });
        }
        Ok(AdapterPlan { adapters, saved, quantization: self.quantization })
    }

    /// Refuses an adapter of the embedding where it cannot be had right.
    fn check_embedding(&self, tensors: &[TensorSpec], chosen: Option<&str>) -> Result<()> {
        let Some(name) = chosen else { return Ok(()) };
        let refuse = |why: &str| Err(Error::adapter("target_modules", name, why));
        if !tensors.iter().any(|spec| spec.role == Role::Head) {
            return refuse(
                "the embedding is the output head, too, and PEFT applies such an adapter to one of them alone, so that it could not \
                 be merged; train it whole: modules_to_save = [\"embed_tokens\"]",
            );
        }
        if self.use_dora {
            return refuse("use_dora is not for the embedding; leave one of them out");
        }
        Ok(())
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

/// Numbers by pattern, each of which fits something.
struct Patterns<T>(Vec<(Regex, T)>);

impl<T: Copy> Patterns<T> {
    fn new(key: &'static str, patterns: &ByPattern<T>, targets: &[&str]) -> Result<Self> {
        let parsed = |(pattern, value): &(String, T)| {
            let regex = regex(key, pattern, &format!(r"^(?:.*\.)?(?:{pattern})$"))?;
            if !targets.iter().any(|name| regex.is_match(name)) {
                return Err(Error::adapter(key, pattern, "fits no map that gets an adapter"));
            }
            Ok((regex, *value))
        };
        Ok(Self(patterns.0.iter().map(parsed).collect::<Result<_>>()?))
    }

    fn of(&self, name: &str) -> Option<T> {
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

/// The module that a tensor of an adapter stands beside: what its name was made of in [`LowRank`]'s adapter.
pub fn adapted_module(tensor: &str) -> &str {
    tensor.split(".lora_").next().unwrap_or_default()
}
