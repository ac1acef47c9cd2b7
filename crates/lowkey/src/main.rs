//! `lowkey`: trains, samples, evaluates and inspects Multi-head Latent Attention language models.
//!
//! The only crate that parses arguments, prints, and decides an exit code: 0 done, 1 failed, 2 wrong use (a bad command line,
//! or a run file or dataset file with a wrong key or value), 141 nobody read what was printed, 130 and 143 ended by Ctrl-C or a job
//! manager.

mod allocator;
mod cli;
mod commands;
mod interrupt;
mod output;
mod progress;
mod schema;

use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use clap::Parser;

use crate::output::OutputFailed;

#[global_allocator]
static ALLOCATOR: allocator::Allocator = allocator::Allocator::new();

/// As shells say that a program ended because nobody read what it printed.
const NOBODY_READS: u8 = 128 + 13;
/// Something was wrong with what the user wrote, rather than with the world.
const WRONG_USE: u8 = 2;
const FAILED: u8 = 1;

fn main() -> ExitCode {
    // First of all, while there is one thread.
    lowkey_train::ranks::say_where_to_meet();
    // What libraries note, kernels' timings among it: `RUST_LOG=lowkey_kernels=info`.
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("off")).init();
    allocator::keep_freed_memory();
    // A reader of foreign files may panic and be caught where that is expected; only what comes through to here is reported.
    let report = Arc::new(Mutex::new(String::new()));
    let last = Arc::clone(&report);
    std::panic::set_hook(Box::new(move |panic| {
        let message = panic.payload_as_str().unwrap_or("no message");
        let place = panic.location().map(|l| format!(" at {}:{}", l.file(), l.line())).unwrap_or_default();
        *last.lock().unwrap_or_else(PoisonError::into_inner) = format!("{message}{place}");
    }));
    let arguments = cli::Arguments::parse();
    match std::panic::catch_unwind(|| commands::run(arguments)) {
        Ok(Ok(code)) => code,
        Ok(Err(error)) => failed(&error),
        Err(end) => match end.downcast::<OutputFailed>().map(|end| *end) {
            Ok(OutputFailed::Closed) => ExitCode::from(NOBODY_READS),
            Ok(OutputFailed::Lost(e)) => {
                output::complain(&format!("error: standard output could not be written: {e}"));
                ExitCode::from(FAILED)
            }
            Err(_) => {
                let report = report.lock().unwrap_or_else(PoisonError::into_inner);
                let rank = lowkey_train::ranks::Launched::read().filter(|launched| launched.size > 1);
                let who =
                    rank.map(|launched| format!("rank {} of {}: ", launched.rank, launched.size)).unwrap_or_default();
                output::complain_all_the_same(&format!(
                    "internal error: {who}{report}. Please report this with the command that you ran."
                ));
                // Others may wait for this one.
                lowkey_train::ranks::Ranks::abandon();
                ExitCode::from(FAILED)
            }
        },
    }
}

/// Says an error, and gives the exit code for it.
pub(crate) fn failed(error: &anyhow::Error) -> ExitCode {
    output::complain(&format!("error: {error:#}"));
    ExitCode::from(if is_wrong_use(error) { WRONG_USE } else { FAILED })
}

fn is_wrong_use(error: &anyhow::Error) -> bool {
    use lowkey_train::Error as Train;
    let model = |e: &lowkey_model::Error| {
        matches!(e, lowkey_model::Error::Config { .. } | lowkey_model::Error::MissingKey { .. })
    };
    let data = |e: &lowkey_data::Error| matches!(e, lowkey_data::Error::Config { .. });
    let infer = |e: &lowkey_infer::Error| {
        use lowkey_infer::Error::{NoFused, Positions, Setting};
        matches!(e, Setting { .. } | Positions { .. } | NoFused)
    };
    error.chain().any(|cause| {
        cause.downcast_ref::<Train>().is_some_and(|e| match e {
            Train::RunFile { .. } | Train::Config { .. } | Train::Launch { .. } => true,
            Train::Model(e) => model(e),
            Train::Data(e) => data(e),
            Train::Infer(e) => infer(e),
            _ => false,
        }) || cause.downcast_ref::<lowkey_model::Error>().is_some_and(model)
            || cause.downcast_ref::<lowkey_data::Error>().is_some_and(data)
            || cause.downcast_ref::<lowkey_infer::Error>().is_some_and(infer)
            || cause
                .downcast_ref::<lowkey_export::Error>()
                .is_some_and(|e| matches!(e, lowkey_export::Error::Setting { .. }))
            || cause
                .downcast_ref::<lowkey_convert::Error>()
                .is_some_and(|e| matches!(e, lowkey_convert::Error::Setting { .. }))
            || cause
                .downcast_ref::<lowkey_lab::Error>()
                .is_some_and(|e| matches!(e, lowkey_lab::Error::Experiment { .. }))
            || cause.downcast_ref::<commands::WrongUse>().is_some()
    })
}
