//! What can stop a run.

use std::path::PathBuf;

/// Why a run file was refused or a run stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The run file is not what a run file must be.
    #[error("{}: {why}", path.display())]
    RunFile {
        /// The run file, or the `--set` expression.
        path: PathBuf,
        /// The parser's message, with line and column.
        why: String,
    },
    /// A key of the run file has a value that no run can be made from.
    #[error("{key} = {value}: {why}")]
    Config {
        /// The key with its section, such as `optimizer.lr`.
        key: &'static str,
        /// The offending value as text.
        value: String,
        /// The rule it breaks and the mend.
        why: String,
    },
    /// The loss or a gradient is no longer a number. The weights are those before the step.
    #[error(
        "step {step}: {what} is not finite ({value}); the optimiser step was not taken. The batch is data rows {first_row} \
         to {last_row} of the sampler; {}. Lower optimizer.lr, raise \
         lr_scheduler.warmup_steps, or set optimizer.grad_clip",
        kept_text(*kept)
    )]
    NonFinite {
        /// The step that was not taken, counted from 1.
        step: u64,
        /// The loss, or the first parameter whose gradient is not finite.
        what: String,
        /// The offending number.
        value: f64,
        /// First row of the batch in the sampler's order.
        first_row: u64,
        /// Last row of the batch.
        last_row: u64,
        /// The step of the newest checkpoint, where there is one.
        kept: Option<u64>,
    },
    /// A step was taken after which the model produces non-finite values.
    #[error(
        "step {step}: {what} is not finite ({value}) after this step; {}. Lower optimizer.lr, raise \
         lr_scheduler.warmup_steps, or set optimizer.grad_clip",
        kept_text(*kept)
    )]
    Diverged {
        /// The step, counted from 1.
        step: u64,
        /// The held-out loss, or the first parameter that is not finite.
        what: String,
        /// The offending number.
        value: f64,
        /// The step of the newest checkpoint, where there is one.
        kept: Option<u64>,
    },
    /// The machine cannot hold what the run needs.
    #[error(
        "{what} needs about {needed_gib:.1} GiB of memory ({parameters} parameters), and this machine has {memory_gib:.1} GiB; \
         lower {lower}"
    )]
    Memory {
        /// What was to be done.
        what: &'static str,
        /// Estimated peak.
        needed_gib: f64,
        /// Parameters of the model.
        parameters: usize,
        /// What the machine has.
        memory_gib: f64,
        /// The sizes that it follows from.
        lower: &'static str,
    },
    /// A GPU, or its driver, does not take tensors as large as the run's.
    #[error(
        "this run has a tensor of {needed_mib:.0} MiB, and on {device} one may have {limit_mib:.0} MiB at most; \
         lower training.micro_batch_size, data.seq_len or the model's sizes"
    )]
    Tensor {
        /// Name of the device.
        device: String,
        /// Size of the largest tensor.
        needed_mib: f64,
        /// What the device takes.
        limit_mib: f64,
    },
    /// A file of a run or checkpoint is not what it should be.
    #[error("{}: {why}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong and the mend.
        why: String,
    },
    /// A file could not be read or written.
    #[error("{}: {reason}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason. It stands in the message, hence is no source that a chain would print again.
        reason: std::io::Error,
    },
    /// The model could not be built, loaded or saved.
    #[error(transparent)]
    Model(#[from] lowkey_model::Error),
    /// The data could not be read or prepared.
    #[error(transparent)]
    Data(#[from] lowkey_data::Error),
    /// The latents could not be looked into.
    #[error(transparent)]
    Convert(#[from] lowkey_convert::Error),
    /// A sample could not be drawn.
    #[error(transparent)]
    Infer(#[from] lowkey_infer::Error),
    /// Processes were started together that cannot train together.
    #[error("{why}")]
    Launch {
        /// The mend.
        why: String,
    },
    /// Another rank has met an error, which ends them all.
    #[error("rank {rank} of {size} (on {machine}): {why}")]
    Rank {
        /// Which one, from 0.
        rank: usize,
        /// Of how many.
        size: usize,
        /// Where it runs.
        machine: String,
        /// What it has met.
        why: String,
    },
    /// What carries words and numbers from rank to rank has refused.
    #[error("{call}: {why}")]
    Transfer {
        /// The call, `MPI_Iallgather` or `ncclSend`, or what it was for.
        call: &'static str,
        /// Its reason.
        why: String,
    },
    /// The device failed.
    #[error("the device could not return {what}: {why}")]
    Device {
        /// What was being read.
        what: &'static str,
        /// The device's reason.
        why: String,
    },
}

fn kept_text(kept: Option<u64>) -> String {
    match kept {
        Some(step) => format!("the last good checkpoint is kept, that of step {step}"),
        None => "no checkpoint was written before it".into(),
    }
}

impl Error {
    /// The same, told of a run whose newest checkpoint is that of step `saved`.
    pub(crate) fn with_kept(mut self, saved: Option<u64>) -> Self {
        if let Self::NonFinite { kept, .. } | Self::Diverged { kept, .. } = &mut self {
            *kept = saved;
        }
        self
    }

    pub(crate) fn config(key: &'static str, value: impl ToString, why: impl Into<String>) -> Self {
        Self::Config { key, value: value.to_string(), why: why.into() }
    }

    pub(crate) fn file(path: impl Into<PathBuf>, why: impl Into<String>) -> Self {
        Self::File { path: path.into(), why: why.into() }
    }

    pub(crate) fn io(path: impl Into<PathBuf>, reason: std::io::Error) -> Self {
        Self::Io { path: path.into(), reason }
    }
}

impl From<lowkey_files::Error> for Error {
    fn from(error: lowkey_files::Error) -> Self {
        match error {
            lowkey_files::Error::Io { path, why, .. } => Self::io(path, why),
            lowkey_files::Error::Refused { path, why } => Self::File { path, why },
            lowkey_files::Error::Held { path } => Self::file(path, lowkey_files::lock::HELD),
        }
    }
}

/// The result of this crate's fallible functions.
pub type Result<T> = std::result::Result<T, Error>;
