//! Small models, batches and runs that the tests of several modules share.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::{Device, Tensor};
use lowkey_batch::{Batch, IGNORE};
use lowkey_kernels::Precision;
use lowkey_model::{CausalLm, ModelConfig, Parameter, Recompute, config::ModelSection, objective::Term};
use tempfile::TempDir;

use crate::error::Result;
use crate::event::{Event, Outcome, RunOptions};
use crate::metrics::Metrics;
use crate::optimizer::Optimizer;
use crate::run_config::{OptimizerKind, OptimizerSection, RunConfig};
use crate::train::train;
use crate::workers::{PassSettings, Workers};
use crate::world::Replica;

/// The CPU, or the device that `LOWKEY_TEST_DEVICE` names; records gradients.
pub(crate) fn test_device() -> Device {
    let name = std::env::var("LOWKEY_TEST_DEVICE").unwrap_or_else(|_| "cpu".into());
    lowkey_kernels::device::open(&name).unwrap().autodiff()
}

/// An optimiser's numbers, without clipping.
pub(crate) fn optimizer_section(kind: OptimizerKind) -> OptimizerSection {
    OptimizerSection {
        kind,
        lr: 1e-2,
        momentum: None,
        betas: [0.9, 0.95],
        eps: 1e-8,
        weight_decay: 0.1,
        grad_clip: None,
        layer_lr_decay: None,
        loraplus_lr_ratio: None,
    }
}

/// A replica of a small model with an optimiser, on the test device and one thread.
pub(crate) fn replica(kind: OptimizerKind) -> Replica {
    let section = optimizer_section(kind);
    let device = test_device();
    let model = model(29, 16, 5, &device);
    let optimizer = Optimizer::new(&section, &model.parameters(), Parameter::is_matrix);
    Replica { device, model, optimizer, workers: Workers::new(1, 1).unwrap(), gate: None, other: None }
}

/// A small `[model]` section.
pub(crate) const MODEL: &str = "
attention = \"mla\"
hidden_size = 16
num_hidden_layers = 2
num_attention_heads = 2
kv_lora_rank = 8
qk_nope_head_dim = 6
qk_rope_head_dim = 4
v_head_dim = 6
intermediate_size = 24
attention_bias = true
";

pub(crate) fn model_config(vocab: usize, positions: usize) -> ModelConfig {
    toml::from_str::<ModelSection>(MODEL).unwrap().resolve(vocab, positions).unwrap().0
}

pub(crate) fn model(vocab: usize, positions: usize, seed: u64, device: &Device) -> CausalLm {
    CausalLm::init(&model_config(vocab, positions), seed, device)
}

/// Passes of `micro_batch` rows, nothing computed twice.
pub(crate) fn passes(micro_batch: usize) -> PassSettings<'static> {
    PassSettings {
        micro_batch,
        recompute: Recompute::None,
        terms: &[Term::NEXT],
        precision: Precision::F32,
        loss_scale: 1.0,
        seed: 0,
        step: 0,
        noise: None,
        other: None,
    }
}

pub(crate) fn values(tensor: &Tensor<1>) -> Vec<f32> {
    tensor.try_to_vec_as::<f32>().unwrap()
}

/// Every number of every tensor, as bits.
pub(crate) fn bits<'a>(tensors: impl IntoIterator<Item = &'a Tensor<1>>) -> Vec<u32> {
    tensors.into_iter().flat_map(|tensor| values(tensor).into_iter().map(f32::to_bits)).collect()
}

pub(crate) fn weight_bits(model: &CausalLm) -> Vec<u32> {
    bits(&model.parameters().into_iter().map(|p| p.value).collect::<Vec<_>>())
}

/// Numbers that look random and are the same everywhere.
pub(crate) struct Lcg(pub(crate) u64);

impl Lcg {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % n as u64) as usize
    }
}

/// Rows of several documents each, with targets unevenly spread: row r lacks about r of `rows` parts of them, so that the
/// first row has every target and the last one next to none.
pub(crate) fn uneven_batch(rows: usize, seq_len: usize, vocab: usize, seed: u64) -> Batch {
    let mut random = Lcg(seed);
    let mut batch = Batch { rows, seq_len, ..Batch::default() };
    for row in 0..rows {
        let mut start = 0;
        for at in 0..seq_len {
            if at > 0 && random.below(5) == 0 {
                start = at;
            }
            batch.input_ids.push(random.below(vocab) as u32);
            batch.document_starts.push(start as u32);
            let ignored = random.below(rows) < row;
            batch.targets.push(if ignored { IGNORE } else { random.below(vocab) as i64 });
        }
    }
    batch
}

/// A run in a temporary folder: a text of simple sentences, a run file, and the run's folder.
pub(crate) struct TinyRun {
    pub(crate) dir: TempDir,
    pub(crate) resume: bool,
    pub(crate) overwrite: bool,
}

pub(crate) const STEPS: u64 = 40;

impl TinyRun {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("text.txt"), text()).unwrap();
        let run = format!(
            "[run]\nname = \"tiny\"\nseed = 3\n[model]{MODEL}[data]\npath = \"text.txt\"\nseq_len = 24\n[optimizer]\nlr = 1e-2\n\
             weight_decay = 0.1\ngrad_clip = 1.0\n[lr_scheduler]\nkind = \"cosine\"\nwarmup_steps = 1\n[training]\n\
             steps = {STEPS}\nbatch_size = 8\nthreads = 2\n[eval]\nevery = 10\nbatches = 2\nprompts = [\"the \"]\n\
             sample_tokens = 5\n[checkpoint]\nevery = 8\n"
        );
        std::fs::write(dir.path().join("tiny.toml"), run).unwrap();
        Self { dir, resume: false, overwrite: false }
    }

    /// The same run, gone on with.
    pub(crate) fn resumed(self) -> Self {
        Self { resume: true, ..self }
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.dir.path().join("tiny.toml")
    }

    pub(crate) fn out(&self) -> PathBuf {
        self.dir.path().join("out")
    }

    pub(crate) fn checkpoint(&self, step: u64) -> PathBuf {
        self.out().join(format!("checkpoints/step-{step:06}"))
    }

    pub(crate) fn config(&self, overrides: &[&str]) -> RunConfig {
        let overrides: Vec<String> = overrides.iter().map(|o| (*o).to_string()).collect();
        RunConfig::load(&self.file(), &overrides).unwrap()
    }

    pub(crate) fn options(&self) -> RunOptions {
        RunOptions {
            run_file: self.file(),
            out: self.out(),
            resume: self.resume,
            overwrite: self.overwrite,
            turn: 0,
            environment: serde_json::Map::new(),
        }
    }

    pub(crate) fn train(&self, overrides: &[&str]) -> Result<Outcome> {
        self.watch(overrides, &AtomicBool::new(false), &mut |_| {})
    }

    pub(crate) fn watch(
        &self,
        overrides: &[&str],
        interrupt: &AtomicBool,
        observe: &mut dyn FnMut(Event),
    ) -> Result<Outcome> {
        train(&self.config(overrides), &self.options(), interrupt, observe)
    }

    /// Trains until it is interrupted after a step.
    pub(crate) fn stop_after(&self, overrides: &[&str], step: u64) -> Result<Outcome> {
        let interrupt = AtomicBool::new(false);
        self.watch(overrides, &interrupt, &mut |event| {
            if matches!(event, Event::Step(metrics) if metrics.step == step) {
                interrupt.store(true, Ordering::Relaxed);
            }
        })
    }

    /// The run, stopped after each of these steps and gone on with to its end.
    pub(crate) fn interrupted(self, overrides: &[&str], stops: &[u64]) -> Self {
        let mut run = self;
        for stop in stops {
            assert_eq!(run.stop_after(overrides, *stop).unwrap().step, *stop);
            run = run.resumed();
        }
        run.train(overrides).unwrap();
        run
    }

    /// Holds files of the last checkpoint to those of another run, byte by byte.
    pub(crate) fn assert_ends_as(&self, other: &Self, files: &[&str]) {
        for file in files {
            let read = |run: &Self| std::fs::read(run.checkpoint(STEPS).join(file)).unwrap();
            assert!(read(self) == read(other), "{file} differs");
        }
    }

    pub(crate) fn metrics(&self) -> Vec<Metrics> {
        let text = std::fs::read_to_string(self.out().join("metrics.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

/// Names of what is in a folder, sorted.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let name = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<String> = std::fs::read_dir(dir).unwrap().map(name).collect();
    names.sort();
    names
}

/// Sentences of few words: easy to learn, and far from uniform.
pub(crate) fn text() -> String {
    let mut random = Lcg(11);
    let mut sentence = || {
        let nouns = ["cat", "dog", "hen", "fox"];
        let verbs = ["sees", "likes", "hunts"];
        format!("the {} {} the {}.\n", nouns[random.below(4)], verbs[random.below(3)], nouns[random.below(4)])
    };
    (0..400).map(|_| sentence()).collect()
}
