//! The shape of the workspace: which crate may import which, how long files may grow, and what may not stand anywhere.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// What every crate may import: files are files on each floor.
const GROUND: &str = "lowkey-files";

/// Each crate with the crates of this workspace that it may depend on.
const FLOORS: &[(&str, &[&str])] = &[
    (GROUND, &[]),
    ("lowkey-kernels", &[]),
    ("lowkey-data", &[]),
    ("lowkey-model", &["lowkey-kernels"]),
    ("lowkey-infer", &["lowkey-model", "lowkey-kernels"]),
    ("lowkey-convert", &["lowkey-model"]),
    ("lowkey-export", &["lowkey-data", "lowkey-infer", "lowkey-model"]),
    ("lowkey-train", &["lowkey-convert", "lowkey-data", "lowkey-infer", "lowkey-model", "lowkey-kernels"]),
    ("lowkey-lab", &["lowkey-infer", "lowkey-model", "lowkey-train"]),
    (
        "lowkey",
        &[
            "lowkey-convert",
            "lowkey-data",
            "lowkey-export",
            "lowkey-infer",
            "lowkey-kernels",
            "lowkey-lab",
            "lowkey-model",
            "lowkey-train",
        ],
    ),
];

/// Lines of a source file before its tests.
const MOST_LINES: usize = 700;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn packages() -> Vec<Value> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    metadata["packages"].as_array().unwrap().clone()
}

/// Names of a package's normal dependencies (`kind` is null for them).
fn dependencies(package: &Value) -> BTreeSet<String> {
    let all = package["dependencies"].as_array().unwrap();
    all.iter().filter(|d| d["kind"].is_null()).map(|d| d["name"].as_str().unwrap().to_string()).collect()
}

fn sources() -> Vec<(PathBuf, String)> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    let mut paths = Vec::new();
    walk(&root().join("crates"), &mut paths);
    paths.into_iter().map(|path| (path.clone(), std::fs::read_to_string(path).unwrap())).collect()
}

#[test]
fn imports_go_downward_only() {
    let packages = packages();
    let names: BTreeSet<&str> = packages.iter().map(|p| p["name"].as_str().unwrap()).collect();
    assert_eq!(names, FLOORS.iter().map(|(name, _)| *name).collect());
    for package in &packages {
        let name = package["name"].as_str().unwrap();
        let (_, allowed) = FLOORS.iter().find(|(n, _)| *n == name).unwrap();
        for dependency in dependencies(package).iter().filter(|d| names.contains(d.as_str())) {
            assert!(
                dependency == GROUND || allowed.contains(&dependency.as_str()),
                "{name} must not import {dependency}"
            );
        }
    }
}

#[test]
fn each_absence_that_a_crate_was_drawn_for_holds() {
    for package in &packages() {
        let name = package["name"].as_str().unwrap();
        let has = |d: &str| dependencies(package).contains(d);
        assert!(name == "lowkey" || !has("clap") && !has("anyhow") && !has("indicatif"), "{name} knows the terminal");
        assert!(name != "lowkey-data" || !has("burn"), "lowkey-data knows a tensor");
        assert!(name != "lowkey-model" && name != "lowkey-infer" || !has("tokenizers"), "{name} knows text");
        assert!(name == "lowkey-kernels" || !has("burn-flex"), "{name} knows a backend");
    }
    for (path, text) in sources() {
        let library =
            !path.components().any(|c| c.as_os_str() == "lowkey") && path.components().any(|c| c.as_os_str() == "src");
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        let is_test = path.file_name().is_some_and(|name| name == "tests.rs")
            || path.components().any(|c| c.as_os_str() == "tests");
        if library && !is_test {
            assert!(!code.contains("println!(") && !code.contains("eprintln!("), "{} prints", path.display());
        }
    }
}

#[test]
fn no_file_outgrows_one_sitting() {
    for (path, text) in sources() {
        let lines = text.lines().take_while(|line| !line.starts_with("#[cfg(test)]")).count();
        assert!(lines <= MOST_LINES, "{} has {lines} lines before its tests", path.display());
    }
}

#[test]
fn every_run_file_and_dataset_that_ships_is_valid() {
    let mut runs = 0;
    for entry in std::fs::read_dir(root().join("configs")).unwrap() {
        let path = entry.unwrap().path();
        let config = lowkey_train::RunConfig::load(&path, &[]).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(config.run.name, path.file_stem().unwrap().to_string_lossy());
        if let Some(model) = &config.model {
            model.resolve(257, config.data.seq_len).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        }
        if let Some(dataset) = &config.data.dataset {
            lowkey_data::DatasetConfig::load(&root().join(dataset)).unwrap_or_else(|e| panic!("{e}"));
        }
        runs += 1;
    }
    assert!(runs >= 4, "{runs} run files");
    let mut datasets = 0;
    for folder in ["datasets", "datasets/tasks"] {
        for entry in std::fs::read_dir(root().join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "toml") {
                let config = lowkey_data::DatasetConfig::load(&path).unwrap_or_else(|e| panic!("{e}"));
                assert_eq!(config.name, path.file_stem().unwrap().to_string_lossy());
                datasets += 1;
            }
        }
    }
    assert!(datasets >= 14, "{datasets} dataset files");
}
