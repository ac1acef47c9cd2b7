//! What stands for MPI in a build that has none.

use super::Launched;
use super::comm::Wire;
use crate::error::{Error, Result};

pub(super) fn join(launched: &Launched, _: fn(&str)) -> Result<Box<dyn Wire>> {
    let Launched { by, size, .. } = launched;
    let why = format!(
        "{by} has started {size} processes, and this build has no MPI, so that they know nothing of each other; build with \
         --features mpi, or start one process"
    );
    Err(Error::Launch { why })
}

/// There is nobody to end.
pub(super) fn abandon() {}

pub(super) fn library() -> Option<String> {
    None
}
