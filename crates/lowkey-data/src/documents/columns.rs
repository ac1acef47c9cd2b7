//! A string column of a Parquet file, some rows at a time.

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};

use parquet::basic::{ConvertedType, Type as PhysicalType};
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::schema::types::ColumnDescriptor;

use super::meter::{Meter, MeteredRows};
use super::{LARGEST_RECORD, Piece, Pieces, pieces_of, unusable};
use crate::error::{Error, Result};

/// Rows read at a time.
const ROWS: usize = 64;

/// The texts of a column. A null is no document.
pub(super) fn read(path: &Path, column: &str, meter: &Meter) -> Result<Pieces> {
    let file = lowkey_files::open(path)?;
    let length = file.metadata().map_err(Error::io("read", path))?.len();
    let reader = guarded(path, || SerializedFileReader::new(file).map_err(|e| damaged(path, &e)))?;
    let schema = reader.metadata().file_metadata().schema_descr_ptr();
    let columns = schema.columns();
    let index = columns.iter().position(|c| c.path().string() == column);
    let Some(index) = index.filter(|index| readable(&columns[*index])) else {
        return Err(no_column(path, column, &columns.iter().map(|c| c.as_ref()).collect::<Vec<_>>()));
    };
    let deepest = columns[index].max_def_level();
    let rows = reader.metadata().file_metadata().num_rows();
    let meter = meter.of_rows(length, u64::try_from(rows).unwrap_or(0));
    let path = path.to_path_buf();
    Ok(Box::new(Rows {
        path,
        reader,
        column: index,
        deepest,
        next_group: 0,
        group: None,
        row: 0,
        meter,
        ready: VecDeque::new(),
    }))
}

/// Whether a column holds one text a row.
fn readable(column: &ColumnDescriptor) -> bool {
    let other = matches!(column.converted_type(), ConvertedType::DECIMAL | ConvertedType::BSON);
    column.physical_type() == PhysicalType::BYTE_ARRAY && column.max_rep_level() == 0 && !other
}

/// Why a column cannot be read, and which can.
fn no_column(path: &Path, column: &str, columns: &[&ColumnDescriptor]) -> Error {
    let name = |c: &&ColumnDescriptor| c.path().string();
    let below = format!("{column}.");
    let of_it = columns.iter().find(|c| name(c) == column || name(c).starts_with(&below));
    let what = match of_it {
        None => format!("no column {column:?}"),
        Some(c) if c.max_rep_level() > 0 => format!("column {column:?} is a list, not a plain string column"),
        Some(c) if name(c) != column => format!("column {column:?} has columns of its own"),
        Some(_) => format!("column {column:?} is not a plain string column"),
    };
    let texts: Vec<String> = columns.iter().filter(|c| readable(c)).map(name).collect();
    let mend = if texts.is_empty() {
        let all: Vec<String> = columns.iter().map(name).collect();
        format!("no column of the file holds one text a row (it has {all:?}): write the text of each row into one")
    } else {
        format!("the columns with one text a row are {texts:?}: set `column` to one of them")
    };
    unusable(path, format!("{what}; {mend}"))
}

struct Rows {
    path: PathBuf,
    reader: SerializedFileReader<File>,
    column: usize,
    /// Definition level of a row that is not null.
    deepest: i16,
    next_group: usize,
    group: Option<Group>,
    /// Rows read so far.
    row: u64,
    meter: MeteredRows,
    ready: VecDeque<Piece>,
}

/// A row group being read.
struct Group {
    reader: ColumnReaderImpl<ByteArrayType>,
    rows: usize,
    read: usize,
}

impl Rows {
    /// Reads some more rows; `false` at the end of the file.
    fn fill(&mut self) -> Result<bool> {
        let Some(group) = &mut self.group else {
            if self.next_group == self.reader.num_row_groups() {
                return Ok(false);
            }
            self.group = Some(self.open_group(self.next_group)?);
            self.next_group += 1;
            return Ok(true);
        };
        let wanted = ROWS.min(group.rows - group.read);
        if wanted == 0 {
            self.group = None;
            return Ok(true);
        }
        let (mut values, mut defined) = (Vec::<ByteArray>::new(), Vec::<i16>::new());
        let (path, reader) = (&self.path, &mut group.reader);
        let records = guarded(path, || {
            let read = reader.read_records(wanted, Some(&mut defined), None, &mut values);
            read.map(|(records, _, _)| records).map_err(|e| damaged(path, &e))
        })?;
        if records == 0 {
            return Err(unusable(path, format!("a row group ends after {} of its {} rows", group.read, group.rows)));
        }
        group.read += records;
        // Without definition levels no row is null; with them, a value follows each row that reached the deepest level.
        let present = |row: &usize| self.deepest == 0 || defined.get(*row) == Some(&self.deepest);
        for (row, value) in (0..records).filter(present).zip(&values) {
            let fail = |message| Error::Record {
                path: self.path.clone(),
                unit: "row",
                number: self.row + row as u64 + 1,
                message,
            };
            if value.len() > LARGEST_RECORD {
                let most = LARGEST_RECORD >> 20;
                return Err(fail(format!("its text is longer than {most} MiB, the most that is read: divide it")));
            }
            let text = std::str::from_utf8(value.data())
                .map_err(|e| fail(format!("invalid UTF-8 at byte {} of the text", e.valid_up_to())))?;
            self.ready.extend(pieces_of(text.to_owned()));
        }
        self.row += records as u64;
        self.meter.add(records as u64);
        Ok(true)
    }

    fn open_group(&self, index: usize) -> Result<Group> {
        guarded(&self.path, || {
            let group = self.reader.get_row_group(index).map_err(|e| damaged(&self.path, &e))?;
            let reader = group.get_column_reader(self.column).map_err(|e| damaged(&self.path, &e))?;
            let ColumnReader::ByteArrayColumnReader(reader) = reader else {
                return Err(unusable(&self.path, "a row group holds another type than the schema says"));
            };
            let rows = usize::try_from(group.metadata().num_rows()).unwrap_or(0);
            Ok(Group { reader, rows, read: 0 })
        })
    }
}

impl Iterator for Rows {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                return Some(Ok(piece));
            }
            match self.fill() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// Runs the Parquet reader, which panics on some damaged files where it should return an error.
pub(super) fn guarded<T>(path: &Path, read: impl FnOnce() -> Result<T>) -> Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(read))
        .unwrap_or_else(|_| Err(unusable(path, "not a readable Parquet file: its parts contradict each other")))
}

pub(super) fn damaged(path: &Path, error: &parquet::errors::ParquetError) -> Error {
    unusable(path, format!("not a readable Parquet file: {error}"))
}
