//! Models with adapters: begun anew, loaded, left off, multiplied out.

use std::path::Path;
use std::sync::Arc;

use burn::tensor::Device;
use rand::RngExt;

use super::config::AdapterConfig;
use super::files::AdapterDir;
use super::plan::{AdapterPlan, module_of};
use crate::checkpoint::Weights;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::init::stream;
use crate::model::{CausalLm, Linear};
use crate::tensor::{Role, TensorSpec};

/// Values of a tensor by name.
type Base<'a> = dyn Fn(&str) -> Result<Vec<f32>> + 'a;

/// Values of a tensor that are not those of the base, which is at hand.
type Own<'a> = dyn Fn(&TensorSpec, &Base) -> Result<Option<Vec<f32>>> + 'a;

impl CausalLm {
    /// The model in `dir` with new adapters: what it computes is what it computed. A is drawn evenly from ±1/√d_in, as PEFT does, each
    /// map from a stream of its own; B is zero; lengths are those of the rows. All but adapters and what is saved with them is frozen.
    ///
    /// # Errors
    /// As [`CausalLm::load_with`] and [`AdapterConfig::plan`].
    pub fn begin_adapter(
        dir: &Path,
        config: &ModelConfig,
        adapter: &AdapterConfig,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        let plan = adapter.plan(config)?;
        let tensors = if adapter.use_dora { config.tensors() } else { Vec::new() };
        // The lengths of the rows that the model computes with.
        let lengths = |name: &str, rows: usize, base: &Base| -> Result<Vec<f32>> {
            let weight = match tensors.iter().find(|spec| spec.name == name) {
                Some(spec) => plan.as_packed(spec, base(name)?),
                None => base(name)?,
            };
            Ok(row_lengths(&weight, rows))
        };
        let begun = |spec: &TensorSpec, base: &Base| match spec.role {
            Role::LoraA => Ok(Some(first_values(seed, spec))),
            Role::LoraB => Ok(Some(vec![0.0; spec.shape.iter().product()])),
            Role::Magnitude => {
                let rows = spec.shape.iter().product::<usize>();
                lengths(&format!("{}.weight", module_of(&spec.name)), rows, base).map(Some)
            }
            Role::Embedding | Role::Head | Role::Matrix | Role::Residual | Role::Norm | Role::Bias => Ok(None),
        };
        Self::adapted(dir, config, (adapter, plan.clone()), device, &begun)
    }

    /// The model in `dir` with the adapter of a directory.
    ///
    /// # Errors
    /// As [`CausalLm::load_with`] and [`AdapterConfig::plan`]; [`Error::Tensors`] where the adapter's tensors are not those that its
    /// configuration asks for.
    pub fn load_adapted(dir: &Path, config: &ModelConfig, adapter: &AdapterDir, device: &Device) -> Result<Self> {
        let plan = adapter.config.plan(config)?;
        let mut values = adapter.open_tensors(&plan, &config.tensors())?;
        // Taken as they are asked for: of each there is one.
        let taken = std::cell::RefCell::new(&mut values);
        let of_file = |spec: &TensorSpec, _: &Base| {
            let asked = spec.role.is_adapter() || plan.saves(&spec.name);
            if asked { taken.borrow_mut().take(&spec.name).map(Some) } else { Ok(None) }
        };
        Self::adapted(dir, config, (&adapter.config, plan.clone()), device, &of_file)
    }

    fn adapted(
        dir: &Path,
        config: &ModelConfig,
        (adapter, plan): (&AdapterConfig, AdapterPlan),
        device: &Device,
        own: &Own,
    ) -> Result<Self> {
        let weights = Weights::open(dir, config)?;
        weights.check(dir, config, device)?;
        let base = |name: &str| weights.of(name);
        let mut failure = None;
        let mut model = Self::build_adapted(config, Some(&plan), device, &mut |spec| {
            let found = own(spec, &base).and_then(|found| found.map_or_else(|| base(&spec.name), Ok));
            found.unwrap_or_else(|e| {
                failure.get_or_insert(e);
                Vec::new()
            })
        });
        if let Some(failure) = failure {
            return Err(failure);
        }
        // Absolute, so that an adapter finds its base from wherever it is opened.
        let base = dir.canonicalize().map_err(|e| Error::io(dir, e))?;
        model.adapter = Some(Arc::new((adapter.clone(), base)));
        Ok(model.with_trained(|spec| plan.trains(spec)))
    }

    /// The keys of its adapters, where it has any.
    pub fn adapter(&self) -> Option<&AdapterConfig> {
        self.adapter.as_deref().map(|(adapter, _)| adapter)
    }

    /// The same function without adapters and in whole matrices: each with its adapter multiplied in, and unpacked where it was packed.
    /// Itself where there is neither.
    pub fn merged(&self) -> Self {
        self.without_adapters(true)
    }

    /// The model that the adapters stand beside. What is trained whole stays as it was trained, and what is packed packed.
    pub fn unadapted(&self) -> Self {
        self.without_adapters(false)
    }

    fn without_adapters(&self, merge: bool) -> Self {
        let mut model = self.clone();
        let unpacks = merge && !self.quantized.is_empty();
        if self.adapter.is_none() && !unpacks {
            return model;
        }
        model.linears_mut().into_iter().for_each(|linear| linear.end_adapter(merge));
        let own = self.tensors.iter().filter(|spec| !spec.role.is_adapter()).cloned();
        model.tensors = if unpacks {
            let mut own = own.peekable();
            let all = self.config.tensors().into_iter();
            // What was packed is no parameter of this one, and frozen in the other.
            let of = |spec: TensorSpec| {
                own.next_if(|own| own.name == spec.name).unwrap_or(TensorSpec { trainable: false, ..spec })
            };
            all.map(of).collect()
        } else {
            own.collect()
        };
        model.adapter = None;
        if unpacks {
            model.quantized = Arc::new([]);
        }
        model
    }

    /// All maps, to be changed.
    fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let blocks = self.model.layers.iter_mut();
        let of_blocks = blocks.flat_map(|block| {
            let of_attention = block.self_attn.linears_mut();
            of_attention.into_iter().chain(block.mlp.linears_mut())
        });
        of_blocks.chain(self.lm_head.as_mut()).collect()
    }

    /// Writes the adapter as a directory of PEFT.
    ///
    /// # Errors
    /// [`Error::File`] where there is no adapter; otherwise as [`AdapterDir::write`].
    pub fn save_adapter(&self, dir: &Path) -> Result<()> {
        let Some((adapter, base)) = self.adapter.as_deref() else {
            return Err(Error::file(dir, "the model has no adapter to be written here"));
        };
        let plan = adapter.plan(&self.config)?;
        let own = |name: &str, role: Role| role.is_adapter() || plan.saves(name);
        let parameters = self.parameters().into_iter().filter(|parameter| own(&parameter.name, parameter.role));
        AdapterDir { config: adapter.clone(), path: dir.to_path_buf(), base: base.clone() }
            .write(parameters.collect(), &plan)
    }
}

/// A as it begins: even between ±1/√d_in (Kaiming's bound with a = √5).
fn first_values(seed: u64, spec: &TensorSpec) -> Vec<f32> {
    let bound = spec.shape.last().map_or(1.0, |d_in| (*d_in as f64).powf(-0.5));
    let mut rng = stream(seed, &spec.name);
    (0..spec.shape.iter().product()).map(|_| (bound * (2.0 * rng.random::<f64>() - 1.0)) as f32).collect()
}

/// The length of each of so many rows.
fn row_lengths(weight: &[f32], rows: usize) -> Vec<f32> {
    let width = weight.len().checked_div(rows).unwrap_or(0).max(1);
    let square = |x: &f32| f64::from(*x) * f64::from(*x);
    weight.chunks(width).map(|row| row.iter().map(square).sum::<f64>().sqrt() as f32).collect()
}
