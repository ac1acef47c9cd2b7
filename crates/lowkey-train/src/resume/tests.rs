use super::*;

#[test]
fn a_folder_takes_one_process_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let held = claim(dir.path()).unwrap();
    let refused = claim(dir.path()).unwrap_err().to_string();
    assert!(refused.contains("another process"), "{refused}");
    drop(held);
    claim(dir.path()).unwrap();
}
