//! Attention: in f32 on plain units, or on matrix units where the precision allows it and a device has them.

#[cfg(test)]
mod tests;
mod tiles;
mod units;

use burn::backend::ops::FloatTensorOps;
use burn::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use cubecl::prelude::{BufferArg, CubeCount, CubeDim};

use self::units::{Geometry, Widths};
use super::autodiff::{AttentionShape, AttentionState, CausalAttentionGradients, CausalAttentionOps};
use crate::gpu::product::{cast, format};
use crate::gpu::tensors::{dims, new, new_of, of_format, reshaped};
use crate::gpu::{pointwise, profile, tune};
use crate::precision::Precision;

/// Which kernels compute an attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Way {
    /// [`tiles`].
    Tiles,
    /// [`units`], with operands of the format.
    Units(Geometry, DType),
}

/// Sizes of an attention.
#[derive(Clone, Copy)]
pub(crate) struct Attention {
    batch: usize,
    seq: usize,
    widths: Widths,
    scale: f32,
    precision: Precision,
}

/// The ways of a pass: batch, sequence, widths, precision, part.
static KNOWN: tune::Known<(usize, usize, Widths, Precision, &str), Way> = tune::Known::new();

/// What the gradient kernels read.
struct Saved {
    /// Queries, keys and values, shared keys, gradient of the output.
    inputs: [CubeTensor; 4],
    rows: CubeTensor,
}

impl Way {
    /// The format that its kernels read.
    fn format(self) -> DType {
        match self {
            Self::Tiles => DType::F32,
            Self::Units(_, dtype) => dtype,
        }
    }
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tiles => f.write_str("tiles in f32"),
            Self::Units(geometry, _) => geometry.fmt(f),
        }
    }
}

impl Saved {
    /// The inputs in a format.
    fn cast(self, dtype: DType) -> Self {
        Self { inputs: self.inputs.map(|x| cast(x, dtype)), rows: self.rows }
    }

    /// The inputs as a way's kernels take them.
    fn read_by(&self, way: Way) -> [BufferArg; 4] {
        self.inputs.each_ref().map(|x| cast(x.clone(), way.format()).into_buffer_arg())
    }
}

impl Attention {
    pub(crate) fn new(q: &CubeTensor, kv: &CubeTensor, shape: AttentionShape) -> Self {
        let [batch, seq, heads, _] = dims::<4>(q);
        let [_, _, groups, width] = dims::<4>(kv);
        let AttentionShape { nope, rope, scale, precision } = shape;
        let widths = Widths { heads, groups, nope, rope, value: width - nope };
        Self { batch, seq, widths, scale: scale as f32, precision }
    }

    /// How each part may be computed; the plain way first.
    pub(crate) fn ways(self, like: &CubeTensor) -> Vec<(String, Way)> {
        let dtype = format(self.precision);
        let on_units = units::geometries(&like.client, dtype, self.widths).into_iter();
        let on_units = on_units.map(|geometry| Way::Units(geometry, dtype));
        [Way::Tiles].into_iter().chain(on_units).map(|way| (way.to_string(), way)).collect()
    }

    fn fastest(self, part: &'static str, like: &CubeTensor, run: impl Fn(Way) -> CubeTensor) -> Way {
        let Self { batch, seq, widths, precision, .. } = self;
        if format(precision) == DType::F32 {
            return Way::Tiles;
        }
        KNOWN.get(&like.client, (batch, seq, widths, precision, part), || self.measured(part, like, run))
    }

    fn measured(self, part: &str, like: &CubeTensor, run: impl Fn(Way) -> CubeTensor) -> Way {
        let Self { batch, seq, widths, precision, .. } = self;
        let Widths { heads, groups, nope, rope, value } = widths;
        let what = || {
            let format = format!("{precision:?}").to_lowercase();
            format!("{format} attention {part} {batch}×{seq} {heads}/{groups} heads of {nope}+{rope}, {value}")
        };
        // Operands are rounded here and not there.
        let tolerance = if precision == Precision::Bf16 { 3e-2 } else { 1e-2 };
        tune::fastest(&like.client, what, tolerance, || self.ways(like), |way| Ok(run(*way))).unwrap_or(Way::Tiles)
    }

    fn cubes(self, rows: usize, heads: usize) -> CubeCount {
        CubeCount::Static(self.seq.div_ceil(rows) as u32, heads as u32, self.batch as u32)
    }

    fn units(geometry: Geometry) -> CubeDim {
        CubeDim::new_2d(geometry.lanes as u32, geometry.planes as u32)
    }

    /// `(out [B, T, H·V], lse [B, H, T])`; all inputs dense.
    pub(crate) fn forward(
        self,
        q: CubeTensor,
        kv: CubeTensor,
        k_pe: CubeTensor,
        starts: CubeTensor,
    ) -> (CubeTensor, CubeTensor) {
        let inputs = [q, kv, k_pe, starts];
        let way = self.fastest("forward", &inputs[0], |way| self.forward_by(way, inputs.clone()).0);
        profile::named(|| self.purpose("forward", way), || self.forward_by(way, inputs))
    }

    /// What a pass computes, with the floating-point operations that the kernel for it does.
    fn purpose(self, part: &str, way: Way) -> (String, f64) {
        let Self { batch, seq, widths, .. } = self;
        let key = widths.nope + widths.rope;
        // Each key with each later query: scores, what reads them, and on the way back the scores and what they read anew.
        let numbers = match part {
            "forward" => key + widths.value,
            "d_q" => 2 * key + widths.value,
            _ => 2 * (key + widths.value),
        };
        let pairs = (batch * widths.heads * seq) as f64 * (seq + 1) as f64 / 2.0;
        (format!("attention {part}, {way}"), 2.0 * pairs * numbers as f64)
    }

    pub(crate) fn forward_by(self, way: Way, inputs: [CubeTensor; 4]) -> (CubeTensor, CubeTensor) {
        let Self { batch, seq, widths, scale, .. } = self;
        let Widths { heads, groups, nope, rope, value } = widths;
        let like = inputs[0].clone();
        let client = like.client.clone();
        let (out, lse) = (new(&like, [batch, seq, heads * value]), new(&like, [batch, heads, seq]));
        let [q, kv, k_pe, starts] = inputs;
        let [q, kv, k_pe] = [q, kv, k_pe].map(|x| cast(x, way.format()).into_buffer_arg());
        let starts = starts.into_buffer_arg();
        let outs = [&out, &lse].map(|x| x.clone().into_buffer_arg());
        let [to, to_lse] = outs;
        match way {
            Way::Tiles => {
                let side = CubeDim::new_2d(tiles::SIDE as u32, tiles::SIDE as u32);
                let cubes = self.cubes(tiles::TILE, heads);
                tiles::forward::launch(
                    &client, cubes, side, q, kv, k_pe, starts, to, to_lse, seq, scale, heads, groups, nope, rope, value,
                );
            }
            Way::Units(geometry, dtype) => {
                let (cubes, dim) = (self.cubes(geometry.rows(), heads), Self::units(geometry));
                let launch = of_format!(dtype, units::forward::forward::launch);
                let vector = geometry.vector;
                launch(&client, cubes, dim, vector, q, kv, k_pe, starts, to, to_lse, seq, scale, widths, geometry);
            }
        }
        (out, lse)
    }

    /// `(d q, d kv, d k_pe)` of dense inputs.
    pub(crate) fn backward(self, saved: AttentionState<CubeBackend>, grad: CubeTensor) -> [CubeTensor; 3] {
        let (saved, k_pe) = self.prepared(saved, grad);
        let like = saved.rows.clone();
        let way = self.fastest("d_q", &like, |way| self.query_gradient(way, &saved));
        // Both kernels read the gradient: it is rounded once.
        let saved = saved.cast(way.format());
        let d_q = profile::named(|| self.purpose("d_q", way), || self.query_gradient(way, &saved));
        let way = self.fastest("d_kv", &like, |way| self.key_gradient(way, &saved).0);
        let (d_kv, d_pe) = profile::named(|| self.purpose("d_kv", way), || self.key_gradient(way, &saved));
        [d_q, d_kv, self.shared(d_pe, k_pe)]
    }

    #[cfg(test)]
    pub(crate) fn backward_by(self, way: Way, saved: AttentionState<CubeBackend>, grad: CubeTensor) -> [CubeTensor; 3] {
        let (saved, k_pe) = self.prepared(saved, grad);
        let (d_kv, d_pe) = self.key_gradient(way, &saved);
        [self.query_gradient(way, &saved), d_kv, self.shared(d_pe, k_pe)]
    }

    /// The gradient of the shared keys, from that of each group.
    fn shared(self, d_pe: CubeTensor, k_pe: CubeTensor) -> CubeTensor {
        match self.widths.rope {
            0 => CubeBackend::float_mul_scalar(k_pe, 0.0f32.into()),
            rope => reshaped(CubeBackend::float_sum_dim(d_pe, 1), [self.batch, self.seq, rope]),
        }
    }

    fn prepared(self, saved: AttentionState<CubeBackend>, grad: CubeTensor) -> (Saved, CubeTensor) {
        let Self { batch, seq, widths, .. } = self;
        let AttentionState { q, kv, k_pe, starts, out, lse, .. } = saved;
        let queries = batch * widths.heads * seq;
        let rows = new(&q, [batch, widths.heads, seq, 3]);
        tiles::prepare::launch(
            &q.client,
            pointwise::cubes(queries),
            CubeDim::new_1d(pointwise::UNITS),
            out.into_buffer_arg(),
            grad.clone().into_buffer_arg(),
            lse.into_buffer_arg(),
            starts.into_buffer_arg(),
            rows.clone().into_buffer_arg(),
            queries,
            seq,
            widths.heads,
            widths.value,
        );
        (Saved { inputs: [q, kv, k_pe.clone(), grad], rows }, k_pe)
    }

    fn query_gradient(self, way: Way, saved: &Saved) -> CubeTensor {
        let Self { batch, seq, widths, scale, .. } = self;
        let Widths { heads, groups, nope, rope, value } = widths;
        let client = saved.rows.client.clone();
        let d_q = new(&saved.rows, [batch, seq, heads, nope + rope]);
        let [q, kv, k_pe, grad] = saved.read_by(way);
        let [rows, to] = [&saved.rows, &d_q].map(|x| x.clone().into_buffer_arg());
        match way {
            Way::Tiles => {
                let side = CubeDim::new_2d(tiles::SIDE as u32, tiles::SIDE as u32);
                let cubes = self.cubes(tiles::TILE, heads);
                tiles::query_gradient::launch(
                    &client, cubes, side, q, kv, k_pe, grad, rows, to, seq, scale, heads, groups, nope, rope, value,
                );
            }
            Way::Units(geometry, dtype) => {
                let (cubes, dim) = (self.cubes(geometry.rows(), heads), Self::units(geometry));
                let launch = of_format!(dtype, units::backward::query_gradient::launch);
                let vector = geometry.vector;
                launch(&client, cubes, dim, vector, q, kv, k_pe, grad, rows, to, seq, scale, widths, geometry);
            }
        }
        d_q
    }

    /// `(d kv, d k_pe of each group)`, the former in the way's format: what follows are products.
    fn key_gradient(self, way: Way, saved: &Saved) -> (CubeTensor, CubeTensor) {
        let Self { batch, seq, widths, scale, .. } = self;
        let Widths { heads, groups, nope, rope, value } = widths;
        let client = saved.rows.client.clone();
        let d_kv = new_of(&saved.rows, [batch, seq, groups, nope + value], way.format());
        // Without a shared part a single number stands for it, as in the forward pass.
        let d_pe = if rope > 0 { vec![batch * seq, groups, rope] } else { vec![1, 1, 1] };
        let d_pe = new(&saved.rows, d_pe);
        let [q, kv, k_pe, grad] = saved.read_by(way);
        let [rows, to, to_pe] = [&saved.rows, &d_kv, &d_pe].map(|x| x.clone().into_buffer_arg());
        match way {
            Way::Tiles => {
                let side = CubeDim::new_2d(tiles::SIDE as u32, tiles::SIDE as u32);
                let cubes = self.cubes(tiles::TILE, groups);
                tiles::key_gradient::launch(
                    &client, cubes, side, q, kv, k_pe, grad, rows, to, to_pe, seq, scale, heads, groups, nope, rope,
                    value,
                );
            }
            Way::Units(geometry, dtype) => {
                let (cubes, dim) = (self.cubes(geometry.rows(), groups), Self::units(geometry));
                let launch = of_format!(dtype, units::backward::key_gradient::launch);
                let vector = geometry.vector;
                launch(&client, cubes, dim, vector, q, kv, k_pe, grad, rows, to, to_pe, seq, scale, widths, geometry);
            }
        }
        (d_kv, d_pe)
    }
}

impl CausalAttentionOps for CubeBackend {
    fn causal_attention(
        q: CubeTensor,
        kv: CubeTensor,
        k_pe: CubeTensor,
        starts: CubeTensor,
        shape: AttentionShape,
    ) -> CubeTensor {
        Self::causal_attention_saving(q, kv, k_pe, starts, shape).0
    }
}

impl CausalAttentionGradients for CubeBackend {
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
        (d_q, cast(d_kv, DType::F32), d_k_pe)
    }
}
