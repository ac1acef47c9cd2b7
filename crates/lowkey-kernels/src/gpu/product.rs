//! Matrix products: the kernels of CubeK, one of them chosen for each shape.
//!
//! Burn's own `matmul` hands f32 to matrix units as TF32 wherever a device has them. Here f32 means f32 unless
//! [`Precision::Tf32`] asks for less.

use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, FloatDType, Tensor};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use cubecl::ir::{ElemType, FloatKind};
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems};
use cubek::matmul::launch::launch_ref;
use cubek::matmul::multi_level::Strategy;
use cubek::matmul::multi_level::components::tile::TileMatmulKind;
use cubek::matmul::multi_level::routines::TileSizeSelection;
use cubek::matmul::multi_level::routines::batch::double_buffering::DoubleBufferingArgs;
use cubek::matmul::multi_level::routines::batch::double_unit::DoubleUnitSelectionArgs;
use cubek::matmul::multi_level::routines::batch::ordered_double_buffering::OrderedSelectionArgs;
use cubek::matmul::multi_level::routines::batch::simple::SimpleArgs;
use cubek::matmul::multi_level::routines::batch::simple_unit::SimpleUnitSelectionArgs;
use cubek::matmul::routine::BlueprintStrategy::Inferred;
use cubek::std::InputBinding;

use super::tensors::{dims, new_of};
use super::{profile, tune};
use crate::autodiff::Operands;
use crate::precision::Precision;

/// The format of a product's operands.
pub(crate) fn format(precision: Precision) -> DType {
    match precision {
        Precision::F32 | Precision::Tf32 => DType::F32,
        Precision::Bf16 => DType::BF16,
        Precision::F16 => DType::F16,
    }
}

/// The operand of a product in the format that products are computed in.
pub(crate) fn operand(x: CubeTensor, precision: Precision) -> CubeTensor {
    cast(x, format(precision))
}

/// The tensor in another format; itself where it has it.
pub(crate) fn cast(x: CubeTensor, dtype: DType) -> CubeTensor {
    match dtype {
        dtype if dtype == x.dtype => x,
        DType::BF16 => CubeBackend::float_cast(x, FloatDType::BF16),
        DType::F16 => CubeBackend::float_cast(x, FloatDType::F16),
        _ => CubeBackend::float_cast(x, FloatDType::F32),
    }
}

pub(crate) fn transposed(a: CubeTensor) -> CubeTensor {
    CubeBackend::float_swap_dims(a, 0, 1)
}

/// The kernel for every device and shape that the others refuse.
const LAST_RESORT: Strategy = Strategy::Naive;

const fn unit(tile_size: TileSizeSelection) -> Strategy {
    Strategy::SimpleUnit(Inferred(SimpleUnitSelectionArgs { tile_size }))
}

/// The plain kernels, with much code and with little.
const LARGE: (&str, Strategy) = ("tiles", unit(TileSizeSelection::MaxTileSize));
const SMALL: (&str, Strategy) = ("small tiles", unit(TileSizeSelection::MinTileSize));

/// What computes where nothing was measured, and what others are compared with. NVRTC takes minutes for each kernel of large tiles.
const PLAIN: (&str, Strategy) = if cfg!(feature = "cuda-nvrtc") { SMALL } else { LARGE };

/// Kernels that sum what they are given, in f32; the plain one first.
fn on_units() -> Vec<(&'static str, Strategy)> {
    let double = |tile_size| Strategy::DoubleUnit(Inferred(DoubleUnitSelectionArgs { tile_size }));
    let mut all = vec![PLAIN, ("small tiles, double buffer", double(TileSizeSelection::MinTileSize))];
    if !cfg!(feature = "cuda-nvrtc") {
        all.extend([SMALL, ("tiles, double buffer", double(TileSizeSelection::MaxTileSize))]);
    }
    all
}

/// Kernels on matrix units, to which f32 is TF32: those that were the fastest of some shape on an H200 or within a few percent of it. Each
/// more costs a second of compiling per shape.
fn on_matrix_units() -> Vec<(&'static str, Strategy)> {
    use TileMatmulKind::{Cmma, Mma};
    let simple = |tile_matmul, multi_rows| Inferred(SimpleArgs { multi_rows, tile_matmul });
    let bulk = |tile_matmul, multi_rows| Inferred(SimpleArgs { multi_rows, tile_matmul });
    let double = |tile_matmul, specialized| Inferred(DoubleBufferingArgs { specialized, tile_matmul });
    let ordered = |tile_matmul, rows| {
        Inferred(OrderedSelectionArgs {
            partition_k: Some(2),
            row_count: Some(rows),
            rows_per_plane: Some(2),
            tile_matmul,
        })
    };
    vec![
        ("cmma, rows", Strategy::SimpleCyclicCmma(simple(Cmma, true))),
        ("mma", Strategy::SimpleCyclicMma(simple(Mma, false))),
        ("cmma, double buffer", Strategy::DoubleCyclicCmma(double(Cmma, false))),
        ("mma, double buffer, loading planes", Strategy::DoubleCyclicMma(double(Mma, true))),
        ("mma, ordered, 8", Strategy::OrderedDoubleMma(ordered(Mma, 8))),
        ("cmma, ordered, 8", Strategy::OrderedDoubleCmma(ordered(Cmma, 8))),
        ("mma, bulk loads", Strategy::SimpleTmaMma(bulk(Mma, false))),
        ("mma, bulk loads, rows", Strategy::SimpleTmaMma(bulk(Mma, true))),
        ("mma, bulk loads, loading planes", Strategy::SpecializedTmaMma(Inferred(().into()))),
    ]
}

fn element(dtype: DType) -> ElemType {
    ElemType::Float(match dtype {
        DType::BF16 => FloatKind::BF16,
        DType::F16 => FloatKind::F16,
        _ => FloatKind::F32,
    })
}

/// Queues `a · b` into a new tensor of `dtype`, summed in f32; several matrices each, where there are more dimensions.
fn launch(strategy: &Strategy, a: &CubeTensor, b: &CubeTensor, dtype: DType) -> Result<CubeTensor, String> {
    let mut shape = a.meta.shape().to_vec();
    if let (Some(width), Some(n)) = (shape.last_mut(), b.meta.shape().last()) {
        *width = *n;
    }
    let out = new_of(a, shape, dtype);
    let (lhs, rhs) = (element(a.dtype), element(b.dtype));
    let mut formats = MatmulElems::from_globals(&MatmulGlobalElems { lhs, rhs, out: element(dtype) });
    let bindings = (InputBinding::new(a.clone().binding(), lhs), InputBinding::new(b.clone().binding(), rhs));
    let to = out.clone().binding();
    launch_ref(&strategy.clone().into(), &a.client, bindings.0, bindings.1, to, &mut formats)
        .map_err(|e| format!("{e:?}"))?;
    Ok(out)
}

/// Which way an operand's numbers run, as a choice of kernel depends on it.
fn layout(x: &CubeTensor) -> char {
    if x.meta.strides().first() == Some(&1) { 'T' } else { 'N' }
}

/// `a · b` of matrices of one format, summed and returned in f32.
pub(crate) fn product(a: CubeTensor, b: CubeTensor, precision: Precision) -> CubeTensor {
    product_of(a, b, precision, DType::F32)
}

/// The same, summed in f32 and returned in the format of operands.
pub(crate) fn rounded_product(a: CubeTensor, b: CubeTensor, precision: Precision) -> CubeTensor {
    product_of(a, b, precision, format(precision))
}

/// Operations from which on it is worth seconds to find the fastest plain kernel. Smaller products, as of decoding and of prompts, wait for
/// their launch: on an H200 all kernels take 0.04 to 0.1 ms for them.
const WORTH_MEASURING: f64 = 6e7;

/// Sizes, layouts and formats of a product.
type Key = ([usize; 2], usize, [char; 2], Precision, DType);

static KNOWN: tune::Known<Key, Strategy> = tune::Known::new();

fn product_of(a: CubeTensor, b: CubeTensor, precision: Precision, dtype: DType) -> CubeTensor {
    let what = || {
        let ([m, k], [_, n]) = (dims::<2>(&a), dims::<2>(&b));
        let format =
            if precision == Precision::Tf32 { "tf32".to_owned() } else { format!("{:?}", a.dtype).to_lowercase() };
        let to = if dtype == DType::F32 { "" } else { ", rounded" };
        format!("{format} product {m}×{k}×{n} {}{}{to}", layout(&a), layout(&b))
    };
    let candidates = || {
        let mut all = if flops(&a, &b) < WORTH_MEASURING { vec![SMALL] } else { on_units() };
        if precision != Precision::F32 && !a.client.properties().features.matmul.cmma.is_empty() {
            // What the others are compared with: none of its like comes near them, and the larger ones take long to compile.
            all = vec![SMALL];
            all.extend(on_matrix_units());
        }
        all.into_iter().map(|(name, strategy)| (name.to_owned(), strategy)).collect()
    };
    // Two sums that differ in the last bit may be rounded apart.
    let tolerance = match (precision, dtype) {
        (Precision::Tf32, _) | (_, DType::BF16) => 1e-2,
        (_, DType::F16) => 1e-3,
        _ => 1e-4,
    };
    let run = |strategy: &Strategy| launch(strategy, &a, &b, dtype);
    let key = (dims::<2>(&a), dims::<2>(&b)[1], [layout(&a), layout(&b)], precision, dtype);
    let strategy = KNOWN.get(&a.client, key, || {
        let chosen = tune::fastest(&a.client, what, tolerance, candidates, run);
        chosen.unwrap_or(PLAIN.1)
    });
    profile::named(
        || (what(), flops(&a, &b)),
        || {
            run(&strategy).or_else(|_| run(&LAST_RESORT)).unwrap_or_else(|_| {
                // No kernel for this format: the operands stay rounded, the products are computed in f32.
                let [a, b] = [a.clone(), b.clone()].map(|half| CubeBackend::float_cast(half, FloatDType::F32));
                let out = CubeBackend::float_matmul(a, b);
                if dtype == DType::F32 { out } else { operand(out, precision) }
            })
        },
    )
}

/// `x Wᵀ` of a tall matrix.
pub(crate) fn projected(x: CubeTensor, weight: CubeTensor, precision: Precision) -> CubeTensor {
    product(operand(x, precision), transposed(operand(weight, precision)), precision)
}

/// The same of what is rounded already, rounded for a product that reads it.
pub(crate) fn rounded_projection(x: CubeTensor, weight: CubeTensor, precision: Precision) -> CubeTensor {
    into_contiguous(rounded_product(x, transposed(operand(weight, precision)), precision))
}

impl Operands for CubeBackend {
    fn rounded(x: CubeTensor, precision: Precision) -> CubeTensor {
        operand(x, precision)
    }
}

/// `a · b` of as many matrices each, in f32 on plain units; `None` where they are not f32 on a GPU.
pub(crate) fn batched(a: &Tensor<4>, b: &Tensor<4>) -> Option<Tensor<4>> {
    if a.dtype() != DType::F32 || b.dtype() != DType::F32 {
        return None;
    }
    let (a, b) =
        (a.clone().try_into_primitive::<CubeBackend>().ok()?, b.clone().try_into_primitive::<CubeBackend>().ok()?);
    let run = |strategy: &Strategy| launch(strategy, &a, &b, DType::F32);
    let out = run(&PLAIN.1).or_else(|_| run(&LAST_RESORT)).ok()?;
    Some(Tensor::from_primitive::<CubeBackend>(out))
}

fn flops(a: &CubeTensor, b: &CubeTensor) -> f64 {
    let ([m, k], [_, n]) = (dims::<2>(a), dims::<2>(b));
    2.0 * (m * k * n) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{is_cpu, plain_device};
    use burn::tensor::Distribution;

    fn random(shape: [usize; 2]) -> Tensor<2> {
        Tensor::random(shape, Distribution::Normal(0.0, 1.0), &plain_device())
    }

    fn primitive(x: Tensor<2>) -> CubeTensor {
        x.try_into_primitive::<CubeBackend>().unwrap()
    }

    /// Each kernel that accepts a shape gives what f32 gives; the plain one accepts all.
    fn check(kernels: Vec<(&'static str, Strategy)>, dtype: Option<FloatDType>, most: f32, plain: bool) {
        for (shape, across) in [([1, 8, 1], false), ([33, 48, 65], false), ([128, 64, 96], true), ([7, 40, 257], true)]
        {
            let [m, k, n] = shape;
            let (a, b) = (random([m, k]), random([n, k]));
            let rounded = |x: &Tensor<2>| match dtype {
                Some(dtype) => x.clone().cast(dtype).cast(FloatDType::F32),
                None => x.clone(),
            };
            // Sums on the CPU.
            let host = |x: Tensor<2>| x.into_data().iter::<f32>().collect::<Vec<f32>>();
            let (left, right) = (host(rounded(&a)), host(rounded(&b)));
            let dot = |i: usize| (0..k).map(|t| left[i / n * k + t] * right[i % n * k + t]).sum::<f32>();
            let expected: Vec<f32> = (0..m * n).map(dot).collect();
            let cast = |x: Tensor<2>| match dtype {
                Some(dtype) => x.cast(dtype),
                None => x,
            };
            let a = if across { a.transpose().mul_scalar(1.0).transpose() } else { a };
            let (a, b) = (primitive(cast(a)), transposed(primitive(cast(b))));
            // As sums, and rounded once to the format of the operands.
            let formats = if a.dtype == DType::F32 { vec![DType::F32] } else { vec![DType::F32, a.dtype] };
            for ((i, (name, strategy)), to) in
                kernels.iter().enumerate().flat_map(|x| formats.iter().map(move |to| (x, *to)))
            {
                let out = match launch(strategy, &a, &b, to) {
                    Ok(out) => out,
                    Err(why) => {
                        assert!(i > 0 || !plain, "{name} refuses {shape:?}: {why}");
                        println!("{name} refuses {shape:?}");
                        continue;
                    }
                };
                assert_eq!(out.dtype, to);
                let found = host(Tensor::<2>::from_primitive::<CubeBackend>(out).cast(FloatDType::F32));
                let rounding = match to {
                    DType::F16 => 1.0 / 2048.0,
                    DType::BF16 => 1.0 / 256.0,
                    _ => 0.0,
                };
                for (found, expected) in found.iter().zip(&expected) {
                    let off = (found - expected).abs();
                    let most = most * (k as f32).sqrt() + rounding * expected.abs();
                    assert!(off <= most, "{name}, {shape:?}, {to:?}: {found} for {expected}");
                }
            }
        }
    }

    #[test]
    fn every_kernel_on_plain_units_sums_in_f32() {
        if is_cpu() {
            return println!("skipped: there is no GPU");
        }
        check(on_units(), None, 2e-6, true);
    }

    #[test]
    fn every_kernel_on_plain_units_takes_f16() {
        if is_cpu() || !plain_device().supports_dtype(DType::F16) {
            return println!("skipped: there is no GPU that calculates in f16");
        }
        check(on_units(), Some(FloatDType::F16), 2e-6, true);
    }

    #[test]
    fn every_kernel_on_matrix_units_sums_in_f32() {
        // What stands in for a GPU in software does not survive all of them.
        let device = plain_device();
        if is_cpu() || crate::device::properties(&device).is_none_or(|properties| properties.software) {
            return println!("skipped: there is no GPU but in software");
        }
        for (dtype, format) in [(FloatDType::F16, DType::F16), (FloatDType::BF16, DType::BF16)] {
            if device.supports_dtype(format) {
                check(on_matrix_units(), Some(dtype), 2e-6, false);
            }
        }
    }
}
