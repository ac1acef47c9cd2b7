use super::*;
use crate::gguf::read::Layout;

fn every_value() -> Metadata {
    let mut metadata = Metadata::default();
    metadata.set("u8", 200u8);
    metadata.set("i8", -100i8);
    metadata.set("u16", 60_000u16);
    metadata.set("i16", -30_000i16);
    metadata.set("u32", u32::MAX);
    metadata.set("i32", i32::MIN);
    metadata.set("f32", -0.1f32);
    metadata.set("yes", true);
    metadata.set("no", false);
    metadata.set("text", "ein Wörtchen\0🦀");
    metadata.set("empty", "");
    metadata.set("u64", u64::MAX);
    metadata.set("i64", i64::MIN);
    metadata.set("f64", std::f64::consts::PI);
    metadata.set("u8s", vec![1u8, 2, 3]);
    metadata.set("i8s", vec![-1i8]);
    metadata.set("u16s", vec![1u16, 2]);
    metadata.set("i16s", vec![-3i16]);
    metadata.set("u32s", vec![7u32; 5]);
    metadata.set("i32s", vec![-7i32; 5]);
    metadata.set("f32s", vec![1.5f32, f32::INFINITY]);
    metadata.set("flags", vec![true, false, true]);
    metadata.set("texts", vec!["a".to_owned(), String::new(), "ü".to_owned()]);
    metadata.set("none", Vec::<String>::new());
    metadata.set("u64s", vec![1u64 << 40]);
    metadata.set("i64s", vec![-1i64 << 40]);
    metadata.set("f64s", vec![0.1f64]);
    metadata
}

fn tensors() -> Vec<TensorInfo> {
    let info = |name: &str, shape: &[usize], kind| TensorInfo { name: name.into(), shape: shape.to_vec(), kind };
    vec![
        info("a.weight", &[3, 5], TensorType::F32),
        info("b.weight", &[2, 3, 7], TensorType::F16),
        info("c.weight", &[1, 1, 1, 1], TensorType::Bf16),
        info("d.weight", &[3, 64], TensorType::Q8_0),
        info("e.bias", &[9], TensorType::F32),
    ]
}

fn values_of(info: &TensorInfo) -> Vec<f32> {
    noise(info.name.len() as u64 + info.shape.len() as u64, info.shape.iter().product())
}

/// The bytes of a file with every kind of value and type.
fn sample() -> Vec<u8> {
    let folder = Folder::new();
    let path = folder.file("x.gguf");
    let size = write_container(&path, &every_value(), &tensors(), &mut |info| Ok(values_of(info))).unwrap();
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(bytes.len() as u64, size);
    bytes
}

#[test]
fn every_value_and_type_reads_back() {
    let folder = Folder::new();
    let path = folder.file("x.gguf");
    std::fs::write(&path, sample()).unwrap();
    let file = read(&path).unwrap();
    assert_eq!(*file.metadata(), every_value());
    assert_eq!(file.tensors().cloned().collect::<Vec<_>>(), tensors());
    for (info, tolerance) in tensors().iter().zip([0.0, 1e-3, 5e-3, 5e-3, 0.0]) {
        let found = file.values(&info.name).unwrap();
        let expected = values_of(info);
        assert_eq!(found.len(), expected.len());
        for (a, b) in found.iter().zip(&expected) {
            assert!((a - b).abs() <= tolerance, "{}: {a} {b}", info.name);
        }
    }
    assert!(file.values("z").is_none() && file.tensor("z").is_none());
    let metadata = file.metadata();
    assert_eq!((metadata.number("f32"), metadata.number("f64")), (Some(-0.1), Some(std::f64::consts::PI)));
    assert_eq!((metadata.integer("u8"), metadata.integer("i8"), metadata.integer("text")), (Some(200), None, None));
    assert_eq!((metadata.text("empty"), metadata.text("u8"), metadata.text("absent")), (Some(""), None, None));
}

/// The bytes of a small file, by hand from the format's description.
#[test]
fn the_bytes_are_those_of_the_format() {
    let folder = Folder::new();
    let path = folder.file("x.gguf");
    let mut metadata = Metadata::default();
    metadata.set("k", 7u32);
    let tensor = TensorInfo { name: "t".into(), shape: vec![1, 2], kind: TensorType::F32 };
    write_container(&path, &metadata, &[tensor], &mut |_| Ok(vec![1.0, -2.0])).unwrap();
    let mut expected = b"GGUF\x03\0\0\0".to_vec();
    expected.extend([1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    expected.extend(b"\x01\0\0\0\0\0\0\0k\x04\0\0\0\x07\0\0\0");
    expected.extend(b"\x01\0\0\0\0\0\0\0t\x02\0\0\0");
    // The fastest axis comes first.
    expected.extend(b"\x02\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0");
    expected.extend([0; 4 + 8]);
    expected.resize(expected.len().next_multiple_of(32), 0);
    expected.extend(b"\0\0\x80\x3f\0\0\0\xc0");
    expected.resize(expected.len() + 24, 0);
    assert_eq!(std::fs::read(path).unwrap(), expected);
}

#[test]
fn a_file_cut_anywhere_or_too_long_is_refused() {
    let bytes = sample();
    assert!(Layout::parse(&bytes).is_ok());
    for end in 0..bytes.len() {
        assert!(Layout::parse(&bytes[..end]).is_err(), "cut at {end}");
    }
    for more in 1..40 {
        let longer = [bytes.as_slice(), &vec![0; more]].concat();
        assert!(Layout::parse(&longer).is_err(), "{more} bytes more");
    }
    let folder = Folder::new();
    for (name, content) in [("empty", &[][..]), ("half", &bytes[..bytes.len() / 2])] {
        std::fs::write(folder.file(name), content).unwrap();
        let error = read(&folder.file(name)).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
    assert!(matches!(read(&folder.file("absent")), Err(Error::Io { .. })));
}

fn refused(change: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut bytes = sample();
    change(&mut bytes);
    Layout::parse(&bytes).unwrap_err()
}

/// Replaces a text by another of its length.
fn put_at(old: &'static [u8], new: &'static [u8]) -> impl FnOnce(&mut Vec<u8>) {
    move |bytes| {
        let at = find(bytes, old);
        bytes[at..at + new.len()].copy_from_slice(new);
    }
}

fn find(bytes: &[u8], what: &[u8]) -> usize {
    bytes.windows(what.len()).position(|window| window == what).unwrap()
}

#[test]
fn damaged_headers_are_refused_with_a_reason() {
    let put = |at: usize, new: &'static [u8]| move |bytes: &mut Vec<u8>| bytes[at..at + new.len()].copy_from_slice(new);
    let after = |what: &'static [u8], new: &'static [u8]| {
        move |bytes: &mut Vec<u8>| {
            let at = find(bytes, what) + what.len();
            bytes[at..at + new.len()].copy_from_slice(new);
        }
    };
    for (error, part) in [
        (refused(put(0, b"GGML")), "not a GGUF"),
        (refused(put(4, b"\0\0\0\x03")), "big-endian"),
        (refused(put(4, b"\x02")), "version 2"),
        (refused(put(8, &[0xFF; 8])), "tensors"),
        (refused(put(16, &[0xFF; 8])), "keys"),
        (refused(put(24, &[0xFF; 8])), "key 0"),
        (refused(after(b"u8", &[99])), "type 99"),
        (refused(after(b"yes\x07\0\0\0", &[2])), "neither true nor false"),
        (refused(after(b"text\x08\0\0\0\x12\0\0\0\0\0\0\0", &[0xFF])), "UTF-8"),
        (refused(after(b"u64s\x09\0\0\0", &[9])), "array of arrays"),
        (refused(after(b"u64s\x09\0\0\0", &[77])), "element type 77"),
        (refused(after(b"u64s\x09\0\0\0\x0a\0\0\0", &[0xFF; 8])), "claims"),
        (refused(after(b"texts\x09\0\0\0\x08\0\0\0", &[0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 0, 0])), "claims"),
        (refused(after(b"i16", b"\x03\0\0\0\0\0\x04\0\0\0\0\0\0\0i32")), "the key"),
        (refused(after(b"a.weight", &[0])), "0 dimensions"),
        (refused(after(b"a.weight", &[5])), "5 dimensions"),
        (refused(after(b"a.weight\x02\0\0\0", &[0; 8])), "dimensions"),
        (refused(after(b"a.weight\x02\0\0\0", &[0xFF; 16])), "dimensions"),
        (refused(after(b"a.weight\x02\0\0\0\x05\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0", &[12])), "type 12"),
        (refused(after(b"d.weight\x02\0\0\0", &[63])), "dimensions"),
        (refused(put_at(b"b.weight", b"a.weight")), "stands twice"),
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn an_alignment_of_another_power_of_two_is_read_and_others_refused() {
    let parse = |alignment: u32, pad: usize| {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend([0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend(17u64.to_le_bytes());
        bytes.extend(b"general.alignment\x04\0\0\0");
        bytes.extend(alignment.to_le_bytes());
        bytes.resize(bytes.len().next_multiple_of(pad), 0);
        Layout::parse(&bytes).map(|_| ())
    };
    assert_eq!(parse(64, 64), Ok(()));
    assert_eq!(parse(1, 1), Ok(()));
    for bad in [0, 3, 1 << 21, u32::MAX] {
        assert!(parse(bad, 32).unwrap_err().contains("power of two"), "{bad}");
    }
}

#[test]
fn what_cannot_be_described_is_not_written() {
    let folder = Folder::new();
    let path = folder.file("x.gguf");
    let mut none = |info: &TensorInfo| Ok(values_of(info));
    let tensor = |name: &str, shape: &[usize], kind| TensorInfo { name: name.into(), shape: shape.to_vec(), kind };
    let long = "x".repeat(64);
    for tensors in [
        vec![tensor("", &[1], TensorType::F32)],
        vec![tensor(&long, &[1], TensorType::F32)],
        vec![tensor("a", &[1], TensorType::F32); 2],
        vec![tensor("a", &[], TensorType::F32)],
        vec![tensor("a", &[0, 3], TensorType::F32)],
        vec![tensor("a", &[1; 5], TensorType::F32)],
        vec![tensor("a", &[2, 33], TensorType::Q8_0)],
        vec![tensor("a", &[usize::MAX, 3], TensorType::F32)],
    ] {
        assert!(write_container(&path, &Metadata::default(), &tensors, &mut none).is_err(), "{tensors:?}");
    }
    let mut metadata = Metadata::default();
    metadata.set("general.alignment", 64u32);
    assert!(write_container(&path, &metadata, &[], &mut none).is_err());
    let short = &mut |_: &TensorInfo| Ok(vec![0.0]);
    let wrong = [tensor("a", &[2], TensorType::F32)];
    assert!(write_container(&path, &Metadata::default(), &wrong, short).unwrap_err().to_string().contains("1 values"));
    // Neither the file nor a temporary one is left behind.
    assert_eq!(std::fs::read_dir(folder.0.path()).unwrap().count(), 0);
}

/// Changes of single bytes, of words to extremes, and cuts, in large number: the reader answers, it never ends the program.
#[test]
fn no_bytes_end_the_program() {
    let bytes = sample();
    let header = find(&bytes, b"e.bias") + 40;
    let mut state = 5;
    for _ in 0..60_000 {
        let mut damaged = bytes.clone();
        for _ in 0..1 + next(&mut state) % 3 {
            let at = (next(&mut state) as usize) % header;
            match next(&mut state) % 4 {
                0 => damaged[at] = next(&mut state) as u8,
                1 => damaged[at] ^= 1 << (next(&mut state) % 8),
                2 => damaged[at..at + 8].copy_from_slice(&[0xFF; 8]),
                _ => damaged[at..at + 8].copy_from_slice(&next(&mut state).to_le_bytes()),
            }
        }
        if next(&mut state).is_multiple_of(8) {
            damaged.truncate((next(&mut state) as usize) % bytes.len());
        }
        let _ = Layout::parse(&damaged);
    }
}
