//! GPUs' side of the operations: CubeCL kernels, and products of CubeK.
//!
//! Everything here is asynchronous: a call returns as soon as its kernels are queued, and nothing reads back, but where the first use
//! of a shape measures which kernel is fastest.

mod attention;
mod block;
mod judge;
mod loss;
pub(crate) mod optim;
mod pointwise;
pub(crate) mod product;
pub(crate) mod profile;
mod properties;
pub(crate) mod routing;
mod rows;
mod tiles;
pub(crate) mod tune;
mod units;

pub(crate) use properties::{has_collectives, properties};

use burn::backend::ops::{FloatTensorOps, ModuleOps};
use burn::tensor::{DType, FloatDType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use cubecl::prelude::{CubeCount, CubeDim};

use self::attention::Attention;
use self::product::{format, operand, product, rounded_product, transposed};
use crate::ops::{AttentionShape, AttentionState, FusedGradients, FusedOps, Wanted};
use crate::precision::Precision;

fn new(like: &CubeTensor, shape: impl Into<Vec<usize>>) -> CubeTensor {
    new_of(like, shape, DType::F32)
}

fn new_of(like: &CubeTensor, shape: impl Into<Vec<usize>>, dtype: DType) -> CubeTensor {
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
use of_format;

fn dims<const D: usize>(tensor: &CubeTensor) -> [usize; D] {
    let shape = tensor.meta.shape();
    std::array::from_fn(|i| shape[i])
}

fn count(tensor: &CubeTensor) -> usize {
    tensor.meta.num_elements()
}

/// Another view of a tensor's numbers.
fn reshaped(tensor: CubeTensor, shape: impl Into<Vec<usize>>) -> CubeTensor {
    CubeBackend::float_reshape(tensor, Shape::from(shape.into()))
}

/// Cubes of pointwise kernels for so many numbers, spread over two directions where one is too short.
fn pointwise_cubes(count: usize) -> CubeCount {
    let cubes = count.div_ceil(pointwise::UNITS as usize);
    let rows = cubes.div_ceil(rows::CUBES);
    CubeCount::Static(cubes.div_ceil(rows.max(1)) as u32, rows as u32, 1)
}

/// Column sums of `[count, width]`.
fn column_sums(parts: CubeTensor) -> CubeTensor {
    let [count, width] = dims::<2>(&parts);
    let out = new(&parts, [width]);
    rows::column_sums::launch(
        &out.client,
        pointwise_cubes(width),
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
struct Rows {
    count: usize,
    stride: usize,
    width: usize,
    eps: f64,
    factor: f64,
}

/// The normed rows, in the given format.
fn rms_norm(x: &CubeTensor, weight: &CubeTensor, of: Rows, dtype: DType) -> CubeTensor {
    let out = new_of(x, [of.count, of.width], dtype);
    let launch = of_format!(dtype, rows::rms_norm::launch);
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

/// `(d x [count, width], d weight [width])`; in a residual branch with `branch`, the other gradient that reaches the norm and what flows
/// past it.
fn rms_norm_grad(
    x: &CubeTensor,
    weight: &CubeTensor,
    grad: &CubeTensor,
    branch: Option<[CubeTensor; 2]>,
    of: Rows,
) -> (CubeTensor, CubeTensor) {
    let in_branch = branch.is_some();
    let [more, past] = branch.unwrap_or_else(|| [grad.clone(), grad.clone()]);
    let cubes = of.count.min(NORM_CUBES);
    let (d_x, parts) = (new(x, [of.count, of.width]), new(x, [cubes, of.width]));
    rows::rms_norm_grad::launch(
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
    (d_x, column_sums(parts))
}

/// All rows of a dense tensor.
fn dense(x: &CubeTensor, width: usize, eps: f64) -> Rows {
    Rows { count: count(x) / width.max(1), stride: width, width, eps, factor: 1.0 }
}

/// Which pairs are turned, and which way.
#[derive(Clone, Copy)]
struct Turn {
    from: usize,
    interleaved: bool,
    back: bool,
}

fn rotated(x: CubeTensor, cos: CubeTensor, sin: CubeTensor, turn: Turn) -> CubeTensor {
    let (x, cos, sin) = (into_contiguous(x), into_contiguous(cos), into_contiguous(sin));
    let [batch, seq, heads, width] = dims::<4>(&x);
    let [table_batch, table_seq, _, half] = dims::<4>(&cos);
    let out = new(&x, [batch, seq, heads, width]);
    let numbers = count(&x);
    pointwise::rotate::launch(
        &out.client,
        pointwise_cubes(numbers),
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

impl FusedOps for CubeBackend {
    fn embed(weight: CubeTensor, ids: CubeTensor) -> CubeTensor {
        Self::embedding(weight, ids)
    }

    fn rms_norm(x: CubeTensor, weight: CubeTensor, eps: f64) -> CubeTensor {
        let (x, weight) = (into_contiguous(x), into_contiguous(weight));
        let shape = x.meta.shape().to_vec();
        let [width] = dims::<1>(&weight);
        reshaped(rms_norm(&x, &weight, dense(&x, width, eps), DType::F32), shape)
    }

    fn rotate(x: CubeTensor, cos: CubeTensor, sin: CubeTensor, from: usize, interleaved: bool) -> CubeTensor {
        rotated(x, cos, sin, Turn { from, interleaved, back: false })
    }

    fn causal_attention(
        q: CubeTensor,
        kv: CubeTensor,
        k_pe: CubeTensor,
        starts: CubeTensor,
        shape: AttentionShape,
    ) -> CubeTensor {
        Self::causal_attention_saving(q, kv, k_pe, starts, shape).0
    }

    fn cross_entropy_sum(
        h: CubeTensor,
        weight: CubeTensor,
        targets: CubeTensor,
        label_weights: CubeTensor,
        z_loss: f64,
        precision: Precision,
    ) -> CubeTensor {
        loss::Head::new(h, weight, targets, precision).losses(label_weights, z_loss).sum()
    }

    fn cross_entropy_each(h: CubeTensor, weight: CubeTensor, targets: CubeTensor, precision: Precision) -> CubeTensor {
        let one = CubeBackend::float_ones(Shape::from(vec![1]), &h.device, FloatDType::F32);
        loss::Head::new(h, weight, targets, precision).losses(one, 0.0).each()
    }

    fn distill_sum(
        h: CubeTensor,
        weight: CubeTensor,
        teacher: CubeTensor,
        targets: CubeTensor,
        share: f64,
        precision: Precision,
    ) -> CubeTensor {
        Self::distill_sum_saving(h, weight, teacher, targets, share, precision, [false; 2]).0
    }
}

impl FusedGradients for CubeBackend {
    fn embed_grad(weight: CubeTensor, ids: CubeTensor, grad: CubeTensor) -> CubeTensor {
        let [vocab, width] = dims::<2>(&weight);
        let (ids, grad) = (into_contiguous(ids), into_contiguous(grad));
        let tokens = count(&ids);
        let out = Self::float_zeros(Shape::from(vec![vocab, width]), &weight.device, FloatDType::F32);
        rows::embed_grad::launch(
            &out.client,
            CubeCount::Static(tokens.min(rows::CUBES) as u32, 1, 1),
            CubeDim::new_1d(rows::UNITS),
            ids.into_buffer_arg(),
            grad.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            tokens,
            width,
        );
        out
    }

    fn rms_norm_grad(x: CubeTensor, weight: CubeTensor, grad: CubeTensor, eps: f64) -> (CubeTensor, CubeTensor) {
        let (x, weight, grad) = (into_contiguous(x), into_contiguous(weight), into_contiguous(grad));
        let shape = x.meta.shape().to_vec();
        let [width] = dims::<1>(&weight);
        let (d_x, d_weight) = rms_norm_grad(&x, &weight, &grad, None, dense(&x, width, eps));
        (reshaped(d_x, shape), d_weight)
    }

    fn rotate_back(grad: CubeTensor, cos: CubeTensor, sin: CubeTensor, from: usize, interleaved: bool) -> CubeTensor {
        rotated(grad, cos, sin, Turn { from, interleaved, back: true })
    }

    fn causal_attention_saving(
        q: CubeTensor,
        kv: CubeTensor,
        k_pe: CubeTensor,
        starts: CubeTensor,
        shape: AttentionShape,
    ) -> (CubeTensor, CubeTensor) {
        let [q, kv, k_pe, starts] = [q, kv, k_pe, starts].map(into_contiguous);
        Attention::new(&q, &kv, shape).forward(q, kv, k_pe, starts)
    }

    fn causal_attention_grad(saved: AttentionState<Self>, grad: CubeTensor) -> (CubeTensor, CubeTensor, CubeTensor) {
        let AttentionState { q, kv, k_pe, starts, out, lse, shape } = saved;
        let [q, kv, k_pe, starts] = [q, kv, k_pe, starts].map(into_contiguous);
        let sizes = Attention::new(&q, &kv, shape);
        let saved = AttentionState { q, kv, k_pe, starts, out, lse, shape };
        let [d_q, d_kv, d_k_pe] = sizes.backward(saved, into_contiguous(grad));
        (d_q, product::cast(d_kv, DType::F32), d_k_pe)
    }

    fn cross_entropy_sum_saving(
        h: CubeTensor,
        weight: CubeTensor,
        targets: CubeTensor,
        label_weights: CubeTensor,
        z_loss: f64,
        precision: Precision,
        wanted: Wanted<2>,
    ) -> (CubeTensor, [Option<CubeTensor>; 2]) {
        loss::Head::new(h, weight, targets, precision).losses_with_gradients(label_weights, z_loss, wanted)
    }

    fn distill_sum_saving(
        h: CubeTensor,
        weight: CubeTensor,
        teacher: CubeTensor,
        targets: CubeTensor,
        share: f64,
        precision: Precision,
        wanted: Wanted<2>,
    ) -> (CubeTensor, [Option<CubeTensor>; 2]) {
        loss::Head::new(h, weight, targets, precision).lessons_with_gradients(teacher, share, wanted)
    }
}
