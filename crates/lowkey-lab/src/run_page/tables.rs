//! The tables of a page: where the runs stand, what evaluations found, and what the runs cost.

use std::collections::BTreeSet;

use lowkey_train::run_dir::{Point, Saved};
use serde_json::Value;

use super::Told;
use crate::html::{escaped, table};
use crate::units::{bytes, count, duration};

/// Evaluations of a run that the table has.
const MOST_EVALUATIONS: usize = 24;

fn four(x: f64) -> String {
    format!("{x:.4}")
}

/// A table of facts with a column for each run; facts that no run has are left out.
fn facts(told: &[Told], rows: Vec<(String, Vec<Option<String>>)>) -> String {
    let rows = rows.into_iter().filter(|(_, cells)| cells.iter().any(Option::is_some));
    let rows = rows.map(|(name, cells)| {
        std::iter::once(name).chain(cells.into_iter().map(|cell| cell.unwrap_or_else(|| "—".into()))).collect()
    });
    let header: Vec<&str> = std::iter::once("").chain(told.iter().map(|told| told.label.as_str())).collect();
    table(&header, rows)
}

/// A row of such a table.
fn row(
    name: impl Into<String>,
    told: &[Told],
    cell: impl Fn(&Told) -> Option<String>,
) -> (String, Vec<Option<String>>) {
    (name.into(), told.iter().map(cell).collect())
}

/// The last figures of each run.
pub(super) fn summary(told: &[Told]) -> String {
    let last = |name: &'static str| move |told: &Told| told.curves.get(name)?.last().map(|point| four(point.value));
    let best = |told: &Told| {
        let best = told.curves.get("val_loss")?.points().min_by(|a, b| a.value.total_cmp(&b.value))?;
        Some(format!("{} at step {}", four(best.value), best.step))
    };
    let whole = |key: &'static str| move |told: &Told| told.run.evaluation.get(key).and_then(Value::as_f64).map(four);
    let mut rows = vec![
        row("state", told, |t| Some(t.run.state.name().into())),
        row("steps", told, |t| {
            let steps = t.standing.steps.map_or_else(String::new, |steps| format!(" of {steps}"));
            t.standing.step.map(|step| format!("{step}{steps}"))
        }),
        row("tokens", told, |t| Some(count(tokens(t)?))),
        row("FLOPs", told, |t| Some(count(tokens(t)? * t.flops_per_token?))),
        row("time", told, |t| Some(duration(seconds(t)?))),
        row("parameters", told, |t| Some(count(t.run.planned("parameters")?))),
        row("training loss", told, last("train_loss")),
        row("held-out loss", told, last("val_loss")),
        row("lowest held-out loss", told, best),
        row("bits per byte", told, last("bits_per_byte")),
        row("gap to the true entropy", told, last("gap")),
        row("accuracy", told, last("accuracy")),
        row("squared error", told, last("mse")),
        row("loss on the whole held-out split", told, whole("loss")),
        row("gap on the whole held-out split", told, whole("gap")),
        row("accuracy on the whole held-out split", told, whole("accuracy")),
    ];
    for (key, name) in [
        ("rewards/chosen", "reward of chosen answers"),
        ("rewards/rejected", "reward of rejected answers"),
        ("rewards/margins", "margin between the two"),
        ("rewards/accuracies", "pairs in the right order"),
    ] {
        rows.push(row(name, told, last(key)));
    }
    facts(told, rows)
}

fn tokens(told: &Told) -> Option<f64> {
    told.curves.newest.map(|(_, tokens, _)| tokens).filter(|tokens| tokens.is_finite())
}

fn seconds(told: &Told) -> Option<f64> {
    told.curves.newest.map(|(_, _, seconds)| seconds).filter(|seconds| seconds.is_finite())
}

/// What each evaluation found.
pub(super) fn evaluations(told: &[Told]) -> String {
    const COLUMNS: [(&str, &str); 7] = [
        ("train_loss", "training loss"),
        ("val_loss", "held-out loss"),
        ("bits_per_byte", "bits/byte"),
        ("gap", "gap"),
        ("accuracy", "accuracy"),
        ("mse", "squared error"),
        ("rewards/margins", "margin"),
    ];
    let mut out = String::new();
    for told in told {
        let Some(held) = told.curves.get("val_loss").filter(|held| !held.is_empty()) else { continue };
        let all: Vec<&Point> = held.points().collect();
        let most = MOST_EVALUATIONS.min(all.len());
        let shown: BTreeSet<usize> = (0..most).map(|i| i * (all.len() - 1) / (most - 1).max(1)).collect();
        let columns: Vec<_> =
            COLUMNS.iter().filter(|(key, _)| told.curves.get(key).is_some_and(|curve| !curve.is_empty())).collect();
        let header: Vec<&str> =
            ["step", "tokens", "time"].into_iter().chain(columns.iter().map(|(_, title)| *title)).collect();
        let rows = shown.iter().map(|i| {
            let at = all[*i];
            let finite = |x: f64, show: fn(f64) -> String| if x.is_finite() { show(x) } else { "—".into() };
            let figure = |key: &str| told.curves.get(key).and_then(|curve| curve.at(at.step));
            [at.step.to_string(), finite(at.tokens, |x| format!("{x}")), finite(at.time_s, duration)]
                .into_iter()
                .chain(columns.iter().map(|(key, _)| figure(key).map_or_else(|| "—".into(), |point| four(point.value))))
                .collect()
        });
        out += &format!("<h3>{}</h3>\n{}", escaped(&told.label), table(&header, rows));
        if shown.len() < all.len() {
            out += &format!(
                "<p class=\"note\">{} of {} evaluations, from the first to the last.</p>\n",
                shown.len(),
                all.len()
            );
        }
    }
    if out.is_empty() { out } else { format!("<h2>Evaluations</h2>\n{out}") }
}

/// What was planned, and what it took.
pub(super) fn cost(told: &[Told]) -> String {
    let planned = |key: &'static str, show: fn(f64) -> String| move |told: &Told| told.run.planned(key).map(show);
    let size = |x: f64| bytes(x as usize);
    let devices = |told: &Told| {
        let several = told.run.environment.get("devices").and_then(Value::as_array).map_or(0, Vec::len);
        several.max(1) as f64
    };
    let per_s = |told: &Told| Some(tokens(told)? / seconds(told)?).filter(|rate| rate.is_finite());
    let saved = |told: &Told| -> Option<(usize, u64)> {
        let saved = told.run.checkpoints();
        (!saved.is_empty()).then(|| (saved.len(), saved.iter().map(|saved| saved.bytes).sum()))
    };
    let best = |told: &Told| {
        told.run.checkpoints().iter().find(|saved| saved.best).map(|Saved { step, .. }| format!("step {step}"))
    };
    let rows = vec![
        row("operations of training on a token", told, planned("train_flops_per_token", |x| count(x) + "FLOP")),
        row("operations, planned", told, planned("flops", |x| count(x) + "FLOP")),
        row("operations so far", told, |t| Some(count(tokens(t)? * t.flops_per_token?) + "FLOP")),
        row("time, estimated before", told, planned("seconds", duration)),
        row("time so far, evaluations and checkpoints included", told, |t| Some(duration(seconds(t)?))),
        row("device hours so far", told, |t| Some(format!("{:.3}", seconds(t)? * devices(t) / 3600.0))),
        row("tokens per second over all of it", told, |t| Some(count(per_s(t)?))),
        row("operations per second over all of it", told, |t| Some(count(per_s(t)? * t.flops_per_token?) + "FLOP/s")),
        row("rate of matrix products, measured", told, planned("matmul_flops_per_s", |x| count(x) + "FLOP/s")),
        row("memory at the peak, estimated before", told, planned("train_bytes", size)),
        row("cache per token in bf16", told, planned("cache_bytes_latent", size)),
        row("the same with full keys and values", told, planned("cache_bytes_expanded", size)),
        row("checkpoints that lie here", told, |t| saved(t).map(|(n, _)| n.to_string())),
        row("their size", told, |t| saved(t).map(|(_, size)| bytes(size as usize))),
        row("best checkpoint", told, best),
    ];
    format!("<h2>Cost</h2>\n{}", facts(told, rows))
}
