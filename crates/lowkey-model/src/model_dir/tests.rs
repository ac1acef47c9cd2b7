use std::fs;

use lowkey_files::companions::TEMPLATES;

use super::*;
use crate::adapter::{AdapterConfig, companion_dir};
use crate::attention::AttentionConfig;
use crate::checksums::{CHECKSUMS, write_checksums};
use crate::fixtures;

fn saved(dir: &Path) -> CausalLm {
    let model = CausalLm::init(&fixtures::config(AttentionConfig::Mla(fixtures::mla())), 1, &Device::flex());
    model.save(dir, WeightDtype::F32, usize::MAX).unwrap();
    model
}

#[test]
fn a_link_is_followed_once_and_a_dangling_one_is_named() {
    let dir = tempfile::tempdir().unwrap();
    saved(&dir.path().join("step-1"));
    let best = dir.path().join("best");
    lowkey_files::write::link("step-1", &best).unwrap();
    let opened = ModelDir::open(&best).unwrap();
    saved(&dir.path().join("step-2"));
    lowkey_files::write::link("step-2", &best).unwrap();
    assert!(opened.path().ends_with("step-1"));
    lowkey_files::write::link("step-3", &best).unwrap();
    let why = ModelDir::open(&best).unwrap_err().to_string();
    assert!(why.contains("best") && why.contains("link to step-3"), "{why}");
    let why = ModelDir::open(&dir.path().join("step-1/config.json")).unwrap_err().to_string();
    assert!(why.contains("is a file"), "{why}");
}

#[test]
fn what_is_not_what_was_saved_does_not_open() {
    let dir = tempfile::tempdir().unwrap();
    saved(dir.path());
    write_checksums(dir.path()).unwrap();
    ModelDir::open(dir.path()).unwrap();
    let path = dir.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    assert!(ModelDir::open(dir.path()).unwrap_err().to_string().contains("has changed"));
    fs::write(dir.path().join(CHECKSUMS), "{}").unwrap();
    let why = ModelDir::open(dir.path()).unwrap_err().to_string();
    assert!(why.contains("does not list config.json"), "{why}");
}

#[test]
fn a_new_directory_carries_what_belongs_to_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    let model = saved(&from);
    fs::write(from.join("tokenizer.model"), "pieces").unwrap();
    fs::write(from.join("generation_config.json"), "{}").unwrap();
    fs::write(from.join("notes.txt"), "mine").unwrap();
    fs::create_dir(from.join(TEMPLATES)).unwrap();
    fs::write(from.join(TEMPLATES).join("tools.jinja"), "{{ x }}").unwrap();
    let source = ModelDir::open(&from).unwrap();
    let make = |overwrite: bool| {
        let new = NewModelDir::begin(&to, Kind::Model, overwrite, &source)?;
        new.save(&model, WeightDtype::F32, usize::MAX)?;
        new.write_json("generation_config.json", &[1])?;
        new.carry(&source)?;
        new.commit()
    };
    assert_eq!(make(false).unwrap(), None);
    let carried = ModelDir::open(&to).unwrap().companions().unwrap();
    assert_eq!(carried, ["additional_chat_templates/tools.jinja", "generation_config.json", "tokenizer.model"]);
    assert_eq!(fs::read_to_string(to.join("generation_config.json")).unwrap(), "[\n  1\n]\n");
    assert!(!to.join("notes.txt").exists());
    assert!(make(false).unwrap_err().to_string().contains("already holds something"));
    make(true).unwrap();
    let hashes = source.hashes().unwrap();
    let names: Vec<&str> = hashes.iter().map(|file| file.name.as_str()).collect();
    assert!(names.contains(&"config.json") && names.contains(&"model.safetensors"), "{names:?}");
    assert!(names.contains(&"additional_chat_templates/tools.jinja"), "{names:?}");
}

#[test]
fn the_model_that_is_read_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("run").join("from");
    saved(&from);
    let source = ModelDir::open(&from).unwrap();
    for target in [from.as_path(), from.parent().unwrap(), dir.path()] {
        let why = NewModelDir::begin(target, Kind::Export, true, &source).unwrap_err().to_string();
        assert!(why.contains("the model that is read"), "{why}");
    }
}

#[test]
fn of_an_adapter_each_companion_is_its_own_or_the_bases() {
    let dir = tempfile::tempdir().unwrap();
    let (base, adapter, to) = (dir.path().join("base"), dir.path().join("adapter"), dir.path().join("to"));
    let model = saved(&base);
    fs::create_dir(&adapter).unwrap();
    let keys = AdapterConfig::all_linear(2);
    let begun = CausalLm::begin_adapter(&base, &model.config, &keys, 1, &Device::flex()).unwrap();
    begun.save_adapter(&adapter).unwrap();
    let write = |dir: &Path, name: &str| fs::write(dir.join(name), format!("{name} of {}", dir.display())).unwrap();
    for name in ["tokenizer.json", "generation_config.json", "vocab.json"] {
        write(&base, name);
    }
    // Without any of its own all are the base's.
    let found = ModelDir::open(&adapter).unwrap();
    let real = base.canonicalize().unwrap();
    assert_eq!(found.companions().unwrap(), ["generation_config.json", "tokenizer.json", "vocab.json"]);
    assert_eq!(found.beside(), real);
    assert_eq!(companion_dir(&adapter, "tokenizer.json").unwrap(), real);
    for name in ["tokenizer.json", "chat_template.jinja"] {
        write(&adapter, name);
    }
    let found = ModelDir::open(&adapter).unwrap();
    let own = adapter.canonicalize().unwrap();
    let all = ["chat_template.jinja", "generation_config.json", "tokenizer.json", "vocab.json"];
    assert_eq!(found.companions().unwrap(), all);
    assert_eq!((found.beside(), found.beside_with("generation_config.json")), (&*own, &*real));
    assert_eq!(companion_dir(&adapter, "tokenizer.json").unwrap(), adapter);
    assert_eq!(companion_dir(&adapter, "generation_config.json").unwrap(), real);
    // What is made of it has all of them, and its hashes are those of the files that were taken.
    let new = NewModelDir::begin(&to, Kind::Model, false, &found).unwrap();
    new.save(&begun.merged(), WeightDtype::F32, usize::MAX).unwrap();
    new.carry(&found).unwrap();
    new.commit().unwrap();
    let hashes = found.hashes().unwrap();
    for name in all {
        let from = if ["tokenizer.json", "chat_template.jinja"].contains(&name) { &adapter } else { &base };
        assert_eq!(fs::read_to_string(to.join(name)).unwrap(), format!("{name} of {}", from.display()));
        let hash_of = hash(&from.join(name)).unwrap().sha256;
        assert_eq!(hashes.iter().find(|file| file.name == name).unwrap().sha256, hash_of, "{name}");
    }
}
