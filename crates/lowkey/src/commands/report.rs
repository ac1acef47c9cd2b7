//! `lowkey report`, and the page that a run leaves at its end.

use std::path::Path;

use lowkey_lab::run_page::{self, MOST_RUNS};

use super::WrongUse;
use crate::cli::ReportArguments;
use crate::output::{complain, say};

pub(crate) fn report(arguments: &ReportArguments) -> anyhow::Result<()> {
    let ReportArguments { runs, out } = arguments;
    if runs.len() > MOST_RUNS {
        return Err(WrongUse(format!("{} runs are more than a page holds, which is {MOST_RUNS}", runs.len())).into());
    }
    let written = run_page::write(runs, out.as_deref())?;
    // What goes to standard output is the page alone.
    if out.is_none() || written.is_file() {
        say(&format!("written: {}", written.display()));
    }
    Ok(())
}

/// Writes the page of a run that has come to an end. The run stands without it.
pub(crate) fn at_the_end(run: &Path) {
    match run_page::write(&[run.to_path_buf()], None) {
        Ok(path) => say(&format!("report {}", path.display())),
        Err(e) => complain(&format!("note: no page about this run was written: {e}")),
    }
}
