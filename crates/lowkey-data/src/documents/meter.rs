//! How far the reading of files has come.

use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of files that were read, as they lie on the disk: those of a compressed file are few.
#[derive(Clone, Debug, Default)]
pub(crate) struct Meter(Arc<AtomicU64>);

impl Meter {
    /// Those so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// The same of a file.
    pub(super) fn of(&self, file: File) -> Metered {
        Metered { file, meter: self.clone() }
    }

    /// Counts a file of which rows are read rather than bytes.
    pub(super) fn of_rows(&self, length: u64, rows: u64) -> MeteredRows {
        MeteredRows { meter: self.clone(), length, rows, read: 0 }
    }

    fn add(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// A file whose bytes are counted as they are read.
pub(super) struct Metered {
    file: File,
    meter: Meter,
}

impl Read for Metered {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.file.read(buffer)?;
        self.meter.add(length as u64);
        Ok(length)
    }
}

/// A file of so many rows, which are taken to be of one length.
pub(super) struct MeteredRows {
    meter: Meter,
    length: u64,
    rows: u64,
    read: u64,
}

impl MeteredRows {
    /// So many more rows were read.
    pub(super) fn add(&mut self, rows: u64) {
        let at = |rows: u64| (u128::from(self.length) * u128::from(rows) / u128::from(self.rows.max(1))) as u64;
        let (before, after) = (self.read.min(self.rows), (self.read + rows).min(self.rows));
        self.meter.add(at(after) - at(before));
        self.read = after;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_counted_to_the_length_of_their_file_and_no_further() {
        let meter = Meter::default();
        let mut rows = meter.of_rows(1000, 3);
        let mut told = Vec::new();
        for more in [1, 1, 1, 1] {
            rows.add(more);
            told.push(meter.bytes());
        }
        assert_eq!(told, [333, 666, 1000, 1000]);
        meter.of_rows(7, 0).add(1);
        assert_eq!(meter.bytes(), 1000);
    }
}
