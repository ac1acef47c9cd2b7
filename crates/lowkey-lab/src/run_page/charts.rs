//! Which charts a page has, by what its runs measured.

use std::collections::BTreeSet;

use lowkey_train::run_dir::Curve;

use super::Told;
use super::chart::{Chart, Drawn};

/// Parts of a figure, such as classes or layers, that a chart shows.
const MOST_PARTS: usize = 14;

/// Figures of unknown meaning that are shown.
const MOST_OTHERS: usize = 24;

/// A figure that this page knows.
struct Known {
    name: &'static str,
    title: &'static str,
    unit: &'static str,
    log: bool,
}

const fn known(name: &'static str, title: &'static str, unit: &'static str, log: bool) -> Known {
    Known { name, title, unit, log }
}

const LOSS: [Known; 7] = [
    known("train_loss", "Training loss", "nats per token", true),
    known("val_loss", "Held-out loss", "nats per token", true),
    known("ema_val_loss", "Held-out loss of the averaged weights", "nats per token", true),
    known("bits_per_byte", "Held-out bits per byte", "", true),
    known("gap", "Gap to the true entropy", "nats per token", true),
    known("accuracy", "Held-out accuracy", "share of answers", false),
    known("mse", "Held-out squared error", "per number; an answer of 0 has 1", true),
];

const REWARDS: [Known; 4] = [
    known("rewards/chosen", "Reward of chosen answers", "rewards/chosen", false),
    known("rewards/rejected", "Reward of rejected answers", "rewards/rejected", false),
    known("rewards/margins", "Margin between the two", "rewards/margins", false),
    known("rewards/accuracies", "Pairs in the right order", "rewards/accuracies", false),
];

const OPTIMISER: [Known; 2] =
    [known("lr", "Learning rate", "", false), known("grad_norm", "Gradient norm", "before clipping", true)];

const HEALTH: [Known; 1] = [known("max_attention_logit", "Largest attention logit", "", false)];

const SPEED: [Known; 2] = [
    known("tokens_per_s", "Tokens per second", "", false),
    known("mfu", "Model FLOPs utilisation", "share of the measured rate of matrix products", false),
];

/// Figures with parts that this page knows: what a part is, and the chart's title and unit.
const PARTED: [(&str, &str, &str, &str, bool); 3] = [
    ("class_gap", "class", "Gap by class of token", "nats per token", false),
    ("rank_loss", "rank", "Held-out loss at narrower ranks", "nats per token", true),
    ("latent_effective_rank", "layer", "Effective rank of the latents", "directions", false),
];

type Group = (&'static str, &'static str, Vec<Chart>);

/// The charts by group: its title, a note, and its charts.
pub(super) fn groups(told: &[Told]) -> Vec<Group> {
    let of = |known: &[Known]| -> Vec<Chart> { known.iter().filter_map(|known| chart(told, known)).collect() };
    let mut rewards = of(&REWARDS);
    share_heights(&mut rewards, |chart| chart.unit == "rewards/chosen" || chart.unit == "rewards/rejected");
    let groups = vec![
        ("Loss", "", of(&LOSS)),
        ("Preferences", "", rewards),
        ("By class of token", "Nats per token above the true entropy.", parted(told, "class_gap")),
        ("At narrower ranks", "", parted(told, "rank_loss")),
        ("Optimiser", "", of(&OPTIMISER)),
        ("Attention", "", [of(&HEALTH), parted(told, "latent_effective_rank")].into_iter().flatten().collect()),
        ("Speed", "", of(&SPEED)),
        ("Also measured", "", others(told)),
    ];
    groups.into_iter().filter(|(_, _, charts)| !charts.is_empty()).collect()
}

fn drawn(told: &Told, name: &str, look: usize, curve: Option<&Curve>) -> Option<Drawn> {
    Drawn::new(name, look, curve?, told.flops_per_token)
}

/// The chart of one figure, a curve for each run.
fn chart(told: &[Told], known: &Known) -> Option<Chart> {
    let curves = told.iter().enumerate().filter_map(|(i, t)| drawn(t, &t.label, i, t.curves.get(known.name)));
    let curves: Vec<Drawn> = curves.collect();
    // The loss of a task of vectors is no entropy.
    let error = known.unit == "nats per token" && told.iter().any(|told| told.curves.get("mse").is_some());
    let unit = if error { "nats per token, or squared error per number" } else { known.unit };
    let missing: Vec<&str> = told
        .iter()
        .filter(|told| told.curves.get(known.name).is_none_or(Curve::is_empty))
        .map(|told| told.label.as_str())
        .collect();
    let note = if missing.is_empty() { String::new() } else { format!("Not measured: {}.", missing.join(", ")) };
    (!curves.is_empty()).then(|| Chart {
        title: known.title.into(),
        unit: unit.into(),
        log: known.log,
        also: Vec::new(),
        own_legend: false,
        curves,
        note,
    })
}

/// A chart for each run, of a figure that has parts.
fn parted(told: &[Told], name: &str) -> Vec<Chart> {
    let known = PARTED.iter().find(|(known, ..)| *known == name);
    let (_, part, title, unit, log) = known.copied().unwrap_or(("", "", "", "", false));
    let title = if title.is_empty() { name } else { title };
    let charts = told.iter().filter_map(|t| {
        let mut parts: Vec<(&str, &Curve)> = t.curves.parts(name).filter(|(_, curve)| !curve.is_empty()).collect();
        // Layers and ranks are numbers, and 10 comes after 9.
        parts.sort_by_key(|(part, _)| (part.parse::<u64>().unwrap_or(u64::MAX), (*part).to_string()));
        let all = parts.len();
        if all > MOST_PARTS {
            let shown: BTreeSet<usize> = (0..MOST_PARTS).map(|i| i * (all - 1) / (MOST_PARTS - 1)).collect();
            let mut i = 0;
            parts.retain(|_| {
                i += 1;
                shown.contains(&(i - 1))
            });
        }
        let name_of = |name: &str| {
            if name.parse::<u64>().is_ok() && !part.is_empty() { format!("{part} {name}") } else { name.into() }
        };
        let curves: Vec<Drawn> = parts
            .iter()
            .enumerate()
            .filter_map(|(look, (part, curve))| drawn(t, &name_of(part), look, Some(curve)))
            .collect();
        let note = if all > parts.len() { format!("{} of {all} are shown.", parts.len()) } else { String::new() };
        let title = if told.len() > 1 { format!("{title}: {}", t.label) } else { title.to_string() };
        (!curves.is_empty()).then(|| Chart {
            title,
            unit: unit.into(),
            log,
            also: Vec::new(),
            own_legend: true,
            curves,
            note,
        })
    });
    let mut charts: Vec<Chart> = charts.collect();
    share_heights(&mut charts, |_| true);
    charts
}

/// Gives charts that are to be compared the same heights.
fn share_heights(charts: &mut [Chart], which: impl Fn(&Chart) -> bool) {
    let all: Vec<f64> =
        charts.iter().filter(|chart| which(chart)).flat_map(|chart| &chart.curves).flat_map(Drawn::heights).collect();
    let ends =
        [all.iter().copied().fold(f64::INFINITY, f64::min), all.iter().copied().fold(f64::NEG_INFINITY, f64::max)];
    charts.iter_mut().filter(|chart| which(chart)).for_each(|chart| chart.also = ends.to_vec());
}

/// What else is in the runs' metrics.
fn others(told: &[Told]) -> Vec<Chart> {
    let known: BTreeSet<&str> = [&LOSS[..], &REWARDS, &OPTIMISER, &HEALTH, &SPEED]
        .into_iter()
        .flatten()
        .map(|known| known.name)
        .chain(PARTED.iter().map(|(name, ..)| *name))
        .collect();
    let mut found: BTreeSet<(&str, bool)> = BTreeSet::new();
    for (name, part, _) in told.iter().flat_map(|told| told.curves.iter()) {
        if !known.contains(name) {
            found.insert((name, !part.is_empty()));
        }
    }
    let charts = found.into_iter().flat_map(|(name, has_parts)| {
        if has_parts {
            return parted(told, name);
        }
        let curves: Vec<Drawn> =
            told.iter().enumerate().filter_map(|(i, t)| drawn(t, &t.label, i, t.curves.get(name))).collect();
        let chart = Chart {
            title: name.into(),
            unit: String::new(),
            log: false,
            also: Vec::new(),
            own_legend: false,
            curves,
            note: String::new(),
        };
        if chart.curves.is_empty() { Vec::new() } else { vec![chart] }
    });
    charts.take(MOST_OTHERS).collect()
}
