//! What the rule makes of the figures: a claim where its premises hold, and otherwise what is missing.

use std::collections::{BTreeMap, BTreeSet};

use crate::stats::Mean;
use crate::study::{Arm, Rule, Study};
use crate::summary::ArmSummary;

impl Study {
    /// The rule's sentences; none of them where something speaks against any verdict.
    pub(crate) fn verdict(&self, arms: &[ArmSummary]) -> Vec<String> {
        if !self.objections.is_empty() {
            return self.objections.iter().map(|why| format!("No verdict: {why}.")).collect();
        }
        match &self.rule {
            Rule::Margin { margin, .. } => self.against_margin(arms, *margin),
            Rule::Knee { percent, .. } => vec![self.knee(arms, *percent)],
            Rule::Theory { name, percent, .. } => self.against_theory(arms, name, *percent),
            Rule::Elastic { arm, percent, .. } => self.elastic(arm, *percent),
        }
    }

    /// How several claims at once are dealt with, in a sentence.
    pub(crate) fn on_many(&self) -> String {
        let compared = self.arms.len().saturating_sub(1);
        match self.rule {
            Rule::Margin { .. } if compared > 1 => format!(
                "The p-values are Holm's over {compared} comparisons: at most {} % of such studies say better or worse of any \
                 arm wrongly, and as many say equal wrongly.",
                percent(1.0 - self.confidence())
            ),
            Rule::Margin { .. } => "There is one comparison, and nothing to correct for.".into(),
            _ => "The rule judges means; the intervals stand each for itself, uncorrected for their number.".into(),
        }
    }

    /// Whether every seed of an arm is measured.
    fn complete(&self, arm: usize) -> bool {
        let values = self.values(arm);
        self.seeds.iter().all(|seed| values.contains_key(seed))
    }

    /// Seeds that are measured in both of two arms.
    fn in_both(&self, a: usize, b: usize) -> usize {
        let (a, b) = (self.values(a), self.values(b));
        self.seeds.iter().filter(|seed| a.contains_key(seed) && b.contains_key(seed)).count()
    }

    /// Positive where worse.
    pub(crate) fn worse_by(&self, difference: f64) -> f64 {
        if self.lower_is_better { difference } else { 0.0 - difference }
    }

    /// An interval of a difference, from the better to the worse end.
    fn worse_from_to(&self, (low, high): (f64, f64)) -> (f64, f64) {
        let (a, b) = (self.worse_by(low), self.worse_by(high));
        (a.min(b), a.max(b))
    }

    fn against_margin(&self, arms: &[ArmSummary], margin: f64) -> Vec<String> {
        let baseline = &self.arms[self.baseline].name;
        let level = 1.0 - self.confidence();
        let sentence = |(i, row): (usize, &ArmSummary)| {
            let name = &row.arm.name;
            let (k, n) = (self.in_both(i, self.baseline), self.seeds.len());
            if n == 1 {
                return format!("{name}: one seed only, which decides nothing.");
            }
            let (Some(difference), Some(differs), Some(equal)) = (row.difference, row.p_differs, row.p_equal) else {
                return format!("{name} against {baseline}: undecided, {k} of {n} seeds are finished.");
            };
            let mean = self.worse_by(difference.mean);
            let (what, p, share) = match () {
                () if differs <= level && mean < -margin => ("better", Some(differs), self.confidence()),
                () if differs <= level && mean > margin => ("worse", Some(differs), self.confidence()),
                // Two one-sided tests at this level are the interval that leaves out as much on either side.
                () if equal <= level => ("equal within the margin", Some(equal), 1.0 - 2.0 * level),
                () => ("undecided", None, self.confidence()),
            };
            let interval = difference.interval_at(share).map(|interval| self.worse_from_to(interval));
            let (low, high) = interval.unwrap_or((mean, mean));
            let p =
                p.map_or_else(String::new, |p| if p < 1e-4 { ", p < 0.0001".into() } else { format!(", p = {p:.4}") });
            let detectable = difference.detectable.map_or_else(String::new, |d| format!(", detectable {d:.4}"));
            format!(
                "{name} against {baseline}: {what} (worse by {low:+.4} to {high:+.4} at {} %, margin {margin}{p}{detectable}).",
                percent(share)
            )
        };
        arms.iter().enumerate().filter(|(i, _)| *i != self.baseline).map(sentence).collect()
    }

    /// The smallest x that is nearly as good as the best.
    pub(crate) fn knee(&self, arms: &[ArmSummary], percent: f64) -> String {
        let points: Vec<usize> = (0..arms.len()).filter(|i| self.arms[*i].x.is_some()).collect();
        let done = points.iter().filter(|i| self.complete(**i)).count();
        if done < points.len() || points.is_empty() {
            return format!("Undecided: {done} of {} arms with an x are finished.", points.len());
        }
        let with_x = || arms.iter().filter_map(|arm| Some((arm.arm.x?, &arm.arm.name, arm.metric?)));
        let best = with_x().min_by(|a, b| self.worse_by(a.2.mean).total_cmp(&self.worse_by(b.2.mean)));
        let Some((best_x, best_name, best)) = best else { return "No arm with an x is finished.".into() };
        let allowed = (best.mean.abs() * percent / 100.0).max(best.sd.unwrap_or(0.0));
        let near = with_x().filter(|(_, _, mean)| self.worse_by(mean.mean) - self.worse_by(best.mean) <= allowed);
        let (x, name, mean) = near.min_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or((best_x, best_name, best));
        format!(
            "The smallest x within {percent} %{} of the best is {x} ({name}: {:.4}); the best is {best_x} ({best_name}: {:.4}).",
            self.or_a_deviation(),
            mean.mean,
            best.mean
        )
    }

    /// One seed has no standard deviation.
    fn or_a_deviation(&self) -> &'static str {
        if self.seeds.len() > 1 { " or one standard deviation" } else { "" }
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
        let mut ranks: BTreeSet<usize> = self.arms[elastic].elastic_ranks.iter().copied().collect();
        if let Some(whole) = self.arms[elastic].x {
            ranks.insert(whole as usize);
            at_ranks.insert(whole as usize, self.values(elastic));
        }
        let mut tally = Tally { points: ranks.len(), ..Tally::default() };
        let mut said = Vec::new();
        for rank in ranks {
            let at_rank = |arm: &Arm| arm.x.is_some_and(|x| x as usize == rank) && arm.name != name;
            let Some(arm) = self.arms.iter().position(at_rank) else {
                said.push(format!("rank {rank}: no arm is trained at this width."));
                continue;
            };
            let values = at_ranks.remove(&rank).unwrap_or_default();
            let dedicated = self.values(arm);
            let pairs: Vec<f64> = values.iter().filter_map(|(seed, v)| Some(v - dedicated.get(seed)?)).collect();
            if pairs.len() < self.seeds.len() {
                said.push(format!(
                    "rank {rank}: undecided, {} of {} seeds are finished.",
                    pairs.len(),
                    self.seeds.len()
                ));
                continue;
            }
            let of_dedicated = Mean::of(&dedicated.values().copied().collect::<Vec<_>>(), self.confidence());
            let (Some(difference), Some(mean)) = (Mean::of(&pairs, self.confidence()), of_dedicated) else { continue };
            let sd = mean.sd.unwrap_or(0.0);
            let within = self.worse_by(difference.mean) <= (mean.mean.abs() * percent / 100.0).max(sd);
            tally.add(within);
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
        let near = format!("within {percent} %{} of the dedicated arms", self.or_a_deviation());
        let all = match tally.verdict() {
            Some(true) => format!("{name} is {near} at every rank."),
            Some(false) if tally.is_complete() => format!("{name} is not {near} at every rank."),
            Some(false) => format!("{name} is not {near} at every rank, {} are finished.", tally.of("ranks")),
            None => format!("Undecided whether {name} is {near}: {} are finished.", tally.of("ranks")),
        };
        said.insert(0, all);
        said
    }

    fn against_theory(&self, arms: &[ArmSummary], name: &str, percent: f64) -> Vec<String> {
        let Some(theory) = self.theory.iter().find(|theory| theory.name == name) else { return Vec::new() };
        let mut tally = Tally::default();
        let mut said = Vec::new();
        for (i, arm) in arms.iter().enumerate() {
            let Some(expected) = arm.arm.x.and_then(|x| line(&theory.points, x)) else { continue };
            tally.points += 1;
            let Some(mean) = arm.metric.filter(|_| self.complete(i)) else {
                let (k, n) = (self.values(i).len(), self.seeds.len());
                said.push(format!("{}: undecided, {k} of {n} seeds are finished.", arm.arm.name));
                continue;
            };
            if expected == 0.0 {
                said.push(format!("{}: {name} says 0 there, which nothing is a percentage of.", arm.arm.name));
                continue;
            }
            let apart = (mean.mean / expected - 1.0) * 100.0;
            let within = apart.abs() <= percent;
            tally.add(within);
            let word = if within { "within" } else { "NOT within" };
            said.push(format!(
                "{}: {:.4} where {name} says {expected:.4}, {apart:+.2} %, {word} {percent} %.",
                arm.arm.name, mean.mean
            ));
        }
        let all = match tally.verdict() {
            Some(true) => format!("{name} holds within {percent} % at {} points.", tally.points),
            Some(false) if tally.is_complete() => {
                format!("{name} does not hold within {percent} % at {} points.", tally.points)
            }
            Some(false) => format!("{name} does not hold within {percent} %; {} are finished.", tally.of("points")),
            None => format!("Undecided whether {name} holds within {percent} %: {} are finished.", tally.of("points")),
        };
        said.insert(0, all);
        said
    }
}

/// A share in percent, without the noise of its last bits.
fn percent(share: f64) -> f64 {
    (share * 1e6).round() / 1e4
}

/// How many points of a rule that speaks of all of them are judged, and how.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    points: usize,
    judged: usize,
    missed: usize,
}

impl Tally {
    fn add(&mut self, holds: bool) {
        self.judged += 1;
        self.missed += usize::from(!holds);
    }

    fn is_complete(self) -> bool {
        self.judged == self.points && self.points > 0
    }

    /// Holds where every point does; does not where one does not, whatever the others will say; nobody knows otherwise.
    fn verdict(self) -> Option<bool> {
        if self.missed > 0 { Some(false) } else { self.is_complete().then_some(true) }
    }

    fn of(self, what: &str) -> String {
        format!("{} of {} {what}", self.judged, self.points)
    }
}

/// The height of a broken line at `x`; `None` outside of it.
pub(crate) fn line(points: &[(f64, f64)], x: f64) -> Option<f64> {
    let pair = points.windows(2).find(|pair| pair[0].0 <= x && x <= pair[1].0)?;
    let [(x0, y0), (x1, y1)] = pair else { return None };
    Some(y0 + (y1 - y0) * (x - x0) / (x1 - x0))
}

#[cfg(test)]
mod tests;
