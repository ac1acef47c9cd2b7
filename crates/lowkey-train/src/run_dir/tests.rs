use super::*;

/// A folder of a run with so many lines of metrics.
fn folder(dir: &Path, name: &str, lines: u64) -> PathBuf {
    let path = dir.join(name);
    fs::create_dir_all(&path).unwrap();
    fs::write(path.join(RUN_FILE), "[run]\nname = \"r\"\n[training]\nsteps = 10\n").unwrap();
    let metrics = (1..=lines).map(|step| {
        let held = if step == 2 { ",\"val_loss\":2.5" } else { "" };
        format!("{{\"step\":{step},\"tokens\":{},\"time_s\":{},\"train_loss\":1.5{held}}}\n", step * 8, step * 3)
    });
    fs::write(path.join(METRICS), metrics.collect::<String>()).unwrap();
    path
}

#[test]
fn runs_are_found_below_a_folder_and_nothing_else_is_taken_for_one() {
    let dir = tempfile::tempdir().unwrap();
    let expected = ["a", "study/arm/seed-1", "study/arm/seed-2"].map(|name| folder(dir.path(), name, 1));
    fs::create_dir_all(dir.path().join("experiment")).unwrap();
    fs::write(dir.path().join("experiment/run.toml"), "").unwrap();
    folder(dir.path(), ".hidden", 1);
    folder(dir.path(), "a/inside", 1);
    #[cfg(unix)]
    std::os::unix::fs::symlink("..", dir.path().join("study/circle")).unwrap();
    assert_eq!(RunDir::list(dir.path()).unwrap(), expected);
    assert_eq!(RunDir::list(&expected[0]).unwrap(), expected[..1]);
    assert!(RunDir::list(&dir.path().join("none")).is_err());
    let why = RunDir::open(&dir.path().join("study")).unwrap_err().to_string();
    assert!(why.contains("is no folder of a run: it holds no run.toml"), "{why}");
}

#[test]
fn a_run_says_how_it_stands() {
    let dir = tempfile::tempdir().unwrap();
    let path = folder(dir.path(), "a", 4);
    let state = || {
        let run = RunDir::open(&path).unwrap();
        (run.state, run.why)
    };
    assert_eq!(state(), (State::Stopped, None));
    let standing = Standing::of(&RunDir::open(&path).unwrap());
    assert_eq!((standing.step, standing.steps, standing.val_loss), (Some(4), Some(10), Some(2.5)));
    assert_eq!((standing.train_loss, standing.left_s), (Some(1.5), Some(18.0)));

    fs::create_dir_all(path.join("checkpoints/step-000010")).unwrap();
    assert_eq!(state(), (State::Finished, None));
    fs::write(path.join(OUTCOME), "{\"state\":\"failed\",\"step\":4,\"why\":\"no numbers\"}").unwrap();
    assert_eq!(state(), (State::Failed, Some("no numbers".into())));
    // Nobody who is not there trains.
    fs::write(path.join(OUTCOME), "{\"state\":\"running\",\"step\":4}").unwrap();
    assert_eq!(state().0, State::Finished);
    let names: Vec<&str> = NAMES.to_vec();
    let held = lowkey_files::Owned::claim(&path, lowkey_files::mark::Kind::Run, &names, true).unwrap();
    assert_eq!(state().0, State::Running);
    drop(held);
    assert_eq!(state().0, State::Finished);
}

#[test]
fn a_run_of_which_little_is_left_is_told_as_far_as_it_goes() {
    let dir = tempfile::tempdir().unwrap();
    let path = folder(dir.path(), "a", 0);
    for text in ["", "{\"step\":", "null\n[]\n", "{\"step\":3,\"train_loss\":null}\n"] {
        fs::write(path.join(METRICS), text).unwrap();
        let standing = Standing::of(&RunDir::open(&path).unwrap());
        assert_eq!((standing.train_loss, standing.left_s, standing.steps), (None, None, Some(10)));
    }
    fs::write(path.join(ENVIRONMENT), "{").unwrap();
    fs::write(path.join(RUN_FILE), "[training]\nsteps = \"many\"\n").unwrap();
    let run = RunDir::open(&path).unwrap();
    assert_eq!((run.steps(), run.environment, run.name.as_str()), (None, Value::Null, "a"));
    fs::write(path.join(RUN_FILE), format!("[run]\nname = \"{}\"\n", "ü".repeat(5000))).unwrap();
    assert_eq!(RunDir::open(&path).unwrap().name.chars().count(), LONGEST_NAME + 1);
    fs::write(path.join(RUN_FILE), "[training").unwrap();
    assert!(RunDir::open(&path).unwrap_err().to_string().contains("not a run file"));
}
