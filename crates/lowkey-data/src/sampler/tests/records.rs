use super::*;
use crate::shard::tests::masked_shard;

/// Records of different lengths whose tokens are all different; about a third of them is learnt, the last token always.
fn records(count: u64, most: u64) -> Vec<(Vec<u32>, Vec<bool>)> {
    let documents = numbered(&lengths(count, most).into_iter().map(|length| length + 3).collect::<Vec<_>>());
    let learnt = |document: &Vec<u32>| {
        let last = document.len() - 1;
        document.iter().enumerate().map(|(i, id)| i == last || mix(u64::from(*id)).is_multiple_of(3)).collect()
    };
    documents.iter().map(|document| (document.clone(), learnt(document))).collect()
}

/// The learnt tokens of records, the first of each left out; sorted.
fn targets(records: &[(Vec<u32>, Vec<bool>)]) -> Vec<i64> {
    let learnt = |(document, learnt): &(Vec<u32>, Vec<bool>)| -> Vec<i64> {
        document.iter().zip(learnt).skip(1).filter(|(_, learnt)| **learnt).map(|(id, _)| i64::from(*id)).collect()
    };
    records.iter().flat_map(learnt).collect()
}

/// Targets of a batch; each must be the token after the one that is read, in the same document.
fn found(batch: &Batch) -> Vec<i64> {
    let mut found = Vec::new();
    for (at, target) in batch.targets.iter().enumerate().filter(|(_, target)| **target != IGNORE) {
        assert_eq!(*target, i64::from(batch.input_ids[at]) + 1);
        found.push(*target);
    }
    found
}

#[test]
fn an_epoch_of_records_has_each_learnt_token_once_and_cuts_none() {
    let records = records(60, 20);
    let (_dir, shard) = masked_shard(&records, false);
    let sampler = Sampler::of_records(Arc::new(shard), 30, 4, 9, TooLong::Drop, true).unwrap();
    assert_eq!(sampler.left_out(), LeftOut::default());
    for epoch in 0..3 {
        let rows = epoch_rows(&sampler, epoch);
        let batch = sampler.rows(rows.start, (rows.end - rows.start) as usize).unwrap();
        let mut found = found(&batch);
        found.sort_unstable();
        assert_eq!(found, targets(&records));
    }
}

#[test]
fn packed_and_unpacked_records_have_the_same_targets_and_see_the_same_before_them() {
    let records = records(40, 12);
    let (_dir, shard) = masked_shard(&records, false);
    let shard = Arc::new(shard);
    // What a target is predicted from: the tokens from its document's start on.
    let seen = |seq_len: usize| {
        let sampler = Sampler::of_records(Arc::clone(&shard), seq_len, 4, 2, TooLong::Drop, true).unwrap();
        let rows = epoch_rows(&sampler, 0);
        let batch = sampler.rows(0, rows.end as usize).unwrap();
        let mut seen = Vec::new();
        for (at, target) in batch.targets.iter().enumerate().filter(|(_, target)| **target != IGNORE) {
            let row = at / seq_len * seq_len;
            let from = row + batch.document_starts[at] as usize;
            seen.push((*target, batch.input_ids[from..=at].to_vec()));
        }
        seen.sort();
        (seen, batch.rows)
    };
    let ((alone, many), (packed, few)) = (seen(15), seen(200));
    assert!(alone == packed);
    assert!(few * 5 < many, "{few} rows and {many}");
}

#[test]
fn records_that_are_too_long_are_left_out_or_cut_and_counted() {
    let all: Vec<(Vec<u32>, Vec<bool>)> = vec![
        ((1..6).collect(), vec![false, false, true, true, true]),
        // Something is learnt of its beginning.
        ((10..30).collect(), (0..20).map(|i| i == 2 || i > 15).collect()),
        // Nothing is.
        ((40..60).collect(), (0..20).map(|i| i > 15).collect()),
    ];
    let (_dir, shard) = masked_shard(&all, false);
    let shard = Arc::new(shard);
    let epoch = |too_long| {
        let sampler = Sampler::of_records(Arc::clone(&shard), 8, 2, 2, too_long, true).unwrap();
        let rows = epoch_rows(&sampler, 0).end;
        let mut found = found(&sampler.rows(0, rows as usize).unwrap());
        found.sort_unstable();
        (found, sampler.left_out())
    };
    assert_eq!(epoch(TooLong::Drop), (vec![3, 4, 5], LeftOut { dropped: 2, cut: 0 }));
    // The mask stays where the tokens are.
    assert_eq!(epoch(TooLong::Cut), (vec![3, 4, 5, 12], LeftOut { dropped: 1, cut: 1 }));
    let none = Sampler::of_records(Arc::clone(&shard), 2, 2, 2, TooLong::Drop, true).map(|_| ()).unwrap_err();
    assert!(none.to_string().contains("all of its 3 records are longer than seq_len = 2"), "{none}");
    let stream = Sampler::new(shard, 2, 2, 2, Packing::Stream, true).map(|_| ()).unwrap_err();
    assert!(stream.to_string().contains("packing must be"), "{stream}");
}

#[test]
fn a_held_out_walk_over_records_has_each_learnt_token_once() {
    let records = records(50, 40);
    let (_dir, shard) = masked_shard(&records, false);
    for seq_len in [5, 16, 100] {
        for packing in [Packing::Stream, Packing::Documents] {
            let batches = validation_batches(&shard, seq_len, 3, None, packing, true);
            let found: Vec<i64> = batches.flat_map(|batch| found(&batch.unwrap())).collect();
            assert_eq!(found, targets(&records), "{seq_len}");
        }
    }
}

#[test]
fn a_pair_lies_in_two_rows_one_after_the_other() {
    let all = records(20, 6);
    let (_dir, shard) = masked_shard(&all, true);
    let shard = Arc::new(shard);
    let sampler = Sampler::of_records(Arc::clone(&shard), 9, 4, 3, TooLong::Drop, true).unwrap();
    let mut seen = Vec::new();
    for step in 0..5 {
        let batch = sampler.batch(step).unwrap();
        assert!(batch.pairs && batch.rows == 4);
        for (row, ids) in batch.input_ids.chunks(9).enumerate() {
            let document = all.iter().position(|(document, _)| document[0] == ids[0]).unwrap();
            assert_eq!(document % 2, row % 2);
            seen.push(document);
            let length = all[document].0.len() - 1;
            assert_eq!(ids[..length], all[document].0[..length]);
            assert!(ids[length..].iter().all(|id| *id == 0));
            assert!(batch.document_starts[row * 9..row * 9 + length].iter().all(|start| *start == 0));
        }
    }
    assert!(seen.chunks(2).all(|pair| pair[0] + 1 == pair[1]));
    seen.sort_unstable();
    assert_eq!(seen, (0..20).collect::<Vec<_>>(), "an epoch has each once");
    assert_eq!(sampler.epoch(5), 1.0);
    let odd = Sampler::of_records(Arc::clone(&shard), 9, 3, 3, TooLong::Drop, true).map(|_| ()).unwrap_err();
    assert!(odd.to_string().contains("must be even"), "{odd}");
    let held: Vec<Batch> =
        validation_batches(&shard, 9, 3, None, Packing::Documents, true).map(Result::unwrap).collect();
    assert!(held.iter().all(|batch| batch.pairs && batch.rows % 2 == 0));
    assert_eq!(held.iter().flat_map(found).collect::<Vec<_>>(), targets(&all));
    // Where one is too long, both go.
    let short = Sampler::of_records(shard, 7, 2, 3, TooLong::Drop, true).unwrap();
    let fits = |i: usize| all[i].0.len() <= 8;
    let dropped = (0..10).filter(|i| !fits(2 * i) || !fits(2 * i + 1)).count() as u64;
    assert_eq!(short.left_out(), LeftOut { dropped, cut: 0 });
}

#[test]
fn rows_of_records_are_a_pure_function_of_seed_and_step() {
    for pairs in [false, true] {
        let records = records(30, 12);
        let (_dir, shard) = masked_shard(&records, pairs);
        let shard = Arc::new(shard);
        let sampler = |seed| Sampler::of_records(Arc::clone(&shard), 20, 4, seed, TooLong::Drop, true).unwrap();
        let forward: Vec<Batch> = (0..40).map(|step| sampler(1).batch(step).unwrap()).collect();
        let other = sampler(1);
        for step in (0..40).rev() {
            assert!(other.batch(step).unwrap() == forward[step as usize]);
        }
        assert!(sampler(2).batch(0).unwrap() != forward[0]);
    }
}
