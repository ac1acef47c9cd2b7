//! `lowkey bench peer`: the same work by lowkey and by others, in turns.
//!
//! A machine that others use is fast in one minute and slow in the next. So all sides run in every round, each in a process of its own,
//! and the ratio of a round compares what stood under the same weather; medians, extremes and the best of each side say how far the
//! rounds agree.

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use lowkey_train::bench::{Shape, Spread};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::cli::{BenchPeerArguments, Work};
use crate::commands::WrongUse;
use crate::output::{say, say_json, table};
use crate::progress::Measuring;

/// What is measured: one row of sizes.
#[derive(Clone, Debug, Serialize)]
struct Case {
    what: Work,
    shape: String,
    batch: usize,
    /// Tokens of a sequence, or in the cache.
    length: usize,
}

/// Who takes part.
struct Side {
    name: String,
    /// The program, and what stands before the arguments.
    program: Vec<String>,
    /// Arguments that it alone has.
    own: Vec<String>,
}

/// All rounds of one side on one case.
#[derive(Debug, Serialize)]
struct Rounds {
    side: String,
    /// Of each round.
    tokens_per_s: Vec<f64>,
    /// MiB, of each round; absent where the side does not say.
    peak_mb: Vec<Option<f64>>,
    /// lowkey's rate over this side's.
    ratio: Ratio,
}

/// How many times as fast one side is as another.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Ratio {
    /// Of the medians of both.
    median: f64,
    /// Of the best of both.
    best: f64,
    /// The smallest and the largest of a single round.
    rounds: [f64; 2],
}

#[derive(Debug, Serialize)]
struct Compared {
    #[serde(flatten)]
    case: Case,
    sides: Vec<Rounds>,
}

/// The columns of the file of single runs; what a side does not say stays empty.
const COLUMNS: &str = "what,shape,batch,length,side,round,threads,device,dtype,tokens_per_s,step_ms,peak_rss_mb,peak_gpu_mb,\
                       params,flops_per_token,mfu,loss_last";

pub(super) fn peer(arguments: BenchPeerArguments) -> anyhow::Result<()> {
    let cases = cases(&arguments)?;
    let mut csv = format!("{COLUMNS}\n");
    let (mut all, mut done) = (Vec::new(), 0);
    let bar = Measuring::new();
    let each = cases.iter().map(|case| sides(&arguments, case.what).map(|sides| sides.len() * arguments.rounds));
    let of = each.sum::<anyhow::Result<usize>>()?;
    for case in cases {
        let sides = sides(&arguments, case.what)?;
        let mut runs: Vec<Vec<Map<String, Value>>> = vec![Vec::new(); sides.len()];
        for round in 1..=arguments.rounds {
            for (side, runs) in sides.iter().zip(&mut runs) {
                bar.show(&side.name, done, of);
                let figures = run(side, &common(&case, &arguments))?;
                csv += &line(&case, &side.name, round, &figures);
                if let Some(path) = &arguments.csv {
                    lowkey_files::write(path, csv.as_bytes())?;
                }
                runs.push(figures);
                done += 1;
            }
        }
        agree(&case, &sides, &runs)?;
        all.push(compared(case, &sides, &runs));
    }
    drop(bar);
    if arguments.json {
        return say_json(&all);
    }
    say(&text(&all));
    Ok(())
}

/// All that is to be measured.
fn cases(arguments: &BenchPeerArguments) -> anyhow::Result<Vec<Case>> {
    let mut cases = Vec::new();
    for what in &arguments.what {
        for name in &arguments.shape {
            let shape = Shape::named(name)?;
            let case =
                |(batch, length): (usize, usize)| Case { what: *what, shape: shape.name.to_owned(), batch, length };
            match what {
                Work::Train if arguments.sizes.is_empty() => cases.push(case((shape.batch, shape.seq))),
                Work::Train => cases.extend(arguments.sizes.iter().copied().map(case)),
                Work::Decode => cases.extend(arguments.context.iter().map(|context| case((1, *context)))),
            }
        }
    }
    Ok(cases)
}

/// Who takes part in such work, lowkey first.
fn sides(arguments: &BenchPeerArguments, what: Work) -> anyhow::Result<Vec<Side>> {
    let own = std::env::current_exe().context("the program itself")?;
    let on = |device: &str| match what {
        Work::Train => vec!["--device".to_owned(), device.to_owned(), "--dtype".to_owned(), arguments.dtype.clone()],
        Work::Decode => Vec::new(),
    };
    let lowkey = |name: &str, program: &Path| {
        let own = [on(&arguments.device), vec!["--json".to_owned()]].concat();
        Side { name: name.to_owned(), program: vec![program.display().to_string(), "bench".to_owned()], own }
    };
    let mut sides = vec![lowkey("lowkey", &own)];
    sides.extend(arguments.other.as_deref().map(|program| lowkey("other lowkey", program)));
    if let Some(script) = &arguments.script {
        // What it is called there: it knows one kind of GPU.
        let device = on(if arguments.device == "cpu" { "cpu" } else { "cuda" });
        let program = vec![arguments.python.clone(), script.display().to_string()];
        let side = |name: String, mode: Vec<String>| Side {
            name,
            program: program.clone(),
            own: [device.clone(), mode].concat(),
        };
        match what {
            Work::Train => sides.extend(
                arguments
                    .mode
                    .iter()
                    .map(|mode| side(format!("peer, {mode}"), vec!["--mode".to_owned(), mode.clone()])),
            ),
            Work::Decode => sides.push(side("peer".to_owned(), Vec::new())),
        }
    }
    if sides.len() == 1 {
        let why = "nobody to compare with: give --script, --other or both";
        return Err(WrongUse(why.to_owned()).into());
    }
    Ok(sides)
}

/// What all sides are asked for.
fn common(case: &Case, arguments: &BenchPeerArguments) -> Vec<String> {
    let Case { what, shape, batch, length } = case;
    let threads = arguments.threads.unwrap_or_else(lowkey_train::workers::available_threads);
    let words = match what {
        Work::Train => format!(
            "train --shape {shape} --batch {batch} --seq {length} --threads {threads} --steps {} --warmup {}",
            arguments.steps, arguments.warmup
        ),
        Work::Decode => {
            format!(
                "decode --shape {shape} --context {length} --new {} --way absorbed --threads {threads}",
                arguments.new
            )
        }
    };
    words.split(' ').map(str::to_owned).collect()
}

/// Runs a side once, and reads the object that it prints: all of its output, or the last line of it.
fn run(side: &Side, common: &[String]) -> anyhow::Result<Map<String, Value>> {
    let words: Vec<&String> = side.program.iter().chain(common).chain(&side.own).collect();
    let command = words.iter().map(|word| crate::output::quoted(word)).collect::<Vec<_>>().join(" ");
    let (program, rest) = words.split_first().context("a side is a program")?;
    let output = Command::new(program)
        .args(rest)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{}: cannot be started: {command}", side.name))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().rev().take(5).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n");
        bail!("{} failed ({}): {command}\n{last}", side.name, output.status);
    }
    let printed = String::from_utf8_lossy(&output.stdout);
    let object = |text: &str| serde_json::from_str::<Map<String, Value>>(text).ok();
    let figures = object(&printed).or_else(|| object(printed.trim_end().lines().next_back()?));
    let mut figures = figures.with_context(|| {
        format!("{}: its output does not end with a line that is a JSON object: {command}", side.name)
    })?;
    // One context and one way were asked for: their row is what was measured.
    if let Some(Value::Object(row)) = figures.get_mut("rows").and_then(|rows| rows.get_mut(0)).map(Value::take) {
        figures.extend(row);
    }
    match number(&figures, "tokens_per_s") {
        Some(rate) if rate > 0.0 => Ok(figures),
        _ => bail!("{}: tokens_per_s is not in what it prints: {command}", side.name),
    }
}

fn number(figures: &Map<String, Value>, key: &str) -> Option<f64> {
    figures.get(key)?.as_f64()
}

/// Most memory that a run held: of the GPU where it says so, else of the process.
fn peak(figures: &Map<String, Value>) -> Option<f64> {
    ["gpu_mb", "peak_gpu_mb", "peak_rss_mb"].iter().find_map(|key| number(figures, key))
}

/// A row of the file of single runs.
fn line(case: &Case, side: &str, round: usize, figures: &Map<String, Value>) -> String {
    let cell = |column: &str| match column {
        "what" => case.what.to_string(),
        "shape" => case.shape.clone(),
        "batch" => case.batch.to_string(),
        "length" => case.length.to_string(),
        "side" => format!("\"{side}\""),
        "round" => round.to_string(),
        "peak_gpu_mb" => figures.get("gpu_mb").or(figures.get("peak_gpu_mb")).map(Value::to_string).unwrap_or_default(),
        other => match figures.get(other) {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Null) | None => String::new(),
            Some(value) => value.to_string(),
        },
    };
    COLUMNS.split(',').map(cell).collect::<Vec<_>>().join(",") + "\n"
}

/// Refuses sides that have not had the same model, or that count its work otherwise: their rates say nothing of each other.
fn agree(case: &Case, sides: &[Side], runs: &[Vec<Map<String, Value>>]) -> anyhow::Result<()> {
    for key in ["params", "flops_per_token"] {
        let first = |runs: &Vec<Map<String, Value>>| runs.first().and_then(|figures| number(figures, key));
        let said: Vec<(&str, f64)> =
            sides.iter().zip(runs).filter_map(|(side, runs)| Some((&*side.name, first(runs)?))).collect();
        if let [(_, own), others @ ..] = &said[..]
            && let Some((name, other)) = others.iter().find(|(_, other)| other != own)
        {
            bail!("{} {}: {key} is {own} for lowkey and {other} for {name}: not the same work", case.what, case.shape);
        }
    }
    Ok(())
}

fn compared(case: Case, sides: &[Side], runs: &[Vec<Map<String, Value>>]) -> Compared {
    let rates =
        |runs: &Vec<Map<String, Value>>| runs.iter().filter_map(|f| number(f, "tokens_per_s")).collect::<Vec<_>>();
    let own = runs.first().map(rates).unwrap_or_default();
    let rounds = sides.iter().zip(runs).map(|(side, runs)| {
        let tokens_per_s = rates(runs);
        let ratio = ratio(&own, &tokens_per_s);
        Rounds { side: side.name.clone(), ratio, tokens_per_s, peak_mb: runs.iter().map(peak).collect() }
    });
    Compared { sides: rounds.collect(), case }
}

/// How many times as fast the first is as the second, whose rounds are in the same order.
fn ratio(own: &[f64], other: &[f64]) -> Ratio {
    let (all, of) = (Spread::of(own.to_vec()), Spread::of(other.to_vec()));
    let each = Spread::of(own.iter().zip(other).map(|(own, other)| own / other).collect());
    Ratio { median: all.median / of.median, best: all.max / of.max, rounds: [each.min, each.max] }
}

fn text(all: &[Compared]) -> String {
    let header = ["", "tokens/s", "range", "ratio", "of rounds", "of best", "MiB", "ratio"];
    let rate = |x: f64| if x < 1000.0 { format!("{x:.1}") } else { format!("{x:.0}") };
    let mut text = String::new();
    for Compared { case: Case { what, shape, batch, length }, sides } in all {
        let memory = |rounds: &Rounds| {
            let known: Option<Vec<f64>> = rounds.peak_mb.iter().copied().collect();
            known.map(|known| Spread::of(known).median)
        };
        let own = sides.first().and_then(memory);
        let row = |rounds: &Rounds| {
            let Spread { median, min, max } = Spread::of(rounds.tokens_per_s.clone());
            let Ratio { median: ratio, best, rounds: [least, most] } = rounds.ratio;
            let peak = memory(rounds);
            vec![
                rounds.side.clone(),
                rate(median),
                format!("{}..{}", rate(min), rate(max)),
                format!("{ratio:.2}"),
                format!("{least:.2}..{most:.2}"),
                format!("{best:.2}"),
                peak.map_or_else(String::new, |peak| format!("{peak:.0}")),
                own.zip(peak).map_or_else(String::new, |(own, peak)| format!("{:.2}", own / peak)),
            ]
        };
        let rows: Vec<Vec<String>> = sides.iter().map(row).collect();
        let _ = writeln!(text, "{what} {shape}, {batch} × {length}\n{}", table(&header, &rows));
    }
    text + "ratios are lowkey's over the row's: of the medians, of single rounds, of the best; memory likewise"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_of_rounds_leaves_the_weather_out() {
        // The second round was twice as slow for both.
        let found = ratio(&[300.0, 150.0, 310.0], &[100.0, 50.0, 100.0]);
        assert_eq!(found, Ratio { median: 3.0, best: 3.1, rounds: [3.0, 3.1] });
    }
}
