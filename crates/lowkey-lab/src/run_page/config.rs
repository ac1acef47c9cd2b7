//! What the runs were set to and made with, and in what they differ.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use serde_json::Value;

use super::Told;
use crate::html::{escaped, table};

/// Keys of a section that are shown.
const MOST_KEYS: usize = 400;

/// Characters of a value that are shown.
const LONGEST: usize = 300;

/// Values by section and key.
type Flat = BTreeMap<(String, String), String>;

/// Configuration and environment.
pub(super) fn sections(told: &[Told]) -> String {
    let config = told.iter().map(|told| flat(&serde_json::to_value(&told.run.config).unwrap_or_default()));
    let environment = told.iter().map(|told| {
        let mut environment = told.run.environment.clone();
        if let Some(object) = environment.as_object_mut() {
            // The plan is the cost's.
            object.retain(|key, value| key != "plan" && !value.is_null());
        }
        flat(&environment)
    });
    section("Configuration", "run.toml", told, config.collect())
        + &section("Environment", "environment.json", told, environment.collect())
}

fn section(title: &str, file: &str, told: &[Told], values: Vec<Flat>) -> String {
    let keys: BTreeSet<&(String, String)> = values.iter().flat_map(BTreeMap::keys).collect();
    let mut out = format!("<h2>{title}</h2>\n");
    if keys.is_empty() {
        return out + &format!("<p class=\"note\">No {file} that can be read.</p>\n");
    }
    let differs = |key: &(String, String)| values.iter().any(|own| own.get(key) != values[0].get(key));
    let (other, same): (Vec<_>, Vec<_>) = keys.iter().copied().partition(|key| differs(key));
    if told.len() > 1 {
        let header: Vec<&str> = std::iter::once("").chain(told.iter().map(|told| told.label.as_str())).collect();
        let rows = other.iter().take(MOST_KEYS).map(|key| {
            let cell = |own: &Flat| own.get(*key).cloned().unwrap_or_else(|| "—".into());
            std::iter::once(name(key)).chain(values.iter().map(cell)).collect()
        });
        out += &match other.len() {
            0 => "<p>The runs do not differ in it.</p>\n".to_string(),
            _ => format!("<h3>What differs</h3>\n<div class=\"words\">{}</div>\n", table(&header, rows)),
        };
        out += "<h3>The same in all</h3>\n";
    }
    let mut by_section: BTreeMap<&str, Vec<(&str, &str)>> = BTreeMap::new();
    for key in same.iter().take(MOST_KEYS) {
        if let Some(value) = values[0].get(*key) {
            by_section.entry(&key.0).or_default().push((&key.1, value));
        }
    }
    out += "<div class=\"keys\">\n";
    for (section, values) in by_section {
        let heading = if section.is_empty() { String::new() } else { format!("<h3>[{}]</h3>", escaped(section)) };
        let _ = write!(out, "<section>{heading}<dl>");
        for (key, value) in values {
            let _ = write!(out, "<dt>{}</dt><dd>{}</dd>", escaped(key), escaped(value));
        }
        out += "</dl></section>\n";
    }
    out += "</div>\n";
    let left_out = same.len().saturating_sub(MOST_KEYS) + other.len().saturating_sub(MOST_KEYS);
    if left_out > 0 {
        let _ = writeln!(out, "<p class=\"note\">{left_out} more keys are left out.</p>");
    }
    out
}

fn name((section, key): &(String, String)) -> String {
    if section.is_empty() { key.clone() } else { format!("{section}.{key}") }
}

/// Each value that is no object, by the names on the way to it.
fn flat(value: &Value) -> Flat {
    /// Deeper than any file of a run.
    const DEEPEST: usize = 16;
    fn add(found: &mut Flat, section: &str, value: &Value, depth: usize) {
        for (key, value) in value.as_object().into_iter().flatten() {
            match value {
                Value::Object(object) if depth > 0 && !object.is_empty() => {
                    let below = if section.is_empty() { key.clone() } else { format!("{section}.{key}") };
                    add(found, &below, value, depth - 1);
                }
                value => {
                    let text = value.as_str().map_or_else(|| value.to_string(), str::to_string);
                    let text = match text.char_indices().nth(LONGEST) {
                        Some((at, _)) => format!("{}…", &text[..at]),
                        None => text,
                    };
                    found.insert((section.to_string(), key.clone()), text);
                }
            }
        }
    }
    let mut found = Flat::new();
    add(&mut found, "", value, DEEPEST);
    found
}
