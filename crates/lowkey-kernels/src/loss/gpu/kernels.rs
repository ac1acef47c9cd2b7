//! Kernels of the losses: each row of logits belongs to one cube.

use cubecl::prelude::*;

use crate::gpu::rows::{UNITS, add_up, largest};

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
