//! What a run looks like while it goes: a progress bar on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::mem::Discriminant;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use lowkey_data::prepare as preparing;
use lowkey_data::tokenizer::Part;
use lowkey_files::printable_lines;
use lowkey_train::{
    Event,
    evaluate::{ClassEvaluation, Evaluation},
    metrics::Metrics,
    plan::{Plan, RanksPlan},
};

use crate::output::{bytes, complain, count, duration, pairs, say, say_parts, table};

/// Between plain lines.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Bytes of a training record that are shown.
const LONGEST_EXAMPLE: usize = 2000;

/// Shows the events of a run.
pub(crate) struct View {
    steps: u64,
    bar: Option<ProgressBar>,
    terminal: bool,
    last_line: Option<Instant>,
    first: Option<(Instant, u64)>,
    preparing: bool,
    preparation: Preparation,
}

impl View {
    pub(crate) fn new(steps: u64) -> Self {
        let terminal = std::io::stderr().is_terminal() && std::io::stdout().is_terminal();
        Self {
            steps,
            bar: None,
            terminal,
            last_line: None,
            first: None,
            preparing: false,
            preparation: Preparation::new(),
        }
    }

    pub(crate) fn show(&mut self, event: Event) {
        match event {
            Event::Preparing(progress) => self.preparing(&progress),
            Event::Note(note) => self.line(&format!("note: {note}")),
            Event::Example(parts) => self.example(parts),
            Event::Ready { plan, step } => self.ready(plan, step),
            Event::WarmedUp { seconds } => {
                self.line(&format!("kernels compiled and chosen in {}", duration(seconds)));
                if let Some((started, _)) = &mut self.first {
                    *started = Instant::now();
                }
            }
            Event::Step(metrics) => self.step(metrics),
            Event::Evaluated { step, evaluation } => self.line(&evaluation_line(step, evaluation)),
            Event::Finished { evaluation, on } => {
                self.clear();
                self.line(&format!("\nall steps taken; on {on}:\n{}", evaluation_table(evaluation)));
            }
            Event::Sample { prompt, text, chat: false } => self.line(&indented(&format!("{prompt}{text}"))),
            Event::Sample { prompt, text, chat: true } => {
                self.line(&indented(&format!("user: {prompt}\nassistant: {}", text.trim_start())));
            }
            Event::Saved { path, best } => {
                self.line(&format!("saved {}{}", path.display(), if best { " (best so far)" } else { "" }));
            }
        }
    }

    /// Removes the bar, so that what follows stands alone.
    pub(crate) fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn preparing(&mut self, progress: &preparing::Progress) {
        // Said once: a small corpus is through in a moment.
        if !self.preparing {
            self.preparing = true;
            self.line("preparing the corpus");
        }
        if let Some(line) = self.preparation.line(progress) {
            self.line(&line);
        }
    }

    /// The beginning of a record, with what is learnt of it.
    fn example(&self, parts: &[Part]) {
        let (mut left, mut shown) = (LONGEST_EXAMPLE, Vec::new());
        for part in parts {
            let end = part.text.floor_char_boundary(left);
            let more = if end < part.text.len() { "…" } else { "" };
            shown.push(Part { text: format!("{}{more}", &part.text[..end]), learnt: part.learnt });
            left -= end;
            if left == 0 {
                break;
            }
        }
        self.line("the first training record, with what is learnt marked:");
        say_parts(&shown);
    }

    fn ready(&mut self, plan: &Plan, step: u64) {
        self.line(&plan_text(plan, "here"));
        if step > 0 {
            self.line(&format!("resuming after step {step} of {}", self.steps));
        }
        self.first = Some((Instant::now(), step));
        self.last_line = None;
        if self.terminal {
            let bar = ProgressBar::with_draw_target(Some(self.steps), ProgressDrawTarget::stderr());
            // The template is a literal; a mistake in it would leave the default style.
            if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len}  {msg}  ETA {eta}") {
                bar.set_style(style);
            }
            bar.set_position(step);
            bar.reset_eta();
            self.bar = Some(bar);
        }
    }

    fn step(&mut self, m: &Metrics) {
        let figures = format!(
            "loss {:.4}  lr {:.1e}  |g| {:.2}  {} tok/s  MFU {:.0} %",
            m.train_loss,
            m.lr,
            m.grad_norm,
            count(m.tokens_per_s),
            m.mfu * 100.0
        );
        if let Some(bar) = &self.bar {
            bar.set_position(m.step);
            bar.set_message(figures);
            return;
        }
        let due = self.last_line.is_none_or(|at| at.elapsed() >= LINE_EVERY) || m.step == self.steps;
        if due {
            self.last_line = Some(Instant::now());
            say(&format!("step {:>6}/{}  {figures}  ETA {}", m.step, self.steps, duration(self.eta(m.step))));
        }
    }

    fn eta(&self, step: u64) -> f64 {
        let Some((started, from)) = self.first else { return 0.0 };
        let done = step.saturating_sub(from).max(1);
        started.elapsed().as_secs_f64() / done as f64 * self.steps.saturating_sub(step) as f64
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| say(text)),
            None => say(text),
        }
    }
}

/// A bar on standard error while something is measured; nothing where that is no terminal.
pub(crate) struct Measuring {
    bar: ProgressBar,
}

impl Measuring {
    pub(crate) fn new() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        // The template is a literal; a mistake in it would leave the default style.
        if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len}  {msg}") {
            bar.set_style(style);
        }
        Self { bar }
    }

    pub(crate) fn show(&self, doing: &str, done: usize, of: usize) {
        self.bar.set_length(of as u64);
        self.bar.set_message(doing.to_string());
        self.bar.set_position(done as u64);
    }
}

impl Drop for Measuring {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// The figures of a plan, as a block of text; `place` is where products run at its rate, such as `here`.
pub(crate) fn plan_text(plan: &Plan, place: &str) -> String {
    let smaller = plan.cache_bytes_expanded as f64 / plan.cache_bytes_latent as f64;
    let cache = if plan.cache_bytes_latent == plan.cache_bytes_expanded {
        format!("{} per token (bf16)", bytes(plan.cache_bytes_latent))
    } else {
        format!(
            "{} per token (bf16), {smaller:.1}× smaller than the {} of expanded keys and values",
            bytes(plan.cache_bytes_latent),
            bytes(plan.cache_bytes_expanded)
        )
    };
    let rows = [
        (
            "parameters",
            format!(
                "{} ({} in blocks, {} of them attention: {})",
                count(plan.parameters as f64),
                count(plan.block_parameters as f64),
                count(plan.attention_parameters as f64),
                plan.attention
            ),
        ),
        ("cache", cache),
        ("tokens", format!("{} ({} per step)", count(plan.tokens as f64), count(plan.tokens_per_step as f64))),
        (
            "work",
            format!(
                "{}FLOP per token, {}FLOP in all",
                spaced(count(plan.train_flops_per_token)),
                spaced(count(plan.flops))
            ),
        ),
        ("memory", format!("about {} at the peak", bytes(plan.train_bytes))),
        (
            "time",
            format!(
                "about {} (matrix products run at {}FLOP/s {place})",
                duration(plan.seconds),
                spaced(count(plan.matmul_flops_per_s))
            ),
        ),
    ];
    pairs(&rows)
}

/// A plan for several ranks, in rows below that of one process.
pub(crate) fn ranks_text(plan: &RanksPlan) -> String {
    let rows = [
        ("on ranks", format!("{}, each on such a machine", plan.ranks)),
        ("sent", format!("{} by each rank in a step, and as much received", bytes(plan.bytes_per_step as usize))),
        (
            "step",
            format!(
                "{:.1} ms of computing and {:.1} ms of sending: {:.0} % of what {} ranks would do without",
                1e3 * plan.compute_s,
                1e3 * plan.link_s,
                100.0 * plan.efficiency,
                plan.ranks
            ),
        ),
        ("memory", format!("about {} at the peak of each", bytes(plan.rank_bytes))),
        ("time", format!("about {}", duration(plan.seconds))),
    ];
    pairs(&rows)
}

/// A space between a bare number and its unit; a prefixed one has its own.
pub(crate) fn spaced(number: String) -> String {
    if number.ends_with(|c: char| c.is_ascii_digit()) { number + " " } else { number }
}

fn evaluation_line(step: u64, e: &Evaluation) -> String {
    // An answer has no entropy: the gap of a task is its loss.
    let gap = e.gap.filter(|_| e.accuracy.is_none());
    let gap = gap.map(|gap| format!("  gap {gap:.4} nats/token")).unwrap_or_default();
    let bits = e.bits_per_byte.map(|bits| format!("  {bits:.4} bits/byte")).unwrap_or_default();
    let accuracy = e.accuracy.map(|accuracy| format!("  accuracy {:.2} %", 100.0 * accuracy)).unwrap_or_default();
    let ema = e.ema.as_ref().map(|ema| format!("  of averaged weights {:.4}", ema.loss)).unwrap_or_default();
    format!("eval after step {step}: val loss {:.4}{ema}{bits}{accuracy}{gap}  max logit {:.1}", e.loss, e.max_logit)
}

/// The figures of an evaluation, as a block of text.
pub(crate) fn evaluation_table(e: &Evaluation) -> String {
    let tokens = count(e.tokens as f64);
    let mut rows = Vec::new();
    if let Some(mse) = e.mse {
        rows.push((
            "held-out error",
            format!("{mse:.4} mean square per number over {tokens} vectors (an answer of 0: 1)"),
        ));
    } else {
        rows.push(("held-out loss", format!("{:.4} nats per token over {tokens} tokens", e.loss)));
    }
    rows.extend(e.ema.as_ref().map(|ema| ("of averaged weights", format!("{:.4}", ema.loss))));
    rows.extend(e.perplexity.map(|perplexity| ("perplexity", format!("{perplexity:.4}"))));
    rows.extend(e.bits_per_byte.map(|bits| ("bits per byte", format!("{bits:.4}"))));
    match (e.accuracy, e.gap) {
        (Some(accuracy), _) => rows.push(("accuracy", format!("{:.2} %", 100.0 * accuracy))),
        (None, Some(gap)) => rows.push(("gap to the true entropy", format!("{gap:.4} nats per token"))),
        (None, None) => {}
    }
    let mut text = pairs(&rows);
    if !e.datasets.is_empty() {
        let four = |x: f64| format!("{x:.4}");
        let rows = e.datasets.iter().map(|at| {
            let gap = at.gap.map_or_else(String::new, four);
            vec![at.dataset.clone(), format!("{}", at.weight), at.tokens.to_string(), four(at.loss), gap]
        });
        let rows: Vec<Vec<String>> = rows.collect();
        text = format!("{text}\n\n{}", table(&["dataset", "weight", "tokens", "loss", "gap (nats/token)"], &rows));
    }
    if !e.ranks.is_empty() {
        let four = |x: f64| format!("{x:.4}");
        let ranks: Vec<Vec<String>> = e
            .ranks
            .iter()
            .map(|at| {
                let last = at.accuracy.map(|accuracy| format!("{:.2} %", 100.0 * accuracy)).or(at.gap.map(four));
                vec![at.rank.to_string(), four(at.loss), last.unwrap_or_default()]
            })
            .collect();
        let last = if e.accuracy.is_some() { "accuracy" } else { "gap (nats/token)" };
        text = format!("{text}\n\n{}", table(&["read at rank", "loss", last], &ranks));
    }
    if !e.classes.is_empty() {
        let classes: Vec<Vec<String>> = e.classes.iter().map(class_row).collect();
        let last = if e.accuracy.is_some() { "accuracy" } else { "gap (nats/token)" };
        let header = ["class", "tokens", "loss", "entropy", last];
        text = format!("{text}\n\n{}", table(&header, &classes));
    }
    text
}

fn class_row(class: &ClassEvaluation) -> Vec<String> {
    let four = |x: f64| format!("{x:.4}");
    let last = class.accuracy.map_or_else(|| four(class.gap), |accuracy| format!("{:.2} %", 100.0 * accuracy));
    vec![class.class.clone(), class.tokens.to_string(), four(class.loss), four(class.entropy), last]
}

fn indented(text: &str) -> String {
    // What a model makes up is no command for a terminal.
    printable_lines(text).lines().map(|line| format!("    | {line}")).collect::<Vec<_>>().join("\n")
}

/// The preparation of a corpus in lines: one at once for what it waits for, and one every few seconds for what it does.
pub(crate) struct Preparation {
    last: Instant,
    /// The pass over the source that is under way, when it began, and what had been read of it then.
    pass: Option<(Discriminant<preparing::Progress>, Instant, u64)>,
}

impl Preparation {
    pub(crate) fn new() -> Self {
        Self { last: Instant::now(), pass: None }
    }

    /// What `lowkey_data::prepare` tells, outside a run. Ctrl-C ends the process here, which leaves nothing half-done.
    pub(crate) fn observer(mut self) -> impl FnMut(preparing::Progress) -> ControlFlow<()> {
        move |progress| {
            if let Some(line) = self.line(&progress) {
                complain(&line);
            }
            ControlFlow::Continue(())
        }
    }

    /// What it is busy with, where that is to be said now.
    fn line(&mut self, progress: &preparing::Progress) -> Option<String> {
        use preparing::Progress as P;
        let (what, share) = match progress {
            P::Waiting { dir } => (format!("waiting for another process that prepares {}", dir.display()), None),
            P::Fetching { file } => (format!("fetching {file}"), None),
            P::Hashing { file } => (format!("hashing {file}"), None),
            P::Counting { file, share } => (format!("counting {file}"), Some(share)),
            P::BuildingTokenizer { bytes: read, share } => {
                (format!("building the tokenizer: {} of text", bytes(*read as usize)), Some(share))
            }
            P::LearningMerges { words } => {
                (format!("learning merges from {} distinct words", count(*words as f64)), None)
            }
            P::Tokenizing { documents, tokens, share } => {
                let (documents, tokens) = (count(*documents as f64), count(*tokens as f64));
                (format!("tokenizing: {documents} documents, {tokens} tokens"), Some(share))
            }
        };
        let kind = std::mem::discriminant(progress);
        let read = share.map_or(0, |share| share.read);
        let (_, began, before) = match self.pass {
            Some(pass) if pass.0 == kind => pass,
            _ => *self.pass.insert((kind, Instant::now(), read)),
        };
        let waits = matches!(progress, P::Fetching { .. } | P::LearningMerges { .. });
        if !waits && self.last.elapsed() < LINE_EVERY {
            return None;
        }
        self.last = Instant::now();
        let left = share.and_then(|share| left(*share, before, began.elapsed()));
        Some(left.map_or(what.clone(), |left| format!("{what}, {left}")))
    }
}

/// How much of a pass is done, and how long the rest will take at the rate so far; `before` had been read when it began.
fn left(share: preparing::Share, before: u64, took: Duration) -> Option<String> {
    let preparing::Share { read, of } = share;
    (of > 0 && read > before).then(|| {
        let seconds = took.as_secs_f64() * of.saturating_sub(read) as f64 / (read - before) as f64;
        format!("{:.0} % ETA {}", 100.0 * read.min(of) as f64 / of as f64, duration(seconds))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_a_pass_is_told_at_the_rate_so_far() {
        let share = |read, of| preparing::Share { read, of };
        let ten = Duration::from_secs(10);
        assert_eq!(left(share(250, 1000), 0, ten).as_deref(), Some("25 % ETA 30 s"));
        // What was there before the pass was looked at tells nothing of its rate.
        assert_eq!(left(share(600, 1000), 500, ten).as_deref(), Some("60 % ETA 40 s"));
        assert_eq!(left(share(1000, 1000), 0, ten).as_deref(), Some("100 % ETA 0 s"));
        assert_eq!(left(share(0, 1000), 0, ten), None);
        assert_eq!(left(share(5, 0), 0, ten), None);
    }
}
