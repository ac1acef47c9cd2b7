//! The rotation on GPUs.

mod kernels;

use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use cubecl::prelude::CubeDim;

use super::autodiff::{RotaryGradients, RotaryOps};
use crate::gpu::pointwise;
use crate::gpu::tensors::{count, dims, new};

/// Which pairs are turned, and which way.
#[derive(Clone, Copy)]
pub(crate) struct Turn {
    pub(crate) from: usize,
    pub(crate) interleaved: bool,
    pub(crate) back: bool,
}

pub(crate) fn rotated(x: CubeTensor, cos: CubeTensor, sin: CubeTensor, turn: Turn) -> CubeTensor {
    let (x, cos, sin) = (into_contiguous(x), into_contiguous(cos), into_contiguous(sin));
    let [batch, seq, heads, width] = dims::<4>(&x);
    let [table_batch, table_seq, _, half] = dims::<4>(&cos);
    let out = new(&x, [batch, seq, heads, width]);
    let numbers = count(&x);
    kernels::rotate::launch(
        &out.client,
        pointwise::cubes(numbers),
        CubeDim::new_1d(pointwise::UNITS),
        x.into_buffer_arg(),
        cos.into_buffer_arg(),
        sin.into_buffer_arg(),
        out.clone().into_buffer_arg(),
        numbers,
        heads,
        width,
        table_batch * table_seq,
        turn.from,
        half,
        turn.interleaved,
        turn.back,
    );
    out
}

impl RotaryOps for CubeBackend {
    fn rotate(x: CubeTensor, cos: CubeTensor, sin: CubeTensor, from: usize, interleaved: bool) -> CubeTensor {
        rotated(x, cos, sin, Turn { from, interleaved, back: false })
    }
}

impl RotaryGradients for CubeBackend {
    fn rotate_back(grad: CubeTensor, cos: CubeTensor, sin: CubeTensor, from: usize, interleaved: bool) -> CubeTensor {
        rotated(grad, cos, sin, Turn { from, interleaved, back: true })
    }
}
