//! What the runs left behind, as figures, and whether they may be held against each other.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use lowkey_files as files;
use lowkey_train::{RunConfig, metrics::Metrics};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::expand::{Expanded, Run};
use crate::experiment::Better;
use crate::kept::objections;
use crate::study::{RunResult, Study};

/// Figures of a finished run, by the training loop.
const EVALUATION: &str = "evaluation.json";

/// What a run was made with, by the training loop.
const ENVIRONMENT: &str = "environment.json";

/// Held-out loss with quantised caches, by the lab.
pub(crate) const QUANTISED: &str = "quantised.json";

/// Bytes of a run's file that are read.
const LARGEST: u64 = 1 << 30;

/// The evaluation of the run in a folder, where all its steps are taken: a file that holds no loss is none.
pub(crate) fn evaluation(out: &Path) -> Option<Value> {
    let evaluation = read_json(&out.join(EVALUATION)).ok()?;
    evaluation.get("loss")?.as_f64().is_some_and(f64::is_finite).then_some(evaluation)
}

/// Whether all steps of the run in a folder are taken.
pub(crate) fn finished(out: &Path) -> bool {
    evaluation(out).is_some()
}

/// A finished run, and what its figures rest on.
struct Collected<'a> {
    run: &'a Run,
    name: String,
    evaluation: Value,
    environment: Value,
}

impl Expanded {
    /// Gathers the finished runs under `out`, and what speaks against a verdict from them.
    ///
    /// # Errors
    /// [`Error::Experiment`] for a metric that no run has; [`Error::File`] for a run's file that is not what it should be.
    pub fn collect(&self, out: &Path) -> Result<Study> {
        let experiment = &self.experiment;
        let all = self.runs(out, None)?;
        let mut collected = Vec::new();
        for run in &all {
            if let Some(evaluation) = evaluation(&run.out) {
                let environment = read_json(&run.out.join(ENVIRONMENT)).unwrap_or_default();
                let name = format!("{}/seed-{}", self.arms[run.arm].name, run.seed);
                collected.push(Collected { run, name, evaluation, environment });
            }
        }
        let mut runs = Vec::new();
        for Collected { run, evaluation, .. } in &collected {
            let (metrics, spectra) = (metrics(&run.out, evaluation)?, spectra(evaluation));
            let curve = curve(&run.out.join("metrics.jsonl"))?;
            runs.push(RunResult { arm: run.arm, seed: run.seed, metrics, curve, spectra });
        }
        let there: BTreeSet<&String> = runs.iter().flat_map(|run| run.metrics.keys()).collect();
        if !runs.is_empty() && !there.contains(&experiment.metric) {
            let there: Vec<&str> = there.into_iter().map(String::as_str).collect();
            let why = format!("metric = {:?}: no run has it; there are {}", experiment.metric, there.join(", "));
            return Err(Error::experiment(&experiment.origin, why));
        }
        let (mut objections, mut notes) = if runs.is_empty() {
            Default::default()
        } else {
            (objections(out, self)?, builds(&collected).into_iter().collect::<Vec<_>>())
        };
        notes.extend(self.far_apart());
        objections.extend(self.other_settings(&collected)?);
        self.texts(&collected, &mut objections, &mut notes);
        Ok(Study {
            name: experiment.name.clone(),
            question: experiment.question.clone(),
            rule: experiment.rule.clone(),
            baseline: self.baseline,
            metric: experiment.metric.clone(),
            lower_is_better: experiment.better == Better::Lower,
            x: experiment.x.clone(),
            theory: experiment.theory.clone(),
            arms: self.arms.clone(),
            runs,
            seeds: experiment.seeds.clone(),
            objections,
            notes,
        })
    }

    /// Arms that could not be made equal to the baseline in what was to be equal.
    fn far_apart(&self) -> Option<String> {
        /// Of the baseline's, relative.
        const MOST: f64 = 0.05;
        let unmatched = |name: &str| self.experiment.arms.iter().any(|arm| arm.name == name && arm.unmatched);
        let far = |arm: &crate::study::Arm| {
            let mismatch = arm.mismatch.filter(|mismatch| mismatch.abs() > MOST && !unmatched(&arm.name))?;
            Some(format!("{} ({:+.1} %)", arm.name, mismatch * 100.0))
        };
        let far: Vec<String> = self.arms.iter().filter_map(far).collect();
        (!far.is_empty()).then(|| format!("Not equal to the baseline in what was to be matched: {}.", several(&far)))
    }

    /// Runs that were made with other settings than the experiment and its run file now say.
    fn other_settings(&self, collected: &[Collected]) -> Result<Option<String>> {
        let mut others = Vec::new();
        for Collected { run, name, .. } in collected {
            match other_section(&run.out, &self.config(run)?)? {
                Some(section) => others.push(format!("{name} ([{section}])")),
                None if !run.out.join(RUN_FILE).is_file() => others.push(format!("{name} (no {RUN_FILE})")),
                None => {}
            }
        }
        Ok((!others.is_empty()).then(|| {
            format!(
                "runs were made with other settings than the experiment and its run file now say: {}",
                several(&others)
            )
        }))
    }

    /// Whether what is compared was trained and judged on the same text.
    fn texts(&self, collected: &[Collected], objections: &mut Vec<String>, notes: &mut Vec<String>) {
        let settings = |run: &Run, names: fn(&str) -> bool| -> String {
            let own = self.arms[run.arm].settings.iter().filter(|(key, _)| names(key));
            own.map(|(key, value)| format!("{key} = {value}")).collect::<Vec<_>>().join(", ")
        };
        let other_text: fn(&str) -> bool = |key| key == "data" || key == "data.dataset" || key.starts_with("init");
        let other_view: fn(&str) -> bool = |key| key.starts_with("data") || key.starts_with("init");
        let trained = |c: &Collected| c.environment.get("data_sha256").and_then(Value::as_str).map(str::to_string);
        let held_out = |c: &Collected| c.environment.get("held_out_sha256").and_then(Value::as_str).map(str::to_string);
        let are_hashed = collected.iter().all(|c| held_out(c).is_some());
        let judged = |c: &Collected| {
            let part = |key| c.evaluation.get(key).and_then(Value::as_u64);
            let counted = || part("tokens").map(|n| format!("{n} tokens of {} bytes", part("bytes").unwrap_or(0)));
            if are_hashed { held_out(c) } else { counted() }
        };
        let unknown: Vec<String> = collected.iter().filter(|c| trained(c).is_none()).map(|c| c.name.clone()).collect();
        if !unknown.is_empty() {
            let which = several(&unknown);
            objections.push(format!("{ENVIRONMENT} does not say which text these were trained on: {which}"));
        }
        type Told<'a> = (&'a dyn Fn(&Collected) -> Option<String>, fn(&str) -> bool, &'static str);
        let kinds: [Told; 2] = [(&trained, other_text, "trained"), (&judged, other_view, "judged")];
        for (told, names, done) in kinds {
            // What an arm sets of its text itself is part of the question, and no accident.
            let mut texts: BTreeMap<String, BTreeMap<String, Vec<String>>> = BTreeMap::new();
            for c in collected {
                if let Some(text) = told(c) {
                    texts.entry(settings(c.run, names)).or_default().entry(text).or_default().push(c.name.clone());
                }
            }
            for by_text in texts.values().filter(|by_text| by_text.len() > 1) {
                let parts: Vec<String> =
                    by_text.iter().map(|(text, runs)| format!("{} ({})", several(runs), first(text))).collect();
                objections.push(format!(
                    "runs were {done} on different text: {}; remove those of the wrong one and sweep again",
                    parts.join(" against ")
                ));
            }
            let distinct: BTreeSet<&String> = texts.values().flat_map(BTreeMap::keys).collect();
            if done == "trained" && texts.len() > 1 && distinct.len() > 1 {
                let sets: Vec<&str> = texts.keys().filter(|set| !set.is_empty()).map(String::as_str).collect();
                notes
                    .push(format!("Arms are trained on different text, as they say themselves ({}).", sets.join("; ")));
            }
        }
    }
}

/// The beginning of a hash, or all of what is short.
fn first(text: &str) -> String {
    if text.len() >= 40 { text.chars().take(12).collect() } else { text.to_string() }
}

/// Some names of many.
fn several(names: &[String]) -> String {
    const MOST: usize = 4;
    match names.len().saturating_sub(MOST) {
        0 => names.join(", "),
        more => format!("{} and {more} more", names[..MOST].join(", ")),
    }
}

/// Says so where runs were made by different versions of lowkey.
fn builds(collected: &[Collected]) -> Option<String> {
    let mut builds: BTreeMap<String, usize> = BTreeMap::new();
    for c in collected {
        let part = |key| c.environment.get(key).and_then(Value::as_str).unwrap_or("unknown");
        *builds.entry(format!("{} ({})", part("lowkey"), part("commit"))).or_default() += 1;
    }
    let told: Vec<String> = builds.iter().map(|(build, runs)| format!("{build}: {runs}")).collect();
    (builds.len() > 1).then(|| {
        format!(
            "Runs were made by different versions of lowkey, and what these differ in may be part of the differences below: {}.",
            told.join(", ")
        )
    })
}

/// A run's settings, by the training loop.
const RUN_FILE: &str = "run.toml";

/// The first section in which the run that a folder holds differs from `config`; none where it holds no run.
pub(crate) fn other_section(out: &Path, config: &RunConfig) -> Result<Option<String>> {
    let path = out.join(RUN_FILE);
    let text = match files::read_text(&path, LARGEST) {
        Ok(text) => text,
        Err(e) if e.is_missing() => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let read = |text: &str| toml::from_str::<toml::Table>(text).map_err(|e| Error::file(&path, e.to_string()));
    let (earlier, now) = (read(&text)?, read(&config.to_toml()?)?);
    Ok(now.keys().chain(earlier.keys()).find(|key| now.get(*key) != earlier.get(*key)).cloned())
}

pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let text = files::read_text(path, LARGEST)?;
    serde_json::from_str(&text).map_err(|e| Error::file(path, format!("{e}; remove it to run this again")))
}

/// Eigenvalues of each layer's latent covariance.
fn spectra(evaluation: &Value) -> Vec<Vec<f64>> {
    let latents = evaluation.get("latents").and_then(Value::as_array).into_iter().flatten();
    let spectrum =
        |latent: &Value| Some(latent.get("covariance")?.as_array()?.iter().filter_map(Value::as_f64).collect());
    latents.filter_map(spectrum).collect()
}

/// The figures of the finished model, flat.
fn metrics(out: &Path, evaluation: &Value) -> Result<BTreeMap<String, f64>> {
    let mut found = BTreeMap::new();
    let mut put = |name: String, value: Option<&Value>| {
        if let Some(value) = value.and_then(Value::as_f64) {
            found.insert(name, value);
        }
    };
    put("val_loss".into(), evaluation.get("loss"));
    for key in ["gap", "accuracy", "mse", "bits_per_byte", "max_logit"] {
        put(key.into(), evaluation.get(key));
    }
    for class in evaluation.get("classes").and_then(Value::as_array).into_iter().flatten() {
        let Some(name) = class.get("class").and_then(Value::as_str) else { continue };
        for key in ["loss", "gap", "accuracy"] {
            put(format!("class.{name}.{key}"), class.get(key));
        }
    }
    for rank in evaluation.get("ranks").and_then(Value::as_array).into_iter().flatten() {
        let Some(width) = rank.get("rank").and_then(Value::as_u64) else { continue };
        for (name, key) in [("val_loss", "loss"), ("gap", "gap"), ("accuracy", "accuracy")] {
            put(format!("rank.{width}.{name}"), rank.get(key));
        }
    }
    let quantised = out.join(QUANTISED);
    if quantised.exists() {
        let quantised = read_json(&quantised)?;
        put("int8.val_loss".into(), quantised.get("int8"));
        put("int4.val_loss".into(), quantised.get("int4"));
    }
    let latents = evaluation.get("latents").and_then(Value::as_array).into_iter().flatten();
    let effective: Vec<f64> = latents.filter_map(|latent| latent.get("effective_rank")?.as_f64()).collect();
    if !effective.is_empty() {
        found.insert("latent_effective_rank".into(), effective.iter().sum::<f64>() / effective.len() as f64);
    }
    Ok(found)
}

/// Steps and held-out losses of `metrics.jsonl`; none where it has been removed.
fn curve(path: &Path) -> Result<Vec<(u64, f64)>> {
    let bytes = match files::read(path, LARGEST) {
        Ok(bytes) => bytes,
        Err(e) if e.is_missing() => return Ok(Vec::new()),
        Err(e) => return Err(e.into()),
    };
    let text = String::from_utf8_lossy(&bytes);
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Metrics>(line).ok());
    Ok(lines.filter_map(|line| Some((line.step, line.val_loss?))).collect())
}
