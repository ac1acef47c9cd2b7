//! Maps that PEFT finds by the name of their matrix.
//!
//! Beside transformers 5, PEFT (0.21, `_convert_peft_config_moe`) takes the modules `gate_proj`, `up_proj` and `down_proj` of DeepSeek classes
//! for experts, which that release of transformers keeps in one tensor, and leaves the layers that have no experts, or share one, without
//! their adapters: it warns, and the model answers as if those had not been trained. A matrix that is named itself (`target_parameters`,
//! since PEFT 0.17) is taken for nothing else, and the tensors of its adapter have the same names.

use lowkey_files::printable;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::config::AdapterConfig;
use super::plan::{AdapterPlan, Patterns, Target};
use crate::config::ModelConfig;
use crate::error::Result;

/// PEFT's key of the matrices.
const KEY: &str = "target_parameters";
/// What a matrix has behind the name of its map.
const WEIGHT: &str = ".weight";
/// PEFT's keys of numbers by pattern.
const RANKS: &str = "rank_pattern";
const ALPHAS: &str = "alpha_pattern";

/// Why PEFT would not apply an adapter of that map beside a model of this configuration.
pub fn overlooked_by_peft(module: &str, config: &AdapterConfig, model: &ModelConfig) -> Option<&'static str> {
    if !taken_for_expert(module, model) {
        None
    } else if is_routed(module) {
        Some("transformers keeps all experts in one tensor")
    } else if config.use_dora {
        Some(
            "PEFT takes this name for that of experts in models of this class, and finds the map by its matrix alone, where it knows no DoRA",
        )
    } else {
        None
    }
}

/// Whether PEFT takes a map of that name for one of experts in models of this class.
fn taken_for_expert(module: &str, model: &ModelConfig) -> bool {
    model.attention().latent().is_some() && module.contains(".mlp.")
}

/// Whether a map of that name is one of the experts between which tokens are routed.
fn is_routed(module: &str) -> bool {
    module.contains(".mlp.experts.")
}

/// Names maps by their matrices where PEFT finds them so alone, and the others by themselves. Numbers by pattern stand there by whole
/// name then, as PEFT fits them to what it looked for. Beside a matrix PEFT knows neither DoRA nor dropout: with these the keys stay.
pub(super) fn write(
    keys: &mut Map<String, Value>,
    config: &AdapterConfig,
    plan: &AdapterPlan,
    model: &ModelConfig,
) -> Result<()> {
    let by_matrix = |name: &str| taken_for_expert(name, model) && !is_routed(name);
    let targets: Vec<Target> = plan.modules().map(|(name, _)| Target { name, embeds: false }).collect();
    if config.use_dora || config.lora_dropout > 0.0 || !targets.iter().any(|target| by_matrix(target.name)) {
        return Ok(());
    }
    let written = |name: &str| if by_matrix(name) { format!("{name}{WEIGHT}") } else { name.to_owned() };
    let (matrices, modules): (Vec<&str>, Vec<&str>) =
        targets.iter().map(|target| target.name).partition(|name| by_matrix(name));
    keys.insert(KEY.into(), matrices.into_iter().map(written).collect());
    keys.insert("target_modules".into(), modules.into_iter().collect());
    keys.insert(RANKS.into(), by_name(&Patterns::new(RANKS, &config.rank_pattern, &targets)?, &targets, written));
    keys.insert(ALPHAS.into(), by_name(&Patterns::new(ALPHAS, &config.alpha_pattern, &targets)?, &targets, written));
    Ok(())
}

/// The numbers of these maps that have one of their own, by their names as they are written.
fn by_name<T: Copy + Serialize>(patterns: &Patterns<T>, targets: &[Target], written: impl Fn(&str) -> String) -> Value {
    let number = |target: &Target| Some((written(target.name), json!(patterns.of(target.name)?)));
    Value::Object(targets.iter().filter_map(number).collect())
}

/// Takes maps that a file names by their matrices for what they are.
pub(super) fn read(keys: &mut Map<String, Value>) -> std::result::Result<(), String> {
    let refuse = |key: &str, value: &Value, why: &str| Err(format!("{key} = {}: {why}", printable(&value.to_string())));
    let matrices = match keys.remove(KEY) {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::Array(matrices)) if matrices.is_empty() => return Ok(()),
        Some(matrices) => matrices,
    };
    let map = |matrix: &Value| matrix.as_str()?.strip_suffix(WEIGHT).map(str::to_owned);
    let Some(maps) = matrices.as_array().and_then(|all| all.iter().map(map).collect::<Option<Vec<String>>>()) else {
        return refuse(
            KEY,
            &matrices,
            "not understood here; what is, are the matrices of maps, such as up_proj.weight",
        );
    };
    for key in [RANKS, ALPHAS] {
        let Some(Value::Object(patterns)) = keys.get_mut(key) else { continue };
        // PEFT fits a pattern to the name of the matrix, so that without its end it is one for other maps.
        let is_of_module = |pattern: &&String| !pattern.ends_with(WEIGHT) && !pattern.starts_with("model.");
        if let Some(pattern) = patterns.keys().find(is_of_module) {
            let why = "beside target_parameters only whole names are understood here";
            return refuse(key, &json!(pattern), why);
        }
        let module = |(name, number): (String, Value)| (name.strip_suffix(WEIGHT).unwrap_or(&name).to_owned(), number);
        *patterns = std::mem::take(patterns).into_iter().map(module).collect();
    }
    match keys.entry("target_modules").or_insert(Value::Null) {
        modules @ Value::Null => *modules = json!(maps),
        Value::Array(modules) => modules.extend(maps.into_iter().map(Value::String)),
        other => {
            return refuse("target_modules", other, "beside target_parameters only a list of names is understood here");
        }
    }
    Ok(())
}
