//! What lies beside the weights of a model goes with it, whatever becomes of them.

use std::fs;
use std::path::Path;

use lowkey_files::companions::{COMPANIONS, TEMPLATES, found};
use serde_json::Value;

use crate::commands::{RUN, best, succeed, text};

/// A model as somebody ships it, with a file of every name that goes with a model; returns their names.
fn shipped(dir: &Path) -> Vec<String> {
    fs::create_dir_all(dir.join(TEMPLATES)).unwrap();
    for name in
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    {
        fs::copy(best().join(name), dir.join(name)).unwrap();
    }
    let template = format!("{TEMPLATES}/tools.jinja");
    let mut names: Vec<String> =
        COMPANIONS.iter().map(|companion| companion.name.to_owned()).chain([template]).collect();
    for name in names.iter().filter(|name| !dir.join(name).exists()) {
        fs::write(dir.join(name), format!("{{\"of\": \"{name}\"}}")).unwrap();
    }
    names.sort();
    names
}

#[test]
fn every_companion_goes_from_init_through_checkpoints_a_conversion_and_an_export() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let names = shipped(&at("base"));
    let expected: Vec<Vec<u8>> = names.iter().map(|name| fs::read(at("base").join(name)).unwrap()).collect();
    let whole = |folder: &str| {
        assert_eq!(found(&at(folder)).unwrap(), names, "{folder}");
        for (name, expected) in names.iter().zip(&expected) {
            let file = fs::read(at(folder).join(name)).unwrap();
            if name == "generation_config.json" {
                // Written anew, in the words of the run.
                let value = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap();
                assert_eq!(value(&file), value(expected), "{folder}");
            } else {
                assert!(file == *expected, "{folder}/{name}: {}", String::from_utf8_lossy(&file));
            }
        }
    };

    fs::write(at("story.txt"), "The cat sat on the mat and saw seven mice.\n".repeat(120)).unwrap();
    let model = RUN.find("[model]").unwrap()..RUN.find("[data]").unwrap();
    let init = format!("[init]\nfrom = \"{}\"\n\n", text(&at("base")));
    fs::write(at("tune.toml"), RUN.replace(&RUN[model], &init)).unwrap();
    let (file, out) = (at("tune.toml"), at("out"));
    let train = ["train", text(&file), "--out", text(&out), "--set"];
    succeed(&[&train[..], &["training.steps=2"]].concat());
    whole("out/checkpoints/step-000002");

    // A run that goes on has them from its checkpoint, whatever became of the model that it began with.
    fs::remove_file(at("base/merges.txt")).unwrap();
    fs::write(at("base").join(TEMPLATES).join("tools.jinja"), "another").unwrap();
    succeed(&[&train[..], &["training.steps=4", "--resume"]].concat());
    whole("out/checkpoints/step-000004");

    let (last, narrow, shipped) = (at("out/checkpoints/step-000004"), at("narrow"), at("shipped"));
    succeed(&["convert", text(&last), "--kv-rank", "6", "--out", text(&narrow)]);
    whole("narrow");
    succeed(&["export", text(&narrow), "--to", "hf", "--out", text(&shipped)]);
    whole("shipped");
}
