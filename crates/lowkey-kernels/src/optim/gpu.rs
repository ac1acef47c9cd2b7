//! The passes over whole parameters on GPUs.

mod judge;
mod kernels;

use std::sync::{Mutex, PoisonError};

use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, FloatDType, Shape, Tensor};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};
use cubecl::client::Client;
use cubecl::prelude::{CubeCount, CubeDim, SequenceArg};

use super::judgement::{Gate, NUMBERS, Terms, Wait};
use super::reference;
use super::steps::{AdamWStep, MuonStep};
use crate::gpu::product::{operand, product};
use crate::gpu::tensors::{count, new};
use crate::gpu::{pointwise, rows};

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

/// The numbers of a gate; of an open one where there is none.
fn numbers(gate: Option<&Gate>, like: &CubeTensor) -> CubeTensor {
    let given = gate.and_then(|gate| on_gpu([&gate.numbers])).map(|[gate]| gate);
    given.unwrap_or_else(|| {
        let one = || Shape::from(vec![1]);
        let factor = CubeBackend::float_ones(one(), &like.device, FloatDType::F32);
        CubeBackend::float_cat(vec![factor, CubeBackend::float_zeros(one(), &like.device, FloatDType::F32)], 0)
    })
}

/// Tensors that a kernel over many takes at once: `each` of them take so many bindings, beside `others`.
fn at_once(like: &CubeTensor, each: usize, others: usize) -> usize {
    const MOST: usize = 16;
    let bindings = like.client.properties().hardware.max_bindings as usize;
    (bindings.saturating_sub(others) / each).clamp(1, MOST)
}

/// Cubes that go over the numbers of a tensor, at most: each takes several where there are more.
const SWEEP: usize = if cfg!(test) { 2 } else { 2048 };

/// One step of AdamW of each, in place; the tensors back where one is not on a GPU.
#[allow(clippy::type_complexity, reason = "what comes back is what went in")]
pub(crate) fn adamw(
    all: Vec<([Tensor<1>; 4], AdamWStep)>,
    gate: Option<&Gate>,
) -> Result<Vec<[Tensor<1>; 3]>, Vec<([Tensor<1>; 4], AdamWStep)>> {
    let handles = all.iter().map(|(tensors, _)| on_gpu(tensors.each_ref())).collect::<Option<Vec<_>>>();
    let Some(handles) = handles.filter(|handles| !handles.is_empty()) else { return Err(all) };
    let steps: Vec<AdamWStep> = all.into_iter().map(|(_, step)| step).collect();
    let owned = |[value, gradient, m, v]: [CubeTensor; 4]| ([value, m, v].map(own), gradient);
    let tensors: Vec<([CubeTensor; 3], CubeTensor)> = handles.into_iter().map(owned).collect();
    let numbers = numbers(gate, &tensors[0].1);
    let most = at_once(&numbers, 4, 2);
    // Those whose step has the same numbers can share a launch.
    let mut left: Vec<usize> = (0..steps.len()).collect();
    while let Some(first) = left.first().copied() {
        let alike: Vec<usize> = left.iter().copied().filter(|i| steps[*i] == steps[first]).take(most).collect();
        left.retain(|i| !alike.contains(i));
        launch_adamw(&alike.iter().map(|i| &tensors[*i]).collect::<Vec<_>>(), steps[first], &numbers);
    }
    Ok(tensors.into_iter().map(|(state, _)| state.map(Tensor::from_primitive::<CubeBackend>)).collect())
}

fn launch_adamw(tensors: &[&([CubeTensor; 3], CubeTensor)], step: AdamWStep, gate: &CubeTensor) {
    let AdamWStep { clip, lr, betas: [beta1, beta2], eps, weight_decay, .. } = step;
    let (correction1, correction2) = step.corrections();
    let longest = tensors.iter().map(|(_, gradient)| count(gradient)).max().unwrap_or_default();
    let cubes = longest.div_ceil(pointwise::UNITS as usize).clamp(1, SWEEP);
    let states = |i: usize| -> SequenceArg<Box<[f32]>> {
        tensors.iter().map(|(state, _)| state[i].clone().into_buffer_arg()).collect()
    };
    kernels::adamw::launch(
        &gate.client,
        CubeCount::Static(cubes as u32, tensors.len() as u32, 1),
        CubeDim::new_1d(pointwise::UNITS),
        states(0),
        tensors.iter().map(|(_, gradient)| gradient.clone().into_buffer_arg()).collect(),
        states(1),
        states(2),
        tensors.iter().map(|(_, gradient)| count(gradient)).collect(),
        gate.clone().into_buffer_arg(),
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
}

/// One step of Muon in place; the tensors back where they are not on a GPU.
pub(crate) fn muon(
    tensors: [Tensor<1>; 3],
    width: usize,
    heights: &[usize],
    step: MuonStep,
    gate: Option<&Gate>,
) -> Result<[Tensor<1>; 2], Box<[Tensor<1>; 3]>> {
    let Some(handles) = on_gpu(tensors.each_ref()) else { return Err(Box::new(tensors)) };
    drop(tensors);
    let [value, gradient, buffer] = handles;
    let [value, buffer] = [value, buffer].map(own);
    let MuonStep { clip, lr, momentum, weight_decay, precision } = step;
    let gate = numbers(gate, &value);
    let ahead = new(&value, [count(&value)]);
    kernels::momentum::launch(
        &value.client,
        pointwise::cubes(count(&value)),
        CubeDim::new_1d(pointwise::UNITS),
        gradient.into_buffer_arg(),
        buffer.clone().into_buffer_arg(),
        ahead.clone().into_buffer_arg(),
        gate.clone().into_buffer_arg(),
        count(&value),
        clip as f32,
        momentum as f32,
    );
    let ahead = Tensor::<1>::from_primitive::<CubeBackend>(ahead);
    let times = |a: Tensor<2>, b: Tensor<2>| match (
        a.try_into_primitive::<CubeBackend>(),
        b.try_into_primitive::<CubeBackend>(),
    ) {
        (Ok(a), Ok(b)) => {
            let [a, b] = [a, b].map(|x| operand(x, precision));
            Tensor::from_primitive::<CubeBackend>(product(a, b, precision))
        }
        _ => unreachable!("both come from tensors of this device"),
    };
    let mut from = 0;
    for &height in heights {
        let block = ahead.clone().narrow(0, from, height * width).reshape([height, width]);
        let update = reference::orthogonalise(block, &times).reshape([height * width]);
        let Some([update]) = on_gpu([&update]) else { unreachable!("it was computed on this device") };
        kernels::descend::launch(
            &value.client,
            pointwise::cubes(height * width),
            CubeDim::new_1d(pointwise::UNITS),
            value.clone().into_buffer_arg(),
            update.into_buffer_arg(),
            gate.clone().into_buffer_arg(),
            height * width,
            from,
            (1.0 - lr * weight_decay) as f32,
            (lr * MuonStep::scale(height, width)) as f32,
        );
        from += height * width;
    }
    Ok([value, buffer].map(Tensor::from_primitive::<CubeBackend>))
}

/// Cubes that each add up a part of a tensor; the judge reads one part with each unit.
const PARTS: usize = rows::UNITS as usize;

/// `Σ x²` of each tensor in parts, `[tensors, PARTS]`; `None` where a tensor is not on a GPU.
fn squares(tensors: &[Tensor<1>]) -> Option<CubeTensor> {
    let all = tensors.iter().map(|x| on_gpu([x]).map(|[x]| x)).collect::<Option<Vec<_>>>()?;
    let out = new(all.first()?, [all.len(), PARTS]);
    let most = at_once(&out, 1, 2);
    for (i, some) in all.chunks(most).enumerate() {
        kernels::sums_of_squares::launch(
            &out.client,
            CubeCount::Static(PARTS as u32, some.len() as u32, 1),
            CubeDim::new_1d(rows::UNITS),
            some.iter().map(|x| x.clone().into_buffer_arg()).collect(),
            some.iter().map(count).collect(),
            out.clone().into_buffer_arg(),
            i * most * PARTS,
        );
    }
    Some(out)
}

/// `Σ x²` of each tensor: parts on the device in f32, their sums here in f64; `None` where a tensor is not on a GPU. NaN where the
/// device does not answer.
pub(crate) fn sums_of_squares(tensors: &[Tensor<1>]) -> Option<Vec<f64>> {
    let parts = Tensor::<2>::from_primitive::<CubeBackend>(squares(tensors)?);
    let sums = match parts.try_into_vec_as::<f32>() {
        Ok(parts) => parts.chunks(PARTS).map(|parts| parts.iter().copied().map(f64::from).sum()).collect(),
        Err(_) => vec![f64::NAN; tensors.len()],
    };
    Some(sums)
}

/// The client of a tensor's device, for the life of the process: what is being read borrows it for as long as it is waited for.
fn kept_client(like: &CubeTensor) -> &'static Client {
    static CLIENTS: Mutex<Vec<(CubeDevice, &'static Client)>> = Mutex::new(Vec::new());
    let mut clients = CLIENTS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, client)) = clients.iter().find(|(device, _)| *device == like.device) {
        return client;
    }
    let client: &'static Client = Box::leak(Box::new(like.client.clone()));
    clients.push((like.device.clone(), client));
    client
}

/// Queues a judgement, see [`Gate::of`].
pub(crate) fn judge(
    losses: &Tensor<1>,
    gradients: &[Tensor<1>],
    terms: Terms,
    before: Option<&Tensor<1>>,
) -> Option<Tensor<1>> {
    let parts = squares(gradients)?;
    let [losses] = on_gpu([losses])?;
    let before = match before {
        Some(before) => on_gpu([before]).map(|[before]| before)?,
        None => CubeBackend::float_zeros(Shape::from(vec![NUMBERS]), &parts.device, FloatDType::F32),
    };
    let out = new(&parts, [NUMBERS]);
    let passes = count(&losses);
    judge::judge::launch(
        &out.client,
        CubeCount::Static(1, 1, 1),
        CubeDim::new_1d(rows::UNITS),
        parts.into_buffer_arg(),
        losses.into_buffer_arg(),
        before.into_buffer_arg(),
        out.clone().into_buffer_arg(),
        gradients.len(),
        passes,
        terms.mean as f32,
        terms.scale as f32,
        terms.limit.unwrap_or(-1.0) as f32,
    );
    Some(Tensor::from_primitive::<CubeBackend>(out))
}

/// Queues the reading of a gate's numbers, and of those `beside` them.
pub(crate) fn ask(numbers: &Tensor<1>, beside: Vec<Tensor<1>>) -> Option<Wait> {
    // One after the other, to be read at once.
    let all = match beside.is_empty() {
        true => numbers.clone(),
        false => Tensor::cat([vec![numbers.clone()], beside].concat(), 0),
    };
    let [numbers] = on_gpu([&all])?;
    // The copy is queued here, not when it is waited for.
    let reading = kept_client(&numbers).read_async(vec![numbers.handle.clone()]);
    Some(Box::new(move || {
        let bytes = cubecl::future::block_on(reading).map_err(|e| e.to_string())?;
        let numbers: Vec<f32> = bytes
            .iter()
            .flat_map(|bytes| bytes.chunks_exact(4))
            .filter_map(|number| number.first_chunk::<4>().map(|number| f32::from_le_bytes(*number)))
            .collect();
        let split = numbers.split_first_chunk::<NUMBERS>();
        let (gate, beside) = split.ok_or_else(|| "it returns fewer numbers than were asked for".to_owned())?;
        Ok((*gate, beside.to_vec()))
    }))
}
