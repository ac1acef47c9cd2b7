//! The arms of a study in numbers, as a table for people and as one for programs.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

use lowkey_train::checkpoint::write_file;
use serde::Serialize;

use crate::error::Result;
use crate::page::page;
use crate::stats::Mean;
use crate::study::{Arm, Rule, Study};

/// What all seeds of an arm say.
#[derive(Clone, Debug, Serialize)]
pub struct ArmSummary {
    /// The arm.
    pub arm: Arm,
    /// The metric over its finished seeds; absent where none is.
    pub metric: Option<Mean>,
    /// Its difference to the baseline, seed by seed; absent for the baseline, and where no seed is finished in both.
    pub difference: Option<Mean>,
}

/// A study in numbers.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The arms in the order of the file.
    pub arms: Vec<ArmSummary>,
    /// Finished runs.
    pub finished: usize,
    /// Runs that the experiment has.
    pub planned: usize,
    /// What the rule says, in sentences.
    pub verdict: Vec<String>,
}

impl Study {
    /// The share that intervals hold the truth in.
    pub(crate) fn confidence(&self) -> f64 {
        self.rule.confidence()
    }

    /// The metric of an arm by seed.
    pub(crate) fn values(&self, arm: usize) -> BTreeMap<u64, f64> {
        self.values_of(arm, &self.metric)
    }

    /// A figure of an arm by seed.
    pub(crate) fn values_of(&self, arm: usize, figure: &str) -> BTreeMap<u64, f64> {
        let runs = self.runs.iter().filter(|run| run.arm == arm);
        runs.filter_map(|run| Some((run.seed, *run.metrics.get(figure)?))).collect()
    }

    /// Means, paired differences, and what the rule makes of them.
    pub fn summary(&self) -> Summary {
        let base = self.values(self.baseline);
        let arms: Vec<ArmSummary> = self
            .arms
            .iter()
            .enumerate()
            .map(|(i, arm)| {
                let values = self.values(i);
                let all: Vec<f64> = values.values().copied().collect();
                let pairs: Vec<f64> = values.iter().filter_map(|(seed, value)| Some(value - base.get(seed)?)).collect();
                ArmSummary {
                    arm: arm.clone(),
                    metric: Mean::of(&all, self.confidence()),
                    difference: Mean::of(&pairs, self.confidence()).filter(|_| i != self.baseline),
                }
            })
            .collect();
        let (finished, planned) = (self.runs.len(), self.arms.len() * self.seeds.len());
        let mut verdict = self.verdict(&arms);
        if self.rule_changed {
            let changed = "The rule, the metric or the baseline is not what it was when the first run began.";
            verdict.insert(0, changed.into());
        }
        if finished < planned {
            verdict.insert(0, format!("Preliminary: {finished} of {planned} runs are finished."));
        }
        Summary { arms, finished, planned, verdict }
    }

    fn verdict(&self, arms: &[ArmSummary]) -> Vec<String> {
        match &self.rule {
            Rule::Margin { margin, .. } => arms.iter().filter_map(|arm| self.against_margin(arm, *margin)).collect(),
            Rule::Knee { percent, .. } => vec![self.knee(arms, *percent)],
            Rule::Theory { name, percent, .. } => self.against_theory(arms, name, *percent),
            Rule::Elastic { arm, percent, .. } => self.elastic(arm, *percent),
        }
    }

    /// Positive where worse.
    fn worse_by(&self, difference: f64) -> f64 {
        if self.lower_is_better { difference } else { 0.0 - difference }
    }

    fn against_margin(&self, arm: &ArmSummary, margin: f64) -> Option<String> {
        let difference = arm.difference?;
        let (baseline, name) = (&self.arms[self.baseline].name, &arm.arm.name);
        let Some((low, high)) = difference.interval() else {
            return Some(format!("{name}: one seed only, which decides nothing."));
        };
        let (a, b) = (self.worse_by(low), self.worse_by(high));
        let (low, high) = (a.min(b), a.max(b));
        let what = if high < -margin {
            "better"
        } else if low > margin {
            "worse"
        } else if -margin <= low && high <= margin {
            "equal within the margin"
        } else {
            "undecided"
        };
        let detectable = difference.detectable.map_or_else(String::new, |d| format!(", detectable {d:.4}"));
        Some(format!(
            "{name} against {baseline}: {what} (worse by {low:+.4} to {high:+.4}, margin {margin}{detectable})."
        ))
    }

    /// The smallest x that is nearly as good as the best.
    pub(crate) fn knee(&self, arms: &[ArmSummary], percent: f64) -> String {
        let with_x = || arms.iter().filter_map(|arm| Some((arm.arm.x?, &arm.arm.name, arm.metric?)));
        let best = with_x().min_by(|a, b| self.worse_by(a.2.mean).total_cmp(&self.worse_by(b.2.mean)));
        let Some((best_x, best_name, best)) = best else { return "No arm with an x is finished.".into() };
        let allowed = (best.mean.abs() * percent / 100.0).max(best.sd.unwrap_or(0.0));
        let near = with_x().filter(|(_, _, mean)| self.worse_by(mean.mean) - self.worse_by(best.mean) <= allowed);
        let (x, name, mean) = near.min_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or((best_x, best_name, best));
        format!(
            "The smallest x within {percent} % or one standard deviation of the best is {x} ({name}: {:.4}); the best is {best_x} \
             ({best_name}: {:.4}).",
            mean.mean, best.mean
        )
    }

    /// An elastic arm's figures at its prefixes: rank, seed and value.
    pub(crate) fn prefixes(&self, arm: usize) -> BTreeMap<usize, BTreeMap<u64, f64>> {
        let mut found: BTreeMap<usize, BTreeMap<u64, f64>> = BTreeMap::new();
        for run in self.runs.iter().filter(|run| run.arm == arm) {
            for (name, value) in &run.metrics {
                let rank = name.strip_prefix("rank.").and_then(|rest| rest.strip_suffix(&format!(".{}", self.metric)));
                if let Some(rank) = rank.and_then(|rank| rank.parse().ok()) {
                    found.entry(rank).or_default().insert(run.seed, *value);
                }
            }
        }
        found
    }

    fn elastic(&self, name: &str, percent: f64) -> Vec<String> {
        let Some(elastic) = self.arms.iter().position(|arm| arm.name == name) else { return Vec::new() };
        let mut at_ranks = self.prefixes(elastic);
        if let Some(whole) = self.arms[elastic].x {
            at_ranks.insert(whole as usize, self.values(elastic));
        }
        let mut holds = true;
        let mut said = Vec::new();
        for (rank, values) in at_ranks {
            let at_rank = |arm: &Arm| arm.x.is_some_and(|x| x as usize == rank) && arm.name != name;
            let Some(arm) = self.arms.iter().position(at_rank) else { continue };
            let dedicated = self.values(arm);
            let pairs: Vec<f64> = values.iter().filter_map(|(seed, v)| Some(v - dedicated.get(seed)?)).collect();
            let of_dedicated = Mean::of(&dedicated.values().copied().collect::<Vec<_>>(), self.confidence());
            let (Some(difference), Some(mean)) = (Mean::of(&pairs, self.confidence()), of_dedicated) else { continue };
            let sd = mean.sd.unwrap_or(0.0);
            let within = self.worse_by(difference.mean) <= (mean.mean.abs() * percent / 100.0).max(sd);
            holds &= within;
            said.push(format!(
                "rank {rank}: {:+.4}{} against {} ({:.4}, sd {sd:.4}), {:+.2} %: {}.",
                difference.mean,
                difference.half.map_or_else(String::new, |half| format!(" ± {half:.4}")),
                self.arms[arm].name,
                mean.mean,
                difference.mean / mean.mean * 100.0,
                if within { "holds" } else { "misses" },
            ));
        }
        let all = if holds { "is" } else { "is not" };
        said.insert(
            0,
            format!("{name} {all} within {percent} % or one standard deviation of the dedicated arms at every rank."),
        );
        said
    }

    fn against_theory(&self, arms: &[ArmSummary], name: &str, percent: f64) -> Vec<String> {
        let Some(theory) = self.theory.iter().find(|theory| theory.name == name) else { return Vec::new() };
        let mut holds = true;
        let mut said: Vec<String> = arms
            .iter()
            .filter_map(|arm| {
                let (x, mean) = (arm.arm.x?, arm.metric?);
                let expected = line(&theory.points, x)?;
                let apart = (mean.mean / expected - 1.0) * 100.0;
                let within = apart.abs() <= percent;
                holds &= within;
                let word = if within { "within" } else { "NOT within" };
                Some(format!(
                    "{}: {:.4} where {name} says {expected:.4}, {apart:+.2} %, {word} {percent} %.",
                    arm.arm.name, mean.mean
                ))
            })
            .collect();
        let all = if holds { "holds" } else { "does not hold" };
        said.insert(0, format!("{name} {all} within {percent} % at {} points.", said.len()));
        said
    }
}

/// The height of a broken line at `x`; `None` outside of it.
pub(crate) fn line(points: &[(f64, f64)], x: f64) -> Option<f64> {
    let pair = points.windows(2).find(|pair| pair[0].0 <= x && x <= pair[1].0)?;
    let [(x0, y0), (x1, y1)] = pair else { return None };
    Some(y0 + (y1 - y0) * (x - x0) / (x1 - x0))
}

/// Writes `results.csv`, `table.md` and `report.html`, which depend on the study alone: not on how long it took, where, or how often it was resumed.
///
/// # Errors
/// [`crate::Error::Train`] where a file cannot be written.
pub fn report(study: &Study, dir: &Path) -> Result<Summary> {
    let summary = study.summary();
    write_file(&dir.join("results.csv"), csv(study).as_bytes())?;
    write_file(&dir.join("table.md"), markdown(study, &summary).as_bytes())?;
    write_file(&dir.join("report.html"), page(study, &summary).as_bytes())?;
    Ok(summary)
}

fn csv(study: &Study) -> String {
    let metrics: BTreeSet<&String> = study.runs.iter().flat_map(|run| run.metrics.keys()).collect();
    let keys: BTreeSet<&String> = study.arms.iter().flat_map(|arm| arm.settings.keys()).collect();
    let fixed =
        ["arm", "seed", "x", "parameters", "train_flops_per_token", "cache_bytes_per_token", "steps", "mismatch"];
    let header = fixed.iter().map(|name| (*name).to_string());
    let header = header.chain(keys.iter().map(|key| quoted(key))).chain(metrics.iter().map(|name| quoted(name)));
    let mut out = header.collect::<Vec<_>>().join(",") + "\n";
    let number = |x: Option<f64>| x.map_or_else(String::new, |x| x.to_string());
    for run in &study.runs {
        let Some(arm) = study.arms.get(run.arm) else { continue };
        let mut cells = vec![
            quoted(&arm.name),
            run.seed.to_string(),
            number(arm.x),
            arm.parameters.to_string(),
            arm.train_flops_per_token.to_string(),
            arm.cache_bytes_per_token.to_string(),
            arm.steps.to_string(),
            number(arm.mismatch),
        ];
        cells.extend(keys.iter().map(|key| arm.settings.get(*key).map_or_else(String::new, |value| quoted(value))));
        cells.extend(metrics.iter().map(|name| number(run.metrics.get(*name).copied())));
        out += &(cells.join(",") + "\n");
    }
    out
}

/// A cell of a CSV file (RFC 4180).
fn quoted(text: &str) -> String {
    if text.contains([',', '"', '\n', '\r']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text.into() }
}

fn markdown(study: &Study, summary: &Summary) -> String {
    let mut out = format!("# {}\n\n{}\n\n", study.name, study.question);
    for sentence in &summary.verdict {
        let _ = writeln!(out, "- {sentence}");
    }
    let (metric, percent) = (&study.metric, study.confidence() * 100.0);
    let _ = write!(
        out,
        "\nRule, as written before the runs: `{}`. Intervals are Student's at {percent} % over seeds; differences are to \
         {} in pairs of the same seed.\n\n\
         | arm | x | n | {metric} | sd | difference | detectable | parameters | mismatch | cache B/token |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
        serde_json::to_string(&study.rule).unwrap_or_default(),
        study.arms[study.baseline].name
    );
    let optional = |x: Option<f64>| x.map_or_else(|| "—".into(), |x| format!("{x:.4}"));
    let with_half = |mean: Option<Mean>, sign: bool| match mean {
        None => "—".to_string(),
        Some(mean) => {
            let half = mean.half.map_or_else(String::new, |half| format!(" ± {half:.4}"));
            if sign { format!("{:+.4}{half}", mean.mean) } else { format!("{:.4}{half}", mean.mean) }
        }
    };
    for ArmSummary { arm, metric, difference } in &summary.arms {
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            arm.name,
            arm.x.map_or_else(|| "—".into(), |x| x.to_string()),
            metric.map_or(0, |m| m.n),
            with_half(*metric, false),
            optional(metric.and_then(|m| m.sd)),
            with_half(*difference, true),
            optional(difference.and_then(|d| d.detectable)),
            arm.parameters,
            arm.mismatch.map_or_else(|| "—".into(), |m| format!("{:+.2} %", m * 100.0)),
            arm.cache_bytes_per_token
        );
    }
    out
}

#[cfg(test)]
mod tests;
