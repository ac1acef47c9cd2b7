//! What an optimiser does to a whole model in each step, as passes that read and write each number once.
//!
//! All work on flattened tensors outside any autodiff graph, on the threads of the current rayon pool, and no result depends
//! on how many there are. A tensor that is handed over with its only handle is written in place: nothing of the size of the
//! model is allocated.

mod cpu;
mod gate;
#[cfg(feature = "gpu")]
mod gpu;
mod judgement;
mod reference;
mod steps;

use burn::tensor::Tensor;
use rayon::prelude::*;

pub use self::judgement::{Fault, Gate, Judgement, Terms, Verdict, clip_factor};
pub use self::steps::{AdamWStep, MuonStep};

/// AdamW (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2) with PyTorch's order of operations: with g the clipped gradient,
/// `m ← β₁m + (1 − β₁)g`, `v ← β₂v + (1 − β₂)g²`,
/// `p ← p(1 − lr·decay) − lr/(1 − β₁ᵗ) · m / (√v/√(1 − β₂ᵗ) + ε)`.
///
/// On a GPU, a `gate` has a factor on the gradient too, and where it is shut, nothing changes.
///
/// # Shapes
/// All `[numel]`; returns `(value, m, v)`.
pub fn adamw(
    value: Tensor<1>,
    gradient: Tensor<1>,
    m: Tensor<1>,
    v: Tensor<1>,
    step: AdamWStep,
    gate: Option<&Gate>,
) -> (Tensor<1>, Tensor<1>, Tensor<1>) {
    same_lengths(&value, [&gradient, &m, &v]);
    let tensors = match cpu::on_cpu([value, gradient, m, v]) {
        Ok(storage) => {
            let [value, m, v] = cpu::adamw(storage, step).map(cpu::tensor);
            return (value, m, v);
        }
        Err(tensors) => tensors,
    };
    #[cfg(feature = "gpu")]
    let tensors = match gpu::adamw(vec![(tensors, step)], gate).map(|mut all| all.pop()) {
        Ok(Some([value, m, v])) => return (value, m, v),
        Ok(None) => unreachable!("one goes in and one comes out"),
        Err(mut all) => all.pop().unwrap_or_else(|| unreachable!("it comes back as it was")).0,
    };
    let _ = gate;
    let [value, gradient, m, v] = tensors;
    reference::adamw(value, gradient, m, v, step)
}

/// [`adamw`] of many parameters, `[value, gradient, m, v]` each; `[value, m, v]` in their order. The CPU's threads take one after the
/// other; a GPU takes as many in one launch as it has bindings for.
pub fn adamw_each(all: Vec<([Tensor<1>; 4], AdamWStep)>, gate: Option<&Gate>) -> Vec<[Tensor<1>; 3]> {
    #[cfg(feature = "gpu")]
    let all = match gpu::adamw(all, gate) {
        Ok(done) => return done,
        Err(all) => all,
    };
    let one = |([value, gradient, m, v], step): ([Tensor<1>; 4], AdamWStep)| {
        let (value, m, v) = adamw(value, gradient, m, v, step, gate);
        [value, m, v]
    };
    all.into_par_iter().with_max_len(1).map(one).collect()
}

/// Muon (Jordan et al. 2024, <https://kellerjordan.github.io/posts/muon/>) for matrices that stand one below the other: with
/// g the clipped gradient, `B ← μB + g`, and for each block of rows with `O ≈ U Vᵀ` of its part of `g + μB`,
/// `p ← p(1 − lr·decay) − lr · 0.2 √max(rows, columns) · O` (the scale of arXiv 2502.16982, section 2.2). A `gate` as in [`adamw`].
///
/// # Shapes
/// All `[numel]` with rows of `width` numbers; `heights` are the rows of each block, and add up to all. Returns
/// `(value, buffer)`.
pub fn muon(
    value: Tensor<1>,
    gradient: Tensor<1>,
    buffer: Tensor<1>,
    width: usize,
    heights: &[usize],
    step: MuonStep,
    gate: Option<&Gate>,
) -> (Tensor<1>, Tensor<1>) {
    same_lengths(&value, [&gradient, &buffer]);
    assert_eq!(value.dims(), [heights.iter().sum::<usize>() * width], "the blocks are not the whole parameter");
    match cpu::on_cpu([value, gradient, buffer]) {
        Ok(storage) => {
            let [value, buffer] = cpu::muon(storage, width, heights, step).map(cpu::tensor);
            (value, buffer)
        }
        Err(tensors) => muon_elsewhere(tensors, width, heights, step, gate),
    }
}

#[cfg(feature = "gpu")]
fn muon_elsewhere(
    tensors: [Tensor<1>; 3],
    width: usize,
    heights: &[usize],
    step: MuonStep,
    gate: Option<&Gate>,
) -> (Tensor<1>, Tensor<1>) {
    match gpu::muon(tensors, width, heights, step, gate) {
        Ok([value, buffer]) => (value, buffer),
        Err(tensors) => {
            let [value, gradient, buffer] = *tensors;
            reference::muon(value, gradient, buffer, width, heights, step)
        }
    }
}

#[cfg(not(feature = "gpu"))]
fn muon_elsewhere(
    [value, gradient, buffer]: [Tensor<1>; 3],
    width: usize,
    heights: &[usize],
    step: MuonStep,
    _: Option<&Gate>,
) -> (Tensor<1>, Tensor<1>) {
    reference::muon(value, gradient, buffer, width, heights, step)
}

/// `first + others[0] + others[1] + …`, added in this order.
///
/// # Shapes
/// All `[numel]`.
pub fn accumulate(first: Tensor<1>, others: Vec<Tensor<1>>) -> Tensor<1> {
    same_lengths(&first, &others);
    let Some(storage) = cpu::all_on_cpu(&others) else { return reference::accumulate(first, others) };
    match cpu::on_cpu([first]) {
        Ok([first]) => cpu::tensor(cpu::accumulate(first, &storage)),
        Err([first]) => reference::accumulate(first, others),
    }
}

/// `Σ x²` of each tensor `[numel]`, added up in f64; on a GPU parts of it in f32, and all are read back at once.
pub fn sums_of_squares(tensors: &[Tensor<1>]) -> Vec<f64> {
    #[cfg(feature = "gpu")]
    if let Some(sums) = gpu::sums_of_squares(tensors) {
        return sums;
    }
    let one = |x: &Tensor<1>| match cpu::on_cpu([x.clone()]) {
        Ok([x]) => cpu::sum_of_squares(&x),
        Err([x]) => reference::sum_of_squares(x),
    };
    tensors.par_iter().map(one).collect()
}

/// Where the numbers of an f32 tensor lie in memory, for checks that nothing is copied; `None` on other devices.
pub fn address(x: &Tensor<1>) -> Option<usize> {
    cpu::on_cpu([x.clone()]).ok().map(|[x]| cpu::address(&x))
}

fn same_lengths<'a>(first: &Tensor<1>, others: impl IntoIterator<Item = &'a Tensor<1>>) {
    for other in others {
        assert_eq!(first.dims(), other.dims(), "tensors of one parameter differ in length");
    }
}

#[cfg(test)]
mod tests;
