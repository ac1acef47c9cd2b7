//! One training step taken apart.

mod rows;
mod timer;

use std::borrow::Cow;
use std::time::Instant;

use lowkey_kernels::device::{is_cpu, profile};
use serde::Serialize;

use super::machine::{Spread, below_ceiling};
use super::train::{Session, TrainOptions};
use super::{Observer, Progress};
use crate::error::Result;

/// What to measure.
#[derive(Clone, Debug)]
pub struct OpsOptions {
    /// The step: shape, batch, length, threads, optimiser; `steps` are the rounds in which it and its operations are timed.
    pub step: TrainOptions,
}

impl Default for OpsOptions {
    fn default() -> Self {
        Self { step: TrainOptions { steps: 8, warmup: 3, ..TrainOptions::default() } }
    }
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct OpsFigures {
    /// `ops`
    pub what: &'static str,
    /// Name of the device.
    pub device: String,
    /// Name of the shape.
    pub shape: &'static str,
    /// Sequences per step.
    pub batch: usize,
    /// Tokens per sequence.
    pub seq: usize,
    /// Threads.
    pub threads: usize,
    /// Median time of a whole step.
    pub step_ms: f64,
    /// Rate of plain matrix products on as many threads, operations per second.
    pub matmul_flops_per_s: f64,
    /// The operations, and at the end what is left of the step.
    pub ops: Vec<OpFigures>,
}

/// One operation, all its calls in a step together.
#[derive(Clone, Debug, Serialize)]
pub struct OpFigures {
    /// Its name.
    pub name: Cow<'static, str>,
    /// What it works on, the rows of all threads together.
    pub size: String,
    /// Calls per pass over the model.
    pub calls: usize,
    /// Time of the forward passes; absent where there is no backward pass to tell it from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forward_ms: Option<f64>,
    /// Time of the backward passes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backward_ms: Option<f64>,
    /// Both together.
    pub ms: f64,
    /// Work per second, in `unit`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<f64>,
    /// `GFLOP/s` for products, `GB/s` for what memory bounds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unit: Option<&'static str>,
    /// Fraction of the step's time. All of them make 1.
    pub share: f64,
}

/// Times a whole training step and each operation in it by itself.
///
/// An operation is run as the step runs it: the rows shared between the same threads, on an autodiff graph each. By itself it
/// finds its numbers in the processor's caches more often than in a step, and the additions, copies and allocations between
/// operations belong to none of them: both are in `other`, which is the step without the sum of the rows. Whole steps and
/// operations are timed in turn, so that a machine that changes its speed changes that of both.
///
/// # Errors
/// As [`train`](super::train()).
///
/// On a GPU the rows are its kernels, as they ran in whole steps, and what is left is the time in which none ran.
pub fn ops(options: &OpsOptions, observe: Observer) -> Result<OpsFigures> {
    let options = &options.step;
    let mut session = Session::new(options)?;
    if !is_cpu(&session.replica().device) {
        return kernels(options, session, observe);
    }
    let (threads, device) = (session.threads, session.replica().device.clone());
    let ((step_ms, mut ops), matmul_flops_per_s) = below_ceiling(threads, &device, options.dtype, || {
        for done in 0..options.warmup {
            observe(Progress { doing: "warm-up", done, of: options.warmup });
            let batch = session.batch();
            session.step(&batch)?;
        }
        let (mut rows, mut times) = (rows::rows(&session), Vec::new());
        for round in 0..options.steps {
            let batch = session.batch();
            let started = Instant::now();
            session.step(&batch)?;
            times.push(started.elapsed());
            let of = options.steps * rows.len();
            for (i, row) in rows.iter_mut().enumerate() {
                observe(Progress { doing: "operations", done: of / options.steps * round + i, of });
                row.round(&session);
            }
        }
        let step_ms = Spread::milliseconds(&times).median;
        Ok((step_ms, rows.into_iter().map(|row| row.figures(step_ms)).collect::<Vec<_>>()))
    })?;
    let counted: f64 = ops.iter().map(|op| op.ms).sum();
    ops.push(OpFigures::of_kernel("other".to_owned(), step_ms - counted, step_ms));
    let Session { shape, batch, seq, .. } = session;
    let device = options.device.clone();
    Ok(OpsFigures { what: "ops", device, shape: shape.name, batch, seq, threads, step_ms, matmul_flops_per_s, ops })
}

/// The kernels of a GPU's steps.
fn kernels(options: &TrainOptions, mut session: Session, observe: Observer) -> Result<OpsFigures> {
    let (threads, device) = (session.threads, session.replica().device.clone());
    let ((step_ms, kernels), matmul_flops_per_s) = below_ceiling(threads, &device, options.dtype, || {
        session.run(options.warmup, |done| observe(Progress { doing: "warm-up", done, of: options.warmup }))?;
        let (_, times) =
            session.run(options.steps, |done| observe(Progress { doing: "steps", done, of: options.steps }))?;
        let (finished, kernels) = profile(|| {
            session.run(options.steps, |done| observe(Progress { doing: "kernels", done, of: options.steps }))?;
            session.world.finish()
        });
        finished?;
        Ok((Spread::milliseconds(&times).median, kernels))
    })?;
    let steps = options.steps as f64;
    let mut ops: Vec<OpFigures> = kernels
        .into_iter()
        .map(|kernel| {
            let ms = kernel.seconds * 1e3 / steps;
            let rate = (kernel.flops > 0.0).then(|| kernel.flops / kernel.seconds / 1e9);
            let calls = kernel.launches.div_ceil(options.steps);
            OpFigures { rate, unit: rate.map(|_| "GFLOP/s"), calls, ..OpFigures::of_kernel(kernel.name, ms, step_ms) }
        })
        .collect();
    let busy: f64 = ops.iter().map(|op| op.ms).sum();
    ops.push(OpFigures::of_kernel("other".to_owned(), step_ms - busy, step_ms));
    let Session { shape, batch, seq, .. } = session;
    let device = options.device.clone();
    Ok(OpsFigures { what: "ops", device, shape: shape.name, batch, seq, threads, step_ms, matmul_flops_per_s, ops })
}

impl OpFigures {
    fn of_kernel(name: String, ms: f64, step_ms: f64) -> Self {
        Self {
            name: name.into(),
            size: String::new(),
            calls: 1,
            forward_ms: None,
            backward_ms: None,
            ms,
            rate: None,
            unit: None,
            share: ms / step_ms,
        }
    }
}
