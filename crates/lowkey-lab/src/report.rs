//! The three reports of a study: a table for programs, one for people, and a page.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;

use lowkey_files as files;

use crate::error::{Error, Result};
use crate::markup;
use crate::page::page;
use crate::stats::Mean;
use crate::study::Study;
use crate::summary::{ArmSummary, Summary};

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

pub(crate) fn csv(study: &Study) -> String {
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

pub(crate) fn markdown(study: &Study, summary: &Summary) -> String {
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
