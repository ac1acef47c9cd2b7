//! Writing token files.

use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use lowkey_files::NewFile;
use sha2::{Digest, Sha256};

use super::mask::Mask;
use super::{HEADER, MAGIC, MASKED, PLAIN, Shard};
use crate::error::{Error, Result};

/// Writes a token file document by document. The file appears at its path only when [`ShardWriter::finish`] succeeds.
pub(crate) struct ShardWriter {
    file: BufWriter<NewFile>,
    path: PathBuf,
    width: usize,
    vocab_size: usize,
    bytes: u64,
    tokens: u64,
    offsets: Vec<u64>,
    hash: Sha256,
    scratch: Vec<u8>,
    /// Which tokens are learnt, where not all are.
    mask: Option<Mask>,
    pairs: bool,
}

impl ShardWriter {
    /// Starts a file for ids below `vocab_size`.
    pub(crate) fn create(path: &Path, vocab_size: usize) -> Result<Self> {
        let mut file = NewFile::create(path)?;
        file.write_all(&[0; HEADER]).map_err(Error::io("write", path))?;
        Ok(Self {
            file: BufWriter::with_capacity(1 << 20, file),
            path: path.to_path_buf(),
            width: if vocab_size <= 1 << 16 { 2 } else { 4 },
            vocab_size,
            bytes: 0,
            tokens: 0,
            offsets: vec![0],
            hash: Sha256::new(),
            scratch: Vec::new(),
            mask: None,
            pairs: false,
        })
    }

    /// The same for documents of which only some tokens are learnt; `pairs`: they come in pairs.
    pub(crate) fn masked(path: &Path, vocab_size: usize, pairs: bool) -> Result<Self> {
        Ok(Self { mask: Some(Mask::default()), pairs, ..Self::create(path, vocab_size)? })
    }

    /// Appends a whole document and which of its tokens are learnt. The first never is: nothing stands before it.
    pub(crate) fn push_learnt(&mut self, tokens: &[u32], learnt: &[bool], bytes: u64) -> Result<()> {
        if let Some(mask) = &mut self.mask {
            mask.extend(tokens.iter().enumerate().map(|(i, _)| i > 0 && learnt.get(i) == Some(&true)));
        }
        self.write(tokens, bytes)?;
        self.end_document();
        Ok(())
    }

    /// Appends to a document that goes on until [`ShardWriter::end_document`].
    pub(crate) fn extend(&mut self, tokens: &[u32], bytes: u64) -> Result<()> {
        if let Some(mask) = &mut self.mask {
            mask.extend(tokens.iter().map(|_| true));
        }
        self.write(tokens, bytes)
    }

    fn write(&mut self, tokens: &[u32], bytes: u64) -> Result<()> {
        self.scratch.clear();
        for &token in tokens {
            if token as usize >= self.vocab_size {
                let message = format!("token {token} is outside the vocabulary of {}", self.vocab_size);
                return Err(Error::Shard { path: self.path.clone(), message });
            }
            self.scratch.extend_from_slice(&token.to_le_bytes()[..self.width]);
        }
        self.bytes += bytes;
        self.tokens += tokens.len() as u64;
        self.hash.update(&self.scratch);
        self.file.write_all(&self.scratch).map_err(Error::io("write", &self.path))
    }

    /// Ends a document; one without tokens is none.
    pub(crate) fn end_document(&mut self) {
        if self.is_open() {
            self.offsets.push(self.tokens);
        }
    }

    /// Appends the documents of another file of the same form; `open`: its last one goes on.
    pub(crate) fn append(&mut self, shard: &Shard, open: bool) -> Result<()> {
        for i in 0..shard.documents() {
            let tokens = shard.document(i)?.unwrap_or_default();
            if let Some(mask) = &mut self.mask {
                mask.extend(shard.learnt(i)?.unwrap_or_default().into_iter());
            }
            self.write(&tokens, 0)?;
            if !(open && i + 1 == shard.documents()) {
                self.end_document();
            }
        }
        self.bytes += shard.bytes();
        Ok(())
    }

    /// Whether the last document goes on.
    pub(crate) fn is_open(&self) -> bool {
        self.offsets.last() != Some(&self.tokens)
    }

    /// Bytes of text that the tokens written so far stand for.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Tokens written so far.
    pub(crate) fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Documents ended so far.
    pub(crate) fn documents(&self) -> u64 {
        self.offsets.len() as u64 - 1
    }

    /// Writes offsets and header and puts the file in its place.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.end_document();
        let mut header = Vec::with_capacity(HEADER);
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&if self.mask.is_some() { MASKED } else { PLAIN }.to_le_bytes());
        header.extend_from_slice(&(self.width as u32 | u32::from(self.pairs) << 16).to_le_bytes());
        for number in [self.tokens(), self.documents(), self.bytes, self.vocab_size as u64] {
            header.extend_from_slice(&number.to_le_bytes());
        }
        let offsets: Vec<u8> = self.offsets.iter().flat_map(|offset| offset.to_le_bytes()).collect();
        let mask = self.mask.map(Mask::into_bytes).unwrap_or_default();
        let digest = self.hash.chain_update(&offsets).chain_update(&mask).chain_update(&header).finalize();
        header.extend_from_slice(&digest);

        let write = |mut file: BufWriter<NewFile>| -> std::io::Result<NewFile> {
            file.write_all(&offsets)?;
            file.write_all(&mask)?;
            let mut file = file.into_inner()?;
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&header)?;
            Ok(file)
        };
        Ok(write(self.file).map_err(Error::io("write", &self.path))?.commit()?)
    }
}
