use super::*;

fn make(target: &Path, kind: Kind, replace: Replace, content: &str) -> Result<Option<PathBuf>> {
    let staging = Staging::begin(target, kind, replace)?;
    fs::write(staging.dir().join("a"), content).unwrap();
    fs::create_dir(staging.dir().join("sub")).unwrap();
    fs::write(staging.dir().join("sub").join("b"), content).unwrap();
    staging.commit()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_folder_appears_whole_and_is_replaced_only_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("deep").join("x");
    make(&target, Kind::Export, Replace::Never, "1").unwrap();
    let why = make(&target, Kind::Export, Replace::Never, "2").unwrap_err().to_string();
    assert!(why.contains("--overwrite"), "{why}");
    assert_eq!(make(&target, Kind::Export, Replace::Marked, "2").unwrap(), None);
    assert_eq!(fs::read_to_string(target.join("sub").join("b")).unwrap(), "2");
    drop(Staging::begin(&target, Kind::Export, Replace::Marked).unwrap());
    assert_eq!(names(target.parent().unwrap()), ["x"]);
    assert_eq!(names(&target), ["a", MARK, "sub"]);
}

#[test]
fn what_lowkey_did_not_make_is_never_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("x");
    let refused = |kind: Kind| make(&target, kind, Replace::Marked, "new").unwrap_err().to_string();
    fs::create_dir(&target).unwrap();
    fs::write(target.join("certificate.json"), "{}").unwrap();
    assert!(refused(Kind::Export).contains("no lowkey.json"));
    fs::write(target.join(MARK), "{}").unwrap();
    assert!(refused(Kind::Export).contains("not what lowkey writes"));
    fs::remove_dir_all(&target).unwrap();

    make(&target, Kind::Export, Replace::Never, "1").unwrap();
    assert!(refused(Kind::Model).contains("is an export, and a converted model does not replace it"));
    fs::write(target.join("id_rsa"), "key").unwrap();
    assert!(refused(Kind::Export).contains("id_rsa: was not written by lowkey"));
    fs::remove_file(target.join("id_rsa")).unwrap();
    fs::create_dir(target.join("notes")).unwrap();
    assert!(refused(Kind::Export).contains("notes: was not written"));
    fs::remove_dir(target.join("notes")).unwrap();
    fs::write(target.join("a"), "edited").unwrap();
    assert!(refused(Kind::Export).contains("a: has been changed"));
    assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "edited");
    fs::write(target.join("a"), "1").unwrap();
    make(&target, Kind::Export, Replace::Marked, "2").unwrap();
    assert_eq!(names(dir.path()), ["x"]);
}

#[test]
fn a_file_that_comes_while_the_folder_is_written_is_not_lost() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("x");
    let staging = Staging::begin(&target, Kind::Data, Replace::Marked).unwrap();
    fs::create_dir(&target).unwrap();
    fs::write(target.join("notes"), "mine").unwrap();
    assert!(staging.commit().is_err());
    assert_eq!(fs::read_to_string(target.join("notes")).unwrap(), "mine");
    assert_eq!(names(dir.path()), ["x"]);
}

#[test]
fn what_a_killed_process_left_is_put_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("x");
    make(&target, Kind::Export, Replace::Never, "1").unwrap();
    // Killed between the two renames, where a system cannot exchange.
    fs::rename(&target, dir.path().join(".x.lowkey-old")).unwrap();
    fs::create_dir(dir.path().join(".x.lowkey-new")).unwrap();
    fs::write(dir.path().join(".x.lowkey-lock"), "").unwrap();
    recover(&target).unwrap();
    assert_eq!(names(dir.path()), ["x"]);
    assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "1");
    // Killed while it wrote.
    fs::create_dir(dir.path().join(".x.lowkey-new")).unwrap();
    fs::write(dir.path().join(".x.lowkey-new").join("half"), "").unwrap();
    make(&target, Kind::Export, Replace::Marked, "2").unwrap();
    assert_eq!(names(dir.path()), ["x"]);
    assert_eq!(names(&target), ["a", MARK, "sub"]);
}

#[test]
fn one_process_writes_a_folder_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("x");
    let held = Staging::begin(&target, Kind::Data, Replace::Never).unwrap();
    let why = Staging::begin(&target, Kind::Data, Replace::Never).unwrap_err().to_string();
    assert!(why.contains("another process"), "{why}");
    recover(&target).unwrap();
    assert!(held.dir().is_dir());
}

#[cfg(unix)]
#[test]
fn a_link_is_followed_and_the_current_folder_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (real, through) = (dir.path().join("real"), dir.path().join("through"));
    fs::create_dir(&real).unwrap();
    std::os::unix::fs::symlink("real", &through).unwrap();
    make(&through, Kind::Model, Replace::Never, "1").unwrap();
    assert_eq!(names(dir.path()), ["real", "through"]);
    assert_eq!(names(&real), ["a", MARK, "sub"]);
    for above in [".", "..", "/"] {
        let why = Staging::begin(Path::new(above), Kind::Model, Replace::Vouched).unwrap_err().to_string();
        assert!(why.contains("folder that you are in") || why.contains("no name"), "{above}: {why}");
    }
}
