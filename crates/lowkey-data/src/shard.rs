//! A file of token ids with its document bounds: written once, read where it is needed ever after.
//!
//! | bytes | what (little-endian) |
//! |---|---|
//! | 0..8 | magic `LOWKEYTK` |
//! | 8..12 | version: 1 where every token is learnt, 2 where a mask says which |
//! | 12..14 | bytes per token: 2 where every id fits, else 4 |
//! | 14..16 | 1 where documents come in pairs, an answer that was chosen before one that was rejected; else 0 |
//! | 16..24 | number of tokens T |
//! | 24..32 | number of documents D |
//! | 32..40 | text bytes that the tokens stand for |
//! | 40..48 | vocabulary size |
//! | 48..80 | SHA-256 of the tokens, the offsets, the mask and the 48 bytes above, in this order |
//! | 80.. | T tokens, then D + 1 offsets (u64): document i is the tokens from offset i to offset i + 1 |
//! | then | version 2 alone: a bit for each token, the lowest of a byte first, 1 where the token is learnt; 0 to fill the last byte |
//!
//! The offsets come last because a corpus is written as it is read: how many documents it has is known at its end.

mod mask;
mod writer;

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use burn_dataset::{Dataset, DatasetError};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
pub(crate) use writer::ShardWriter;

const MAGIC: &[u8; 8] = b"LOWKEYTK";
/// Every token is learnt.
const PLAIN: u32 = 1;
/// A mask says which.
const MASKED: u32 = 2;
const HEADER: usize = 80;
/// The part of the header that the checksum covers.
const COVERED: usize = 48;

/// An open token file; cheap to clone.
///
/// The tokens are read from the open file as they are needed, and not mapped: a map of a file that another program cuts ends
/// the process, a read of it is an [`Error::Shard`]. Where the file has been touched since it was checked, it is checked again
/// before more of it is used.
#[derive(Debug, Clone)]
pub struct Shard {
    file: Arc<Open>,
    width: usize,
    tokens: usize,
    bytes: u64,
    vocab_size: usize,
    checksum: [u8; 32],
    offsets: Arc<[u64]>,
    masked: bool,
    pairs: bool,
}

/// The file behind a [`Shard`].
#[derive(Debug)]
struct Open {
    file: File,
    path: PathBuf,
    /// Length and time of the last change when it was last checked.
    checked: Mutex<Stamp>,
}

/// What changes when a file is written.
type Stamp = (u64, Option<SystemTime>);

/// What stands in a header.
struct Header {
    masked: bool,
    pairs: bool,
    width: usize,
    tokens: u64,
    documents: u64,
    bytes: u64,
    vocab_size: u64,
    checksum: [u8; 32],
    /// The bytes that the checksum covers.
    covered: [u8; COVERED],
}

impl Shard {
    /// Opens and checks a token file: format, lengths, bounds and checksum.
    pub fn open(path: &Path) -> Result<Self> {
        let file = lowkey_files::open(path)?;
        let stamp = stamp(&file).map_err(Error::io("read", path))?;
        let open = Open { file, path: path.to_path_buf(), checked: Mutex::new(stamp) };
        let header = open.header(stamp.0)?;
        let bounds = open.digest(&header)?;
        let offsets: Vec<u64> = bounds.as_chunks::<8>().0.iter().map(|&bytes| u64::from_le_bytes(bytes)).collect();
        let rising = offsets.windows(2).all(|pair| pair[0] < pair[1]);
        if offsets.first() != Some(&0) || !rising || offsets.last() != Some(&header.tokens) {
            return Err(open.fail("the document bounds do not rise from 0 to the number of tokens"));
        }
        if header.pairs && header.documents % 2 == 1 {
            return Err(open.fail("its documents are pairs, and one has no other: the file is damaged"));
        }
        Ok(Self {
            masked: header.masked,
            pairs: header.pairs,
            width: header.width,
            // No larger than the file, of which the header has been found to speak the truth.
            tokens: header.tokens as usize,
            bytes: header.bytes,
            vocab_size: usize::try_from(header.vocab_size).unwrap_or(usize::MAX),
            checksum: header.checksum,
            offsets: offsets.into(),
            file: Arc::new(open),
        })
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.tokens
    }

    /// Whether there is no token at all.
    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }

    /// Number of documents.
    pub fn documents(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Bytes of text that the tokens stand for.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Size of the vocabulary that the ids come from.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Whether a mask says which tokens are learnt. Where there is none, all are.
    pub fn is_masked(&self) -> bool {
        self.masked
    }

    /// Whether document 2i is an answer that was chosen, and document 2i + 1 the one that was rejected.
    pub fn is_pairs(&self) -> bool {
        self.pairs
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// The checksum in its header, in hex: the identity of its content.
    pub fn checksum(&self) -> String {
        lowkey_files::hash::hex(&self.checksum)
    }

    /// Where document `i` lies among the tokens.
    pub(crate) fn document_range(&self, i: usize) -> Option<Range<usize>> {
        let end = *self.offsets.get(i.checked_add(1)?)?;
        Some(*self.offsets.get(i)? as usize..end as usize)
    }

    /// The tokens of document `i`; none past the last one.
    ///
    /// # Errors
    /// [`Error::Shard`] where the shard is no longer what was opened, [`Error::Io`] from the disk.
    pub fn document(&self, i: usize) -> Result<Option<Vec<u32>>> {
        let Some(range) = self.document_range(i) else { return Ok(None) };
        let mut tokens = Vec::with_capacity(range.len());
        self.copy_range(range, &mut tokens)?;
        Ok(Some(tokens))
    }

    /// For each token of document `i` whether it is learnt; none past the last one.
    ///
    /// # Errors
    /// As [`Shard::document`].
    pub fn learnt(&self, i: usize) -> Result<Option<Vec<bool>>> {
        let Some(range) = self.document_range(i) else { return Ok(None) };
        let mut learnt = Vec::with_capacity(range.len());
        self.copy_learnt(range, &mut learnt)?;
        Ok(Some(learnt))
    }

    /// How many tokens are learnt.
    ///
    /// # Errors
    /// As [`Shard::document`].
    pub fn learnt_tokens(&self) -> Result<u64> {
        let mut sum = 0;
        for i in 0..self.documents() {
            sum += self.learnt(i)?.unwrap_or_default().iter().filter(|learnt| **learnt).count() as u64;
        }
        Ok(sum)
    }

    /// Appends whether each token in `range` is learnt, as far as the shard has them.
    ///
    /// # Errors
    /// As [`Shard::copy_range`].
    pub(crate) fn copy_learnt(&self, range: Range<usize>, out: &mut Vec<bool>) -> Result<()> {
        let end = range.end.min(self.tokens);
        let start = range.start.min(end);
        if !self.masked || start == end {
            out.resize(out.len() + (end - start), true);
            return Ok(());
        }
        self.file.still_whole(&self.checksum)?;
        let bytes = mask::bytes(start..end);
        let mut bits = vec![0; bytes.len()];
        let mask_at = HEADER + self.tokens * self.width + self.offsets.len() * 8;
        self.file.read_at(&mut bits, (mask_at + bytes.start) as u64)?;
        out.extend(mask::bits(&bits, start % 8, end - start));
        Ok(())
    }

    /// The document that token `i` belongs to.
    pub(crate) fn document_at(&self, i: usize) -> Option<usize> {
        // The last document that starts at or before the token.
        (i < self.tokens).then(|| self.offsets.partition_point(|&offset| offset <= i as u64) - 1)
    }

    /// Appends the tokens in `range` to `out`, as far as the shard has them.
    ///
    /// # Errors
    /// [`Error::Shard`] where the file is no longer what was opened: cut, or written over. [`Error::Io`] from the disk.
    pub(crate) fn copy_range(&self, range: Range<usize>, out: &mut Vec<u32>) -> Result<()> {
        let end = range.end.min(self.tokens);
        let start = range.start.min(end);
        if start == end {
            return Ok(());
        }
        self.file.still_whole(&self.checksum)?;
        let mut bytes = vec![0; (end - start) * self.width];
        self.file.read_at(&mut bytes, (HEADER + start * self.width) as u64)?;
        let first = out.len();
        if self.width == 2 {
            out.extend(bytes.as_chunks::<2>().0.iter().map(|&pair| u32::from(u16::from_le_bytes(pair))));
        } else {
            out.extend(bytes.as_chunks::<4>().0.iter().map(|&quad| u32::from_le_bytes(quad)));
        }
        // Written over between the two calls above, or under a clock that stood still.
        match out[first..].iter().find(|&&token| token as usize >= self.vocab_size) {
            Some(token) => {
                Err(self.file.fail(format!("{CHANGED} (token {token}, of a vocabulary of {})", self.vocab_size)))
            }
            None => Ok(()),
        }
    }
}

/// Said where a file is not what was opened.
const CHANGED: &str = "another program has changed the file while it was read; prepare the data again";

impl Open {
    fn fail(&self, message: impl Into<String>) -> Error {
        Error::Shard { path: self.path.clone(), message: message.into() }
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        read_exact_at(&self.file, buffer, offset).map_err(|reason| match reason.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                self.fail("another program has cut the file short; prepare the data again")
            }
            _ => Error::io("read", &self.path)(reason),
        })
    }

    /// The header of a file of `length` bytes, if the two agree.
    fn header(&self, length: u64) -> Result<Header> {
        let mut bytes = [0; HEADER];
        if length < HEADER as u64 {
            return Err(self.fail(format!("{length} bytes are too few for a token file; prepare the data again")));
        }
        self.read_at(&mut bytes, 0)?;
        if &bytes[..8] != MAGIC {
            return Err(self.fail("not a lowkey token file"));
        }
        let version = u32_at(&bytes, 8);
        if version != PLAIN && version != MASKED {
            let read = format!("format version {version}, but this build reads {PLAIN} and {MASKED}");
            return Err(self.fail(format!("{read}; prepare it again")));
        }
        let masked = version == MASKED;
        let (width, flags) = (u32_at(&bytes, 12) as usize & 0xFFFF, u32_at(&bytes, 12) >> 16);
        if flags > u32::from(masked) {
            return Err(self.fail(format!("its documents have the unknown mark {flags}: the file is damaged")));
        }
        if width != 2 && width != 4 {
            return Err(self.fail(format!("{width} bytes per token; it must be 2 or 4: the file is damaged")));
        }
        let [tokens, documents, text, vocab_size] = [16, 24, 32, 40].map(|at| u64_at(&bytes, at));
        let mask = if masked { u128::from(tokens.div_ceil(8)) } else { 0 };
        let expected = HEADER as u128 + u128::from(tokens) * width as u128 + (u128::from(documents) + 1) * 8 + mask;
        if expected != u128::from(length) {
            let message = format!("{length} bytes long, but its header says {expected}: cut short or damaged");
            return Err(self.fail(message));
        }
        let (mut covered, mut checksum) = ([0; COVERED], [0; 32]);
        covered.copy_from_slice(&bytes[..COVERED]);
        checksum.copy_from_slice(&bytes[COVERED..]);
        Ok(Header { masked, pairs: flags == 1, width, tokens, documents, bytes: text, vocab_size, checksum, covered })
    }

    /// Checks the checksum, and returns the document bounds as they stand in the file.
    fn digest(&self, header: &Header) -> Result<Vec<u8>> {
        let mut hash = Sha256::new();
        let mut block = vec![0; 1 << 20];
        let mut take = |hash: &mut Sha256, range: Range<u64>| -> Result<()> {
            let mut at = range.start;
            while at < range.end {
                let length = block.len().min(usize::try_from(range.end - at).unwrap_or(usize::MAX));
                self.read_at(&mut block[..length], at)?;
                hash.update(&block[..length]);
                at += length as u64;
            }
            Ok(())
        };
        let tail = HEADER as u64 + header.tokens * header.width as u64;
        take(&mut hash, HEADER as u64..tail)?;
        let mut bounds = vec![0; (header.documents as usize + 1) * 8];
        self.read_at(&mut bounds, tail)?;
        hash.update(&bounds);
        if header.masked {
            let mask = tail + bounds.len() as u64;
            take(&mut hash, mask..mask + header.tokens.div_ceil(8))?;
        }
        if hash.chain_update(header.covered).finalize().as_slice() != header.checksum {
            return Err(self.fail("the checksum does not match: the file is damaged; prepare the data again"));
        }
        Ok(bounds)
    }

    /// Checks a file again that has been touched since it was checked; its content is to have this checksum.
    fn still_whole(&self, checksum: &[u8; 32]) -> Result<()> {
        let now = stamp(&self.file).map_err(Error::io("read", &self.path))?;
        let mut checked = self.checked.lock().unwrap_or_else(PoisonError::into_inner);
        if *checked == now {
            return Ok(());
        }
        let header = self.header(now.0).map_err(|_| self.fail(CHANGED))?;
        if header.checksum != *checksum {
            return Err(self.fail(CHANGED));
        }
        self.digest(&header).map_err(|_| self.fail(CHANGED))?;
        *checked = now;
        Ok(())
    }
}

fn stamp(file: &File) -> std::io::Result<Stamp> {
    let found = file.metadata()?;
    Ok((found.len(), found.modified().ok()))
}

#[cfg(unix)]
fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut buffer: &mut [u8], mut offset: u64) -> std::io::Result<()> {
    while !buffer.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, buffer, offset) {
            Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Ok(length) => {
                buffer = &mut buffer[length..];
                offset += length as u64;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

impl Dataset<Vec<u32>> for Shard {
    fn get(&self, index: usize) -> Result<Vec<u32>, DatasetError> {
        let missing = || self.file.fail(format!("there is no document {index}; the shard has {}", self.documents()));
        self.document(index).and_then(|found| found.ok_or_else(missing)).map_err(DatasetError::new)
    }

    fn len(&self) -> usize {
        self.documents()
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |chunk| u32::from_le_bytes(*chunk))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |chunk| u64::from_le_bytes(*chunk))
}

#[cfg(test)]
pub(crate) mod tests;
