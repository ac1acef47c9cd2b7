//! The passes on the CPU: its tensors' storage, written in place where it has one owner.

pub(super) mod muon;
mod passes;

use burn::backend::Flex;
use burn::tensor::{DType, Tensor};
use burn_flex::FlexTensor;

use super::steps::{AdamWStep, MUON_RMS, MuonStep};

/// The storage of f32 tensors on the CPU; the tensors back where one of them is neither.
pub(super) fn on_cpu<const N: usize>(tensors: [Tensor<1>; N]) -> Result<[FlexTensor; N], [Tensor<1>; N]> {
    let found = all_on_cpu(&tensors).and_then(|found| <[FlexTensor; N]>::try_from(found).ok());
    // The other handles to the storage end with this function.
    found.ok_or(tensors)
}

/// Second handles to the storage of f32 tensors on the CPU.
pub(super) fn all_on_cpu(tensors: &[Tensor<1>]) -> Option<Vec<FlexTensor>> {
    let one = |tensor: &Tensor<1>| match tensor.dtype() {
        DType::F32 => tensor.clone().try_into_primitive::<Flex>().ok().map(|tensor| tensor.to_contiguous()),
        _ => None,
    };
    tensors.iter().map(one).collect()
}

pub(super) fn tensor(storage: FlexTensor) -> Tensor<1> {
    Tensor::from_primitive::<Flex>(storage)
}

pub(super) fn adamw([mut value, gradient, mut m, mut v]: [FlexTensor; 4], step: AdamWStep) -> [FlexTensor; 3] {
    let AdamWStep { clip, lr, betas: [beta1, beta2], eps, weight_decay, .. } = step;
    let (correction1, correction2) = step.corrections();
    let factors = passes::AdamW {
        clip: clip as f32,
        keep: (1.0 - lr * weight_decay) as f32,
        betas: [beta1, 1.0 - beta1, beta2, 1.0 - beta2].map(|beta| beta as f32),
        correction: correction2 as f32,
        eps: eps as f32,
        rate: (lr / correction1) as f32,
    };
    passes::adamw(value.storage_mut(), gradient.storage(), m.storage_mut(), v.storage_mut(), factors);
    [value, m, v]
}

pub(super) fn accumulate(mut sum: FlexTensor, others: &[FlexTensor]) -> FlexTensor {
    let others: Vec<&[f32]> = others.iter().map(|other| other.storage()).collect();
    passes::accumulate(sum.storage_mut(), &others);
    sum
}

pub(super) fn sum_of_squares(x: &FlexTensor) -> f64 {
    passes::sum_of_squares(x.storage())
}

/// Where the numbers begin in memory.
pub(super) fn address(x: &FlexTensor) -> usize {
    x.bytes().as_ptr() as usize
}

pub(super) fn muon(
    [mut value, gradient, mut buffer]: [FlexTensor; 3],
    width: usize,
    heights: &[usize],
    step: MuonStep,
) -> [FlexTensor; 2] {
    let MuonStep { clip, lr, momentum, weight_decay, .. } = step;
    let factors = muon::Muon {
        clip: clip as f32,
        momentum: momentum as f32,
        keep: (1.0 - lr * weight_decay) as f32,
        rate: (lr * MUON_RMS) as f32,
    };
    muon::muon(value.storage_mut(), gradient.storage(), buffer.storage_mut(), width, heights, factors);
    [value, buffer]
}
