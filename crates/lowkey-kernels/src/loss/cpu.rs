//! Output head and cross entropy in one pass over blocks of tokens: the logits of one block at a time are all that exist.

use burn::backend::Flex;
use burn_flex::FlexTensor;
use pulp::{Arch, Simd};
use rayon::prelude::*;

use super::autodiff::{LossGradients, LossOps};
use crate::autodiff::Wanted;
use crate::cpu::gemm::{View, product};
use crate::cpu::tensors::{dims, integers, new, numbers, room, wanted_like};
use crate::cpu::vector::{exp_shifted, exp_shifted_with_gain, max, scale};
use crate::precision::Precision;

/// Logits that exist at a time, about: enough tokens per block that the product does not spend its time on laying out W.
const LOGITS: usize = 1 << 21;

/// Tokens per block, at least and at most.
const TOKENS: [usize; 2] = [128, 512];

/// Numbers between rows of logits: of vocabularies that are powers of two, rows would share their place in a core's first cache.
const APART: usize = 16;

/// `h [n, d]`, `weight [vocab, d]`, `targets [n]`; a negative target is no target.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub(crate) h: &'a [f32],
    pub(crate) weight: &'a [f32],
    pub(crate) targets: &'a [i32],
    /// One per token, or one for all.
    pub(crate) label_weights: &'a [f32],
    pub(crate) z_loss: f32,
    pub(crate) width: usize,
    pub(crate) precision: Precision,
}

/// What the head says of one token.
#[derive(Clone, Copy, Default)]
pub(crate) struct TokenLoss {
    /// `−log p(target)`
    pub(crate) nats: f32,
    /// Logarithm of the sum of e^logit.
    pub(crate) log_z: f32,
}

/// The sums over all tokens.
#[derive(Clone, Copy)]
pub(crate) struct Sums {
    /// `Σ weight · (nats + z_loss · log_z²)`
    pub(crate) objective: f64,
    /// The second part of it.
    pub(crate) z_loss: f64,
}

impl Inputs<'_> {
    fn vocab(self) -> usize {
        self.weight.len() / self.width
    }

    /// From one row of logits to the next.
    fn stride(self) -> usize {
        self.vocab().next_multiple_of(APART) + APART
    }

    fn block(self) -> usize {
        let [least, most] = TOKENS;
        (LOGITS / self.vocab()).clamp(least, most).min(self.targets.len()).max(1)
    }

    fn label_weight(self, token: usize) -> f32 {
        self.label_weights.get(token).or(self.label_weights.first()).copied().unwrap_or(1.0)
    }

    /// Logits of tokens `from..from+count`, `[count, vocab]` in rows as far apart as the stride.
    fn logits(self, from: usize, count: usize, logits: &mut [f32]) {
        let (d, vocab) = (self.width, self.vocab());
        let h = View::new(&self.h[from * d..], d);
        product(self.precision, [count, vocab, d], logits, self.stride(), false, h, View::new(self.weight, d).t());
    }

    /// Adds up in f64 and in order: the same for any number of threads.
    pub(crate) fn sums(self, losses: impl Iterator<Item = (usize, TokenLoss)>) -> Sums {
        let mut sums = Sums { objective: 0.0, z_loss: 0.0 };
        for (token, loss) in losses.filter(|(token, _)| self.targets[*token] >= 0) {
            let weight = f64::from(self.label_weight(token));
            let z = weight * f64::from(self.z_loss) * f64::from(loss.log_z).powi(2);
            sums.objective += weight * f64::from(loss.nats) + z;
            sums.z_loss += z;
        }
        sums
    }
}

/// Turns a row of logits into e^(logit − max); returns the loss and the sum.
#[pulp::with_simd(row_loss = Arch::new())]
#[inline(always)]
fn row_loss_with<S: Simd>(simd: S, row: &mut [f32], target: usize) -> (TokenLoss, f32) {
    let at_target = row[target];
    let highest = max(row);
    let sum = exp_shifted(simd, row, highest);
    // The target's logit first: far from 0, log_z alone has few digits left behind the point.
    (TokenLoss { nats: highest - at_target + sum.ln(), log_z: highest + sum.ln() }, sum)
}

/// Turns a row of logits into the gradient of `weight · (nats + z_loss · log_z²)`.
#[pulp::with_simd(row_gradient = Arch::new())]
#[inline(always)]
fn row_gradient_with<S: Simd>(simd: S, row: &mut [f32], target: usize, weight: f32, z_loss: f32) -> TokenLoss {
    let (found, sum) = row_loss_with(simd, &mut *row, target);
    // d nats = p − 1[target]; d log_z² = 2 log_z · p.
    scale(row, weight * (1.0 + 2.0 * z_loss * found.log_z) / sum);
    row[target] -= weight;
    found
}

/// The loss of each token, 0 without a target.
pub(crate) fn losses(inputs: Inputs) -> Vec<TokenLoss> {
    let (vocab, stride, tokens) = (inputs.vocab(), inputs.stride(), inputs.block());
    let mut losses = vec![TokenLoss::default(); inputs.targets.len()];
    let mut logits = room(tokens * stride);
    for (block, losses) in losses.chunks_mut(tokens).enumerate() {
        let from = block * tokens;
        inputs.logits(from, losses.len(), &mut logits);
        let rows = logits.par_chunks_exact_mut(stride).zip(losses.par_iter_mut()).enumerate();
        rows.for_each(|(i, (row, loss))| {
            let target = inputs.targets[from + i];
            if target >= 0 {
                *loss = row_loss(&mut row[..vocab], target as usize).0;
            }
        });
    }
    losses
}

/// Gradients of a sum over all tokens, where they are wanted.
pub(crate) struct Gradients<'a> {
    /// `[n, d]`
    pub(crate) h: Option<&'a mut [f32]>,
    /// `[vocab, d]`
    pub(crate) weight: Option<&'a mut [f32]>,
}

impl Gradients<'_> {
    fn begin(&mut self) {
        if let Some(weight) = &mut self.weight {
            weight.fill(0.0);
        }
    }

    /// Adds what tokens `from..from+count` bring, whose logits have the gradient `d_logits`, laid out as they are.
    fn add(&mut self, inputs: Inputs, d_logits: &[f32], from: usize, count: usize) {
        let (d, vocab, precision) = (inputs.width, inputs.vocab(), inputs.precision);
        let p = View::new(d_logits, inputs.stride());
        if let Some(h) = &mut self.h {
            product(precision, [count, d, vocab], &mut h[from * d..], d, false, p, View::new(inputs.weight, d));
        }
        if let Some(weight) = &mut self.weight {
            product(precision, [vocab, d, count], weight, d, true, p.t(), View::new(&inputs.h[from * d..], d));
        }
    }
}

/// The sums, and the gradients of the objective.
pub(crate) fn sums_with_gradients(inputs: Inputs, mut gradients: Gradients) -> Sums {
    let (vocab, stride, tokens) = (inputs.vocab(), inputs.stride(), inputs.block());
    let n = inputs.targets.len();
    let mut losses = vec![TokenLoss::default(); n];
    let mut logits = room(tokens * stride);
    gradients.begin();
    for (block, losses) in losses.chunks_mut(tokens).enumerate() {
        let (from, count) = (block * tokens, losses.len());
        inputs.logits(from, count, &mut logits);
        logits.par_chunks_exact_mut(stride).zip(losses.par_iter_mut()).enumerate().for_each(|(i, (row, loss))| {
            let (row, target) = (&mut row[..vocab], inputs.targets[from + i]);
            if target < 0 {
                row.fill(0.0);
                return;
            }
            let weight = inputs.label_weight(from + i);
            *loss = row_gradient(row, target as usize, weight, inputs.z_loss);
        });
        gradients.add(inputs, &logits, from, count);
    }
    inputs.sums(losses.into_iter().enumerate())
}

/// What a narrower pass is to learn from a wider one: hidden states of the wider, `[n, d]`, under the same head.
#[derive(Clone, Copy)]
pub(crate) struct Lesson<'a> {
    pub(crate) teacher: &'a [f32],
    /// How much of the loss is the distance to the teacher; the rest is the loss on the target.
    pub(crate) share: f32,
}

/// Turns a row of logits and the teacher's row into `share · KL(teacher ‖ student) + (1 − share) · nats` and its gradient, which
/// replaces the student's row.
#[pulp::with_simd(row_lesson = Arch::new())]
#[inline(always)]
fn row_lesson_with<'a, S: Simd>(
    simd: S,
    student: &'a mut [f32],
    teacher: &'a mut [f32],
    target: usize,
    share: f32,
) -> f32 {
    // Far from 0, log-partitions alone have few digits left behind the point: everything is taken from the maxima.
    let (highest, of_teacher) = (max(student), max(teacher));
    let at_target = student[target] - highest;
    let [sum_teacher, gain] = exp_shifted_with_gain(simd, (teacher, of_teacher), (student, highest));
    let sum = exp_shifted(simd, student, highest);
    let log_z = sum.ln();
    let apart = gain / sum_teacher - sum_teacher.ln() + log_z;
    let (mine, its) = (1.0 / sum, share / sum_teacher);
    for (s, t) in student.iter_mut().zip(teacher.iter()) {
        *s = *s * mine - t * its;
    }
    student[target] -= 1.0 - share;
    share * apart + (1.0 - share) * (log_z - at_target)
}

/// `Σ share · KL(teacher ‖ student) + (1 − share) · nats` over the tokens with a target, and its gradients as the student's.
pub(crate) fn lessons_with_gradients(inputs: Inputs, lesson: Lesson, mut gradients: Gradients) -> f64 {
    let (vocab, stride, tokens) = (inputs.vocab(), inputs.stride(), inputs.block());
    let mut losses = vec![0.0f32; inputs.targets.len()];
    let (mut student, mut teacher) = (room(tokens * stride), room(tokens * stride));
    gradients.begin();
    for (block, losses) in losses.chunks_mut(tokens).enumerate() {
        let (from, count) = (block * tokens, losses.len());
        inputs.logits(from, count, &mut student);
        Inputs { h: lesson.teacher, ..inputs }.logits(from, count, &mut teacher);
        let rows = student.par_chunks_exact_mut(stride).zip(teacher.par_chunks_exact_mut(stride));
        rows.zip(losses.par_iter_mut()).enumerate().for_each(|(i, ((student, teacher), loss))| {
            let (student, teacher) = (&mut student[..vocab], &mut teacher[..vocab]);
            match usize::try_from(inputs.targets[from + i]) {
                Ok(target) => *loss = row_lesson(student, teacher, target, lesson.share),
                Err(_) => student.fill(0.0),
            }
        });
        gradients.add(inputs, &student, from, count);
    }
    losses.into_iter().map(f64::from).sum()
}

fn head_gradients([h, weight]: &mut [Option<FlexTensor>; 2]) -> Gradients<'_> {
    Gradients { h: numbers(h), weight: numbers(weight) }
}

fn head_inputs<'a>(
    h: &'a FlexTensor,
    weight: &'a FlexTensor,
    targets: &'a [i32],
    label_weights: &'a [f32],
    z_loss: f64,
    precision: Precision,
) -> Inputs<'a> {
    let [_, width] = dims::<2>(h);
    let z_loss = z_loss as f32;
    Inputs { h: h.storage(), weight: weight.storage(), targets, label_weights, z_loss, width, precision }
}

fn sums_tensor(sums: Sums) -> FlexTensor {
    let mut out = new([2]);
    out.storage_mut::<f32>().copy_from_slice(&[sums.objective as f32, sums.z_loss as f32]);
    out
}

impl LossOps for Flex {
    fn cross_entropy_sum(
        h: FlexTensor,
        weight: FlexTensor,
        targets: FlexTensor,
        label_weights: FlexTensor,
        z_loss: f64,
        precision: Precision,
    ) -> FlexTensor {
        let (h, weight, label_weights) = (h.to_contiguous(), weight.to_contiguous(), label_weights.to_contiguous());
        let targets = &integers(&targets);
        let inputs = head_inputs(&h, &weight, targets, label_weights.storage(), z_loss, precision);
        sums_tensor(inputs.sums(losses(inputs).into_iter().enumerate()))
    }

    fn cross_entropy_each(h: FlexTensor, weight: FlexTensor, targets: FlexTensor, precision: Precision) -> FlexTensor {
        let (h, weight) = (h.to_contiguous(), weight.to_contiguous());
        let targets = &integers(&targets);
        let mut out = new([targets.len()]);
        let losses = losses(head_inputs(&h, &weight, targets, &[], 0.0, precision));
        out.storage_mut::<f32>().iter_mut().zip(losses).for_each(|(out, loss)| *out = loss.nats);
        out
    }

    fn distill_sum(
        h: FlexTensor,
        weight: FlexTensor,
        teacher: FlexTensor,
        targets: FlexTensor,
        share: f64,
        precision: Precision,
    ) -> FlexTensor {
        // Only where nothing is trained, which is no case to be fast in.
        Self::distill_sum_saving(h, weight, teacher, targets, share, precision, [false; 2]).0
    }

    fn with_gradients(_: FlexTensor, _: FlexTensor, sum: FlexTensor, _: FlexTensor, _: FlexTensor) -> FlexTensor {
        sum
    }
}

/// Numbers that a thread scales at a time.
const SHARE: usize = 1 << 16;

impl LossGradients for Flex {
    fn cross_entropy_sum_saving(
        h: FlexTensor,
        weight: FlexTensor,
        targets: FlexTensor,
        label_weights: FlexTensor,
        z_loss: f64,
        precision: Precision,
        wanted: Wanted<2>,
    ) -> (FlexTensor, [Option<FlexTensor>; 2]) {
        let (h, weight, label_weights) = (h.to_contiguous(), weight.to_contiguous(), label_weights.to_contiguous());
        let targets = &integers(&targets);
        let inputs = head_inputs(&h, &weight, targets, label_weights.storage(), z_loss, precision);
        let mut gradients = wanted_like([&h, &weight], wanted);
        let sums = sums_with_gradients(inputs, head_gradients(&mut gradients));
        (sums_tensor(sums), gradients)
    }

    fn distill_sum_saving(
        h: FlexTensor,
        weight: FlexTensor,
        teacher: FlexTensor,
        targets: FlexTensor,
        share: f64,
        precision: Precision,
        wanted: Wanted<2>,
    ) -> (FlexTensor, [Option<FlexTensor>; 2]) {
        let (h, weight, teacher) = (h.to_contiguous(), weight.to_contiguous(), teacher.to_contiguous());
        let targets = &integers(&targets);
        let inputs = head_inputs(&h, &weight, targets, &[], 0.0, precision);
        let lesson = Lesson { teacher: teacher.storage(), share: share as f32 };
        let (mut gradients, mut out) = (wanted_like([&h, &weight], wanted), new([1]));
        let sum = lessons_with_gradients(inputs, lesson, head_gradients(&mut gradients));
        out.storage_mut::<f32>()[0] = sum as f32;
        (out, gradients)
    }

    fn times(gradient: FlexTensor, factor: FlexTensor) -> FlexTensor {
        let (mut gradient, factor) = (gradient.to_contiguous(), factor.to_contiguous().storage::<f32>()[0]);
        gradient.storage_mut::<f32>().par_chunks_mut(SHARE).for_each(|numbers| scale(numbers, factor));
        gradient
    }
}
