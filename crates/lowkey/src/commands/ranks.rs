//! Commands that several processes share, started by `mpirun` or `srun`.

use std::process::ExitCode;
use std::time::Duration;

use burn::tensor::Device;
use lowkey_train::Error;
use lowkey_train::ranks::{Launched, Ranks, Task, compare_job};

use crate::output::{be_quiet, complain_all_the_same};

/// The ranks that this process is one of. From now on the first one speaks for all.
pub(crate) fn join() -> anyhow::Result<Ranks> {
    let joined = Ranks::join(|why| complain_all_the_same(&format!("error: {why}")));
    // Where they cannot be joined, all of them come here.
    let rank = joined.as_ref().map_or_else(|_| Launched::read().map_or(0, |launched| launched.rank), Ranks::rank);
    match &joined {
        Ok(_) if rank > 0 => be_quiet(),
        Err(_) if rank > 0 => let_the_first_one_say_it(),
        _ => {}
    }
    Ok(joined?)
}

/// What all ranks have, or the error that any of them has met.
pub(crate) fn agree<T>(ranks: &Ranks, own: anyhow::Result<T>) -> anyhow::Result<T> {
    if !ranks.are_several() || ranks.is_over() {
        return own;
    }
    let word = own.as_ref().map(|_| ()).map_err(|error| Error::Launch { why: format!("{error:#}") });
    match (ranks.agree(word), own) {
        // Its own, which has the right exit code.
        (_, Err(own)) => Err(own),
        (Err(of_another), Ok(_)) => Err(of_another.into()),
        (Ok(()), Ok(own)) => Ok(own),
    }
}

/// Meets the others of a job before anything is opened but its device, and says how many threads each has: all are to be asked for the
/// same.
pub(crate) fn compare(ranks: &Ranks, device: &Device) -> anyhow::Result<usize> {
    let arguments: Vec<String> = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    let threads = compare_job(ranks, Task::of_command(arguments, device, &super::train::environment()));
    agree(ranks, threads.map_err(Into::into))
}

/// Refuses ranks that do not have the same `what`.
pub(crate) fn all_have(ranks: &Ranks, what: &str, own: &[u8]) -> anyhow::Result<()> {
    agree(ranks, ranks.all_have(what, own).map_err(Into::into))
}

/// Refuses a command that is the work of one process.
pub(crate) fn refuse_several(command: &str) -> anyhow::Result<()> {
    let refused = Launched::refuse_several(command);
    if refused.is_err() && Launched::read().is_some_and(|launched| launched.rank > 0) {
        let_the_first_one_say_it();
    }
    Ok(refused?)
}

/// Takes leave of the others, with what this one has come to. An error is said before that: whoever started the ranks ends all of them at
/// the first that has failed, and they are bound to wait for each other only up to here.
pub(crate) fn part(ranks: &Ranks, result: anyhow::Result<ExitCode>) -> anyhow::Result<ExitCode> {
    if !ranks.are_several() {
        return result;
    }
    let result = result.and_then(|code| Ok(ranks.end(Ok(code))?));
    if ranks.is_over() {
        let code = result.unwrap_or_else(|error| crate::failed(&error));
        ranks.leave();
        return Ok(code);
    }
    if let Err(error) = &result {
        // Nobody else knows of it.
        complain_all_the_same(&format!("error: {}: {error:#}", ranks.name()));
        Ranks::abandon();
    }
    result
}

/// Says nothing, as the first rank says it, and waits for the end that this one's error brings to all: they know nothing of each other.
fn let_the_first_one_say_it() {
    /// As long as a machine that is too busy may take to start a process.
    const PATIENCE: Duration = Duration::from_secs(5);
    be_quiet();
    std::thread::sleep(PATIENCE);
}
