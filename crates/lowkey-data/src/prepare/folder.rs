//! The folder that a dataset is prepared in: whose it is, and how it is replaced.

use std::path::Path;
use std::time::Duration;

use lowkey_files::{
    Replace, Staging,
    mark::{Kind, MARK, Mark},
};

use super::{Progress, Watch, read_manifest};
use crate::error::{Error, Result};

/// The file that describes a prepared folder.
pub(super) const MANIFEST: &str = "manifest.json";

/// Everything that a prepared folder may hold beside its mark.
const NAMES: [&str; 7] = [
    MANIFEST,
    "train.tokens",
    "validation.tokens",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// Between two looks at a lock that another process holds.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Begins a folder that will stand at `out`; waits while another process makes one there.
pub(super) fn begin(out: &Path, watch: &mut Watch) -> Result<Staging> {
    loop {
        // What may be replaced is decided here, by more than a mark: see `is_ours`.
        match Staging::begin(out, Kind::Data, Replace::Vouched) {
            Ok(staging) => {
                is_ours(staging.target())?;
                return Ok(staging);
            }
            Err(e) if e.is_held() => {
                watch.tell(Progress::Waiting { dir: out.to_path_buf() })?;
                std::thread::sleep(LOOK_EVERY);
            }
            Err(e) => return Err(e.into()),
        }
    }
}

/// Puts a finished folder in its place.
pub(super) fn commit(staging: Staging) -> Result<()> {
    // Somebody may have put something there while this was at work.
    is_ours(staging.target())?;
    // What is left of the old one is hidden, and goes with the next.
    staging.commit()?;
    Ok(())
}

/// Refuses a folder that holds anything but what a preparation put there. Token files may be damaged: they are made anew from
/// the text, and nobody edits them. A folder from before there were marks is known by its manifest.
fn is_ours(dir: &Path) -> Result<()> {
    let refuse = |name: &str, why: &str| {
        let path = if name.is_empty() { dir.to_path_buf() } else { dir.join(name) };
        Err(Error::Foreign { path, message: why.to_owned() })
    };
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io("read", dir)(e)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(Error::io("read", dir))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_file = entry.file_type().map_err(Error::io("read", dir))?.is_file();
        // Unfinished files of earlier versions, and of this one.
        let unfinished = NAMES.iter().any(|known| name.strip_prefix('.').is_some_and(|name| name.starts_with(known)));
        if name == MARK || (unfinished && is_file) {
            continue;
        }
        if !is_file || !NAMES.contains(&name.as_str()) {
            return refuse(&name, "is not part of a prepared dataset, and would be lost");
        }
        names.push(name);
    }
    if names.is_empty() {
        return Ok(());
    }
    let Some(mark) = Mark::read(dir)? else {
        return match read_manifest(dir) {
            Ok(_) => Ok(()),
            Err(_) => {
                refuse("", "holds files of these names, and neither mark nor manifest says that lowkey prepared them")
            }
        };
    };
    if mark.kind != Kind::Data {
        return refuse("", &format!("is {}, not a prepared dataset", mark.kind.name()));
    }
    for name in names {
        let Some(expected) = mark.files.get(&name) else {
            return refuse(&name, "was not written by lowkey, and would be lost");
        };
        let damaged = !name.ends_with(".tokens") && expected.is_some();
        if damaged && Some(lowkey_files::hash::sha256(&dir.join(&name))?) != *expected {
            return refuse(&name, "has been changed since lowkey wrote it, and would be lost");
        }
    }
    Ok(())
}
