//! The shape of the workspace: which crate may import which, how long files may grow, and what may not stand anywhere.

mod code;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use code::Source;

/// What every crate may import: files are files on each floor.
const GROUND: &str = "lowkey-files";

/// Each crate with the crates of this workspace that it may depend on.
const FLOORS: &[(&str, &[&str])] = &[
    (GROUND, &[]),
    ("lowkey-batch", &[]),
    ("lowkey-kernels", &["lowkey-batch"]),
    ("lowkey-data", &["lowkey-batch"]),
    ("lowkey-model", &["lowkey-batch", "lowkey-kernels"]),
    ("lowkey-infer", &["lowkey-model", "lowkey-kernels"]),
    ("lowkey-convert", &["lowkey-model"]),
    ("lowkey-export", &["lowkey-data", "lowkey-infer", "lowkey-model"]),
    (
        "lowkey-train",
        &["lowkey-batch", "lowkey-convert", "lowkey-data", "lowkey-infer", "lowkey-model", "lowkey-kernels"],
    ),
    ("lowkey-lab", &["lowkey-infer", "lowkey-model", "lowkey-train"]),
    (
        "lowkey",
        &[
            "lowkey-batch",
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

/// The product's sources.
fn sources() -> Vec<Source> {
    let found = code::sources(&root().join("crates").canonicalize().unwrap());
    assert!(found.len() > 150, "only {} files", found.len());
    found
}

/// What may stand in no crate but one: marks, the crates that may have them, and what it would mean.
struct Rule {
    marks: &'static [&'static str],
    allowed: &'static [&'static str],
    meaning: &'static str,
}

const RULES: &[Rule] = &[
    Rule {
        marks: &["println!(", "eprintln!(", "print!(", "eprint!(", "dbg!(", "stdout()", "stderr()"],
        allowed: &["lowkey"],
        meaning: "prints",
    },
    Rule {
        marks: &[
            "burn_flex",
            "burn_cubecl",
            "burn_wgpu",
            "burn_cuda",
            "burn_ndarray",
            "burn_tch",
            "burn_candle",
            "cubek",
            "cubecl",
            "into_primitive",
            "from_primitive",
            "TensorPrimitive",
            "FloatTensor<",
            "IntTensor<",
            "backend::Backend",
        ],
        allowed: &["lowkey-kernels"],
        meaning: "touches a primitive of a backend",
    },
    Rule {
        marks: &[
            "fs::rename",
            "fs::remove_file",
            "fs::remove_dir",
            "fs::write",
            "fs::copy",
            "fs::create_dir",
            "fs::hard_link",
            "fs::soft_link",
            "fs::symlink",
            "fs::set_permissions",
            "File::create",
            "File::options",
            "OpenOptions",
            "AtomicWriteFile",
        ],
        allowed: &["lowkey-files"],
        meaning: "writes, renames or removes what lowkey-files should",
    },
    Rule {
        marks: &["tempfile::"],
        allowed: &["lowkey"],
        meaning: "writes what is gone afterwards where lowkey-files does not see it",
    },
];

/// The text with `use std::fs::{a, b};` written as `use std::fs::a; use std::fs::b;`, in as many lines.
fn without_groups(code: &str) -> String {
    let mut out = String::with_capacity(code.len());
    let mut rest = code;
    while let Some(open) = rest.find("::{") {
        let Some(close) = rest[open..].find(['}', ';']).map(|i| open + i) else { break };
        let from = rest[..open].rfind(|c: char| !c.is_alphanumeric() && c != '_' && c != ':').map_or(0, |i| i + 1);
        let (path, group) = (&rest[from..open], &rest[open + 3..close]);
        out.push_str(&rest[..from]);
        for name in group.split(',') {
            let word = name.trim_start();
            out.push_str(&name[..name.len() - word.len()]);
            if !word.is_empty() {
                out.push_str(&format!("{path}::{word};"));
            }
        }
        rest = &rest[close..];
    }
    out + rest
}

/// What a source breaks.
fn broken(source: &Source) -> Vec<String> {
    let package = source.package();
    let mut faults = Vec::new();
    let text = without_groups(&source.code);
    for rule in RULES.iter().filter(|rule| !rule.allowed.contains(&package.as_str())) {
        for (i, line) in text.lines().enumerate() {
            // `eprintln!(` holds `println!(`, and `MyFile::create` is no `File::create`.
            let stands = |mark: &&&str| {
                line.match_indices(**mark).any(|(at, _)| {
                    let before = line[..at].chars().next_back();
                    !before.is_some_and(|c| c.is_alphanumeric() || c == '_')
                })
            };
            if let Some(mark) = rule.marks.iter().find(stands) {
                faults.push(format!("{}:{}: {} ({mark})", source.path.display(), i + 1, rule.meaning));
            }
        }
    }
    if source.lines > MOST_LINES {
        faults.push(format!("{} has {} lines beside its tests", source.path.display(), source.lines));
    }
    faults
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
        for backend in ["burn-flex", "burn-cubecl", "burn-wgpu", "burn-cuda", "cubecl", "cubek"] {
            assert!(name == "lowkey-kernels" || !has(backend), "{name} knows a backend, {backend}");
        }
        assert!(name == "lowkey" || !has("tempfile"), "{name} writes where lowkey-files does not see it");
    }
}

#[test]
fn each_source_keeps_to_what_its_crate_was_drawn_for() {
    let faults: Vec<String> = sources().iter().flat_map(broken).collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// What is to stand in one place of the product.
struct Once {
    mark: &'static str,
    /// The files, and how often.
    places: &'static [(&'static str, usize)],
    /// What another place would mean.
    meaning: &'static str,
}

const ONCE: &[Once] = &[
    Once {
        mark: "gated_mlp(",
        places: &[("lowkey-model/src/model.rs", 1)],
        meaning: "a second forward pass of a block",
    },
    Once {
        mark: ".attend(",
        places: &[("lowkey-model/src/attention.rs", 2), ("lowkey-model/src/model.rs", 1)],
        meaning: "a second forward pass of a block",
    },
    Once {
        mark: "latent_attention_of(queries",
        places: &[("lowkey-model/src/attention/mla.rs", 1)],
        meaning: "a second way through latent attention",
    },
    Once {
        mark: "weight.val()",
        places: &[("lowkey-model/src/layers.rs", 2), ("lowkey-model/src/layers/weight.rs", 3)],
        meaning: "a way to a weight past its layer, which an adapter would not see",
    },
];

/// The files in which a mark stands, and how often, in crates that compute nothing themselves.
fn places(mark: &str, sources: &[Source]) -> Vec<(String, usize)> {
    let composing = sources.iter().filter(|source| source.package() != "lowkey-kernels");
    // What is measured by itself is called by itself.
    let composing = composing.filter(|source| !source.path.to_string_lossy().contains("/bench/"));
    let counted = composing.map(|source| (source, source.code.matches(mark).count())).filter(|(_, count)| *count > 0);
    let name = |source: &Source| source.path.to_string_lossy().rsplit_once("crates/").unwrap().1.to_owned();
    counted.map(|(source, count)| (name(source), count)).collect()
}

#[test]
fn there_is_one_forward_pass_and_one_way_to_a_weight() {
    let sources = sources();
    for Once { mark, places: expected, meaning } in ONCE {
        let mut found = places(mark, &sources);
        found.sort();
        let expected: Vec<_> = expected.iter().map(|(file, count)| (file.to_string(), *count)).collect();
        assert_eq!(found, expected, "{mark}: {meaning}");
    }
}

/// The check itself can fail.
#[test]
fn a_planted_offence_is_found() {
    let planted = |package: &str, text: &str| {
        let (code, lines) = code::product(text);
        broken(&Source { path: Path::new("crates").join(package).join("src/x.rs"), code, lines })
    };
    for (text, meaning) in [
        ("fn f() { println!(\"x\"); }", "prints"),
        ("#[cfg(test)]\nuse a;\nfn f() { eprintln!(\"x\"); }", "prints"),
        ("use burn_flex::FlexTensor;", "primitive"),
        ("fn f(t: T) { t.into_primitive(); }", "primitive"),
        ("#[cfg(test)]\nmod tests;\nfn f() { std::fs::rename(a, b); }", "lowkey-files"),
        ("fn f() { std::fs::File::create(a); }", "lowkey-files"),
        ("use std::fs::rename;", "lowkey-files"),
        ("use std::fs::{\n    File,\n    rename,\n};", "lowkey-files"),
        ("use std::{io::Write, fs::{self}};\nfn f() { fs::write(a, b); }", "lowkey-files"),
        ("fn f() { tempfile::tempdir(); }", "gone afterwards"),
        ("fn f() { writeln!(std::io::stdout(), \"x\"); }", "prints"),
        ("use burn_wgpu::Wgpu;", "primitive"),
        (&"\n".repeat(MOST_LINES + 1), "lines"),
    ] {
        let faults = planted("lowkey-train", text);
        assert!(faults.len() == 1 && faults[0].contains(meaning), "{text}: {faults:?}");
    }
    for text in
        ["// println!(\"x\")", "#[cfg(test)]\nmod tests { fn f() { println!(); } }", "fn f() { NewFile::create(a); }"]
    {
        assert_eq!(planted("lowkey-train", text), Vec::<String>::new(), "{text}");
    }
    assert!(planted("lowkey", "fn f() { println!(); }").is_empty());
    assert!(planted("lowkey-files", "fn f() { std::fs::rename(a, b); }").is_empty());
}

#[test]
fn every_run_file_and_dataset_that_ships_is_valid() {
    let mut runs = 0;
    let listed = |folder: &str| std::fs::read_dir(root().join(folder)).unwrap().map(|entry| entry.unwrap().path());
    for path in listed("configs").chain(listed("configs/finetune")).filter(|path| path.is_file()) {
        let config = lowkey_train::RunConfig::load(&path, &[]).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(config.run.name, path.file_stem().unwrap().to_string_lossy());
        if let Some(model) = &config.model {
            model.resolve(257, config.data.seq_len).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        }
        let parts = config.data.mixture.iter().map(|part| &part.dataset);
        for dataset in config.data.dataset.iter().chain(parts) {
            lowkey_data::DatasetConfig::load(&root().join(dataset)).unwrap_or_else(|e| panic!("{e}"));
        }
        runs += 1;
    }
    assert!(runs >= 10, "{runs} run files");
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
