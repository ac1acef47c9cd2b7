//! What decides an experiment, as it stood when the first run of a folder began.
//!
//! A rule decides only where it was written before its results. All that has a say in the verdict is therefore kept beside the
//! runs before the first of them begins, and held against the experiment file when they are reported.

use std::collections::BTreeMap;
use std::path::Path;

use lowkey_files as files;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::expand::Expanded;

/// Where it is kept, in the folder of the runs.
pub(crate) const KEPT: &str = "rule.json";

/// Bytes of it that are read.
const LARGEST: u64 = 64 << 20;

/// Changes that are told one by one.
const TOLD: usize = 6;

/// Keeps what decides beside the runs, where nothing is kept yet. `begun`: runs that were there before.
pub(crate) fn keep(out: &Path, expanded: &Expanded, begun: usize) -> Result<()> {
    let path = out.join(KEPT);
    if path.exists() {
        return Ok(());
    }
    let mut decides = decides(expanded);
    decides["runs_before"] = json!(begun);
    Ok(files::write_json(&path, &decides)?)
}

/// Whether the folder's file is one that lowkey keeps.
pub(crate) fn is_kept(out: &Path) -> bool {
    read(out).is_ok_and(|kept| kept.is_some_and(|kept| kept.get("rule").is_some() && kept.get("metric").is_some()))
}

/// Why what decides now is not known to have been written before the runs, in sentences.
pub(crate) fn objections(out: &Path, expanded: &Expanded) -> Result<Vec<String>> {
    let Some(kept) = read(out)? else {
        return Ok(vec![format!(
            "nothing beside the runs ({KEPT}) says what was to decide when the first of them began"
        )]);
    };
    let mut objections = Vec::new();
    match kept.get("runs_before").and_then(Value::as_u64) {
        Some(0) => {}
        Some(n) => objections.push(format!("what decides was first written down when there were {n} runs already")),
        None => objections.push(format!("{KEPT} does not say whether it was written before the first run")),
    }
    let (was, is) = (flat(&kept), flat(&decides(expanded)));
    let mut changes: Vec<String> = Vec::new();
    for key in was.keys().chain(is.keys().filter(|key| !was.contains_key(*key))).filter(|key| *key != "runs_before") {
        match (was.get(key), is.get(key)) {
            (Some(was), Some(is)) if was != is => changes.push(format!("{key} was {}, is {}", short(was), short(is))),
            (Some(was), None) => changes.push(format!("{key} was {}, and is gone", short(was))),
            (None, Some(is)) => changes.push(format!("{key} was not there, is {}", short(is))),
            _ => {}
        }
    }
    if !changes.is_empty() {
        let more = changes.len().saturating_sub(TOLD);
        let more = if more > 0 { format!("; and {more} more") } else { String::new() };
        changes.truncate(TOLD);
        objections
            .push(format!("what decides is not what it was when the first run began: {}{more}", changes.join("; ")));
    }
    Ok(objections)
}

/// All of an experiment that has a say in its verdict. What a run trains on and how stands in its own run file.
fn decides(expanded: &Expanded) -> Value {
    let experiment = &expanded.experiment;
    let sections: BTreeMap<&str, bool> =
        experiment.arms.iter().map(|section| (section.name.as_str(), section.unmatched)).collect();
    let arm = |arm: &crate::study::Arm| {
        let unmatched = sections.get(arm.name.as_str()).copied().unwrap_or_default();
        (arm.name.clone(), json!({ "set": arm.settings, "x": arm.x, "unmatched": unmatched }))
    };
    let theories: BTreeMap<&str, _> =
        experiment.theory.iter().map(|theory| (theory.name.as_str(), &theory.points)).collect();
    json!({
        "rule": experiment.rule,
        "metric": experiment.metric,
        "better": experiment.better,
        "baseline": experiment.baseline,
        "seeds": experiment.seeds,
        "x": experiment.x,
        "match": experiment.matching,
        "quantised": experiment.quantised,
        "theory": theories,
        "arms": expanded.arms.iter().map(arm).collect::<serde_json::Map<_, _>>(),
    })
}

fn read(out: &Path) -> Result<Option<Value>> {
    let path = out.join(KEPT);
    match files::read_text(&path, LARGEST) {
        Ok(text) => match serde_json::from_str(&text) {
            Ok(kept) => Ok(Some(kept)),
            Err(e) => Err(Error::file(path, format!("{e}; it is what lowkey keeps beside the runs: restore it"))),
        },
        Err(e) if e.is_missing() => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Each value that is no object, by the names on the way to it.
fn flat(value: &Value) -> BTreeMap<String, Value> {
    fn add(found: &mut BTreeMap<String, Value>, at: String, value: &Value) {
        match value {
            Value::Object(object) => {
                for (key, value) in object {
                    let at = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
                    add(found, at, value);
                }
            }
            // Absent and null are the same.
            Value::Null => {}
            _ => {
                found.insert(at, value.clone());
            }
        }
    }
    let mut found = BTreeMap::new();
    add(&mut found, String::new(), value);
    found
}

/// A value in a sentence.
fn short(value: &Value) -> String {
    const LONGEST: usize = 80;
    let text = value.to_string();
    if text.chars().count() <= LONGEST {
        return text;
    }
    text.chars().take(LONGEST).chain("…".chars()).collect()
}
