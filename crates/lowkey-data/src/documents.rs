//! Reading documents out of source files: plain text, JSONL and Parquet.
//!
//! Whatever a file's size, no more of it is held than one record ([`LARGEST_RECORD`]) or, of a text, a few mebibytes: a
//! document comes in [`Piece`]s.

mod columns;
mod jsonl;
mod kind;
mod meter;
mod open;
mod pieces;
mod rows;
mod text;

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
pub(crate) use kind::{Kind, kind};
pub(crate) use meter::Meter;
pub(crate) use pieces::{PART, parts};
pub(crate) use text::{characters, holds};

/// Bytes of a JSONL line, and of a text in a Parquet file, at most: these are held whole. (A text file has no such bound.)
pub(crate) const LARGEST_RECORD: usize = 256 << 20;

/// How documents lie in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Format {
    /// The file is one document, or several with a separator between them.
    Text { separator: Option<String> },
    /// One JSON object a line, the text under `field`.
    Jsonl { field: String },
    /// One row a document, the text in `column`.
    Parquet { column: String },
}

/// A part of a document, and all of it where it is not long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Never empty.
    pub(crate) text: String,
    /// Whether it is the first of its document.
    pub(crate) begins: bool,
    /// Whether it is the last.
    pub(crate) ends: bool,
    /// Whether it stands behind the place where [`read_cut`] cuts a file in two.
    pub(crate) tail: bool,
}

/// A record of a file: a line of JSONL, or a row of Parquet.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Found {
    /// "line" or "row".
    pub(crate) unit: &'static str,
    /// Its number, counted from 1.
    pub(crate) number: u64,
    /// Its fields, or why they cannot be read.
    pub(crate) value: std::result::Result<Map<String, Value>, String>,
}

/// Records of one file.
pub(crate) type FoundRecords = Box<dyn Iterator<Item = Result<Found>>>;

/// The records of a JSONL or Parquet file in order; of Parquet only the columns in `fields`. After an error the iterator ends, but not
/// after a record that cannot be read.
pub(crate) fn records(path: &Path, format: &Format, fields: &[&str], meter: &Meter) -> FoundRecords {
    let opened: Result<FoundRecords> = match format {
        Format::Text { .. } => Err(unusable(path, "plain text has no records")),
        Format::Jsonl { .. } => jsonl::objects(path, meter).map(|found| Box::new(found) as FoundRecords),
        Format::Parquet { .. } => rows::objects(path, fields, meter),
    };
    let mut failed = false;
    match opened {
        Err(error) => Box::new(std::iter::once(Err(error))),
        Ok(found) => Box::new(found.take_while(move |found| !std::mem::replace(&mut failed, found.is_err()))),
    }
}

/// Pieces of the documents of one file.
type Pieces = Box<dyn Iterator<Item = Result<Piece>> + Send>;

/// The documents of `path` in order, piece by piece; empty ones are left out. Text and JSONL are decompressed by the endings
/// `.gz` and `.zst`. After an error the iterator ends.
pub(crate) fn read(path: &Path, format: &Format, meter: &Meter) -> Pieces {
    until_error(match format {
        Format::Text { separator } => text::read(path, text::Ends::of(separator.as_deref()), meter),
        Format::Jsonl { field } => jsonl::read(path, field, meter),
        Format::Parquet { column } => columns::read(path, column, meter),
    })
}

/// A text file as two documents: its first `head` characters, and what comes after them.
pub(crate) fn read_cut(path: &Path, head: u64, meter: &Meter) -> Pieces {
    until_error(text::read(path, text::Ends::After(head), meter))
}

fn until_error(opened: Result<Pieces>) -> Pieces {
    let mut failed = false;
    match opened {
        Err(error) => Box::new(std::iter::once(Err(error))),
        Ok(pieces) => Box::new(pieces.take_while(move |piece| !std::mem::replace(&mut failed, piece.is_err()))),
    }
}

/// The pieces of a document that is held whole.
fn pieces_of(text: String) -> Vec<Piece> {
    let piece = |text: String, begins, ends| Piece { text, begins, ends, tail: false };
    if text.is_empty() {
        return Vec::new();
    }
    if text.len() <= PART {
        return vec![piece(text, true, true)];
    }
    let parts = parts(&text, PART);
    let last = parts.len() - 1;
    parts.into_iter().enumerate().map(|(i, part)| piece(part.to_owned(), i == 0, i == last)).collect()
}

/// An error of a source file that is not what it should be.
fn unusable(path: &Path, message: impl Into<String>) -> Error {
    Error::Source { path: path.to_path_buf(), message: message.into() }
}

#[cfg(test)]
mod tests;
