//! Folders that hold a run already, damaged checkpoints, disks that fill up, and runs that diverge.

use std::fs;
use std::path::Path;

use super::fixture::{RUN, edit, edit_json};
use super::{Case, case};

const WEIGHTS: &str = "model.safetensors";

/// A command on a copy of the trained run.
fn on_run(name: &str, arguments: &[&str]) -> Case {
    case(name, arguments).with(|fixture, dir| fixture.give(dir, &["run"]))
}

fn resume(name: &str, flags: &[&str]) -> Case {
    on_run(name, &[&["train", "run.toml", "--out", "run", "--resume"], flags].concat())
}

/// Damages both checkpoints of the run.
fn each(damage: impl Fn(&Path) + Send + Sync + Copy + 'static) -> impl Fn(&super::Fixture, &Path) + Send + Sync {
    move |_, dir| ["step-000002", "step-000004"].iter().for_each(|s| damage(&dir.join("run/checkpoints").join(s)))
}

fn flip(path: &Path) {
    edit(path, |bytes| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
    });
}

/// What a run that goes on may write beside its checkpoints.
const HEAD: [&str; 6] = [
    "run/run.toml",
    "run/environment.json",
    "run/metrics.jsonl",
    "run/evaluation.json",
    "run/outcome.json",
    "run/report.html",
];

pub(super) fn cases() -> Vec<Case> {
    let last = "run/checkpoints/step-000004";
    let whole = ["info", "run/checkpoints/step-000002"];
    let mut cases = vec![
        on_run("the run is here already", &["train", "run.toml", "--out", "run"])
            .says(&["run/checkpoints/step-000004", "--resume continues it, --overwrite replaces it, --out DIR"]),
        on_run(
            "overwriting with a wrong model",
            &["train", "run.toml", "--out", "run", "--overwrite", "--set", "model.qk_rope_head_dim=3"],
        )
        .code(2)
        .says(&["run.toml", "model.qk_rope_head_dim = 3"]),
        on_run(
            "overwriting with a wrong key",
            &["train", "run.toml", "--out", "run", "--overwrite", "--set", "model.qk_rope=3"],
        )
        .code(2)
        .says(&["run.toml", "`qk_rope`"]),
        resume("resuming another rate", &["--set", "optimizer.lr=0.5"]).says(&[
            "run/run.toml",
            "[optimizer] is not what the run began with",
            "--out DIR",
        ]),
        resume("resuming another model", &["--set", "model.kv_lora_rank=4"])
            .says(&["run/run.toml", "[model] is not what the run began with"]),
        resume("resuming another text", &[])
            .file("text.txt", "quite another text, and not a short one either. ".repeat(30))
            .says(&["run/data", "the training tokens are not those this run began with", "restore it"]),
        resume("resuming with fewer steps than were taken", &["--set", "training.steps=3"]).code(2).says(&[
            "run.toml",
            "training.steps = 3: the run has taken 4 steps already",
            "--out DIR",
        ]),
        resume("resuming figures without their checkpoints", &[])
            .with(|_, dir| fs::remove_dir_all(dir.join("run/checkpoints")).unwrap())
            .says(&["run/metrics.jsonl", "trained here to step 4", "--overwrite starts anew"]),
        case("a run file where its run would be written", &["train", "run.toml", "--out", "."])
            .says(&["run.toml: is there, and lowkey did not write it as part of a run", "another --out"]),
        case("the same, to be overwritten", &["train", "run.toml", "--out", ".", "--overwrite"])
            .says(&["run.toml: is there, and lowkey did not write it as part of a run"]),
        resume("resuming without run.toml", &[])
            .with(|_, dir| fs::remove_file(dir.join("run/run.toml")).unwrap())
            .says(&["run/run.toml", "No such file"]),
        // Every checkpoint damaged: nothing may be written over what could still be mended.
        resume("all weights damaged", &[]).with(each(|dir| flip(&dir.join(WEIGHTS)))).says(&[
            "run/checkpoints: no checkpoint here is whole",
            WEIGHTS,
            "SHA-256",
            "--overwrite",
        ]),
        resume("no checksums", &[]).with(each(|dir| fs::remove_file(dir.join("checksums.json")).unwrap())).says(&[
            "no checkpoint here is whole",
            "checksums.json",
            "--overwrite",
        ]),
        resume("trainer's state cut", &[])
            .with(each(|dir| edit(&dir.join("trainer.json"), |b| b.truncate(20))))
            .says(&["no checkpoint here is whole", "trainer.json", "--overwrite"]),
        resume("moments gone", &[])
            .with(each(|dir| fs::remove_file(dir.join("trainer.safetensors")).unwrap()))
            .says(&["no checkpoint here is whole", "trainer.safetensors", "--overwrite"]),
        resume("checksums not JSON", &[])
            .with(each(|dir| edit(&dir.join("checksums.json"), |b| b.truncate(30))))
            .says(&["no checkpoint here is whole", "checksums.json", "not a table of checksums"]),
        on_run("damaged, and not asked to resume", &["train", "run.toml", "--out", "run"])
            .with(each(|dir| flip(&dir.join(WEIGHTS))))
            .says(&["run/checkpoints/step-000004", "--overwrite replaces it"]),
        // One damaged: the one before serves.
        resume("newest damaged", &[])
            .with(|_, dir| flip(&dir.join("run/checkpoints/step-000004").join(WEIGHTS)))
            .code(0)
            .says(&["skipping a damaged checkpoint", "run/checkpoints/step-000004/model.safetensors", "done"])
            .may_change(&HEAD)
            .may_change(&[
                "run/checkpoints/step-000004/model.safetensors",
                "run/checkpoints/step-000004/trainer.json",
                "run/checkpoints/step-000004/checksums.json",
            ])
            .then(&["info", last]),
        on_run("fine-tuning from damaged weights", &["train", "tune.toml", "--out", "new"])
            .file("tune.toml", RUN.replace("[model]", "[init]\nfrom = \"run/checkpoints/best\"\n[model]"))
            .with(|_, dir| {
                edit(&dir.join("tune.toml"), |bytes| {
                    let text = String::from_utf8(bytes.clone()).unwrap();
                    let (head, rest) = text.split_once("[model]").unwrap();
                    *bytes = format!("{head}[data]{}", rest.split_once("[data]").unwrap().1).into_bytes();
                });
                flip(&dir.join("run/checkpoints/step-000004").join(WEIGHTS));
            })
            .says(&["run/checkpoints/step-000004/model.safetensors", "SHA-256", "the file has changed since"]),
    ];
    for (command, flags) in [
        ("generate", &["--prompt", "the", "--max-new-tokens", "2"][..]),
        ("eval", &["--data", "text.txt"]),
        ("info", &[]),
    ] {
        cases.push(
            on_run(&format!("{command} with a flipped bit"), &[&[command, "run/checkpoints/best"], flags].concat())
                .with(|_, dir| flip(&dir.join("run/checkpoints/step-000004").join(WEIGHTS)))
                .says(&["model.safetensors", "SHA-256", "use another checkpoint"]),
        );
    }
    cases.extend([
        resume("best a folder instead of a link", &["--set", "training.steps=8"])
            .with(|fixture, dir| {
                fs::remove_file(dir.join("run/checkpoints/best")).unwrap();
                fixture.give_model("run", dir);
                fs::rename(dir.join("model"), dir.join("run/checkpoints/best")).unwrap();
            })
            .code(0)
            .says(&["resuming after step 4 of 8", "done"])
            .may_change(&HEAD)
            .may_change(&["run/checkpoints/"])
            .then(&["info", "run/checkpoints/best"]),
        on_run("a page about what is no run", &["report", "run", "run/checkpoints"])
            .says(&["run/checkpoints: is no folder of a run: it holds no run.toml"]),
        on_run("a page where somebody's stands", &["report", "run"])
            .with(|_, dir| fs::write(dir.join("run/report.html"), "<p>mine</p>").unwrap())
            .says(&["run/report.html: is there, and is no page of lowkey's", "--out"]),
        on_run("a page in the place of a folder", &["report", "run", "--out", "run/data"])
            .says(&["run/data: is a folder"]),
        resume("a page of somebody's does not end a run", &["--set", "training.steps=6"])
            .with(|_, dir| fs::write(dir.join("run/report.html"), "<p>mine</p>").unwrap())
            .code(0)
            .says(&["note: no page about this run was written", "is no page of lowkey's", "done"])
            .may_change(&["run/run.toml", "run/environment.json", "run/metrics.jsonl", "run/evaluation.json"])
            .may_change(&["run/outcome.json", "run/checkpoints/", "run/lowkey.json"]),
        case("a list of what is not there", &["runs", "nowhere"]).says(&["nowhere", "No such file"]),
        on_run("metrics without a step", &["info", "run"])
            .with(|_, dir| fs::write(dir.join("run/metrics.jsonl"), "").unwrap())
            .says(&["run", "metrics.jsonl holds no step"]),
        resume("checksums right, state wrong", &[])
            .with(each(|dir| {
                edit_json(&dir.join("trainer.json"), |v| v["step"] = "two".into());
                let sum = lowkey_files::hash::sha256(&dir.join("trainer.json")).unwrap();
                edit_json(&dir.join("checksums.json"), |v| v["trainer.json"] = sum.into());
            }))
            .says(&["run/checkpoints/step-000004/trainer.json", "not a trainer's state"]),
        // Where to write.
        case("a file where the run should be", &["train", "run.toml", "--out", "text.txt"])
            .says(&["text.txt", "is a file, and a folder is wanted here"]),
        case("a file on the way to the run", &["train", "run.toml", "--out", "text.txt/new"])
            .says(&["text.txt/new", "Not a directory"]),
        case("a file where shards should be", &["data", "prepare", "text.txt", "--out", "run.toml"])
            .says(&["run.toml: is a file"]),
        // A disk that fills up, as a limit on the size of a file.
        resume("disk full at a checkpoint", &["--set", "training.steps=8"])
            .limit(40)
            .says(&["model.safetensors", "too large"])
            .may_change(&HEAD)
            .then(&whole)
            .then(&["info", last])
            .then(&["generate", last, "--prompt", "the", "--max-new-tokens", "2"])
            .then(&["train", "run.toml", "--out", "run", "--resume", "--set", "training.steps=8"]),
        case("disk full at the shards", &["data", "prepare", "big.txt", "--out", "shards"])
            .file("big.txt", "a line of a long text\n".repeat(20_000))
            .limit(100)
            .says(&["train.tokens", "too large"]),
        case("disk full at the logits", &["logits", "model", "--ids", "in.safetensors", "--out", "out.safetensors"])
            .with(|fixture, dir| fixture.give_model("run", dir))
            .file("in.safetensors", {
                let ids: Vec<u8> = (0..160i64).flat_map(i64::to_le_bytes).collect();
                let view = safetensors::tensor::TensorView::new(safetensors::Dtype::I64, vec![10, 16], &ids).unwrap();
                safetensors::serialize([("input_ids", view)], None).unwrap()
            })
            .limit(40)
            .says(&["out.safetensors", "too large"]),
        // A run that diverges.
        resume("diverging after a good checkpoint", &["--set", "training.steps=8"])
            .with(|_, dir| {
                // The run as if it had been trained at this rate so far.
                for file in ["run.toml", "run/run.toml"] {
                    edit(&dir.join(file), |bytes| {
                        let text = String::from_utf8(bytes.clone()).unwrap();
                        let lines = text.lines().map(|line| if line.starts_with("lr = ") { "lr = 1e30" } else { line });
                        *bytes = lines.collect::<Vec<_>>().join("\n").into_bytes();
                    });
                }
            })
            .says(&["step 6: ", "is not finite", "data rows 10 to 11", "the last good checkpoint is kept"])
            .may_change(&HEAD)
            .then(&["info", last])
            .then(&["generate", last, "--prompt", "the", "--max-new-tokens", "2"]),
        case("a rate far too high", &["train", "run.toml", "--out", "new", "--set", "optimizer.lr=1e30"]).says(&[
            "step 2: the loss is not finite",
            "data rows 2 to 3",
            "no checkpoint was written before it",
            "Lower optimizer.lr",
        ]),
        case(
            "a rate beyond all numbers",
            &["train", "run.toml", "--out", "new", "--set", "optimizer.lr=1e300", "--set", "checkpoint.every=1"],
        )
        .says(&["step 1: ", "is not finite", "Lower optimizer.lr"]),
        case(
            "diverged at the last step",
            &["train", "run.toml", "--out", "new", "--set", "optimizer.lr=1e30", "--set", "training.steps=1"],
        )
        .says(&["step 1: the held-out loss is not finite", "Lower optimizer.lr"]),
        case("huge weights", &["train", "run.toml", "--out", "new", "--set", "model.initializer_range=1e30"]).says(&[
            "step 1: the gradient of model.embed_tokens.weight is not finite",
            "data rows 0 to 1",
            "Lower optimizer.lr",
        ]),
    ]);
    // `ulimit` is a Unix thing.
    cases.retain(|case| cfg!(unix) || case.file_limit.is_none());
    cases
}
