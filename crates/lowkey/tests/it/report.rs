//! The page that a run leaves, the page about several, and the list of runs.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::commands::{RUN, json, lowkey, succeed, text};

fn train(dir: &Path, out: &str, set: &[&str]) -> i32 {
    fs::write(dir.join("story.txt"), "The cat sat on the mat and saw a mouse.\n".repeat(60)).unwrap();
    fs::write(dir.join("tiny.toml"), RUN).unwrap();
    let (run, out) = (dir.join("tiny.toml"), dir.join(out));
    let mut arguments = vec!["train", text(&run), "--out", text(&out)];
    arguments.extend(set.iter().flat_map(|set| ["--set", set]));
    lowkey(&arguments).0
}

/// The points of a page's charts by title and curve: step and figure.
fn points(page: &str, title: &str, curve: &str) -> Vec<(u64, f64)> {
    let begin = "<script type=\"application/json\" id=\"figures\">";
    let data = page.split_once(begin).unwrap().1.split_once("</script>").unwrap().0;
    let data: Value = serde_json::from_str(data).unwrap();
    let chart = data["charts"].as_array().unwrap().iter().find(|chart| chart["title"] == title).unwrap().clone();
    let series = chart["series"].as_array().unwrap().iter().find(|series| series["name"] == curve).unwrap().clone();
    let points = series["points"].as_array().unwrap().iter();
    points.map(|point| (point[0].as_u64().unwrap(), point[3].as_f64().unwrap())).collect()
}

#[test]
fn a_run_leaves_a_page_with_the_figures_of_its_metrics() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(train(dir.path(), "run", &[]), 0);
    let out = dir.path().join("run");
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    let metrics = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for (title, key) in [("Training loss", "train_loss"), ("Held-out loss", "val_loss"), ("Gradient norm", "grad_norm")]
    {
        let written: Vec<(u64, f64)> =
            lines.iter().filter_map(|line| Some((line["step"].as_u64()?, line[key].as_f64()?))).collect();
        assert_eq!(points(&page, title, "tiny"), written, "{title}");
    }
    assert!(page.contains("<strong>tiny</strong>, finished: step 12 of 12"));
    // What it wrote at its evaluations.
    let samples = fs::read_to_string(out.join("samples.jsonl")).unwrap();
    let samples: Vec<Value> = samples.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(samples.iter().map(|sample| sample["step"].as_u64().unwrap()).collect::<Vec<_>>(), [6, 12]);
    assert!(page.contains("<b>step 12</b>") && page.contains("<q>The</q>"));
    // It goes on, and its page is written anew.
    let run = dir.path().join("tiny.toml");
    let longer = ["--set", "training.steps=14", "--resume"];
    succeed(&[&["train", text(&run), "--out", text(&out)], &longer[..]].concat());
    assert!(fs::read_to_string(out.join("report.html")).unwrap().contains("step 14 of 14"));
}

#[test]
fn a_page_tells_of_several_runs_and_goes_where_it_is_asked_to() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(train(dir.path(), "a", &["run.name=a"]), 0);
    assert_eq!(train(dir.path(), "b", &["run.name=b", "model.attention=mha"]), 0);
    let (a, b, to) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("both.html"));
    succeed(&["report", text(&a), text(&b), "--out", text(&to)]);
    let page = fs::read_to_string(&to).unwrap();
    assert_eq!(points(&page, "Training loss", "b").len(), 12);
    assert!(page.contains("model.attention") && page.contains("What differs"));
    let said = succeed(&["report", text(&a), text(&b)]);
    assert!(said.contains("report.html") && dir.path().join("report.html").is_file(), "{said}");
    let (code, _, why) = lowkey(&["report", text(dir.path())]);
    assert!(code == 1 && why.contains("is no folder of a run"), "{why}");
    // A page that cannot be written is no failure of its run.
    fs::create_dir_all(dir.path().join("c/report.html")).unwrap();
    let many = vec![text(&a); 20];
    assert_eq!(lowkey(&[&["report"], &many[..]].concat()).0, 2);
}

#[test]
fn runs_are_listed_with_what_goes_on_with_them() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(train(dir.path(), "runs/done", &[]), 0);
    let name = "a-name-that-is-far-too-long-for-the-column-of-a-table/that-has-a-hundred-columns";
    assert_eq!(train(dir.path(), &format!("runs/{name}"), &["training.steps=6"]), 0);
    let long = dir.path().join("runs").join(name);
    // As a process that was killed on its way to more steps leaves it.
    let run = fs::read_to_string(long.join("run.toml")).unwrap().replace("steps = 6\n", "steps = 1200\n");
    fs::write(long.join("run.toml"), run).unwrap();
    for file in ["outcome.json", "evaluation.json"] {
        fs::remove_file(long.join(file)).unwrap();
    }
    // A rate that no number survives.
    assert_eq!(train(dir.path(), "runs/lost", &["optimizer.lr=1e30", "optimizer.grad_clip=1e30"]), 1);
    let runs = dir.path().join("runs");
    let listed = json(&["runs", text(&runs), "--json"]);
    let listed = listed.as_array().unwrap();
    let states: Vec<&str> = listed.iter().map(|run| run["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["stopped", "finished", "failed"], "{listed:?}");
    assert_eq!((&listed[0]["step"], &listed[0]["steps"]), (&Value::from(6), &Value::from(1200)));
    assert!(listed[0]["left_s"].as_f64().unwrap() > 0.0 && listed[0]["val_loss"].is_number());
    assert!(listed[2]["why"].as_str().unwrap().contains("not finite") && listed[1]["command"].is_null());
    let table = succeed(&["runs", text(&runs)]);
    let (rows, commands) = table.split_once("\n\n").unwrap();
    assert!(rows.lines().count() == 4 && rows.lines().all(|line| line.chars().count() <= 100), "{table}");
    assert!(rows.contains("6/1200") && commands.contains("not finite"), "{table}");
    // The command works as it stands.
    let command = listed[0]["command"].as_str().unwrap();
    assert!(table.contains(command), "{table}");
    let run = fs::read_to_string(long.join("run.toml")).unwrap().replace("steps = 1200\n", "steps = 8\n");
    fs::write(long.join("run.toml"), run).unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_lowkey"))
        .args(command.split(' ').skip(1))
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(json(&["runs", text(&long), "--json"])[0]["state"], "finished");
    let empty = tempfile::tempdir().unwrap();
    assert!(succeed(&["runs", text(empty.path())]).contains("no runs below"));
}
