//! From an experiment file to its arms and runs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use lowkey_infer::CacheDtype;
use lowkey_model::ModelConfig;
use lowkey_train::{RunConfig, RunOptions, passes::Passes, setup::planned_model};

use crate::error::{Error, Result};
use crate::experiment::{Experiment, MOST_MATCHED, Matched, Matching, is_name};
use crate::study::{Arm, Rule};

/// Bytes of a cached number in the reports.
const F32: usize = 4;

/// An experiment with its arms worked out.
#[derive(Clone, Debug)]
pub struct Expanded {
    /// The file.
    pub experiment: Experiment,
    /// The arms, the file's own first, then the combinations of its axes.
    pub arms: Vec<Arm>,
    /// Index of the baseline.
    pub baseline: usize,
    /// `key=value` settings of each arm, matched ones included.
    overrides: Vec<Vec<String>>,
}

/// One run of an arm.
#[derive(Clone, Debug)]
pub struct Run {
    /// Index of the arm.
    pub arm: usize,
    /// Its seed.
    pub seed: u64,
    /// Its folder.
    pub out: PathBuf,
}

/// An arm before its costs are known.
struct Draft {
    name: String,
    settings: Vec<(String, toml::Value)>,
    x: Option<f64>,
    unmatched: bool,
}

/// What matching needs to know of a run.
struct Costs {
    config: RunConfig,
    model: ModelConfig,
}

impl Costs {
    fn of(&self, quantity: Matched) -> f64 {
        match quantity {
            Matched::Parameters => self.model.parameter_count().total as f64,
            Matched::CacheBytes => (self.model.cache_numbers() * F32) as f64,
            Matched::TrainingFlops => Passes::new(&self.config, &self.model).flops(),
        }
    }
}

/// Tokens in the cache that the costs of decoding are told at.
const CONTEXTS: [usize; 6] = [128, 512, 2048, 8192, 32_768, 131_072];

impl Expanded {
    /// Works out arms, checks that each is a run, and matches them to the baseline.
    ///
    /// # Errors
    /// [`Error::Experiment`] for arms that have one name, a baseline that is not there, or an arm that is no run, with the reason.
    pub fn new(experiment: Experiment) -> Result<Self> {
        let refuse = |why: String| Error::experiment(&experiment.origin, why);
        let drafts = drafts(&experiment)?;
        let mut taken = BTreeSet::new();
        if let Some(draft) = drafts.iter().find(|draft| !taken.insert(draft.name.as_str())) {
            return Err(refuse(format!("two arms have the name {:?}", draft.name)));
        }
        let names = || drafts.iter().map(|draft| draft.name.as_str()).collect::<Vec<_>>().join(", ");
        let baseline = drafts
            .iter()
            .position(|draft| draft.name == experiment.baseline)
            .ok_or_else(|| refuse(format!("baseline = {:?}: the arms are {}", experiment.baseline, names())))?;
        let costs = |arm: &str, overrides: &[String]| {
            costs(&experiment, overrides).map_err(|why| refuse(format!("arm {arm}: {why}")))
        };
        let mut overrides: Vec<Vec<String>> = drafts.iter().map(|draft| assignments(&draft.settings)).collect();
        let target = match &experiment.matching {
            Some(matching) => Some(costs(&experiment.baseline, &overrides[baseline])?.of(matching.by)),
            None => None,
        };
        let mut arms = Vec::with_capacity(drafts.len());
        for (i, draft) in drafts.iter().enumerate() {
            if let (Some(matching), Some(target)) = (&experiment.matching, target)
                && i != baseline
                && !draft.unmatched
            {
                let value = matched(matching, target, |value| {
                    let own = [&overrides[i][..], &[format!("{}={value}", matching.with)]].concat();
                    self::costs(&experiment, &own).map(|costs| costs.of(matching.by))
                });
                let value = value.map_err(|why| refuse(format!("arm {}: {why}", draft.name)))?;
                overrides[i].push(format!("{}={value}", matching.with));
            }
            let found = costs(&draft.name, &overrides[i])?;
            let mismatch = match (&experiment.matching, target) {
                (Some(matching), Some(target)) => Some(found.of(matching.by) / target - 1.0),
                _ => None,
            };
            arms.push(arm(&experiment, draft, &overrides[i], &found, mismatch));
        }
        if let Some(why) = unjudged(&experiment, &arms) {
            return Err(refuse(why));
        }
        Ok(Self { arms, baseline, overrides, experiment })
    }

    /// All runs, seed by seed, so that a sweep that is cut short has whole pairs; of shard `i` of `n` every n-th one.
    ///
    /// # Errors
    /// [`Error::Experiment`] for a shard that is not among its number.
    pub fn runs(&self, out: &Path, shard: Option<(usize, usize)>) -> Result<Vec<Run>> {
        let (i, n) = shard.unwrap_or((0, 1));
        if i >= n {
            let why = format!("shard {i}/{n}: shards of {n} are 0 to {}", n.saturating_sub(1));
            return Err(Error::experiment(&self.experiment.origin, why));
        }
        let all = self.experiment.seeds.iter().flat_map(|seed| {
            self.arms.iter().enumerate().map(move |(arm, section)| Run {
                arm,
                seed: *seed,
                out: out.join(&section.name).join(format!("seed-{seed}")),
            })
        });
        Ok(all.skip(i).step_by(n).collect())
    }

    /// The run file of a run.
    ///
    /// # Errors
    /// As [`RunConfig::load`].
    pub fn config(&self, run: &Run) -> Result<RunConfig> {
        let (arm, experiment) = (&self.arms[run.arm], &self.experiment);
        let own = [
            format!("run.seed={}", run.seed),
            format!("run.name=\"{}-{}-seed-{}\"", experiment.name, arm.name, run.seed),
            format!("training.threads={}", experiment.threads),
        ];
        Ok(RunConfig::load(&experiment.base_path(), &[&self.overrides[run.arm][..], &own].concat())?)
    }
}

/// Why a rule could never decide anything about these arms.
fn unjudged(experiment: &Experiment, arms: &[Arm]) -> Option<String> {
    let with_x = arms.iter().filter(|arm| arm.x.is_some()).count();
    match &experiment.rule {
        Rule::Margin { .. } if arms.len() < 2 => {
            Some("rule: the baseline is the only arm, and nothing is compared".into())
        }
        Rule::Knee { .. } | Rule::Theory { .. } if with_x == 0 => {
            Some("rule: no arm has an x; name the key that it comes from (x = \"model.kv_lora_rank\")".into())
        }
        Rule::Elastic { arm, .. } => {
            let elastic = arms.iter().find(|other| other.name == *arm)?;
            elastic
                .elastic_ranks
                .is_empty()
                .then(|| format!("rule: arm {arm} has no narrower ranks to judge; give it \"model.elastic.ranks\""))
        }
        _ => None,
    }
}

fn drafts(experiment: &Experiment) -> Result<Vec<Draft>> {
    let mut drafts: Vec<Draft> = experiment
        .arms
        .iter()
        .map(|arm| Draft {
            name: arm.name.clone(),
            settings: arm.set.iter().map(|(key, value)| (key.clone(), value.clone())).collect(),
            x: arm.x,
            unmatched: arm.unmatched,
        })
        .collect();
    if experiment.axes.is_empty() {
        return Ok(drafts);
    }
    let mut grid: Vec<Vec<(String, toml::Value)>> = vec![Vec::new()];
    for axis in &experiment.axes {
        let with = |settings: &Vec<(String, toml::Value)>| {
            let each = axis.values.iter().map(|value| [&settings[..], &[(axis.key.clone(), value.clone())]].concat());
            each.collect::<Vec<_>>()
        };
        grid = grid.iter().flat_map(with).collect();
    }
    for settings in grid {
        let part = |(key, value): &(String, toml::Value)| {
            let short = key.rsplit('.').next().unwrap_or(key);
            format!("{short}-{}", plain(value))
        };
        let name = settings.iter().map(part).collect::<Vec<_>>().join(".");
        if !is_name(&name) {
            let why =
                format!("the arm {name:?} cannot be a folder's name; write it as [[arms]] with a name of its own");
            return Err(Error::experiment(&experiment.origin, why));
        }
        drafts.push(Draft { name, settings, x: None, unmatched: false });
    }
    Ok(drafts)
}

/// A value without the quotes of a string.
fn plain(value: &toml::Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_string)
}

fn assignments(settings: &[(String, toml::Value)]) -> Vec<String> {
    settings.iter().map(|(key, value)| format!("{key}={value}")).collect()
}

fn costs(experiment: &Experiment, overrides: &[String]) -> std::result::Result<Costs, String> {
    let base = experiment.base_path();
    let threads = format!("training.threads={}", experiment.threads);
    let config = RunConfig::load(&base, &[overrides, &[threads]].concat()).map_err(|e| e.to_string())?;
    let options = RunOptions {
        run_file: base,
        out: PathBuf::new(),
        resume: false,
        overwrite: false,
        turn: 0,
        environment: serde_json::Map::new(),
    };
    let (model, _) = planned_model(&config, &options).map_err(|e| e.to_string())?;
    Ok(Costs { config, model })
}

fn arm(experiment: &Experiment, draft: &Draft, overrides: &[String], costs: &Costs, mismatch: Option<f64>) -> Arm {
    let setting = |text: &String| {
        let (key, value) = text.split_once('=')?;
        Some((key.to_string(), value.trim_matches('"').to_string()))
    };
    let settings: BTreeMap<String, String> = overrides.iter().filter_map(setting).collect();
    let axis = |key: &String| settings.get(key).and_then(|value| value.parse().ok()).filter(|x: &f64| x.is_finite());
    let passes = Passes::new(&costs.config, &costs.model);
    Arm {
        name: draft.name.clone(),
        x: draft.x.or_else(|| experiment.x.as_ref().and_then(axis)),
        settings,
        parameters: costs.model.parameter_count().total,
        train_flops_per_token: passes.mean_flops_per_token(),
        training_flops: passes.flops(),
        elastic_ranks: costs.model.elastic_ranks(),
        cache_bytes_per_token: costs.model.cache_numbers() * F32,
        int8_bytes_per_token: CacheDtype::Int8.bytes_per_token(&costs.model),
        decode_tokens_per_s: Vec::new(),
        decode_bytes: CONTEXTS.iter().map(|context| (*context, decode_bytes(&costs.model, *context))).collect(),
        steps: costs.config.training.steps,
        mismatch,
    }
}

/// Bytes of weights and cache in f32 that a decoded token reads at batch 1.
fn decode_bytes(model: &ModelConfig, context: usize) -> f64 {
    let attention = (0..model.layers.len()).map(|layer| {
        let costs = model.decode_costs(layer, context);
        let cost = costs.absorbed.unwrap_or(costs.expanded);
        cost.weights + cost.cached + cost.rebuilt
    });
    let rest: usize = model.layers.iter().map(|layer| layer.mlp.matrices(model.hidden_size)).sum();
    let head = model.vocab_size * model.hidden_size;
    ((attention.sum::<usize>() + rest + head) * F32) as f64
}

/// The admissible value that brings an arm nearest to the target. What is matched has to rise with the value.
fn matched(
    matching: &Matching,
    target: f64,
    at: impl Fn(u64) -> std::result::Result<f64, String>,
) -> std::result::Result<u64, String> {
    let nearest = |values: &[u64]| {
        let mut best: Option<(f64, u64)> = None;
        let mut failure = None;
        for value in values {
            match at(*value) {
                Ok(found) if best.is_none_or(|(apart, _)| (found - target).abs() < apart) => {
                    best = Some(((found - target).abs(), *value));
                }
                Ok(_) => {}
                Err(why) => failure = Some(why),
            }
        }
        best.map(|(_, value)| value).ok_or_else(|| failure.unwrap_or_else(|| "no value to match with".into()))
    };
    if !matching.values.is_empty() {
        return nearest(&matching.values);
    }
    let step = matching.multiple_of;
    let most = MOST_MATCHED / step;
    // What cannot be a run at a small value (fewer steps than its warm-up) is too little of it.
    let mut refused: Option<String> = None;
    let mut is_less = |value: u64| match at(value * step) {
        Ok(found) => found < target,
        Err(why) => {
            refused.get_or_insert(why);
            true
        }
    };
    let (mut low, mut high) = (1u64, 1u64);
    // Doubled until it is too much, then halved.
    while is_less(high) {
        if high == most {
            let why = refused.map_or_else(String::new, |why| format!(" ({why})"));
            return Err(format!("no {} up to {} is enough to match{why}", matching.with, most * step));
        }
        low = high;
        high = (2 * high).min(most);
    }
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if is_less(middle) { low = middle } else { high = middle }
    }
    nearest(&[low * step, high * step])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matching(values: &[u64], multiple_of: u64) -> Matching {
        Matching {
            by: Matched::Parameters,
            with: "model.intermediate_size".into(),
            values: values.to_vec(),
            multiple_of,
        }
    }

    #[test]
    fn the_nearest_admissible_value_is_found() {
        for target in [11.0, 100.0, 1234.5, 77_777.0] {
            for step in [1, 8, 10] {
                let law = |value: u64| Ok(7.0 * value as f64 + 3.0);
                let value = matched(&matching(&[], step), target, law).unwrap();
                assert_eq!(value % step, 0);
                let apart = |value: u64| (7.0 * value as f64 + 3.0 - target).abs();
                assert!(apart(value) <= apart(value + step), "{target} {step}: {value}");
                assert!(value == step || apart(value) <= apart(value - step), "{target} {step}: {value}");
            }
        }
        let heads = |value: u64| if value == 3 { Err("3 does not divide 4".into()) } else { Ok(value as f64) };
        assert_eq!(matched(&matching(&[1, 2, 3, 4], 1), 3.4, heads), Ok(4));
        assert_eq!(matched(&matching(&[3], 1), 3.4, heads), Err("3 does not divide 4".into()));
        // Too little to be a run is too little; what never is a run says why.
        let warmed_up = |value: u64| if value < 6 { Err("below the warm-up".into()) } else { Ok(value as f64) };
        for target in [6.0, 7.0, 40.0, 1000.0] {
            assert_eq!(matched(&matching(&[], 1), target, warmed_up), Ok(target as u64));
        }
        assert_eq!(matched(&matching(&[], 1), 2.0, warmed_up), Ok(6));
        let never = matched(&matching(&[], 8), 9.0, |_| Err("unknown field `rank`".into())).unwrap_err();
        assert!(never.contains("unknown field `rank`"), "{never}");
        assert!(matched(&matching(&[], 1 << 24), 9e9, |value| Ok(value as f64)).is_err());
        assert!(matched(&matching(&[], 1), 1e12, |value| Ok(value as f64)).unwrap_err().contains("no model.inter"));
    }
}
