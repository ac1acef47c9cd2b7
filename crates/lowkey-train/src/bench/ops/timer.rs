//! How one operation is timed.

use std::time::{Duration, Instant};

use burn::tensor::{Device, Distribution, Tensor};
use lowkey_kernels::precision::scope;

use super::super::machine::Spread;
use super::super::train::Session;
use super::OpFigures;

/// For how long an operation is repeated in a round.
const LONG_ENOUGH: Duration = Duration::from_millis(20);
/// How often at least.
const OFTEN_ENOUGH: usize = 2;

/// What one call works on, over all rows of a step.
#[derive(Clone, Copy)]
pub(super) struct Work {
    amount: f64,
    unit: &'static str,
}

impl Work {
    /// Floating-point operations of the forward pass; the backward pass has twice as many, by convention: one that computes
    /// something again does more.
    pub(super) fn products(forward: f64) -> Self {
        Self { amount: 3.0 * forward, unit: "GFLOP/s" }
    }

    /// Numbers (f32) that cannot but be read or written, both passes together.
    pub(super) fn numbers(numbers: usize) -> Self {
        Self { amount: 4.0 * numbers as f64, unit: "GB/s" }
    }
}

/// One line of the table.
pub(super) struct Row {
    pub(super) name: &'static str,
    pub(super) size: String,
    /// Per pass over the model.
    pub(super) calls: usize,
    pub(super) work: Work,
    pub(super) run: Run,
    /// Of each round.
    pub(super) times: Vec<Times>,
}

/// Median times of one call, milliseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    forward: f64,
    backward: f64,
}

/// What a row runs.
pub(super) enum Run {
    /// A differentiable operation, on each thread's share of the rows at once.
    Shared(Box<dyn Fn(&Lane) -> Times + Send + Sync>),
    /// Something that the step does once, on all threads together; it has no backward pass.
    Once(Box<dyn FnMut() + Send>),
}

impl Row {
    /// Times it once more.
    pub(super) fn round(&mut self, session: &Session) {
        let times = match &mut self.run {
            Run::Shared(job) => {
                let lanes: Vec<Lane> =
                    session.replica().workers.shares(session.batch, 1).into_iter().map(Lane::from).collect();
                let times = session.replica().workers.map(&lanes, |lane| {
                    let _scope = scope(session.precision);
                    job(lane)
                });
                // The step waits for the slowest.
                let slowest = |part: fn(&Times) -> f64| times.iter().map(part).fold(0.0, f64::max);
                Times { forward: slowest(|t| t.forward), backward: slowest(|t| t.backward) }
            }
            Run::Once(job) => Times { forward: session.replica().workers.together(|| repeat(job)), backward: 0.0 },
        };
        self.times.push(times);
    }

    /// What all rounds together say, as a part of a step of `step_ms`.
    pub(super) fn figures(self, step_ms: f64) -> OpFigures {
        let calls = self.calls as f64;
        let median = |part: fn(&Times) -> f64| Spread::of(self.times.iter().map(part).collect()).median * calls;
        let (forward, backward) = (median(|t| t.forward), median(|t| t.backward));
        let (ms, shared) = (forward + backward, matches!(self.run, Run::Shared(_)));
        OpFigures {
            name: self.name.into(),
            size: self.size,
            calls: self.calls,
            forward_ms: shared.then_some(forward),
            backward_ms: shared.then_some(backward),
            ms,
            // A clock may say that an operation on few numbers takes no time.
            rate: (ms > 0.0).then(|| calls * self.work.amount / ms / 1e6),
            unit: (ms > 0.0).then_some(self.work.unit),
            share: ms / step_ms,
        }
    }
}

/// Rows of one thread.
pub(super) struct Lane {
    /// How many.
    pub(super) rows: usize,
    device: Device,
}

impl From<(usize, usize)> for Lane {
    fn from((first, end): (usize, usize)) -> Self {
        Self { rows: end - first, device: super::super::device() }
    }
}

/// A parameter or an activation that a gradient is wanted for.
pub(super) fn leaf<const D: usize>(tensor: &Tensor<D>) -> Tensor<D> {
    tensor.clone().autodiff().require_grad()
}

impl Lane {
    /// Random numbers, without a graph.
    pub(super) fn random<const D: usize>(&self, shape: [usize; D]) -> Tensor<D> {
        Tensor::random(shape, Distribution::Uniform(-1.0, 1.0), &self.device)
    }

    /// Times `forward`, which must begin with fresh leaves, and the backward pass from its result.
    ///
    /// Burn begins a backward pass with a tensor of ones. Within a step the gradient comes from the operation behind instead, so
    /// what the ones take, alone, is taken off.
    pub(super) fn time<const D: usize>(&self, forward: impl Fn() -> Tensor<D>) -> Times {
        let (mut forwards, mut backwards, mut ones) = (Vec::new(), Vec::new(), Vec::new());
        let plain: Tensor<D> = forward().without_autodiff();
        let started = Instant::now();
        while forwards.len() < OFTEN_ENOUGH || started.elapsed() < LONG_ENOUGH {
            let at = Instant::now();
            let result = forward();
            forwards.push(at.elapsed());
            let at = Instant::now();
            drop(result.backward());
            backwards.push(at.elapsed());
            let result = leaf(&plain);
            let at = Instant::now();
            drop(result.backward());
            ones.push(at.elapsed());
        }
        let median = |times: &[Duration]| Spread::milliseconds(times).median;
        Times { forward: median(&forwards), backward: (median(&backwards) - median(&ones)).max(0.0) }
    }
}

/// Median time of a job, milliseconds.
fn repeat(job: &mut dyn FnMut()) -> f64 {
    let mut times = Vec::new();
    let started = Instant::now();
    while times.len() < OFTEN_ENOUGH || started.elapsed() < LONG_ENOUGH {
        let at = Instant::now();
        job();
        times.push(at.elapsed());
    }
    Spread::milliseconds(&times).median
}
