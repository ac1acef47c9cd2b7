//! Reading documents out of source files: plain text, JSONL and Parquet.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use parquet::basic::Type as PhysicalType;
use parquet::column::reader::ColumnReader;
use parquet::data_type::ByteArray;
use parquet::file::reader::{FileReader, SerializedFileReader};

use crate::error::{Error, Result};

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

/// Documents of one file.
type Documents = Box<dyn Iterator<Item = Result<String>> + Send>;

/// The documents of `path` in order; empty ones are left out. Text and JSONL are decompressed by the extensions `.gz`
/// and `.zst`. After an error the iterator ends.
pub(crate) fn read(path: &Path, format: &Format) -> Documents {
    let opened = match format {
        Format::Text { separator } => text(path, separator.as_deref()),
        Format::Jsonl { field } => jsonl(path, field),
        Format::Parquet { column } => parquet_column(path, column),
    };
    let mut failed = false;
    match opened {
        Err(error) => Box::new(std::iter::once(Err(error))),
        Ok(documents) => Box::new(
            documents
                .take_while(move |document| !std::mem::replace(&mut failed, document.is_err()))
                .filter(|document| !document.as_ref().is_ok_and(String::is_empty)),
        ),
    }
}

fn open(path: &Path) -> Result<Box<dyn BufRead + Send>> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    Ok(match path.extension().and_then(|extension| extension.to_str()) {
        Some("gz") => Box::new(BufReader::new(flate2::read::MultiGzDecoder::new(file))),
        Some("zst") => {
            let decoder = zstd::stream::read::Decoder::new(file).map_err(Error::io("decompress", path))?;
            Box::new(BufReader::new(decoder))
        }
        _ => Box::new(BufReader::with_capacity(1 << 20, file)),
    })
}

fn text(path: &Path, separator: Option<&str>) -> Result<Documents> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    let text = String::from_utf8(bytes)
        .map_err(|e| Error::Utf8 { path: path.to_path_buf(), offset: e.utf8_error().valid_up_to() as u64 })?;
    let Some(separator) = separator else {
        return Ok(Box::new(std::iter::once(Ok(text))));
    };
    // Found by position, not collected: a file of a million stories is held once.
    let separator = separator.to_owned();
    let mut next = Some(0);
    Ok(Box::new(std::iter::from_fn(move || {
        let start = next?;
        let rest = &text[start..];
        let length = rest.find(&separator);
        next = length.map(|length| start + length + separator.len());
        Some(Ok(rest[..length.unwrap_or(rest.len())].to_owned()))
    })))
}

fn jsonl(path: &Path, field: &str) -> Result<Documents> {
    let mut reader = open(path)?;
    let path = path.to_path_buf();
    let field = field.to_owned();
    let (mut number, mut offset) = (0, 0u64);
    let mut line = Vec::new();
    Ok(Box::new(std::iter::from_fn(move || {
        loop {
            line.clear();
            let length = match reader.read_until(b'\n', &mut line) {
                Ok(0) => return None,
                Ok(length) => length as u64,
                Err(reason) => return Some(Err(Error::io("read", &path)(reason))),
            };
            number += 1;
            let start = offset;
            offset += length;
            let line = match std::str::from_utf8(&line) {
                Ok(line) => line.trim(),
                Err(e) => {
                    return Some(Err(Error::Utf8 { path: path.clone(), offset: start + e.valid_up_to() as u64 }));
                }
            };
            if !line.is_empty() {
                return Some(json_text(&path, number, line, &field));
            }
        }
    })))
}

/// The text of one JSONL line.
fn json_text(path: &Path, number: u64, line: &str, field: &str) -> Result<String> {
    let fail = |message: String| Error::Record { path: path.to_path_buf(), unit: "line", number, message };
    let value: serde_json::Value = serde_json::from_str(line).map_err(|e| fail(format!("not valid JSON: {e}")))?;
    let Some(object) = value.as_object() else {
        return Err(fail("not a JSON object; every line must be one".to_owned()));
    };
    match object.get(field) {
        Some(serde_json::Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(fail(format!("field {field:?} is not a string"))),
        None => {
            let names: Vec<&str> = object.keys().map(String::as_str).collect();
            Err(fail(format!("no field {field:?}; the object has {names:?}: set `field` to one of them")))
        }
    }
}

/// A string column, one row group at a time. A null is no document.
fn parquet_column(path: &Path, column: &str) -> Result<Documents> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let reader = guarded(path, || SerializedFileReader::new(file).map_err(|e| damaged(path, &e)))?;
    let schema = reader.metadata().file_metadata().schema_descr_ptr();
    let columns = schema.columns();
    let Some(index) = columns.iter().position(|c| c.path().string() == column) else {
        let names: Vec<String> = columns.iter().map(|c| c.path().string()).collect();
        let message = format!("no column {column:?}; the file has {names:?}: set `column` to one of them");
        return Err(Error::Source { path: path.to_path_buf(), message });
    };
    let found = &columns[index];
    if found.physical_type() != PhysicalType::BYTE_ARRAY || found.max_rep_level() != 0 {
        let message = format!("column {column:?} is not a plain string column");
        return Err(Error::Source { path: path.to_path_buf(), message });
    }
    let path = path.to_path_buf();
    let mut row = 0;
    Ok(Box::new((0..reader.num_row_groups()).flat_map(move |group| {
        let (texts, rows) = match guarded(&path, || read_group(&path, &reader, group, index, row)) {
            Ok((texts, rows)) => (texts, rows),
            Err(error) => (vec![Err(error)], 0),
        };
        row += rows;
        texts
    })))
}

/// The texts of one row group, and how many rows it has.
fn read_group(
    path: &Path,
    reader: &SerializedFileReader<File>,
    group: usize,
    column: usize,
    first_row: u64,
) -> Result<(Vec<Result<String>>, u64)> {
    let group = reader.get_row_group(group).map_err(|e| damaged(path, &e))?;
    let reader = group.get_column_reader(column).map_err(|e| damaged(path, &e))?;
    let ColumnReader::ByteArrayColumnReader(mut reader) = reader else {
        let message = "a row group holds another type than the schema says".to_owned();
        return Err(Error::Source { path: path.to_path_buf(), message });
    };
    let (mut values, mut defined) = (Vec::<ByteArray>::new(), Vec::<i16>::new());
    let rows = usize::try_from(group.metadata().num_rows()).unwrap_or(0);
    let mut read = 0;
    while read < rows {
        let (records, _, _) =
            reader.read_records(rows - read, Some(&mut defined), None, &mut values).map_err(|e| damaged(path, &e))?;
        if records == 0 {
            let message = format!("a row group ends after {read} of its {rows} rows");
            return Err(Error::Source { path: path.to_path_buf(), message });
        }
        read += records;
    }
    // Without definition levels no row is null; with them, a value follows each row that reached the deepest level.
    let deepest = group.metadata().column(column).column_descr().max_def_level();
    let present = |row: &usize| deepest == 0 || defined.get(*row) == Some(&deepest);
    let texts = (0..rows).filter(present).zip(&values).map(|(row, value)| {
        String::from_utf8(value.data().to_vec()).map_err(|e| Error::Record {
            path: path.to_path_buf(),
            unit: "row",
            number: first_row + row as u64 + 1,
            message: format!("invalid UTF-8 at byte {} of the text", e.utf8_error().valid_up_to()),
        })
    });
    Ok((texts.collect(), rows as u64))
}

/// Runs the Parquet reader, which panics on some damaged files where it should return an error.
fn guarded<T>(path: &Path, read: impl FnOnce() -> Result<T>) -> Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(read)).unwrap_or_else(|_| {
        let message = "not a readable Parquet file: its parts contradict each other".to_owned();
        Err(Error::Source { path: path.to_path_buf(), message })
    })
}

fn damaged(path: &Path, error: &parquet::errors::ParquetError) -> Error {
    Error::Source { path: PathBuf::from(path), message: format!("not a readable Parquet file: {error}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::Arc;

    use parquet::data_type::ByteArrayType;
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    fn all(path: &Path, format: &Format) -> Vec<String> {
        read(path, format).map(|d| d.unwrap()).collect()
    }

    fn fail(path: &Path, format: &Format) -> String {
        read(path, format).find_map(Result::err).expect("the file must be refused").to_string()
    }

    fn jsonl_format() -> Format {
        Format::Jsonl { field: "text".into() }
    }

    fn gz(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn text_is_one_document_or_split_at_the_separator() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        std::fs::write(&path, "eins\n--\nzwei\n--\n\n--\ndrei ü").unwrap();
        assert_eq!(all(&path, &Format::Text { separator: None }), ["eins\n--\nzwei\n--\n\n--\ndrei ü"]);
        let format = Format::Text { separator: Some("\n--\n".into()) };
        assert_eq!(all(&path, &format), ["eins", "zwei", "drei ü"]);
    }

    #[test]
    fn gz_and_zst_read_as_plain() {
        let dir = tempfile::tempdir().unwrap();
        let plain = b"{\"text\": \"a\\nb\"}\n\n{\"id\": 3, \"text\": \"\xc3\xbc\"}\n{\"text\":\"\"}";
        // Two gzip members in one file, as concatenated archives are.
        let two = [gz(&plain[..20]), gz(&plain[20..])].concat();
        let files = [
            ("a.jsonl", plain.to_vec()),
            ("a.jsonl.gz", two),
            ("a.jsonl.zst", zstd::encode_all(&plain[..], 3).unwrap()),
        ];
        for (name, bytes) in files {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(all(&path, &jsonl_format()), ["a\nb", "ü"], "{name}");
        }
    }

    #[test]
    fn broken_lines_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        for (bytes, expected) in [
            (&b"{\"text\":\"a\"}\n\n{\"text\": 3}\n"[..], "line 3: field \"text\" is not a string"),
            (b"{\"text\":\"a\"}\n{oops\n", "line 2: not valid JSON"),
            (b"[1]\n", "line 1: not a JSON object"),
            (b"{\"body\":\"x\"}\n", "the object has [\"body\"]"),
            (b"{\"text\":\"a\"}\n{\"text\":\"\xff\"}\n", "invalid UTF-8 at byte 22"),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let message = fail(&path, &jsonl_format());
            assert!(message.contains(expected) && message.contains("a.jsonl"), "{message}");
        }
    }

    #[test]
    fn text_that_is_not_utf8_or_not_there_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("latin1.txt");
        std::fs::write(&path, b"caf\xe9!").unwrap();
        assert!(fail(&path, &Format::Text { separator: None }).contains("latin1.txt: invalid UTF-8 at byte 3"));
        assert!(fail(&dir.path().join("no.txt"), &Format::Text { separator: None }).contains("cannot open"));
    }

    #[test]
    fn truncated_archives_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let plain = "{\"text\":\"some words of a story\"}\n".repeat(200);
        for (name, bytes) in
            [("a.jsonl.gz", gz(plain.as_bytes())), ("a.jsonl.zst", zstd::encode_all(plain.as_bytes(), 3).unwrap())]
        {
            let path = dir.path().join(name);
            std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
            assert!(fail(&path, &jsonl_format()).contains(name));
        }
    }

    /// Writes `rows` into groups of two, with a column before the text.
    fn write_parquet(path: &Path, optional: bool, rows: &[Option<&[u8]>]) {
        let level = if optional { "optional" } else { "required" };
        let schema = format!("message m {{ required int64 id; {level} binary text (UTF8); }}");
        let schema = Arc::new(parse_message_type(&schema).unwrap());
        let properties =
            Arc::new(WriterProperties::builder().set_compression(parquet::basic::Compression::SNAPPY).build());
        let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, properties).unwrap();
        for rows in rows.chunks(2) {
            let mut group = writer.next_row_group().unwrap();
            let mut column = group.next_column().unwrap().unwrap();
            let ids: Vec<i64> = (0..rows.len() as i64).collect();
            column.typed::<parquet::data_type::Int64Type>().write_batch(&ids, None, None).unwrap();
            column.close().unwrap();
            let mut column = group.next_column().unwrap().unwrap();
            let values: Vec<ByteArray> = rows.iter().flatten().map(|v| ByteArray::from(v.to_vec())).collect();
            let levels: Vec<i16> = rows.iter().map(|v| i16::from(v.is_some())).collect();
            let levels = optional.then_some(&levels[..]);
            column.typed::<ByteArrayType>().write_batch(&values, levels, None).unwrap();
            column.close().unwrap();
            group.close().unwrap();
        }
        writer.close().unwrap();
    }

    #[test]
    fn parquet_columns_read_across_row_groups_and_nulls() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        let format = Format::Parquet { column: "text".into() };
        write_parquet(&path, false, &[Some(b"a"), Some(b"bb"), Some("ü".as_bytes())]);
        assert_eq!(all(&path, &format), ["a", "bb", "ü"]);
        write_parquet(&path, true, &[None, Some(b"x"), Some(b"y"), None, Some(b""), Some(b"z")]);
        assert_eq!(all(&path, &format), ["x", "y", "z"]);
    }

    #[test]
    fn unusable_parquet_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        let format = Format::Parquet { column: "text".into() };
        write_parquet(&path, true, &[Some(b"a"), None, None, Some(b"bad \xff")]);
        assert!(fail(&path, &format).contains("row 4: invalid UTF-8 at byte 4"), "{}", fail(&path, &format));
        let column = |name: &str| Format::Parquet { column: name.into() };
        assert!(fail(&path, &column("body")).contains("[\"id\", \"text\"]"));
        assert!(fail(&path, &column("id")).contains("not a plain string column"));
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 9]).unwrap();
        assert!(fail(&path, &format).contains("not a readable Parquet file"));
    }

    #[test]
    fn no_damage_to_a_parquet_file_ends_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        let format = Format::Parquet { column: "text".into() };
        write_parquet(&path, true, &[Some(b"words, words, words and words"), None, Some(b"more words"), Some(b"x")]);
        let whole = std::fs::read(&path).unwrap();
        let mut refused = 0;
        for at in 0..whole.len() {
            for value in [0, 1, 0x15, 0x7f, 0xff, whole[at] ^ 0x10, whole[at] ^ 0x02] {
                let mut bytes = whole.clone();
                bytes[at] = value;
                std::fs::write(&path, &bytes).unwrap();
                refused += usize::from(read(&path, &format).any(|document| document.is_err()));
            }
        }
        assert!(refused > whole.len(), "{refused} of {} changes noticed", 7 * whole.len());
    }
}
