//! What ranks compare before they open anything: whether they are of one build, one run file and one kind of machine.

use std::collections::BTreeSet;

use burn::tensor::Device;
use lowkey_kernels::Precision;
use serde::{Deserialize, Serialize};

use super::{Meeting, Ranks};
use crate::error::{Error, Result};
use crate::event::RunOptions;
use crate::run_config::RunConfig;
use crate::workers::available_threads;

/// What a rank tells of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Card {
    /// Version and commit.
    version: String,
    /// Hash of the program itself.
    program: String,
    /// What rounding depends on.
    arithmetic: String,
    /// Where it runs, and on which cores.
    place: (String, String),
    /// How many threads those serve.
    threads: usize,
    /// What they are to do, as TOML: the run file, overrides in it, or what another command was asked for.
    task: String,
    /// `--resume` and `--overwrite`.
    options: [bool; 2],
}

/// What a job of several ranks is about.
#[derive(Clone, Debug)]
pub struct Task<'a> {
    /// What it is called in messages, such as "run file".
    pub what: &'static str,
    /// All that is asked for, as TOML.
    pub toml: String,
    /// Where it is computed,
    pub device: &'a Device,
    /// and what its products are computed in.
    pub precision: Precision,
    /// Facts of the program, as [`RunOptions::environment`] has them.
    pub environment: &'a serde_json::Map<String, serde_json::Value>,
}

impl<'a> Task<'a> {
    /// A command with its arguments, in 32 bits.
    pub fn of_command(
        arguments: Vec<String>,
        device: &'a Device,
        environment: &'a serde_json::Map<String, serde_json::Value>,
    ) -> Self {
        let toml = toml::Table::from_iter([("arguments".to_owned(), arguments.into())]).to_string();
        Self { what: "command", toml, device, precision: Precision::F32, environment }
    }
}

impl Card {
    fn of_this(ranks: &Ranks, task: Task, options: [bool; 2]) -> Result<Self> {
        let told = |key: &str| task.environment.get(key).and_then(|value| value.as_str()).unwrap_or("?");
        let program = std::env::current_exe().map_err(|e| Error::io("the program itself", e))?;
        Ok(Self {
            version: format!("{} ({})", told("lowkey"), told("commit")),
            program: lowkey_files::hash::sha256(&program)?,
            arithmetic: arithmetic(task.device, task.precision),
            place: (ranks.machine().to_owned(), cores()),
            threads: available_threads(),
            task: task.toml,
            options,
        })
    }

    /// What of it is not as on rank 0, with the mend.
    fn differs(&self, first: &Self, what: &str) -> Option<String> {
        if self.version != first.version {
            return Some(format!("is lowkey {}, and rank 0 is {}; start one program", self.version, first.version));
        }
        if self.program != first.program {
            let (own, its) = (&self.program[..12], &first.program[..12]);
            let why = format!("is another build than rank 0 (SHA-256 {own}…, not {its}…); start one program");
            return Some(why);
        }
        if self.arithmetic != first.arithmetic {
            let (own, its) = (&self.arithmetic, &first.arithmetic);
            let why = format!("computes on {own}, and rank 0 on {its}, which round differently");
            return Some(format!("{why}; take machines of one kind"));
        }
        if self.task != first.task {
            let key = differing_key(&self.task, &first.task);
            let why = format!("has another {what} than rank 0: {key}");
            return Some(format!("{why}; give all ranks the same files and the same arguments"));
        }
        (self.options != first.options).then(|| "was started with other options than rank 0".to_owned())
    }
}

/// A device, as far as its arithmetic is concerned.
fn arithmetic(device: &Device, dtype: Precision) -> String {
    lowkey_kernels::device::properties(device).map_or_else(|| cpu(dtype), |properties| properties.part)
}

fn cpu(dtype: Precision) -> String {
    #[cfg(target_arch = "x86_64")]
    let units = match () {
        () if std::is_x86_feature_detected!("avx512f") => " with AVX-512",
        () if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") => " with AVX2",
        () => "",
    };
    #[cfg(not(target_arch = "x86_64"))]
    let units = "";
    let of_bf16 = (dtype == Precision::Bf16).then(|| lowkey_kernels::device::cpu_bf16().unwrap_or("no instructions"));
    let of_bf16 = of_bf16.map_or(String::new(), |unit| format!(" and {unit} for bf16"));
    format!("{}{units}{of_bf16}", std::env::consts::ARCH)
}

/// The cores that this process may run on, as the system lists them.
fn cores() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    list.unwrap_or_default().trim().to_owned()
}

/// The first key whose value differs, with both.
fn differing_key(own: &str, first: &str) -> String {
    type Keys = BTreeSet<(String, String)>;
    fn walk(at: &str, value: &toml::Value, keys: &mut Keys) {
        match value {
            toml::Value::Table(table) => table.iter().for_each(|(key, value)| {
                let at = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
                walk(&at, value, keys);
            }),
            value => _ = keys.insert((at.to_owned(), value.to_string())),
        }
    }
    let keys = |text: &str| {
        let mut keys = Keys::new();
        let table = toml::from_str::<toml::Table>(text).unwrap_or_default();
        walk("", &toml::Value::Table(table), &mut keys);
        keys
    };
    let (own, first) = (keys(own), keys(first));
    let value = |of: &Keys, key: &str| {
        of.iter().find(|(known, _)| known == key).map_or("(absent)".to_owned(), |(_, value)| value.clone())
    };
    match own.symmetric_difference(&first).next() {
        Some((key, _)) => format!("{key} = {} there, {} on rank 0", value(&own, key), value(&first, key)),
        None => "it is written differently".to_owned(),
    }
}

/// Threads for each rank: those of its cores, which it may have to share with others.
fn threads(cards: &[Card]) -> usize {
    let own = |card: &Card| card.threads / cards.iter().filter(|other| other.place == card.place).count().max(1);
    cards.iter().map(own).min().unwrap_or(1).max(1)
}

/// Meets the other ranks of a run before anything is opened, and says how many threads each has where the run file does not.
///
/// # Errors
/// [`Error::Config`] for a run that several ranks cannot share, [`Error::Launch`] naming the first rank that is not of this run.
pub(crate) fn compare(ranks: &Ranks, config: &RunConfig, options: &RunOptions, device: &Device) -> Result<usize> {
    if !ranks.are_several() {
        return Ok(available_threads());
    }
    let own = check(ranks, config).and_then(|()| {
        let (precision, environment) = (config.training.dtype, &options.environment);
        let task = Task { what: RUN_FILE, toml: config.to_toml()?, device, precision, environment };
        Card::of_this(ranks, task, [options.resume, options.overwrite])
    });
    meet(ranks, own, RUN_FILE)
}

/// The same for a job that is no run: says how many threads each has where nothing else does.
///
/// # Errors
/// As for a run, but for what its file says.
pub fn compare_job(ranks: &Ranks, task: Task) -> Result<usize> {
    if !ranks.are_several() {
        return Ok(available_threads());
    }
    let what = task.what;
    meet(ranks, Card::of_this(ranks, task, [false; 2]), what)
}

/// What the file of a run is called.
const RUN_FILE: &str = "run file";

fn meet(ranks: &Ranks, own: Result<Card>, what: &str) -> Result<usize> {
    let own = own.map(|card| serde_json::to_vec(&card).unwrap_or_default());
    let cards = ranks.gather(Meeting::Begin, own)?;
    let read = |bytes: &Vec<u8>| serde_json::from_slice::<Card>(bytes);
    let cards: Vec<Card> = cards.iter().map(read).collect::<std::result::Result<_, _>>().map_err(|_| {
        let why = "the ranks are of different versions of lowkey; start one program".to_owned();
        Error::Launch { why }
    })?;
    for (rank, card) in cards.iter().enumerate() {
        if let Some(why) = card.differs(&cards[0], what) {
            let (size, machine) = (ranks.size(), &card.place.0);
            return Err(Error::Launch { why: format!("rank {rank} of {size} (on {machine}) {why}") });
        }
    }
    Ok(threads(&cards))
}

/// Refuses what ranks cannot share.
fn check(ranks: &Ranks, config: &RunConfig) -> Result<()> {
    let size = ranks.size();
    let batch = config.training.batch_size;
    if !batch.is_multiple_of(size) {
        let why = format!("must be a multiple of {size}, the number of ranks: each has as many rows");
        return Err(Error::config("training.batch_size", batch, why));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::TinyRun;

    fn card(machine: &str, cores: &str, threads: usize) -> Card {
        Card {
            version: "1".into(),
            program: "0123456789abcdef".into(),
            arithmetic: "x86_64".into(),
            place: (machine.into(), cores.into()),
            threads,
            task: "[run]\nname = \"a\"\n[optimizer]\nlr = 0.1\n".into(),
            options: [false; 2],
        }
    }

    #[test]
    fn ranks_share_the_cores_that_they_share() {
        for (cards, expected) in [
            (vec![card("a", "0-7", 8)], 8),
            (vec![card("a", "0-7", 8), card("a", "0-7", 8)], 4),
            // Bound to cores of their own.
            (vec![card("a", "0-3", 4), card("a", "4-7", 4)], 4),
            (vec![card("a", "0-7", 8), card("b", "0-7", 8)], 8),
            (vec![card("a", "0-7", 8), card("b", "0-1", 2)], 2),
            (vec![card("a", "0", 1), card("a", "0", 1)], 1),
        ] {
            assert_eq!(threads(&cards), expected, "{cards:?}");
        }
    }

    #[test]
    fn what_differs_is_named() {
        let first = card("a", "0", 1);
        assert_eq!(card("b", "1-2", 2).differs(&first, RUN_FILE), None);
        let lower = Card { task: first.task.replace("0.1", "0.01"), ..first.clone() };
        let longer = Card { task: format!("{}[training]\nsteps = 3\n", first.task), ..first.clone() };
        for (card, expected) in [
            (Card { version: "2".into(), ..first.clone() }, "is lowkey 2, and rank 0 is 1"),
            (Card { program: "f123456789abcdef".into(), ..first.clone() }, "is another build than rank 0"),
            (Card { arithmetic: "aarch64".into(), ..first.clone() }, "computes on aarch64, and rank 0 on x86_64"),
            (lower, "optimizer.lr = 0.01 there, 0.1 on rank 0"),
            (longer, "training.steps = 3 there, (absent) on rank 0"),
            (Card { options: [true, false], ..first.clone() }, "other options"),
        ] {
            let found = card.differs(&first, RUN_FILE).unwrap();
            assert!(found.contains(expected), "{found}");
        }
    }

    #[test]
    fn a_process_by_itself_has_all_cores_and_compares_nothing() {
        let run = TinyRun::new();
        let config = run.config(&["training.batch_size=7"]);
        assert_eq!(compare(&Ranks::default(), &config, &run.options(), &Device::flex()).unwrap(), available_threads());
    }
}
