//! Signals: the first lets work come to an orderly end, the second ends it at once.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};

use crate::output::complain;

/// What a shell adds to the number of the signal that ended a process.
const BY_SIGNAL: usize = 128;

/// Whether a signal came: Ctrl-C, the end that a job manager asks for, or its word (`SIGUSR1`) that the time is almost over.
pub(crate) struct Interrupt {
    came: Arc<AtomicBool>,
    signal: Arc<AtomicUsize>,
}

impl Interrupt {
    /// Watches from now on. The second signal ends the process, after `at_once` had a word.
    pub(crate) fn watch(at_once: impl Fn() + Send + 'static) -> anyhow::Result<Self> {
        let interrupt = Self { came: Arc::default(), signal: Arc::default() };
        interrupt.listen(at_once)?;
        Ok(interrupt)
    }

    /// Set by the first signal.
    pub(crate) fn came(&self) -> &AtomicBool {
        &self.came
    }

    /// The exit code of a process that was interrupted: 130 for Ctrl-C, 143 for a termination, as job managers expect; 0 for `SIGUSR1`,
    /// which asks for just that.
    pub(crate) fn exit_code(&self) -> ExitCode {
        #[cfg(unix)]
        if self.signal.load(Ordering::Relaxed) == signal_hook::consts::SIGUSR1 as usize {
            return ExitCode::SUCCESS;
        }
        exit_code(self.signal.load(Ordering::Relaxed))
    }

    #[cfg(unix)]
    fn listen(&self, at_once: impl Fn() + Send + 'static) -> anyhow::Result<()> {
        use anyhow::Context;
        use signal_hook::consts::{SIGHUP, SIGUSR1};

        // Under nohup a terminal that goes away is nothing to stop for.
        let hangup = (!is_ignored(SIGHUP)).then_some(SIGHUP);
        let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGUSR1].into_iter().chain(hangup))
            .context("cannot watch for signals")?;
        let (came, first) = (Arc::clone(&self.came), Arc::clone(&self.signal));
        let watch = move || {
            for signal in signals.forever() {
                let signal = usize::try_from(signal).unwrap_or_default();
                if came.swap(true, Ordering::Relaxed) {
                    at_once();
                    std::process::exit(i32::try_from(BY_SIGNAL + signal).unwrap_or(1));
                }
                first.store(signal, Ordering::Relaxed);
                complain("stopping after this step; once more stops at once");
            }
        };
        std::thread::Builder::new().name("signals".into()).spawn(watch).context("cannot watch for signals")?;
        Ok(())
    }

    #[cfg(not(unix))]
    fn listen(&self, _: impl Fn() + Send + 'static) -> anyhow::Result<()> {
        for signal in [SIGINT, SIGTERM] {
            let code = BY_SIGNAL as i32 + signal;
            signal_hook::flag::register_conditional_shutdown(signal, code, Arc::clone(&self.came))?;
            signal_hook::flag::register_usize(signal, Arc::clone(&self.signal), signal as usize)?;
            signal_hook::flag::register(signal, Arc::clone(&self.came))?;
        }
        Ok(())
    }
}

fn exit_code(signal: usize) -> ExitCode {
    u8::try_from(BY_SIGNAL + signal).map_or(ExitCode::FAILURE, ExitCode::from)
}

/// Whether whoever started this process had it ignore a signal; where the system does not tell, it did not.
#[cfg(unix)]
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}
