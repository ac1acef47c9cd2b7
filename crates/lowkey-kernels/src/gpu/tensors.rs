//! Tensors on GPUs: new ones, their sizes, other views of them.

use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::{CubeBackend, tensor::CubeTensor};

pub(crate) fn new(like: &CubeTensor, shape: impl Into<Vec<usize>>) -> CubeTensor {
    new_of(like, shape, DType::F32)
}

pub(crate) fn new_of(like: &CubeTensor, shape: impl Into<Vec<usize>>, dtype: DType) -> CubeTensor {
    let (client, device) = (like.client.clone(), like.device.clone());
    empty_device_contiguous_dtype(client, device, Shape::from(shape.into()), dtype)
}

/// The instance of a generic kernel's `launch` for numbers of a format.
macro_rules! of_format {
    ($dtype:expr, $($launch:ident)::+) => {
        match $dtype {
            burn::tensor::DType::BF16 => $($launch)::+::<half::bf16>,
            burn::tensor::DType::F16 => $($launch)::+::<half::f16>,
            _ => $($launch)::+::<f32>,
        }
    };
}
pub(crate) use of_format;

pub(crate) fn dims<const D: usize>(tensor: &CubeTensor) -> [usize; D] {
    let shape = tensor.meta.shape();
    std::array::from_fn(|i| shape[i])
}

pub(crate) fn count(tensor: &CubeTensor) -> usize {
    tensor.meta.num_elements()
}

/// Another view of a tensor's numbers.
pub(crate) fn reshaped(tensor: CubeTensor, shape: impl Into<Vec<usize>>) -> CubeTensor {
    CubeBackend::float_reshape(tensor, Shape::from(shape.into()))
}

/// All tokens as one tall matrix.
pub(crate) fn tall(x: CubeTensor) -> CubeTensor {
    let shape = x.meta.shape().to_vec();
    let width = shape[shape.len() - 1];
    let rows = shape.iter().product::<usize>() / width.max(1);
    reshaped(into_contiguous(x), [rows, width])
}
