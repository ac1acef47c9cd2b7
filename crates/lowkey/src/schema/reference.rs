//! A JSON Schema as Markdown: a section for each table of the file, a row for each key.

use serde_json::Value;

/// A table of a file, with the line that it begins with.
struct Section<'a> {
    heading: String,
    schema: &'a Value,
}

/// The reference of files: the title of each, and its schema.
pub(crate) fn reference<'a>(files: impl IntoIterator<Item = (&'a str, &'a Value)>) -> String {
    let mut out = String::from(
        "# Every key\n\n\
        Made by `lowkey schema --keys` from the types that the files are read into. An unknown key is an error. \"needed\" stands where a\n\
        key has no default and may not be left out; what happens where one without a default is left out is said after \"Absent\".\n",
    );
    for (title, schema) in files {
        out += &format!("\n## {title}\n");
        out += &body(schema);
        let mut sections = Vec::new();
        collect("", schema, &mut sections);
        for section in sections {
            out += &format!("\n### {}\n", section.heading);
            out += &body(section.schema);
        }
    }
    out
}

/// The tables within a table, each before those within it.
fn collect<'a>(path: &str, schema: &'a Value, out: &mut Vec<Section<'a>>) {
    for (key, value) in properties(schema) {
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        let (table, heading) = match value.get("items") {
            Some(items) if is_table(items) => (items, format!("`[[{path}]]`")),
            _ => (value, format!("`[{path}]`")),
        };
        if let Some(kinds) = kinds(table) {
            for kind in kinds {
                let tag = tag(kind).map_or_else(String::new, |(key, value)| format!(" with `{key} = {value}`"));
                out.push(Section { heading: format!("{heading}{tag}"), schema: kind });
                collect(&path, kind, out);
            }
        } else if has_keys(table) {
            out.push(Section { heading, schema: table });
            collect(&path, table, out);
        }
    }
}

/// What a table is, and its keys.
fn body(schema: &Value) -> String {
    let mut out = String::new();
    if let Some(text) = description(schema) {
        out += &format!("\n{text}\n");
    }
    let mut rows = properties(schema).filter(|(_, value)| value.get("const").is_none()).peekable();
    if rows.peek().is_none() {
        return out + "\nNo other keys.\n";
    }
    out += "\n| key | value | default | meaning |\n|---|---|---|---|\n";
    for (key, value) in rows {
        let default = match value.get("default") {
            _ if is_needed(schema, key) => "needed".into(),
            Some(default) => literal(default).map_or_else(String::new, |text| format!("`{text}`")),
            None => String::new(),
        };
        out += &format!("| `{key}` | {} | {default} | {} |\n", cell(&kind_of_value(value)), cell(&meaning(value)));
    }
    out
}

fn properties(schema: &Value) -> impl Iterator<Item = (&String, &Value)> {
    schema.get("properties").and_then(Value::as_object).into_iter().flatten()
}

fn has_keys(schema: &Value) -> bool {
    properties(schema).next().is_some()
}

fn is_table(schema: &Value) -> bool {
    has_keys(schema) || kinds(schema).is_some()
}

fn is_needed(schema: &Value, key: &str) -> bool {
    let required = schema.get("required").and_then(Value::as_array);
    required.is_some_and(|required| required.iter().any(|name| name == key))
}

fn description(schema: &Value) -> Option<&str> {
    schema.get("description").and_then(Value::as_str)
}

fn alternatives(schema: &Value) -> Option<&[Value]> {
    schema.get("oneOf").and_then(Value::as_array).map(Vec::as_slice)
}

/// The kinds of a table whose keys depend on one of them.
fn kinds(schema: &Value) -> Option<&[Value]> {
    alternatives(schema).filter(|kinds| kinds.iter().all(has_keys))
}

/// The key that tells which kind of a table this is, and its value.
fn tag(kind: &Value) -> Option<(&String, &Value)> {
    properties(kind).find_map(|(key, value)| value.get("const").map(|value| (key, value)))
}

/// What a key means, and what each of its values means if it has a few.
fn meaning(schema: &Value) -> String {
    let mut lines: Vec<String> = description(schema).map(str::to_owned).into_iter().collect();
    if kinds(schema).is_none() {
        for value in alternatives(schema).into_iter().flatten() {
            if let (Some(name), Some(text)) = (value.get("const"), description(value)) {
                lines.push(format!("`{name}`: {text}"));
            }
        }
    }
    lines.join("\n")
}

/// What may stand as the value of a key.
fn kind_of_value(schema: &Value) -> String {
    if let Some(kinds) = kinds(schema) {
        let tags: Vec<&Value> = kinds.iter().filter_map(tag).map(|(_, value)| value).collect();
        let key = kinds.first().and_then(tag).map_or("kind", |(key, _)| key);
        return format!("table, whose `{key}` is {}", choice(&tags));
    }
    if let Some(values) = alternatives(schema) {
        return choice(&values.iter().filter_map(|value| value.get("const")).collect::<Vec<_>>());
    }
    match schema.get("type").and_then(Value::as_str) {
        Some("boolean") => "`true` or `false`".into(),
        Some("string") => "text".into(),
        Some("integer") => numbers("whole number", schema),
        Some("number") => numbers("number", schema),
        Some("array") => list(schema),
        Some("object") if has_keys(schema) => "table".into(),
        Some("object") => match schema.get("additionalProperties") {
            Some(values) if values.is_object() => format!("table, each value: {}", kind_of_value(values)),
            _ => "table of any keys".into(),
        },
        _ => match schema.get("anyOf").and_then(Value::as_array) {
            Some(kinds) => kinds.iter().map(kind_of_value).collect::<Vec<_>>().join(", or "),
            None => "anything".into(),
        },
    }
}

fn list(schema: &Value) -> String {
    let bound = |key: &str| schema.get(key).and_then(Value::as_u64);
    let items = match schema.get("items") {
        Some(Value::Array(each)) => {
            return format!("`[`{}`]`", each.iter().map(kind_of_value).collect::<Vec<_>>().join(", "));
        }
        Some(items) if is_table(items) => return "list of tables".into(),
        Some(items) => kind_of_value(items),
        None => "anything".into(),
    };
    match (bound("minItems"), bound("maxItems")) {
        (Some(least), Some(most)) if least == most => format!("list of {least}, each: {items}"),
        (Some(least), _) => format!("list of {least} or more, each: {items}"),
        _ => format!("list, each: {items}"),
    }
}

/// A number with its bounds. That a whole number is not negative goes without saying.
fn numbers(name: &str, schema: &Value) -> String {
    let bound = |key: &str| schema.get(key).map(figure);
    let from = bound("minimum").or_else(|| bound("exclusiveMinimum").map(|least| format!("above {least}")));
    let to = bound("maximum").or_else(|| bound("exclusiveMaximum").map(|most| format!("below {most}")));
    match (from, to) {
        (Some(from), Some(to)) => format!("{name}, {from} to {to}"),
        (Some(from), None) if name == "whole number" && from == "0" => name.into(),
        (Some(from), None) if from.starts_with("above") => format!("{name}, {from}"),
        (Some(from), None) => format!("{name}, {from} or more"),
        (None, Some(to)) => format!("{name}, up to {to}"),
        (None, None) => name.into(),
    }
}

/// A number as TOML takes it, with its digits in groups where there are many.
fn figure(number: &Value) -> String {
    let text = number.to_string();
    let text = text.strip_suffix(".0").unwrap_or(&text);
    if text.len() < 5 || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return text.to_owned();
    }
    let mut out = String::new();
    for (i, digit) in text.chars().enumerate() {
        if i > 0 && (text.len() - i).is_multiple_of(3) {
            out.push('_');
        }
        out.push(digit);
    }
    out
}

fn choice(values: &[&Value]) -> String {
    let mut names: Vec<String> = values.iter().map(|value| format!("`{value}`")).collect();
    match names.pop() {
        Some(last) if names.is_empty() => last,
        Some(last) => format!("{} or {last}", names.join(", ")),
        None => String::new(),
    }
}

/// A default as it would be written; a table's defaults stand with its keys.
fn literal(value: &Value) -> Option<String> {
    match value {
        Value::Object(_) | Value::Null => None,
        Value::Array(values) => Some(format!("[{}]", values.iter().filter_map(literal).collect::<Vec<_>>().join(", "))),
        other => Some(other.to_string()),
    }
}

/// Text in a cell of a table.
fn cell(text: &str) -> String {
    let lines = text.split('\n').filter(|line| !line.is_empty());
    lines.map(|line| line.replace('|', "\\|")).collect::<Vec<_>>().join("<br>")
}

#[cfg(test)]
mod tests;
