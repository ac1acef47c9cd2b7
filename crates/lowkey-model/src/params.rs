//! Parameters by checkpoint name, as a flat list.
//!
//! Optimisers, checkpoints and the sum of gradients over threads all need the same thing: every parameter once, in one
//! fixed order, with its name. They get it here, so that nothing above this crate walks the module tree.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::Tensor;

use crate::config::{AttentionConfig, ModelConfig};
use crate::model::CausalLm;

/// A parameter, flattened.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// Checkpoint name, such as `model.layers.0.self_attn.kv_b_proj.weight`.
    pub name: String,
    /// Its shape in the checkpoint.
    pub shape: Vec<usize>,
    /// Rows of each map in it, top to bottom: one per head (MLA's `kv_b_proj`: a key's and a value's) where it projects to
    /// heads, else one of all rows.
    pub maps: Vec<usize>,
    /// The values `[numel]`, outside any autodiff graph.
    pub value: Tensor<1>,
}

impl Parameter {
    /// Whether weight decay applies: to matrices, not to norms and biases.
    pub fn is_matrix(&self) -> bool {
        self.shape.len() > 1
    }

    /// Whether it is a matrix between hidden states: neither the embedding nor the output head.
    pub fn is_hidden_matrix(&self) -> bool {
        self.is_matrix() && self.name != "model.embed_tokens.weight" && self.name != "lm_head.weight"
    }
}

/// [`Parameter::maps`] of a parameter of `rows` rows.
fn maps(config: &ModelConfig, name: &str, rows: usize) -> Vec<usize> {
    let heads = config.num_attention_heads;
    let projection = name.strip_suffix(".weight").and_then(|name| name.rsplit('.').next());
    match (&config.attention, projection) {
        (AttentionConfig::Mla(m), Some("q_proj" | "q_b_proj")) => vec![m.qk_nope_head_dim + m.qk_rope_head_dim; heads],
        (AttentionConfig::Mla(m), Some("kv_b_proj")) => [m.qk_nope_head_dim, m.v_head_dim].repeat(heads),
        (AttentionConfig::Grouped(g), Some("q_proj")) => vec![g.head_dim; heads],
        (AttentionConfig::Grouped(g), Some("k_proj" | "v_proj")) => vec![g.head_dim; g.num_key_value_heads],
        _ => vec![rows],
    }
}

/// The names entered on the way down. A variant of an enum adds nothing: the checkpoint does not know of it.
#[derive(Default)]
struct Path(Vec<String>);

impl Path {
    fn enter(&mut self, name: &str, container: &str) {
        if !container.starts_with("Enum:") {
            self.0.push(name.to_string());
        }
    }

    fn exit(&mut self, container: &str) {
        if !container.starts_with("Enum:") {
            self.0.pop();
        }
    }

    /// The parameter that stands here.
    fn parameter<const D: usize>(&self, config: &ModelConfig, value: Tensor<D>) -> Parameter {
        let (name, shape) = (self.0.join("."), value.dims().to_vec());
        let maps = maps(config, &name, shape.first().copied().unwrap_or(1));
        Parameter { name, shape, maps, value: flat(value.without_autodiff()) }
    }
}

struct Collect<'a> {
    config: &'a ModelConfig,
    path: Path,
    found: Vec<Parameter>,
}

impl ModuleVisitor for Collect<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.found.push(self.path.parameter(self.config, param.val()));
    }

    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, container: &str) {
        self.path.exit(container);
    }
}

/// Takes the values out, and leaves a number in their place that has their shape, device and place in autodiff.
struct TakeValues<'a> {
    config: &'a ModelConfig,
    path: Path,
    taken: Vec<Parameter>,
}

impl ModuleMapper for TakeValues<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|old| {
            let stand_in = Tensor::<D>::empty([1; D], &old.device().without_autodiff()).expand(old.dims());
            let stand_in = in_place_of(&old, stand_in);
            self.taken.push(self.path.parameter(self.config, old));
            stand_in
        })
    }

    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, container: &str) {
        self.path.exit(container);
    }
}

struct Replace<I> {
    values: I,
}

impl<I: Iterator<Item = Tensor<1>>> ModuleMapper for Replace<I> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(value) = self.values.next() else { return param };
        param.map(|old| in_place_of(&old, value.reshape(old.dims())))
    }
}

/// `new`, tracked as `old` is.
fn in_place_of<const D: usize>(old: &Tensor<D>, new: Tensor<D>) -> Tensor<D> {
    match old.gradient_checkpointing_strategy() {
        // Tensors with different strategies cannot meet in one operation, so the old one stays.
        Some(strategy) => {
            new.autodiff().with_gradient_checkpointing_strategy(strategy).set_require_grad(old.is_require_grad())
        }
        None => new,
    }
}

fn flat<const D: usize>(tensor: Tensor<D>) -> Tensor<1> {
    let len = tensor.shape().num_elements();
    tensor.reshape([len])
}

impl CausalLm {
    /// Every parameter in the model's order.
    pub fn parameters(&self) -> Vec<Parameter> {
        let mut collect = Collect { config: &self.config, path: Path::default(), found: Vec::new() };
        self.visit(&mut collect);
        collect.found
    }

    /// Replaces every value by what `update` makes of them, in the order of [`CausalLm::parameters`].
    ///
    /// Where no clone of the model is left, each tensor is handed over with its only handle and can be changed in place.
    pub fn update(&mut self, update: impl FnOnce(Vec<Parameter>) -> Vec<Tensor<1>>) {
        let config = self.config.clone();
        let mut take = TakeValues { config: &config, path: Path::default(), taken: Vec::new() };
        // The assignment ends the old model, and with it the second handle to each value.
        *self = self.clone().map(&mut take);
        *self = self.clone().with_values(update(take.taken));
    }

    /// The same model with other values, in the order of [`CausalLm::parameters`].
    pub fn with_values(self, values: Vec<Tensor<1>>) -> Self {
        self.map(&mut Replace { values: values.into_iter() })
    }
}

#[cfg(test)]
mod tests;
