//! What a run may do in a folder, and runs with nothing held out.

use super::*;

#[test]
fn what_lowkey_did_not_make_is_not_replaced() {
    let names =
        ["run.toml", "metrics.jsonl", "environment.json", "evaluation.json", "checkpoints/step-000001/config.json"];
    for name in names {
        let run = TinyRun::new();
        let file = run.out().join(name);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, "# mine").unwrap();
        for (resume, overwrite) in [(false, false), (true, false), (false, true)] {
            let run = TinyRun { dir: tempfile::tempdir().unwrap(), resume, overwrite };
            let options =
                RunOptions { out: file.ancestors().nth(name.split('/').count()).unwrap().into(), ..run.options() };
            std::fs::write(run.dir.path().join("text.txt"), text()).unwrap();
            let refused = message(train(&plain(), &options, &AtomicBool::new(false), &mut |_| {}));
            assert!(
                refused.contains("lowkey did not write it") || refused.contains("already here"),
                "{name}: {refused}"
            );
            assert_eq!(std::fs::read_to_string(&file).unwrap(), "# mine");
        }
    }
}

fn plain() -> RunConfig {
    TinyRun::new().config(&["training.steps=2"])
}

#[test]
fn what_a_user_adds_to_a_run_stays() {
    let run = TinyRun::new();
    std::fs::create_dir(run.out()).unwrap();
    std::fs::write(run.out().join("notes.txt"), "mine").unwrap();
    run.train(&["training.steps=2"]).unwrap();
    let looks_like_one = run.out().join("checkpoints/step-1");
    std::fs::create_dir(&looks_like_one).unwrap();
    let run = run.resumed();
    run.train(&["training.steps=12", "checkpoint.every=1", "checkpoint.keep=1"]).unwrap();
    assert!(looks_like_one.exists());
    assert_eq!(std::fs::read_to_string(run.out().join("notes.txt")).unwrap(), "mine");
}

#[test]
fn a_run_from_before_there_were_marks_goes_on() {
    let run = TinyRun::new();
    run.train(&["training.steps=4"]).unwrap();
    let mark = run.out().join(lowkey_files::mark::MARK);
    std::fs::remove_file(&mark).unwrap();
    let run = run.resumed();
    assert_eq!(run.train(&["training.steps=8"]).unwrap().step, 8);
    assert!(mark.exists());
}

#[cfg(unix)]
#[test]
fn what_leads_out_of_the_folder_is_not_written_through() {
    for name in [".lock", "run.toml", "environment.json", "metrics.jsonl", "evaluation.json"] {
        let run = TinyRun::new();
        run.train(&["training.steps=4"]).unwrap();
        let key = run.dir.path().join("key");
        // It may even be what is expected there.
        let content = std::fs::read(run.out().join(name)).unwrap_or_else(|_| b"secret".to_vec());
        std::fs::write(&key, &content).unwrap();
        let _ = std::fs::remove_file(run.out().join(name));
        std::os::unix::fs::symlink(&key, run.out().join(name)).unwrap();
        let run = run.resumed();
        assert!(message(run.train(&["training.steps=8"])).contains(name));
        assert_eq!(std::fs::read(&key).unwrap(), content);
    }
}

#[test]
fn the_figures_of_a_run_whose_checkpoints_were_removed_stay() {
    let run = TinyRun::new();
    run.train(&["training.steps=20"]).unwrap();
    std::fs::remove_dir_all(run.out().join("checkpoints")).unwrap();
    for (resume, measured) in [(true, true), (false, true), (true, false), (false, false)] {
        if !measured {
            // An interrupted run has not got this one.
            let _ = std::fs::remove_file(run.out().join("evaluation.json"));
        }
        let options = RunOptions { resume, ..run.options() };
        let refused = message(train(&run.config(&[]), &options, &AtomicBool::new(false), &mut |_| {}));
        assert!(refused.contains("trained here to step 20") && refused.contains("--overwrite"), "{refused}");
        assert_eq!(run.metrics().len(), 20);
    }
    let run = TinyRun { overwrite: true, ..run };
    run.train(&["training.steps=2"]).unwrap();
    assert_eq!(run.metrics().len(), 2);
}

#[test]
fn a_run_that_was_killed_before_its_first_checkpoint_starts_anew() {
    let run = TinyRun::new();
    run.train(&["training.steps=8"]).unwrap();
    std::fs::remove_dir_all(run.out().join("checkpoints")).unwrap();
    std::fs::remove_file(run.out().join("evaluation.json")).unwrap();
    // Checkpoints come every eighth step: this is what a kill on the way to the first one leaves.
    let run = run.resumed();
    run.train(&[]).unwrap();
    assert_eq!(run.metrics().len() as u64, STEPS);
}

/// A run on a dataset that holds nothing out, or on one document.
fn nothing_held_out(split: &str) -> TinyRun {
    let run = TinyRun::new();
    let dataset = format!("name = \"d\"\n[source]\nkind = \"text\"\npaths = [\"text.txt\"]\n[split]\n{split}\n");
    std::fs::write(run.dir.path().join("d.toml"), dataset).unwrap();
    let file = std::fs::read_to_string(run.file()).unwrap().replace("path = \"text.txt\"", "dataset = \"d.toml\"");
    std::fs::write(run.file(), file).unwrap();
    run
}

#[test]
fn a_run_with_nothing_held_out_trains_and_its_newest_checkpoint_is_the_best() {
    let run = nothing_held_out("validation_fraction = 0");
    let (mut notes, mut samples) = (Vec::new(), 0);
    let watched = run.watch(&["training.steps=20"], &AtomicBool::new(false), &mut |event| match event {
        Event::Note(note) => notes.push(note),
        Event::Sample { .. } => samples += 1,
        Event::Evaluated { .. } | Event::Finished { .. } => panic!("there is nothing to measure"),
        _ => {}
    });
    let outcome = watched.unwrap();
    assert!(outcome.finished && outcome.evaluation.is_none());
    let said: Vec<_> = notes.iter().filter(|note| note.contains("nothing is held out")).collect();
    assert_eq!((said.len(), samples), (1, 2), "{notes:?}");
    let best = |run: &TinyRun| std::fs::canonicalize(run.out().join("checkpoints/best")).unwrap();
    assert!(best(&run).ends_with("step-000020"));
    assert!(!run.out().join("evaluation.json").exists());
    assert!(run.metrics().iter().all(|m| m.val_loss.is_none()));
    let run = run.resumed();
    run.train(&["training.steps=24"]).unwrap();
    assert!(best(&run).ends_with("step-000024"));
    assert_eq!(names(&run.out().join("checkpoints")), ["best", "step-000020", "step-000024"]);
}

#[test]
fn held_out_documents_that_are_cut_are_said_to_be() {
    let run = TinyRun::new();
    let book = "name = \"s\"\n[source]\nkind = \"storybook\"\nseed = 5\ndocuments = 40\nvalidation_documents = 3\n";
    std::fs::write(run.dir.path().join("s.toml"), book).unwrap();
    let file = std::fs::read_to_string(run.file()).unwrap().replace("path = \"text.txt\"", "dataset = \"s.toml\"");
    std::fs::write(run.file(), file).unwrap();
    let mut on_what = String::new();
    run.watch(&["training.steps=2"], &AtomicBool::new(false), &mut |event| {
        if let Event::Finished { on, evaluation } = event {
            assert_eq!(evaluation.tokens, 3 * 24);
            on_what = on.to_owned();
        }
    })
    .unwrap();
    assert!(
        on_what.starts_with("the first 25 tokens (data.seq_len + 1) of each held-out document, 72 of "),
        "{on_what}"
    );
    assert!(!on_what.contains("of 72 "));
}

#[test]
fn more_threads_than_the_cores_can_serve_are_refused_and_a_few_too_many_are_said() {
    let cores = available_threads();
    let run = TinyRun::new();
    let mut config = run.config(&[]);
    config.training.threads = Some(16 * cores + 1);
    let refused = message(train(&config, &run.options(), &AtomicBool::new(false), &mut |_| {}));
    assert!(refused.starts_with("training.threads = ") && refused.contains(&format!("{cores} cores")), "{refused}");
    assert!(!run.out().exists());
    let mut notes = Vec::new();
    run.watch(
        &["training.steps=1", &format!("training.threads={}", cores + 1)],
        &AtomicBool::new(false),
        &mut |event| {
            if let Event::Note(note) = event {
                notes.push(note);
            }
        },
    )
    .unwrap();
    assert!(notes.iter().any(|note| note.contains(&format!("this machine has {cores} cores"))), "{notes:?}");
}

#[test]
fn a_run_that_fails_says_which_checkpoint_is_left() {
    let wild = ["optimizer.lr=1e15", "lr_scheduler.warmup_steps=0", "lr_scheduler.kind=constant", "eval.every=0"];
    let early = message(TinyRun::new().train(&wild));
    assert!(early.contains("no checkpoint was written before it"), "{early}");
    let late = message(TinyRun::new().train(&[&wild[..], &["checkpoint.every=1"]].concat()));
    assert!(late.contains("the last good checkpoint is kept, that of step "), "{late}");
}

#[test]
fn a_signal_while_the_corpus_is_prepared_ends_it_soon() {
    let run = TinyRun::new();
    let interrupt = AtomicBool::new(false);
    let outcome = run.watch(&[], &interrupt, &mut |event| {
        assert!(!matches!(event, Event::Ready { .. }), "it went on to the end");
        interrupt.store(true, Ordering::Relaxed);
    });
    let outcome = outcome.unwrap();
    assert_eq!((outcome.step, outcome.finished), (0, false));
    assert!(!run.out().join("metrics.jsonl").exists() && !run.out().join("data").exists());
    run.resumed().train(&["training.steps=2"]).unwrap();
}
