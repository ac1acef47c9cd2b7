//! Plain text files, read block by block.

use std::collections::VecDeque;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::meter::Meter;
use super::open::{BLOCK, open};
use super::pieces::Cutter;
use super::{PART, Piece, Pieces};
use crate::error::{Error, Result};

/// The mark that some programs put before a text in UTF-8; it is no part of it.
pub(super) const BOM: &[u8] = b"\xef\xbb\xbf";

/// Where the documents of a file end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ends {
    /// At its end.
    File,
    /// At each separator.
    Separator(String),
    /// After so many characters, and at its end.
    After(u64),
}

impl Ends {
    pub(super) fn of(separator: Option<&str>) -> Self {
        separator.map_or(Self::File, |separator| Self::Separator(separator.to_owned()))
    }
}

/// The documents of a text file.
pub(super) fn read(path: &Path, ends: Ends, meter: &Meter) -> Result<Pieces> {
    let documents = Documents {
        blocks: Blocks::open(path, meter)?,
        ends,
        pending: String::new(),
        cutter: Cutter::new(PART),
        begins: true,
        tail: false,
        ready: VecDeque::new(),
        done: false,
    };
    Ok(Box::new(documents))
}

/// How many characters a text file has; calls `each` with every block of it.
pub(crate) fn characters(path: &Path, meter: &Meter, each: &mut dyn FnMut() -> Result<()>) -> Result<u64> {
    Blocks::open(path, meter)?.try_fold(0, |sum, block| {
        let count = block?.chars().count() as u64;
        each()?;
        Ok(sum + count)
    })
}

/// Whether a text file has `word` in it.
pub(crate) fn holds(path: &Path, word: &str) -> Result<bool> {
    let mut before = String::new();
    for block in Blocks::open(path, &Meter::default())? {
        before.push_str(&block?);
        if before.contains(word) {
            return Ok(true);
        }
        let keep = before.floor_char_boundary(before.len().saturating_sub(word.len()));
        before.drain(..keep);
    }
    Ok(false)
}

/// A text file in blocks of whole characters.
struct Blocks {
    reader: Box<dyn Read + Send>,
    path: PathBuf,
    /// Bytes read and not yet returned: the beginning of a character.
    rest: Vec<u8>,
    /// Where `rest` stands in the file.
    offset: u64,
    done: bool,
}

impl Blocks {
    fn open(path: &Path, meter: &Meter) -> Result<Self> {
        Ok(Self {
            reader: Box::new(open(path, meter)?),
            path: path.to_path_buf(),
            rest: Vec::new(),
            offset: 0,
            done: false,
        })
    }

    fn read(&mut self) -> Result<Option<String>> {
        while !self.done {
            let read = (&mut self.reader).take(BLOCK as u64).read_to_end(&mut self.rest);
            let length = read.map_err(Error::io("read", &self.path))?;
            self.done = length < BLOCK;
            if self.offset == 0 && self.rest.starts_with(BOM) {
                self.rest.drain(..BOM.len());
                self.offset = BOM.len() as u64;
            }
            let valid = match std::str::from_utf8(&self.rest) {
                Ok(text) => text.len(),
                Err(e) if e.error_len().is_none() && !self.done => e.valid_up_to(),
                Err(e) => {
                    let offset = self.offset + e.valid_up_to() as u64;
                    return Err(Error::Utf8 { path: self.path.clone(), offset });
                }
            };
            let rest = self.rest.split_off(valid);
            let block = String::from_utf8(std::mem::replace(&mut self.rest, rest))
                .map_err(|_| Error::Utf8 { path: self.path.clone(), offset: self.offset })?;
            self.offset += valid as u64;
            if !block.is_empty() {
                return Ok(Some(block));
            }
        }
        Ok(None)
    }
}

impl Iterator for Blocks {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose()
    }
}

struct Documents {
    blocks: Blocks,
    ends: Ends,
    /// The end of what was read, which may be the beginning of a separator.
    pending: String,
    cutter: Cutter,
    begins: bool,
    tail: bool,
    ready: VecDeque<Piece>,
    done: bool,
}

impl Documents {
    /// Takes more text of the document that is being read.
    fn push(&mut self, text: &str) {
        self.cutter.push(text);
        while let Some(text) = self.cutter.next() {
            self.piece(text, false);
        }
    }

    /// Ends the document.
    fn end(&mut self) {
        while let Some(text) = self.cutter.take() {
            self.piece(text, false);
        }
        let rest = self.cutter.rest();
        // What a cut leaves is never empty: this is an empty document.
        if !rest.is_empty() {
            self.piece(rest, true);
        }
        self.begins = true;
    }

    fn piece(&mut self, text: String, ends: bool) {
        self.ready.push_back(Piece { text, begins: self.begins, ends, tail: self.tail });
        self.begins = false;
    }

    fn block(&mut self, block: &str) {
        match self.ends.clone() {
            Ends::File => self.push(block),
            Ends::Separator(separator) => {
                let pending = std::mem::take(&mut self.pending) + block;
                let mut rest = pending.as_str();
                while let Some((document, after)) = rest.split_once(&separator) {
                    self.push(document);
                    self.end();
                    rest = after;
                }
                let keep = rest.floor_char_boundary(rest.len().saturating_sub(separator.len() - 1));
                self.push(&rest[..keep]);
                self.pending = rest[keep..].to_owned();
            }
            Ends::After(left) => {
                let cut = if self.tail {
                    None
                } else {
                    block.char_indices().nth(usize::try_from(left).unwrap_or(usize::MAX))
                };
                match cut {
                    Some((cut, _)) => {
                        self.push(&block[..cut]);
                        self.end();
                        self.tail = true;
                        self.push(&block[cut..]);
                    }
                    None => {
                        self.ends = Ends::After(left.saturating_sub(block.chars().count() as u64));
                        self.push(block);
                    }
                }
            }
        }
    }
}

impl Iterator for Documents {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                return Some(Ok(piece));
            }
            if self.done {
                return None;
            }
            match self.blocks.next() {
                Some(Ok(block)) => self.block(&block),
                Some(Err(error)) => return Some(Err(error)),
                None => {
                    let pending = std::mem::take(&mut self.pending);
                    self.push(&pending);
                    self.end();
                    self.done = true;
                }
            }
        }
    }
}
