//! Source files as streams of plain bytes.

use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use super::kind::{Kind, kind_of};
use super::meter::{Meter, Metered};
use super::unusable;
use crate::error::{Error, Result};

/// Bytes read at a time.
pub(super) const BLOCK: usize = 1 << 20;

/// The largest window, as a power of two, of a Zstandard frame that is read. (The decompressor takes the room of the window,
/// as far as the text fills it.)
const LARGEST_WINDOW: u32 = 31;

/// Opens a text or JSONL file, decompressed by its ending.
pub(super) fn open(path: &Path, meter: &Meter) -> Result<Box<dyn BufRead + Send>> {
    let mut file = BufReader::with_capacity(BLOCK, meter.of(lowkey_files::open(path)?));
    let start = file.fill_buf().map_err(Error::io("read", path))?;
    match (Compression::of(path), kind_of(start)) {
        (None, Some(kind)) => Err(unusable(path, format!("is {}, not plain text: {}", kind.what(), kind.mend(path)))),
        (None, None) => Ok(Box::new(file)),
        (Some(Compression::Gzip), _) => Ok(Box::new(BufReader::with_capacity(BLOCK, Members::new(file)))),
        (Some(Compression::Zstandard), Some(Kind::Zstandard) | None) => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(file).map_err(Error::io("decompress", path))?;
            decoder.window_log_max(LARGEST_WINDOW).map_err(Error::io("decompress", path))?;
            Ok(Box::new(BufReader::with_capacity(BLOCK, Zstandard(decoder))))
        }
        (Some(Compression::Zstandard), Some(kind)) => {
            Err(unusable(path, format!("is {}, not what its name says: {}", kind.what(), kind.mend(path))))
        }
    }
}

/// How a file is compressed, by its ending.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    Gzip,
    Zstandard,
}

impl Compression {
    pub(super) fn of(path: &Path) -> Option<Self> {
        let ending = path.extension()?.to_str()?.to_ascii_lowercase();
        match ending.as_str() {
            "gz" => Some(Self::Gzip),
            "zst" => Some(Self::Zstandard),
            _ => None,
        }
    }
}

/// The members of a gzip file one after the other. Zeros behind a member are padding, as on tapes and in files that were laid
/// out in blocks; anything else that is no member is an error.
struct Members {
    reading: Option<flate2::bufread::GzDecoder<BufReader<Metered>>>,
    between: Option<BufReader<Metered>>,
}

impl Members {
    fn new(file: BufReader<Metered>) -> Self {
        Self { reading: None, between: Some(file) }
    }
}

impl Read for Members {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if let Some(decoder) = &mut self.reading {
                let length = decoder.read(buffer)?;
                if length > 0 {
                    return Ok(length);
                }
                self.between = self.reading.take().map(flate2::bufread::GzDecoder::into_inner);
            }
            let Some(file) = &mut self.between else { return Ok(0) };
            let next = file.fill_buf()?;
            if next.is_empty() {
                return Ok(0);
            }
            let zeros = next.iter().take_while(|byte| **byte == 0).count();
            if zeros > 0 {
                file.consume(zeros);
                continue;
            }
            self.reading = self.between.take().map(flate2::bufread::GzDecoder::new);
        }
    }
}

/// A Zstandard stream whose errors say what can be done.
struct Zstandard(zstd::stream::read::Decoder<'static, BufReader<Metered>>);

impl Read for Zstandard {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer).map_err(|e| {
            if e.to_string().contains("too much memory") {
                let why = "it is compressed with a window of more than 2 GiB; compress it again with `zstd --long=31` or less";
                return io::Error::new(e.kind(), why);
            }
            e
        })
    }
}
