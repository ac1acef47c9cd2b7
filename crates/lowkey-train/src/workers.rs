//! One optimiser step's gradients, with the rows of a batch shared between threads.
//!
//! Each thread runs its own autodiff graph on a fork of the model inside its own thread pool, so that no lock and no node
//! is shared; gradients are summed in the order of the rows. For a given number of threads the result is bit-identical.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use lowkey_batch::Batch;
use lowkey_kernels::device::is_cpu;
use lowkey_kernels::{Precision, linear, optim, precision::scope};
use lowkey_model::{
    CausalLm, Recompute,
    adapter::Draws,
    objective::{EmbeddingNoise, Figures, Learnt, Objective, Term},
};
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::other_model::{Counterpart, Said};
use crate::ranks::{Packed, Ranks};
use crate::run_config::RunConfig;

/// Thread pools among which rows are shared.
#[derive(Debug)]
pub struct Workers {
    pools: Vec<rayon::ThreadPool>,
    /// All threads together, where they are not one pool already.
    all: Option<rayon::ThreadPool>,
    /// The processes that share what is measured.
    ranks: Ranks,
}

/// How a step's gradients are computed.
#[derive(Clone, Copy, Debug)]
pub struct PassSettings<'a> {
    /// Rows per forward and backward pass.
    pub micro_batch: usize,
    /// What the backward pass computes again.
    pub recompute: Recompute,
    /// What is minimised.
    pub terms: &'a [Term],
    /// What products with weights are computed in, on a GPU.
    pub precision: Precision,
    /// Factor on the gradients.
    pub loss_scale: f64,
    /// What is left to chance in a pass is drawn from this,
    pub seed: u64,
    /// and from the number of steps before this one.
    pub step: u64,
    /// What is added to embeddings; its rows are those of the batch.
    pub noise: Option<EmbeddingNoise>,
    /// The model that the terms are held against, where there is one.
    pub(crate) other: Option<&'a Counterpart>,
}

/// Loss and gradients of one optimiser step, or of a part of its rows.
#[derive(Debug)]
pub struct StepGradients {
    /// Loss of each pass, summed over its targets, `[passes]`, where the model lies.
    pub losses: Tensor<1>,
    /// Targets of the step, or its pairs of answers: what the loss is a mean over.
    pub targets: usize,
    /// Gradients of the mean loss, flattened, in the order of the model's parameters.
    pub gradients: Vec<Tensor<1>>,
    /// What the terms tell beside their loss.
    pub figures: Figures,
}

impl StepGradients {
    /// What a sum over targets is multiplied by to be a mean.
    pub fn mean(&self) -> f64 {
        1.0 / self.targets.max(1) as f64
    }

    /// Mean loss per target: nats, or the squared error per number. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Device`] where it cannot be read back.
    pub fn loss(&self) -> Result<f64> {
        let losses = self.losses.clone().try_into_vec_as::<f32>();
        let losses = losses.map_err(|e| Error::Device { what: "the loss", why: format!("{e:?}") })?;
        Ok(losses.into_iter().map(f64::from).sum::<f64>() * self.mean())
    }
}

impl Workers {
    /// `threads` threads for passes of `rows` rows: one pool per row at most, the threads divided among the pools.
    ///
    /// # Errors
    /// [`Error::Config`] for more threads than this machine's cores can serve, [`Error::Io`] where the operating system gives none.
    pub fn new(threads: usize, rows: usize) -> Result<Self> {
        refuse_a_crowd("threads", threads)?;
        let count = threads.min(rows).max(1);
        let pool = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.max(1)).build();
            pool.map_err(|e| Error::io("thread pool", std::io::Error::other(e)))
        };
        let pools = (0..count).map(|i| pool(threads / count + usize::from(i < threads % count)));
        let all = if count > 1 { Some(pool(threads)?) } else { None };
        Ok(Self { pools: pools.collect::<Result<_>>()?, all, ranks: Ranks::default() })
    }

    /// The same as those of one of several ranks, which share what is measured.
    #[must_use]
    pub fn among(self, ranks: Ranks) -> Self {
        Self { ranks, ..self }
    }

    /// The same on the CPU; one thread for a GPU, which has units of its own and takes a pass whole.
    ///
    /// # Errors
    /// As [`Workers::new`].
    pub fn for_device(threads: usize, rows: usize, device: &Device) -> Result<Self> {
        if is_cpu(device) { Self::new(threads, rows) } else { Self::new(1, 1) }
    }

    /// Runs a job in one pool of all threads: for work on the whole model, between passes.
    pub(crate) fn together<R: Send>(&self, job: impl FnOnce() -> R + Send) -> R {
        match self.all.as_ref().or(self.pools.first()) {
            Some(pool) => pool.install(job),
            None => job(),
        }
    }

    /// How a pass of `rows` rows is divided: ranges of rows, one per pool, none of which parts `unit` rows that belong together.
    pub(crate) fn shares(&self, rows: usize, unit: usize) -> Vec<(usize, usize)> {
        let share = rows.div_ceil(self.pools.len()).max(1).next_multiple_of(unit);
        (0..rows).step_by(share).map(|at| (at, (at + share).min(rows))).collect()
    }

    /// Runs `job(&items[i])` for all items, at most one per pool at a time, and returns the results in order.
    pub fn map<T: Sync, R: Send>(&self, items: &[T], job: impl Fn(&T) -> R + Sync) -> Vec<R> {
        let count = self.pools.len();
        let mut results: Vec<Option<R>> = items.iter().map(|_| None).collect();
        std::thread::scope(|scope| {
            let job = &job;
            let mut lanes: Vec<Vec<(&T, &mut Option<R>)>> = (0..count).map(|_| Vec::new()).collect();
            for (i, pair) in items.iter().zip(results.iter_mut()).enumerate() {
                lanes[i % count].push(pair);
            }
            let lanes = self.pools.iter().zip(lanes).map(|(pool, lane)| {
                let lane = Mutex::new(lane);
                scope.spawn(move || {
                    // Always on a pool's first thread, the others helping: memory that a step frees is kept by the thread
                    // that had asked for it, and another one would not find it again in the next step.
                    pool.broadcast(|thread| {
                        if thread.index() == 0 {
                            let lane = std::mem::take(&mut *lane.lock().unwrap_or_else(PoisonError::into_inner));
                            for (item, slot) in lane {
                                *slot = Some(job(item));
                            }
                        }
                    });
                })
            });
            // Collected before the first is joined: all lanes run at once.
            let running: Vec<_> = lanes.collect();
            for thread in running {
                // Joined here so that a panic keeps its own message.
                if let Err(cause) = thread.join() {
                    std::panic::resume_unwind(cause);
                }
            }
        });
        // Every lane has run to its end (a panic would have been raised by the scope), so no slot is empty.
        results.into_iter().flatten().collect()
    }

    /// [`Workers::map`] with the items shared among the ranks, each of which gets all results.
    ///
    /// # Errors
    /// The job's, and as [`Ranks::agree`].
    pub(crate) fn map_on_ranks<T: Sync, R: Packed + Send>(
        &self,
        items: &[T],
        job: impl Fn(&T) -> Result<R> + Sync,
    ) -> Result<Vec<R>> {
        self.ranks.share(items, |own| self.map(own, job).into_iter().collect())
    }

    /// Loss and gradients of a batch, pass by pass. On a GPU they are queued, not waited for.
    ///
    /// The mean is over the targets of the whole batch: a pass with fewer targets weighs less.
    pub fn gradients(
        &self,
        model: &CausalLm,
        batch: &Batch,
        settings: PassSettings<'_>,
        device: &Device,
    ) -> StepGradients {
        self.gradients_of(model, batch, 0..batch.rows, settings, device)
    }

    /// The part of [`Workers::gradients`] that comes from some of the rows: the parts of all rows add up to it.
    pub(crate) fn gradients_of(
        &self,
        model: &CausalLm,
        batch: &Batch,
        rows: Range<usize>,
        settings: PassSettings<'_>,
        device: &Device,
    ) -> StepGradients {
        let PassSettings { micro_batch, recompute, terms, precision, loss_scale, seed, step, noise, other } = settings;
        let targets = match terms.first() {
            Some(Term::Preference(_)) => batch.rows / 2,
            _ => batch.target_tokens(),
        };
        let scale = loss_scale / targets.max(1) as f64;
        let objective = Objective { scale, terms };
        let mut losses: Vec<Tensor<1>> = Vec::new();
        let mut total: Vec<Tensor<1>> = Vec::new();
        let (mut figures, unit) = (Figures::default(), batch.unit());
        let micro_batch = micro_batch.next_multiple_of(unit);
        for from in rows.clone().step_by(micro_batch) {
            let pass = (rows.end - from).min(micro_batch);
            let shares = self.shares(pass, unit).into_iter().map(|(first, end)| (from + first, from + end));
            // Forked here, not in the threads: the fork reads the parameters' shared nodes.
            let fork = |(first_row, end)| {
                let draws = Draws { seed, step, first_row };
                ((first_row, end), model.clone().fork(device).with_draws(Some(draws)))
            };
            let forks: Vec<_> = shares.map(fork).collect();
            let results = self.map(&forks, |((from, to), fork)| {
                let _precision = scope(precision);
                let rows = batch.rows(*from..*to);
                let said = other.map(|other| other.says(rows));
                let against = said.as_ref().map(Said::against).unwrap_or_default();
                let noise = noise.map(|noise| EmbeddingNoise { first_row: *from, ..noise });
                let Learnt { loss, gradients, figures } =
                    fork.learn(rows, objective, against, noise, recompute, device);
                // What is reported is the loss without what only steers the training.
                ((loss.nats - loss.z_loss).without_autodiff(), gradients, figures)
            });
            // The graphs are gone, and the forks with them, before anything is summed.
            drop(forks);
            let mut parts = Vec::with_capacity(results.len());
            for (loss, gradients, more) in results {
                losses.push(loss);
                parts.push(gradients);
                figures.add(more);
            }
            total = self.together(|| sum(total, parts));
        }
        StepGradients { losses: Tensor::cat(losses, 0), targets, gradients: total, figures }
    }
}

/// Adds `parts` to `total` (empty: to the first part) in their order, parameter by parameter; each is freed once it is added.
fn sum(total: Vec<Tensor<1>>, parts: Vec<Vec<Tensor<1>>>) -> Vec<Tensor<1>> {
    let mut parts = parts.into_iter();
    let first = if total.is_empty() { parts.next().unwrap_or_default() } else { total };
    let mut others: Vec<Vec<Tensor<1>>> = first.iter().map(|_| Vec::new()).collect();
    for part in parts {
        others.iter_mut().zip(part).for_each(|(others, gradient)| others.push(gradient));
    }
    first.into_par_iter().zip(others).map(|(first, others)| optim::accumulate(first, others)).collect()
}

/// Threads that this process may use: one per core.
pub fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Threads for each core that a run may have: with more of them a step hardly ends.
const MOST_PER_CORE: usize = 16;

fn refuse_a_crowd(key: &'static str, threads: usize) -> Result<()> {
    let cores = available_threads();
    let most = MOST_PER_CORE * cores;
    if threads <= most {
        return Ok(());
    }
    let why = format!("this machine has {cores} cores, and more than {most} threads would hardly get on; lower it");
    Err(Error::config(key, threads, why))
}

/// Refuses more threads than this machine's cores can serve, and says where there are more threads than cores: they make a run
/// slower, which the run file of another machine may nevertheless ask for, as the bits depend on their number.
///
/// # Errors
/// [`Error::Config`].
pub fn check_threads(config: &RunConfig, devices: &[Device]) -> Result<Option<String>> {
    let (threads, cores) = (config.threads(), available_threads());
    if !devices.iter().any(is_cpu) {
        return Ok(None);
    }
    refuse_a_crowd("training.threads", threads)?;
    Ok((threads > cores).then(|| {
        format!("training.threads = {threads}, and this machine has {cores} cores: {cores} threads would be faster")
    }))
}

/// Bytes of memory that this machine has, or its container may use, where the system says so.
pub fn memory() -> Option<u64> {
    let total = std::fs::read_to_string("/proc/meminfo").ok()?;
    let total =
        total.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.trim().parse().ok());
    let total = total.map(|kib: u64| kib.saturating_mul(1024))?;
    let limit = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    Some(limit.map_or(total, |limit: u64| limit.min(total)))
}

/// The rate, in floating-point operations per second, at which `threads` threads multiply matrices of 512 × 512 in `precision`, or a GPU
/// larger ones: what a model's own products hardly exceed.
///
/// Best of rounds that go on until none has been better for a while, a third of a second on an idle machine: on one that others
/// use, too, a few rounds may all fall into a busy moment, and a model would seem faster than its own products.
///
/// # Errors
/// [`Error::Io`] where the operating system gives no thread, [`Error::Device`] where a GPU fails.
pub fn matmul_ceiling(threads: usize, device: &Device, precision: Precision) -> Result<f64> {
    const SIZE: usize = 512;
    const ROUNDS: usize = 60;
    /// Rounds without a better one that end it.
    const IN_VAIN: usize = 7;
    if !is_cpu(device) {
        return gpu_ceiling(&device.clone().without_autodiff(), precision);
    }
    let workers = Workers::new(threads, threads)?;
    let lanes: Vec<usize> = (0..threads).collect();
    let device = device.clone().without_autodiff();
    let (mut best, mut in_vain) = (0.0f64, 0);
    for _ in 0..ROUNDS {
        let started = std::time::Instant::now();
        workers.map(&lanes, |_| {
            let _scope = scope(precision);
            let a = Tensor::<2>::ones([SIZE, SIZE], &device);
            for _ in 0..8 {
                match precision {
                    Precision::Bf16 => drop(linear(a.clone().unsqueeze(), a.clone(), None)),
                    _ => drop(a.clone().matmul(a.clone())),
                }
            }
        });
        let flops = (threads * 8) as f64 * 2.0 * (SIZE as f64).powi(3);
        let rate = flops / started.elapsed().as_secs_f64();
        in_vain = if rate > 1.01 * best { 0 } else { in_vain + 1 };
        best = best.max(rate);
        if in_vain == IN_VAIN {
            break;
        }
    }
    Ok(best)
}

/// [`matmul_ceiling`] of several devices together.
///
/// # Errors
/// As there.
pub fn ceiling(threads: usize, devices: &[Device], precision: Precision) -> Result<f64> {
    let Some(device) = devices.first() else { return Ok(0.0) };
    let one = matmul_ceiling(threads, device, precision)?;
    // The CPU's was measured on all its threads, and a GPU that is named twice does not become two.
    let distinct = devices.iter().enumerate().filter(|(i, device)| !devices[..*i].contains(device)).count();
    Ok(one * distinct as f64)
}

/// The rate of the largest product that takes no more than a few milliseconds, after one to compile it.
fn gpu_ceiling(device: &Device, precision: Precision) -> Result<f64> {
    const LARGEST: usize = 8192;
    const LONG_ENOUGH_S: f64 = 5e-3;
    /// Of a first product; a device that takes no longer computes one of a graphics card's size at once.
    const AT_ONCE_S: f64 = 1e-3;
    let _scope = scope(precision);
    let failed = |e| Error::Device { what: "a matrix product", why: format!("{e:?}") };
    let mut best: f64 = 0.0;
    let mut size = 256;
    loop {
        let (x, w) = (Tensor::<3>::ones([1, size, size], device), Tensor::<2>::ones([size, size], device));
        drop(linear(x.clone(), w.clone(), None));
        device.sync().map_err(failed)?;
        let started = std::time::Instant::now();
        drop(linear(x, w, None));
        device.sync().map_err(failed)?;
        let took = started.elapsed().as_secs_f64();
        best = best.max(2.0 * (size as f64).powi(3) / took);
        if took > LONG_ENOUGH_S || size >= LARGEST {
            return Ok(best);
        }
        // What would take that long at this rate: few sizes, as each first use of one chooses its kernel, which takes seconds. A small
        // product tells no rate: it waits for its launch.
        let wanted = size as f64 * (LONG_ENOUGH_S / took).cbrt();
        let least = if took < AT_ONCE_S { LARGEST / 2 } else { 2 * size };
        size = (wanted as usize / 256 * 256).max(least).min(LARGEST);
    }
}

#[cfg(test)]
mod tests;
