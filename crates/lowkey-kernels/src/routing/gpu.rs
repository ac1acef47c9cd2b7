//! Routing of a mixture of experts on a GPU: the best experts by comparison, their order by counting.

use burn::tensor::{DType, Tensor};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use cubecl::client::Client;
use cubecl::prelude::*;

use super::autodiff::{Collected, RoutingGradients, RoutingOps};
use super::choices::Routing;
use crate::gpu::pointwise;
use crate::gpu::rows::{CUBES, UNITS, add_up};
use crate::gpu::tensors::{count, dims, new, new_of};

/// Choices that a cube counts.
const BLOCK: usize = if cfg!(test) { 16 } else { 256 };

/// A score by which experts can be compared: what is no number is the lowest. Told by its bits, as compilers of shaders may take every
/// number for one.
#[cube]
fn comparable(score: f32) -> f32 {
    let mut found = score;
    if (u32::reinterpret(score) & 0x7fff_ffffu32) > 0x7f80_0000u32 {
        found = f32::reinterpret(0xff80_0000u32);
    }
    found
}

/// The `k` best experts of each token, `chosen [tokens, k]`: each the best of those that come after the one before.
#[cube(launch)]
fn best(scores: &[f32], chosen: &mut [i32], tokens: usize, experts: usize, k: usize) {
    let token = ABSOLUTE_POS;
    if token < tokens {
        let from = token * experts;
        let mut last_score = 0.0f32;
        let mut last = 0usize;
        for choice in 0..k {
            let mut found = experts;
            let mut found_score = 0.0f32;
            for expert in 0..experts {
                let score = comparable(scores[from + expert]);
                let after = choice == 0 || score < last_score || (score == last_score && expert > last);
                if after && (found == experts || score > found_score) {
                    found = expert;
                    found_score = score;
                }
            }
            chosen[token * k + choice] = found as i32;
            last = found;
            last_score = found_score;
        }
    }
}

/// How many choices of each block go to each expert, `counts [blocks, experts]`.
#[cube(launch)]
fn counts(chosen: &[i32], counts: &mut [i32], choices: usize, blocks: usize, experts: usize) {
    let mut block = CUBE_POS_X as usize;
    while block < blocks {
        let first = block * comptime!(BLOCK);
        let mut expert = UNIT_POS as usize;
        while expert < experts {
            let mut found = 0i32;
            for i in 0..comptime!(BLOCK) {
                if first + i < choices && chosen[first + i] == expert as i32 {
                    found += 1;
                }
            }
            counts[block * experts + expert] = found;
            expert += CUBE_DIM as usize;
        }
        block += CUBE_COUNT_X as usize;
    }
}

/// The counts of all blocks before, in place, and of all blocks, `totals [experts]`.
#[cube(launch)]
fn before(counts: &mut [i32], totals: &mut [i32], blocks: usize, experts: usize) {
    let expert = ABSOLUTE_POS;
    if expert < experts {
        let mut sum = 0i32;
        for block in 0..blocks {
            let own = counts[block * experts + expert];
            counts[block * experts + expert] = sum;
            sum += own;
        }
        totals[expert] = sum;
    }
}

/// Where each expert begins, `begins [experts + 1]`.
#[cube(launch)]
fn begin(totals: &[i32], begins: &mut [i32], experts: usize) {
    let expert = ABSOLUTE_POS;
    if expert <= experts {
        let mut sum = 0i32;
        let mut other = 0usize;
        while other < expert {
            sum += totals[other];
            other += 1;
        }
        begins[expert] = sum;
    }
}

/// The place of each choice, and the choice at each place.
#[cube(launch)]
fn place(
    chosen: &[i32],
    counts: &[i32],
    begins: &[i32],
    places: &mut [i32],
    order: &mut [i32],
    choices: usize,
    blocks: usize,
    experts: usize,
) {
    let mut block = CUBE_POS_X as usize;
    while block < blocks {
        let first = block * comptime!(BLOCK);
        let mut expert = UNIT_POS as usize;
        while expert < experts {
            let mut at = begins[expert] + counts[block * experts + expert];
            for i in 0..comptime!(BLOCK) {
                let choice = first + i;
                if choice < choices && chosen[choice] == expert as i32 {
                    places[choice] = at;
                    order[at as usize] = choice as i32;
                    at += 1;
                }
            }
            expert += CUBE_DIM as usize;
        }
        block += CUBE_COUNT_X as usize;
    }
}

/// See [`crate::routing::route`]; `None` where the scores are not f32 on a GPU.
pub(crate) fn route(scores: &Tensor<2>, k: usize) -> Option<Routing> {
    if scores.dtype() != DType::F32 {
        return None;
    }
    let [tokens, experts] = scores.dims();
    let scores = into_contiguous(scores.clone().try_into_primitive::<CubeBackend>().ok()?);
    let choices = tokens * k;
    let blocks = choices.div_ceil(BLOCK);
    let integers = |shape: Vec<usize>| new_of(&scores, shape, DType::I32);
    let [chosen, places] = [(); 2].map(|()| integers(vec![tokens, k]));
    let (order, begins) = (integers(vec![choices]), integers(vec![experts + 1]));
    let (counted, totals) = (integers(vec![blocks, experts]), integers(vec![experts]));
    let arg = |x: &CubeTensor| x.clone().into_buffer_arg();
    let client = scores.client.clone();
    let (units, cubes) = (CubeDim::new_1d(UNITS), CubeCount::Static(blocks.min(CUBES) as u32, 1, 1));
    let one_each = |count: usize| (pointwise::cubes(count), CubeDim::new_1d(pointwise::UNITS));
    let (for_tokens, each) = one_each(tokens);
    best::launch(&client, for_tokens, each, arg(&scores), arg(&chosen), tokens, experts, k);
    counts::launch(&client, cubes.clone(), units, arg(&chosen), arg(&counted), choices, blocks, experts);
    let (for_experts, each) = one_each(experts + 1);
    before::launch(&client, for_experts.clone(), each, arg(&counted), arg(&totals), blocks, experts);
    begin::launch(&client, for_experts, each, arg(&totals), arg(&begins), experts);
    let outs = (arg(&places), arg(&order));
    place::launch(
        &client,
        cubes,
        units,
        arg(&chosen),
        arg(&counted),
        arg(&begins),
        outs.0,
        outs.1,
        choices,
        blocks,
        experts,
    );
    Some(Routing {
        experts: Tensor::from_primitive::<CubeBackend>(chosen),
        places: Tensor::from_primitive::<CubeBackend>(places),
        order: Tensor::from_primitive::<CubeBackend>(order),
        begins: Tensor::from_primitive::<CubeBackend>(begins),
    })
}

/// `out[p] = weights[order[p]] · x[order[p] / k]`, unweighted without `weighted`.
#[cube(launch)]
fn spread(
    x: &[f32],
    weights: &[f32],
    order: &[i32],
    out: &mut [f32],
    count: usize,
    width: usize,
    k: usize,
    #[comptime] weighted: bool,
) {
    let at = ABSOLUTE_POS;
    if at < count {
        let choice = order[at / width] as usize;
        let value = x[choice / k * width + at % width];
        if comptime!(weighted) {
            out[at] = weights[choice] * value;
        } else {
            out[at] = value;
        }
    }
}

/// `out[t] = Σⱼ weights[t, j] · y[places[t, j]]`, unweighted without `weighted`.
#[cube(launch)]
fn collect(
    y: &[f32],
    weights: &[f32],
    places: &[i32],
    out: &mut [f32],
    count: usize,
    width: usize,
    k: usize,
    #[comptime] weighted: bool,
) {
    let at = ABSOLUTE_POS;
    if at < count {
        let (token, column) = (at / width, at % width);
        let mut sum = 0.0f32;
        for choice in token * k..(token + 1) * k {
            let value = y[places[choice] as usize * width + column];
            if comptime!(weighted) {
                sum += weights[choice] * value;
            } else {
                sum += value;
            }
        }
        out[at] = sum;
    }
}

/// `out[t, j] = grad[t] · y[places[t, j]]`
#[cube(launch)]
fn weight_gradient(grad: &[f32], y: &[f32], places: &[i32], out: &mut [f32], choices: usize, width: usize, k: usize) {
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(UNITS as usize));
    let mut choice = CUBE_POS_X as usize;
    while choice < choices {
        let (left, right) = (choice / k * width, places[choice] as usize * width);
        let mut sum = 0.0f32;
        let mut i = UNIT_POS as usize;
        while i < width {
            sum += grad[left + i] * y[right + i];
            i += CUBE_DIM as usize;
        }
        let total = add_up(sum, &mut scratch);
        if UNIT_POS == 0 {
            out[choice] = total;
        }
        choice += CUBE_COUNT_X as usize;
    }
}

/// A kernel that moves rows: source, weights, places or choices, result; its numbers, width, k, whether it weighs.
type Mover = fn(&Client, CubeCount, CubeDim, BufferArg, BufferArg, BufferArg, BufferArg, usize, usize, usize, bool);

/// `rows` rows that `mover` makes of those of `x`, weighted if there are weights.
fn moved(
    mover: Mover,
    x: CubeTensor,
    weights: Option<CubeTensor>,
    index: CubeTensor,
    rows: usize,
    k: usize,
) -> CubeTensor {
    let (x, index) = (into_contiguous(x), into_contiguous(index));
    let [_, width] = dims::<2>(&x);
    let out = new(&x, [rows, width]);
    let (numbers, weighted) = (count(&out), weights.is_some());
    let weights = into_contiguous(weights.unwrap_or_else(|| x.clone()));
    let [x, weights, index, to] = [x, weights, index, out.clone()].map(CubeTensor::into_buffer_arg);
    let (cubes, dim) = (pointwise::cubes(numbers), CubeDim::new_1d(pointwise::UNITS));
    mover(&out.client, cubes, dim, x, weights, index, to, numbers, width, k, weighted);
    out
}

/// Rows at their places.
fn spread_rows(x: CubeTensor, weights: Option<CubeTensor>, order: CubeTensor, k: usize) -> CubeTensor {
    let choices = count(&order);
    moved(spread::launch, x, weights, order, choices, k)
}

/// Sums over each token's places.
fn collected(y: CubeTensor, weights: Option<CubeTensor>, places: CubeTensor) -> CubeTensor {
    let [tokens, k] = dims::<2>(&places);
    moved(collect::launch, y, weights, places, tokens, k)
}

impl RoutingOps for CubeBackend {
    fn spread(x: CubeTensor, order: CubeTensor, places: CubeTensor) -> CubeTensor {
        let [_, k] = dims::<2>(&places);
        spread_rows(x, None, order, k)
    }

    fn collect(y: CubeTensor, weights: CubeTensor, _: CubeTensor, places: CubeTensor) -> CubeTensor {
        collected(y, Some(weights), places)
    }
}

impl RoutingGradients for CubeBackend {
    fn spread_grad(grad: CubeTensor, places: CubeTensor) -> CubeTensor {
        collected(grad, None, places)
    }

    fn collect_grad(saved: Collected<Self>, grad: CubeTensor) -> (CubeTensor, CubeTensor) {
        let Collected { y, weights, order, places } = saved;
        let [y, places, grad] = [y, places, grad].map(into_contiguous);
        let ([_, width], [tokens, k]) = (dims::<2>(&y), dims::<2>(&places));
        let d_y = spread_rows(grad.clone(), Some(weights), order, k);
        let d_weights = new(&y, [tokens, k]);
        weight_gradient::launch(
            &d_weights.client,
            CubeCount::Static((tokens * k).min(CUBES) as u32, 1, 1),
            CubeDim::new_1d(UNITS),
            grad.into_buffer_arg(),
            y.into_buffer_arg(),
            places.into_buffer_arg(),
            d_weights.clone().into_buffer_arg(),
            tokens * k,
            width,
            k,
        );
        (d_y, d_weights)
    }
}
