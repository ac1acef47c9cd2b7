//! `lowkey train` and `lowkey plan`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use lowkey_data::Tokenizer;
use lowkey_train::{
    Event, RunConfig, RunOptions,
    plan::{Link, Plan},
    ranks::Ranks,
    setup::planned_model,
    workers::{ceiling, check_threads},
};
use serde_json::json;

use super::ranks;
use crate::cli::{PlanArguments, RunFileArguments, TrainArguments};
use crate::interrupt::Interrupt;
use crate::output::{complain, quoted, say, say_json};
use crate::progress::{View, plan_text, ranks_text};

pub(crate) fn train(arguments: TrainArguments) -> anyhow::Result<ExitCode> {
    let ranks = ranks::join()?;
    ranks::part(&ranks, train_on(&ranks, arguments))
}

fn train_on(ranks: &Ranks, arguments: TrainArguments) -> anyhow::Result<ExitCode> {
    let TrainArguments { mut file, resume, overwrite, device } = arguments;
    if let Some(device) = device {
        let several: Vec<&str> = device.split(',').map(str::trim).collect();
        let (one, several) = if several.len() > 1 { ("auto", several) } else { (device.as_str(), Vec::new()) };
        file.overrides.push(format!("run.device=\"{one}\""));
        file.overrides.push(format!("run.devices={several:?}"));
    }
    let config = ranks.agree(RunConfig::load(&file.run, &file.overrides)).map_err(|e| in_run_file(e, &file.run))?;
    let mut options = options(&file, &config);
    (options.resume, options.overwrite) = (resume, overwrite);
    say(&format!("run {} in {}", config.run.name, options.out.display()));

    let saved = Arc::new(AtomicBool::new(false));
    let stands = Arc::clone(&saved);
    let interrupt = Interrupt::watch(move || {
        let what =
            if stands.load(Ordering::Relaxed) { "the last checkpoint stands" } else { "there is no checkpoint yet" };
        complain(&format!("stopping now; {what}"));
    })?;

    let (mut view, mut begun) = (View::new(config.training.steps), false);
    let result = lowkey_train::train_on(ranks, &config, &options, interrupt.came(), &mut |event| {
        if matches!(event, Event::Saved { .. } | Event::Ready { step: 1.., .. }) {
            saved.store(true, Ordering::Relaxed);
        }
        begun |= matches!(event, Event::Ready { .. });
        if ranks.is_first() {
            view.show(event);
        }
    });
    view.clear();
    if begun && ranks.is_first() {
        super::report::at_the_end(&options.out);
    }
    let outcome = result.map_err(|e| in_run_file(e, &file.run))?;
    let best = options.out.join("checkpoints").join("best");
    if outcome.finished {
        let answers = outcome.evaluation.and_then(|evaluation| evaluation.accuracy.or(evaluation.mse));
        say(&match (&config.data.dataset, answers) {
            // A task has no text to go on with.
            (Some(dataset), Some(_)) => {
                format!("\ndone. Measure it again: lowkey eval {} --data {}", path(&best), path(dataset))
            }
            _ => format!("\ndone. Try it: {}", generating(&config, &best)),
        });
        return Ok(ExitCode::SUCCESS);
    }
    let out = file.out.map(|dir| format!(" --out {}", path(&dir))).unwrap_or_default();
    let set: String = file.overrides.iter().map(|expression| format!(" --set {}", quoted(expression))).collect();
    say(&format!(
        "stopped after step {}. Go on with: lowkey train {}{set}{out} --resume",
        outcome.step,
        path(&file.run)
    ));
    // A signal to any of several ranks is a wish of who started them all, and they have done as they were asked.
    Ok(if ranks.are_several() { ExitCode::SUCCESS } else { interrupt.exit_code() })
}

/// A command that shows what a run has made, and that works as it stands: with a prompt of the run, else one that its tokenizer
/// can read, else none.
fn generating(config: &RunConfig, best: &Path) -> String {
    let readable = |prompt: &&str| {
        let Ok(tokenizer) = Tokenizer::from_model_dir(best) else { return false };
        let read = tokenizer.encode(prompt).and_then(|ids| tokenizer.decode(&ids));
        read.is_ok_and(|text| text.trim() == *prompt)
    };
    let own = config.eval.prompts.first().map(String::as_str);
    let prompt = own.or_else(|| ["The", "the", "a"].into_iter().find(readable));
    let prompt = prompt.map(|prompt| format!(" --prompt {}", quoted(prompt)));
    format!("lowkey generate {}{}", path(best), prompt.unwrap_or_default())
}

fn path(path: &Path) -> String {
    quoted(&path.display().to_string())
}

pub(crate) fn plan(arguments: PlanArguments) -> anyhow::Result<()> {
    let named = |e| in_run_file(e, &arguments.file.run);
    let config = RunConfig::load(&arguments.file.run, &arguments.file.overrides).map_err(named)?;
    let options = options(&arguments.file, &config);
    let devices = lowkey_train::setup::devices(&config.run, &Ranks::default(), 0).map_err(named)?;
    let crowded = check_threads(&config, &devices).map_err(named)?;
    let (model, notes) = planned_model(&config, &options).map_err(named)?;
    for note in crowded.iter().chain(&notes) {
        complain(&format!("note: {note}"));
    }
    let here = || ceiling(config.threads(), &devices, config.training.dtype);
    let plan = Plan::new(&config, &model, arguments.tflops.map_or_else(here, |rate| Ok(rate * 1e12))?);
    let link = Link { bytes_per_s: arguments.bandwidth * 1e9 / 8.0, latency_s: arguments.latency * 1e-6 };
    let on_ranks = arguments.ranks.map(|ranks| plan.on_ranks(&config, &model, ranks as usize, link));
    let on_ranks = on_ranks.transpose().map_err(named)?;
    if arguments.json {
        let mut said = json!(plan);
        if let (Some(on_ranks), Some(said)) = (on_ranks, said.as_object_mut()) {
            said.insert("on_ranks".into(), json!(on_ranks));
        }
        return say_json(&said);
    }
    say(&plan_text(&plan, if arguments.tflops.is_some() { "there" } else { "here" }));
    on_ranks.iter().for_each(|on_ranks| say(&ranks_text(on_ranks)));
    Ok(())
}

/// Says which file a key stands in. Messages about files name theirs already.
fn in_run_file(error: lowkey_train::Error, run_file: &Path) -> anyhow::Error {
    use lowkey_model::Error as Model;
    use lowkey_train::Error as Train;
    let about_a_key =
        matches!(error, Train::Config { .. } | Train::Model(Model::Config { .. } | Model::MissingKey { .. }));
    let error = anyhow::Error::from(error);
    if about_a_key { error.context(run_file.display().to_string()) } else { error }
}

fn options(file: &RunFileArguments, config: &RunConfig) -> RunOptions {
    RunOptions {
        run_file: file.run.clone(),
        out: file.out.clone().unwrap_or_else(|| PathBuf::from("runs").join(&config.run.name)),
        resume: false,
        overwrite: false,
        turn: 0,
        environment: environment(),
    }
}

/// Facts for `environment.json` that a library cannot know.
pub(crate) fn environment() -> serde_json::Map<String, serde_json::Value> {
    let environment = [
        ("lowkey", json!(env!("CARGO_PKG_VERSION"))),
        ("commit", json!(env!("LOWKEY_COMMIT"))),
        ("burn", json!("0.22.1")),
        ("os", json!(std::env::consts::OS)),
        ("arch", json!(std::env::consts::ARCH)),
        ("cores", json!(lowkey_train::workers::available_threads())),
    ];
    environment.into_iter().map(|(key, value)| (key.to_string(), value)).collect()
}
