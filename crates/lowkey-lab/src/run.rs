//! Running what is not finished, several runs at a time.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use lowkey_files::{self as files, Owned, lock::Lock, mark::Kind};
use lowkey_train::{Event as TrainEvent, RunConfig, RunOptions, evaluate::Held, run_dir::settle_finished, train};

use crate::collect::{finished, other_section};
use crate::error::{Error, Result};
use crate::expand::{Expanded, Run};
use crate::kept::{KEPT, is_kept, keep};
use crate::quantised::quantise;

/// How to run a sweep.
#[derive(Clone, Debug)]
pub struct SweepOptions {
    /// Folder of the runs, the one that they were listed for.
    pub out: PathBuf,
    /// Which part of the runs these are, of how many; several machines may share a folder.
    pub shard: Option<(usize, usize)>,
    /// Runs at a time.
    pub jobs: usize,
    /// Jobs of other processes of this machine that come before, where they take its GPUs in turn.
    pub turn: usize,
    /// Facts for each run's `environment.json`.
    pub environment: serde_json::Map<String, serde_json::Value>,
}

/// What a sweep tells whoever watches it. `run` counts within the list of runs.
#[derive(Clone, Debug)]
pub enum Event {
    /// A corpus is being read, before the first run.
    Preparing,
    /// A run was finished earlier.
    Skipped {
        /// Which.
        run: usize,
    },
    /// A run begins, or goes on from a checkpoint.
    Started {
        /// Which.
        run: usize,
        /// Steps that were taken earlier.
        step: u64,
        /// Steps that it takes in all.
        steps: u64,
    },
    /// A step was taken.
    Step {
        /// Which.
        run: usize,
        /// Steps taken.
        step: u64,
        /// Training loss.
        loss: f64,
    },
    /// All steps of a run are taken.
    Finished {
        /// Which.
        run: usize,
        /// Held-out loss.
        loss: f64,
    },
    /// A run failed; the others go on.
    Failed {
        /// Which.
        run: usize,
        /// Why.
        why: String,
    },
}

/// How a sweep ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Runs that are finished, now or earlier.
    pub finished: usize,
    /// Runs that failed, with the reason.
    pub failed: Vec<(usize, String)>,
    /// Runs that an interrupt left unfinished.
    pub left: usize,
}

/// Runs all of `runs` that are not finished. Each is a run folder like any other and may be looked at, resumed or removed as one; a
/// process that is killed loses at most the steps since each run's last checkpoint, and the next sweep goes on from there with the
/// same bits.
///
/// # Errors
/// [`Error::File`] where a folder holds a run with other settings, or another process runs this sweep; [`Error::Files`] where it holds
/// what lowkey did not make; [`Error::Experiment`] for a corpus that holds nothing out; [`Error::Train`] for one that cannot be
/// prepared. A run that fails is no error of the sweep: it is in the outcome.
pub fn sweep(
    expanded: &Expanded,
    runs: &[Run],
    options: &SweepOptions,
    interrupt: &AtomicBool,
    observe: &mut dyn FnMut(Event),
) -> Result<Outcome> {
    let configs = runs.iter().map(|run| expanded.config(run)).collect::<Result<Vec<_>>>()?;
    for (run, config) in runs.iter().zip(&configs) {
        check_folder(&run.out, config)?;
    }
    let _lock = claim(expanded, options)?;
    let mut open = Vec::new();
    for (i, (run, config)) in runs.iter().zip(&configs).enumerate() {
        if finished(&run.out) && (!expanded.experiment.quantised || quantise(&run.out, config, expanded)?) {
            // It may have been killed after its last file, before it gave up its lock.
            Owned::clear(&run.out, &["checkpoints"])?;
            settle_finished(&run.out, config.training.steps)?;
            observe(Event::Skipped { run: i });
        } else {
            open.push(i);
        }
    }
    let mut outcome = Outcome { finished: runs.len() - open.len(), ..Outcome::default() };
    prepare(expanded, &open, runs, &configs, observe)?;
    let next = AtomicUsize::new(0);
    let (sender, receiver) = mpsc::channel();
    std::thread::scope(|scope| {
        for job in 0..options.jobs.clamp(1, open.len().max(1)) {
            let turn = options.turn + job;
            let (sender, next, open, configs) = (sender.clone(), &next, &open, &configs);
            scope.spawn(move || {
                while !interrupt.load(Ordering::Relaxed)
                    && let Some(&i) = open.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    let job = Job { expanded, run: &runs[i], config: &configs[i], index: i, options, turn };
                    // A panic of one run is its failure, not that of the others.
                    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| job.run(interrupt, &sender)));
                    let why = match ended {
                        Ok(Ok(())) => continue,
                        Ok(Err(e)) => e.to_string(),
                        Err(_) => "internal error; please report this".into(),
                    };
                    // Nobody listens only when the sweep is over.
                    let _ = sender.send(Event::Failed { run: i, why });
                }
            });
        }
        drop(sender);
        for event in receiver {
            match &event {
                Event::Finished { .. } => outcome.finished += 1,
                Event::Failed { run, why } => outcome.failed.push((*run, why.clone())),
                _ => {}
            }
            observe(event);
        }
    });
    outcome.left = runs.len() - outcome.finished - outcome.failed.len();
    Ok(outcome)
}

/// Marks the folder as this experiment's and writes down what decides it, before anything runs; the lock keeps out whoever would run
/// the same part of it.
fn claim(expanded: &Expanded, options: &SweepOptions) -> Result<Lock> {
    /// Longer than another part of the sweep takes to do the same.
    const PATIENCE: Duration = Duration::from_secs(10);
    let out = &options.out;
    let names: Vec<&str> = expanded.arms.iter().map(|arm| arm.name.as_str()).chain([KEPT]).collect();
    let begun = expanded.runs(out, None)?.iter().filter(|run| run.out.join("run.toml").exists()).count();
    let started = Instant::now();
    let owned = loop {
        match Owned::claim(out, Kind::Study, &names, is_kept(out)) {
            Ok(owned) => break owned,
            Err(e) if e.is_held() && started.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(e) => return Err(e.into()),
        }
    };
    keep(out, expanded, begun)?;
    let (i, n) = options.shard.unwrap_or((0, 1));
    let lock = files::lock::lock(&out.join(format!(".sweep-{i}-of-{n}.lock"))).map_err(|e| match e {
        files::Error::Held { path } => Error::file(
            path,
            format!(
                "{}; a lowkey lab run of these runs holds it, and goes on: this one has changed nothing",
                files::lock::HELD
            ),
        ),
        e => e.into(),
    })?;
    drop(owned);
    Ok(lock)
}

/// Reads each corpus once, before several runs would do so at a time.
fn prepare(
    expanded: &Expanded,
    open: &[usize],
    runs: &[Run],
    configs: &[RunConfig],
    observe: &mut dyn FnMut(Event),
) -> Result<()> {
    let mut seen: Vec<[Option<toml::Value>; 2]> = Vec::new();
    for i in open {
        let config = &configs[*i];
        let path = &runs[*i].out;
        let table: toml::Table = toml::from_str(&config.to_toml()?).map_err(|e| Error::file(path, e.to_string()))?;
        let corpus = ["data", "init"].map(|section| table.get(section).cloned());
        if seen.contains(&corpus) {
            continue;
        }
        observe(Event::Preparing);
        let options = run_options(expanded, &runs[*i].out, serde_json::Map::new());
        let setup = lowkey_train::setup(config, &options, &mut |_| {})?;
        let nothing = match &setup.data.held {
            Held::Batches(batches) => batches.is_empty(),
            Held::Documents(documents) => documents.is_empty(),
            Held::Examples(_) => false,
            held @ Held::Mixture(_) => held.is_empty(),
        };
        if nothing {
            let why = format!(
                "{} holds no text out, and a study judges its arms by text that none was trained on: give the dataset a \
                 split.validation_fraction above 0, or a validation source",
                setup.data.name
            );
            return Err(Error::experiment(&expanded.experiment.origin, why));
        }
        seen.push(corpus);
    }
    Ok(())
}

fn run_options(expanded: &Expanded, out: &Path, environment: serde_json::Map<String, serde_json::Value>) -> RunOptions {
    let run_file = expanded.experiment.base_path();
    RunOptions { run_file, out: out.to_path_buf(), resume: true, overwrite: false, turn: 0, environment }
}

/// A folder that holds a run of other settings is not touched.
fn check_folder(out: &Path, config: &RunConfig) -> Result<()> {
    match other_section(out, config)? {
        Some(section) => {
            let why = format!(
                "[{section}] is not what the experiment now says; remove the folder to run it anew, or sweep into another \
                 folder with --out DIR"
            );
            Err(Error::file(out.join("run.toml"), why))
        }
        None => Ok(()),
    }
}

/// One run on one thread of the sweep.
struct Job<'a> {
    expanded: &'a Expanded,
    run: &'a Run,
    config: &'a RunConfig,
    index: usize,
    options: &'a SweepOptions,
    turn: usize,
}

impl Job<'_> {
    fn run(&self, interrupt: &AtomicBool, sender: &mpsc::Sender<Event>) -> Result<()> {
        let (run, steps) = (self.index, self.config.training.steps);
        let tell = |event| {
            let _ = sender.send(event);
        };
        let options = run_options(self.expanded, &self.run.out, self.options.environment.clone());
        let options = RunOptions { turn: self.turn, ..options };
        let outcome = train(self.config, &options, interrupt, &mut |event| match event {
            TrainEvent::Ready { step, .. } => tell(Event::Started { run, step, steps }),
            TrainEvent::Step(metrics) => tell(Event::Step { run, step: metrics.step, loss: metrics.train_loss }),
            _ => {}
        })?;
        let Some(evaluation) = outcome.evaluation else { return Ok(()) };
        if self.expanded.experiment.quantised {
            quantise(&self.run.out, self.config, self.expanded)?;
        }
        tell(Event::Finished { run, loss: evaluation.loss });
        Ok(())
    }
}
