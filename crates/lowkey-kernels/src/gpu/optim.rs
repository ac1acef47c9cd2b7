//! GPUs' side of the passes over whole parameters.

use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, Tensor};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::{CubeCount, CubeDim};

use super::{count, new, pointwise, pointwise_cubes, rows};
use crate::optim::AdamWStep;

/// Second handles to f32 tensors on a GPU.
fn on_gpu<const N: usize>(tensors: [&Tensor<1>; N]) -> Option<[CubeTensor; N]> {
    let one = |tensor: &Tensor<1>| match tensor.dtype() {
        DType::F32 => tensor.clone().try_into_primitive::<CubeBackend>().ok().map(into_contiguous),
        _ => None,
    };
    tensors.into_iter().map(one).collect::<Option<Vec<_>>>()?.try_into().ok()
}

/// The tensor to write over: this one where it has no other owner, else a copy.
fn own(tensor: CubeTensor) -> CubeTensor {
    if tensor.handle.can_mut() { tensor } else { CubeBackend::float_mul_scalar(tensor, 1.0f32.into()) }
}

/// One step of AdamW in place; the tensors back where they are not on a GPU.
pub(crate) fn adamw(tensors: [Tensor<1>; 4], step: AdamWStep) -> Result<[Tensor<1>; 3], Box<[Tensor<1>; 4]>> {
    let Some(handles) = on_gpu(tensors.each_ref()) else { return Err(Box::new(tensors)) };
    drop(tensors);
    let [value, gradient, m, v] = handles;
    let [value, m, v] = [value, m, v].map(own);
    let AdamWStep { clip, lr, betas: [beta1, beta2], eps, weight_decay, .. } = step;
    let (correction1, correction2) = step.corrections();
    pointwise::adamw::launch(
        &value.client,
        pointwise_cubes(count(&value)),
        CubeDim::new_1d(pointwise::UNITS),
        value.clone().into_buffer_arg(),
        gradient.into_buffer_arg(),
        m.clone().into_buffer_arg(),
        v.clone().into_buffer_arg(),
        count(&value),
        clip as f32,
        (1.0 - lr * weight_decay) as f32,
        beta1 as f32,
        (1.0 - beta1) as f32,
        beta2 as f32,
        (1.0 - beta2) as f32,
        correction2 as f32,
        eps as f32,
        (lr / correction1) as f32,
    );
    Ok([value, m, v].map(Tensor::from_primitive::<CubeBackend>))
}

/// Cubes that each add up a part of a tensor.
const PARTS: usize = 256;

/// `Σ x²` of each tensor: parts on the device in f32, their sums here in f64; `None` where a tensor is not on a GPU. NaN where the
/// device does not answer.
pub(crate) fn sums_of_squares(tensors: &[Tensor<1>]) -> Option<Vec<f64>> {
    let all = tensors.iter().map(|x| on_gpu([x]).map(|[x]| x)).collect::<Option<Vec<_>>>()?;
    let out = new(all.first()?, [all.len(), PARTS]);
    for (i, x) in all.into_iter().enumerate() {
        let numbers = count(&x);
        rows::sums_of_squares::launch(
            &out.client,
            CubeCount::Static(PARTS as u32, 1, 1),
            CubeDim::new_1d(rows::UNITS),
            x.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            numbers,
            i * PARTS,
        );
    }
    // The one time that a step waits for the device.
    let sums = match Tensor::<2>::from_primitive::<CubeBackend>(out).try_into_vec_as::<f32>() {
        Ok(parts) => parts.chunks(PARTS).map(|parts| parts.iter().copied().map(f64::from).sum()).collect(),
        Err(_) => vec![f64::NAN; tensors.len()],
    };
    Some(sums)
}
