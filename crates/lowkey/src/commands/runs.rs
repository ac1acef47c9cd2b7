//! `lowkey runs`.

use std::path::{Path, PathBuf};

use lowkey_files::printable;
use lowkey_train::run_dir::{RunDir, Standing, State};
use serde_json::json;

use crate::cli::RunsArguments;
use crate::output::{complain, duration, quoted, say, say_json, table};

/// Columns of the longest name that the table has.
const LONGEST_NAME: usize = 32;

/// A run as the list tells of it.
struct Listed {
    /// Its folder as seen from the one that was looked below.
    name: String,
    run: RunDir,
    standing: Standing,
}

impl Listed {
    /// What goes on with the run; nothing for one that goes on or has come to its end.
    fn command(&self) -> Option<String> {
        let path = &self.run.path;
        let usual = Path::new("runs").join(&self.run.name);
        let word = |path: &Path| quoted(&path.display().to_string());
        let out = if *path == usual { String::new() } else { format!(" --out {}", word(path)) };
        let goes_on = matches!(self.run.state, State::Stopped | State::Failed);
        goes_on.then(|| format!("lowkey train {}{out} --resume", word(&path.join("run.toml"))))
    }
}

pub(crate) fn runs(arguments: &RunsArguments) -> anyhow::Result<()> {
    let dir = &arguments.dir;
    let mut listed = Vec::new();
    for path in RunDir::list(dir)? {
        match RunDir::open(&path) {
            Ok(run) => {
                let standing = Standing::of(&run);
                listed.push(Listed { name: name(dir, &path), run, standing });
            }
            Err(e) => complain(&format!("note: {e}")),
        }
    }
    if arguments.json {
        let runs = listed.iter().map(|run| {
            let Standing { step, steps, train_loss, val_loss, time_s, left_s } = run.standing;
            json!({
                "path": run.run.path,
                "name": run.run.name,
                "state": run.run.state,
                "why": run.run.why,
                "step": step,
                "steps": steps,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "time_s": time_s,
                "left_s": left_s,
                "command": run.command(),
            })
        });
        return say_json(&runs.collect::<Vec<_>>());
    }
    if listed.is_empty() {
        say(&format!("no runs below {}", dir.display()));
        return Ok(());
    }
    let rows: Vec<Vec<String>> = listed.iter().map(row).collect();
    say(&table(&["run", "state", "step", "loss", "held-out", "left"], &rows));
    for Listed { name, run, .. } in listed.iter().filter(|listed| listed.run.why.is_some()) {
        say(&format!("\n{name} failed: {}", printable(run.why.as_deref().unwrap_or_default())));
    }
    let commands: Vec<String> =
        listed.iter().filter_map(Listed::command).map(|command| format!("  {command}")).collect();
    if !commands.is_empty() {
        say(&format!("\nTo go on:\n{}", commands.join("\n")));
    }
    Ok(())
}

fn name(dir: &Path, path: &Path) -> String {
    let below = path.strip_prefix(dir).map(Path::to_path_buf).unwrap_or_default();
    let name = if below == PathBuf::new() { path } else { &below };
    printable(&name.to_string_lossy()).into_owned()
}

fn row(listed: &Listed) -> Vec<String> {
    let Standing { step, steps, train_loss, val_loss, left_s, .. } = listed.standing;
    let number = |n: Option<u64>| n.map_or_else(|| "?".into(), |n| n.to_string());
    let loss = |x: Option<f64>| x.map_or_else(|| "—".into(), |x| short(&format!("{x:.4}"), 10));
    let left = left_s.filter(|_| listed.run.state != State::Finished).map_or_else(|| "—".into(), duration);
    vec![
        short(&listed.name, LONGEST_NAME),
        listed.run.state.name().into(),
        short(&format!("{}/{}", number(step), number(steps)), 15),
        loss(train_loss),
        loss(val_loss),
        short(&left, 12),
    ]
}

/// The end of a text, where the whole does not fit.
fn short(text: &str, most: usize) -> String {
    let length = text.chars().count();
    if length <= most {
        return text.to_string();
    }
    std::iter::once('…').chain(text.chars().skip(length + 1 - most)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_long_name_is_what_tells_it_from_others() {
        assert_eq!(short("study/arm/seed-1", 8), "…/seed-1");
        assert_eq!(short("abc", 3), "abc");
    }
}
