//! One training step taken apart.

mod rows;
mod timer;

use lowkey_kernels::Precision;
use lowkey_kernels::device::is_cpu;
use serde::Serialize;

use super::machine::{Spread, below_ceiling};
use super::train::{Session, TrainOptions};
use super::{Observer, Progress};
use crate::error::{Error, Result};

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
    pub name: &'static str,
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
pub fn ops(options: &OpsOptions, observe: Observer) -> Result<OpsFigures> {
    let options = &options.step;
    let mut session = Session::new(options)?;
    if !is_cpu(&session.device) {
        return Err(Error::config(
            "device",
            &options.device,
            "operations are timed one by one on the CPU alone; write cpu",
        ));
    }
    let (threads, device) = (session.threads, session.device.clone());
    let ((step_ms, mut ops), matmul_flops_per_s) = below_ceiling(threads, &device, Precision::F32, || {
        for done in 0..options.warmup {
            observe(Progress { doing: "warm-up", done, of: options.warmup });
            session.step()?;
        }
        let (mut rows, mut times) = (rows::rows(&session), Vec::new());
        for round in 0..options.steps {
            let (_, time) = session.step()?;
            times.push(time);
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
    ops.push(OpFigures {
        name: "other",
        size: String::new(),
        calls: 1,
        forward_ms: None,
        backward_ms: None,
        ms: step_ms - counted,
        rate: None,
        unit: None,
        share: 1.0 - ops.iter().map(|op| op.share).sum::<f64>(),
    });
    let Session { shape, batch, seq, .. } = session;
    Ok(OpsFigures { what: "ops", shape: shape.name, batch, seq, threads, step_ms, matmul_flops_per_s, ops })
}
