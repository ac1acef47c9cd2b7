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
