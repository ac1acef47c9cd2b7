//! What the machine can do, and what the process has taken of it.

use std::time::{Duration, Instant};

use burn::tensor::Device;

use lowkey_kernels::Precision;

use crate::error::Result;
use crate::workers::{Workers, matmul_ceiling};

/// Median and extremes of repeated measurements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The middle one; of an even number the mean of the middle two.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Of any numbers; all zero where there are none.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let (last, at) = (values.len().saturating_sub(1), |i: usize| values.get(i).copied().unwrap_or(0.0));
        Self { median: f64::midpoint(at(last / 2), at(last.div_ceil(2))), min: at(0), max: at(last) }
    }

    /// Of times, in milliseconds.
    pub(super) fn milliseconds(times: &[Duration]) -> Self {
        Self::of(times.iter().map(|time| time.as_secs_f64() * 1e3).collect())
    }
}

/// Three digits after the point: microseconds of a millisecond, thousandths of a token.
pub(super) fn thousandths(x: f64) -> f64 {
    (x * 1e3).round() / 1e3
}

/// Most memory that this process has held at once, in MiB, where the system says so.
pub(super) fn peak_rss_mb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib =
        status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.trim().parse().ok());
    kib.map(|kib: f64| (kib / 1024.0).round())
}

/// Runs `job` between two measurements of the rate of matrix products, and returns the larger with its result. Machines that
/// others use change their speed, and a model cannot be faster than its products.
pub(super) fn below_ceiling<R>(
    threads: usize,
    device: &Device,
    precision: Precision,
    job: impl FnOnce() -> Result<R>,
) -> Result<(R, f64)> {
    let before = matmul_ceiling(threads, device, precision)?;
    let result = job()?;
    Ok((result, before.max(matmul_ceiling(threads, device, precision)?)))
}

/// Bytes per second that `threads` threads read from memory together: sums over arrays that no cache holds, best of several.
pub(super) fn read_bandwidth(threads: usize) -> Result<f64> {
    /// Numbers of 8 bytes, of all threads together: 512 MiB.
    const NUMBERS: usize = 1 << 26;
    const ROUNDS: usize = 5;
    let workers = Workers::new(threads, threads)?;
    let lanes: Vec<usize> = (0..threads).collect();
    // Ones, not zeros: zeroed pages may all be one page until they are written to. Each lane writes its own.
    let arrays = workers.map(&lanes, |_| vec![1u64; NUMBERS / threads]);
    let mut best: f64 = 0.0;
    for _ in 0..ROUNDS {
        let started = Instant::now();
        let sums = workers.map(&arrays, |array| array.iter().fold(0u64, |sum, x| sum.wrapping_add(*x)));
        let seconds = started.elapsed().as_secs_f64();
        std::hint::black_box(sums);
        best = best.max((NUMBERS / threads * threads * 8) as f64 / seconds);
    }
    Ok(best)
}
