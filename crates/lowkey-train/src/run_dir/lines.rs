//! Files of many lines that may be huge, cut, or still growing.

use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use crate::error::{Error, Result};

/// Bytes of the longest line that is read; a longer one is left out.
const LONGEST: u64 = 1 << 20;

/// Parts that are read of a file that is too long to be read whole.
const PARTS: u64 = 256;

/// Where in a file to read: from a byte up to another.
pub(super) type Span = (u64, u64);

/// The whole of a file of `bytes` bytes, or parts of it, evenly spread from its beginning to its end, of `most` bytes in all.
pub(super) fn spread(bytes: u64, most: u64) -> Vec<Span> {
    if bytes <= most {
        return vec![(0, bytes)];
    }
    let part = most / PARTS;
    (0..PARTS)
        .map(|i| {
            let from = ((bytes - part) as f64 * (i as f64 / (PARTS - 1) as f64)) as u64;
            (from, (from + part).min(bytes))
        })
        .collect()
}

/// The last `most` bytes of a file.
pub(super) fn end(bytes: u64, most: u64) -> Vec<Span> {
    vec![(bytes.saturating_sub(most), bytes)]
}

/// A line, without its end.
pub(super) struct Line<'a> {
    pub(super) bytes: &'a [u8],
    /// Whether its end was there; else somebody may be writing it.
    pub(super) ended: bool,
}

/// How much of a file was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Extent {
    /// Bytes that it had when it was opened.
    pub(super) bytes: u64,
    /// Bytes that were read.
    pub(super) read: u64,
    /// Lines that were too long.
    pub(super) too_long: u64,
}

/// Calls `each` with the lines of a regular file that lie in `spans(its length)`, in their order. What is added meanwhile is not read.
///
/// # Errors
/// [`Error::Io`] and [`Error::File`] where the file cannot be read.
pub(super) fn each_line(path: &Path, spans: impl Fn(u64) -> Vec<Span>, each: &mut dyn FnMut(&Line)) -> Result<Extent> {
    let fail = |e| Error::io(path, e);
    let mut file = lowkey_files::open(path)?;
    let mut extent = Extent { bytes: file.metadata().map_err(fail)?.len(), ..Extent::default() };
    let mut line = Vec::new();
    for (from, to) in spans(extent.bytes) {
        file.seek(SeekFrom::Start(from)).map_err(fail)?;
        let mut reader = BufReader::with_capacity(1 << 16, (&file).take(to - from));
        // A part begins within a line.
        let mut begun = from > 0;
        loop {
            line.clear();
            let n = reader.by_ref().take(LONGEST).read_until(b'\n', &mut line).map_err(fail)? as u64;
            if n == 0 {
                break;
            }
            extent.read += n;
            let ended = line.last() == Some(&b'\n');
            if n == LONGEST && !ended {
                extent.read += skip(&mut reader).map_err(fail)?;
                extent.too_long += 1;
            } else if !begun {
                each(&Line { bytes: line.strip_suffix(b"\n").unwrap_or(&line), ended });
            }
            begun = false;
        }
    }
    Ok(extent)
}

/// Reads on to the end of a line.
fn skip(reader: &mut impl BufRead) -> std::io::Result<u64> {
    let mut skipped = 0;
    loop {
        let buffer = reader.fill_buf()?;
        let (n, ended) = match buffer.iter().position(|byte| *byte == b'\n') {
            Some(at) => (at + 1, true),
            None => (buffer.len(), buffer.is_empty()),
        };
        reader.consume(n);
        skipped += n as u64;
        if ended {
            return Ok(skipped);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(content: &[u8], spans: impl Fn(u64) -> Vec<Span>) -> (Vec<(String, bool)>, Extent) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, content).unwrap();
        let mut found = Vec::new();
        let mut each = |line: &Line| found.push((String::from_utf8_lossy(line.bytes).into_owned(), line.ended));
        let extent = each_line(&path, spans, &mut each).unwrap();
        (found, extent)
    }

    #[test]
    fn every_line_is_read_once_and_one_without_an_end_is_told_from_the_others() {
        let (found, extent) = lines(b"one\n\ntwo\nand", |bytes| spread(bytes, 100));
        let expected = [("one", true), ("", true), ("two", true), ("and", false)];
        assert_eq!(found, expected.map(|(line, ended)| (line.to_string(), ended)));
        assert_eq!(extent, Extent { bytes: 12, read: 12, too_long: 0 });
    }

    #[test]
    fn a_line_of_a_megabyte_and_more_is_passed_over() {
        let long = vec![b'x'; 3 << 20];
        let (found, extent) = lines(&[b"a\n", &long[..], b"\nb\n"].concat(), |bytes| spread(bytes, u64::MAX));
        assert_eq!(found, [("a".to_string(), true), ("b".to_string(), true)]);
        assert_eq!((extent.too_long, extent.read), (1, extent.bytes));
    }

    #[test]
    fn of_a_long_file_whole_lines_are_read_from_its_beginning_to_its_end() {
        let text: String = (0..100_000).map(|i| format!("{i}\n")).collect();
        let (found, extent) = lines(text.as_bytes(), |bytes| spread(bytes, 1 << 14));
        let numbers: Vec<u64> =
            found.iter().filter(|(_, ended)| *ended).map(|(line, _)| line.parse().unwrap()).collect();
        assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!((numbers[0], *numbers.last().unwrap()), (0, 99_999));
        assert!(extent.read <= 1 << 14 && numbers.len() > 1000, "{extent:?} {}", numbers.len());
        let (found, _) = lines(text.as_bytes(), |bytes| end(bytes, 20));
        assert_eq!(found.last().unwrap().0, "99999");
        assert_eq!(found.len(), 3);
    }
}
