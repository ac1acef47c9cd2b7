//! Runs on tasks: each is learnt only by models with the ability that it needs; tasks of vectors use the same loop.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use burn::tensor::Device;
use lowkey_data::tasks::theory;
use lowkey_model::CausalLm;
use tempfile::TempDir;

use crate::checkpoint;
use crate::error::Result;
use crate::evaluate::{Evaluation, Held};
use crate::event::{Event, Outcome, RunOptions};
use crate::fixtures::{names, weight_bits};
use crate::metrics::Metrics;
use crate::plan::Plan;
use crate::run_config::RunConfig;
use crate::setup::{planned_model, setup};
use crate::train::train;

/// For runs of a few steps.
const NO_WARMUP: &str = "lr_scheduler.warmup_steps=0";

/// A folder with a task and a run file for it.
struct TaskRun {
    dir: TempDir,
    resume: bool,
}

impl TaskRun {
    fn new(task: &str, seq_len: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let dataset = format!(
            "name = \"t\"\n[source]\nkind = \"task\"\nseed = 1\nvalidation_examples = 256\n[source.task]\n{task}\n"
        );
        std::fs::write(dir.path().join("task.toml"), dataset).unwrap();
        let run = format!(
            "[run]\nname = \"t\"\nseed = 1\n[model]\nattention = \"mla\"\nhidden_size = 32\nnum_hidden_layers = 1\n\
             num_attention_heads = 2\nkv_lora_rank = 16\nqk_nope_head_dim = 8\nqk_rope_head_dim = 8\nv_head_dim = 16\n\
             intermediate_size = 64\ninitializer_range = 0.1\n[model.rope_parameters]\nrope_theta = 100.0\n\
             [data]\ndataset = \"task.toml\"\nseq_len = {seq_len}\n[optimizer]\nlr = 1e-2\ngrad_clip = 1.0\n\
             [lr_scheduler]\nkind = \"cosine\"\nwarmup_steps = 20\n[training]\nsteps = 300\nbatch_size = 32\nthreads = 2\n"
        );
        std::fs::write(dir.path().join("run.toml"), run).unwrap();
        Self { dir, resume: false }
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("out")
    }

    fn config(&self, overrides: &[&str]) -> Result<RunConfig> {
        let overrides: Vec<String> = overrides.iter().map(|o| (*o).to_string()).collect();
        RunConfig::load(&self.dir.path().join("run.toml"), &overrides)
    }

    fn options(&self) -> RunOptions {
        RunOptions {
            run_file: self.dir.path().join("run.toml"),
            out: self.out(),
            resume: self.resume,
            overwrite: false,
            turn: 0,
            environment: serde_json::Map::new(),
        }
    }

    fn watch(&self, overrides: &[&str], observe: &mut dyn FnMut(Event, &AtomicBool)) -> Result<Outcome> {
        let interrupt = AtomicBool::new(false);
        train(&self.config(overrides)?, &self.options(), &interrupt, &mut |event| observe(event, &interrupt))
    }

    fn train(&self, overrides: &[&str]) -> Result<Outcome> {
        self.watch(overrides, &mut |_, _| {})
    }

    fn learnt(&self, overrides: &[&str]) -> Evaluation {
        self.train(overrides).unwrap().evaluation.unwrap()
    }

    fn checkpoint(&self, step: u64) -> PathBuf {
        self.out().join(format!("checkpoints/step-{step:06}"))
    }
}

#[test]
fn the_rotated_key_decides_over_places_and_the_rank_does_not() {
    let task = "kind = \"position\"\nsymbols = 14\nlength = 12\nlag = 3";
    let chance = theory::position_chance(12, 3);
    for (rank, rotated) in [(2, 0), (16, 0), (4, 4), (16, 8)] {
        let sizes = [format!("model.kv_lora_rank={rank}"), format!("model.qk_rope_head_dim={rotated}")];
        let run = TaskRun::new(task, 12);
        let found = run.learnt(&sizes.each_ref().map(String::as_str));
        let accuracy = found.accuracy.unwrap();
        assert_eq!((found.tokens, found.bits_per_byte, found.mse), (256 * 9, None, None));
        if rotated == 0 {
            // Five standard deviations of 2304 guesses. A latent too narrow even for the set of symbols guesses worse.
            assert!(accuracy < chance + 0.04, "rank {rank}: {accuracy}, chance {chance}");
            assert!(rank < 16 || accuracy > chance - 0.04, "rank {rank}: {accuracy}, chance {chance}");
        } else {
            assert!(accuracy > 0.95, "rank {rank}, R {rotated}: {accuracy}");
        }
    }
}

#[test]
fn the_error_of_linear_recall_is_that_of_a_normalised_latent() {
    let task = "kind = \"linear-recall\"\nwidth = 16\nitems = 4";
    for rank in [6, 12] {
        let rank_key = format!("model.kv_lora_rank={rank}");
        let run = TaskRun::new(task, 8);
        // One head and a narrow rotated key: wider ones carry content past the latent, in the weights.
        let narrow =
            ["model.num_attention_heads=1", "model.qk_rope_head_dim=4", "model.rope_parameters.rope_theta=10.0"];
        let sizes = [&narrow[..], &[&*rank_key, "training.steps=800", "optimizer.lr=5e-3"]].concat();
        let found = run.learnt(&sizes);
        let (mse, line) = (found.mse.unwrap(), theory::normalised_floor(rank, 16));
        assert!((mse / line - 1.0).abs() < 0.05, "rank {rank}: {mse} for {line}");
        assert_eq!((found.loss, found.tokens, found.accuracy, found.perplexity), (mse, 256 * 4, None, None));
    }
}

#[test]
fn every_task_is_learnt() {
    for (task, seq_len, overrides, least) in [
        ("kind = \"records\"\nrecords = 4\nattributes = 4\nsymbols = 2", 8, &["training.steps=200"][..], 0.9),
        ("kind = \"copy\"\nsymbols = 8\nlength = 6", 12, &["training.steps=150"], 0.95),
        (
            "kind = \"induction\"\nsymbols = 12\nlength = 8\nrepeat = 4",
            11,
            &["training.steps=700", "model.num_hidden_layers=2", "model.initializer_range=0.05"],
            0.9,
        ),
        ("kind = \"dyck\"\nkinds = 3\nlength = 14\ndepth = 3", 13, &["model.num_hidden_layers=2"], 0.9),
        // Five examples to a row.
        ("kind = \"modular-addition\"\nmodulus = 7", 16, &["training.steps=150"], 0.95),
    ] {
        let found = TaskRun::new(task, seq_len).learnt(overrides);
        let accuracy = found.accuracy.unwrap();
        assert!(accuracy > least, "{task}: {accuracy}, loss {}", found.loss);
        let classes: usize = found.classes.iter().map(|class| class.tokens).sum();
        assert_eq!((classes, found.gap), (found.tokens, Some(found.loss)), "{task}");
    }
    let task = "kind = \"multi-key-match\"\nattributes = 2\nkey_width = 4\nvalue_width = 2\nitems = 3\nqueries = 3";
    let mse = TaskRun::new(task, 6).learnt(&[]).mse.unwrap();
    assert!(mse < 0.3, "{mse}");
}

#[test]
fn figures_stand_in_metrics_and_evaluation() {
    let run = TaskRun::new("kind = \"linear-recall\"\nwidth = 3\nitems = 2", 4);
    let found = run.learnt(&["training.steps=6", NO_WARMUP, "eval.every=3", "metrics.tensorboard=true"]);
    let text = std::fs::read_to_string(run.out().join("metrics.jsonl")).unwrap();
    let metrics: Vec<Metrics> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for m in &metrics {
        assert_eq!((m.mse, m.accuracy, m.bits_per_byte, m.epoch), (m.val_loss, None, None, 0.0));
        assert_eq!((m.mse.is_some(), m.tokens), (m.step % 3 == 0, 64 * m.step));
    }
    let evaluation: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(run.out().join("evaluation.json")).unwrap()).unwrap();
    // As text: every digit, which a parser of numbers may round.
    let text = std::fs::read_to_string(run.out().join("evaluation.json")).unwrap();
    assert!(text.contains(&format!("\"mse\": {},", found.mse.unwrap())), "{text}");
    assert!(evaluation["loss"] == evaluation["mse"] && evaluation.get("perplexity").is_none());

    let run = TaskRun::new("kind = \"copy\"\nsymbols = 8\nlength = 3", 6);
    run.learnt(&["training.steps=6", NO_WARMUP, "eval.every=3"]);
    let text = std::fs::read_to_string(run.out().join("metrics.jsonl")).unwrap();
    let last: Metrics = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert!(last.accuracy.is_some() && last.mse.is_none() && last.class_gap.is_some());
}

#[test]
fn the_run_seed_decides_the_training_examples_and_not_the_held_out_ones() {
    let run = TaskRun::new("kind = \"linear-recall\"\nwidth = 3\nitems = 2", 9);
    let of_seed = |seed: u64| {
        let config = run.config(&[&format!("run.seed={seed}")]).unwrap();
        let data = setup(&config, &run.options(), &mut |_| {}).unwrap().data;
        let batches = data.batches(&config.data, config.training.batch_size, config.run.seed).unwrap();
        let Held::Examples(held) = data.held else { panic!("a task has examples") };
        (batches.batch(3).unwrap(), batches.epoch(3), held)
    };
    let ((one, epoch, held), again, (two, _, same)) = (of_seed(1), of_seed(1), of_seed(2));
    assert_eq!((&one, &held), (&again.0, &again.2));
    assert!(one != two && held == same && epoch == 0.0);
    // Two examples to a row of nine positions.
    assert_eq!((one.rows, one.seq_len, one.target_tokens(), one.vectors.is_some()), (32, 9, 128, true));
}

#[test]
fn a_run_of_vectors_that_was_interrupted_ends_with_the_same_bits() {
    let task = "kind = \"multi-key-match\"\nattributes = 2\nkey_width = 3\nvalue_width = 2\nitems = 3\nqueries = 2";
    let settings = ["training.steps=30", "training.micro_batch_size=12", "checkpoint.every=8", "eval.every=10"];
    for more in [&["training.recompute=\"block\""][..], &["model.tie_word_embeddings=true"]] {
        let overrides = [&settings[..], more].concat();
        let unbroken = TaskRun::new(task, 11);
        let expected = unbroken.learnt(&overrides);
        let mut broken = TaskRun::new(task, 11);
        let stopped = broken
            .watch(&overrides, &mut |event, interrupt| {
                if matches!(event, Event::Step(metrics) if metrics.step == 13) {
                    interrupt.store(true, std::sync::atomic::Ordering::Relaxed);
                }
            })
            .unwrap();
        assert_eq!((stopped.step, stopped.evaluation.is_none()), (13, true));
        broken.resume = true;
        let found = broken.learnt(&overrides);
        let bits = |run: &TaskRun| weight_bits(&CausalLm::load(&run.checkpoint(30), &Device::flex()).unwrap());
        assert_eq!(bits(&broken), bits(&unbroken));
        assert_eq!(found.mse.map(f64::to_bits), expected.mse.map(f64::to_bits));

        // Another task is another run.
        let file = broken.dir.path().join("task.toml");
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, text.replace("seed = 1", "seed = 2")).unwrap();
        let message = broken.train(&[&overrides[..], &["training.steps=40"]].concat()).unwrap_err().to_string();
        assert!(message.contains("not those this run began with"), "{message}");
    }
}

#[test]
fn a_checkpoint_has_a_tokenizer_where_there_are_words() {
    for (task, words) in
        [("kind = \"linear-recall\"\nwidth = 3\nitems = 2", false), ("kind = \"copy\"\nsymbols = 8\nlength = 2", true)]
    {
        let run = TaskRun::new(task, 4);
        run.learnt(&["training.steps=2", NO_WARMUP]);
        let files = names(&run.checkpoint(2));
        assert_eq!(files.contains(&"tokenizer.json".to_string()), words, "{files:?}");
        checkpoint::verify(&run.checkpoint(2)).unwrap();
        let model = CausalLm::load(&run.checkpoint(2), &Device::flex()).unwrap();
        assert_eq!(model.config.vocab_size, if words { 10 } else { 5 });

        // A run that starts from it: the same task goes on.
        let from = format!("[init]\nfrom = {:?}\n", run.checkpoint(2).display().to_string());
        let next = TaskRun::new(task, 4);
        without_model(&next, &from);
        next.learnt(&["training.steps=2", NO_WARMUP]);
        for (task, expected) in [
            ("kind = \"copy\"\nsymbols = 9\nlength = 2", "its words are not those of the task"),
            ("kind = \"linear-recall\"\nwidth = 2\nitems = 2", "the model reads words"),
        ] {
            let other = TaskRun::new(task, 4);
            without_model(&other, &from);
            let result = other.train(&["training.steps=1", NO_WARMUP]);
            match (words, task.contains("copy")) {
                (true, _) => assert!(result.unwrap_err().to_string().contains(expected), "{task}"),
                (false, true) => assert!(result.unwrap_err().to_string().contains("tokenizer.json"), "{task}"),
                // Fewer numbers fit: the others are zeros.
                (false, false) => assert_eq!(result.unwrap().step, 1),
            }
        }
    }
}

/// Takes the `[model]` section out of a run file and puts `instead` in its place.
fn without_model(run: &TaskRun, instead: &str) {
    let path = run.dir.path().join("run.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let (model, data) = (text.find("[model]").unwrap(), text.find("[data]").unwrap());
    std::fs::write(&path, format!("{}{instead}{}", &text[..model], &text[data..])).unwrap();
}

#[test]
fn what_has_no_meaning_for_a_task_is_refused() {
    let vectors = "kind = \"linear-recall\"\nwidth = 3\nitems = 4";
    let words = "kind = \"copy\"\nsymbols = 8\nlength = 4";
    for (task, key, expected) in [
        (vectors, "eval.prompts=[\"a\"]", "eval.prompts = \"a\": the dataset is a task"),
        (words, "eval.prompts=[\"s1\"]", "eval.prompts = \"s1\": the dataset is a task"),
        (vectors, "training.z_loss=1e-4", "training.z_loss = 0.0001: the dataset is a task of vectors"),
        (vectors, "data.seq_len=7", "data.seq_len = 7: an example of this task has 8 positions"),
        (words, "data.seq_len=7", "data.seq_len = 7: an example of this task has 8 positions"),
        (words, "data.packing=\"stream\"", "data.packing = stream: the examples of a task are never cut"),
        (vectors, "model.vocab_size=4", "vocab_size"),
    ] {
        let run = TaskRun::new(task, 8);
        let message = run.train(&[key]).unwrap_err().to_string();
        assert!(message.contains(expected), "{key}: {message}");
        let planned = planned_model(&run.config(&[key]).unwrap(), &run.options()).unwrap_err().to_string();
        assert_eq!(planned, message, "a plan must say it too");
    }
}

#[test]
fn a_plan_knows_the_width_of_a_task() {
    for (task, width) in
        [("kind = \"linear-recall\"\nwidth = 3\nitems = 4", 5), ("kind = \"copy\"\nsymbols = 8\nlength = 4", 10)]
    {
        let run = TaskRun::new(task, 8);
        let config = run.config(&[]).unwrap();
        let (model, notes) = planned_model(&config, &run.options()).unwrap();
        assert_eq!((model.vocab_size, notes.len()), (width, 0));
        let plan = Plan::new(&config, &model, 1e9);
        assert_eq!(plan.parameters - plan.block_parameters, 2 * width * 32);
        assert!(!Path::new(&run.out()).exists(), "a plan writes nothing");
    }
}
