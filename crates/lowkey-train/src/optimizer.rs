//! AdamW and Muon over the flat list of parameters.

use std::collections::HashSet;

use burn::tensor::Tensor;
use lowkey_kernels::Precision;
use lowkey_kernels::optim::{self, AdamWStep, Gate, MuonStep};
use lowkey_model::Parameter;
use lowkey_model::tensor::{Part, Role, layer_of};
use rayon::prelude::*;

use crate::run_config::{OptimizerKind, OptimizerSection};

/// The optimiser of a run, see [`lowkey_kernels::optim::adamw`] and [`lowkey_kernels::optim::muon`].
///
/// Works in place, on the threads of the current rayon pool, with a result that does not depend on how many there are.
///
/// Muon takes the matrices between hidden states, AdamW the rest, each with the same rate and decay. A projection to heads
/// stacks one map per head (MLA's `kv_b_proj` two: to a key and to a value), and Muon orthogonalises each map by itself: whole,
/// heads with large gradients would decide the update of the others, and MLA is known to lose to GQA by it (GLM-5, arXiv
/// 2602.15763).
///
/// Orthogonalising takes about 20 · min(rows, columns) operations per number and step whatever the batch, as much as training
/// on 3 · min(rows, columns) tokens: wide matrices want large batches.
#[derive(Clone, Debug)]
pub struct Optimizer {
    betas: [f64; 2],
    eps: f64,
    momentum: f64,
    /// One per parameter: matrices decay, norms and biases do not.
    weight_decay: Vec<f64>,
    /// One per parameter: its share of the learning rate.
    rates: Vec<f64>,
    states: Vec<ParameterState>,
    steps: u64,
}

/// What differs from step to step.
#[derive(Clone, Copy, Debug)]
pub struct Update<'a> {
    /// Factor on the gradients.
    pub clip: f64,
    /// Learning rate.
    pub lr: f64,
    /// What a GPU has found of the gradients, if it was asked.
    pub gate: Option<&'a Gate>,
    /// What Muon's products are computed in, on a GPU.
    pub precision: Precision,
}

impl Update<'_> {
    /// A step that the host has decided upon, in f32.
    pub fn new(clip: f64, lr: f64) -> Self {
        Self { clip, lr, gate: None, precision: Precision::F32 }
    }
}

/// What the optimiser remembers of one parameter, `[numel]` each.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "one per parameter, and what it points at is far larger")]
pub enum ParameterState {
    /// A parameter that AdamW updates.
    AdamW {
        /// Running mean of the gradient.
        m: Tensor<1>,
        /// Running mean of its square.
        v: Tensor<1>,
    },
    /// A parameter that Muon updates.
    Muon {
        /// Decaying sum of the gradients.
        momentum: Tensor<1>,
    },
}

impl ParameterState {
    /// Its tensors with their names in a checkpoint.
    pub fn tensors(&self) -> Vec<(&'static str, &Tensor<1>)> {
        match self {
            Self::AdamW { m, v } => vec![("m", m), ("v", v)],
            Self::Muon { momentum } => vec![("momentum", momentum)],
        }
    }

    /// A state of the same kind from tensors by name.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn read<E>(&self, mut read: impl FnMut(&'static str) -> Result<Tensor<1>, E>) -> Result<Self, E> {
        Ok(match self {
            Self::AdamW { .. } => Self::AdamW { m: read("m")?, v: read("v")? },
            Self::Muon { .. } => Self::Muon { momentum: read("momentum")? },
        })
    }
}

impl Optimizer {
    /// An optimiser that has seen no gradient. Weight decay applies where `decays` says so.
    pub fn new(section: &OptimizerSection, parameters: &[Parameter], decays: impl Fn(&Parameter) -> bool) -> Self {
        let state = |parameter: &Parameter| {
            let zeros = || parameter.value.zeros_like();
            match section.kind {
                OptimizerKind::Muon if parameter.is_hidden_matrix() => ParameterState::Muon { momentum: zeros() },
                OptimizerKind::Muon | OptimizerKind::AdamW => ParameterState::AdamW { m: zeros(), v: zeros() },
            }
        };
        Self {
            betas: section.betas,
            eps: section.eps,
            momentum: section.momentum(),
            weight_decay: parameters.iter().map(|p| if decays(p) { section.weight_decay } else { 0.0 }).collect(),
            rates: vec![1.0; parameters.len()],
            states: parameters.iter().map(state).collect(),
            steps: 0,
        }
    }

    /// With the rates of [`OptimizerSection::layer_lr_decay`] and [`OptimizerSection::loraplus_lr_ratio`], for the parameters of a model
    /// of so many layers: all of its layers count, whichever are trained.
    #[must_use]
    pub fn with_rates(mut self, section: &OptimizerSection, parameters: &[Parameter], layers: usize) -> Self {
        let of_layer =
            |p: &Parameter| section.layer_lr_decay.map_or(1.0, |decay| decay.powi(below_the_top(p, layers) as i32));
        let of_part = |p: &Parameter| match (section.loraplus_lr_ratio, p.role) {
            (Some(ratio), Role::Adapter(Part::Writes)) => ratio,
            _ => 1.0,
        };
        self.rates = parameters.iter().map(|p| of_layer(p) * of_part(p)).collect();
        self
    }

    /// States in the order of the parameters, and how many steps they have seen.
    pub fn state(&self) -> (&[ParameterState], u64) {
        (&self.states, self.steps)
    }

    /// Continues from saved states.
    pub(crate) fn restore(&mut self, states: Vec<ParameterState>, steps: u64) {
        self.states = states;
        self.steps = steps;
    }

    /// One step of Muon on zeros for each shape among its parameters: afterwards a GPU's kernels for it are compiled and chosen.
    pub(crate) fn warm_up(&self, parameters: &[Parameter], precision: Precision) {
        let step = MuonStep { clip: 1.0, lr: 0.0, momentum: self.momentum, weight_decay: 0.0, precision };
        let mut done = HashSet::new();
        for (state, Parameter { shape, head_rows, value, .. }) in self.states.iter().zip(parameters) {
            if matches!(state, ParameterState::Muon { .. }) && done.insert((shape, head_rows)) {
                let zeros = || value.zeros_like();
                let width = shape.iter().skip(1).product();
                drop(optim::muon(zeros(), zeros(), zeros(), width, head_rows, step, None));
            }
        }
    }

    /// One step; returns the new values in the order of `parameters`.
    pub fn step(
        &mut self,
        parameters: Vec<Parameter>,
        gradients: Vec<Tensor<1>>,
        update: &Update<'_>,
    ) -> Vec<Tensor<1>> {
        let Update { clip, lr, gate, precision } = *update;
        self.steps += 1;
        let Self { betas, eps, momentum, steps, .. } = *self;
        let (mut by_adamw, mut by_muon) = (Vec::new(), Vec::new());
        // Taken out, so that the passes hold the only handles.
        let taken = std::mem::take(&mut self.states).into_iter().zip(self.weight_decay.iter().zip(&self.rates));
        for (i, ((parameter, gradient), (state, (&weight_decay, &rate)))) in
            parameters.into_iter().zip(gradients).zip(taken).enumerate()
        {
            let Parameter { shape, head_rows, value, .. } = parameter;
            let lr = lr * rate;
            match state {
                ParameterState::AdamW { m, v } => {
                    let step = AdamWStep { clip, lr, betas, eps, weight_decay, step: steps };
                    by_adamw.push((i, ([value, gradient, m, v], step)));
                }
                ParameterState::Muon { momentum: buffer } => {
                    let step = MuonStep { clip, lr, momentum, weight_decay, precision };
                    let width = shape.iter().skip(1).product::<usize>();
                    by_muon.push((i, [value, gradient, buffer], width, head_rows, step));
                }
            }
        }
        let mut done: Vec<(usize, Tensor<1>, ParameterState)> = by_muon
            .into_par_iter()
            .with_max_len(1)
            .map(|(i, [value, gradient, buffer], width, maps, step)| {
                let (value, momentum) = optim::muon(value, gradient, buffer, width, &maps, step, gate);
                (i, value, ParameterState::Muon { momentum })
            })
            .collect();
        let (places, by_adamw): (Vec<_>, Vec<_>) = by_adamw.into_iter().unzip();
        let updated = places.into_iter().zip(optim::adamw_each(by_adamw, gate));
        done.extend(updated.map(|(i, [value, m, v])| (i, value, ParameterState::AdamW { m, v })));
        done.sort_unstable_by_key(|(i, ..)| *i);
        let (values, states) = done.into_iter().map(|(_, value, state)| (value, state)).unzip();
        self.states = states;
        values
    }
}

/// How many layers lie above a parameter's own: below the first one is the embedding, above the last one nothing.
fn below_the_top(parameter: &Parameter, layers: usize) -> usize {
    match (parameter.role, layer_of(&parameter.name)) {
        (Role::Embedding, _) => layers,
        (_, Some(layer)) => layers.saturating_sub(1 + layer),
        (_, None) => 0,
    }
}

/// The global L2 norm of the gradients; uses the threads of the current rayon pool, and does not depend on how many there are.
///
/// # Errors
/// The index of the first gradient whose norm is not finite, with that norm. Norms whose square exceeds f32 count as such: the
/// second moment could not hold them.
pub fn global_norm(gradients: &[Tensor<1>]) -> Result<f64, (usize, f64)> {
    let mut total = 0.0;
    for (i, squares) in optim::sums_of_squares(gradients).into_iter().enumerate() {
        let single = squares as f32;
        if !single.is_finite() {
            return Err((i, f64::from(single.sqrt())));
        }
        total += squares;
    }
    Ok(total.sqrt())
}

#[cfg(test)]
mod tests;
