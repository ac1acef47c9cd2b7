//! Parameters by checkpoint name, as a flat list.
//!
//! Optimisers, checkpoints and the sum of gradients over threads all need the same thing: every parameter once, in one
//! fixed order, with its name. They get it here, so that nothing above this crate walks the module tree.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::Tensor;

use crate::model::CausalLm;
use crate::tensor::{Role, TensorSpec};

/// A parameter, flattened.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// Checkpoint name, such as `model.layers.0.self_attn.kv_b_proj.weight`.
    pub name: String,
    /// Its shape in the checkpoint.
    pub shape: Vec<usize>,
    /// What it is for.
    pub role: Role,
    /// Rows of each map that is stacked in it, top to bottom.
    pub head_rows: Vec<usize>,
    /// Whether it is trained.
    pub trainable: bool,
    /// The values `[numel]`, outside any autodiff graph.
    pub value: Tensor<1>,
}

impl Parameter {
    /// Whether weight decay applies: to matrices, not to norms and biases.
    pub fn is_matrix(&self) -> bool {
        self.role.is_matrix()
    }

    /// Whether it is a matrix between hidden states: neither the embedding nor the output head.
    pub fn is_hidden_matrix(&self) -> bool {
        self.role.is_hidden_matrix()
    }
}

/// The parameters so far, of a module whose tensors are visited in the order of `specs`.
struct Flattened<'a> {
    specs: std::slice::Iter<'a, TensorSpec>,
    found: Vec<Parameter>,
}

impl<'a> Flattened<'a> {
    fn new(specs: &'a [TensorSpec]) -> Self {
        Self { specs: specs.iter(), found: Vec::with_capacity(specs.len()) }
    }

    fn push<const D: usize>(&mut self, value: Tensor<D>) {
        // A model is built of the tensors that it has: one for each.
        let Some(TensorSpec { name, role, head_rows, trainable, .. }) = self.specs.next() else { return };
        let (name, role, head_rows, trainable) = (name.clone(), *role, head_rows.each(), *trainable);
        // A cut latent has fewer columns than it was built with.
        let (shape, value) = (value.dims().to_vec(), flat(value.without_autodiff()));
        self.found.push(Parameter { name, shape, role, head_rows, trainable, value });
    }
}

impl ModuleVisitor for Flattened<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.push(param.val());
    }
}

/// Takes the trained values out, and leaves a number in their place that has their shape, device and place in autodiff.
struct TakeValues<'a>(Flattened<'a>);

impl ModuleMapper for TakeValues<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.0.specs.as_slice().first().is_some_and(|spec| !spec.trainable) {
            self.0.specs.next();
            return param;
        }
        param.map(|old| {
            let stand_in = Tensor::<D>::empty([1; D], &old.device().without_autodiff()).expand(old.dims());
            let stand_in = in_place_of(&old, stand_in);
            self.0.push(old);
            stand_in
        })
    }
}

struct Replace<'a, I> {
    values: I,
    /// Whether each parameter gets a value.
    each: Box<dyn Iterator<Item = bool> + 'a>,
}

impl<I: Iterator<Item = Tensor<1>>> ModuleMapper for Replace<'_, I> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !self.each.next().unwrap_or(false) {
            return param;
        }
        let Some(value) = self.values.next() else { return param };
        param.map(|old| in_place_of(&old, value.reshape(old.dims())))
    }
}

/// Sets whether each parameter wants a gradient.
struct RequireGradients<I>(I);

impl<I: Iterator<Item = bool>> ModuleMapper for RequireGradients<I> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.0.next() {
            Some(wanted) => param.set_require_grad(wanted),
            None => param,
        }
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
        let mut flattened = Flattened::new(&self.tensors);
        self.visit(&mut flattened);
        flattened.found
    }

    /// The parameters that are trained, in the model's order.
    pub fn trained_parameters(&self) -> Vec<Parameter> {
        self.parameters().into_iter().filter(|parameter| parameter.trainable).collect()
    }

    /// What the tensors are, in the model's order.
    pub fn tensors(&self) -> &[TensorSpec] {
        &self.tensors
    }

    /// The same model, of which only those tensors are trained that `is_trained` says: the others take part in no backward pass but
    /// as what gradients flow through, and in no step.
    pub fn with_trained(self, is_trained: impl Fn(&TensorSpec) -> bool) -> Self {
        let of = |spec: &TensorSpec| TensorSpec { trainable: is_trained(spec), ..spec.clone() };
        let tensors: Vec<TensorSpec> = self.tensors.iter().map(of).collect();
        let mut model = self.map(&mut RequireGradients(tensors.iter().map(|spec| spec.trainable)));
        model.tensors = tensors.into();
        model
    }

    /// Replaces each trained value by what `update` makes of them, in the order of [`CausalLm::trained_parameters`].
    ///
    /// Where no clone of the model is left, each tensor is handed over with its only handle and can be changed in place.
    pub fn update(&mut self, update: impl FnOnce(Vec<Parameter>) -> Vec<Tensor<1>>) {
        let tensors = self.tensors.clone();
        let mut take = TakeValues(Flattened::new(&tensors));
        // The assignment ends the old model, and with it the second handle to each value.
        *self = self.clone().map(&mut take);
        let values = update(take.0.found).into_iter();
        *self = self.clone().map(&mut Replace { values, each: Box::new(tensors.iter().map(|spec| spec.trainable)) });
    }

    /// The same model with other values, in the order of [`CausalLm::parameters`].
    pub fn with_values(self, values: Vec<Tensor<1>>) -> Self {
        self.map(&mut Replace { values: values.into_iter(), each: Box::new(std::iter::repeat(true)) })
    }
}

#[cfg(test)]
mod tests;
