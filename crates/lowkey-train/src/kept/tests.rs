use lowkey_batch::Batch;

use super::*;

fn key(i: u8) -> Key {
    [i; 16]
}

fn file(dir: &Path) -> PathBuf {
    dir.join("a.bin")
}

#[test]
fn what_was_kept_is_there_again() {
    let dir = tempfile::tempdir().unwrap();
    let kept = Kept::open(&dir.path().join("new"), "a").unwrap();
    kept.put(key(1), b"one");
    kept.put(key(2), b"");
    kept.put(key(1), b"another");
    let expected = [Some(b"another".to_vec()), Some(Vec::new()), None];
    assert_eq!([1, 2, 3].map(|i| kept.get(key(i))), expected);
    // One process at a time.
    assert!(Kept::open(&dir.path().join("new"), "a").is_err());
    kept.in_order().unwrap();
    drop(kept);
    let kept = Kept::open(&dir.path().join("new"), "a").unwrap();
    assert_eq!([1, 2, 3].map(|i| kept.get(key(i))), expected);
}

#[test]
fn a_file_that_was_cut_anywhere_keeps_what_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let kept = Kept::open(dir.path(), "a").unwrap();
    kept.put(key(1), b"first");
    kept.put(key(2), b"second");
    drop(kept);
    let whole = std::fs::read(file(dir.path())).unwrap();
    let first = HEAD.len() + 24 + 5;
    for cut in HEAD.len()..whole.len() {
        std::fs::write(file(dir.path()), &whole[..cut]).unwrap();
        let kept = Kept::open(dir.path(), "a").unwrap();
        assert_eq!(kept.get(key(1)).is_some(), cut >= first, "{cut}");
        assert_eq!(kept.get(key(2)), None, "{cut}");
        kept.put(key(3), b"third");
        drop(kept);
        let kept = Kept::open(dir.path(), "a").unwrap();
        assert_eq!(kept.get(key(3)).as_deref(), Some(&b"third"[..]), "{cut}");
    }
}

#[test]
fn what_was_damaged_is_not_told_and_claims_cost_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let kept = Kept::open(dir.path(), "a").unwrap();
    kept.put(key(1), b"first");
    drop(kept);
    let whole = std::fs::read(file(dir.path())).unwrap();
    for at in HEAD.len()..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x80;
        std::fs::write(file(dir.path()), &bytes).unwrap();
        assert_eq!(Kept::open(dir.path(), "a").unwrap().get(key(1)), None, "byte {at}");
    }
    std::fs::write(file(dir.path()), b"something else").unwrap();
    let message = Kept::open(dir.path(), "a").unwrap_err().to_string();
    assert!(message.contains("a.bin") && message.contains("remove it"), "{message}");
}

#[test]
fn a_row_is_known_by_all_that_a_model_makes_of_it() {
    let mut batch = Batch::with_capacity(3, 2);
    for ids in [[1, 2, 3], [1, 2, 3]] {
        for id in ids {
            batch.input_ids.push(id);
            batch.targets.push(i64::from(id) + 1);
            batch.document_starts.push(0);
        }
        batch.end_row(true);
    }
    let first = |batch: &Batch| row_key(batch.all(), 0);
    assert_eq!(first(&batch), row_key(batch.all(), 1));
    let before = first(&batch);
    for change in [
        &(|batch: &mut Batch| batch.input_ids[1] = 7) as &dyn Fn(&mut Batch),
        &|batch| batch.targets[2] = -100,
        &|batch| batch.document_starts[1] = 1,
    ] {
        let mut other = batch.clone();
        change(&mut other);
        assert_ne!(first(&other), before);
    }
}
