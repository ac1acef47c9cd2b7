//! Runs a target over many damaged inputs and judges each.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::allocation::{self, Taken};
use crate::mutate::below;

/// What lies under a name in a folder.
#[derive(Clone, PartialEq)]
pub(crate) enum Entry {
    File(Vec<u8>),
    Folder,
    /// A symbolic link and where it points.
    Link(String),
}

/// A folder as a reader finds it.
pub(crate) type Input = BTreeMap<String, Entry>;

/// A reader under test.
pub(crate) trait Target: Sync {
    /// Its name, as the test's.
    fn name(&self) -> &'static str;

    /// Folders that are read without complaint, and others to start from.
    fn seeds(&self) -> Vec<Input>;

    /// The file that is also cut at every length.
    fn main_file(&self) -> &'static str;

    /// Damages a folder.
    fn damage(&self, input: &mut Input, random: &mut ChaCha8Rng);

    /// Reads the folder and uses what came of it; `Err` is the refusal as the user sees it.
    fn read(&self, dir: &Path) -> Result<(), String>;

    /// Whether a refusal comes from behind the syntax: the file was parsed and then found wanting.
    fn is_deep(&self, refusal: &str) -> bool;

    /// Most bytes that may be held at a time for files of so many bytes.
    fn limit(&self, bytes: usize) -> usize;

    /// Inputs of a usual test run.
    fn inputs(&self) -> u64;
}

/// No input may take longer, on a slow machine.
const PATIENCE: Duration = Duration::from_secs(10);
/// After so many faults there is nothing to learn from more.
const FAULTS: usize = 10;
/// The tokenizers crate keeps a cache per thread that no one empties, so that a thread does not live for long.
const PER_THREAD: u64 = 5_000;

#[derive(Default)]
struct Tally {
    inputs: u64,
    read: u64,
    deep: u64,
    caught: u64,
    most: Taken,
    slowest: Duration,
    /// The largest share of its limit that an input took.
    share: f64,
    faults: Vec<String>,
}

thread_local! {
    static WATCHED: Cell<bool> = const { Cell::new(false) };
    static PANICS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Keeps the panics of watched threads to itself.
fn watch_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if WATCHED.get() {
                PANICS.with_borrow_mut(|panics| panics.push(panic.to_string()));
            } else {
                usual(panic);
            }
        }));
    });
}

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} = {text} is no number")))
}

/// Fails the test where an input makes the target panic, take too much memory or time, or refuse without a name.
pub(crate) fn fuzz(target: &dyn Target) {
    watch_panics();
    let root = PathBuf::from(if Path::new("/dev/shm").is_dir() { "/dev/shm" } else { env!("CARGO_TARGET_TMPDIR") })
        .join(format!("lowkey-fuzz-{}-{}", target.name(), std::process::id()));
    let seeds = target.seeds();
    for (i, seed) in seeds.iter().enumerate() {
        let dir = root.join(i.to_string());
        fs::create_dir_all(&dir).unwrap();
        change(&dir, &Input::new(), seed);
    }
    let started = Instant::now();
    let numbers = match variable("LOWKEY_FUZZ_ONE") {
        Some(one) => one..one + 1,
        None => 0..variable("LOWKEY_FUZZ_INPUTS").unwrap_or(target.inputs()),
    };
    let mut tally = Tally::default();
    let mut next = numbers.start;
    while next < numbers.end && tally.faults.len() < FAULTS {
        let end = numbers.end.min(next + PER_THREAD);
        std::thread::scope(|scope| {
            scope.spawn(|| (next..end).for_each(|n| try_input(target, &root, &seeds, n, &mut tally)));
        });
        next = end;
    }
    let seconds = started.elapsed().as_secs_f64();
    let percent = |part: u64| 100.0 * part as f64 / tally.inputs.max(1) as f64;
    println!(
        "{}: {} inputs, {:.0} a second; {:.1} % read, {:.1} % refused behind the syntax; {} panics of others caught; \
         at most {} KiB held ({:.0} % of the limit), {} KiB in one piece, {:?} for one input",
        target.name(),
        tally.inputs,
        tally.inputs as f64 / seconds,
        percent(tally.read),
        percent(tally.deep),
        tally.caught,
        tally.most.peak >> 10,
        100.0 * tally.share,
        tally.most.largest >> 10,
        tally.slowest,
    );
    assert!(
        tally.faults.is_empty(),
        "{}: try one again with LOWKEY_FUZZ_ONE=<number>; its files are below {}\n{}",
        target.name(),
        root.display(),
        tally.faults.join("\n")
    );
    fs::remove_dir_all(root).unwrap();
}

/// The `n`th input: always the same.
fn input(target: &dyn Target, seeds: &[Input], n: u64) -> (usize, Input) {
    let mut random = ChaCha8Rng::seed_from_u64(n);
    let seed = below(&mut random, seeds.len());
    let mut input = seeds[seed].clone();
    if n < seeds.len() as u64 {
        // The seeds themselves.
        return (n as usize, seeds[n as usize].clone());
    }
    if n.is_multiple_of(8) {
        // One input in eight is cut, in time at every length: the step is prime.
        if let Some(Entry::File(bytes)) = input.get_mut(target.main_file()) {
            bytes.truncate((n / 8).wrapping_mul(7919) as usize % (bytes.len() + 1));
        }
    } else {
        target.damage(&mut input, &mut random);
    }
    (seed, input)
}

fn try_input(target: &dyn Target, root: &Path, seeds: &[Input], n: u64, tally: &mut Tally) {
    if tally.faults.len() >= FAULTS {
        return;
    }
    let (seed, input) = input(target, seeds, n);
    let dir = root.join(seed.to_string());
    change(&dir, &seeds[seed], &input);
    let size = input.values().map(|entry| if let Entry::File(bytes) = entry { bytes.len() } else { 0 }).sum();

    WATCHED.set(true);
    allocation::start();
    let started = Instant::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| target.read(&dir)));
    let (took, taken) = (started.elapsed(), allocation::taken());
    WATCHED.set(false);
    let panics = PANICS.take();

    let mut faults = Vec::new();
    match &outcome {
        Err(_) => faults.push(format!("panics: {}", panics.join("; "))),
        Ok(Ok(())) => tally.read += 1,
        Ok(Err(refusal)) => {
            tally.deep += u64::from(target.is_deep(refusal));
            if !refusal.contains(&dir.display().to_string()) {
                faults.push(format!("names no file: {refusal}"));
            }
        }
    }
    if n < seeds.len() as u64
        && let Ok(Err(refusal)) = &outcome
    {
        faults.push(format!("refuses an undamaged folder: {refusal}"));
    }
    let limit = target.limit(size);
    if taken.peak > limit {
        faults.push(format!("{size} bytes took {taken:?}, allowed are {limit}"));
    }
    if took > PATIENCE {
        faults.push(format!("took {took:?}"));
    }
    tally.inputs += 1;
    tally.caught += u64::from(outcome.is_ok() && !panics.is_empty());
    tally.most = tally.most.max(taken);
    tally.share = tally.share.max(taken.peak as f64 / limit as f64);
    tally.slowest = tally.slowest.max(took);
    if std::env::var_os("LOWKEY_FUZZ_ONE").is_some() {
        println!("{}: {outcome:?} {taken:?} {took:?} caught {panics:?}", target.name());
    }
    if faults.is_empty() {
        change(&dir, &input, &seeds[seed]);
        return;
    }
    // The damaged folder stays, under the input's number, and a fresh one takes its place.
    fs::rename(&dir, root.join(format!("fault-{n}"))).unwrap();
    fs::create_dir(&dir).unwrap();
    change(&dir, &Input::new(), &seeds[seed]);
    tally.faults.extend(faults.into_iter().map(|fault| format!("  input {n} {fault}")));
}

/// Makes the folder that holds `old` hold `new`.
fn change(dir: &Path, old: &Input, new: &Input) {
    for (name, entry) in old.iter().filter(|(name, entry)| new.get(*name) != Some(entry)) {
        match entry {
            Entry::Folder => fs::remove_dir(dir.join(name)).unwrap(),
            _ => fs::remove_file(dir.join(name)).unwrap(),
        }
    }
    for (name, entry) in new.iter().filter(|(name, entry)| old.get(*name) != Some(entry)) {
        let path = dir.join(name);
        match entry {
            Entry::File(bytes) => fs::write(path, bytes).unwrap(),
            Entry::Folder => fs::create_dir(path).unwrap(),
            #[cfg(unix)]
            Entry::Link(to) => std::os::unix::fs::symlink(to, path).unwrap(),
            #[cfg(not(unix))]
            Entry::Link(_) => {}
        }
    }
}
