//! The norm on GPUs.

mod kernels;

use burn::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use cubecl::prelude::{CubeCount, CubeDim};

use super::autodiff::{NormGradients, NormOps};
use crate::gpu::tensors::{count, dims, new, new_of, of_format, reshaped};
use crate::gpu::{pointwise, rows};

/// Column sums of `[count, width]`.
fn column_sums(parts: CubeTensor) -> CubeTensor {
    let [count, width] = dims::<2>(&parts);
    let out = new(&parts, [width]);
    kernels::column_sums::launch(
        &out.client,
        pointwise::cubes(width),
        CubeDim::new_1d(pointwise::UNITS),
        parts.into_buffer_arg(),
        out.clone().into_buffer_arg(),
        count,
        width,
    );
    out
}

/// Rows of a norm: `count` rows of `width` numbers, `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) count: usize,
    pub(crate) stride: usize,
    pub(crate) width: usize,
    pub(crate) eps: f64,
    pub(crate) factor: f64,
}

/// The normed rows, in the given format.
pub(crate) fn rms_norm(x: &CubeTensor, weight: &CubeTensor, of: Rows, dtype: DType) -> CubeTensor {
    let out = new_of(x, [of.count, of.width], dtype);
    let launch = of_format!(dtype, kernels::rms_norm::launch);
    launch(
        &out.client,
        CubeCount::Static(of.count.min(rows::CUBES) as u32, 1, 1),
        CubeDim::new_1d(rows::UNITS),
        x.clone().into_buffer_arg(),
        weight.clone().into_buffer_arg(),
        out.clone().into_buffer_arg(),
        of.count,
        of.stride,
        of.width,
        of.eps as f32,
        of.factor as f32,
    );
    out
}

/// Cubes of [`rms_norm_grad`]: enough to fill a device, few enough that summing their parts costs little.
const NORM_CUBES: usize = 512;

/// `(d x [count, width], d weight [width])`, the second where it is wanted; in a residual branch with `branch`, the other gradient that reaches the norm and what flows
/// past it.
pub(crate) fn rms_norm_grad(
    x: &CubeTensor,
    weight: &CubeTensor,
    grad: &CubeTensor,
    branch: Option<[CubeTensor; 2]>,
    of: Rows,
    of_weight: bool,
) -> (CubeTensor, Option<CubeTensor>) {
    let in_branch = branch.is_some();
    let [more, past] = branch.unwrap_or_else(|| [grad.clone(), grad.clone()]);
    let cubes = of.count.min(NORM_CUBES);
    let (d_x, parts) = (new(x, [of.count, of.width]), new(x, [cubes, of.width]));
    kernels::rms_norm_grad::launch(
        &d_x.client,
        CubeCount::Static(cubes as u32, 1, 1),
        CubeDim::new_1d(rows::UNITS),
        x.clone().into_buffer_arg(),
        weight.clone().into_buffer_arg(),
        grad.clone().into_buffer_arg(),
        more.into_buffer_arg(),
        past.into_buffer_arg(),
        d_x.clone().into_buffer_arg(),
        parts.clone().into_buffer_arg(),
        of.count,
        of.stride,
        of.width,
        of.eps as f32,
        of.factor as f32,
        in_branch,
    );
    (d_x, of_weight.then(|| column_sums(parts)))
}

/// All rows of a dense tensor.
pub(crate) fn dense(x: &CubeTensor, width: usize, eps: f64) -> Rows {
    Rows { count: count(x) / width.max(1), stride: width, width, eps, factor: 1.0 }
}

impl NormOps for CubeBackend {
    fn rms_norm(x: CubeTensor, weight: CubeTensor, eps: f64) -> CubeTensor {
        let (x, weight) = (into_contiguous(x), into_contiguous(weight));
        let shape = x.meta.shape().to_vec();
        let [width] = dims::<1>(&weight);
        reshaped(rms_norm(&x, &weight, dense(&x, width, eps), DType::F32), shape)
    }
}

impl NormGradients for CubeBackend {
    fn rms_norm_grad(
        x: CubeTensor,
        weight: CubeTensor,
        grad: CubeTensor,
        eps: f64,
        of_weight: bool,
    ) -> (CubeTensor, Option<CubeTensor>) {
        let (x, weight, grad) = (into_contiguous(x), into_contiguous(weight), into_contiguous(grad));
        let shape = x.meta.shape().to_vec();
        let [width] = dims::<1>(&weight);
        let (d_x, d_weight) = rms_norm_grad(&x, &weight, &grad, None, dense(&x, width, eps), of_weight);
        (reshaped(d_x, shape), d_weight)
    }
}
