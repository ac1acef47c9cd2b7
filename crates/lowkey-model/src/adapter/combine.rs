//! Several adapters of one model as one: the weighted sum of what each adds.
//!
//! Σ wᵢ·sᵢ·Bᵢ·Aᵢ is a product again: the Aᵢ one below the other, beside each other the Bᵢ times wᵢ·sᵢ. It is as wide as all of them
//! together, and nothing of it is approximated.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::Device;

use super::config::{AdapterConfig, ByPattern, Modules};
use super::files::AdapterDir;
use super::plan::AdapterPlan;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::model::CausalLm;
use crate::tensor::{Part, Role};

/// A factor as it grows: its shape and its numbers.
type Factor = ([usize; 2], Vec<f32>);

impl CausalLm {
    /// The model in `dir` with the sum of several adapters beside it, each times its weight.
    ///
    /// # Errors
    /// As [`CausalLm::load_adapted`]; [`Error::Adapter`] for adapters that do not add up: those that train lengths of rows (DoRA) or save
    /// parts whole, and weights that are no numbers or 0.
    pub fn load_combined(
        dir: &Path,
        config: &ModelConfig,
        adapters: &[(AdapterDir, f64)],
        device: &Device,
    ) -> Result<Self> {
        let tensors = config.tensors();
        let mut factors: BTreeMap<String, Factor> = BTreeMap::new();
        let mut ranks: BTreeMap<String, usize> = BTreeMap::new();
        for (adapter, weight) in adapters {
            check(adapter, *weight)?;
            let plan = adapter.plan(config)?;
            let mut values = adapter.open_tensors(&plan, &tensors)?;
            for (module, shape, planned) in plan.beside(&tensors) {
                let low = planned.as_low_rank().ok_or_else(|| {
                    let why = format!("{} is no product, and no sum of products therefore", adapter.path.display());
                    Error::adapter("peft_type", &format!("{:?}", adapter.config.peft_type), why)
                })?;
                *ranks.entry(module.to_string()).or_default() += low.r;
                for spec in planned.tensors(module, shape) {
                    let found = values.take(&spec.name)?;
                    let [rows, columns] = <[usize; 2]>::try_from(spec.shape).unwrap_or_default();
                    let reads = spec.role == Role::Adapter(Part::Reads);
                    let empty = if reads { [0, columns] } else { [rows, 0] };
                    let (shape, sum) = factors.entry(spec.name).or_insert_with(|| (empty, Vec::new()));
                    if reads {
                        sum.extend(found);
                        shape[0] += rows;
                    } else {
                        *sum = beside(sum, shape[1], &found, columns, weight * low.scale);
                        shape[1] += columns;
                    }
                }
            }
        }
        let combined = keys(&ranks);
        let plan: AdapterPlan = combined.plan(config)?;
        let taken = std::cell::RefCell::new(factors);
        Self::adapted(dir, config, (&combined, plan), device, &|spec, _| {
            Ok(taken.borrow_mut().remove(&spec.name).map(|(_, values)| values))
        })
    }
}

/// The keys of an adapter that has these ranks, and factors of 1.
fn keys(ranks: &BTreeMap<String, usize>) -> AdapterConfig {
    let pattern = |module: &String| regex::escape(module);
    let widest = ranks.values().copied().max().unwrap_or(1);
    AdapterConfig {
        target_modules: Modules::Ends(ranks.keys().cloned().collect()),
        lora_alpha: widest as f64,
        rank_pattern: ByPattern(ranks.iter().map(|(module, r)| (pattern(module), *r)).collect()),
        alpha_pattern: ByPattern(ranks.iter().map(|(module, r)| (pattern(module), *r as f64)).collect()),
        ..AdapterConfig::all_linear(widest)
    }
}

/// The rows of one matrix followed by those of another, which is multiplied by `factor`.
fn beside(left: &[f32], left_width: usize, right: &[f32], right_width: usize, factor: f64) -> Vec<f32> {
    let rows = right.len() / right_width.max(1);
    let row = |i: usize| {
        let scaled = right[i * right_width..(i + 1) * right_width].iter().map(|x| (f64::from(*x) * factor) as f32);
        left[i * left_width..(i + 1) * left_width].iter().copied().chain(scaled).collect::<Vec<f32>>()
    };
    (0..rows).flat_map(row).collect()
}

fn check(adapter: &AdapterDir, weight: f64) -> Result<()> {
    let path = adapter.path.display();
    if !(weight.is_finite() && weight != 0.0) {
        return Err(Error::adapter("weight", &weight, format!("of {path} must be a finite number other than 0")));
    }
    if adapter.config.use_dora {
        let why =
            format!("{path} trains the lengths of rows, which are no sum; merge it by itself, with a weight of 1");
        return Err(Error::adapter("use_dora", &true, why));
    }
    match &adapter.config.modules_to_save {
        Some(saved) if !saved.is_empty() => {
            let why = format!(
                "{path} has parts that were trained whole, which are no sum; merge it by itself, with a weight of 1"
            );
            Err(Error::adapter("modules_to_save", &saved.join(", "), why))
        }
        _ => Ok(()),
    }
}
