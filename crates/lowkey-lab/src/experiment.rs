//! The experiment file: one question, its arms, its seeds, and the rule that decides it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::study::{Rule, Theory};

/// An experiment file: one TOML file is one question, with the runs that answer it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Experiment {
    /// Name of the experiment, also of its folder of runs: letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// What it asks, in a sentence for the report.
    pub question: String,
    /// The run file that every arm starts from; its path is relative to this file.
    pub base: PathBuf,
    /// Seeds of the runs: each arm is trained once with each. All arms have the same, so that they are compared in pairs.
    #[schemars(length(min = 1))]
    pub seeds: Vec<u64>,
    /// What is compared: `val_loss` (nats per token), `gap`, `accuracy`, `mse`, `bits_per_byte`, `int8.val_loss`, `int4.val_loss`,
    /// `max_logit`, `latent_effective_rank`; of a class of tokens `class.NAME.loss`, `class.NAME.gap`, `class.NAME.accuracy`; of a
    /// narrower rank `rank.R.val_loss`, `rank.R.gap`, `rank.R.accuracy`.
    #[serde(default = "usual_metric")]
    pub metric: String,
    /// Whether a lower or a higher value of `metric` is better.
    #[serde(default)]
    pub better: Better,
    /// Name of the arm that the others are compared with and made equal to.
    pub baseline: String,
    /// The key of the run file whose number is the horizontal axis of the plots, such as `model.kv_lora_rank`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x: Option<String>,
    /// Threads of each run. Sums are taken in an order that depends on their number, so it belongs to the experiment, not to the
    /// machine.
    #[serde(default = "one")]
    #[schemars(range(min = 1))]
    pub threads: usize,
    /// Whether finished models are also measured with their caches in int8 and int4. For corpora whose entropy is known.
    #[serde(default)]
    pub quantised: bool,
    /// What is made equal between the arms. Absent: nothing.
    #[serde(default, rename = "match", skip_serializing_if = "Option::is_none")]
    pub matching: Option<Matching>,
    /// What the experiment may cost. One that would cost more is refused before its first run.
    #[serde(default)]
    pub budget: Budget,
    /// What decides. It is written before the first run; changed afterwards, there is no verdict.
    pub rule: Rule,
    /// Arms one by one. At least one arm or axis is needed; all together they may make 4096 arms.
    #[serde(default)]
    pub arms: Vec<ArmSection>,
    /// Arms as all combinations of the values of all axes.
    #[serde(default)]
    pub axes: Vec<Axis>,
    /// Lines that a theory predicts, drawn over the plots.
    #[serde(default)]
    pub theory: Vec<Theory>,
    /// The file this came from.
    #[serde(skip)]
    pub origin: PathBuf,
}

/// Which way a metric is better.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// For losses.
    #[default]
    Lower,
    /// For accuracies.
    Higher,
}

/// An arm by name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ArmSection {
    /// Name of the arm: letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// Keys of the run file that this arm sets, and their values, such as `"model.attention" = "mha"`.
    #[serde(default)]
    #[schemars(with = "BTreeMap<String, serde_json::Value>")]
    pub set: toml::Table,
    /// Where the arm stands on the horizontal axis of the plots. Absent: at its value of the key that the experiment's `x` names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x: Option<f64>,
    /// Whether the arm is left as it is where `[match]` makes the others equal.
    #[serde(default)]
    pub unmatched: bool,
}

/// A key of the run file that takes several values.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Axis {
    /// A key of the run file, such as `model.kv_lora_rank`.
    pub key: String,
    /// The values that it takes.
    #[schemars(with = "Vec<serde_json::Value>", length(min = 1))]
    pub values: Vec<toml::Value>,
}

/// What is made equal to the baseline, by changing one number of each arm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Matching {
    /// What is made equal to the baseline's.
    pub by: Matched,
    /// The key of the run file whose number is changed for that, such as `model.intermediate_size` or `training.steps`.
    pub with: String,
    /// The numbers that may be taken. Absent: all multiples of `multiple_of`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(inner(range(min = 1, max = 16_777_216)))]
    pub values: Vec<u64>,
    /// The number that is changed stays a multiple of this.
    #[serde(default = "one_u64")]
    #[schemars(range(min = 1, max = 16_777_216))]
    pub multiple_of: u64,
}

/// A quantity that arms can be matched by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Matched {
    /// The number of all parameters.
    Parameters,
    /// The operations of the whole training.
    TrainingFlops,
    /// The bytes that a token takes in the cache.
    CacheBytes,
}

/// What a sweep may cost.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// Most runs. Absent: any number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub runs: Option<usize>,
    /// Most hours, as estimated for one machine that does one run after the other; above 0. Absent: any number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0))]
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

/// The most arms of an experiment. Each is a folder, a curve of a plot and a row of every table.
const MOST_ARMS: usize = 4096;

/// The most runs of an experiment.
const MOST_RUNS: usize = 65_536;

/// The largest number that arms are matched with.
pub(crate) const MOST_MATCHED: u64 = 1 << 24;

/// Bytes of an experiment file that are read.
const LARGEST: u64 = 64 << 20;

/// Keys that belong to the experiment and not to an arm.
const OWN_KEYS: [&str; 3] = ["run.seed", "run.name", "training.threads"];

impl Experiment {
    /// Reads an experiment file.
    ///
    /// # Errors
    /// [`Error::Experiment`] with the place and the mend, [`Error::Files`] where it cannot be read.
    pub fn load(path: &Path) -> Result<Self> {
        let text = lowkey_files::read_text(path, LARGEST)?;
        let mut experiment: Self = toml::from_str(&text).map_err(|e| Error::experiment(path, e.to_string()))?;
        experiment.origin = path.to_path_buf();
        experiment.check()?;
        Ok(experiment)
    }

    /// The run file that arms start from.
    pub(crate) fn base_path(&self) -> PathBuf {
        self.origin.parent().unwrap_or(Path::new("")).join(&self.base)
    }

    fn check(&self) -> Result<()> {
        let faults = [self.fault_of_runs(), self.fault_of_arms(), self.fault_of_metric(), self.fault_of_rule()];
        match faults.into_iter().flatten().next() {
            Some(why) => Err(Error::experiment(&self.origin, why)),
            None => Ok(()),
        }
    }

    /// What is wrong with names, seeds and bounds.
    fn fault_of_runs(&self) -> Option<String> {
        if !is_name(&self.name) {
            return Some(format!("name = {:?}: letters, digits, '-', '_' and '.' only", self.name));
        }
        if self.seeds.is_empty() {
            return Some("seeds = []: at least one seed".into());
        }
        if self.seeds.iter().collect::<BTreeSet<_>>().len() < self.seeds.len() {
            return Some(format!("seeds = {:?}: a seed stands there twice", self.seeds));
        }
        if self.threads == 0 {
            return Some("threads = 0: at least 1".into());
        }
        if self.budget.runs == Some(0) {
            return Some("budget.runs = 0: at least 1; leave it out for no bound".into());
        }
        match self.budget.hours {
            Some(hours) if !(hours > 0.0 && hours.is_finite()) => {
                Some(format!("budget.hours = {hours}: a number of hours above 0; leave it out for no bound"))
            }
            _ => None,
        }
    }

    /// What is wrong with arms, axes and what they are matched by.
    fn fault_of_arms(&self) -> Option<String> {
        if self.arms.is_empty() && self.axes.is_empty() {
            return Some("no [[arms]] and no [[axes]]: there is nothing to compare".into());
        }
        if let Some(axis) = self.axes.iter().find(|axis| axis.values.is_empty()) {
            return Some(format!("[[axes]] {}: no values", axis.key));
        }
        let keys = self.axes.iter().map(|axis| &axis.key).chain(self.arms.iter().flat_map(|arm| arm.set.keys()));
        if let Some(key) = keys.into_iter().find(|key| OWN_KEYS.contains(&key.as_str())) {
            return Some(format!("{key} belongs to the experiment (seeds, name, threads), not to an arm"));
        }
        for (i, axis) in self.axes.iter().enumerate() {
            if self.axes[..i].iter().any(|other| other.key == axis.key) {
                return Some(format!("[[axes]] {}: stands there twice", axis.key));
            }
        }
        if let Some(arm) = self.arms.iter().find(|arm| !is_name(&arm.name)) {
            return Some(format!("arm {:?}: letters, digits, '-', '_' and '.' only", arm.name));
        }
        if let Some(arm) = self.arms.iter().find(|arm| arm.x.is_some_and(|x| !x.is_finite())) {
            return Some(format!("arm {}: x = {}: a finite number", arm.name, arm.x.unwrap_or_default()));
        }
        if let Some(why) = self.fault_of_numbers() {
            return Some(why);
        }
        let matching = self.matching.as_ref()?;
        if matching.with == "model.vocab_size" {
            // Rows that no text uses would be parameters in name only.
            return Some("match.with = \"model.vocab_size\": it belongs to the tokenizer, and not to an arm".into());
        }
        if !(1..=MOST_MATCHED).contains(&matching.multiple_of) {
            return Some(format!("match.multiple_of = {}: from 1 to {MOST_MATCHED}", matching.multiple_of));
        }
        let beyond = matching.values.iter().find(|value| !(1..=MOST_MATCHED).contains(value));
        beyond.map(|value| format!("match.values: {value} is not from 1 to {MOST_MATCHED}"))
    }

    /// How many arms and runs there would be: told before any of them is made.
    fn fault_of_numbers(&self) -> Option<String> {
        let product = self.axes.iter().try_fold(1usize, |product, axis| product.checked_mul(axis.values.len()));
        let of_axes = if self.axes.is_empty() { Some(0) } else { product };
        let arms = of_axes.and_then(|of_axes| of_axes.checked_add(self.arms.len()));
        if arms.is_none_or(|arms| arms > MOST_ARMS) {
            let axes: Vec<String> =
                self.axes.iter().map(|axis| format!("{} with {} values", axis.key, axis.values.len())).collect();
            let all = arms.map_or_else(|| "more arms than can be counted".into(), |arms| format!("{arms} arms"));
            return Some(format!(
                "[[arms]] and [[axes]] make {all} ({}), and {MOST_ARMS} are the most: take fewer values or axes",
                if axes.is_empty() { "[[arms]] alone".to_string() } else { axes.join(", ") }
            ));
        }
        let runs = arms.and_then(|arms| arms.checked_mul(self.seeds.len()));
        runs.is_none_or(|runs| runs > MOST_RUNS).then(|| {
            let arms = arms.unwrap_or_default();
            format!("{arms} arms of {} seeds are more runs than {MOST_RUNS}: take fewer", self.seeds.len())
        })
    }

    /// What is wrong with what is compared.
    fn fault_of_metric(&self) -> Option<String> {
        let Some(better) = direction(&self.metric) else {
            return Some(format!(
                "metric = {:?}: there are {}, class.NAME.loss, class.NAME.gap, class.NAME.accuracy, rank.R.val_loss, \
                 rank.R.gap and rank.R.accuracy",
                self.metric,
                METRICS.map(|(name, _)| name).join(", ")
            ));
        };
        let other = better.is_some_and(|better| better != self.better);
        other.then(|| {
            let (right, given) = match self.better {
                Better::Lower => ("higher", "lower"),
                Better::Higher => ("lower", "higher"),
            };
            format!("better = \"{given}\": {} is better the {right}: say better = \"{right}\"", self.metric)
        })
    }

    /// What is wrong with what decides.
    fn fault_of_rule(&self) -> Option<String> {
        let confidence = self.rule.confidence();
        if !(0.5..1.0).contains(&confidence) {
            return Some(format!("rule.confidence = {confidence}: a share from 0.5 to below 1"));
        }
        let (key, limit) = match &self.rule {
            Rule::Margin { margin, .. } => ("margin", *margin),
            Rule::Knee { percent, .. } | Rule::Theory { percent, .. } | Rule::Elastic { percent, .. } => {
                ("percent", *percent)
            }
        };
        if !(limit >= 0.0 && limit.is_finite()) {
            return Some(format!("rule.{key} = {limit}: a finite number, 0 or more"));
        }
        match &self.rule {
            Rule::Theory { name, .. } if !self.theory.iter().any(|theory| theory.name == *name) => {
                return Some(format!("rule: there is no [[theory]] with the name {name:?}"));
            }
            Rule::Elastic { arm, .. } if !self.arms.iter().any(|section| section.name == *arm) => {
                return Some(format!("rule: there is no [[arms]] with the name {arm:?}"));
            }
            _ => {}
        }
        for (i, theory) in self.theory.iter().enumerate() {
            if self.theory[..i].iter().any(|other| other.name == theory.name) {
                return Some(format!("[[theory]] {:?}: two have this name", theory.name));
            }
            if theory.points.iter().any(|(x, y)| !x.is_finite() || !y.is_finite()) {
                return Some(format!("[[theory]] {:?}: finite numbers only", theory.name));
            }
            if theory.points.len() < 2 || !theory.points.windows(2).all(|pair| pair[0].0 < pair[1].0) {
                return Some(format!("[[theory]] {:?}: at least two points, by rising x", theory.name));
            }
        }
        None
    }
}

/// The metrics of a run but for those of its classes and ranks, and which way each is better, where that is plain.
const METRICS: [(&str, Option<Better>); 9] = [
    ("val_loss", Some(Better::Lower)),
    ("gap", Some(Better::Lower)),
    ("accuracy", Some(Better::Higher)),
    ("mse", Some(Better::Lower)),
    ("bits_per_byte", Some(Better::Lower)),
    ("int8.val_loss", Some(Better::Lower)),
    ("int4.val_loss", Some(Better::Lower)),
    ("max_logit", None),
    ("latent_effective_rank", None),
];

/// Which way a metric is better, where that is plain; `None` for what is no metric.
fn direction(metric: &str) -> Option<Option<Better>> {
    if let Some((_, better)) = METRICS.iter().find(|(name, _)| *name == metric) {
        return Some(*better);
    }
    let (group, rest) = metric.split_once('.')?;
    let (name, part) = rest.rsplit_once('.')?;
    let is_one = match group {
        "class" => !name.is_empty() && ["loss", "gap", "accuracy"].contains(&part),
        "rank" => name.parse::<usize>().is_ok() && ["val_loss", "gap", "accuracy"].contains(&part),
        _ => false,
    };
    is_one.then_some(Some(if part == "accuracy" { Better::Higher } else { Better::Lower }))
}

/// Whether a text can be the name of a folder everywhere.
pub(crate) fn is_name(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with('.')
        && text.len() <= 120
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

#[cfg(test)]
mod tests;
