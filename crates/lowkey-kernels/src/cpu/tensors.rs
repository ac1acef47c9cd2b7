//! The CPU backend's tensors: contiguous slices in and out of them.
//!
//! A step makes hundreds of megabytes of tensors that kernels fill from their first number to the last. Writing zeros there first took a
//! twentieth of it, so that [`room`] leaves it away; in tests it writes what no sum survives.

use burn::backend::Flex;
use burn::tensor::{DType, Shape, TensorData};
use burn_flex::FlexTensor;

use crate::autodiff::{Operands, Wanted};

/// Nothing is rounded on the CPU.
impl Operands for Flex {}

/// A tensor that is to be filled, all of it: [`room`] in a shape. ([`FlexTensor::zeros`] takes room for bytes, finds it not aligned for every
/// type, and copies it to where it is.)
pub(crate) fn new(shape: impl Into<Shape>) -> FlexTensor {
    let shape = shape.into();
    FlexTensor::from_data(TensorData::new(room(shape.num_elements()), shape))
}

pub(crate) fn like(tensor: &FlexTensor) -> FlexTensor {
    new(tensor.layout().shape().clone())
}

/// Room for the gradients that are wanted of some tensors, to be filled.
pub(crate) fn wanted_like<const N: usize>(tensors: [&FlexTensor; N], wanted: Wanted<N>) -> [Option<FlexTensor>; N] {
    std::array::from_fn(|i| wanted[i].then(|| like(tensors[i])))
}

/// Numbers of which every one is written before it is read. What stands there until then is whatever stood there before.
pub(crate) fn room(len: usize) -> Vec<f32> {
    // What reads a number that was not written does not pass a test.
    if cfg!(test) {
        return vec![f32::NAN; len];
    }
    let mut room = Vec::with_capacity(len);
    if told_of(room.as_mut_ptr()) {
        // SAFETY: there is room for as many, and of what stands there the compiler was told that it may have been written; every pattern
        // of bits is a number.
        unsafe { room.set_len(len) };
    } else {
        room.resize(len, 0.0);
    }
    room
}

/// Tells the compiler, which must not take what nobody has written for numbers, of instructions unknown to it that may have done so. Whether
/// it can be told on this processor.
#[inline(always)]
fn told_of(place: *mut f32) -> bool {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    // SAFETY: there is no instruction.
    unsafe {
        std::arch::asm!("/* {0} */", in(reg) place, options(nostack, preserves_flags));
        true
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        let _ = place;
        false
    }
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
