//! Measurements of speed and memory on random tokens.
//!
//! [`train`] times whole optimiser steps on fixed shapes, [`ops`] takes one apart, [`decode`] times single tokens of a shape or of any
//! model over a filled cache, [`prefill`] whole prompts. Each runs
//! the code that `lowkey train` and `lowkey generate` run, and reports its figure beside what the machine can do at most,
//! measured in the same process.

mod decode;
mod machine;
mod ops;
mod prefill;
mod shapes;
mod train;

use burn::tensor::Device;

pub use decode::{DecodeFigures, DecodeOptions, DecodeRow, Subject, decode};
pub use machine::Spread;
pub use ops::{OpFigures, OpsFigures, OpsOptions, ops};
pub use prefill::{PrefillFigures, PrefillOptions, PrefillRow, prefill};
pub use shapes::Shape;
pub use train::{TrainFigures, TrainOptions, train};

use crate::error::{Error, Result};
use crate::run_config::at_least_one;
use crate::workers::available_threads;

/// How far a measurement has come.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// What is being measured.
    pub doing: &'static str,
    /// Parts done.
    pub done: usize,
    /// Parts in all.
    pub of: usize,
}

/// Who watches a measurement.
pub type Observer<'a> = &'a mut (dyn FnMut(Progress) + Send);

/// Rounds of a measurement, at most.
const MOST_ROUNDS: usize = 1 << 20;

/// The number of threads asked for, else one per core.
fn threads(asked: Option<usize>) -> Result<usize> {
    let threads = asked.unwrap_or_else(available_threads);
    at_least_one("threads", threads, 1024)?;
    Ok(threads)
}

/// Checks the sizes of a batch.
fn check_tokens(batch: usize, length_name: &'static str, length: usize) -> Result<()> {
    at_least_one("batch", batch, 1 << 20)?;
    at_least_one(length_name, length, 1 << 20)?;
    if batch * length > 1 << 26 {
        return Err(Error::config("batch", batch, format!("times {length} are more than {} tokens", 1 << 26)));
    }
    Ok(())
}

/// Runs `job` on a thread pool of that size: decoding has no workers, its operations use the threads around them.
fn on_threads<R: Send>(threads: usize, job: impl FnOnce() -> Result<R> + Send) -> Result<R> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.map_err(|e| Error::io("thread pool", std::io::Error::other(e)))?.install(job)
}

/// Where measurements run.
fn device() -> Device {
    Device::flex()
}

#[cfg(test)]
mod tests;
