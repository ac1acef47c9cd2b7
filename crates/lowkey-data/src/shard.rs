//! A file of token ids with its document bounds: written once, memory-mapped ever after.
//!
//! | bytes | what (little-endian) |
//! |---|---|
//! | 0..8 | magic `LOWKEYTK` |
//! | 8..12 | version, 1 |
//! | 12..16 | bytes per token: 2 where every id fits, else 4 |
//! | 16..24 | number of tokens T |
//! | 24..32 | number of documents D |
//! | 32..40 | text bytes that the tokens stand for |
//! | 40..48 | vocabulary size |
//! | 48..80 | SHA-256 of the tokens, the offsets and the 48 bytes above, in this order |
//! | 80.. | T tokens, then D + 1 offsets (u64): document i is the tokens from offset i to offset i + 1 |
//!
//! The offsets come last because a corpus is written as it is read: how many documents it has is known at its end.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use atomic_write_file::AtomicWriteFile;
use burn_dataset::{Dataset, DatasetError};
use memmap2::Mmap;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::tokenizer::hex;

const MAGIC: &[u8; 8] = b"LOWKEYTK";
const VERSION: u32 = 1;
const HEADER: usize = 80;
/// The part of the header that the checksum covers.
const COVERED: usize = 48;

/// An open token file; cheap to clone.
#[derive(Debug, Clone)]
pub struct Shard {
    map: Arc<Mmap>,
    path: PathBuf,
    width: usize,
    tokens: usize,
    documents: usize,
    bytes: u64,
    vocab_size: usize,
}

impl Shard {
    /// Opens and checks a token file: format, lengths, bounds and checksum.
    pub fn open(path: &Path) -> Result<Self> {
        let fail = |message: String| Error::Shard { path: path.to_path_buf(), message };
        let file = File::open(path).map_err(Error::io("open", path))?;
        // SAFETY: the file is written whole and renamed into place, and nothing here writes to it afterwards. A
        // foreign process that truncates it under us could fault a read, as with every mapped file.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        if map.len() < HEADER {
            return Err(fail(format!("{} bytes are too few for a token file; prepare the data again", map.len())));
        }
        if &map[..8] != MAGIC {
            return Err(fail("not a lowkey token file".to_owned()));
        }
        let version = u32_at(&map, 8);
        if version != VERSION {
            return Err(fail(format!("format version {version}, but this build reads {VERSION}; prepare it again")));
        }
        let width = u32_at(&map, 12) as usize;
        if width != 2 && width != 4 {
            return Err(fail(format!("{width} bytes per token; it must be 2 or 4: the file is damaged")));
        }
        let [tokens, documents, bytes, vocab_size] = [16, 24, 32, 40].map(|at| u64_at(&map, at));
        let expected = HEADER as u128 + u128::from(tokens) * width as u128 + (u128::from(documents) + 1) * 8;
        if expected != map.len() as u128 {
            let message = format!("{} bytes long, but its header says {expected}: cut short or damaged", map.len());
            return Err(fail(message));
        }
        let digest = Sha256::new().chain_update(&map[HEADER..]).chain_update(&map[..COVERED]).finalize();
        if digest.as_slice() != &map[COVERED..HEADER] {
            return Err(fail("the checksum does not match: the file is damaged; prepare the data again".to_owned()));
        }
        let shard = Self {
            width,
            // No larger than the file, whose length is a usize.
            tokens: tokens as usize,
            documents: documents as usize,
            bytes,
            vocab_size: usize::try_from(vocab_size).unwrap_or(usize::MAX),
            path: path.to_path_buf(),
            map: Arc::new(map),
        };
        let increasing = (0..shard.documents).all(|i| shard.offset(i) < shard.offset(i + 1));
        if shard.offset(0) != 0 || !increasing || shard.offset(shard.documents) != shard.tokens {
            return Err(fail("the document bounds do not rise from 0 to the number of tokens".to_owned()));
        }
        Ok(shard)
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
        self.documents
    }

    /// Bytes of text that the tokens stand for.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Size of the vocabulary that the ids come from.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The checksum in its header, in hex: the identity of its content.
    pub fn checksum(&self) -> String {
        hex(&self.map[COVERED..HEADER])
    }

    /// Where document `i` lies among the tokens.
    pub fn document_range(&self, i: usize) -> Option<Range<usize>> {
        (i < self.documents).then(|| self.offset(i)..self.offset(i + 1))
    }

    /// The tokens of document `i`.
    pub fn document(&self, i: usize) -> Option<Vec<u32>> {
        let range = self.document_range(i)?;
        let mut tokens = Vec::with_capacity(range.len());
        self.copy_range(range, &mut tokens);
        Some(tokens)
    }

    /// The document that token `i` belongs to.
    pub fn document_at(&self, i: usize) -> Option<usize> {
        if i >= self.tokens {
            return None;
        }
        // The last document that starts at or before the token.
        let (mut low, mut high) = (0, self.documents);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.offset(middle) <= i { low = middle } else { high = middle }
        }
        Some(low)
    }

    /// Token `i`.
    pub fn token(&self, i: usize) -> Option<u32> {
        let at = HEADER + i * self.width;
        (i < self.tokens).then(|| match self.width {
            2 => u32::from(u16::from_le_bytes([self.map[at], self.map[at + 1]])),
            _ => u32_at(&self.map, at),
        })
    }

    /// Appends the tokens in `range` to `out`, as far as the shard has them.
    pub fn copy_range(&self, range: Range<usize>, out: &mut Vec<u32>) {
        let end = range.end.min(self.tokens);
        let start = range.start.min(end);
        let bytes = &self.map[HEADER + start * self.width..HEADER + end * self.width];
        if self.width == 2 {
            out.extend(bytes.as_chunks::<2>().0.iter().map(|&pair| u32::from(u16::from_le_bytes(pair))));
        } else {
            out.extend(bytes.as_chunks::<4>().0.iter().map(|&quad| u32::from_le_bytes(quad)));
        }
    }

    /// Offset `i` of the `documents + 1` offsets.
    fn offset(&self, i: usize) -> usize {
        u64_at(&self.map, HEADER + self.tokens * self.width + i * 8) as usize
    }
}

impl Dataset<Vec<u32>> for Shard {
    fn get(&self, index: usize) -> Result<Vec<u32>, DatasetError> {
        self.document(index).ok_or_else(|| {
            let message = format!("there is no document {index}; the shard has {}", self.documents);
            DatasetError::new(Error::Shard { path: self.path.clone(), message })
        })
    }

    fn len(&self) -> usize {
        self.documents
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |chunk| u32::from_le_bytes(*chunk))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |chunk| u64::from_le_bytes(*chunk))
}

/// Writes a token file document by document. The file appears at its path only when [`ShardWriter::finish`] succeeds.
pub struct ShardWriter {
    file: BufWriter<AtomicWriteFile>,
    path: PathBuf,
    width: usize,
    vocab_size: usize,
    bytes: u64,
    offsets: Vec<u64>,
    hash: Sha256,
    scratch: Vec<u8>,
}

impl ShardWriter {
    /// Starts a file for ids below `vocab_size`.
    pub fn create(path: &Path, vocab_size: usize) -> Result<Self> {
        let mut file = AtomicWriteFile::open(path).map_err(Error::io("write", path))?;
        file.write_all(&[0; HEADER]).map_err(Error::io("write", path))?;
        Ok(Self {
            file: BufWriter::with_capacity(1 << 20, file),
            path: path.to_path_buf(),
            width: if vocab_size <= 1 << 16 { 2 } else { 4 },
            vocab_size,
            bytes: 0,
            offsets: vec![0],
            hash: Sha256::new(),
            scratch: Vec::new(),
        })
    }

    /// Appends a document of `tokens` that stands for `bytes` bytes of text. One without tokens is left out.
    pub fn push(&mut self, tokens: &[u32], bytes: u64) -> Result<()> {
        self.scratch.clear();
        for &token in tokens {
            if token as usize >= self.vocab_size {
                let message = format!("token {token} is outside the vocabulary of {}", self.vocab_size);
                return Err(Error::Shard { path: self.path.clone(), message });
            }
            self.scratch.extend_from_slice(&token.to_le_bytes()[..self.width]);
        }
        self.bytes += bytes;
        if !tokens.is_empty() {
            self.offsets.push(self.tokens() + tokens.len() as u64);
        }
        self.hash.update(&self.scratch);
        self.file.write_all(&self.scratch).map_err(Error::io("write", &self.path))
    }

    /// Tokens written so far.
    pub fn tokens(&self) -> u64 {
        self.offsets.last().copied().unwrap_or(0)
    }

    /// Documents written so far.
    pub fn documents(&self) -> u64 {
        self.offsets.len() as u64 - 1
    }

    /// Writes offsets and header and puts the file in its place.
    pub fn finish(self) -> Result<()> {
        let mut header = Vec::with_capacity(HEADER);
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&(self.width as u32).to_le_bytes());
        for number in [self.tokens(), self.documents(), self.bytes, self.vocab_size as u64] {
            header.extend_from_slice(&number.to_le_bytes());
        }
        let offsets: Vec<u8> = self.offsets.iter().flat_map(|offset| offset.to_le_bytes()).collect();
        let digest = self.hash.chain_update(&offsets).chain_update(&header).finalize();
        header.extend_from_slice(&digest);

        let write = |mut file: BufWriter<AtomicWriteFile>| -> std::io::Result<()> {
            file.write_all(&offsets)?;
            let mut file = file.into_inner()?;
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&header)?;
            file.commit()
        };
        write(self.file).map_err(Error::io("write", &self.path))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A shard of these documents, and the folder that holds it.
    pub(crate) fn shard_of(documents: &[Vec<u32>], vocab_size: usize) -> (tempfile::TempDir, Shard) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tokens");
        let mut writer = ShardWriter::create(&path, vocab_size).unwrap();
        for document in documents {
            writer.push(document, document.len() as u64 * 3).unwrap();
        }
        writer.finish().unwrap();
        let shard = Shard::open(&path).unwrap();
        (dir, shard)
    }

    #[test]
    fn documents_round_trip_in_both_widths() {
        for vocab_size in [1 << 16, (1 << 16) + 1] {
            let top = vocab_size as u32 - 1;
            let documents = [vec![1, 2, top], vec![0], vec![7; 100]];
            let (_dir, shard) = shard_of(&documents, vocab_size);
            assert_eq!((shard.len(), shard.documents(), shard.bytes()), (104, 3, 312));
            assert_eq!(shard.vocab_size(), vocab_size);
            for (i, document) in documents.iter().enumerate() {
                assert_eq!(&shard.document(i).unwrap(), document);
            }
            assert_eq!((shard.token(2), shard.token(3), shard.token(104)), (Some(top), Some(0), None));
            assert_eq!([0, 2, 3, 4, 103].map(|i| shard.document_at(i)), [0, 0, 1, 2, 2].map(Some));
            assert_eq!((shard.document_at(104), shard.document(3)), (None, None));
            let mut out = vec![9];
            shard.copy_range(2..5, &mut out);
            shard.copy_range(103..300, &mut out);
            shard.copy_range(200..300, &mut out);
            assert_eq!(out, [9, top, 0, 7, 7]);
            let bytes = std::fs::metadata(shard.path()).unwrap().len();
            assert_eq!(bytes, 80 + 104 * shard.width as u64 + 4 * 8);
        }
    }

    #[test]
    fn a_shard_is_a_burn_dataset_of_documents() {
        let (_dir, shard) = shard_of(&[vec![1, 2], vec![3]], 10);
        assert_eq!(Dataset::len(&shard), 2);
        let items: Vec<Vec<u32>> = shard.iter().map(|item| item.unwrap()).collect();
        assert_eq!(items, [vec![1, 2], vec![3]]);
        assert!(shard.get(2).unwrap_err().to_string().contains("no document 2"));
    }

    #[test]
    fn an_empty_shard_opens() {
        let (_dir, shard) = shard_of(&[], 10);
        assert!(shard.is_empty() && shard.documents() == 0 && shard.document_at(0).is_none());
    }

    #[test]
    fn ids_outside_the_vocabulary_are_refused_and_nothing_appears() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tokens");
        let mut writer = ShardWriter::create(&path, 10).unwrap();
        assert!(writer.push(&[1, 10], 2).unwrap_err().to_string().contains("token 10"));
        drop(writer);
        assert!(!path.exists());
    }

    #[test]
    fn every_truncation_and_every_flipped_byte_is_an_error() {
        let (_dir, shard) = shard_of(&[vec![1, 2, 3], vec![4, 5]], 300);
        let path = shard.path().to_path_buf();
        let good = std::fs::read(&path).unwrap();
        drop(shard);
        let refused = |bytes: &[u8]| {
            let copy = path.with_extension("bad");
            std::fs::write(&copy, bytes).unwrap();
            Shard::open(&copy).is_err()
        };
        assert!(!refused(&good));
        for length in 0..good.len() {
            assert!(refused(&good[..length]), "cut to {length}");
        }
        for at in 0..good.len() {
            for flip in [1, 0x80] {
                let mut bytes = good.clone();
                bytes[at] ^= flip;
                assert!(refused(&bytes), "byte {at}");
            }
        }
        assert!(refused(&[&good[..], &[0]].concat()));
    }

    #[test]
    fn a_wrong_header_is_refused_even_under_a_right_checksum() {
        let (_dir, shard) = shard_of(&[vec![1, 2, 3], vec![4, 5]], 300);
        let path = shard.path().to_path_buf();
        let good = std::fs::read(&path).unwrap();
        drop(shard);
        let refuse = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = good.clone();
            change(&mut bytes);
            let digest = Sha256::new().chain_update(&bytes[HEADER..]).chain_update(&bytes[..COVERED]).finalize();
            bytes[COVERED..HEADER].copy_from_slice(&digest);
            let copy = path.with_extension("bad");
            std::fs::write(&copy, bytes).unwrap();
            Shard::open(&copy).map(|_| ()).map_err(|e| e.to_string())
        };
        let second_offset = HEADER + 5 * 2 + 8;
        refuse(&|_| {}).unwrap();
        for (at, value, expected) in [
            (8, 2, "format version 2"),
            (12, 3, "3 bytes per token"),
            (16, 6, "its header says"),
            (24, 3, "its header says"),
            (second_offset, 0, "bounds"),
            (second_offset, 200, "bounds"),
            (second_offset - 8, 1, "bounds"),
            (second_offset + 8, 4, "bounds"),
        ] {
            let message = refuse(&|bytes| bytes[at] = value).unwrap_err();
            assert!(message.contains(expected), "{at}: {message}");
        }
        let huge = refuse(&|bytes| bytes[16..24].fill(0xFF)).unwrap_err();
        assert!(huge.contains("its header says"), "{huge}");
    }
}
