//! A folder with a run in it, and jobs that train it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// No wait in these tests takes nearly as long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

const MODEL: &str = "attention = \"mla\"\nhidden_size = 16\nnum_hidden_layers = 2\nnum_attention_heads = 2\nkv_lora_rank = 8\n\
                     qk_nope_head_dim = 6\nqk_rope_head_dim = 4\nv_head_dim = 6\nintermediate_size = 24\nattention_bias = true\n";

const REST: &str = "[optimizer]\nlr = 1e-2\nweight_decay = 0.1\ngrad_clip = 1.0\n[lr_scheduler]\nkind = \"cosine\"\nwarmup_steps = 1\n\
                    [training]\nsteps = 12\nbatch_size = 24\nthreads = 1\n[eval]\nevery = 5\nbatches = 2\nprompts = [\"the \"]\n\
                    sample_tokens = 5\n[checkpoint]\nevery = 4\n[metrics]\ntensorboard = true\n";

/// A folder with texts and run files.
pub(crate) struct Bench(TempDir);

impl Bench {
    pub(crate) fn new() -> Self {
        let bench = Self(tempfile::tempdir().unwrap());
        let mut random = 11u64;
        let mut word = |words: &[&'static str]| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            words[(random >> 33) as usize % words.len()]
        };
        let (nouns, verbs) = (["cat", "dog", "hen", "fox"], ["sees", "likes", "hunts"]);
        let mut sentence = || format!("the {} {} the {}.\n", word(&nouns), word(&verbs), word(&nouns));
        bench.write("text.txt", &(0..400).map(|_| sentence()).collect::<String>());
        bench.write(
            "lines.toml",
            "name = \"lines\"\n[source]\nkind = \"text\"\npaths = [\"text.txt\"]\nseparator = \"\\n\"\n[split]\nvalidation_fraction = 0.2\n",
        );
        let pair =
            |i: usize| format!("{{\"prompt\": \"{i} is\", \"chosen\": \" a number\", \"rejected\": \" a letter\"}}\n");
        bench.write("pairs.jsonl", &(0..60).map(pair).collect::<String>());
        bench.write(
            "pairs.toml",
            "name = \"pairs\"\n[source]\nkind = \"jsonl\"\npaths = [\"pairs.jsonl\"]\nrecords = \"preference\"\n",
        );
        bench.write("run.toml", &run_file(&format!("[model]\n{MODEL}"), "path = \"text.txt\"\nseq_len = 24\n"));
        bench
    }

    /// The same with a model at hand, from which the run file `run.toml` now starts with these sections and data.
    pub(crate) fn beside_a_model(sections: &str, data: &str) -> Self {
        let bench = Self::new();
        bench.train(1, "base", &["--set", "training.steps=4"]).succeeds();
        bench.write(
            "run.toml",
            &run_file(&format!("[init]\nfrom = \"base/checkpoints/step-000004\"\n{sections}"), data),
        );
        bench
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The program on that many ranks; by itself where that is 1.
    pub(crate) fn command(&self, ranks: usize, arguments: &[&str]) -> Command {
        let program = env!("CARGO_BIN_EXE_lowkey");
        if ranks == 1 {
            let mut command = Command::new(program);
            command.args(arguments).current_dir(self.0.path());
            return command;
        }
        self.mpirun(&[&["-n", &ranks.to_string(), program], arguments].concat())
    }

    /// `mpirun` in this folder.
    pub(crate) fn mpirun(&self, arguments: &[&str]) -> Command {
        let starter = Starter::of_this_build();
        let mut command = Command::new(starter.program);
        command.args(arguments).current_dir(self.0.path()).envs(starter.environment.iter().copied());
        command
    }

    /// `run.toml` trained on that many ranks, in the folder `out`, to its end.
    pub(crate) fn train(&self, ranks: usize, out: &str, arguments: &[&str]) -> Ended {
        self.start(ranks, out, arguments).wait()
    }

    /// The same, just begun.
    pub(crate) fn start(&self, ranks: usize, out: &str, arguments: &[&str]) -> Job {
        Job::start(self.command(ranks, &[&["train", "run.toml", "--out", out], arguments].concat()), self.0.path())
    }

    /// Lines of `metrics.jsonl` without what tells the time.
    pub(crate) fn figures(&self, out: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path(out).join("metrics.jsonl")).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let line = |line: &str| {
            let mut figures: Value = serde_json::from_str(line).unwrap();
            for time in ["time_s", "tokens_per_s", "mfu"] {
                figures.as_object_mut().unwrap().remove(time);
            }
            figures
        };
        whole.lines().map(line).collect()
    }

    /// The losses of all steps.
    pub(crate) fn losses(&self, out: &str) -> Vec<f64> {
        self.figures(out).iter().map(|line| line["train_loss"].as_f64().unwrap()).collect()
    }

    /// What must be equal of two runs: weights, the optimiser's memory, the figures of each step, and the last evaluation.
    pub(crate) fn result(&self, out: &str, step: u64) -> Vec<(String, Vec<u8>)> {
        let checkpoint = self.path(out).join(format!("checkpoints/step-{step:06}"));
        let mut files = Vec::new();
        for name in ["model.safetensors", "adapter_model.safetensors", "ema/model.safetensors", "trainer.safetensors"] {
            files.extend(std::fs::read(checkpoint.join(name)).ok().map(|bytes| (name.to_owned(), bytes)));
        }
        assert!(files.len() >= 2, "{out}: {files:?}");
        files.push(("evaluation".into(), std::fs::read(self.path(out).join("evaluation.json")).unwrap_or_default()));
        files.push(("samples".into(), std::fs::read(self.path(out).join("samples.jsonl")).unwrap_or_default()));
        files.extend(self.figures(out).iter().map(|line| (line["step"].to_string(), line.to_string().into_bytes())));
        files
    }

    /// Names of what a run's folder and that of its checkpoints hold.
    pub(crate) fn names(&self, out: &str) -> Vec<String> {
        let names = |dir: PathBuf| {
            std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap())
        };
        let mut all: Vec<String> = names(self.path(out)).chain(names(self.path(out).join("checkpoints"))).collect();
        all.sort();
        all
    }

    /// Holds two runs to each other, bit by bit.
    pub(crate) fn assert_same(&self, a: &str, b: &str, step: u64) {
        let (a_files, b_files) = (self.result(a, step), self.result(b, step));
        let names = |files: &[(String, Vec<u8>)]| files.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&a_files), names(&b_files), "{a} and {b}");
        for ((name, a_bytes), (_, b_bytes)) in a_files.iter().zip(&b_files) {
            let text = |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(400)]).into_owned();
            assert!(a_bytes == b_bytes, "{name} of {a} and {b}:\n{}\n{}", text(a_bytes), text(b_bytes));
        }
    }
}

/// What starts ranks of this build.
pub(crate) struct Starter {
    pub(crate) program: &'static str,
    pub(crate) environment: &'static [(&'static str, &'static str)],
    /// What lets ranks of one machine speak over TCP.
    pub(crate) over_tcp: &'static [(&'static str, &'static str)],
}

/// More ranks than cores, bound to none; in containers, whose users are root and may not read each other's memory.
const OPEN_MPI: Starter = Starter {
    program: "",
    environment: &[
        ("OMPI_MCA_rmaps_base_oversubscribe", "1"),
        ("OMPI_MCA_hwloc_base_binding_policy", "none"),
        ("OMPI_MCA_btl_vader_single_copy_mechanism", "none"),
        ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
        ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
    ],
    over_tcp: &[("OMPI_MCA_btl", "tcp,self")],
};

/// It does so unasked.
const MPICH: Starter =
    Starter { program: "", environment: &[], over_tcp: &[("MPIR_CVAR_NOLOCAL", "1"), ("UCX_TLS", "tcp,self")] };

impl Starter {
    /// The `mpirun` of the MPI that the program was built with: where several are installed, Debian calls the others by their names.
    pub(crate) fn of_this_build() -> &'static Self {
        static FOUND: OnceLock<Starter> = OnceLock::new();
        FOUND.get_or_init(|| {
            let printed = |program: &str, argument: &str| {
                let said = Command::new(program).arg(argument).output().ok()?;
                Some(String::from_utf8_lossy(&said.stdout).into_owned())
            };
            let devices = printed(env!("CARGO_BIN_EXE_lowkey"), "devices").unwrap();
            let (usual, names, said) = match devices.contains("MPI: Open MPI") {
                true => (OPEN_MPI, ["mpirun", "mpirun.openmpi"], "Open MPI"),
                false => (MPICH, ["mpirun", "mpirun.mpich"], "HYDRA"),
            };
            let serves = |name: &&str| printed(name, "--version").is_some_and(|version| version.contains(said));
            let program = names.into_iter().find(serves);
            let program = program.unwrap_or_else(|| panic!("no mpirun of the MPI of this build: {devices}"));
            Starter { program, ..usual }
        })
    }
}

fn run_file(model: &str, data: &str) -> String {
    format!("[run]\nname = \"ranks\"\nseed = 3\n{model}[data]\n{data}{REST}")
}

/// A job under way; it is ended with the test.
pub(crate) struct Job {
    child: Option<Child>,
    dir: PathBuf,
}

impl Job {
    pub(crate) fn start(mut command: Command, dir: &Path) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}; these tests need an mpirun"));
        Self { child: Some(child), dir: dir.canonicalize().unwrap() }
    }

    /// Waits until it is over.
    pub(crate) fn wait(mut self) -> Ended {
        Ended(self.child.take().unwrap().wait_with_output().unwrap())
    }

    /// Waits until a run has taken so many steps.
    pub(crate) fn until(&self, bench: &Bench, out: &str, step: usize) {
        let begun = Instant::now();
        while bench.figures(out).len() < step {
            assert!(begun.elapsed() < PATIENCE, "{out} has not come to step {step}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends a signal to a rank.
    pub(crate) fn signal(&self, rank: usize, signal: &str) {
        let pid = self.pid(rank).to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    /// The process of a rank: one that runs in the folder and is told to be it.
    fn pid(&self, rank: usize) -> u32 {
        let told = [format!("OMPI_COMM_WORLD_RANK={rank}"), format!("PMI_RANK={rank}"), format!("RANK={rank}")];
        let is_it = |pid: &u32| {
            let dir = PathBuf::from(format!("/proc/{pid}"));
            let environment = std::fs::read(dir.join("environ")).unwrap_or_default();
            let mut variables = environment.split(|byte| *byte == 0);
            std::fs::read_link(dir.join("cwd")).is_ok_and(|cwd| cwd == self.dir)
                && variables.any(|variable| told.iter().any(|told| told.as_bytes() == variable))
        };
        let all = std::fs::read_dir("/proc").unwrap();
        let mut all = all.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse::<u32>().ok());
        all.find(is_it).unwrap_or_else(|| panic!("no process is rank {rank}"))
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = Command::new("kill").arg(child.id().to_string()).status();
            let _ = child.wait();
        }
    }
}

/// How a job has ended.
pub(crate) struct Ended(Output);

impl Ended {
    pub(crate) fn printed(&self) -> String {
        format!("{}{}", String::from_utf8_lossy(&self.0.stdout), String::from_utf8_lossy(&self.0.stderr))
    }

    pub(crate) fn succeeds(self) -> String {
        assert!(self.0.status.success(), "{}: {}", self.0.status, self.printed());
        self.printed()
    }

    /// Has failed, and said so once and for all ranks; returns what it said.
    pub(crate) fn fails(self) -> String {
        let printed = self.printed();
        assert!(!self.0.status.success(), "{printed}");
        let errors: Vec<&str> = printed.lines().filter(|line| line.contains("error: ")).collect();
        assert_eq!(errors.len(), 1, "{printed}");
        errors[0].to_owned()
    }

    /// Has ended otherwise than well.
    pub(crate) fn after_a_loss(self) -> String {
        assert!(!self.0.status.success(), "{}", self.printed());
        self.printed()
    }
}
