use super::*;
use crate::shard::tests::shard_of;

impl Sampler {
    /// Steps in the first epoch, rounded up. With document packing the following ones may differ a little.
    fn batches_per_epoch(&self) -> u64 {
        let rows = match &self.order {
            Order::Stream { windows } => *windows,
            Order::Documents { pieces, plans } => self.plan(pieces, plans, 0).1.rows(),
        };
        rows.div_ceil(self.batch_size as u64)
    }
}

/// Documents of the given lengths whose tokens are all different, so that a token tells its place.
fn numbered(lengths: &[usize]) -> Vec<Vec<u32>> {
    let mut next = 1;
    lengths
        .iter()
        .map(|&length| {
            let document = (next..next + length as u32).collect();
            next += length as u32;
            document
        })
        .collect()
}

fn sampler(
    lengths: &[usize],
    seq_len: usize,
    batch: usize,
    seed: u64,
    packing: Packing,
) -> (tempfile::TempDir, Sampler) {
    let (dir, shard) = shard_of(&numbered(lengths), 100_000);
    (dir, Sampler::new(Arc::new(shard), seq_len, batch, seed, packing, true).unwrap())
}

fn lengths(count: u64, most: u64) -> Vec<usize> {
    (0..count).map(|i| 1 + (mix(i) % most) as usize).collect()
}

/// Checks what must hold in any batch over numbered tokens, and returns (inputs, targets) that are not padding.
fn check(batch: &Batch, documents: &[usize], packing: Packing) -> (Vec<u32>, Vec<i64>) {
    let total = batch.rows * batch.seq_len;
    assert_eq!([batch.input_ids.len(), batch.targets.len(), batch.document_starts.len()], [total; 3]);
    let bounds: Vec<u32> = documents.iter().scan(1, |at, &n| Some(std::mem::replace(at, *at + n as u32))).collect();
    let document = |token: u32| bounds.partition_point(|&start| start <= token);
    let (mut inputs, mut targets) = (Vec::new(), Vec::new());
    for row in 0..batch.rows {
        let at = row * batch.seq_len;
        let ids = &batch.input_ids[at..at + batch.seq_len];
        let starts = &batch.document_starts[at..at + batch.seq_len];
        for t in 0..batch.seq_len {
            let start = starts[t] as usize;
            assert!(start <= t);
            // A start is where either the row, a jump in the text, or a new document begins; nothing begins between.
            assert!(t == 0 || start == t || start == starts[t - 1] as usize);
            let same = t > 0 && ids[t] == ids[t - 1] + 1 && document(ids[t]) == document(ids[t - 1]);
            if ids[t] == 0 {
                assert_eq!(batch.targets[at + t], IGNORE);
                assert!(t == 0 || ids[t - 1] == 0 || start == t, "padding is a document of its own");
                continue;
            }
            // Pieces of one document may meet by chance in document packing; they stay apart there.
            if packing == Packing::Stream {
                assert_eq!(start == t, !same, "row {row}, position {t}");
            } else {
                assert!(start == t || same);
            }
            inputs.push(ids[t]);
            let target = batch.targets[at + t];
            if target != IGNORE {
                assert_eq!(target, i64::from(ids[t]) + 1);
                if packing == Packing::Documents {
                    assert_eq!(document(ids[t] + 1), document(ids[t]), "a target crosses a document bound");
                }
                targets.push(target);
            } else {
                assert_eq!(packing, Packing::Stream, "with packing every input predicts");
            }
        }
    }
    assert_eq!(batch.target_tokens(), targets.len());
    (inputs, targets)
}

fn epoch_rows(sampler: &Sampler, epoch: u64) -> Range<u64> {
    match &sampler.order {
        Order::Stream { windows } => epoch * windows..(epoch + 1) * windows,
        Order::Documents { pieces, plans } => {
            let mut first = 0;
            for _ in 0..epoch {
                first += sampler.plan(pieces, plans, first).1.rows();
            }
            first..first + sampler.plan(pieces, plans, first).1.rows()
        }
    }
}

#[test]
fn a_stream_epoch_visits_every_window_once() {
    let documents = lengths(20, 40);
    let tokens: usize = documents.iter().sum();
    for seq_len in [1, 2, 7, 64, tokens - 1] {
        let (_dir, sampler) = sampler(&documents, seq_len, 3, 11, Packing::Stream);
        let windows = tokens / seq_len;
        for epoch in 0..3 {
            let rows = epoch_rows(&sampler, epoch);
            assert_eq!(rows.end - rows.start, windows as u64);
            let batch = sampler.rows(rows.start, windows).unwrap();
            let (mut inputs, targets) = check(&batch, &documents, Packing::Stream);
            inputs.sort_unstable();
            inputs.dedup();
            assert_eq!(inputs.len(), windows * seq_len, "an input came twice");
            assert!(targets.len() + 1 >= inputs.len(), "only the end of the stream predicts nothing");
        }
    }
}

#[test]
fn the_stream_moves_on_every_epoch() {
    let (_dir, sampler) = sampler(&[1000], 64, 1, 5, Packing::Stream);
    let firsts = |epoch: u64| -> Vec<u32> {
        epoch_rows(&sampler, epoch).map(|row| sampler.rows(row, 1).unwrap().input_ids[0] % 64).collect()
    };
    let phases: std::collections::BTreeSet<u32> = (0..8).flat_map(firsts).collect();
    assert!(phases.len() > 8, "windows always cut at the same places: {phases:?}");
}

#[test]
fn a_packed_epoch_holds_every_piece_once_and_rows_start_at_documents() {
    for (most, seq_len) in [(20, 32), (20, 8), (100, 16), (3, 64)] {
        let documents = lengths(150, most);
        let (_dir, sampler) = sampler(&documents, seq_len, 4, 3, Packing::Documents);
        let Order::Documents { pieces, .. } = &sampler.order else { panic!("packing was asked for") };
        for epoch in 0..3 {
            let rows = epoch_rows(&sampler, epoch);
            let count = (rows.end - rows.start) as usize;
            let batch = sampler.rows(rows.start, count).unwrap();
            let (inputs, _) = check(&batch, &documents, Packing::Documents);
            let mut once = inputs.clone();
            once.sort_unstable();
            once.dedup();
            assert_eq!(once.len(), inputs.len(), "a token came twice in one epoch");
            // Each piece is there from its start; at most one a row is cut, at the row's very end.
            let mut missing = 0;
            for piece in pieces {
                let first = piece.start as u32 + 1;
                assert!(once.binary_search(&first).is_ok(), "a piece is missing");
                missing += (first..first + piece.len).filter(|token| once.binary_search(token).is_err()).count();
            }
            let all: usize = pieces.iter().map(|piece| piece.len as usize).sum();
            assert_eq!(inputs.len() + missing, all);
            assert!(missing <= count * (seq_len - 1));
            // All rows are full but the last one of the epoch.
            let padding = batch.input_ids[..(count - 1) * seq_len].iter().filter(|&&id| id == 0).count();
            assert_eq!(padding, 0);
            let starts: std::collections::BTreeSet<u32> = pieces.iter().map(|p| p.start as u32 + 1).collect();
            assert!(batch.input_ids.chunks(seq_len).all(|row| starts.contains(&row[0])));
        }
    }
}

#[test]
fn long_documents_are_cut_into_pieces_that_lose_no_target() {
    let (_dir, shard) = shard_of(&numbered(&[26, 1, 2]), 100);
    let found: Vec<(usize, u32)> = pieces(&shard, 10).iter().map(|p| (p.start, p.len)).collect();
    assert_eq!(found, [(0, 10), (10, 10), (20, 5), (27, 1)]);
}

#[test]
fn one_small_batch_by_hand() {
    let (_dir, shard) = shard_of(&numbered(&[3, 2]), 100);
    let batches: Vec<Batch> =
        validation_batches(&shard, 4, 2, None, Packing::Documents, true).map(Result::unwrap).collect();
    let i = IGNORE;
    let expected = Batch {
        rows: 1,
        seq_len: 4,
        input_ids: vec![1, 2, 4, 0],
        targets: vec![2, 3, 5, i],
        document_starts: vec![0, 0, 2, 3],
        vectors: None,
        pairs: false,
    };
    assert_eq!(batches, [expected]);
    let batches: Vec<Batch> =
        validation_batches(&shard, 3, 2, None, Packing::Stream, true).map(Result::unwrap).collect();
    let expected = Batch {
        rows: 2,
        seq_len: 3,
        input_ids: vec![1, 2, 3, 4, 0, 0],
        targets: vec![2, 3, 4, 5, i, i],
        document_starts: vec![0, 0, 0, 0, 1, 1],
        vectors: None,
        pairs: false,
    };
    assert_eq!(batches, [expected]);
    let batch = validation_batches(&shard, 4, 1, None, Packing::Stream, true).next().unwrap().unwrap();
    assert_eq!((batch.input_ids, batch.document_starts), (vec![1, 2, 3, 4], vec![0, 0, 0, 3]));
}

#[test]
fn a_batch_is_a_pure_function_of_seed_and_step() {
    let documents = lengths(60, 30);
    for packing in [Packing::Stream, Packing::Documents] {
        let (_dir, forward) = sampler(&documents, 16, 4, 9, packing);
        let (_other_dir, backward) = sampler(&documents, 16, 4, 9, packing);
        let steps = forward.batches_per_epoch() * 3 + 2;
        let mut expected: Vec<Batch> = (0..steps).map(|step| forward.batch(step).unwrap()).collect();
        let reversed: Vec<Batch> = (0..steps).rev().map(|step| backward.batch(step).unwrap()).collect();
        expected.reverse();
        assert!(expected == reversed, "{packing:?}: the order of asking matters");
        assert_eq!(forward.batch(steps / 2).unwrap(), backward.batch(steps / 2).unwrap());
        let halves = [forward.rows(8, 2).unwrap(), forward.rows(10, 2).unwrap()].map(|half| half.input_ids).concat();
        assert_eq!(halves, forward.batch(2).unwrap().input_ids);

        let (_dir, other) = sampler(&documents, 16, 4, 10, packing);
        assert_ne!(other.batch(0).unwrap(), forward.batch(0).unwrap());
        let first = epoch_rows(&forward, 1).start;
        assert_ne!(forward.rows(first, 8).unwrap(), forward.rows(0, 8).unwrap(), "epochs must differ");
    }
}

#[test]
fn epochs_are_counted() {
    let (_dir, stream) = sampler(&[101], 10, 4, 1, Packing::Stream);
    assert_eq!((stream.batches_per_epoch(), stream.epoch(0), stream.epoch(5)), (3, 0.0, 2.0));
    let (_dir, packed) = sampler(&lengths(60, 30), 16, 1, 1, Packing::Documents);
    let ends = epoch_rows(&packed, 1);
    assert_eq!(packed.batches_per_epoch(), ends.start);
    assert_eq!((packed.epoch(0), packed.epoch(ends.start), packed.epoch(ends.end)), (0.0, 1.0, 2.0));
    assert!((0.4..0.6).contains(&packed.epoch(ends.start / 2)));
}

#[test]
fn without_masks_every_position_sees_its_row() {
    let (_dir, shard) = shard_of(&numbered(&lengths(40, 9)), 1000);
    let shard = Arc::new(shard);
    for packing in [Packing::Stream, Packing::Documents] {
        let with = |mask| Sampler::new(Arc::clone(&shard), 16, 2, 1, packing, mask).unwrap().batch(0).unwrap();
        let (masked, open) = (with(true), with(false));
        assert_eq!((&masked.input_ids, &masked.targets), (&open.input_ids, &open.targets));
        assert!(open.document_starts.iter().all(|&start| start == 0));
        assert!(masked.document_starts.iter().any(|&start| start > 0));
        let mut batches = validation_batches(&shard, 16, 2, None, packing, false);
        assert!(batches.all(|batch| batch.unwrap().document_starts.iter().all(|&start| start == 0)));
    }
}

#[test]
fn validation_predicts_every_token_once_and_in_order() {
    let documents = lengths(40, 30);
    let tokens: usize = documents.iter().sum();
    let (_dir, shard) = shard_of(&numbered(&documents), 1000);
    let firsts: Vec<i64> = documents.iter().scan(1i64, |at, &n| Some(std::mem::replace(at, *at + n as i64))).collect();
    for seq_len in [1, 5, 16, 1000] {
        for packing in [Packing::Stream, Packing::Documents] {
            let batches = || validation_batches(&shard, seq_len, 4, None, packing, true).map(Result::unwrap);
            let mut targets = Vec::new();
            for batch in batches() {
                assert!(batch.rows >= 1 && batch.rows <= 4);
                targets.extend(check(&batch, &documents, packing).1);
            }
            let expected: Vec<i64> = (1..=tokens as i64)
                .filter(|t| if packing == Packing::Stream { *t > 1 } else { !firsts.contains(t) })
                .collect();
            assert_eq!(targets, expected, "seq_len {seq_len}, {packing:?}");
            let count = batches().count();
            assert!(batches().take(count - 1).all(|batch| batch.rows == 4));
            let some: Vec<Batch> =
                validation_batches(&shard, seq_len, 4, Some(1), packing, true).map(Result::unwrap).collect();
            assert_eq!(some, batches().take(1).collect::<Vec<Batch>>());
        }
    }
    let (_dir, empty) = shard_of(&[], 10);
    assert_eq!(validation_batches(&empty, 8, 2, None, Packing::Stream, true).count(), 0);
    assert_eq!(validation_batches(&empty, 8, 2, None, Packing::Documents, true).count(), 0);
}

#[test]
fn what_cannot_be_sampled_is_refused() {
    let (_dir, shard) = shard_of(&numbered(&[1, 1, 1]), 10);
    let shard = Arc::new(shard);
    let refuse = |seq_len, batch, packing| {
        let sampler = Sampler::new(Arc::clone(&shard), seq_len, batch, 0, packing, true);
        sampler.map(|_| ()).unwrap_err().to_string()
    };
    assert!(refuse(3, 1, Packing::Stream).contains("3 tokens, too few for seq_len = 3"));
    assert!(refuse(1, 1, Packing::Documents).contains("nothing to predict"));
    assert!(refuse(0, 1, Packing::Stream).contains("seq_len = 0"));
    assert!(refuse(1, 0, Packing::Stream).contains("batch_size = 0"));
}
