//! Commands that several processes share, started by `mpirun` or `srun`.

use std::process::ExitCode;

use lowkey_train::ranks::{Launched, Ranks};

use crate::output::{be_quiet, complain_all_the_same};

/// The ranks that this process is one of. From now on the first one speaks for all.
pub(crate) fn join() -> anyhow::Result<Ranks> {
    let joined = Ranks::join(|why| complain_all_the_same(&format!("error: {why}")));
    // Where they cannot be joined, all of them come here.
    let rank = joined.as_ref().map_or_else(|_| Launched::read().map_or(0, |launched| launched.rank), Ranks::rank);
    if rank > 0 {
        be_quiet();
    }
    Ok(joined?)
}

/// Refuses a command that is the work of one process.
pub(crate) fn refuse_several(command: &str) -> anyhow::Result<()> {
    let refused = Launched::refuse_several(command);
    if refused.is_err() && Launched::read().is_some_and(|launched| launched.rank > 0) {
        be_quiet();
    }
    Ok(refused?)
}

/// Takes leave of the others, with what this one has come to.
pub(crate) fn part(ranks: &Ranks, result: anyhow::Result<ExitCode>) -> anyhow::Result<ExitCode> {
    if !ranks.are_several() {
        return result;
    }
    match (&result, ranks.is_over()) {
        (_, true) => ranks.leave(),
        (Ok(_), false) => {
            ranks.end(Ok(()))?;
            ranks.leave();
        }
        (Err(error), false) => {
            // Nobody else knows of it.
            complain_all_the_same(&format!("error: {}: {error:#}", ranks.name()));
            Ranks::abandon();
        }
    }
    result
}
