use super::*;
use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

/// The documents, put together from their pieces; all of a file is told to be read then.
fn all(path: &Path, format: &Format) -> Vec<String> {
    let (mut documents, mut open, meter) = (Vec::<String>::new(), false, Meter::default());
    for piece in read(path, format, &meter) {
        let piece = piece.unwrap();
        assert!(!piece.text.is_empty() && piece.begins != open);
        if piece.begins {
            documents.push(String::new());
        }
        documents.last_mut().unwrap().push_str(&piece.text);
        open = !piece.ends;
    }
    assert!(!open);
    assert_eq!(meter.bytes(), path.metadata().unwrap().len());
    documents
}

fn fail(path: &Path, format: &Format) -> String {
    read(path, format, &Meter::default()).find_map(Result::err).expect("the file must be refused").to_string()
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
    let files =
        [("a.jsonl", plain.to_vec()), ("a.jsonl.gz", two), ("a.jsonl.zst", zstd::encode_all(&plain[..], 3).unwrap())];
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
    assert!(fail(&dir.path().join("no.txt"), &Format::Text { separator: None }).contains("cannot read"));
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
    write_parquet_as(path, parquet::basic::Compression::SNAPPY, &schema, rows);
}

fn write_parquet_as(path: &Path, codec: parquet::basic::Compression, schema: &str, rows: &[Option<&[u8]>]) {
    let optional = schema.contains("optional");
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = Arc::new(WriterProperties::builder().set_compression(codec).build());
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
    assert!(fail(&path, &column("body")).contains("[\"text\"]: set `column`"));
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
            refused += usize::from(read(&path, &format, &Meter::default()).any(|document| document.is_err()));
        }
    }
    assert!(refused > whole.len(), "{refused} of {} changes noticed", 7 * whole.len());
}

#[test]
fn what_other_loaders_read_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let line = b"{\"text\": \"a\"}\n{\"text\": \"b\"}\n";
    let padded = [gz(line), vec![0; 512]].concat();
    let members = [gz(line), vec![0; 7], gz(b""), gz(b"{\"text\": \"c\"}\n"), vec![0; 100_000]].concat();
    let files: [(&str, Vec<u8>, &[&str]); 9] = [
        ("bom.jsonl", [b"\xef\xbb\xbf", &line[..]].concat(), &["a", "b"]),
        ("null.jsonl", [&line[..], b"{\"text\": null}\n{\"text\": \"c\"}"].concat(), &["a", "b", "c"]),
        (
            "nan.jsonl",
            b"{\"s\": NaN, \"text\": \"NaN \\\"Infinity\", \"t\": [-Infinity, Infinity]}".to_vec(),
            &["NaN \"Infinity"],
        ),
        (
            "odd.jsonl",
            b"{\"n\": 1e999, \"u\": \"\\ud800\", \"text\": \"x\", \"text\": \"last\"}\r\n".to_vec(),
            &["last"],
        ),
        ("padded.jsonl.gz", padded, &["a", "b"]),
        ("members.jsonl.gz", members, &["a", "b", "c"]),
        ("empty.jsonl.gz", Vec::new(), &[]),
        ("UPPER.JSONL.GZ", gz(line), &["a", "b"]),
        ("UPPER.JSONL.ZST", zstd::encode_all(&line[..], 1).unwrap(), &["a", "b"]),
    ];
    for (name, bytes, expected) in files {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(all(&path, &jsonl_format()), expected, "{name}");
    }
    let text = dir.path().join("bom.txt");
    std::fs::write(&text, "\u{feff}a|b").unwrap();
    assert_eq!(all(&text, &Format::Text { separator: Some("|".into()) }), ["a", "b"]);
    for (bytes, expected) in [
        (&b"{\"text\": NaN}"[..], "not a string"),
        (b"{\"text\": \"a\", \"b\": NaNa}", "not valid JSON"),
        (b"{\"text\": \"a\"} x", "not valid JSON"),
        (b"[{\"text\": \"a\"}]", "jq -c"),
    ] {
        let path = dir.path().join("bad.jsonl");
        std::fs::write(&path, bytes).unwrap();
        assert!(fail(&path, &jsonl_format()).contains(expected));
    }
    let trailing = dir.path().join("trailing.jsonl.gz");
    std::fs::write(&trailing, [gz(line), b"garbage".to_vec()].concat()).unwrap();
    assert!(fail(&trailing, &jsonl_format()).contains("trailing.jsonl.gz"));
}

/// A frame by hand: magic, no content size, a window of 2^`log`, one raw block.
fn frame(log: u8, content: &[u8]) -> Vec<u8> {
    let block = ((content.len() as u32) << 3 | 1).to_le_bytes();
    [&b"\x28\xb5\x2f\xfd\0"[..], &[(log - 10) << 3], &block[..3], content].concat()
}

#[test]
fn zstandard_windows_of_two_gibibytes_are_read_and_larger_ones_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("long.jsonl.zst");
    std::fs::write(&path, frame(31, b"{\"text\": \"a\"}\n")).unwrap();
    assert_eq!(all(&path, &jsonl_format()), ["a"]);
    std::fs::write(&path, frame(32, b"{\"text\": \"a\"}\n")).unwrap();
    let message = fail(&path, &jsonl_format());
    assert!(message.contains("window of more than 2 GiB") && message.contains("long.jsonl.zst"), "{message}");
}

#[test]
fn a_line_past_the_bound_is_refused_before_it_is_held() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bomb.jsonl.gz");
    let mut encoder = flate2::write::GzEncoder::new(File::create(&path).unwrap(), flate2::Compression::fast());
    encoder.write_all(b"{\"text\": \"ok\"}\n{\"text\": \"").unwrap();
    for _ in 0..=LARGEST_RECORD >> 20 {
        encoder.write_all(&[b'a'; 1 << 20]).unwrap();
    }
    encoder.finish().unwrap();
    let message = fail(&path, &jsonl_format());
    assert!(message.contains("line 2: is longer than 256 MiB"), "{message}");
}

#[test]
fn a_long_text_comes_in_pieces_whose_documents_are_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.txt");
    let line = "words of a línе, and more\n".repeat(60_000);
    let text = format!("{line}<|>short<|><|>{}<|>{line}", "ACGT".repeat(2 << 20));
    std::fs::write(&path, &text).unwrap();
    let format = Format::Text { separator: Some("<|>".into()) };
    let expected: Vec<&str> = text.split("<|>").filter(|document| !document.is_empty()).collect();
    assert!(all(&path, &format) == expected);
    assert!(read(&path, &format, &Meter::default()).all(|piece| piece.unwrap().text.len() <= 4 * PART));
    // A document held whole is cut in the same places.
    let jsonl = dir.path().join("a.jsonl");
    std::fs::write(
        &jsonl,
        expected.iter().map(|text| format!("{}\n", serde_json::json!({ "text": text }))).collect::<String>(),
    )
    .unwrap();
    let pieces =
        |path: &Path, format: &Format| read(path, format, &Meter::default()).collect::<Result<Vec<_>>>().unwrap();
    assert!(pieces(&jsonl, &jsonl_format()) == pieces(&path, &format));
}

#[test]
fn a_text_is_cut_at_a_character() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.txt");
    let text = "äbc\n".repeat(400_000);
    std::fs::write(&path, &text).unwrap();
    let count = text.chars().count() as u64;
    assert_eq!(characters(&path, &Meter::default(), &mut || Ok(())).unwrap(), count);
    for head in [1, 5, count / 2 + 1, count - 1, count, count + 9] {
        let (mut before, mut after) = (String::new(), String::new());
        for piece in read_cut(&path, head, &Meter::default()) {
            let piece = piece.unwrap();
            if piece.tail { &mut after } else { &mut before }.push_str(&piece.text);
        }
        assert_eq!(before.chars().count() as u64, head.min(count));
        assert!(before + &after == text, "{head}");
    }
    assert!(holds(&path, "c\nä").unwrap() && !holds(&path, "cc").unwrap());
}

#[test]
fn content_that_is_no_plain_text_is_named() {
    let dir = tempfile::tempdir().unwrap();
    for (bytes, expected) in [
        (gz(b"text"), "is a gzip file, not plain text: name it a.txt.gz"),
        (zstd::encode_all(&b"text"[..], 1).unwrap(), "is a Zstandard file"),
        (b"BZh91AY&SY...".to_vec(), "is a bzip2 file, not plain text: unpack it"),
        (b"\xff\xfet\0".to_vec(), "is text in UTF-16"),
        (b"PK\x03\x04..".to_vec(), "is a zip file"),
    ] {
        let path = dir.path().join("a.txt");
        std::fs::write(&path, bytes).unwrap();
        let message = fail(&path, &Format::Text { separator: None });
        assert!(message.contains(expected), "{message}");
    }
    let path = dir.path().join("b.txt");
    std::fs::write(&path, "BZhou was here").unwrap();
    assert_eq!(all(&path, &Format::Text { separator: None }), ["BZhou was here"]);
}

#[test]
fn every_codec_of_parquet_is_read() {
    use parquet::basic::Compression as C;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.parquet");
    for codec in [
        C::UNCOMPRESSED,
        C::SNAPPY,
        C::GZIP(Default::default()),
        C::BROTLI(Default::default()),
        C::LZ4,
        C::LZ4_RAW,
        C::ZSTD(Default::default()),
    ] {
        write_parquet_as(
            &path,
            codec,
            "message m { required int64 id; optional binary text (UTF8); }",
            &[Some(b"words ".repeat(99).as_slice()), None],
        );
        assert_eq!(all(&path, &Format::Parquet { column: "text".into() }), ["words ".repeat(99)], "{codec:?}");
    }
}

#[test]
fn only_columns_that_can_be_read_are_suggested() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.parquet");
    let schema = |text: &str| {
        let schema = format!(
            "message m {{ required int64 id; optional group text (LIST) {{ repeated group list {{ optional binary element \
             (UTF8); }} }} {text} }}"
        );
        let schema = Arc::new(parse_message_type(&schema).unwrap());
        let writer = SerializedFileWriter::new(File::create(&path).unwrap(), schema, Default::default()).unwrap();
        writer.close().unwrap();
        fail(&path, &Format::Parquet { column: "text".into() })
    };
    let message = schema("required binary body (UTF8);");
    assert!(message.contains("column \"text\" is a list") && message.contains("[\"body\"]"), "{message}");
    assert!(schema("").contains("no column of the file holds one text a row"));
}

#[cfg(unix)]
#[test]
fn only_regular_files_are_opened() {
    let device = Path::new("/dev/zero");
    for format in [Format::Text { separator: None }, jsonl_format(), Format::Parquet { column: "text".into() }] {
        assert!(fail(device, &format).contains("not a regular file"));
    }
}
