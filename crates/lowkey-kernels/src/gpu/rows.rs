//! Kernels that give each row of a matrix to one cube: norms, losses, sums.

use cubecl::prelude::*;

/// Units of a cube that works on a row.
pub(super) const UNITS: u32 = 128;

/// Most cubes in one direction: what every graphics API takes. In tests so few that all kernels go round their loops.
pub(super) const CUBES: usize = if cfg!(test) { 7 } else { 65_535 };

/// The sum of one number from each unit, for all of them.
#[cube]
pub(super) fn add_up(value: f32, scratch: &mut Shared<[f32]>) -> f32 {
    let unit = UNIT_POS as usize;
    scratch[unit] = value;
    sync_cube();
    let mut step = CUBE_DIM / 2;
    while step > 0 {
        if UNIT_POS < step {
            let other = scratch[unit + step as usize];
            scratch[unit] += other;
        }
        sync_cube();
        step /= 2;
    }
    let total = scratch[0];
    sync_cube();
    total
}

/// The largest of one number from each unit, for all of them; a number that is none does not count.
#[cube]
pub(super) fn largest(value: f32, scratch: &mut Shared<[f32]>) -> f32 {
    let unit = UNIT_POS as usize;
    scratch[unit] = value;
    sync_cube();
    let mut step = CUBE_DIM / 2;
    while step > 0 {
        if UNIT_POS < step {
            let other = scratch[unit + step as usize];
            if other > scratch[unit] {
                scratch[unit] = other;
            }
        }
        sync_cube();
        step /= 2;
    }
    let highest = scratch[0];
    sync_cube();
    highest
}

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

/// Sums the gradients of a token's places, `grad [tokens, width]`, into its row of `out`, which is 0 before.
///
/// A cube goes to each place, and works if it is the first of its token: it looks through all ids for the others. That is a number of
/// comparisons that grows with the square of the tokens, but they are integers from a cache, and neither a sort nor an atomic
/// addition is needed: a repetition gives the same bits.
#[cube(launch)]
pub(super) fn embed_grad(ids: &[i32], grad: &[f32], out: &mut [f32], tokens: usize, width: usize) {
    let unit = UNIT_POS as usize;
    let mut same = Shared::<[u32]>::new_slice(comptime!(UNITS as usize));
    let mut earlier = Shared::<[u32]>::new_slice(1usize);
    let mut place = CUBE_POS_X as usize;
    while place < tokens {
        let id = ids[place];
        if unit == 0 {
            earlier[0] = 0;
        }
        sync_cube();
        let mut i = unit;
        while i < place {
            if ids[i] == id {
                // Whoever writes writes the same.
                earlier[0] = 1;
            }
            i += CUBE_DIM as usize;
        }
        sync_cube();
        if earlier[0] == 0 {
            let row = id as usize * width;
            let mut first = place;
            while first < tokens {
                same[unit] = 0;
                if first + unit < tokens && ids[first + unit] == id {
                    same[unit] = 1;
                }
                sync_cube();
                for other in 0..CUBE_DIM as usize {
                    if same[other] == 1 {
                        let from = (first + other) * width;
                        let mut column = unit;
                        while column < width {
                            out[row + column] += grad[from + column];
                            column += CUBE_DIM as usize;
                        }
                    }
                }
                sync_cube();
                first += CUBE_DIM as usize;
            }
        }
        sync_cube();
        place += CUBE_COUNT_X as usize;
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

/// `Σ x²` of several tensors, a row of cubes for each and a part by each cube, written from `at` on.
#[cube(launch)]
pub(super) fn sums_of_squares(tensors: &Sequence<Box<[f32]>>, counts: &Sequence<usize>, out: &mut [f32], at: usize) {
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(UNITS as usize));
    let mut sum = 0.0f32;
    #[unroll]
    for tensor in 0..tensors.len() {
        if CUBE_POS_Y as usize == tensor {
            let x = tensors.index(tensor);
            let count = *counts.index(tensor);
            let mut i = (CUBE_POS_X * CUBE_DIM + UNIT_POS) as usize;
            while i < count {
                sum += x[i] * x[i];
                i += (CUBE_DIM * CUBE_COUNT_X) as usize;
            }
        }
    }
    let total = add_up(sum, &mut scratch);
    if UNIT_POS == 0 {
        out[at + (CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X) as usize] = total;
    }
}

/// The log-sum-exp of a row of logits.
#[cube]
fn log_partition(logits: &[f32], from: usize, vocab: usize, scratch: &mut Shared<[f32]>) -> f32 {
    // One pass over the row: each unit's own maximum so far is what its sum refers to.
    let mut own = logits[from];
    let mut sum = 0.0f32;
    let mut i = UNIT_POS as usize;
    while i < vocab {
        let x = logits[from + i];
        if x > own {
            sum *= (own - x).exp();
            own = x;
        }
        sum += (x - own).exp();
        i += CUBE_DIM as usize;
    }
    let highest = largest(own, scratch);
    highest + add_up(sum * (own - highest).exp(), scratch).ln()
}

/// Cross entropy of rows of logits `[rows, vocab]`: `losses [rows, 2]` are the whole and the part that is z-loss, `slopes [rows, vocab]`
/// the gradient if asked for. Weights are one for each row, or one for all.
#[cube(launch)]
pub(super) fn cross_entropy<E: Float>(
    logits: &[f32],
    targets: &[i32],
    weights: &[f32],
    losses: &mut [f32],
    slopes: &mut [E],
    rows: usize,
    vocab: usize,
    z_loss: f32,
    #[comptime] gradients: bool,
) {
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(UNITS as usize));
    let mut row = CUBE_POS_X as usize;
    while row < rows {
        let from = row * vocab;
        let log_z = log_partition(logits, from, vocab, &mut scratch);
        let target = targets[row];
        let mut weight = weights[0];
        if weights.len() > 1 {
            weight = weights[row];
        }
        let mut at = 0usize;
        if target >= 0 {
            at = target as usize;
        }
        let picked = logits[from + at];
        if UNIT_POS == 0 {
            let mut loss = 0.0f32;
            let mut of_z = 0.0f32;
            if target >= 0 {
                of_z = weight * z_loss * log_z * log_z;
                loss = weight * (log_z - picked) + of_z;
            }
            losses[row * 2] = loss;
            losses[row * 2 + 1] = of_z;
        }
        if comptime!(gradients) {
            let on_p = weight * (1.0f32 + 2.0f32 * z_loss * log_z);
            let mut i = UNIT_POS as usize;
            while i < vocab {
                let mut slope = 0.0f32;
                if target >= 0 {
                    slope = on_p * (logits[from + i] - log_z).exp();
                    if i == at {
                        slope -= weight;
                    }
                }
                slopes[from + i] = E::cast_from(slope);
                i += CUBE_DIM as usize;
            }
        }
        row += CUBE_COUNT_X as usize;
    }
}

/// `share · KL(p ‖ q) + (1 − share) · nats` of rows of logits, with p of the teacher, and the gradient of the pupil's logits.
#[cube(launch)]
pub(super) fn distill<E: Float>(
    logits: &[f32],
    teacher: &[f32],
    targets: &[i32],
    losses: &mut [f32],
    slopes: &mut [E],
    rows: usize,
    vocab: usize,
    share: f32,
) {
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(UNITS as usize));
    let mut row = CUBE_POS_X as usize;
    while row < rows {
        let from = row * vocab;
        let log_q = log_partition(logits, from, vocab, &mut scratch);
        let log_p = log_partition(teacher, from, vocab, &mut scratch);
        let target = targets[row];
        let mut at = 0usize;
        if target >= 0 {
            at = target as usize;
        }
        let picked = logits[from + at] - log_q;
        let mut apart = 0.0f32;
        let mut i = UNIT_POS as usize;
        while i < vocab {
            let of_q = logits[from + i] - log_q;
            let of_p = teacher[from + i] - log_p;
            let p = of_p.exp();
            apart += p * (of_p - of_q);
            let mut slope = 0.0f32;
            if target >= 0 {
                slope = of_q.exp() - share * p;
                if i == at {
                    slope -= 1.0f32 - share;
                }
            }
            slopes[from + i] = E::cast_from(slope);
            i += CUBE_DIM as usize;
        }
        let apart = add_up(apart, &mut scratch);
        if UNIT_POS == 0 {
            let mut loss = 0.0f32;
            if target >= 0 {
                loss = share * apart - (1.0f32 - share) * picked;
            }
            losses[row] = loss;
        }
        row += CUBE_COUNT_X as usize;
    }
}
