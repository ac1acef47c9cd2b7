//! A mixture's routing on the CPU: rows copied, and added up, on the current pool.

use burn::backend::Flex;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::autodiff::{Collected, RoutingGradients, RoutingOps};
use crate::cpu::tensors::{dims, integers, new};

/// Rows from where they are to where they go: `out[i] = factor(i) · x[from(i)]`.
fn rows(x: &FlexTensor, count: usize, row: impl Fn(usize) -> (usize, f32) + Sync) -> FlexTensor {
    let x = x.to_contiguous();
    let [_, width] = dims::<2>(&x);
    let mut out = new([count, width]);
    let x: &[f32] = x.storage();
    out.storage_mut::<f32>().par_chunks_exact_mut(width.max(1)).enumerate().for_each(|(i, out)| {
        let (from, factor) = row(i);
        out.iter_mut().zip(&x[from * width..]).for_each(|(out, x)| *out = factor * x);
    });
    out
}

/// `out[t] = Σⱼ weight(t·k + j) · y[places[t, j]]`
fn sums(y: &FlexTensor, places: &FlexTensor, weight: impl Fn(usize) -> f32 + Sync) -> FlexTensor {
    let ([tokens, k], y) = (dims::<2>(places), y.to_contiguous());
    let [_, width] = dims::<2>(&y);
    let (places, y): (_, &[f32]) = (integers(places), y.storage());
    let mut out = new([tokens, width]);
    out.storage_mut::<f32>().par_chunks_exact_mut(width.max(1)).enumerate().for_each(|(t, out)| {
        out.fill(0.0);
        for (j, place) in places[t * k..(t + 1) * k].iter().enumerate() {
            let (from, weight) = (*place as usize * width, weight(t * k + j));
            out.iter_mut().zip(&y[from..]).for_each(|(out, y)| *out += weight * y);
        }
    });
    out
}

impl RoutingOps for Flex {
    fn spread(x: FlexTensor, order: FlexTensor, places: FlexTensor) -> FlexTensor {
        let ([_, k], order) = (dims::<2>(&places), integers(&order));
        rows(&x, order.len(), |place| (order[place] as usize / k, 1.0))
    }

    fn collect(y: FlexTensor, weights: FlexTensor, _: FlexTensor, places: FlexTensor) -> FlexTensor {
        let weights = weights.to_contiguous();
        let weights: &[f32] = weights.storage();
        sums(&y, &places, |choice| weights[choice])
    }
}

impl RoutingGradients for Flex {
    fn spread_grad(grad: FlexTensor, places: FlexTensor) -> FlexTensor {
        sums(&grad, &places, |_| 1.0)
    }

    fn collect_grad(saved: Collected<Self>, grad: FlexTensor) -> (FlexTensor, FlexTensor) {
        let Collected { y, weights, order, places } = saved;
        let (y, weights, grad) = (y.to_contiguous(), weights.to_contiguous(), grad.to_contiguous());
        let ([tokens, k], [_, width]) = (dims::<2>(&places), dims::<2>(&y));
        let (order, places) = (integers(&order), integers(&places));
        let (factors, rows_of_y, upstream): (&[f32], &[f32], &[f32]) = (weights.storage(), y.storage(), grad.storage());
        let d_y = rows(&grad, order.len(), |place| (order[place] as usize / k, factors[order[place] as usize]));
        let mut d_weights = new([tokens, k]);
        d_weights.storage_mut::<f32>().par_iter_mut().enumerate().for_each(|(choice, out)| {
            let (t, from) = (choice / k, places[choice] as usize * width);
            *out = upstream[t * width..(t + 1) * width].iter().zip(&rows_of_y[from..]).map(|(a, b)| a * b).sum();
        });
        (d_y, d_weights)
    }
}
