//! The schemas of TOML files: they are what is committed, every file that ships keeps to them, and the parsers know the same keys and
//! no wider bounds.

mod check;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use lowkey_data::DatasetConfig;
use lowkey_lab::Experiment;
use lowkey_train::RunConfig;
use serde::de::DeserializeOwned;
use serde_json::Value as Json;
use toml::{Table, Value};

use check::{fault, from_json};

use crate::commands::{json, succeed};

const KINDS: [&str; 3] = ["run", "dataset", "experiment"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

fn schema(kind: &str) -> Json {
    json(&["schema", kind])
}

fn parse<T: DeserializeOwned>(text: &str) -> Result<(), String> {
    toml::from_str::<T>(text).map(drop).map_err(|e| e.message().to_string())
}

/// What the types say of a text, before the program checks values.
fn parsed(kind: &str, text: &str) -> Result<(), String> {
    match kind {
        "run" => parse::<RunConfig>(text),
        "dataset" => parse::<DatasetConfig>(text),
        _ => parse::<Experiment>(text),
    }
}

/// What the program says of a file.
fn loaded(kind: &str, text: &str) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file.toml");
    std::fs::write(&path, text).unwrap();
    match kind {
        "run" => RunConfig::load(&path, &[]).map_err(|e| e.to_string()).and_then(|run| {
            let model = run.model.as_ref().map(|model| model.resolve(16, run.data.seq_len));
            model.transpose().map(drop).map_err(|e| e.to_string())
        }),
        "dataset" => DatasetConfig::load(&path).map(drop).map_err(|e| e.to_string()),
        _ => Experiment::load(&path).map(drop).map_err(|e| e.to_string()),
    }
}

/// The run, dataset and experiment files that ship, each with its kind.
fn shipped() -> Vec<(&'static str, PathBuf)> {
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> =
        ["configs", "datasets", "experiments"].iter().map(|name| root().join(name)).collect();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                // What a run of a dataset here has left, which git ignores.
                if !path.ends_with("prepared") {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "toml") {
                let below = path.strip_prefix(root()).unwrap();
                let name = below.file_name().unwrap().to_str().unwrap();
                let kind = match (below.iter().next().unwrap().to_str().unwrap(), name) {
                    ("configs", _) | (_, "run.toml") => "run",
                    (_, "experiment.toml") => "experiment",
                    _ => "dataset",
                };
                found.push((kind, path));
            }
        }
    }
    assert!(KINDS.iter().all(|kind| found.iter().filter(|(of, _)| of == kind).count() > 5), "{found:?}");
    found
}

/// A run file that has every section.
const FULL_RUN: &str = r#"
[run]
name = "full"

[model]
attention = "mla"
vocab_size = 16
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
intermediate_size = 32
max_position_embeddings = 8
kv_lora_rank = 8
qk_nope_head_dim = 4
qk_rope_head_dim = 2
v_head_dim = 4
rope_parameters = { rope_theta = 100.0 }
elastic = { ranks = [2, 4] }

[data]
path = "text.txt"
seq_len = 8

[optimizer]
kind = "muon"
lr = 1e-2

[lr_scheduler]
[training]
steps = 10
batch_size = 2

[eval]
[checkpoint]
[metrics]
[[history]]
until = 5
steps = 20
"#;

#[test]
fn the_committed_schemas_and_reference_are_what_the_types_say() {
    let committed = KINDS.map(|kind| (vec!["schema", kind], format!("schemas/{kind}.schema.json")));
    for (arguments, file) in committed.into_iter().chain([(vec!["schema", "--keys"], "docs/keys.md".to_string())]) {
        let now = succeed(&arguments);
        let before = std::fs::read_to_string(root().join(&file)).unwrap_or_default();
        assert!(
            now == before,
            "{file} is not what the types say. Make it anew:\n  cargo run --release -- {} > {file}",
            arguments.join(" ")
        );
    }
}

#[test]
fn every_file_that_ships_keeps_to_its_schema() {
    let schemas = KINDS.map(schema);
    for (kind, path) in shipped() {
        let text = std::fs::read_to_string(&path).unwrap();
        let schema = &schemas[KINDS.iter().position(|of| *of == kind).unwrap()];
        assert_eq!(fault(schema, &toml::from_str(&text).unwrap()), None, "{}", path.display());
    }
    assert_eq!(fault(&schemas[0], &toml::from_str(FULL_RUN).unwrap()), None);
    loaded("run", FULL_RUN).unwrap();
}

#[test]
fn a_misspelt_key_and_a_wrong_type_are_refused() {
    let text = |path: &str| std::fs::read_to_string(root().join(path)).unwrap();
    for (kind, file, from, to) in [
        ("run", "configs/quickstart.toml", "num_hidden_layers", "num_hiden_layers"),
        ("run", "configs/quickstart.toml", "[lr_scheduler]", "[scheduler]"),
        ("run", "configs/quickstart.toml", "attention = \"mla\"", "attention = \"mlb\""),
        ("run", "configs/quickstart.toml", "steps = 1000", "steps = \"many\""),
        ("run", "configs/quickstart.toml", "steps = 1000", "steps = 1000.0"),
        ("run", "configs/quickstart.toml", "betas = [0.9, 0.95]", "betas = [0.9]"),
        ("run", "configs/quickstart.toml", "betas = [0.9, 0.95]", "betas = [0.9, 1.0]"),
        ("run", "configs/quickstart.toml", "lr = 5e-3", "lr = 0.0"),
        ("run", "configs/quickstart.toml", "seed = 1", "seed = -1"),
        ("run", "configs/quickstart.toml", "seq_len = 256", ""),
        ("dataset", "datasets/storybook.toml", "documents = 60000", "document = 60000"),
        ("dataset", "datasets/storybook.toml", "kind = \"bytes\"", "kind = \"bytes\"\nvocab_size = 300"),
        ("dataset", "datasets/storybook.toml", "kind = \"storybook\"", "kind = \"story\""),
        ("dataset", "datasets/tasks/mqar.toml", "pairs = 8", "pears = 8"),
        ("experiment", "experiments/elastic/experiment.toml", "percent = 1.0", "per_cent = 1.0"),
        ("experiment", "experiments/elastic/experiment.toml", "seeds = [1, 2, 3, 4, 5]", "seeds = [\"one\"]"),
        ("experiment", "experiments/linear-recall/experiment.toml", "[[0.0, 1.0], ", "[[0.0], "),
    ] {
        let right = text(file);
        assert!(right.contains(from), "{file} has no {from}");
        let wrong = right.replacen(from, to, 1);
        assert!(fault(&schema(kind), &toml::from_str(&wrong).unwrap()).is_some(), "{file}: {from} → {to}");
        assert!(loaded(kind, &wrong).is_err(), "{file}: {from} → {to}");
    }
}

/// A value that a schema allows, with no key that may be left out.
fn sample(schema: &Json) -> Value {
    if let Some(value) = schema.get("const").or_else(|| schema.get("default")) {
        return from_json(value);
    }
    if let Some(first) = ["oneOf", "anyOf"].iter().find_map(|kinds| schema[kinds].as_array()?.first()) {
        return sample(first);
    }
    match schema["type"].as_str() {
        Some("string") => Value::String("x".into()),
        Some("boolean") => Value::Boolean(true),
        Some("integer") => Value::Integer(schema["minimum"].as_i64().unwrap_or(1)),
        Some("number") => Value::Float(0.25),
        Some("array") => match &schema["items"] {
            Json::Array(each) => Value::Array(each.iter().map(sample).collect()),
            each => {
                let least = schema["minItems"].as_u64().unwrap_or(1);
                Value::Array((0..least).map(|_| sample(each)).collect())
            }
        },
        Some("object") => {
            let needed = schema["required"].as_array().into_iter().flatten().map(|key| key.as_str().unwrap());
            Value::Table(needed.map(|key| (key.to_string(), sample(&schema["properties"][key]))).collect())
        }
        _ => Value::Integer(1),
    }
}

fn with(table: &Value, key: &str, value: Value) -> Value {
    let mut table = table.clone();
    table.as_table_mut().unwrap().insert(key.to_string(), value);
    table
}

/// A walk over the tables of a file.
struct Walk<'a> {
    kind: &'a str,
    whole: &'a Json,
    tables: usize,
}

impl Walk<'_> {
    /// Compares the keys of a table with those of the parser; `file` puts the table into a file.
    fn table(&mut self, place: &str, schema: &Json, file: &dyn Fn(Value) -> Value) {
        if let Some(kinds) = schema.get("oneOf").and_then(Json::as_array) {
            for kind in kinds.iter().filter(|kind| kind.get("properties").is_some()) {
                self.table(place, kind, file);
            }
            return;
        }
        let Some(properties) = schema.get("properties").and_then(Json::as_object) else { return };
        self.tables += 1;
        let base = match sample(schema) {
            Value::Table(table) => Value::Table(table),
            other => panic!("{place}: {other}"),
        };
        let text = |value: &Value| toml::to_string(&file(value.clone())).unwrap();
        let unknown = with(&base, "no_such_key", Value::Integer(1));
        assert!(fault(self.whole, &file(unknown.clone())).is_some(), "{place}: the schema takes any key");
        let message = parsed(self.kind, &text(&unknown)).expect_err(place);
        assert!(message.contains("unknown field `no_such_key`"), "{place}: {message}");
        // "…, expected one of `a`, `b`", "…, expected `a` or `b`", "…, there are no fields".
        let (_, expected) = message.split_once("no_such_key`").unwrap();
        let of_parser: BTreeSet<&str> = expected.lines().next().unwrap().split('`').skip(1).step_by(2).collect();
        let has_no_tag = |value: &&Json| value.get("const").is_none();
        let of_schema: BTreeSet<&str> =
            properties.iter().filter(|(_, value)| has_no_tag(value)).map(|(key, _)| key.as_str()).collect();
        assert_eq!(of_schema, of_parser, "{place}");
        for (key, value) in properties {
            let place = format!("{place}.{key}");
            let file = |inner: Value| file(with(&base, key, inner));
            let whole = file(sample(value));
            assert_eq!(fault(self.whole, &whole), None, "{place}");
            parsed(self.kind, &toml::to_string(&whole).unwrap()).unwrap_or_else(|e| panic!("{place}: {e}"));
            match value.get("items").filter(|items| items.is_object()) {
                Some(items) => self.table(&place, items, &|inner| file(Value::Array(vec![inner]))),
                None => self.table(&place, value, &file),
            }
        }
    }
}

#[test]
fn schema_and_parser_know_the_same_keys() {
    for (kind, least) in KINDS.into_iter().zip([14, 21, 10]) {
        let whole = schema(kind);
        let mut walk = Walk { kind, whole: &whole, tables: 0 };
        walk.table(kind, &whole, &|table| table);
        assert!(walk.tables >= least, "{kind}: {} tables", walk.tables);
    }
}

/// Values just outside of what a schema allows.
fn outside(schema: &Json) -> Vec<Value> {
    let number = |value: f64| match schema["type"].as_str() {
        Some("integer") => Value::Integer(value as i64),
        _ => Value::Float(value),
    };
    let mut found = Vec::new();
    let bound = |key: &str| schema.get(key).and_then(Json::as_f64);
    found.extend(bound("minimum").map(|least| number(least - 1.0)));
    found.extend(bound("maximum").map(|most| number(most + 1.0)));
    found.extend(bound("exclusiveMinimum").map(number));
    found.extend(bound("exclusiveMaximum").map(number));
    if let Some(least) = schema.get("minItems").and_then(Json::as_u64) {
        let items = schema["items"].as_object().map(|_| sample(&schema["items"]));
        found.extend(items.map(|item| Value::Array(vec![item; least as usize - 1])));
    }
    if schema.get("minLength").is_some() {
        found.push(Value::String(String::new()));
    }
    if schema["items"].is_object() {
        let least = schema["minItems"].as_u64().unwrap_or(1) as usize;
        found.extend(outside(&schema["items"]).into_iter().map(|item| Value::Array(vec![item; least.max(1)])));
    }
    found
}

/// Sets each key of the tables that a file has to values that the schema refuses; the program must refuse them for their key.
fn refused(kind: &str, schema: &Json, table: &Table, file: &dyn Fn(Value) -> Value, tried: &mut usize) {
    if let Some(kinds) = schema.get("oneOf").and_then(Json::as_array) {
        let of_kind = kinds
            .iter()
            .find(|of| table.get("kind").is_some_and(|tag| of["properties"]["kind"]["const"] == tag.as_str().unwrap()));
        return refused(kind, of_kind.unwrap(), table, file, tried);
    }
    for (key, value) in schema.get("properties").and_then(Json::as_object).into_iter().flatten() {
        let file = |inner: Value| file(with(&Value::Table(table.clone()), key, inner));
        match table.get(key) {
            Some(Value::Table(inner)) => refused(kind, value, inner, &file, tried),
            Some(Value::Array(list)) if list.iter().all(Value::is_table) => {
                let inner = list[0].as_table().unwrap();
                let rest = |first: Value| {
                    file(Value::Array(std::iter::once(first).chain(list[1..].iter().cloned()).collect()))
                };
                refused(kind, &value["items"], inner, &rest, tried);
            }
            _ => {
                for wrong in outside(value) {
                    let text = toml::to_string(&file(wrong.clone())).unwrap();
                    let message = loaded(kind, &text).expect_err(&format!("{kind}: {key} = {wrong} in\n{text}"));
                    // A negative number is no value of the type, and that message may name only the table.
                    let names_it = message.contains(key.as_str()) || wrong.as_integer().is_some_and(|x| x < 0);
                    assert!(names_it, "{kind}: {key} = {wrong}: {message}");
                    *tried += 1;
                }
            }
        }
    }
}

#[test]
fn what_a_schema_refuses_the_program_refuses() {
    let schemas = KINDS.map(schema);
    let files = shipped().into_iter().map(|(kind, path)| (kind, std::fs::read_to_string(path).unwrap()));
    let mut tried = 0;
    for (kind, text) in files.chain([("run", FULL_RUN.to_string())]) {
        let table: Table = toml::from_str(&text).unwrap();
        loaded(kind, &text).unwrap();
        let schema = &schemas[KINDS.iter().position(|of| *of == kind).unwrap()];
        refused(kind, schema, &table, &|whole| whole, &mut tried);
    }
    assert!(tried > 300, "{tried}");
}
