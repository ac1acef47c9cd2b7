//! `lowkey`: trains, samples, evaluates and inspects Multi-head Latent Attention language models.
//!
//! The only crate that parses arguments, prints, and decides an exit code: 0 done, 1 failed, 2 wrong use (a bad command line,
//! or a run file or dataset file with a wrong key or value).

mod cli;
mod commands;
mod output;
mod progress;

use std::process::ExitCode;

use clap::Parser;

/// Something was wrong with what the user wrote, rather than with the world.
const WRONG_USE: u8 = 2;
const FAILED: u8 = 1;

fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|panic| {
        let message = panic.payload_as_str().unwrap_or("no message");
        let place = panic.location().map(|l| format!(" at {}:{}", l.file(), l.line())).unwrap_or_default();
        output::complain(&format!("internal error: {message}{place}. Please report this with the command that you ran."));
    }));
    let arguments = cli::Arguments::parse();
    // A panic anywhere below has been reported by the hook.
    match std::panic::catch_unwind(|| commands::run(arguments)) {
        Ok(Ok(code)) => code,
        Ok(Err(error)) => {
            output::complain(&format!("error: {error:#}"));
            ExitCode::from(if is_wrong_use(&error) { WRONG_USE } else { FAILED })
        }
        Err(_) => ExitCode::from(FAILED),
    }
}

fn is_wrong_use(error: &anyhow::Error) -> bool {
    use lowkey_train::Error as Train;
    let model = |e: &lowkey_model::Error| {
        matches!(e, lowkey_model::Error::Config { .. } | lowkey_model::Error::MissingKey { .. })
    };
    let data = |e: &lowkey_data::Error| matches!(e, lowkey_data::Error::Config { .. });
    let infer = |e: &lowkey_infer::Error| matches!(e, lowkey_infer::Error::Setting { .. });
    error.chain().any(|cause| {
        cause.downcast_ref::<Train>().is_some_and(|e| match e {
            Train::RunFile { .. } | Train::Config { .. } => true,
            Train::Model(e) => model(e),
            Train::Data(e) => data(e),
            Train::Infer(e) => infer(e),
            _ => false,
        }) || cause.downcast_ref::<lowkey_model::Error>().is_some_and(model)
            || cause.downcast_ref::<lowkey_data::Error>().is_some_and(data)
            || cause.downcast_ref::<lowkey_infer::Error>().is_some_and(infer)
            || cause.downcast_ref::<commands::WrongUse>().is_some()
    })
}
