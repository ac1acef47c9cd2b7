//! Kernels of the norm: each row of a matrix belongs to one cube.

use cubecl::prelude::*;

use crate::gpu::rows::{UNITS, add_up};

/// `factor / sqrt(mean(x²) + eps)` of the row that begins at `from`.
#[cube]
fn inverse_rms(x: &[f32], from: usize, width: usize, eps: f32, factor: f32, scratch: &mut Shared<[f32]>) -> f32 {
    let mut sum = 0.0f32;
    let mut i = UNIT_POS as usize;
    while i < width {
        let value = x[from + i];
        sum += value * value;
        i += CUBE_DIM as usize;
    }
    let mean = add_up(sum, scratch) / f32::cast_from(width);
    factor / (mean + eps).sqrt()
}

/// `factor · RMSNorm(x) · weight` of rows that are `stride` numbers apart; the result is dense.
#[cube(launch)]
pub(super) fn rms_norm<E: Float>(
    x: &[f32],
    weight: &[f32],
    out: &mut [E],
    rows: usize,
    stride: usize,
    width: usize,
    eps: f32,
    factor: f32,
) {
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(UNITS as usize));
    let mut row = CUBE_POS_X as usize;
    while row < rows {
        let from = row * stride;
        let inverse = inverse_rms(x, from, width, eps, factor, &mut scratch);
        let mut i = UNIT_POS as usize;
        while i < width {
            out[row * width + i] = E::cast_from(x[from + i] * inverse * weight[i]);
            i += CUBE_DIM as usize;
        }
        row += CUBE_COUNT_X as usize;
    }
}

#[cube]
fn reaching(grad: &[f32], more: &[f32], at: usize, #[comptime] branch: bool) -> f32 {
    let mut sum = grad[at];
    if comptime!(branch) {
        sum += more[at];
    }
    sum
}

/// The gradient of [`rms_norm`]: of x, dense, and of the weight by cube, `[cubes, width]`, to be summed. In a residual branch, what
/// reaches the norm is the sum of `grad` and `more`, and `past`, what flows past it, is added to the gradient of x; else neither is read.
#[cube(launch)]
pub(super) fn rms_norm_grad(
    x: &[f32],
    weight: &[f32],
    grad: &[f32],
    more: &[f32],
    past: &[f32],
    d_x: &mut [f32],
    d_weight: &mut [f32],
    rows: usize,
    stride: usize,
    width: usize,
    eps: f32,
    factor: f32,
    #[comptime] branch: bool,
) {
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(UNITS as usize));
    let part = CUBE_POS_X as usize * width;
    let mut i = UNIT_POS as usize;
    while i < width {
        d_weight[part + i] = 0.0;
        i += CUBE_DIM as usize;
    }
    let mut row = CUBE_POS_X as usize;
    while row < rows {
        let from = row * stride;
        let inverse = inverse_rms(x, from, width, eps, 1.0f32, &mut scratch);
        let mut sum = 0.0f32;
        let mut i = UNIT_POS as usize;
        while i < width {
            sum += reaching(grad, more, row * width + i, branch) * weight[i] * x[from + i];
            i += CUBE_DIM as usize;
        }
        // d x = f/rms · (w g − x · mean(w g x)/rms²)
        let slope = add_up(sum, &mut scratch) / f32::cast_from(width) * inverse * inverse;
        let mut i = UNIT_POS as usize;
        while i < width {
            let (value, upstream) = (x[from + i], reaching(grad, more, row * width + i, branch) * factor);
            let mut own = inverse * (upstream * weight[i] - value * slope * factor);
            if comptime!(branch) {
                own += past[row * width + i];
            }
            d_x[row * width + i] = own;
            d_weight[part + i] += upstream * value * inverse;
            i += CUBE_DIM as usize;
        }
        row += CUBE_COUNT_X as usize;
    }
}

/// Column sums of `parts [count, width]`.
#[cube(launch)]
pub(super) fn column_sums(parts: &[f32], out: &mut [f32], count: usize, width: usize) {
    let column = ABSOLUTE_POS;
    if column < width {
        let mut sum = 0.0f32;
        for part in 0..count {
            sum += parts[part * width + column];
        }
        out[column] = sum;
    }
}
