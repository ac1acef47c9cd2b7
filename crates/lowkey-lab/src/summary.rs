//! The arms of a study in numbers, as a table for people and as one for programs.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

use lowkey_files as files;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::markup;
use crate::page::page;
use crate::stats::{Mean, holm};
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
    /// Margin rule: p-value of the claim that the difference lies outside of the margin, by Holm's correction for all arms; absent
    /// until every seed is finished.
    pub p_differs: Option<f64>,
    /// The same of the claim that it lies within: two one-sided tests.
    pub p_equal: Option<f64>,
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
    /// Why there is no verdict, where something speaks against any.
    pub objections: Vec<String>,
}

impl Study {
    /// The share that intervals hold the truth in.
    pub(crate) fn confidence(&self) -> f64 {
        self.rule.confidence()
    }

    /// What the rule may be called: written beforehand only where nothing speaks against it.
    pub(crate) fn rule_is(&self) -> &'static str {
        if self.objections.is_empty() && !self.runs.is_empty() { "Rule, as written before the runs" } else { "Rule" }
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
                    p_differs: None,
                    p_equal: None,
                }
            })
            .collect();
        let mut arms = arms;
        self.judge(&mut arms);
        let (finished, planned) = (self.runs.len(), self.arms.len() * self.seeds.len());
        let mut verdict = self.verdict(&arms);
        if finished < planned {
            verdict.insert(0, format!("Preliminary: {finished} of {planned} runs are finished."));
        }
        if self.objections.is_empty() && finished > 0 && matches!(self.rule, Rule::Margin { .. }) {
            verdict.push(self.on_many());
        }
        verdict.extend(self.notes.iter().cloned());
        Summary { arms, finished, planned, verdict, objections: self.objections.clone() }
    }

    /// Gives each arm of which all seeds are finished its p-values against the margin, corrected for all arms that the experiment has:
    /// those that are not finished yet could still say anything.
    fn judge(&self, arms: &mut [ArmSummary]) {
        let Rule::Margin { margin, .. } = self.rule else { return };
        let compared: Vec<usize> = (0..arms.len()).filter(|i| *i != self.baseline).collect();
        let complete = |arm: &ArmSummary| arm.difference.filter(|difference| difference.n == self.seeds.len());
        let of = |p: fn(&Mean, f64) -> Option<f64>| -> Vec<Option<f64>> {
            let own: Vec<Option<f64>> = compared.iter().map(|i| p(&complete(&arms[*i])?, margin)).collect();
            let adjusted = holm(&own.iter().map(|p| p.unwrap_or(1.0)).collect::<Vec<_>>());
            own.iter().zip(adjusted).map(|(own, adjusted)| own.map(|_| adjusted)).collect()
        };
        let (differs, equal) = (of(Mean::p_outside), of(Mean::p_within));
        for ((i, differs), equal) in compared.into_iter().zip(differs).zip(equal) {
            (arms[i].p_differs, arms[i].p_equal) = (differs, equal);
        }
    }
}

/// The three reports, with how each begins that lowkey has written and what it holds.
const REPORTS: [(&str, &str, &str); 3] = [
    ("results.csv", "arm,seed,x,parameters,train_flops_per_token,", ""),
    ("table.md", "# ", "\n| arm | x | n | "),
    ("report.html", "<!doctype html>", "<div class=\"verdict\">"),
];

/// Bytes of a report that is to be replaced which are read.
const LARGEST: u64 = 256 << 20;

/// Writes `results.csv`, `table.md` and `report.html`, which depend on the study alone: not on how long it took, where, or how often it was resumed.
///
/// # Errors
/// [`Error::File`] where a file of such a name is there that is no such report, and nothing is written; [`Error::Files`] where one
/// cannot be written.
pub fn report(study: &Study, dir: &Path) -> Result<Summary> {
    for (name, begins, holds) in REPORTS {
        let path = dir.join(name);
        let is_ours = |text: &str| text.starts_with(begins) && text.contains(holds);
        match files::read(&path, LARGEST) {
            Ok(bytes) if is_ours(&String::from_utf8_lossy(&bytes)) => {}
            Ok(_) => {
                let why = "is no report of lowkey's and would be replaced: move it away, or give another --out";
                return Err(Error::file(path, why));
            }
            Err(e) if e.is_missing() => {}
            Err(e) => return Err(e.into()),
        }
    }
    let summary = study.summary();
    let texts = [csv(study), markdown(study, &summary), page(study, &summary)];
    for ((name, ..), text) in REPORTS.iter().zip(texts) {
        files::write(&dir.join(name), text.as_bytes())?;
    }
    Ok(summary)
}

fn csv(study: &Study) -> String {
    let metrics: BTreeSet<&String> = study.runs.iter().flat_map(|run| run.metrics.keys()).collect();
    let keys: BTreeSet<&String> = study.arms.iter().flat_map(|arm| arm.settings.keys()).collect();
    let fixed =
        ["arm", "seed", "x", "parameters", "train_flops_per_token", "cache_bytes_per_token", "steps", "mismatch"];
    let header = fixed.iter().map(|name| (*name).to_string());
    let header =
        header.chain(keys.iter().map(|key| markup::csv(key))).chain(metrics.iter().map(|name| markup::csv(name)));
    let mut out = header.collect::<Vec<_>>().join(",") + "\n";
    let number = |x: Option<f64>| x.map_or_else(String::new, |x| x.to_string());
    for run in &study.runs {
        let Some(arm) = study.arms.get(run.arm) else { continue };
        let mut cells = vec![
            markup::csv(&arm.name),
            run.seed.to_string(),
            number(arm.x),
            arm.parameters.to_string(),
            arm.train_flops_per_token.to_string(),
            arm.cache_bytes_per_token.to_string(),
            arm.steps.to_string(),
            number(arm.mismatch),
        ];
        cells
            .extend(keys.iter().map(|key| arm.settings.get(*key).map_or_else(String::new, |value| markup::csv(value))));
        cells.extend(metrics.iter().map(|name| number(run.metrics.get(*name).copied())));
        out += &(cells.join(",") + "\n");
    }
    out
}

fn markdown(study: &Study, summary: &Summary) -> String {
    let text = markup::markdown;
    let mut out = format!("# {}\n\n{}\n\n", text(&study.name), text(&study.question));
    for sentence in &summary.verdict {
        let _ = writeln!(out, "- {}", text(sentence));
    }
    let (metric, percent) = (text(&study.metric), study.confidence() * 100.0);
    let _ = write!(
        out,
        "\n{}: `{}`. Intervals are Student's at {percent} % over seeds, each for itself; differences are to {} in pairs of the \
         same seed.\n\n\
         | arm | x | n | {metric} | sd | difference | detectable | parameters | mismatch | cache B/token |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
        study.rule_is(),
        markup::json_in_backticks(&serde_json::to_string(&study.rule).unwrap_or_default()),
        text(&study.arms[study.baseline].name)
    );
    let optional = |x: Option<f64>| x.map_or_else(|| "—".into(), |x| format!("{x:.4}"));
    let with_half = |mean: Option<Mean>, sign: bool| match mean {
        None => "—".to_string(),
        Some(mean) => {
            let half = mean.half.map_or_else(String::new, |half| format!(" ± {half:.4}"));
            if sign { format!("{:+.4}{half}", mean.mean) } else { format!("{:.4}{half}", mean.mean) }
        }
    };
    for ArmSummary { arm, metric, difference, .. } in &summary.arms {
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            text(&arm.name),
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
mod stored;
#[cfg(test)]
mod tests;
