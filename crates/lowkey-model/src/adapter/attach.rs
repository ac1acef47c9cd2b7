//! Models with adapters: begun anew, loaded, left off, multiplied out.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::Device;
use lowkey_files::write_json;

use super::config::AdapterConfig;
use super::dropout::Draws;
use super::files::{AdapterDir, Reader};
use super::plan::AdapterPlan;
use crate::checkpoint::{CONFIG, WeightDtype, Weights};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::init::initial_values;
use crate::model::{CausalLm, Linear};
use crate::tensor::{Role, Start, TensorSpec};

/// Values of a tensor of the base.
type Base<'a> = dyn Fn(&TensorSpec) -> Result<Vec<f32>> + 'a;

/// Values of a tensor that are not those of the base, which is at hand.
type Own<'a> = dyn Fn(&TensorSpec, &Base) -> Result<Option<Vec<f32>>> + 'a;

impl CausalLm {
    /// The model in `dir` with new adapters: what it computes is what it computed. They begin as PEFT begins them ([`Start`]), each tensor
    /// from a stream of its own: of LoRA A is drawn evenly from ±1/√d_in and B is zero, and lengths are those of the rows; of the
    /// embedding A is zero, and B is normal. All but adapters and what is saved with them is frozen.
    ///
    /// The vocabulary of `config` may be larger than that of the files where the adapter saves the embedding and the output head: what
    /// is to stand in their new rows, [`CausalLm::with_new_rows`] says.
    ///
    /// # Errors
    /// As [`CausalLm::load_with`], [`AdapterConfig::plan`] and [`AdapterConfig::check_new_rows`].
    pub fn begin_adapter(
        dir: &Path,
        config: &ModelConfig,
        adapter: &AdapterConfig,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        let plan = adapter.plan(config)?;
        Self::adapted(dir, config, (adapter, plan.clone()), device, &begun(config, &plan, seed))
    }

    /// A random model with adapters at their beginning: what measurements take. It stands beside no directory, so that its adapters
    /// cannot be saved.
    ///
    /// # Errors
    /// As [`AdapterConfig::plan`].
    pub fn init_adapted(config: &ModelConfig, adapter: &AdapterConfig, seed: u64, device: &Device) -> Result<Self> {
        let plan = adapter.plan(config)?;
        let base = |spec: &TensorSpec| Ok(initial_values(config, seed, spec));
        let model = Self::build_beside(config, &plan, device, &begun(config, &plan, seed), &base)?;
        Ok(model.trained_by(adapter, &plan, PathBuf::new()))
    }

    /// The model in `dir` with the adapter of a directory.
    ///
    /// # Errors
    /// As [`CausalLm::load_with`] and [`AdapterConfig::plan`]; [`Error::Tensors`] where the adapter's tensors are not those that its
    /// configuration asks for.
    pub fn load_adapted(dir: &Path, config: &ModelConfig, adapter: &AdapterDir, device: &Device) -> Result<Self> {
        let plan = adapter.plan(config)?;
        let mut values = adapter.open_tensors(&plan, &config.tensors())?;
        // Taken as they are asked for: of each there is one.
        let taken = std::cell::RefCell::new(&mut values);
        let of_file = |spec: &TensorSpec, _: &Base| {
            let asked = spec.role.is_adapter() || plan.saves(&spec.name);
            if asked { taken.borrow_mut().take(&spec.name).map(Some) } else { Ok(None) }
        };
        Self::adapted(dir, config, (&adapter.config, plan.clone()), device, &of_file)
    }

    /// The model in `dir` with adapters whose values are those of `own`.
    pub(super) fn adapted(
        dir: &Path,
        config: &ModelConfig,
        (adapter, plan): (&AdapterConfig, AdapterPlan),
        device: &Device,
        own: &Own,
    ) -> Result<Self> {
        let weights = Weights::open(dir, config)?.growing();
        weights.check(dir, config, device)?;
        weights.check_adaptable(dir)?;
        if weights.grows(config) {
            adapter.check_new_rows(config)?;
        }
        let model = Self::build_beside(config, &plan, device, own, &|spec| weights.of(spec))?;
        // Absolute, so that an adapter finds its base from wherever it is opened.
        let base = dir.canonicalize().map_err(|e| Error::io(dir, e))?;
        Ok(model.trained_by(adapter, &plan, base))
    }

    /// Tensors as `own` gives them, and those of `base` where it has none.
    fn build_beside(config: &ModelConfig, plan: &AdapterPlan, device: &Device, own: &Own, base: &Base) -> Result<Self> {
        let mut failure = None;
        let model = Self::build_adapted(config, Some(plan), device, &mut |spec| {
            let found = own(spec, base).and_then(|found| found.map_or_else(|| base(spec), Ok));
            found.unwrap_or_else(|e| {
                failure.get_or_insert(e);
                Vec::new()
            })
        });
        failure.map_or(Ok(model), Err)
    }

    /// Everything frozen but what the adapters train, of a model whose base lies in a directory.
    fn trained_by(mut self, adapter: &AdapterConfig, plan: &AdapterPlan, base: PathBuf) -> Self {
        self.adapter = Some(Arc::new((adapter.clone(), base)));
        self.with_trained(|spec| plan.trains(spec))
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
        model.model.embed_tokens.end_adapter(merge);
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
            (model.quantized, model.packed_head) = (Arc::new([]), None);
        }
        model
    }

    /// The model as a pass of training takes it: its adapters leave numbers out ([`AdapterConfig::lora_dropout`]). `None`: as every
    /// other pass does, nothing is left out.
    #[must_use]
    pub fn with_draws(mut self, draws: Option<Draws>) -> Self {
        self.linears_mut().into_iter().for_each(|linear| linear.set_draws(draws));
        self
    }

    /// The same function where nothing is trained any more, so that what follows from the weights alone is computed once and not for
    /// each token: matrices that are read whole have their adapters multiplied in, and DoRA's lengths are kept.
    #[must_use]
    pub fn settled(&self) -> Self {
        let mut model = self.clone();
        if self.adapter.is_none() {
            return model;
        }
        model.linears_mut().into_iter().for_each(Linear::settle);
        let whole =
            model.model.layers.iter_mut().filter_map(|block| Some(&mut block.self_attn.latent_mut()?.kv_b_proj));
        whole.chain(model.lm_head.as_mut()).for_each(|linear| linear.end_adapter(true));
        let merged = |spec: &TensorSpec| spec.name.starts_with("lm_head.") || spec.name.contains(".kv_b_proj.");
        let kept = |spec: &&TensorSpec| !(spec.role.is_adapter() && merged(spec));
        model.tensors = self.tensors.iter().filter(kept).cloned().collect();
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
        match self.adapter() {
            Some(keys) => self.save_adapter_as(dir, keys.clone(), Reader::Peft(&self.config)),
            None => Err(Error::file(dir, "the model has no adapter to be written here")),
        }
    }

    /// [`CausalLm::save_adapter`] with other keys, by which the adapter computes the same, for a certain reader.
    ///
    /// # Errors
    /// As [`CausalLm::save_adapter`].
    pub fn save_adapter_as(&self, dir: &Path, keys: AdapterConfig, reader: Reader) -> Result<()> {
        let Some((_, base)) = self.adapter.as_deref().filter(|(_, base)| !base.as_os_str().is_empty()) else {
            return Err(Error::file(dir, "the model has no adapter to be written here"));
        };
        // What a run has changed of the base's shape is not said by PEFT's files; whoever reads them takes it from here.
        if !ModelConfig::read(&base.join(CONFIG)).is_ok_and(|base| base.same_shape(&self.config)) {
            write_json(&dir.join(CONFIG), &self.config.to_json(WeightDtype::F32.name()))?;
        }
        let plan = keys.plan(&self.config)?;
        let own = |name: &str, role: Role| role.is_adapter() || plan.saves(name);
        let parameters = self.parameters().into_iter().filter(|parameter| own(&parameter.name, parameter.role));
        let written = AdapterDir { config: keys, path: dir.to_path_buf(), base: base.clone() };
        written.write(parameters.collect(), &plan, reader)
    }
}

/// What a new adapter begins with; no value for what is the base's.
fn begun(
    config: &ModelConfig,
    plan: &AdapterPlan,
    seed: u64,
) -> impl Fn(&TensorSpec, &Base) -> Result<Option<Vec<f32>>> {
    let tensors = OnceCell::new();
    move |spec, base| {
        if !spec.role.is_adapter() {
            return Ok(None);
        }
        if spec.start != Start::RowLengths {
            return Ok(Some(initial_values(config, seed, spec)));
        }
        let tensors = tensors.get_or_init(|| config.tensors());
        let name = plan.adapted(&spec.name).map(|(module, _)| format!("{module}.weight")).unwrap_or_default();
        let Some(weight) = tensors.iter().find(|spec| spec.name == name) else { return Ok(None) };
        // The lengths of the rows that the model computes with.
        let rows = spec.shape.iter().product();
        base(weight).map(|values| Some(row_lengths(&plan.as_packed(weight, values), rows)))
    }
}

/// The length of each of so many rows.
fn row_lengths(weight: &[f32], rows: usize) -> Vec<f32> {
    let width = weight.len().checked_div(rows).unwrap_or(0).max(1);
    let square = |x: &f32| f64::from(*x) * f64::from(*x);
    weight.chunks(width).map(|row| row.iter().map(square).sum::<f64>().sqrt() as f32).collect()
}
