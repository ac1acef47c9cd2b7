//! What another model said of rows, on disk: a file that only grows, of records found by what the rows hold.
//!
//! A record is the key of a row (the first half of the SHA-256 of its tokens, targets and documents), the length of what was said, that, and a
//! checksum. A file that was cut short, by a process that was killed, loses its last record; one that is damaged in a record computes
//! that anew.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use lowkey_batch::Rows;
use lowkey_files::NewFile;
use lowkey_files::lock::{Lock, lock};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// What a row is found by.
pub(crate) type Key = [u8; 16];

/// Begins the file: what it is, and the version of its format.
const HEAD: &[u8; 8] = b"lowkept1";

/// Bytes of a record beside what was said.
const FRAME: u64 = 16 + 4 + 4;

/// The file, open.
#[derive(Debug)]
pub(crate) struct Kept {
    path: PathBuf,
    state: Mutex<State>,
    _held: Lock,
}

#[derive(Debug)]
struct State {
    /// For reading; written at its end.
    reader: File,
    writer: File,
    /// Where what was said of a row lies, and how long it is.
    places: HashMap<Key, (u64, u32)>,
    end: u64,
    failed: Option<Error>,
}

/// The key of a row of some rows.
pub(crate) fn row_key(rows: Rows, row: usize) -> Key {
    let range = row * rows.seq_len..(row + 1) * rows.seq_len;
    let mut sum = Sha256::new();
    sum.update((rows.seq_len as u64).to_le_bytes());
    for i in range {
        sum.update(rows.input_ids[i].to_le_bytes());
        sum.update(rows.targets[i].to_le_bytes());
        sum.update(rows.document_starts[i].to_le_bytes());
    }
    let mut key = Key::default();
    key.copy_from_slice(&sum.finalize()[..16]);
    key
}

/// What tells a model directory from others: the start of the SHA-256 over the checksums of its weights and configuration.
///
/// # Errors
/// [`Error::Io`] or [`Error::File`] where a file cannot be read.
pub(crate) fn fingerprint(dir: &Path) -> Result<String> {
    let entries = std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))?;
    let names = entries.filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()));
    let mut names: Vec<String> = names.filter(|name| name == "config.json" || name.ends_with(".safetensors")).collect();
    names.sort_unstable();
    let mut sum = Sha256::new();
    for name in names {
        sum.update(lowkey_files::hash::sha256(&dir.join(&name))?);
    }
    Ok(lowkey_files::hash::hex(&sum.finalize()[..8]))
}

fn checksum(key: &Key, said: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(key), said)
}

impl Kept {
    /// Opens the file of that name in `dir`, which is made where it is not there.
    ///
    /// # Errors
    /// [`Error::File`] where another process has it open or something else bears its name; [`Error::Io`].
    pub(crate) fn open(dir: &Path, name: &str) -> Result<Self> {
        lowkey_files::write::create_dir(dir)?;
        let held = lock(&dir.join(format!(".{name}.lock")))?;
        let path = dir.join(format!("{name}.bin"));
        if !path.exists() {
            lowkey_files::write(&path, HEAD)?;
        }
        let mut reader = lowkey_files::open(&path)?;
        let (places, end, len) = places(&mut reader).map_err(|e| Error::io(&path, e))?.ok_or_else(|| {
            let why = "is not what is kept of another model here; remove it, or name another folder as objective.cache";
            Error::file(&path, why)
        })?;
        if end < len {
            // Only what is whole.
            let mut whole = NewFile::create(&path)?;
            let copied = reader.rewind().and_then(|()| std::io::copy(&mut reader.take(end), &mut whole));
            copied.map_err(|e| Error::io(&path, e))?;
            whole.commit()?;
            reader = lowkey_files::open(&path)?;
        }
        let writer = lowkey_files::write::append(&path)?;
        let state = State { reader, writer, places, end, failed: None };
        Ok(Self { path, state: Mutex::new(state), _held: held })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was said of a row, where that is known and whole.
    pub(crate) fn get(&self, key: Key) -> Option<Vec<u8>> {
        let state = &mut *self.state();
        let (at, len) = *state.places.get(&key)?;
        // The length was compared with that of the file.
        let mut said = vec![0; len as usize + 4];
        state.reader.seek(SeekFrom::Start(at)).ok()?;
        state.reader.read_exact(&mut said).ok()?;
        let sum = said.split_off(len as usize);
        (sum == checksum(&key, &said).to_le_bytes()).then_some(said)
    }

    /// Keeps what was said of a row. What the disk says against it, [`Kept::in_order`] tells.
    pub(crate) fn put(&self, key: Key, said: &[u8]) {
        let state = &mut *self.state();
        let Ok(len) = u32::try_from(said.len()) else { return };
        if state.failed.is_some() {
            return;
        }
        let record = [&key[..], &len.to_le_bytes(), said, &checksum(&key, said).to_le_bytes()].concat();
        match state.writer.write_all(&record) {
            Ok(()) => {
                state.places.insert(key, (state.end + 20, len));
                state.end += record.len() as u64;
            }
            Err(e) => state.failed = Some(Error::io(&self.path, e)),
        }
    }

    /// Whether everything could be written.
    ///
    /// # Errors
    /// [`Error::Io`], once.
    pub(crate) fn in_order(&self) -> Result<()> {
        self.state().failed.take().map_or(Ok(()), Err)
    }
}

/// Places by key, where the last whole record ends, and the length of the file.
type Places = (HashMap<Key, (u64, u32)>, u64, u64);

/// The records of a file; none where it is not such a file.
fn places(file: &mut File) -> std::io::Result<Option<Places>> {
    let len = file.metadata()?.len();
    let mut file = std::io::BufReader::new(file);
    let mut head = [0; HEAD.len()];
    if len < head.len() as u64 || file.read_exact(&mut head).is_err() || head != *HEAD {
        return Ok(None);
    }
    let (mut places, mut end) = (HashMap::new(), head.len() as u64);
    while len - end >= FRAME {
        let (mut key, mut said) = (Key::default(), [0; 4]);
        file.read_exact(&mut key)?;
        file.read_exact(&mut said)?;
        let said = u32::from_le_bytes(said);
        if u64::from(said) > len - end - FRAME {
            break;
        }
        places.insert(key, (end + 20, said));
        end += FRAME + u64::from(said);
        file.seek_relative(i64::from(said) + 4)?;
    }
    Ok(Some((places, end, len)))
}

#[cfg(test)]
mod tests;
