use super::*;

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_file_is_replaced_whole_and_what_was_left_is_cleared() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.json");
    // A process that was killed half way.
    fs::write(dir.path().join(".a.json.lowkey-new"), "half").unwrap();
    write_json(&path, &[1, 2]).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "[\n  1,\n  2\n]\n");
    assert_eq!(names(dir.path()), ["a.json"]);
    drop(NewFile::create(&path).unwrap());
    assert_eq!(names(dir.path()), ["a.json"]);
}

#[test]
fn two_do_not_write_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let first = NewFile::create(&path).unwrap();
    assert!(NewFile::create(&path).unwrap_err().to_string().contains("another process"));
    sweep(dir.path()).unwrap();
    first.commit().unwrap();
    assert_eq!(names(dir.path()), ["a"]);
}

#[test]
fn leftovers_are_swept_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(".a.lowkey-new"), "x").unwrap();
    fs::create_dir(dir.path().join(".b.lowkey-new")).unwrap();
    fs::write(dir.path().join(".b.lowkey-new").join("c"), "x").unwrap();
    // Killed when the folder stood already, and the lock was still there.
    fs::write(dir.path().join(".e.lowkey-lock"), "").unwrap();
    fs::write(dir.path().join(".c.lowkey-new.txt"), "x").unwrap();
    fs::write(dir.path().join("d.lowkey-new"), "x").unwrap();
    sweep(dir.path()).unwrap();
    assert_eq!(names(dir.path()), [".c.lowkey-new.txt", "d.lowkey-new"]);
}

#[cfg(unix)]
#[test]
fn links_are_followed_and_streams_are_written_through() {
    use std::os::unix::fs::{FileTypeExt, symlink};
    let dir = tempfile::tempdir().unwrap();
    let (real, through) = (dir.path().join("real"), dir.path().join("through"));
    fs::write(&real, "old").unwrap();
    symlink("real", &through).unwrap();
    output(&through, b"new").unwrap();
    assert_eq!(fs::read_to_string(&real).unwrap(), "new");
    assert!(through.symlink_metadata().unwrap().is_symlink());
    // A device stays one.
    output(Path::new("/dev/null"), b"gone").unwrap();
    assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());
    let full = output(Path::new("/dev/full"), b"lost").unwrap_err().to_string();
    assert!(full.contains("No space"), "{full}");
    // So does a pipe, and its reader gets the bytes.
    let fifo = dir.path().join("fifo");
    let name = std::ffi::CString::new(fifo.to_str().unwrap()).unwrap();
    // SAFETY: the name is a C string.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let reader = std::thread::spawn({
        let fifo = fifo.clone();
        move || fs::read(fifo).unwrap()
    });
    output(&fifo, b"piped").unwrap();
    assert_eq!(reader.join().unwrap(), b"piped");
    assert!(fs::metadata(&fifo).unwrap().file_type().is_fifo());
    assert!(output(dir.path(), b"x").unwrap_err().to_string().contains("is a folder"));
    let gone = dir.path().join("gone");
    symlink("nowhere", &gone).unwrap();
    assert!(output(&gone, b"x").unwrap_err().to_string().contains("link to nowhere"));
}

#[cfg(unix)]
#[test]
fn a_log_is_never_written_through_a_link() {
    let dir = tempfile::tempdir().unwrap();
    let (key, log) = (dir.path().join("key"), dir.path().join("metrics.jsonl"));
    fs::write(&key, "secret").unwrap();
    std::os::unix::fs::symlink(&key, &log).unwrap();
    assert!(append(&log).is_err());
    assert_eq!(fs::read_to_string(&key).unwrap(), "secret");
}

#[cfg(unix)]
#[test]
fn a_link_is_replaced_in_one_step_and_a_folder_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let best = dir.path().join("best");
    link("step-1", &best).unwrap();
    link("step-2", &best).unwrap();
    assert_eq!(fs::read_link(&best).unwrap(), Path::new("step-2"));
    fs::remove_file(&best).unwrap();
    fs::create_dir(&best).unwrap();
    assert!(link("step-3", &best).is_err());
}
