//! What may stand in the place of a file that a command reads: a pipe that nobody writes to, a device without end, a
//! socket, a folder, a link to nothing or in a circle, and a file that is cut, empty, or of other bytes.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::{Case, case};

/// What stands in a file's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// A pipe that nobody writes to: to open it is to wait for ever.
    Pipe,
    /// A link to a device: to read it is to fill the memory.
    Device,
    Socket,
    Folder,
    /// A link to nothing.
    Dangling,
    /// A link to itself.
    Circle,
    /// Nothing at all.
    Missing,
    /// The first half.
    Cut,
    /// No byte.
    Empty,
    /// A line that is not UTF-8 before all others.
    Latin,
    /// Bytes of no format.
    Garbage,
}

use Place::{Circle, Cut, Dangling, Device, Empty, Folder, Garbage, Latin, Missing, Pipe, Socket};

/// No regular file.
pub(super) const NO_FILE: &[Place] = &[Pipe, Device, Socket, Folder, Dangling, Circle];
/// A file of the wrong bytes, or none.
pub(super) const WRONG: &[Place] = &[Missing, Cut, Empty, Latin, Garbage];

/// A pipe, a device, a folder, and a file of other bytes: for a command that reads a file as another one does.
pub(super) const FEW: &[Place] = &[Pipe, Device, Folder, Cut, Garbage];

/// A file below the case's folder (`*` for both checkpoints), a command that reads it, and what stands in its place.
pub(super) type Row = (&'static str, &'static str, &'static [&'static [Place]]);

const GENERATE: &str = "generate model --prompt the --max-new-tokens 2";
const SPLIT: &str = "generate split --prompt the --max-new-tokens 2";
const EVAL: &str = "eval model --data text.txt";
const EXPORT: &str = "export model --to hf --data text.txt --out out";
const CONVERT: &str = "convert model --data text.txt --kv-rank-budget 50% --out out";
const TUNE: &str = "train tune.toml --out new";
const LOGITS: &str = "logits model --ids ids.safetensors --out out.safetensors";
const RESUME: &str = "train run.toml --out run --resume --set training.steps=8";
const VERIFY: &str = "verify exported --source run/checkpoints/best";
const VERIFY_GGUF: &str = "verify gguf --source run/checkpoints/best";

/// Those that are refused.
const ROWS: &[Row] = &[
    ("run.toml", "train run.toml --out new", &[FEW]),
    ("run.toml", "plan run.toml", &[NO_FILE, WRONG]),
    ("run.toml", "lab run exp.toml --out new --dry-run", &[FEW]),
    ("run.toml", "lab report exp.toml --out lab", &[FEW]),
    ("text.txt", "train run.toml --out new", &[&[Pipe, Device, Folder, Garbage]]),
    ("text.txt", "data prepare text.txt --out new", &[NO_FILE, &[Missing, Empty, Latin, Garbage]]),
    ("text.txt", EVAL, &[&[Pipe, Device, Folder, Garbage]]),
    ("text.txt", "plan run.toml", &[NO_FILE, &[Missing]]),
    ("d.toml", "data prepare d.toml --out new", &[NO_FILE, WRONG]),
    ("d.toml", "data info d.toml", &[FEW]),
    ("d.toml", "eval model --data d.toml", &[FEW]),
    ("d.toml", "train data-run.toml --out new", &[FEW]),
    ("a.jsonl", "data prepare lines.toml --out new", &[NO_FILE, &[Missing, Empty, Latin, Garbage]]),
    ("a.jsonl.gz", "data prepare gz.toml --out new", &[NO_FILE, WRONG]),
    ("a.txt.zst", "data prepare zst.toml --out new", &[NO_FILE, WRONG]),
    ("a.parquet", "data prepare table.toml --out new", &[NO_FILE, WRONG]),
    ("t.json", "data prepare tokens.toml --out new", &[NO_FILE, WRONG]),
    ("t.json", "data prepare text.txt --tokenizer t.json --out new", &[NO_FILE, WRONG]),
    (
        "prompt.txt",
        "generate model --prompt-file prompt.txt --max-new-tokens 2",
        &[NO_FILE, &[Missing, Latin, Garbage]],
    ),
    ("ids.safetensors", LOGITS, &[NO_FILE, WRONG]),
    ("prepared/manifest.json", "data info prepared", &[NO_FILE, WRONG]),
    ("prepared/train.tokens", "data info prepared", &[NO_FILE, WRONG]),
    ("prepared/validation.tokens", "data info prepared", &[NO_FILE, WRONG]),
    ("prepared/tokenizer.json", "data info prepared", &[NO_FILE, WRONG]),
    ("prepared/tokenizer_config.json", "data info prepared", &[NO_FILE, &[Cut, Empty, Latin, Garbage]]),
    ("model/config.json", GENERATE, &[NO_FILE, WRONG]),
    ("model/config.json", EXPORT, &[NO_FILE, WRONG]),
    ("model/config.json", CONVERT, &[FEW]),
    ("model/config.json", LOGITS, &[FEW]),
    ("model/config.json", TUNE, &[FEW]),
    ("model/config.json", "info model", &[FEW]),
    ("model/tokenizer.json", GENERATE, &[NO_FILE, WRONG]),
    ("model/tokenizer.json", EVAL, &[FEW]),
    ("model/tokenizer.json", EXPORT, &[NO_FILE, WRONG]),
    ("model/tokenizer.json", CONVERT, &[FEW]),
    ("model/tokenizer.json", TUNE, &[FEW]),
    ("model/tokenizer_config.json", GENERATE, &[NO_FILE, &[Cut, Empty, Latin, Garbage]]),
    ("model/tokenizer_config.json", EXPORT, &[NO_FILE, &[Cut, Empty, Latin, Garbage]]),
    ("model/tokenizer_config.json", TUNE, &[FEW]),
    ("model/generation_config.json", EXPORT, &[NO_FILE, &[Cut, Empty, Latin, Garbage]]),
    ("model/model.safetensors", GENERATE, &[NO_FILE, WRONG]),
    ("model/model.safetensors", EVAL, &[FEW]),
    ("model/model.safetensors", EXPORT, &[NO_FILE, WRONG]),
    ("model/model.safetensors", CONVERT, &[FEW]),
    ("model/model.safetensors", LOGITS, &[FEW]),
    ("model/model.safetensors", TUNE, &[FEW]),
    ("model/model.safetensors", "info model", &[FEW]),
    ("split/model.safetensors.index.json", SPLIT, &[NO_FILE, WRONG]),
    ("split/model-00001-of-00001.safetensors", SPLIT, &[NO_FILE, WRONG]),
    ("split/model.safetensors.index.json", "info split", &[FEW]),
    ("split/model-00001-of-00001.safetensors", "info split", &[FEW]),
    ("split/model.safetensors.index.json", "export split --to hf --data text.txt --out out", &[FEW]),
    ("split/model-00001-of-00001.safetensors", "export split --to hf --data text.txt --out out", &[FEW]),
    (
        "run/checkpoints/step-000004/checksums.json",
        "generate run/checkpoints/best --prompt the --max-new-tokens 2",
        &[NO_FILE, &[Cut, Empty, Latin, Garbage]],
    ),
    (
        "run/checkpoints/step-000004/config.json",
        "generate run/checkpoints/best --prompt the --max-new-tokens 2",
        &[NO_FILE, WRONG],
    ),
    (
        "run/checkpoints/step-000004/model.safetensors",
        "generate run/checkpoints/best --prompt the --max-new-tokens 2",
        &[NO_FILE, WRONG],
    ),
    (
        "run/checkpoints/step-000004/checksums.json",
        "export run/checkpoints/best --to hf --out out",
        &[NO_FILE, &[Cut, Empty, Latin, Garbage]],
    ),
    ("run/checkpoints/step-000004/config.json", "export run/checkpoints/best --to hf --out out", &[NO_FILE, WRONG]),
    (
        "run/checkpoints/step-000004/model.safetensors",
        "export run/checkpoints/best --to hf --out out",
        &[NO_FILE, WRONG],
    ),
    (
        "run/checkpoints/step-000004/checksums.json",
        "info run/checkpoints/best",
        &[NO_FILE, &[Cut, Empty, Latin, Garbage]],
    ),
    ("run/checkpoints/step-000004/config.json", "info run/checkpoints/best", &[NO_FILE, WRONG]),
    ("run/checkpoints/step-000004/model.safetensors", "info run/checkpoints/best", &[NO_FILE, WRONG]),
    (
        "run/checkpoints/step-000004/checksums.json",
        "convert run/checkpoints/best --data text.txt --kv-rank-budget 50% --out out",
        &[FEW],
    ),
    (
        "run/checkpoints/step-000004/config.json",
        "convert run/checkpoints/best --data text.txt --kv-rank-budget 50% --out out",
        &[FEW],
    ),
    (
        "run/checkpoints/step-000004/model.safetensors",
        "convert run/checkpoints/best --data text.txt --kv-rank-budget 50% --out out",
        &[FEW],
    ),
    ("run/checkpoints/*/checksums.json", RESUME, &[NO_FILE, WRONG]),
    ("run/checkpoints/*/trainer.json", RESUME, &[NO_FILE, WRONG]),
    ("run/checkpoints/*/trainer.safetensors", RESUME, &[NO_FILE, WRONG]),
    ("run/checkpoints/*/model.safetensors", RESUME, &[NO_FILE, WRONG]),
    ("run/checkpoints/*/config.json", RESUME, &[NO_FILE, WRONG]),
    ("run/run.toml", RESUME, &[NO_FILE, WRONG]),
    ("run/metrics.jsonl", RESUME, &[NO_FILE]),
    ("run/metrics.jsonl", "info run", &[NO_FILE, &[Missing, Empty, Garbage]]),
    ("run/run.toml", "report run --out page.html", &[NO_FILE, &[Missing, Latin, Garbage]]),
    ("run/metrics.jsonl", "report run --out page.html", &[NO_FILE]),
    ("run/samples.jsonl", "report run --out page.html", &[NO_FILE]),
    ("exported/certificate.json", VERIFY, &[WRONG, NO_FILE]),
    ("exported/CERTIFICATE.md", VERIFY, &[WRONG, NO_FILE]),
    ("exported/model.safetensors", VERIFY, &[NO_FILE, WRONG]),
    ("exported/config.json", VERIFY, &[NO_FILE, WRONG]),
    ("exported/tokenizer.json", VERIFY, &[NO_FILE, WRONG]),
    ("exported/tokenizer_config.json", VERIFY, &[NO_FILE, WRONG]),
    ("exported/generation_config.json", VERIFY, &[NO_FILE, WRONG]),
    ("exported/README.md", VERIFY, &[NO_FILE, &[Missing]]),
    ("exported/fused.safetensors", VERIFY, &[NO_FILE, WRONG]),
    ("gguf/certificate.json", VERIFY_GGUF, &[WRONG, NO_FILE]),
    ("gguf/CERTIFICATE.md", VERIFY_GGUF, &[WRONG, NO_FILE]),
    ("gguf/model.gguf", VERIFY_GGUF, &[NO_FILE, WRONG]),
    (
        "exported/fused.safetensors",
        "generate exported --prompt the --max-new-tokens 2",
        &[NO_FILE, &[Cut, Empty, Latin, Garbage]],
    ),
    ("run/data/manifest.json", "export run/checkpoints/best --to hf --out out", &[NO_FILE, WRONG]),
    ("run/data/validation.tokens", "export run/checkpoints/best --to hf --out out", &[NO_FILE, WRONG]),
    (
        "exported/certificate.json",
        "export run/checkpoints/best --to fused --out exported --overwrite",
        &[NO_FILE, &[Cut, Empty, Latin, Garbage]],
    ),
    (
        "converted/convert.json",
        "convert run/checkpoints/best --data text.txt --kv-rank-budget 50% --out converted --overwrite",
        &[NO_FILE, &[Cut, Empty, Latin, Garbage]],
    ),
    ("exp.toml", "lab run exp.toml --out new", &[NO_FILE, WRONG]),
    ("exp.toml", "lab run exp.toml --out new --dry-run", &[NO_FILE, WRONG]),
    ("exp.toml", "lab report exp.toml --out lab", &[NO_FILE, WRONG]),
];

pub(super) fn cases() -> Vec<Case> {
    rows(ROWS)
}

/// One case for each row and place. Pipes, sockets and such links are made on Unix.
pub(super) fn rows(rows: &[Row]) -> Vec<Case> {
    let mut cases = Vec::new();
    for (file, command, places) in rows {
        for place in places.iter().flat_map(|places| places.iter()) {
            if cfg!(unix) || WRONG.contains(place) || *place == Folder {
                cases.push(row(file, command, *place));
            }
        }
    }
    cases
}

fn row(file: &'static str, command: &'static str, place: Place) -> Case {
    let words: Vec<&str> = command.split(' ').collect();
    let base = file.rsplit('/').next().unwrap();
    case(format!("{place:?} for {file}: {command}"), &words)
        .with(move |fixture, dir| {
            // What the command names, and what the file lies in or stands beside.
            let beside = match file {
                "run.toml" | "text.txt" => "",
                "a.jsonl" | "a.jsonl.gz" | "a.txt.zst" | "a.parquet" | "t.json" => file,
                _ => file.split('/').next().unwrap(),
            };
            let words = command.split(' ').chain([beside]).map(|word| word.split('/').next().unwrap());
            for word in words {
                if !word.is_empty() && fixture.root().join(word).exists() && !dir.join(word).exists() {
                    fixture.give(dir, &[word]);
                }
            }
            for step in ["step-000002", "step-000004"] {
                let path = dir.join(file.replace('*', step));
                if step == "step-000004" || file.contains('*') {
                    put(&path, place);
                }
            }
        })
        .refused()
        .says(&[base])
}

/// Puts something in the place of a file.
pub(super) fn put(path: &Path, place: Place) {
    let old = fs::read(path).unwrap_or_else(|_| b"x".repeat(100));
    if path.is_file() {
        fs::remove_file(path).unwrap();
    }
    match place {
        #[cfg(unix)]
        Pipe => assert!(Command::new("mkfifo").arg(path).status().unwrap().success()),
        #[cfg(unix)]
        Device => std::os::unix::fs::symlink("/dev/zero", path).unwrap(),
        #[cfg(unix)]
        Socket => drop(std::os::unix::net::UnixListener::bind(path).unwrap()),
        #[cfg(unix)]
        Dangling => std::os::unix::fs::symlink("nowhere", path).unwrap(),
        #[cfg(unix)]
        Circle => std::os::unix::fs::symlink(path.file_name().unwrap(), path).unwrap(),
        Folder => fs::create_dir(path).unwrap(),
        Cut => fs::write(path, &old[..old.len() / 2]).unwrap(),
        Empty => fs::write(path, "").unwrap(),
        Latin => fs::write(path, [b"# caf\xe9\n", &old[..]].concat()).unwrap(),
        Garbage => fs::write(path, (0..500u32).map(|i| (i * 37 + 11) as u8).collect::<Vec<_>>()).unwrap(),
        _ => {}
    }
}
