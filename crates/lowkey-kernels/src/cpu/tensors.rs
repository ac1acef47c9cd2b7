//! The CPU backend's tensors: contiguous slices in and out of them.

use burn::backend::Flex;
use burn::tensor::{DType, Shape, TensorData};
use burn_flex::FlexTensor;

use crate::autodiff::{Operands, Wanted};

/// Nothing is rounded on the CPU.
impl Operands for Flex {}

/// Zeros of a shape. [`FlexTensor::zeros`] takes room for bytes, finds it not aligned for every type, and copies it to where it is.
pub(crate) fn new(shape: impl Into<Shape>) -> FlexTensor {
    let shape = shape.into();
    FlexTensor::from_data(TensorData::new(vec![0.0f32; shape.num_elements()], shape))
}

pub(crate) fn like(tensor: &FlexTensor) -> FlexTensor {
    new(tensor.layout().shape().clone())
}

/// Room for the gradients that are wanted of some tensors.
pub(crate) fn wanted_like<const N: usize>(tensors: [&FlexTensor; N], wanted: Wanted<N>) -> [Option<FlexTensor>; N] {
    std::array::from_fn(|i| wanted[i].then(|| like(tensors[i])))
}

/// The numbers of a gradient, where it is wanted.
pub(crate) fn numbers(gradient: &mut Option<FlexTensor>) -> Option<&mut [f32]> {
    gradient.as_mut().map(FlexTensor::storage_mut)
}

pub(crate) fn dims<const D: usize>(tensor: &FlexTensor) -> [usize; D] {
    let shape = tensor.layout().shape();
    std::array::from_fn(|i| shape[i])
}

/// Integers as the kernels read them; the backend may hold them as 32 or 64 bits.
pub(crate) fn integers(tensor: &FlexTensor) -> Vec<i32> {
    let tensor = tensor.to_contiguous();
    match tensor.dtype() {
        DType::I64 => tensor.storage::<i64>().iter().map(|x| *x as i32).collect(),
        _ => tensor.storage::<i32>().to_vec(),
    }
}
