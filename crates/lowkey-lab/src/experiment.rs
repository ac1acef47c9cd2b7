//! The experiment file: one question, its arms, its seeds, and the rule that decides it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::study::{Rule, Theory};

/// One experiment file (TOML).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experiment {
    /// Its name, also that of its folder of runs.
    pub name: String,
    /// What it asks.
    pub question: String,
    /// The run file that every arm starts from, relative to this file.
    pub base: PathBuf,
    /// Seeds of each arm: of the initial weights and of the order of the data, the same for all arms, so that arms are compared in
    /// pairs.
    pub seeds: Vec<u64>,
    /// What is compared: `val_loss`, `gap`, `accuracy`, `mse`, `bits_per_byte`, or `class.NAME.gap`, `class.NAME.loss`,
    /// `class.NAME.accuracy`.
    #[serde(default = "usual_metric")]
    pub metric: String,
    /// Which way is better.
    #[serde(default)]
    pub better: Better,
    /// Name of the arm that the others are compared with, and matched to.
    pub baseline: String,
    /// The key of a run file whose number is the axis of the plots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x: Option<String>,
    /// Threads of each run. Sums are taken in an order that depends on it, so it belongs to the experiment, not to the machine.
    #[serde(default = "one")]
    pub threads: usize,
    /// Evaluate finished models with their caches in int8 and int4, too. For corpora whose entropy is known, as their documents stand alone.
    #[serde(default)]
    pub quantised: bool,
    /// What is made equal between the arms.
    #[serde(default, rename = "match", skip_serializing_if = "Option::is_none")]
    pub matching: Option<Matching>,
    /// Bounds that a sweep is refused above.
    #[serde(default)]
    pub budget: Budget,
    /// What decides, written before the first run.
    pub rule: Rule,
    /// Arms one by one.
    #[serde(default)]
    pub arms: Vec<ArmSection>,
    /// Arms as all combinations of values.
    #[serde(default)]
    pub axes: Vec<Axis>,
    /// Lines that a theory draws.
    #[serde(default)]
    pub theory: Vec<Theory>,
    /// The file this came from.
    #[serde(skip)]
    pub origin: PathBuf,
}

/// Which way a metric is better.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// A loss.
    #[default]
    Lower,
    /// An accuracy.
    Higher,
}

/// An arm by name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArmSection {
    /// Its name.
    pub name: String,
    /// Keys of the run file and their values, such as `"model.attention" = "mha"`.
    #[serde(default)]
    pub set: toml::Table,
    /// Where it stands on the axis of the plots; absent: the value of the experiment's `x` key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x: Option<f64>,
    /// Leave it as it is, whatever is matched.
    #[serde(default)]
    pub unmatched: bool,
}

/// A key of the run file that takes several values.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Axis {
    /// The key, such as `model.kv_lora_rank`.
    pub key: String,
    /// Its values.
    pub values: Vec<toml::Value>,
}

/// What is made equal to the baseline, by changing one number of each arm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Matching {
    /// What.
    pub by: Matched,
    /// The key that is changed, such as `model.intermediate_size` or `training.steps`.
    pub with: String,
    /// The values that may be tried; absent: all multiples of `multiple_of`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<u64>,
    /// The changed number is a multiple of this.
    #[serde(default = "one_u64")]
    pub multiple_of: u64,
}

/// A quantity that arms can be matched by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Matched {
    /// All parameters.
    Parameters,
    /// Operations of the whole training.
    TrainingFlops,
    /// Cache bytes per token.
    CacheBytes,
}

/// What a sweep may cost.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// Most runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runs: Option<usize>,
    /// Most hours, as estimated for one machine with one run after the other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hours: Option<f64>,
}

fn usual_metric() -> String {
    "val_loss".into()
}

fn one() -> usize {
    1
}

fn one_u64() -> u64 {
    1
}

/// Keys that belong to the experiment and not to an arm.
const OWN_KEYS: [&str; 3] = ["run.seed", "run.name", "training.threads"];

impl Experiment {
    /// Reads an experiment file.
    ///
    /// # Errors
    /// [`Error::Experiment`] with the place and the mend, [`Error::File`] where it cannot be read.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e.to_string()))?;
        let mut experiment: Self = toml::from_str(&text).map_err(|e| Error::experiment(path, e.to_string()))?;
        experiment.origin = path.to_path_buf();
        experiment.check()?;
        Ok(experiment)
    }

    /// The run file that arms start from.
    pub fn base_path(&self) -> PathBuf {
        self.origin.parent().unwrap_or(Path::new("")).join(&self.base)
    }

    fn check(&self) -> Result<()> {
        let refuse = |why: String| Err(Error::experiment(&self.origin, why));
        if !is_name(&self.name) {
            return refuse(format!("name = {:?}: letters, digits, '-', '_' and '.' only", self.name));
        }
        if self.seeds.is_empty() {
            return refuse("seeds = []: at least one seed".into());
        }
        if self.seeds.iter().collect::<BTreeSet<_>>().len() < self.seeds.len() {
            return refuse(format!("seeds = {:?}: a seed stands there twice", self.seeds));
        }
        if self.threads == 0 {
            return refuse("threads = 0: at least 1".into());
        }
        if self.arms.is_empty() && self.axes.is_empty() {
            return refuse("no [[arms]] and no [[axes]]: there is nothing to compare".into());
        }
        for axis in &self.axes {
            if axis.values.is_empty() {
                return refuse(format!("[[axes]] {}: no values", axis.key));
            }
        }
        let keys = self.axes.iter().map(|axis| &axis.key).chain(self.arms.iter().flat_map(|arm| arm.set.keys()));
        if let Some(key) = keys.into_iter().find(|key| OWN_KEYS.contains(&key.as_str())) {
            return refuse(format!("{key} belongs to the experiment (seeds, name, threads), not to an arm"));
        }
        if let Some(arm) = self.arms.iter().find(|arm| !is_name(&arm.name)) {
            return refuse(format!("arm {:?}: letters, digits, '-', '_' and '.' only", arm.name));
        }
        let confidence = self.rule.confidence();
        if !(0.5..1.0).contains(&confidence) {
            return refuse(format!("rule.confidence = {confidence}: a share from 0.5 to below 1"));
        }
        if let Rule::Theory { name, .. } = &self.rule
            && !self.theory.iter().any(|theory| theory.name == *name)
        {
            return refuse(format!("rule: there is no [[theory]] with the name {name:?}"));
        }
        if let Rule::Elastic { arm, .. } = &self.rule
            && !self.arms.iter().any(|section| section.name == *arm)
        {
            return refuse(format!("rule: there is no [[arms]] with the name {arm:?}"));
        }
        for theory in &self.theory {
            if theory.points.len() < 2 || !theory.points.windows(2).all(|pair| pair[0].0 < pair[1].0) {
                return refuse(format!("[[theory]] {:?}: at least two points, by rising x", theory.name));
            }
        }
        match &self.matching {
            Some(matching) if matching.multiple_of == 0 => refuse("match.multiple_of = 0: at least 1".into()),
            _ => Ok(()),
        }
    }
}

/// Whether a text can be the name of a folder everywhere.
pub(crate) fn is_name(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with('.')
        && text.len() <= 120
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}
