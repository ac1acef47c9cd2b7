//! What becomes of a command whose standard output fails, and of the files that a command is told to write.

#![cfg(unix)]

use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use crate::commands::{RUN, best, succeed, text};

const CLOSED: i32 = 128 + 13;

/// Runs the program with a standard output that has no room; returns its exit code and standard error.
fn into_full_disk(dir: &Path, arguments: &[&str]) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lowkey"));
    command.args(arguments).current_dir(dir).stdin(Stdio::null());
    let output = command.stdout(File::options().write(true).open("/dev/full").unwrap()).output().unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

/// Runs the program with a standard output that nobody reads.
fn into_closed_pipe(dir: &Path, arguments: &[&str]) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lowkey"));
    command.args(arguments).current_dir(dir).stdin(Stdio::null()).stderr(Stdio::piped());
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = command.stdout(writer).spawn().unwrap().wait_with_output().unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_command_that_prints_fails_where_nothing_can_be_printed() {
    let dir = tempfile::tempdir().unwrap();
    let (model, export) = (best(), dir.path().join("export"));
    let (model, out) = (text(&model), text(&export));
    succeed(&["export", model, "--to", "hf", "--out", out]);
    fs::write(dir.path().join("run.toml"), RUN).unwrap();
    fs::write(dir.path().join("story.txt"), "The cat sat on the mat. ".repeat(40)).unwrap();
    let story = dir.path().join("story.txt");
    for arguments in [
        vec!["plan", "run.toml"],
        vec!["plan", "run.toml", "--json"],
        vec!["info", model],
        vec!["info", model, "--json"],
        vec!["generate", model, "--prompt", "The", "--max-new-tokens", "4"],
        vec!["generate", model, "--prompt", "The", "--max-new-tokens", "4", "--json"],
        vec!["eval", model, "--data", text(&story)],
        vec!["eval", model, "--data", text(&story), "--json"],
        vec!["verify", out],
        vec!["verify", out, "--json"],
        vec!["devices"],
        vec!["devices", "--json"],
    ] {
        let (code, said) = into_full_disk(dir.path(), &arguments);
        assert!(code == 1 && said.contains("standard output could not be written"), "{arguments:?}: {code} {said}");
        assert!(said.contains("No space left"), "{arguments:?}: {said}");
        let (code, said) = into_closed_pipe(dir.path(), &arguments);
        assert!(code == CLOSED && !said.contains("error"), "{arguments:?}: {code} {said}");
    }
    // No acquittal of an export that has been changed, whoever reads it.
    fs::write(export.join("config.json"), "{}").unwrap();
    for arguments in [["verify", out].as_slice(), &["verify", out, "--json"]] {
        assert_eq!(into_full_disk(dir.path(), arguments).0, 1, "{arguments:?}");
        assert_ne!(into_closed_pipe(dir.path(), arguments).0, 0, "{arguments:?}");
    }
}

#[test]
fn work_that_is_kept_in_files_goes_on_without_its_display() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("run.toml"), RUN).unwrap();
    fs::write(dir.path().join("story.txt"), "The cat sat on the mat. It saw a dog and ran away.\n".repeat(60)).unwrap();
    let train = |out: &str, end: fn(&Path, &[&str]) -> (i32, String)| {
        let (code, said) = end(dir.path(), &["train", "run.toml", "--out", out]);
        assert_eq!(code, 0, "{said}");
        assert_eq!(said.matches("the work goes on without its display").count(), 1, "{said}");
        fs::read(dir.path().join(out).join("checkpoints/step-000012/model.safetensors")).unwrap()
    };
    assert_eq!(train("full", into_full_disk), train("closed", into_closed_pipe));
    let model = dir.path().join("full/checkpoints/best");
    let export = |out: &'static str| ["export", text(&model), "--to", "hf", "--out", out];
    assert_eq!(into_full_disk(dir.path(), &export("a")).0, 0);
    succeed(&["verify", text(&dir.path().join("a"))]);
    // Who asks for JSON is told that it is lost, though the export stands.
    let (code, said) = into_full_disk(dir.path(), &[export("b").as_slice(), &["--json"]].concat());
    assert!(code == 1 && said.contains("standard output could not be written"), "{said}");
    succeed(&["verify", text(&dir.path().join("b"))]);
}

#[test]
fn logits_are_written_through_devices_and_links_and_replace_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let ids: Vec<u8> = [1i64, 2, 3].iter().flat_map(|id| id.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::I64, vec![1, 3], &ids).unwrap();
    fs::write(path("ids"), safetensors::serialize([("input_ids", view)], None).unwrap()).unwrap();
    let (model, ids) = (best(), path("ids"));
    let logits = |out: &Path| {
        let output = Command::new(env!("CARGO_BIN_EXE_lowkey"))
            .args(["logits", text(&model), "--ids", text(&ids), "--out", text(out)])
            .output()
            .unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    assert_eq!(logits(&path("plain")).0, 0);
    let expected = fs::read(path("plain")).unwrap();
    SafeTensors::deserialize(&expected).unwrap().tensor("logits").unwrap();

    assert_eq!(logits(Path::new("/dev/null")).0, 0);
    assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());
    let (code, said) = logits(Path::new("/dev/full"));
    assert!(code == 1 && said.contains("/dev/full"), "{said}");

    fs::write(path("real"), "old").unwrap();
    symlink("real", path("link")).unwrap();
    assert_eq!(logits(&path("link")).0, 0);
    assert_eq!(fs::read(path("real")).unwrap(), expected);
    assert!(path("link").symlink_metadata().unwrap().is_symlink());

    assert!(Command::new("mkfifo").arg(path("pipe")).status().unwrap().success());
    let reader = std::thread::spawn({
        let pipe = path("pipe");
        move || fs::read(pipe).unwrap()
    });
    assert_eq!(logits(&path("pipe")).0, 0);
    assert_eq!(reader.join().unwrap(), expected);
    assert!(fs::metadata(path("pipe")).unwrap().file_type().is_fifo());

    let (code, said) = logits(dir.path());
    assert!(code == 1 && said.contains("is a folder"), "{said}");
    symlink("nowhere", path("dangling")).unwrap();
    let (code, said) = logits(&path("dangling"));
    assert!(code == 1 && said.contains("link to nowhere"), "{said}");
}
