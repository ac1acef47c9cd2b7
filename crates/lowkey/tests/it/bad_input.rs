//! What the program says to bad input: the exit code that it promises, a message that names the file, the key and the mend,
//! and nothing lost.

mod fixture;
mod hub;
mod measurements;
mod models;
mod places;
mod run_files;
mod runs;
mod tables;
mod texts;
mod words;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use fixture::Fixture;

/// No bad input may keep the program busy for longer.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Nor take more memory, in KiB of addresses.
const MEMORY: u32 = 3 << 19;
/// Cases at a time.
const THREADS: usize = 2;

/// What prepares a case's folder.
type Arrange = Box<dyn Fn(&Fixture, &Path) + Send + Sync>;

/// A command on bad input, and what must come of it.
struct Case {
    name: String,
    /// Applied in order in the case's own folder, which holds `text.txt` and `run.toml`.
    arrange: Vec<Arrange>,
    arguments: Vec<String>,
    environment: Vec<(&'static str, String)>,
    /// Largest file that the process may write, in blocks of 512 bytes (some shells count 1024).
    file_limit: Option<u32>,
    /// The exit codes that will do.
    codes: Vec<i32>,
    /// What standard error must contain; of a command that succeeds, either output.
    fragments: Vec<String>,
    /// Files that the command may change, such as `run/metrics.jsonl`; a folder's name ends in `/`.
    may_change: Vec<&'static str>,
    /// Commands that must succeed afterwards.
    then: Vec<Vec<String>>,
}

/// A command line, expected to fail with exit code 1.
fn case(name: impl Into<String>, arguments: &[&str]) -> Case {
    Case {
        name: name.into(),
        arrange: Vec::new(),
        arguments: arguments.iter().map(|a| (*a).to_string()).collect(),
        environment: Vec::new(),
        file_limit: None,
        codes: vec![1],
        fragments: Vec::new(),
        may_change: Vec::new(),
        then: Vec::new(),
    }
}

impl Case {
    fn with(mut self, arrange: impl Fn(&Fixture, &Path) + Send + Sync + 'static) -> Self {
        self.arrange.push(Box::new(arrange));
        self
    }

    /// Writes a file into the case's folder.
    fn file(self, name: &'static str, bytes: impl Into<Vec<u8>>) -> Self {
        let bytes = bytes.into();
        self.with(move |_, dir| fs::write(dir.join(name), &bytes).unwrap())
    }

    fn variable(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.environment.push((name, value.into()));
        self
    }

    fn limit(mut self, blocks: u32) -> Self {
        self.file_limit = Some(blocks);
        self
    }

    fn code(mut self, code: i32) -> Self {
        self.codes = vec![code];
        self
    }

    /// The command fails, as one that failed or as one that was used wrongly.
    fn refused(mut self) -> Self {
        self.codes = vec![1, 2];
        self
    }

    fn says(mut self, fragments: &[&str]) -> Self {
        self.fragments.extend(fragments.iter().map(|f| (*f).to_string()));
        self
    }

    fn may_change(mut self, files: &[&'static str]) -> Self {
        self.may_change.extend(files);
        self
    }

    fn then(mut self, arguments: &[&str]) -> Self {
        self.then.push(arguments.iter().map(|a| (*a).to_string()).collect());
        self
    }

    /// Everything that is wrong with how the program took it.
    fn faults(&self, fixture: &Fixture, dir: &Path) -> Vec<String> {
        fs::create_dir(dir).unwrap();
        fixture.give(dir, &["text.txt", "run.toml"]);
        for arrange in &self.arrange {
            arrange(fixture, dir);
        }
        let before = files(dir);
        let (code, out, err) = match self.run(dir, &self.arguments) {
            Ok(ended) => ended,
            Err(fault) => return vec![fault],
        };
        let mut faults = Vec::new();
        if !code.is_some_and(|code| self.codes.contains(&code)) {
            faults.push(format!("exit code {code:?}, expected {:?}", self.codes));
        }
        let succeeds = self.codes == [0];
        let said = if succeeds { format!("{out}\n{err}") } else { err.clone() };
        for fragment in self.fragments.iter().filter(|fragment| !said.contains(fragment.as_str())) {
            faults.push(format!("does not say {fragment:?}"));
        }
        let unwanted = [
            "internal error",
            "panicked",
            "backtrace",
            "/rustc/",
            ".cargo",
            // Whoever reads a device without end learns of it here.
            "allocate memory",
            "memory allocation",
            // Nobody's words may steer the terminal.
            "\u{1b}",
            env!("CARGO_MANIFEST_DIR"),
        ];
        for text in unwanted.iter().filter(|text| out.contains(**text) || err.contains(**text)) {
            faults.push(format!("says {text:?}"));
        }
        // `verify` lists what does not hold.
        if !succeeds && self.arguments[0] != "verify" && !err.contains("error: ") {
            faults.push("no line begins with \"error: \"".to_string());
        }
        let after = files(dir);
        for (path, bytes) in &before {
            let named = |name: &&str| path == Path::new(name) || name.ends_with('/') && path.starts_with(name);
            if !self.may_change.iter().any(named) && after.get(path) != Some(bytes) {
                faults.push(format!("{} was changed or removed", path.display()));
            }
        }
        for arguments in &self.then {
            match self.run_freely(dir, arguments) {
                Ok((Some(0), ..)) => {}
                ended => faults.push(format!("afterwards {arguments:?} ended with {ended:?}")),
            }
        }
        if !faults.is_empty() {
            faults.push(format!("arguments {:?}\n--- stdout\n{out}--- stderr\n{err}", self.arguments));
        }
        faults
    }

    fn run(&self, dir: &Path, arguments: &[String]) -> Result<(Option<i32>, String, String), String> {
        let mut command = if cfg!(unix) {
            // With the signal ignored, a write past the limit fails as one to a full disk does.
            let files = self.file_limit.map_or(String::new(), |blocks| format!("trap '' XFSZ; ulimit -f {blocks}; "));
            let mut shell = Command::new("sh");
            // Some systems cannot limit memory.
            let script = format!("{files}ulimit -v {MEMORY} 2>/dev/null; exec \"$0\" \"$@\"");
            shell.args(["-c", &script, env!("CARGO_BIN_EXE_lowkey")]);
            shell
        } else {
            Command::new(env!("CARGO_BIN_EXE_lowkey"))
        };
        command.args(arguments).envs(self.environment.iter().map(|(name, value)| (name, value)));
        finish(command, dir)
    }

    fn run_freely(&self, dir: &Path, arguments: &[String]) -> Result<(Option<i32>, String, String), String> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lowkey"));
        command.args(arguments);
        finish(command, dir)
    }
}

/// Runs a command in `dir` to its end, or to the end of patience. Output goes through files: a pipe that nobody empties
/// would stop the process.
fn finish(mut command: Command, dir: &Path) -> Result<(Option<i32>, String, String), String> {
    let (out, err) = (dir.with_extension("stdout"), dir.with_extension("stderr"));
    let open = |path: &PathBuf| Stdio::from(fs::File::create(path).unwrap());
    command.current_dir(dir).stdin(Stdio::null()).stdout(open(&out)).stderr(open(&err));
    let started = Instant::now();
    let mut child = command.spawn().map_err(|e| format!("does not start: {e}"))?;
    let status: ExitStatus = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if started.elapsed() > TIMEOUT {
            child.kill().unwrap();
            child.wait().unwrap();
            return Err(format!("still running after {TIMEOUT:?}"));
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let text = |path: &PathBuf| String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned();
    Ok((status.code(), text(&out), text(&err)))
}

/// All files below `dir` with their bytes; of a link, where it points, and of what is no file, what it is.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    fn walk(root: &Path, dir: &Path, found: &mut BTreeMap<PathBuf, Vec<u8>>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(root).unwrap().to_path_buf();
            if path.is_symlink() {
                found.insert(name, fs::read_link(&path).unwrap().to_string_lossy().into_owned().into_bytes());
            } else if path.is_dir() {
                walk(root, &path, found);
            } else if path.is_file() {
                found.insert(name, fs::read(&path).unwrap());
            } else {
                // A pipe or a socket has no bytes of its own.
                found.insert(name, format!("{:?}", path.metadata().unwrap().file_type()).into_bytes());
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(dir, dir, &mut found);
    found
}

#[test]
fn bad_input_is_refused_with_a_message_that_helps() {
    let fixture = Fixture::new();
    let mut cases = run_files::cases();
    cases.extend(texts::cases());
    cases.extend(models::cases());
    cases.extend(runs::cases());
    cases.extend(measurements::cases());
    cases.extend(places::cases());
    cases.extend(tables::cases());
    cases.extend(words::cases());
    cases.extend(hub::cases());
    println!("{} bad inputs", cases.len());
    assert!(cases.len() >= 300, "{} cases", cases.len());

    let (next, faults) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while let Some((i, case)) =
                    Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|i| Some((i, cases.get(i)?)))
                {
                    let dir = fixture.root().join(format!("case-{i}"));
                    let found = case.faults(&fixture, &dir);
                    if !found.is_empty() {
                        faults.lock().unwrap().push(format!("== {}\n{}", case.name, found.join("\n")));
                    }
                    fs::remove_dir_all(&dir).unwrap();
                }
            });
        }
    });
    let faults = faults.into_inner().unwrap();
    assert!(faults.is_empty(), "{} of {} cases:\n{}", faults.len(), cases.len(), faults.join("\n\n"));
}
