//! `lowkey lab`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use burn::tensor::Device;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use lowkey_files::{printable, printable_lines};
use lowkey_kernels::Precision;
use lowkey_lab::{Event, Expanded, Experiment, Run, SweepOptions, sweep};
use lowkey_train::{plan::EXPECTED_MFU, ranks::Ranks, workers::matmul_ceiling};
use serde_json::json;

use super::{WrongUse, ranks};
use crate::cli::{LabCommand, LabReportArguments, LabRunArguments};
use crate::interrupt::Interrupt;
use crate::output::{complain_all_the_same, count, duration, pairs, say, say_json, table};
use crate::progress::Measuring;

pub(crate) fn lab(command: LabCommand) -> anyhow::Result<ExitCode> {
    match command {
        LabCommand::Run(arguments) => {
            let ranks = ranks::join()?;
            ranks::part(&ranks, run(&ranks, &arguments))
        }
        LabCommand::Report(arguments) => report(&arguments).map(|()| ExitCode::SUCCESS),
    }
}

/// Largest experiment file that is read.
const LARGEST: u64 = 1 << 20;

fn out(experiment: &Experiment, asked: Option<&PathBuf>) -> PathBuf {
    asked.cloned().unwrap_or_else(|| Path::new("runs").join(&experiment.name))
}

fn shard(text: &str) -> anyhow::Result<(usize, usize)> {
    let parts = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    parts.ok_or_else(|| WrongUse(format!("--shard {text}: two numbers, such as 0/8")).into())
}

/// The runs that a process is to take.
struct Opened {
    expanded: Expanded,
    runs: Vec<Run>,
    out: PathBuf,
    shard: Option<(usize, usize)>,
}

/// Reads an experiment and shows what it would cost; nothing where that was all that is asked. Ranks share its runs.
fn open(ranks: &Ranks, arguments: &LabRunArguments) -> anyhow::Result<Option<Opened>> {
    let share = ranks.are_several().then(|| (ranks.rank(), ranks.size()));
    let experiment = Experiment::load(&arguments.experiment)?;
    let out = out(&experiment, arguments.out.as_ref());
    let expanded = Expanded::new(experiment)?;
    let experiment = &expanded.experiment;
    let shard = match (arguments.shard.as_deref(), share) {
        (Some(_), Some((_, of))) => {
            let why = format!("--shard names one part, and {of} ranks share all runs among themselves: leave it out");
            return Err(WrongUse(why).into());
        }
        (asked, share) => asked.map(shard).transpose()?.or(share),
    };
    let runs = expanded.runs(&out, shard)?;
    let seconds = seconds(&expanded, &runs)?;
    if !arguments.json {
        say(&printable_lines(&describe(&expanded, &runs, seconds)));
        if let Some((_, of)) = share {
            say(&format!("  these are the runs of the first of {of} ranks; the others take as many"));
        }
    }
    let budget = &experiment.budget;
    if let Some(most) = budget.runs.filter(|most| runs.len() > *most) {
        return Err(WrongUse(format!("{} runs are more than budget.runs = {most}", runs.len())).into());
    }
    if let Some(most) = budget.hours.filter(|most| seconds > most * 3600.0) {
        let why = format!("about {} is more than budget.hours = {most}; take fewer seeds or arms", duration(seconds));
        return Err(WrongUse(why).into());
    }
    if arguments.dry_run {
        if arguments.json && ranks.is_first() {
            say_json(&json!({ "arms": expanded.arms, "runs": runs.len(), "seconds": seconds }))?;
        }
        return Ok(None);
    }
    Ok(Some(Opened { expanded, runs, out, shard }))
}

fn run(ranks: &Ranks, arguments: &LabRunArguments) -> anyhow::Result<ExitCode> {
    let threads = ranks::compare(ranks, &Device::flex())?;
    if ranks.are_several() {
        let file = ranks::agree(ranks, lowkey_files::read(&arguments.experiment, LARGEST).map_err(Into::into))?;
        ranks::all_have(ranks, "words of the experiment", &file)?;
    }
    let Some(opened) = ranks::agree(ranks, open(ranks, arguments))? else { return Ok(ExitCode::SUCCESS) };
    let interrupt = Interrupt::watch(|| {})?;
    let finished = run_share(ranks, arguments, opened, threads, &interrupt);
    if ranks.are_several() {
        // Runs of another rank may go on for days.
        ranks.be_patient_for(Duration::from_secs(366 * 24 * 3600));
        let why = "not all runs are finished; give the same command again for those that are left";
        let finished = finished.and_then(|finished| if finished { Ok(()) } else { Err(anyhow::anyhow!(why)) });
        return ranks::agree(ranks, finished).map(|()| ExitCode::SUCCESS);
    }
    Ok(match finished? {
        true => ExitCode::SUCCESS,
        false if interrupt.came().load(Ordering::Relaxed) => interrupt.exit_code(),
        false => ExitCode::FAILURE,
    })
}

/// Takes the runs of one process; whether all of them are finished.
fn run_share(
    ranks: &Ranks,
    arguments: &LabRunArguments,
    opened: Opened,
    threads: usize,
    interrupt: &Interrupt,
) -> anyhow::Result<bool> {
    let Opened { expanded, runs, out, shard } = opened;
    let jobs = arguments.jobs.unwrap_or_else(|| (threads / expanded.experiment.threads).max(1));
    let turn = ranks.place() * jobs;
    let options = SweepOptions { out, shard, jobs, turn, environment: super::train::environment() };
    let mut view = View::new(&expanded, &runs, !arguments.json);
    let outcome = sweep(&expanded, &runs, &options, interrupt.came(), &mut |event| view.show(&event));
    view.bar.finish_and_clear();
    let outcome = outcome?;
    let failed: Vec<_> = outcome.failed.iter().map(|(i, why)| json!({ "run": runs[*i].out, "why": why })).collect();
    if arguments.json && ranks.is_first() {
        say_json(&json!({ "finished": outcome.finished, "failed": failed, "left": outcome.left }))?;
    } else {
        for (i, why) in &outcome.failed {
            complain_all_the_same(&printable_lines(&format!("failed: {}: {why}", runs[*i].out.display())));
        }
        let (done, all) = (outcome.finished, runs.len());
        let file = arguments.experiment.to_string_lossy();
        let file = printable(&file);
        match (outcome.left, outcome.failed.len()) {
            (0, 0) => say(&format!("{done} of {all} runs are finished. Next: lowkey lab report {file}")),
            (left, failed) => say(&format!("{done} of {all} runs are finished, {failed} failed, {left} are left")),
        }
    }
    Ok(outcome.finished == runs.len())
}

/// Estimated seconds of the runs, one after the other.
fn seconds(expanded: &Expanded, runs: &[Run]) -> anyhow::Result<f64> {
    let ceiling = matmul_ceiling(expanded.experiment.threads, &Device::flex(), Precision::F32)?;
    let flops: f64 = runs.iter().map(|run| expanded.arms[run.arm].training_flops).sum();
    Ok(flops / (ceiling * EXPECTED_MFU))
}

fn describe(expanded: &Expanded, runs: &[Run], seconds: f64) -> String {
    let rows: Vec<Vec<String>> = expanded
        .arms
        .iter()
        .enumerate()
        .map(|(i, arm)| {
            vec![
                format!("{}{}", arm.name, if i == expanded.baseline { " (baseline)" } else { "" }),
                count(arm.parameters as f64),
                count(arm.train_flops_per_token),
                arm.cache_bytes_per_token.to_string(),
                arm.steps.to_string(),
                arm.mismatch.map_or_else(|| "—".into(), |m| format!("{:+.2} %", m * 100.0)),
            ]
        })
        .collect();
    let header = ["arm", "parameters", "FLOPs/token", "cache B/token", "steps", "mismatch"];
    let facts = [
        ("question", expanded.experiment.question.clone()),
        ("rule", serde_json::to_string(&expanded.experiment.rule).unwrap_or_default()),
        ("runs", format!("{}, about {} one after the other", runs.len(), duration(seconds))),
    ];
    format!("{}\n{}\n{}", expanded.experiment.name, pairs(&facts), table(&header, &rows))
}

/// One bar over the steps of all runs, and a line for each run that ends.
struct View<'a> {
    bar: ProgressBar,
    lines: bool,
    names: Vec<String>,
    /// Steps of each run, taken and in all.
    steps: Vec<(u64, u64)>,
    expanded: &'a Expanded,
}

impl<'a> View<'a> {
    fn new(expanded: &'a Expanded, runs: &[Run], lines: bool) -> Self {
        let steps: Vec<(u64, u64)> = runs.iter().map(|run| (0, expanded.arms[run.arm].steps)).collect();
        let all = steps.iter().map(|(_, all)| all).sum();
        let bar = ProgressBar::with_draw_target(Some(all), ProgressDrawTarget::stderr());
        // The template is a literal; a mistake in it would leave the default style.
        if let Ok(style) = ProgressStyle::with_template("{bar:24} {percent} %, {eta} left  {msg}") {
            bar.set_style(style);
        }
        let names = runs.iter().map(|run| format!("{} seed {}", expanded.arms[run.arm].name, run.seed)).collect();
        Self { bar, lines, names, steps, expanded }
    }

    fn line(&self, text: &str) {
        if self.lines {
            self.bar.suspend(|| say(&printable_lines(text)));
        }
    }

    fn at(&mut self, run: usize, step: u64) {
        self.steps[run].0 = step;
        self.bar.set_position(self.steps.iter().map(|(taken, _)| taken).sum());
    }

    fn show(&mut self, event: &Event) {
        match event {
            Event::Preparing => self.bar.set_message("reading the corpus"),
            Event::Skipped { run } => self.at(*run, self.steps[*run].1),
            Event::Started { run, step, .. } => {
                self.at(*run, *step);
                self.bar.reset_eta();
            }
            Event::Step { run, step, loss } => {
                self.at(*run, *step);
                self.bar.set_message(format!("{} step {step} loss {loss:.4}", self.names[*run]));
            }
            Event::Finished { run, loss } => {
                self.at(*run, self.steps[*run].1);
                self.line(&format!("finished {}: held-out loss {loss:.4}", self.names[*run]));
            }
            Event::Failed { run, why } => {
                self.line(&format!("failed {} of {}: {why}", self.names[*run], self.expanded.experiment.name));
            }
        }
    }
}

fn report(arguments: &LabReportArguments) -> anyhow::Result<()> {
    let experiment = Experiment::load(&arguments.experiment)?;
    let runs = out(&experiment, arguments.runs.as_ref());
    let beside = || match arguments.experiment.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir.to_path_buf(),
        _ => PathBuf::from("."),
    };
    let dir = arguments.out.clone().unwrap_or_else(beside);
    let expanded = Expanded::new(experiment)?;
    let mut study = expanded.collect(&runs)?;
    if !arguments.decode.is_empty() {
        let bar = Measuring::new();
        let (mut done, of) = (0, study.arms.len());
        let mut observe = |arm: &str| {
            bar.show(arm, done, of);
            done += 1;
        };
        expanded.measure_decoding(&mut study, &runs, &arguments.decode, &mut observe)?;
    }
    lowkey_files::write::create_dir(&dir)?;
    let summary = lowkey_lab::report(&study, &dir)?;
    if arguments.json {
        return say_json(&summary);
    }
    let rows: Vec<Vec<String>> = summary
        .arms
        .iter()
        .map(|row| {
            let mean = |mean: Option<lowkey_lab::Mean>| {
                mean.map_or_else(String::new, |m| {
                    format!("{:.4}{}", m.mean, m.half.map_or_else(String::new, |half| format!(" ± {half:.4}")))
                })
            };
            let n = row.metric.map_or(0, |m| m.n);
            vec![row.arm.name.clone(), n.to_string(), mean(row.metric), mean(row.difference)]
        })
        .collect();
    say(&printable_lines(&format!("{}\n{}", study.question, summary.verdict.join("\n"))));
    say(&printable_lines(&table(&["arm", "n", &study.metric, "difference"], &rows)));
    say(&printable_lines(&format!("written: {}", dir.join("report.html").display())));
    Ok(())
}
