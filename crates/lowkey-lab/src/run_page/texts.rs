//! What the models wrote in the course of the runs.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::Told;
use crate::html::{escaped, escaped_lines};

/// Texts of a prompt and a run that a page shows.
const MOST_TEXTS: usize = 6;

/// Characters of a text that a page shows.
const LONGEST: usize = 700;

/// The section; empty where no run wrote anything.
pub(super) fn section(told: &[Told]) -> String {
    let prompts: BTreeSet<&String> = told.iter().flat_map(|told| told.samples.prompts.keys()).collect();
    if prompts.is_empty() {
        return String::new();
    }
    let mut out = String::from("<h2>Samples</h2>\n");
    for prompt in prompts {
        let _ = writeln!(out, "<h3>{}</h3>", escaped(&cut(prompt, 80)));
        for told in told {
            let Some(texts) = told.samples.prompts.get(prompt) else { continue };
            let all: Vec<(&u64, &String)> = texts.iter().collect();
            let most = MOST_TEXTS.min(all.len());
            let shown: BTreeSet<usize> = (0..most).map(|i| i * (all.len() - 1) / (most - 1).max(1)).collect();
            let of = if shown.len() < all.len() {
                format!(" ({} of {} texts)", shown.len(), all.len())
            } else {
                String::new()
            };
            let _ = writeln!(out, "<p class=\"note\">{}{of}</p>\n<div class=\"texts\">", escaped(&told.label));
            for i in shown {
                let (step, text) = all[i];
                let (begun, text) = (escaped_lines(prompt), escaped_lines(&cut(text, LONGEST)));
                let between = if told.samples.messages.contains(prompt) { "</p><p>" } else { "" };
                let _ =
                    writeln!(out, "<div class=\"text\"><b>step {step}</b><p><q>{begun}</q>{between}{text}</p></div>");
            }
            out += "</div>\n";
        }
    }
    out
}

fn cut(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_string(),
    }
}
