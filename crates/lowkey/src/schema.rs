//! Which keys lowkey's TOML files may have: as JSON Schema for editors, and as a reference for readers.
//!
//! Both are made from the types that the files are read into, so that neither can say another thing than the program does. A schema
//! knows keys, types and the bounds of single values. Rules between keys, such as the one of `data.dataset` and `data.path`, are
//! checked by the program alone.

mod reference;

use clap::ValueEnum;
use lowkey_data::DatasetConfig;
use lowkey_lab::Experiment;
use lowkey_train::RunConfig;
use schemars::Schema;
use schemars::generate::SchemaSettings;
use schemars::transform::RecursiveTransform;
use serde_json::{Map, Value};

pub(crate) use reference::reference;

/// The kinds of TOML files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FileKind {
    /// A run file, for `lowkey train`
    Run,
    /// A dataset file, for `data.dataset` of a run file
    Dataset,
    /// An experiment file, for `lowkey lab`
    Experiment,
}

impl FileKind {
    /// All of them.
    pub(crate) const ALL: [Self; 3] = [Self::Run, Self::Dataset, Self::Experiment];

    /// What such a file is called.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Run => "The run file",
            Self::Dataset => "The dataset file",
            Self::Experiment => "The experiment file",
        }
    }

    /// The JSON Schema of such a file: draft 7, which editors of TOML read, and without references.
    pub(crate) fn schema(self) -> Value {
        let settings = SchemaSettings::draft07().with(|settings| settings.inline_subschemas = true);
        let generator = settings.with_transform(RecursiveTransform(for_toml)).into_generator();
        let mut schema = match self {
            Self::Run => generator.into_root_schema_for::<RunConfig>(),
            Self::Dataset => generator.into_root_schema_for::<DatasetConfig>(),
            Self::Experiment => generator.into_root_schema_for::<Experiment>(),
        };
        schema.insert("title".into(), self.title().into());
        schema.to_value()
    }
}

/// Takes out of a schema what TOML does not have, and line ends within a paragraph.
fn for_toml(schema: &mut Schema) {
    let Some(object) = schema.as_object_mut() else { return };
    // Widths of Rust's numbers, which no editor knows.
    object.shift_remove("format");
    if let Some(Value::Array(types)) = object.get_mut("type") {
        types.retain(|kind| kind != "null");
        if let [only] = types.as_slice() {
            let only = only.clone();
            object.insert("type".into(), only);
        }
    }
    if let Some(Value::Array(any)) = object.get_mut("anyOf") {
        any.retain(|of| of.get("type").is_none_or(|kind| kind != "null"));
        if let [Value::Object(only)] = any.as_slice() {
            let only = only.clone();
            object.shift_remove("anyOf");
            add_missing(object, only);
        }
    }
    if let Some(Value::String(text)) = object.get_mut("description") {
        let paragraphs = text.split("\n\n").map(|lines| lines.split_whitespace().collect::<Vec<_>>().join(" "));
        *text = paragraphs.collect::<Vec<_>>().join("\n\n");
    }
}

fn add_missing(object: &mut Map<String, Value>, other: Map<String, Value>) {
    for (key, value) in other {
        object.entry(key).or_insert(value);
    }
}

#[cfg(test)]
mod tests {
    use schemars::json_schema;

    use super::*;

    #[test]
    fn a_schema_for_toml_has_no_null_and_no_line_ends_within_a_paragraph() {
        let mut schema = json_schema!({
            "description": "One\nsentence.\n\nAnother.",
            "type": ["integer", "null"],
            "format": "uint64",
        });
        for_toml(&mut schema);
        assert_eq!(schema, json_schema!({ "description": "One sentence.\n\nAnother.", "type": "integer" }));
        let mut schema = json_schema!({
            "description": "Mine.",
            "anyOf": [{ "description": "Its own.", "oneOf": [{ "const": "a" }] }, { "type": "null" }],
        });
        for_toml(&mut schema);
        assert_eq!(schema, json_schema!({ "description": "Mine.", "oneOf": [{ "const": "a" }] }));
    }

    #[test]
    fn every_key_has_a_description_for_readers_of_no_rust() {
        fn visit(schema: &Value, place: &str) {
            if let Some(text) = schema.get("description").and_then(Value::as_str) {
                assert!(!text.contains("crate::") && !text.contains("[`"), "{place}: {text}");
            }
            for (key, value) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
                let place = format!("{place}.{key}");
                assert!(value.get("const").is_some() || value.get("description").is_some(), "{place} says nothing");
                visit(value, &place);
            }
            for part in ["oneOf", "anyOf"] {
                for one in schema.get(part).and_then(Value::as_array).into_iter().flatten() {
                    assert!(one.get("description").is_some(), "a value of {place} says nothing: {one}");
                    visit(one, place);
                }
            }
            if let Some(items) = schema.get("items") {
                visit(items, place);
            }
        }
        for kind in FileKind::ALL {
            visit(&kind.schema(), kind.title());
        }
    }
}
