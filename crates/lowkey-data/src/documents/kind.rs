//! What a file is that is not plain text, by its first bytes.

use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result};

/// A kind of file that is known by how it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Gzip,
    Zstandard,
    Parquet,
    Utf16,
    /// A compression that is not read here, or an archive of several files.
    Packed(&'static str),
    /// A document or container whose text lies in it in another form.
    Other(&'static str),
}

/// The kind of a file's content; `None` for what may be plain text.
pub(crate) fn kind(path: &Path) -> Result<Option<Kind>> {
    let mut start = Vec::new();
    lowkey_files::open(path)?.take(512).read_to_end(&mut start).map_err(Error::io("read", path))?;
    Ok(kind_of(&start))
}

/// [`kind`] of what begins like this.
pub(super) fn kind_of(start: &[u8]) -> Option<Kind> {
    let known: [(&[u8], Kind); 16] = [
        (b"\x1f\x8b\x08", Kind::Gzip),
        (b"\x28\xb5\x2f\xfd", Kind::Zstandard),
        (b"PAR1\x15", Kind::Parquet),
        (b"\xff\xfe", Kind::Utf16),
        (b"\xfe\xff", Kind::Utf16),
        (b"BZh", Kind::Packed("bzip2")),
        (b"\xfd7zXZ\0", Kind::Packed("xz")),
        (b"PK\x03\x04", Kind::Packed("zip")),
        (b"7z\xbc\xaf\x27\x1c", Kind::Packed("7z")),
        (b"\x04\x22\x4d\x18", Kind::Packed("lz4")),
        (b"Rar!\x1a\x07", Kind::Packed("rar")),
        (b"ARROW1\0", Kind::Other("an Arrow file")),
        (b"%PDF-", Kind::Other("a PDF file")),
        (b"\x89HDF\r\n", Kind::Other("an HDF5 file")),
        (b"SQLite format 3\0", Kind::Other("an SQLite database")),
        (b"\x93NUMPY", Kind::Other("a NumPy array")),
    ];
    let found = known.iter().find(|(magic, _)| start.starts_with(magic)).map(|(_, kind)| *kind)?;
    // Three letters may begin a text; the number of a block behind them does not.
    let bzip2 = start.get(4..10).is_some_and(|block| block == b"\x31\x41\x59\x26\x53\x59");
    (found != Kind::Packed("bzip2") || bzip2).then_some(found)
}

impl Kind {
    /// With its article.
    pub(crate) fn what(self) -> String {
        match self {
            Self::Gzip => "a gzip file".to_owned(),
            Self::Zstandard => "a Zstandard file".to_owned(),
            Self::Parquet => "a Parquet file".to_owned(),
            Self::Utf16 => "text in UTF-16".to_owned(),
            Self::Packed(name) => format!("a {name} file"),
            Self::Other(name) => name.to_owned(),
        }
    }

    /// What to do about it.
    pub(crate) fn mend(self, path: &Path) -> String {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let name = lowkey_files::printable(&name);
        match self {
            Self::Gzip => format!("name it {name}.gz, and it is decompressed as it is read"),
            Self::Zstandard => format!("name it {name}.zst, and it is decompressed as it is read"),
            Self::Parquet => "a dataset file with kind = \"parquet\" reads it".to_owned(),
            Self::Utf16 => "convert it to UTF-8, for instance with iconv".to_owned(),
            Self::Packed(_) => "unpack it; what gzip or zstd compressed is read as it is".to_owned(),
            Self::Other(_) => "take the text out of it first".to_owned(),
        }
    }
}
