//! The activation between the products of a feed-forward layer, on GPUs.

mod kernels;

use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use cubecl::prelude::CubeDim;

use super::autodiff::{SwigluGradients, SwigluOps};
use crate::gpu::pointwise;
use crate::gpu::tensors::{count, new_of, of_format};

/// `silu(gate) · up`
pub(crate) fn swiglu(gate: &CubeTensor, up: &CubeTensor) -> CubeTensor {
    let out = new_of(gate, gate.meta.shape().to_vec(), gate.dtype);
    let launch = of_format!(gate.dtype, kernels::swiglu::launch);
    launch(
        &out.client,
        pointwise::cubes(count(gate)),
        CubeDim::new_1d(pointwise::UNITS),
        gate.clone().into_buffer_arg(),
        up.clone().into_buffer_arg(),
        out.clone().into_buffer_arg(),
        count(gate),
    );
    out
}

/// The activation anew, from which the gradient `d_act` of it; the gradients of `gate` and `up` take their places.
pub(crate) fn swiglu_in_place(gate: &CubeTensor, up: &CubeTensor, d_act: CubeTensor) -> CubeTensor {
    let act = new_of(gate, gate.meta.shape().to_vec(), gate.dtype);
    let launch = of_format!(gate.dtype, kernels::swiglu_grad::launch);
    launch(
        &act.client,
        pointwise::cubes(count(&act)),
        CubeDim::new_1d(pointwise::UNITS),
        gate.clone().into_buffer_arg(),
        up.clone().into_buffer_arg(),
        d_act.into_buffer_arg(),
        act.clone().into_buffer_arg(),
        count(&act),
    );
    act
}

impl SwigluOps for CubeBackend {
    fn swiglu(gate: CubeTensor, up: CubeTensor) -> CubeTensor {
        swiglu(&into_contiguous(gate), &into_contiguous(up))
    }
}

impl SwigluGradients for CubeBackend {
    fn swiglu_grad(gate: CubeTensor, up: CubeTensor, grad: CubeTensor) -> [CubeTensor; 2] {
        // The maps around the activation read what lies here, too.
        let [gate, up] = [gate, up].map(|x| into_contiguous(x).copy());
        swiglu_in_place(&gate, &up, into_contiguous(grad));
        [gate, up]
    }
}
