use std::io::{Seek, SeekFrom, Write};

use super::*;

impl ShardWriter {
    /// Appends a document of `tokens` that stands for `bytes` bytes of text. One without tokens is left out.
    pub(crate) fn push(&mut self, tokens: &[u32], bytes: u64) -> Result<()> {
        self.extend(tokens, bytes)?;
        self.end_document();
        Ok(())
    }
}

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
            assert_eq!(shard.document(i).unwrap().as_ref(), Some(document));
        }
        assert_eq!([0, 2, 3, 4, 103].map(|i| shard.document_at(i)), [0, 0, 1, 2, 2].map(Some));
        assert_eq!((shard.document_at(104), shard.document(3).unwrap()), (None, None));
        let mut out = vec![9];
        shard.copy_range(2..5, &mut out).unwrap();
        shard.copy_range(103..300, &mut out).unwrap();
        shard.copy_range(200..300, &mut out).unwrap();
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
        (8, 3, "format version 3"),
        (8, 2, "its header says"),
        (14, 1, "unknown mark 1"),
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

#[test]
fn a_document_may_come_in_parts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.tokens");
    let mut writer = ShardWriter::create(&path, 10).unwrap();
    for part in [&[1, 2][..], &[3], &[]] {
        writer.extend(part, 1).unwrap();
    }
    writer.end_document();
    writer.end_document();
    writer.push(&[4], 1).unwrap();
    assert_eq!((writer.documents(), writer.tokens()), (2, 4));
    writer.extend(&[5], 1).unwrap();
    writer.finish().unwrap();
    let shard = Shard::open(&path).unwrap();
    let documents: Vec<Vec<u32>> = (0..3).map(|i| shard.document(i).unwrap().unwrap()).collect();
    assert_eq!(documents, [vec![1, 2, 3], vec![4], vec![5]]);
}

/// Opens the shard's file for writing over, at a time that no clock takes for that of its making.
fn written_over(shard: &Shard, write: impl FnOnce(&mut File)) {
    let mut file = File::options().write(true).open(shard.path()).unwrap();
    write(&mut file);
    file.set_modified(SystemTime::now() + std::time::Duration::from_secs(9)).unwrap();
}

#[test]
fn a_shard_that_is_cut_while_it_is_read_is_an_error() {
    for length in [0, 79, 90] {
        let (_dir, shard) = shard_of(&[vec![1, 2, 3], vec![4, 5]], 300);
        written_over(&shard, |file| file.set_len(length).unwrap());
        let message = shard.document(0).unwrap_err().to_string();
        assert!(message.contains("another program has") && message.contains("a.tokens"), "{message}");
    }
}

#[test]
fn tokens_that_are_written_over_while_they_are_read_are_an_error() {
    for token in [7u16, u16::MAX] {
        let (_dir, shard) = shard_of(&[vec![1, 2, 3], vec![4, 5]], 300);
        written_over(&shard, |file| {
            file.seek(SeekFrom::Start(HEADER as u64 + 2)).unwrap();
            file.write_all(&token.to_le_bytes()).unwrap();
        });
        let message = shard.document(0).unwrap_err().to_string();
        assert!(message.contains("another program has changed the file"), "{message}");
    }
}

#[test]
fn a_shard_that_was_only_touched_or_replaced_is_read_on() {
    let (_dir, shard) = shard_of(&[vec![1, 2, 3], vec![4, 5]], 300);
    written_over(&shard, |_| {});
    assert_eq!(shard.document(1).unwrap(), Some(vec![4, 5]));
    let mut writer = ShardWriter::create(shard.path(), 300).unwrap();
    writer.push(&[9, 9], 1).unwrap();
    writer.finish().unwrap();
    assert_eq!(shard.document(1).unwrap(), Some(vec![4, 5]), "the old file is still open");
}

/// A masked shard of these documents and of what is learnt of each, and the folder that holds it.
pub(crate) fn masked_shard(documents: &[(Vec<u32>, Vec<bool>)], pairs: bool) -> (tempfile::TempDir, Shard) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.tokens");
    let mut writer = ShardWriter::masked(&path, 100_000, pairs).unwrap();
    for (tokens, learnt) in documents {
        writer.push_learnt(tokens, learnt, tokens.len() as u64).unwrap();
    }
    writer.finish().unwrap();
    let shard = Shard::open(&path).unwrap();
    (dir, shard)
}

#[test]
fn a_mask_round_trips_and_never_asks_for_the_first_token() {
    let documents: Vec<(Vec<u32>, Vec<bool>)> = (1..30u32)
        .map(|length| ((0..length).collect(), (0..length).map(|i| (i * i + length) % 3 != 1).collect()))
        .collect();
    let (_dir, shard) = masked_shard(&documents, false);
    assert!(shard.is_masked() && !shard.is_pairs());
    let mut sum = 0;
    for (i, (tokens, learnt)) in documents.iter().enumerate() {
        let mut learnt = learnt.clone();
        learnt[0] = false;
        sum += learnt.iter().filter(|learnt| **learnt).count() as u64;
        assert_eq!(shard.document(i).unwrap().as_ref(), Some(tokens));
        assert_eq!(shard.learnt(i).unwrap(), Some(learnt));
    }
    assert_eq!(shard.learnt_tokens().unwrap(), sum);
    let mut across = Vec::new();
    shard.copy_learnt(shard.len() - 3..shard.len() + 9, &mut across).unwrap();
    assert_eq!(across.len(), 3);
    assert_eq!(shard.learnt(29).unwrap(), None);
}

#[test]
fn a_shard_without_a_mask_learns_everything_and_has_the_bytes_it_always_had() {
    let (_dir, shard) = shard_of(&[vec![1, 2, 3], vec![4, 5]], 300);
    assert_eq!(shard.learnt(1).unwrap(), Some(vec![true, true]));
    let bytes = std::fs::read(shard.path()).unwrap();
    assert_eq!(bytes[8..16], [1, 0, 0, 0, 2, 0, 0, 0]);
    assert_eq!(bytes.len(), HEADER + 5 * 2 + 3 * 8);
}

#[test]
fn every_damage_of_a_mask_is_an_error() {
    let (_dir, shard) =
        masked_shard(&[(vec![1, 2, 3], vec![false, true, true]), (vec![4, 5], vec![false, true])], true);
    assert!(shard.is_pairs());
    let path = shard.path().to_path_buf();
    let good = std::fs::read(&path).unwrap();
    let refused = |bytes: &[u8]| {
        let copy = path.with_extension("bad");
        std::fs::write(&copy, bytes).unwrap();
        Shard::open(&copy).is_err()
    };
    assert!(!refused(&good));
    for at in 0..good.len() {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        assert!(refused(&bytes), "byte {at}");
        assert!(refused(&good[..at]), "cut to {at}");
    }
    let odd = {
        let path = path.with_extension("odd");
        let mut writer = ShardWriter::masked(&path, 9, true).unwrap();
        writer.push_learnt(&[1, 2], &[false, true], 2).unwrap();
        writer.finish().unwrap();
        Shard::open(&path).unwrap_err().to_string()
    };
    assert!(odd.contains("one has no other"), "{odd}");
}
