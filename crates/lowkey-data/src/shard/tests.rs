use super::*;

/// A shard of these documents, and the folder that holds it.
pub(crate) fn shard_of(documents: &[Vec<u32>], vocab_size: usize) -> (tempfile::TempDir, Shard) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.tokens");
    let mut writer = ShardWriter::create(&path, vocab_size).unwrap();
    for document in documents {
        writer.push(document, document.len() as u64 * 3).unwrap();
    }
    writer.finish().unwrap();
    let shard = Shard::open(&path).unwrap();
    (dir, shard)
}

#[test]
fn documents_round_trip_in_both_widths() {
    for vocab_size in [1 << 16, (1 << 16) + 1] {
        let top = vocab_size as u32 - 1;
        let documents = [vec![1, 2, top], vec![0], vec![7; 100]];
        let (_dir, shard) = shard_of(&documents, vocab_size);
        assert_eq!((shard.len(), shard.documents(), shard.bytes()), (104, 3, 312));
        assert_eq!(shard.vocab_size(), vocab_size);
        for (i, document) in documents.iter().enumerate() {
            assert_eq!(&shard.document(i).unwrap(), document);
        }
        assert_eq!((shard.token(2), shard.token(3), shard.token(104)), (Some(top), Some(0), None));
        assert_eq!([0, 2, 3, 4, 103].map(|i| shard.document_at(i)), [0, 0, 1, 2, 2].map(Some));
        assert_eq!((shard.document_at(104), shard.document(3)), (None, None));
        let mut out = vec![9];
        shard.copy_range(2..5, &mut out);
        shard.copy_range(103..300, &mut out);
        shard.copy_range(200..300, &mut out);
        assert_eq!(out, [9, top, 0, 7, 7]);
        let bytes = std::fs::metadata(shard.path()).unwrap().len();
        assert_eq!(bytes, 80 + 104 * shard.width as u64 + 4 * 8);
    }
}

#[test]
fn a_shard_is_a_burn_dataset_of_documents() {
    let (_dir, shard) = shard_of(&[vec![1, 2], vec![3]], 10);
    assert_eq!(Dataset::len(&shard), 2);
    let items: Vec<Vec<u32>> = shard.iter().map(|item| item.unwrap()).collect();
    assert_eq!(items, [vec![1, 2], vec![3]]);
    assert!(shard.get(2).unwrap_err().to_string().contains("no document 2"));
}

#[test]
fn an_empty_shard_opens() {
    let (_dir, shard) = shard_of(&[], 10);
    assert!(shard.is_empty() && shard.documents() == 0 && shard.document_at(0).is_none());
}

#[test]
fn ids_outside_the_vocabulary_are_refused_and_nothing_appears() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.tokens");
    let mut writer = ShardWriter::create(&path, 10).unwrap();
    assert!(writer.push(&[1, 10], 2).unwrap_err().to_string().contains("token 10"));
    drop(writer);
    assert!(!path.exists());
}

#[test]
fn every_truncation_and_every_flipped_byte_is_an_error() {
    let (_dir, shard) = shard_of(&[vec![1, 2, 3], vec![4, 5]], 300);
    let path = shard.path().to_path_buf();
    let good = std::fs::read(&path).unwrap();
    drop(shard);
    let refused = |bytes: &[u8]| {
        let copy = path.with_extension("bad");
        std::fs::write(&copy, bytes).unwrap();
        Shard::open(&copy).is_err()
    };
    assert!(!refused(&good));
    for length in 0..good.len() {
        assert!(refused(&good[..length]), "cut to {length}");
    }
    for at in 0..good.len() {
        for flip in [1, 0x80] {
            let mut bytes = good.clone();
            bytes[at] ^= flip;
            assert!(refused(&bytes), "byte {at}");
        }
    }
    assert!(refused(&[&good[..], &[0]].concat()));
}

#[test]
fn a_wrong_header_is_refused_even_under_a_right_checksum() {
    let (_dir, shard) = shard_of(&[vec![1, 2, 3], vec![4, 5]], 300);
    let path = shard.path().to_path_buf();
    let good = std::fs::read(&path).unwrap();
    drop(shard);
    let refuse = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        let digest = Sha256::new().chain_update(&bytes[HEADER..]).chain_update(&bytes[..COVERED]).finalize();
        bytes[COVERED..HEADER].copy_from_slice(&digest);
        let copy = path.with_extension("bad");
        std::fs::write(&copy, bytes).unwrap();
        Shard::open(&copy).map(|_| ()).map_err(|e| e.to_string())
    };
    let second_offset = HEADER + 5 * 2 + 8;
    refuse(&|_| {}).unwrap();
    for (at, value, expected) in [
        (8, 2, "format version 2"),
        (12, 3, "3 bytes per token"),
        (16, 6, "its header says"),
        (24, 3, "its header says"),
        (second_offset, 0, "bounds"),
        (second_offset, 200, "bounds"),
        (second_offset - 8, 1, "bounds"),
        (second_offset + 8, 4, "bounds"),
    ] {
        let message = refuse(&|bytes| bytes[at] = value).unwrap_err();
        assert!(message.contains(expected), "{at}: {message}");
    }
    let huge = refuse(&|bytes| bytes[16..24].fill(0xFF)).unwrap_err();
    assert!(huge.contains("its header says"), "{huge}");
}
