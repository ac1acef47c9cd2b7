//! A GPU against the CPU: the environment variable `LOWKEY_TEST_DEVICE` names it; without one nothing is compared, which is said.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::commands::{RUN, json, lowkey, succeed, text};

/// The device that tests run on where it is not the CPU.
pub(crate) fn name() -> Option<String> {
    let name = std::env::var("LOWKEY_TEST_DEVICE").ok().filter(|name| name != "cpu");
    if name.is_none() {
        println!("LOWKEY_TEST_DEVICE names no GPU: nothing compared");
    }
    name
}

/// A run file with its text, in a folder of its own.
fn run_file(dir: &Path) -> PathBuf {
    let story = "The cat sat on the mat. The dog saw the cat. A bird sang to them both, and the sun went down. ";
    std::fs::write(dir.join("story.txt"), story.repeat(40)).unwrap();
    let path = dir.join("run.toml");
    std::fs::write(&path, RUN).unwrap();
    path
}

fn train(file: &Path, out: &Path, device: &str, more: &[&str]) {
    let mut arguments = vec!["train", text(file), "--out", text(out), "--device", device];
    arguments.extend(more);
    succeed(&arguments);
}

/// A figure of every step.
fn figures(run: &Path, key: &str) -> Vec<f64> {
    let lines = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()[key].as_f64().unwrap()).collect()
}

#[test]
fn a_run_on_a_gpu_follows_one_on_the_cpu_and_its_model_says_the_same() {
    let Some(gpu) = name() else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = run_file(dir.path());
    for (kind, more) in [
        ("mla", &["--set", "metrics.every=1"][..]),
        ("gqa", &["--set", "metrics.every=1", "--set", "model.attention=gqa", "--set", "model.head_dim=6"]),
        ("muon", &["--set", "metrics.every=1", "--set", "optimizer.kind=muon"]),
        (
            "recompute",
            &["--set", "metrics.every=1", "--set", "training.recompute=block", "--set", "training.z_loss=0.001"],
        ),
    ] {
        let [on_cpu, on_gpu] = ["cpu", "gpu"].map(|name| dir.path().join(format!("{kind}-{name}")));
        train(&file, &on_cpu, "cpu", more);
        train(&file, &on_gpu, &gpu, more);
        for key in ["train_loss", "grad_norm"] {
            let pairs = figures(&on_cpu, key).into_iter().zip(figures(&on_gpu, key));
            for (step, (expected, found)) in pairs.enumerate() {
                let off = (found - expected).abs() / expected;
                assert!(off < 1e-3, "{kind}: {key} of step {step}: {found} for {expected}");
            }
        }
        let best = on_cpu.join("checkpoints/best");
        let arguments =
            ["generate", text(&best), "--prompt", "The", "--temperature", "0", "--max-new-tokens", "24", "--json"];
        let said = |device: &str, form: &str| {
            let all: Vec<&str> = arguments.iter().copied().chain(["--device", device, "--decode", form]).collect();
            json(&all)["text"].clone()
        };
        for form in ["expanded", "auto"] {
            assert_eq!(said(&gpu, form), said("cpu", form), "{kind}, {form}");
        }
    }
}

#[test]
fn a_run_that_stops_on_a_gpu_goes_on_as_if_it_had_not() {
    let Some(gpu) = name() else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = run_file(dir.path());
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    train(&file, &whole, &gpu, &[]);
    train(&file, &parts, &gpu, &[]);
    // Back to the middle: the newest checkpoint is gone, as if the run had been killed before it.
    std::fs::remove_dir_all(parts.join("checkpoints/step-000012")).unwrap();
    train(&file, &parts, &gpu, &["--resume"]);
    let weights = |run: &Path| std::fs::read(run.join("checkpoints/step-000012/model.safetensors")).unwrap();
    assert!(weights(&whole) == weights(&parts), "the weights differ");
}

#[test]
fn two_ranks_on_a_gpu_are_one_with_passes_half_as_long() {
    let Some(gpu) = name() else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = run_file(dir.path());
    for kind in ["adamw", "muon"] {
        let (one, two) = (dir.path().join(format!("{kind}-one")), dir.path().join(format!("{kind}-two")));
        let kind = format!("optimizer.kind={kind}");
        let more = ["--set", "metrics.every=1", "--set", "training.steps=6", "--set", &kind];
        train(&file, &one, &gpu, &[&more[..], &["--set", "training.micro_batch_size=2"]].concat());
        train(&file, &two, &format!("{gpu},{gpu}"), &more);
        let weights = |run: &Path| std::fs::read(run.join("checkpoints/step-000006/model.safetensors")).unwrap();
        assert!(weights(&one) == weights(&two), "{kind}: the weights differ");
        for (one, two) in figures(&one, "train_loss").into_iter().zip(figures(&two, "train_loss")) {
            assert!((one / two - 1.0).abs() < 1e-6, "{kind}: {one} and {two}");
        }
    }
}

#[test]
fn half_precision_learns_as_single_does() {
    let dir = tempfile::tempdir().unwrap();
    let file = run_file(dir.path());
    let set = |format: &str| format!("training.dtype={format}");
    let train_in = |format: &str, device: &str| {
        let out = dir.path().join(format!("{format}-{}", device.replace(':', "-")));
        let set = set(format);
        let arguments = ["train", text(&file), "--out", text(&out), "--device", device, "--set", &set];
        // A CPU may have no instructions for it.
        let more = ["--set", "metrics.every=1", "--set", "training.emulate_dtype=true"];
        (lowkey(&[&arguments[..], &more].concat()), out)
    };
    let ((code, _, err), _) = train_in("f16", "cpu");
    assert_eq!(code, 2, "{err}");
    assert!(err.contains("training.dtype") && err.contains("--device"), "{err}");

    let cases = [("cpu".to_owned(), &["bf16"][..])].into_iter().chain(name().map(|gpu| (gpu, &["f16", "bf16"][..])));
    for (device, format) in
        cases.flat_map(|(device, formats)| formats.iter().map(move |format| (device.clone(), *format)))
    {
        let ((code, _, err), exact) = train_in("f32", &device);
        assert_eq!(code, 0, "{err}");
        let ((code, _, err), out) = train_in(format, &device);
        if code != 0 {
            assert!(device != "cpu" && code == 2 && err.contains("does not calculate in it"), "{err}");
            continue;
        }
        let pairs = figures(&exact, "train_loss").into_iter().zip(figures(&out, "train_loss"));
        for (step, (expected, found)) in pairs.enumerate() {
            assert!((found / expected - 1.0).abs() < 2e-2, "{format}: step {step}: {found} for {expected}");
        }
        assert_ne!(figures(&exact, "train_loss"), figures(&out, "train_loss"), "{format}: nothing was rounded");
        let state = std::fs::read_to_string(out.join("checkpoints/step-000012/trainer.json")).unwrap();
        let scale = serde_json::from_str::<Value>(&state).unwrap()["loss_scale"]["good"].clone();
        assert_eq!(scale == 12, format == "f16", "{state}");
    }
}

#[test]
fn a_tensor_that_the_device_does_not_take_is_refused_before_the_first_step() {
    let Some(gpu) = name() else { return };
    let limit = json(&["devices", "--json"])["devices"][0]["properties"]["max_tensor_bytes"].as_u64().unwrap();
    // 32 tokens of 40 numbers a sequence.
    let batch = limit / (32 * 40 * 4) + 1;
    if batch > 100_000 {
        println!("tensors of {limit} bytes are more than the machine's memory should be asked for");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (file, out) = (run_file(dir.path()), dir.path().join("wide"));
    let set = format!("training.batch_size={batch}");
    let (code, _, err) = lowkey(&["train", text(&file), "--out", text(&out), "--device", &gpu, "--set", &set]);
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("MiB at most") && err.contains("training.micro_batch_size"), "{err}");
}

#[test]
fn a_device_that_is_not_there_is_refused_by_name() {
    let model = "nowhere";
    for (device, expected) in [
        ("tpu", "there is no device `tpu`"),
        ("cuda:x", "there is no device `cuda:x`"),
        ("cuda:99", "cuda"),
        ("wgpu:99", "wgpu"),
    ] {
        let (code, _, err) = lowkey(&["generate", model, "--device", device]);
        assert_eq!(code, 2, "{err}");
        assert!(err.contains(expected) && err.contains("--device"), "{err}");
    }
    let listed = json(&["devices", "--json"]);
    let names: Vec<&str> = listed["devices"].as_array().unwrap().iter().filter_map(|d| d["name"].as_str()).collect();
    assert!(names.contains(&"cpu"), "{names:?}");
}
