//! Sessions that go on with a run, under other conditions than it began with.

use std::path::PathBuf;

use super::*;

/// What a session notes.
fn notes(run: &TinyRun, overrides: &[&str]) -> Vec<String> {
    let mut notes = Vec::new();
    run.watch(overrides, &AtomicBool::new(false), &mut |event| {
        if let Event::Note(note) = event {
            notes.push(note);
        }
    })
    .unwrap();
    notes
}

/// The files of a checkpoint that hold numbers.
fn numbers(checkpoint: &Path) -> [Vec<u8>; 2] {
    ["model.safetensors", "trainer.safetensors"].map(|file| std::fs::read(checkpoint.join(file)).unwrap())
}

/// Trains the `run.toml` that a run left in a new folder; the step's checkpoint there.
fn trained_anew(run: &TinyRun, step: u64) -> PathBuf {
    let config = RunConfig::load(&run.out().join("run.toml"), &[]).unwrap();
    let out = run.dir.path().join("anew");
    let options = RunOptions { out: out.clone(), resume: false, ..run.options() };
    train(&config, &options, &AtomicBool::new(false), &mut |_| {}).unwrap();
    out.join(format!("checkpoints/step-{step:06}"))
}

#[test]
fn a_run_made_longer_says_so_and_its_run_file_gives_the_same_bits() {
    let kinds = [&[][..], &["model.elastic.ranks=[2]", "training.elastic_start=0.5"]];
    for elastic in kinds {
        let with = |steps: &'static str| [&[steps][..], elastic].concat();
        let run = TinyRun::new();
        run.train(&with("training.steps=12")).unwrap();
        let run = run.resumed();
        let notes = notes(&run, &with("training.steps=20"));
        let config = RunConfig::load(&run.out().join("run.toml"), &[]).unwrap();
        let (before, after) =
            (format!("{:.3e} at step 12", config.rate(11)), format!("{:.3e} at step 13", config.rate(12)));
        assert!(config.rate(11) == 0.0 && config.rate(12) > 0.0);
        let said = ["training.steps was 12 and is 20", &before, &after, "[[history]]"];
        assert!(notes.iter().any(|note| said.iter().all(|part| note.contains(part))), "{notes:?}");
        assert_eq!(config.history, [crate::run_config::EarlierPlan { until: 12, steps: 12 }]);
        for (step, metrics) in run.metrics().iter().enumerate() {
            let rate = config.rate(step as u64);
            assert!((metrics.lr - rate).abs() <= rate * 1e-15, "step {step}: {} for {rate}", metrics.lr);
        }

        // Its own run file goes on with it, too, and there is nothing left to do.
        let config_again = RunConfig::load(&run.out().join("run.toml"), &[]).unwrap();
        let outcome = train(&config_again, &run.options(), &AtomicBool::new(false), &mut |_| {}).unwrap();
        assert!(outcome.finished && outcome.step == 20);
        assert!(numbers(&run.checkpoint(20)) == numbers(&trained_anew(&run, 20)), "{elastic:?}: other bits");
    }
}

#[test]
fn a_run_does_not_become_shorter_than_it_is() {
    let run = TinyRun::new();
    run.train(&["training.steps=12"]).unwrap();
    let run = run.resumed();
    let before = std::fs::read(run.out().join("run.toml")).unwrap();
    let refused = message(run.train(&["training.steps=10"]));
    assert!(refused.starts_with("training.steps = 10: the run has taken 12 steps already"), "{refused}");
    assert_eq!(std::fs::read(run.out().join("run.toml")).unwrap(), before);
    assert!(run.out().join("evaluation.json").exists());

    // Stopped on the way, it may end earlier than planned, and is the run that was planned so from there on.
    let run = TinyRun::new();
    run.stop_after(&[], 9).unwrap();
    let run = run.resumed();
    run.train(&["training.steps=15"]).unwrap();
    assert!(numbers(&run.checkpoint(15)) == numbers(&trained_anew(&run, 15)));
}

#[test]
fn another_history_than_the_runs_own_is_another_run() {
    let run = TinyRun::new();
    run.train(&["training.steps=4"]).unwrap();
    let run = run.resumed();
    let mut config = run.config(&["training.steps=8"]);
    config.history = vec![crate::run_config::EarlierPlan { until: 2, steps: 3 }];
    let refused = train(&config, &run.options(), &AtomicBool::new(false), &mut |_| {});
    assert!(message(refused).contains("[history] is not what the run began with"));
}

#[test]
fn the_same_data_by_another_path_are_the_same_run() {
    let run = TinyRun::new();
    run.train(&["training.steps=4"]).unwrap();
    let run = run.resumed();
    let (dir, copy) = (run.dir.path(), run.dir.path().join("copy.txt"));
    std::fs::write(&copy, text()).unwrap();
    for (path, steps) in [(dir.join("./text.txt"), 5), (dir.join("text.txt"), 6), (copy, 7)] {
        let path = format!("data.path={}", path.display());
        assert_eq!(run.train(&[&path, &format!("training.steps={steps}")]).unwrap().step, steps);
    }
}

#[test]
fn other_text_is_another_run_and_the_tokens_of_this_one_stay() {
    let run = TinyRun::new();
    run.train(&["training.steps=4"]).unwrap();
    let run = run.resumed();
    let tokens =
        || ["train.tokens", "validation.tokens"].map(|name| std::fs::read(run.out().join("data").join(name)).unwrap());
    let before = tokens();
    let last_line = text().trim_end().rfind('\n').unwrap() + 1;
    for (changed, what) in [
        (text().replace("fox", "owl"), "training"),
        (text() + "the owl sees the fox.\n", "training"),
        (format!("{}{}", &text()[..last_line], text()[last_line..].replace("the", "one")), "held-out"),
    ] {
        std::fs::write(run.dir.path().join("text.txt"), changed).unwrap();
        let refused = message(run.train(&["training.steps=8"]));
        assert!(refused.contains(&format!("{what} tokens are not those this run began with")), "{refused}");
        assert!(tokens() == before, "the tokens of the run are gone");
        assert_eq!(run.metrics().len(), 4);
    }
    std::fs::write(run.dir.path().join("text.txt"), text()).unwrap();
    run.train(&["training.steps=8"]).unwrap();
}

/// Rewrites a checkpoint's `trainer.json`, and its checksum.
fn change_state(checkpoint: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let read = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(checkpoint.join(name)).unwrap()).unwrap()
    };
    let (mut state, mut sums) = (read("trainer.json"), read("checksums.json"));
    change(&mut state);
    std::fs::write(checkpoint.join("trainer.json"), state.to_string()).unwrap();
    sums["trainer.json"] = lowkey_files::hash::sha256(&checkpoint.join("trainer.json")).unwrap().into();
    std::fs::write(checkpoint.join("checksums.json"), sums.to_string()).unwrap();
}

#[test]
fn best_begins_anew_where_something_else_is_measured() {
    for (told, kept) in [(true, 1), (false, 1), (true, 2)] {
        let run = TinyRun::new();
        let batches = format!("eval.batches={kept}");
        run.train(&["training.steps=20", &batches]).unwrap();
        // A loss that no later one reaches.
        change_state(&run.checkpoint(20), |state| {
            assert_eq!(state["measured"], kept);
            state["best"] = serde_json::json!([20, 1e-3]);
            if !told {
                // As older checkpoints are: then the run file of that session says it.
                for key in ["measured", "held_out"] {
                    state.as_object_mut().unwrap().remove(key);
                }
            }
        });
        let run = run.resumed();
        let notes = notes(&run, &["training.steps=30", "eval.batches=2"]);
        let best = std::fs::canonicalize(run.out().join("checkpoints/best")).unwrap();
        let again = best.ends_with("step-000030");
        let noted = notes.iter().any(|note| note.contains(&format!("eval.batches was {kept} and is 2")));
        assert_eq!((again, noted), (kept != 2, kept != 2), "{notes:?}");
        assert_eq!(best.ends_with("step-000020"), kept == 2);
    }
}

#[test]
fn a_checkpoint_whose_checksums_name_too_little_is_not_gone_on_from() {
    let run = TinyRun::new();
    run.train(&["training.steps=20"]).unwrap();
    std::fs::write(run.checkpoint(20).join("checksums.json"), "{}").unwrap();
    let mut bytes = std::fs::read(run.checkpoint(20).join("model.safetensors")).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(run.checkpoint(20).join("model.safetensors"), bytes).unwrap();
    let unbroken = TinyRun::new();
    unbroken.train(&["training.steps=20"]).unwrap();
    let run = run.resumed();
    let notes = notes(&run, &["training.steps=20"]);
    assert!(notes.iter().any(|note| note.contains("skipping a damaged checkpoint")), "{notes:?}");
    assert!(numbers(&run.checkpoint(20)) == numbers(&unbroken.checkpoint(20)));
}

#[test]
fn metrics_that_are_no_text_do_not_stop_a_run() {
    let run = TinyRun::new();
    run.train(&["training.steps=4"]).unwrap();
    let path = run.out().join("metrics.jsonl");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.extend(b"\xff\xfe\n{\"step\": 5, \"tok");
    std::fs::write(&path, bytes).unwrap();
    let run = run.resumed();
    run.train(&["training.steps=8"]).unwrap();
    assert_eq!(run.metrics().iter().map(|m| m.step).collect::<Vec<_>>(), (1..=8).collect::<Vec<_>>());
}

#[test]
fn a_run_that_gets_no_better_ends_early_and_stays_ended() {
    // Steps too small to change a number: no evaluation is better than the first.
    let still =
        ["eval.every=4", "eval.patience=2", "optimizer.lr=1e-30", "optimizer.weight_decay=0.0", "checkpoint.every=0"];
    let run = TinyRun::new();
    let mut notes = Vec::new();
    let outcome = run.watch(&still, &AtomicBool::new(false), &mut |event| {
        if let Event::Note(note) = event {
            notes.push(note);
        }
    });
    let outcome = outcome.unwrap();
    let losses: Vec<(u64, f64)> = run.metrics().into_iter().filter_map(|m| Some((m.step, m.val_loss?))).collect();
    let best = losses.iter().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap().0;
    assert_eq!(outcome.step, best + 8, "{losses:?}");
    assert!(outcome.finished && outcome.step < STEPS && outcome.evaluation.is_some());
    assert!(notes.iter().any(|note| note.contains("no lower held-out loss for 2 evaluations")), "{notes:?}");
    assert!(run.checkpoint(outcome.step).exists() && run.checkpoint(best).exists());

    let run = run.resumed();
    assert_eq!(run.train(&still).unwrap().step, outcome.step);
    // One that is asked for more patience goes on.
    let patient: Vec<&str> =
        still.iter().map(|set| if set.contains("patience") { "eval.patience=100" } else { set }).collect();
    assert_eq!(run.train(&patient).unwrap().step, STEPS);
}
