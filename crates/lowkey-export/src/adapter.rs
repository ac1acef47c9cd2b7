//! Adapters for the engines that apply them, and a clear no where one would be ignored.
//!
//! An engine that splits or multiplies out a matrix when it loads it does not see an adapter of that matrix, and most say nothing: the
//! model then answers as if it had never been tuned. What each applies was read in its source (September 2026):
//!
//! | engine | applies | ignores or refuses |
//! |---|---|---|
//! | transformers with PEFT | all but routed experts, which transformers 5 keeps in one tensor | DoRA of other feed-forward layers of the DeepSeek classes ([`overlooked_by_peft`]) |
//! | SGLang | all maps of blocks | DoRA, parts that are saved whole, the output head and the embedding |
//! | vLLM | all maps of blocks but `kv_b_proj` | the same, and `kv_b_proj` in silence (vllm #48974) |
//! | llama.cpp | of `deepseek2` the output map and the feed-forward layers; of others all maps | the rest of `deepseek2` in silence; DoRA; the embedding in this form |

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use lowkey_files::mark::Kind;
use lowkey_model::{
    ModelConfig, NewModelDir, Parameter,
    adapter::{
        AdapterConfig, AdapterDir, AdapterPlan, ByPattern, Modules, PeftType, Planned, Reader, overlooked_by_peft,
    },
    attention::MlaConfig,
    tensor::{Part, Role, TensorSpec},
};

use crate::error::{Error, Result};
use crate::gguf;
use crate::source::Source;

/// The file for llama.cpp.
pub const GGUF: &str = "adapter.gguf";

/// What an adapter is written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// transformers with PEFT.
    Transformers,
    /// vLLM.
    Vllm,
    /// SGLang.
    Sglang,
    /// llama.cpp.
    LlamaCpp,
}

impl FromStr for Engine {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Ok(match name {
            "transformers" => Self::Transformers,
            "vllm" => Self::Vllm,
            "sglang" => Self::Sglang,
            "llamacpp" => Self::LlamaCpp,
            _ => return Err(Error::setting("for", name, "must be transformers, vllm, sglang or llamacpp")),
        })
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Transformers => "transformers",
            Self::Vllm => "vLLM",
            Self::Sglang => "SGLang",
            Self::LlamaCpp => "llama.cpp",
        })
    }
}

impl Engine {
    /// Whether it applies adapters of a kind at all. A kind that is not named here is applied by none, and merging it is the way.
    fn applies(self, kind: PeftType) -> bool {
        match self {
            Self::Transformers | Self::Vllm | Self::Sglang | Self::LlamaCpp => matches!(kind, PeftType::Lora),
        }
    }

    /// Why it would not apply the adapter of a map with this matrix, where it would not.
    fn ignores(self, matrix: &TensorSpec, config: &AdapterConfig, model: &ModelConfig) -> Option<&'static str> {
        let module = matrix.name.strip_suffix(".weight").unwrap_or(&matrix.name);
        let is = |end: &str| module.ends_with(end);
        match self {
            Self::Vllm | Self::Sglang | Self::LlamaCpp if matrix.role == Role::Embedding => {
                Some("adapters of the embedding are written for transformers alone")
            }
            Self::Transformers => overlooked_by_peft(module, config, model),
            Self::Vllm | Self::Sglang if matrix.role == Role::Head => {
                Some("the engine applies adapters within blocks alone")
            }
            Self::Vllm if is(".kv_b_proj") => {
                Some("vLLM splits this matrix when it loads it, and applies no adapter to the halves (vllm #48974)")
            }
            Self::Vllm | Self::Sglang => None,
            // Which layer a map belongs to its role does not say.
            Self::LlamaCpp if model.attention().latent().is_some() && !(is(".o_proj") || module.contains(".mlp.")) => {
                Some("llama.cpp's graph of latent attention multiplies by this matrix without looking for adapters")
            }
            Self::LlamaCpp => None,
        }
    }
}

/// Writes the adapter of `source` into a new folder, in the form that an engine reads. Where maps differ in rank or factor, an engine
/// that knows one of each gets all as wide as the widest, with the factor multiplied into B: the same product.
///
/// # Errors
/// [`Error::Unsupported`] naming what the engine would ignore, [`Error::File`] where `out` is in use or `source` has no adapter.
pub fn export_adapter(source: &Source, engine: Engine, out: &Path, overwrite: bool) -> Result<()> {
    let Some(config) = source.model.adapter() else {
        return Err(Error::file(source.dir.given(), "has no adapter; give one with --adapter DIR"));
    };
    let plan = config.plan(&source.model.config)?;
    check(engine, config, &plan, &source.model.config)?;
    let staging = NewModelDir::begin(out, Kind::Export, overwrite, &source.dir)?;
    let dir = staging.dir();
    match engine {
        Engine::Transformers => {
            // Beside some maps PEFT knows no dropout, which computes nothing here.
            let keys = AdapterConfig { lora_dropout: 0.0, ..config.clone() };
            source.model.save_adapter_as(dir, keys, Reader::Peft(&source.model.config))?;
        }
        Engine::Vllm | Engine::Sglang if config.rank_pattern.is_empty() && config.alpha_pattern.is_empty() => {
            source.model.save_adapter_as(dir, config.clone(), Reader::Engine)?;
        }
        Engine::Vllm | Engine::Sglang => {
            let (uniform, parameters) = uniform(source, config, &plan)?;
            let base = source.dir.path().to_path_buf();
            AdapterDir { path: dir.to_path_buf(), config: uniform, base }.write(parameters, &plan, Reader::Engine)?;
        }
        Engine::LlamaCpp => {
            let (uniform, parameters) = uniform(source, config, &plan)?;
            gguf::write_adapter(&dir.join(GGUF), &source.model.config, &plan, uniform.lora_alpha, parameters)?;
        }
    }
    if engine != Engine::LlamaCpp {
        staging.carry(&source.dir)?;
    }
    staging.commit()?;
    Ok(())
}

/// Refuses what an engine would leave out.
fn check(engine: Engine, config: &AdapterConfig, plan: &AdapterPlan, model: &ModelConfig) -> Result<()> {
    let refuse = |what: String| {
        let why = format!("{what}; merge the adapter (lowkey merge), which every engine computes");
        Err(Error::Unsupported { format: "the engine's adapter", why })
    };
    // An engine that cannot compute the base, or has it with other weights, would put the adapter beside something else.
    if let Some(why) = model.attention().latent().map(MlaConfig::folded).as_ref().and_then(MlaConfig::beyond_deepseek) {
        return refuse(format!("its base has {why}"));
    }
    if let Some((module, why)) = folded_away(plan, model) {
        return refuse(format!("{module} is not the same in the exported base, where {why}"));
    }
    if !engine.applies(config.peft_type) {
        return refuse(format!("{engine} applies no adapters of this kind ({:?})", config.peft_type));
    }
    let tensors = model.tensors();
    let adapted = tensors.iter().filter_map(|spec| {
        let module = spec.name.strip_suffix(".weight")?;
        plan.of(module).map(|_| (module, spec))
    });
    let ignored: Vec<(&str, &str)> =
        adapted.filter_map(|(name, spec)| Some((name, engine.ignores(spec, config, model)?))).collect();
    if let Some((module, why)) = ignored.first() {
        let others = match ignored.len() {
            1 => String::new(),
            count => format!(" (and {} others)", count - 1),
        };
        return refuse(format!("{engine} would not apply {module}{others}: {why}"));
    }
    if engine != Engine::Transformers && config.use_dora {
        return refuse(format!("{engine} does not know use_dora"));
    }
    match &config.modules_to_save {
        Some(saved) if engine != Engine::Transformers && !saved.is_empty() => {
            refuse(format!("{engine} does not read modules_to_save ({})", saved.join(", ")))
        }
        _ => Ok(()),
    }
}

/// A module that the adapter replaces or multiplies, and that an export of the base writes with something folded into it.
fn folded_away(plan: &AdapterPlan, model: &ModelConfig) -> Option<(String, &'static str)> {
    let mla = model.attention().latent()?;
    let cut = model.kv_cache_ranks().is_some();
    model.tensors().into_iter().find_map(|spec| {
        let module = spec.name.strip_suffix(".weight")?;
        let why = if module.ends_with(".kv_a_layernorm") && mla.latent_scale && plan.saves(&spec.name) {
            "latent_scale is multiplied into it"
        } else if module.ends_with(".kv_b_proj") && cut && (plan.of(module).is_some() || plan.saves(&spec.name)) {
            "latents are whole again"
        } else {
            return None;
        };
        Some((module.to_string(), why))
    })
}

/// The same adapter with one rank and a factor of 1: A and B are as wide as the widest, with zeros, and B is multiplied by s.
fn uniform(source: &Source, config: &AdapterConfig, plan: &AdapterPlan) -> Result<(AdapterConfig, Vec<Parameter>)> {
    let lows = plan.modules().filter_map(|(_, planned)| planned.as_low_rank());
    let widest = lows.map(|low| low.r).max().unwrap_or(1);
    let mut parameters = Vec::new();
    for parameter in source.model.parameters() {
        let low = plan.adapted(&parameter.name).map(|(_, planned)| planned).and_then(Planned::as_low_rank);
        let (Some(low), Ok([rows, columns])) = (low, <[usize; 2]>::try_from(&parameter.shape[..])) else { continue };
        let values = || {
            let values = parameter.value.clone().try_into_vec_as::<f32>();
            values.map_err(|e| Error::device(&parameter.name, e))
        };
        let (values, shape) = match parameter.role {
            Role::Adapter(Part::Reads) => {
                let mut values = values()?;
                values.resize(widest * columns, 0.0);
                (values, vec![widest, columns])
            }
            Role::Adapter(Part::Writes) => {
                let scaled = |x: &f32| (f64::from(*x) * low.scale) as f32;
                let wide = |row: &[f32]| {
                    let nothing = std::iter::repeat_n(0.0, widest - columns);
                    row.iter().map(scaled).chain(nothing).collect::<Vec<f32>>()
                };
                (values()?.chunks(columns.max(1)).flat_map(wide).collect(), vec![rows, widest])
            }
            _ => continue,
        };
        let len = values.len();
        let value =
            burn::tensor::Tensor::from_data(burn::tensor::TensorData::new(values, [len]), &parameter.value.device());
        parameters.push(Parameter { shape, value, ..parameter });
    }
    let names = plan.modules().map(|(name, _)| name.to_string()).collect();
    let uniform = AdapterConfig {
        target_modules: Modules::Ends(names),
        r: widest,
        lora_alpha: widest as f64,
        rank_pattern: ByPattern::default(),
        alpha_pattern: ByPattern::default(),
        use_rslora: false,
        exclude_modules: None,
        layers_to_transform: None,
        ..config.clone()
    };
    Ok((uniform, parameters))
}

#[cfg(test)]
mod tests;
