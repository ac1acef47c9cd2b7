//! A run that is killed at any moment and goes on ends with the same bits as one that nobody disturbed.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use burn::tensor::Device;
use lowkey_model::ModelDir;
use lowkey_train::{RunConfig, checkpoint};
use serde_json::Value;
use tempfile::TempDir;

const STEPS: u64 = 300;
const KILLS: u64 = 20;
/// Files of a checkpoint.
const FILES: usize = 8;
/// No wait in these tests takes nearly as long.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a run trains, and on what.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// A new model on a text.
    Whole,
    /// An adapter beside a model, on answers in conversations.
    Adapter,
    /// An adapter beside a model, on pairs of answers (DPO).
    Preferences,
}

impl Kind {
    /// Its part of a run file.
    fn tables(self) -> String {
        let adapter = |lr: f64| {
            format!(
                "[init]\nfrom = \"base/checkpoints/best\"\n\
                 [adapter]\ntarget_modules = \"all-linear\"\nr = 3\nlora_dropout = 0.1\n\
                 [data]\ndataset = \"records.toml\"\nseq_len = 512\ntoo_long = \"drop\"\n[optimizer]\nlr = {lr}\n"
            )
        };
        match self {
            Self::Whole => {
                format!("[model]\n{MODEL}[data]\npath = \"text.txt\"\nseq_len = 32\n[optimizer]\nlr = 1e-2\n")
            }
            Self::Adapter => adapter(1e-2),
            Self::Preferences => format!("[[objective]]\nkind = \"preference\"\n{}", adapter(1e-3)),
        }
    }

    /// The file of the trained weights in a checkpoint.
    fn weights(self) -> &'static str {
        if self == Self::Whole { "model.safetensors" } else { "adapter_model.safetensors" }
    }

    /// Files of a checkpoint.
    fn files(self) -> usize {
        if self == Self::Whole { FILES } else { FILES + 1 }
    }
}

const MODEL: &str = "attention = \"mla\"\nhidden_size = 24\nnum_hidden_layers = 1\nnum_attention_heads = 2\n\
                     kv_lora_rank = 8\nqk_nope_head_dim = 8\nqk_rope_head_dim = 4\nv_head_dim = 8\nintermediate_size = 32\n";

/// A folder with a text and a run file; the run is in `out`.
struct Bench {
    dir: TempDir,
    kind: Kind,
}

impl Bench {
    fn new() -> Self {
        Self::of(Kind::Whole)
    }

    fn of(kind: Kind) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut random = Random(4);
        let words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs"];
        let text: String = (0..6000).map(|_| format!("{} ", words[random.below(10) as usize])).collect();
        std::fs::write(dir.path().join("text.txt"), text).unwrap();
        let run = format!(
            "[run]\nname = \"killed\"\nseed = 5\n{}weight_decay = 0.1\ngrad_clip = 1.0\n\
             [lr_scheduler]\nkind = \"wsd\"\nwarmup_steps = 5\n\
             [training]\nsteps = {STEPS}\nbatch_size = 8\nmicro_batch_size = 4\nthreads = 2\n\
             [eval]\nevery = 7\nbatches = 2\nprompts = [\"the \"]\nsample_tokens = 8\n\
             [checkpoint]\nevery = 2\nkeep = 2\n[metrics]\ntensorboard = true\n",
            kind.tables()
        );
        std::fs::write(dir.path().join("run.toml"), run).unwrap();
        let bench = Self { dir, kind };
        if kind != Kind::Whole {
            bench.begin();
        }
        bench
    }

    /// The model that an adapter stands beside, and records.
    fn begin(&self) {
        let form = if self.kind == Kind::Preferences { "pairs" } else { "chat" };
        let records = format!(
            "name = \"records\"\ndescription = \"Told\"\nlicense = \"MIT\"\n[tokenizer]\nkind = \"bytes\"\n\
             [source]\nkind = \"storybook\"\nseed = 2\ndocuments = 200\nvalidation_documents = 20\nform = \"{form}\"\n\
             [chat]\ntemplate = \"turns.jinja\"\n"
        );
        std::fs::write(self.path("records.toml"), records).unwrap();
        let turns = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %} {{ m.content }}{{ eos_token }}\
                     {% endgeneration %}{% else %} {{ m.content }}{% endif %}{% endfor %}";
        std::fs::write(self.path("turns.jinja"), turns).unwrap();
        let base = format!(
            "[run]\nname = \"base\"\nseed = 1\n[model]\n{MODEL}max_position_embeddings = 512\n\
             [data]\npath = \"text.txt\"\nseq_len = 64\n[optimizer]\nlr = 1e-2\n[training]\nsteps = 2\nbatch_size = 2\n"
        );
        std::fs::write(self.path("base.toml"), base).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_lowkey"));
        let output =
            command.args(["train", "base.toml", "--out", "base"]).current_dir(self.dir.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn checkpoints(&self) -> PathBuf {
        self.path("out/checkpoints")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lowkey"));
        command.args(["train", "run.toml", "--out", "out"]).args(arguments).current_dir(self.dir.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Starts a run that nobody listens to.
    fn start(&self, resume: bool) -> Child {
        let arguments: &[&str] = if resume { &["--resume"] } else { &[] };
        self.command(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    /// Runs to the end; returns what was printed.
    fn finish(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        let printed = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{printed}");
        printed
    }

    /// Whole lines of `metrics.jsonl`.
    fn metrics(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path("out/metrics.jsonl")).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn progress(&self) -> u64 {
        self.metrics().last().map_or(0, |line| line["step"].as_u64().unwrap())
    }

    /// Names in the folder of checkpoints, sorted; none before there is one.
    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.checkpoints()).into_iter().flatten();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Every checkpoint is whole: it verifies and loads, and so does the one that `best` points to.
    fn check_checkpoints(&self, when: &str) {
        let names = self.names();
        let visible: Vec<&String> = names.iter().filter(|name| !name.starts_with('.')).collect();
        for name in &visible {
            let path = self.checkpoints().join(name);
            checkpoint::verify(&path).unwrap_or_else(|e| panic!("{when}: {e}"));
            let model = ModelDir::open(&path).and_then(|dir| dir.load(&Device::flex()));
            model.unwrap_or_else(|e| panic!("{when}: {e}"));
        }
        // Checkpoints are written every second step, and the seventh is the first that is measured.
        let steps: Vec<u64> = visible.iter().filter_map(|name| name.strip_prefix("step-")?.parse().ok()).collect();
        let best = names.iter().any(|name| name == "best");
        assert!(best || steps.iter().all(|step| *step <= 7), "{when}: no best among {names:?}");
    }

    /// At this very moment no checkpoint stands there in parts, written or removed.
    fn check_presence(&self) {
        for name in self.names().iter().filter(|name| name.starts_with("step-")) {
            let path = self.checkpoints().join(name);
            let files = std::fs::read_dir(&path).into_iter().flatten().flatten().count();
            // Where the folder is gone by now, it was moved away before it was emptied.
            assert!(files == self.kind.files() || !path.exists(), "{name} has {files} files while the run goes on");
        }
    }

    /// What must be equal of two runs: the files of the last checkpoint, and the figures of each step without its times.
    fn result(&self) -> (Vec<u8>, Vec<u8>, Vec<Value>) {
        let last = self.checkpoints().join(format!("step-{STEPS:06}"));
        let read = |name: &str| std::fs::read(last.join(name)).unwrap();
        let mut lines = self.metrics();
        for line in &mut lines {
            for time in ["time_s", "tokens_per_s", "mfu"] {
                line.as_object_mut().unwrap().remove(time).unwrap();
            }
        }
        (read(self.kind.weights()), read("trainer.safetensors"), lines)
    }

    fn assert_same_result(&self, unbroken: &Self) {
        let (model, moments, lines) = self.result();
        let expected = unbroken.result();
        assert!(model == expected.0, "the weights differ");
        assert!(moments == expected.1, "the optimiser's moments differ");
        assert_eq!(lines, expected.2);
        let steps: Vec<u64> = lines.iter().map(|line| line["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, (1..=STEPS).collect::<Vec<_>>());
        assert!(
            lines.iter().all(|line| line["train_loss"].is_f64() && line["lr"].is_f64() && line["grad_norm"].is_f64())
        );
        assert_eq!(lines.iter().filter(|line| line["val_loss"].is_f64()).count() as u64, STEPS / 7 + 1);
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// Waits until something holds or the process has ended; whether it holds. Looks at the checkpoints meanwhile.
fn wait(bench: &Bench, child: &mut Child, holds: impl Fn() -> bool) -> bool {
    let started = Instant::now();
    while !holds() {
        bench.check_presence();
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        assert!(started.elapsed() < PATIENCE, "nothing happens");
        std::thread::sleep(Duration::from_micros(100));
    }
    true
}

fn kill(child: &mut Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

/// An undisturbed run.
fn unbroken(kind: Kind) -> Bench {
    let bench = Bench::of(kind);
    let printed = bench.finish(&[]);
    assert!(printed.contains("done. Try it"), "{printed}");
    bench
}

#[test]
fn a_run_killed_at_any_moment_ends_with_the_same_bits() {
    killed(Kind::Whole);
}

#[test]
fn a_run_of_an_adapter_killed_at_any_moment_ends_with_the_same_bits() {
    killed(Kind::Adapter);
}

#[test]
fn a_run_on_preferences_killed_at_any_moment_ends_with_the_same_bits() {
    killed(Kind::Preferences);
}

fn killed(kind: Kind) {
    let unbroken = unbroken(kind);
    let bench = Bench::of(kind);
    let mut random = Random(20);
    let (mut killed, mut while_writing) = (0, 0);
    for round in 0..KILLS {
        let mut child = bench.start(round > 0);
        let goal = round * (STEPS - 40) / KILLS + random.below(8);
        let started = Instant::now();
        let alive = match round % 4 {
            // While a checkpoint is being written or removed, once the run has got somewhat further.
            0 | 2 => {
                let hidden = || bench.names().iter().any(|name| name.starts_with('.'));
                let alive = wait(&bench, &mut child, || bench.progress() >= goal) && wait(&bench, &mut child, hidden);
                std::thread::sleep(Duration::from_micros(random.below(2500)));
                alive
            }
            // While it starts, or soon after.
            1 => {
                let pause = Duration::from_millis(random.below(600));
                wait(&bench, &mut child, || started.elapsed() > pause || bench.progress() >= goal)
            }
            // At some step.
            _ => {
                let alive = wait(&bench, &mut child, || bench.progress() >= goal);
                std::thread::sleep(Duration::from_micros(random.below(15_000)));
                alive
            }
        };
        if alive && child.try_wait().unwrap().is_none() {
            killed += 1;
        }
        kill(&mut child);
        while_writing += u64::from(bench.names().iter().any(|name| name.starts_with('.')));
        bench.check_checkpoints(&format!("kill {round} after step {}", bench.progress()));
    }
    assert_eq!(killed, KILLS, "the run ended before its time");
    println!("{while_writing} of {KILLS} kills met a checkpoint half-written or half-removed");
    assert!(while_writing >= 3, "only {while_writing} kills met a checkpoint half-written");
    assert!(bench.progress() < STEPS);
    bench.finish(&["--resume"]);
    bench.assert_same_result(&unbroken);
    bench.check_checkpoints("at the end");
    assert!(bench.names().iter().all(|name| !name.starts_with('.')), "{:?}", bench.names());
}

#[test]
#[cfg(unix)]
fn an_interrupted_run_says_how_to_go_on_and_does() {
    let unbroken = unbroken(Kind::Whole);
    let bench = Bench::new();
    let mut child = bench.command(&[]).spawn().unwrap();
    assert!(wait(&bench, &mut child, || bench.progress() >= 9));
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let (printed, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(130), "{printed}{complained}");
    assert!(complained.contains("stopping after this step"), "{complained}");
    let step = bench.progress();
    assert!((9..STEPS).contains(&step));
    let advice = format!("stopped after step {step}. Go on with: lowkey train run.toml --out out --resume");
    assert!(printed.contains(&advice), "{printed}");
    checkpoint::verify(&bench.checkpoints().join(format!("step-{step:06}"))).unwrap();
    bench.check_checkpoints("after the interruption");

    // What it said is taken at its word.
    let (_, advised) = advice.split_once("--out out ").unwrap();
    let printed = bench.finish(&[advised]);
    assert!(printed.contains(&format!("resuming after step {step} of {STEPS}")), "{printed}");
    bench.assert_same_result(&unbroken);
}

#[test]
#[cfg(unix)]
fn a_run_that_a_job_manager_ends_says_so_by_its_exit_code() {
    let bench = Bench::new();
    let mut child = bench.command(&[]).spawn().unwrap();
    assert!(wait(&bench, &mut child, || bench.progress() >= 9));
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(143), "{}", String::from_utf8_lossy(&output.stderr));
    bench.check_checkpoints("after it was ended");
}

#[test]
fn a_resumed_run_keeps_its_number_of_threads() {
    let bench = Bench::new();
    let short = ["--set", "training.steps=6"];
    bench.finish(&[&short[..], &["--set", "training.threads=3"]].concat());
    let file = bench.path("run.toml");
    let text = std::fs::read_to_string(&file).unwrap().replace("threads = 2\n", "");
    std::fs::write(&file, text).unwrap();
    bench.finish(&["--set", "training.steps=8", "--resume"]);
    let threads = |path: &Path| RunConfig::load(path, &[]).unwrap().training.threads;
    assert_eq!((threads(&file), threads(&bench.path("out/run.toml"))), (None, Some(3)));
    let environment = std::fs::read_to_string(bench.path("out/environment.json")).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&environment).unwrap()["threads"], 3);
    assert_eq!(bench.progress(), 8);
}
