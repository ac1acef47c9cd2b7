//! The beginning of a run, up to its first step: its folder, what it goes on from, and its data.

use std::path::PathBuf;

use lowkey_files::Owned;

use crate::checkpoint::Checkpoints;
use crate::error::{Error, Result};
use crate::event::RunOptions;
use crate::ranks::{Meeting, Ranks};
use crate::resume;
use crate::run_config::RunConfig;
use crate::run_dir;
use crate::setup::Setup;

/// The folder of a run, as the one who writes in it has it.
pub(super) struct Opened {
    /// Kept until the run is over.
    pub(super) held: Owned,
    pub(super) checkpoints: Checkpoints,
    /// The checkpoint to go on from.
    found: Option<PathBuf>,
    /// What is wrong with newer ones.
    pub(super) damaged: Vec<String>,
}

impl Opened {
    /// Opens it.
    ///
    /// # Errors
    /// [`Error::File`] where something would be lost, [`Error::Io`].
    pub(super) fn new(config: &RunConfig, options: &RunOptions) -> Result<Self> {
        let dir = options.out.join(run_dir::CHECKPOINTS);
        resume::refuse_to_lose_a_run(&dir, options)?;
        let held = resume::claim(&options.out)?;
        let checkpoints = Checkpoints::open(&dir, config.checkpoint.keep)?;
        let (found, damaged) = if options.resume { checkpoints.latest()? } else { (None, Vec::new()) };
        if let (None, Some(first)) = (&found, damaged.first()) {
            // Starting anew would write over what may still be mended.
            let why = format!(
                "no checkpoint here is whole ({first}); put one back from a copy, or start anew with --overwrite"
            );
            return Err(Error::file(dir, why));
        }
        if found.is_none() {
            resume::refuse_to_lose_figures(options)?;
        }
        Ok(Self { held, checkpoints, found, damaged })
    }
}

/// The checkpoint to go on from, which rank 0 has found; none on all ranks where there is none.
///
/// # Errors
/// [`Error::Rank`] with the first rank that does not see the folder of rank 0.
pub(super) fn found(ranks: &Ranks, options: &RunOptions, opened: Option<&Opened>) -> Result<Option<PathBuf>> {
    let own = opened.and_then(|opened| opened.found.clone());
    if !ranks.are_several() {
        return Ok(own);
    }
    let name = own.as_ref().and_then(|path| path.file_name()).map(|name| name.to_string_lossy().into_owned());
    let name = ranks.told(Ok(name.unwrap_or_default().into_bytes()))?;
    ranks.check_shared(&options.out)?;
    let path = || options.out.join(run_dir::CHECKPOINTS).join(&*String::from_utf8_lossy(&name));
    Ok((!name.is_empty()).then(path))
}

/// What `make` makes of a run file, on rank 0 first: the others then find the corpus prepared. None on all of them where one was
/// interrupted.
///
/// # Errors
/// Those of `make`; [`Error::Launch`] where ranks have other data than rank 0.
pub(super) fn set_up(
    ranks: &Ranks,
    config: &RunConfig,
    mut make: impl FnMut() -> Result<Setup>,
) -> Result<Option<Setup>> {
    let mut make = || match make() {
        Err(Error::Data(lowkey_data::Error::Stopped)) => Ok(None),
        setup => setup.map(Some),
    };
    let first = if ranks.is_first() { Some(make()?) } else { None };
    if ranks.any(Meeting::SetUp, matches!(first, Some(None)))? {
        return Ok(None);
    }
    let setup = match first {
        Some(setup) => setup,
        None => make()?,
    };
    if ranks.any(Meeting::SetUp, setup.is_none())? {
        return Ok(None);
    }
    let Some(setup) = setup else { return Ok(None) };
    if ranks.are_several() {
        let (batch, of_pairs) = (config.training.batch_size, 2 * ranks.size());
        if setup.data.is_pairs() && !batch.is_multiple_of(of_pairs) {
            let why =
                format!("the dataset has pairs of answers, which stay together: it must be a multiple of {of_pairs}");
            return Err(Error::config("training.batch_size", batch, why));
        }
        let data = format!("{} {}", setup.data.checksum(), setup.data.held_checksum());
        ranks.all_have(&format!("tokens of {}", setup.data.name), data.as_bytes())?;
    }
    Ok(Some(setup))
}
