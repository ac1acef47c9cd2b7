//! A page about one training run, or about several, one upon the other: what `lowkey report` writes, and every `lowkey train` at its end.
//!
//! The page is made from the runs' folders alone, also while they go on. It needs nothing beside it and asks for nothing: its policy
//! forbids the browser to. A script adds the figures under the pointer; all else is there without one, and in print.

mod chart;
mod charts;
mod config;
mod scale;
mod tables;
mod texts;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use lowkey_files::mark::{Kind, Mark};
use lowkey_train::run_dir::{Curves, REPORT, RunDir, Samples, Standing, State};
use serde_json::json;

use crate::error::{Error, Result};
use crate::html::escaped;
use scale::X;

const STYLE: &str = include_str!("run_page/style.css");
const SCRIPT: &str = include_str!("run_page/script.js");

/// The script's SHA-256: the page's policy has the browser run nothing else. A test compares it.
const SCRIPT_HASH: &str = "sha256-29U/gq/VsQbabg9dqFrQIPIzKzZkk8hoVi6UZmfG2uc=";

/// By this lowkey knows a page as its own.
const OURS: &str = "<meta name=\"generator\" content=\"lowkey\">";

/// Runs that a page holds.
pub const MOST_RUNS: usize = 14;

/// A run as the page tells of it.
struct Told {
    /// Its name, or where it is if others are called the same.
    label: String,
    run: RunDir,
    curves: Curves,
    samples: Samples,
    standing: Standing,
    /// Floating-point operations of training on a token, as a mean over the run.
    flops_per_token: Option<f64>,
}

/// Writes the page about the runs in `runs`, whole or not at all. `to`: its file; without one `report.html` in the run's folder, or
/// beside the first of several, where nothing but a page of lowkey's is replaced. Returns where it is.
///
/// # Errors
/// As [`page`]; [`Error::File`] where something else bears the name, [`Error::Files`] where it cannot be written.
pub fn write(runs: &[PathBuf], to: Option<&Path>) -> Result<PathBuf> {
    let page = page(runs)?;
    if let Some(to) = to {
        lowkey_files::write::output(to, page.as_bytes())?;
        return Ok(to.to_path_buf());
    }
    let [first, others @ ..] = runs else { return Err(Error::file(REPORT, "there is no run to tell of")) };
    let dir = match first.parent() {
        _ if others.is_empty() => first.as_path(),
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let path = dir.join(REPORT);
    if path.symlink_metadata().is_ok() && !is_ours(&path) {
        let why = "is there, and is no page of lowkey's: it would be replaced; move it away, or say where with --out";
        return Err(Error::file(path, why));
    }
    if others.is_empty() {
        // A run of a lowkey that did not write pages would take this one for somebody else's.
        Mark::add(first, Kind::Run, REPORT)?;
    }
    lowkey_files::write(&path, page.as_bytes())?;
    Ok(path)
}

fn is_ours(path: &Path) -> bool {
    use std::io::Read;
    let mut head = Vec::new();
    let read = lowkey_files::open(path).map(|file| file.take(1 << 10).read_to_end(&mut head));
    let is_file = path.symlink_metadata().is_ok_and(|found| found.is_file());
    is_file && matches!(read, Ok(Ok(_))) && String::from_utf8_lossy(&head).contains(OURS)
}

/// The page about the runs in `runs`, one to [`MOST_RUNS`].
///
/// # Errors
/// [`Error::Train`] for a folder that holds no run, or whose figures cannot be read; [`Error::File`] for too many.
pub fn page(runs: &[PathBuf]) -> Result<String> {
    if runs.is_empty() || runs.len() > MOST_RUNS {
        let why = format!("a page tells of 1 to {MOST_RUNS} runs, not of {}", runs.len());
        return Err(Error::file(runs.first().cloned().unwrap_or_default(), why));
    }
    let mut told = runs.iter().map(|path| tell(path)).collect::<Result<Vec<_>>>()?;
    let names: Vec<String> = told.iter().map(|told| told.run.name.clone()).collect();
    for told in &mut told {
        if names.iter().filter(|name| **name == told.run.name).count() > 1 {
            told.label = told.run.path.display().to_string();
        }
    }
    Ok(html(&told))
}

fn tell(path: &Path) -> Result<Told> {
    let run = RunDir::open(path)?;
    let (curves, samples, standing) = (run.curves()?, run.samples()?, Standing::of(&run));
    let flops_per_token = run.planned("train_flops_per_token");
    Ok(Told { label: run.name.clone(), run, curves, samples, standing, flops_per_token })
}

fn html(told: &[Told]) -> String {
    let (heading, title) = match told {
        [one] => (one.label.clone(), one.label.clone()),
        several => {
            let names: Vec<&str> = several.iter().map(|told| told.label.as_str()).collect();
            (format!("{} runs", several.len()), names.join(", "))
        }
    };
    let (heading, title) = (escaped(&heading), escaped(&title));
    let policy = format!(
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src '{SCRIPT_HASH}'; base-uri 'none'; form-action 'none'"
    );
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\">\n{OURS}\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{policy}\">\n\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n<link rel=\"icon\" href=\"data:,\">\n\
         <title>{title}</title>\n<style>\n{STYLE}</style></head>\n<body>\n<h1>{heading}</h1>\n"
    );
    out += &stand(told);
    out += &tables::summary(told);
    let groups = charts::groups(told);
    if !groups.is_empty() {
        out += &bar(told);
    }
    let mut figures = Vec::new();
    for (title, note, charts) in groups {
        out += &format!("<h2>{}</h2>\n", escaped(title));
        if !note.is_empty() {
            out += &format!("<p class=\"note\">{}</p>\n", escaped(note));
        }
        out += "<div class=\"grid\">\n";
        for chart in charts {
            out += &chart.html(figures.len());
            figures.push(chart.figures(figures.len()));
        }
        out += "</div>\n";
    }
    out += &tables::evaluations(told);
    out += &texts::section(told);
    out += &config::sections(told);
    out += &tables::cost(told);
    out += &reading(told);
    // In JSON a `<` stands in strings alone, where it may be written as its number, so that nothing in it ends the element.
    let figures = json!({ "charts": figures }).to_string().replace('<', "\\u003c");
    out + &format!(
        "<script type=\"application/json\" id=\"figures\">{figures}</script>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
}

/// How the runs stand, in a sentence each.
fn stand(told: &[Told]) -> String {
    let sentence = |told: &Told| {
        let Standing { step, steps, left_s, .. } = told.standing;
        let number = |step: Option<u64>| step.map_or_else(|| "?".into(), |step| step.to_string());
        let steps = format!("step {} of {}", number(step), number(steps));
        let left = left_s.map_or_else(String::new, |left| format!(", about {} left", crate::units::duration(left)));
        let text = match told.run.state {
            State::Finished => format!("finished: {steps}"),
            State::Running => format!("running: {steps}{left}; this page shows it as it was when the page was made"),
            State::Stopped => format!("stopped: {steps}{left} if it goes on"),
            State::Failed => format!("failed: {steps}; {}", told.run.why.as_deref().unwrap_or("it is not known why")),
        };
        let name = if told.label == told.run.name { String::new() } else { format!(" ({})", told.run.name) };
        format!(
            "<p><strong>{}</strong>{}, {}.</p>\n",
            escaped(&told.label),
            escaped(&name),
            escaped(text.trim_end_matches('.'))
        )
    };
    format!("<div class=\"stand\">{}</div>\n", told.iter().map(sentence).collect::<String>())
}

/// The legend, and the choice of what curves are drawn over.
fn bar(told: &[Told]) -> String {
    let keys: String = told.iter().enumerate().map(|(i, told)| chart::key(&told.label, i)).collect();
    let choices: String = X::ALL
        .iter()
        .map(|x| {
            let checked = if *x == X::Tokens { " checked" } else { "" };
            let (name, label) = (x.name(), x.label());
            format!(
                "<label><input type=\"radio\" name=\"x\" id=\"x-{name}\" value=\"{name}\"{checked}> {label}</label>"
            )
        })
        .collect();
    format!("<div class=\"bar\"><fieldset><legend>Curves over</legend>{choices}</fieldset><div>{keys}</div></div>\n")
}

/// What a reader has to know of how the page was made.
fn reading(told: &[Told]) -> String {
    let mut items = vec![
        "Figures are those of metrics.jsonl. Of a step that was written more than once the newest line counts.".to_string(),
        "FLOPs are tokens times the operations of training on one, as a mean over the run, by the plan in environment.json."
            .to_string(),
    ];
    for Told { label, curves, samples, .. } in told {
        let (bytes, read) = curves.bytes;
        if read < bytes {
            items.push(format!(
                "{label}: metrics.jsonl has {bytes} bytes; {read} of them were read, in parts from its beginning to its end."
            ));
        }
        for (n, what) in [
            (curves.unread, "lines of metrics.jsonl are no steps and were left out"),
            (curves.again, "steps were written more than once"),
            (curves.left_out, "figures were left out, as there are too many kinds of them"),
            (samples.unread, "lines of samples.jsonl are no texts, or of too many prompts, and were left out"),
        ] {
            if n > 0 {
                items.push(format!("{label}: {n} {what}."));
            }
        }
        let thinned: BTreeSet<&str> =
            curves.iter().filter(|(_, _, curve)| curve.thinned).map(|(name, _, _)| name).collect();
        if !thinned.is_empty() {
            items.push(format!(
                "{label}: there are more figures than were held; of these, the lowest and highest of many stretches are left: {}.",
                thinned.into_iter().collect::<Vec<_>>().join(", ")
            ));
        }
    }
    let items: String = items.iter().map(|item| format!("<li>{}</li>\n", escaped(item))).collect();
    format!("<h2>How to read this page</h2>\n<ul class=\"note\">\n{items}</ul>\n")
}

#[cfg(test)]
mod tests;
