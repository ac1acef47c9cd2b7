//! The studies under `experiments/`: what is stored there follows from the figures of their runs.

use std::path::{Path, PathBuf};

use super::*;
use crate::expand::Expanded;
use crate::experiment::{Better, Experiment};
use crate::page::page;
use crate::report::{csv, markdown};
use crate::study::RunResult;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../experiments")
}

/// Cells of a line of CSV.
fn cells(line: &str) -> Vec<String> {
    let (mut cells, mut quoted) = (vec![String::new()], false);
    for part in line.split('"') {
        if quoted {
            cells.last_mut().unwrap().push_str(part);
        } else {
            for (i, text) in part.split(',').enumerate() {
                if i > 0 {
                    cells.push(String::new());
                }
                cells.last_mut().unwrap().push_str(text);
            }
        }
        quoted = !quoted;
    }
    cells
}

/// The study of an experiment file and a table of results: all but curves and spectra.
fn study(dir: &Path) -> Study {
    let expanded = Expanded::new(Experiment::load(&dir.join("experiment.toml")).unwrap()).unwrap();
    let text = std::fs::read_to_string(dir.join("results.csv")).unwrap();
    let mut lines = text.lines();
    let header = cells(lines.next().unwrap());
    let runs = lines.map(|line| {
        let cells = cells(line);
        let of = |name: &str| &cells[header.iter().position(|column| column == name).unwrap()];
        let is_metric =
            |name: &&String| !name.starts_with("model.") && header.iter().position(|h| h == *name) > Some(7);
        let figures = header.iter().filter(is_metric).filter_map(|name| Some((name.clone(), of(name).parse().ok()?)));
        RunResult {
            arm: expanded.arms.iter().position(|arm| arm.name == *of("arm")).unwrap(),
            seed: of("seed").parse().unwrap(),
            metrics: figures.collect(),
            curve: Vec::new(),
            spectra: Vec::new(),
        }
    });
    let runs = runs.collect();
    let Experiment { name, question, rule, metric, better, x, theory, seeds, .. } = expanded.experiment;
    Study {
        name,
        question,
        rule,
        baseline: expanded.baseline,
        metric,
        lower_is_better: better == Better::Lower,
        x,
        theory,
        arms: expanded.arms,
        runs,
        seeds,
        objections: Vec::new(),
        notes: Vec::new(),
    }
}

/// The parts of a page by their titles, the first without one.
fn parts(page: &str) -> BTreeMap<String, String> {
    let parts = page.trim_end().trim_end_matches("</html>").trim_end().trim_end_matches("</body>");
    let mut found = BTreeMap::new();
    for (i, part) in parts.split("<h2>").enumerate() {
        let title = if i == 0 { "" } else { part.split("</h2>").next().unwrap() };
        found.insert(title.to_string(), part.to_string());
    }
    found
}

#[test]
fn the_stored_reports_are_what_the_stored_results_say() {
    // Run files name their datasets from the project's root on.
    std::env::set_current_dir(folder().join("..")).unwrap();
    let mut seen = 0;
    for entry in std::fs::read_dir(folder()).unwrap() {
        let dir = entry.unwrap().path();
        if !dir.join("experiment.toml").is_file() {
            continue;
        }
        seen += 1;
        let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
        let study = study(&dir);
        let summary = study.summary();
        assert_eq!(csv(&study), read("results.csv"), "{}", dir.display());
        assert_eq!(markdown(&study, &summary), read("table.md"), "{}", dir.display());
        let (anew, stored) = (parts(&page(&study, &summary)), parts(&read("report.html")));
        for (title, part) in anew {
            assert_eq!(stored.get(&title).map(String::as_str), Some(part.as_str()), "{} {title}", dir.display());
        }
    }
    assert!(seen >= 7, "{seen}");
}
