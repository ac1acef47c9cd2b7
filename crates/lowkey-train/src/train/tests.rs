mod adapters;
mod averages;
mod folders;
mod going_on;
mod noise;
mod records;
mod shape;

use std::collections::BTreeMap;

use lowkey_model::ModelConfig;

use super::*;
use crate::fixtures::{STEPS, TinyRun, names, text, weight_bits};
use crate::setup::setup;
use crate::workers::available_threads;

/// Entropy of the text's bytes taken one by one: what a model that knows only how frequent each is would reach.
fn unigram_entropy() -> f64 {
    let text = text();
    let mut counts: BTreeMap<u8, f64> = BTreeMap::new();
    text.bytes().for_each(|byte| *counts.entry(byte).or_default() += 1.0);
    let n = text.len() as f64;
    counts.values().map(|count| -count / n * (count / n).ln()).sum()
}

fn weights(checkpoint: &Path) -> Vec<u32> {
    weight_bits(&CausalLm::load(checkpoint, &Device::flex()).unwrap())
}

fn message(result: Result<Outcome>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn a_run_learns_and_tells_what_it_does_in_order() {
    let run = TinyRun::new();
    let mut told = Vec::new();
    let mut last_loss = 0.0;
    let outcome = run
        .watch(&["metrics.tensorboard=true"], &AtomicBool::new(false), &mut |event| {
            told.push(match event {
                Event::Preparing(_) => "preparing".into(),
                Event::Note(note) => format!("note {note}"),
                Event::Ready { plan, step } => {
                    assert_eq!((plan.tokens_per_step, plan.tokens), (8 * 24, STEPS * 8 * 24));
                    assert!(plan.seconds > 0.0 && plan.seconds.is_finite());
                    format!("ready {step}")
                }
                Event::Example(_) => "example".into(),
                Event::WarmedUp { .. } => "warmed up".into(),
                Event::Step(metrics) => {
                    last_loss = metrics.train_loss;
                    format!("step {}", metrics.step)
                }
                Event::Evaluated { step, .. } => format!("evaluated {step}"),
                Event::Finished { on, .. } => {
                    assert_eq!(on, "the whole held-out split");
                    "finished".into()
                }
                Event::Sample { prompt, text, chat } => {
                    assert!(prompt == "the " && !text.is_empty() && !chat);
                    "sample".into()
                }
                Event::Saved { path, .. } => format!("saved {}", path.file_name().unwrap().to_string_lossy()),
            });
        })
        .unwrap();
    // A machine of one core is told that it has fewer than the run's threads.
    told.retain(|line| line != "preparing" && !line.starts_with("note training.threads"));
    let mut expected = vec!["ready 0".to_string()];
    for step in 1..=STEPS {
        expected.push(format!("step {step}"));
        if step % 10 == 0 {
            expected.extend([format!("evaluated {step}"), "sample".into()]);
        }
        // The loss of this text falls at each evaluation, so that each is saved.
        if step % 10 == 0 || step % 8 == 0 {
            expected.push(format!("saved step-{step:06}"));
        }
    }
    expected.push("finished".into());
    assert_eq!(told, expected);

    let evaluation = outcome.evaluation.unwrap();
    assert_eq!(outcome.step, STEPS);
    let unigram = unigram_entropy();
    assert!(last_loss < unigram && evaluation.loss < unigram, "{last_loss} {} {unigram}", evaluation.loss);

    let metrics = run.metrics();
    assert_eq!(metrics.iter().map(|m| m.step).collect::<Vec<_>>(), (1..=STEPS).collect::<Vec<_>>());
    let config = run.config(&["metrics.tensorboard=true"]);
    for (m, next) in metrics.iter().zip(metrics.iter().skip(1).map(Some).chain([None])) {
        // One target at most is missing in each epoch: where the stream closes to a ring.
        assert!((0.0..=m.epoch + 1.0).contains(&((m.step * 8 * 24) as f64 - m.tokens as f64)), "{m:?}");
        assert_eq!(m.val_loss.is_some(), m.step % 10 == 0);
        let lr = config.lr_scheduler.rate(m.step - 1, STEPS, 1e-2);
        assert!((m.lr - lr).abs() <= lr * 1e-15, "{} for {lr}", m.lr);
        assert!(m.grad_norm > 0.0 && m.tokens_per_s > 0.0 && m.mfu > 0.0 && m.epoch > 0.0);
        assert!(next.is_none_or(|next| next.time_s >= m.time_s && next.epoch > m.epoch));
    }
    assert!((metrics[0].train_loss - 257f64.ln()).abs() < 1.0, "an untrained model is about uniform");

    let out = run.out();
    assert_eq!(
        names(&out),
        [
            "checkpoints",
            "data",
            "environment.json",
            "evaluation.json",
            "lowkey.json",
            "metrics.jsonl",
            "outcome.json",
            "run.toml",
            "samples.jsonl",
            "tensorboard"
        ]
    );
    let json = |name: &str| -> serde_json::Value {
        serde_json::from_str(&std::fs::read_to_string(out.join(name)).unwrap()).unwrap()
    };
    assert_eq!(
        (json("environment.json")["seed"].as_u64(), json("environment.json")["threads"].as_u64()),
        (Some(3), Some(2))
    );
    assert_eq!(json("evaluation.json")["tokens"].as_u64(), Some(evaluation.tokens as u64));
    assert_eq!(names(&out.join("checkpoints")), ["best", "step-000032", "step-000040"]);
    assert_eq!(weights(&out.join("checkpoints/best")), weights(&run.checkpoint(40)));
    assert_eq!(RunConfig::load(&out.join("run.toml"), &[]).unwrap().to_toml().unwrap(), config.to_toml().unwrap());
}

#[test]
fn other_attentions_train_and_sample_too() {
    for attention in ["mha", "gqa", "mqa"] {
        let run = TinyRun::new();
        let heads = format!("model.attention={attention}");
        let mut notes = Vec::new();
        let mut samples = 0;
        let small = ["model.head_dim=8", "model.num_attention_heads=4", "training.steps=6", "eval.every=3", &heads];
        let outcome = run.watch(&small, &AtomicBool::new(false), &mut |event| match event {
            Event::Note(note) => notes.push(note),
            Event::Sample { .. } => samples += 1,
            _ => {}
        });
        assert_eq!((outcome.unwrap().step, samples), (6, 2), "{attention}");
        assert!(notes.iter().any(|note| note.contains("kv_lora_rank")), "{attention}: {notes:?}");
    }
}

#[test]
fn an_interrupted_run_goes_on_to_the_same_bits() {
    let unbroken = TinyRun::new();
    unbroken.train(&[]).unwrap();

    let mut run = TinyRun::new();
    // In turn: between checkpoints, on one, on an evaluation, at once, and after all.
    for stop in [5, 16, 20, 20, 37] {
        let interrupt = AtomicBool::new(stop == 20 && run.checkpoint(20).exists());
        let outcome = run
            .watch(&[], &interrupt, &mut |event| {
                if matches!(event, Event::Step(metrics) if metrics.step == stop) {
                    interrupt.store(true, Ordering::Relaxed);
                }
            })
            .unwrap();
        assert_eq!((outcome.step, outcome.evaluation.is_none()), (stop, true));
        checkpoint::verify(&run.checkpoint(stop)).unwrap();
        run = run.resumed();
    }
    assert!(run.train(&[]).unwrap().evaluation.is_some());
    // Once more does nothing.
    assert!(run.train(&[]).unwrap().evaluation.is_some());

    assert_eq!(weights(&run.checkpoint(STEPS)), weights(&unbroken.checkpoint(STEPS)));
    let moments = |run: &TinyRun| std::fs::read(run.checkpoint(STEPS).join("trainer.safetensors")).unwrap();
    assert!(moments(&run) == moments(&unbroken));
    let figures = |run: &TinyRun| -> Vec<_> {
        run.metrics().into_iter().map(|m| (m.step, m.tokens, m.train_loss, m.lr, m.grad_norm, m.val_loss)).collect()
    };
    assert_eq!(figures(&run), figures(&unbroken));
    assert_eq!(weights(&run.out().join("checkpoints/best")), weights(&unbroken.out().join("checkpoints/best")));
    let time = run.metrics();
    assert!(time.windows(2).all(|pair| pair[0].time_s <= pair[1].time_s), "time goes on over sessions");
}

/// What a run has at its end that decides how it would go on.
const END: [&str; 2] = ["model.safetensors", "trainer.safetensors"];

#[test]
fn every_prefix_of_an_elastic_latent_learns_and_an_interrupted_run_of_it_goes_on_to_the_same_bits() {
    let elastic = ["model.elastic.ranks=[1, 2, 4]", "training.micro_batch_size=4"];
    let unbroken = TinyRun::new();
    let evaluation = unbroken.train(&elastic).unwrap().evaluation.unwrap();
    let unigram = unigram_entropy();
    assert_eq!(evaluation.ranks.iter().map(|at| at.rank).collect::<Vec<_>>(), [1, 2, 4]);
    assert!(evaluation.ranks.iter().all(|at| at.loss < unigram), "{evaluation:?} {unigram}");
    // The figure at a rank is that of the model which is cut there.
    let model = CausalLm::load(&unbroken.checkpoint(STEPS), &Device::flex()).unwrap();
    assert_eq!(model.config.elastic_ranks(), [1, 2, 4]);
    let cut = model.with_kv_ranks(&vec![2; model.config.layers.len()]).unwrap();
    assert_eq!(cut.config.elastic_ranks(), [1]);
    let told = unbroken.metrics().pop().unwrap().rank_loss.unwrap();
    assert_eq!(told.keys().collect::<Vec<_>>(), ["1", "2", "4"]);
    TinyRun::new().interrupted(&elastic, &[5, 16]).assert_ends_as(&unbroken, &END);

    // Without narrower passes it would be another model, and before they begin it is the same.
    let whole = TinyRun::new();
    whole.train(&["model.elastic.ranks=[1, 2, 4]", "training.micro_batch_size=4", "training.elastic_start=1"]).unwrap();
    let losses = |run: &TinyRun| run.metrics().iter().map(|m| m.train_loss).collect::<Vec<f64>>();
    // 0.3 of 40 steps, and the first step that differs shows in the loss of the next.
    assert_eq!(losses(&whole)[..13], losses(&unbroken)[..13]);
    assert!(losses(&whole)[13..] != losses(&unbroken)[13..]);
    for ranks in ["[]", "[0]", "[4, 2]", "[2, 2]", "[99]"] {
        let refused = message(TinyRun::new().train(&[&format!("model.elastic.ranks={ranks}")]));
        assert!(refused.contains("elastic.ranks"), "{refused}");
    }
}

#[test]
fn muon_learns_and_an_interrupted_run_of_it_goes_on_to_the_same_bits() {
    let muon = ["optimizer.kind=muon", "optimizer.momentum=0.9"];
    let unbroken = TinyRun::new();
    let evaluation = unbroken.train(&muon).unwrap().evaluation.unwrap();
    let (first, last) = (unbroken.metrics()[0].train_loss, unbroken.metrics()[STEPS as usize - 1].train_loss);
    let unigram = unigram_entropy();
    assert!(first > 5.0 && last < unigram && evaluation.loss < unigram, "{first} {last} {} {unigram}", evaluation.loss);

    let run = TinyRun::new().interrupted(&muon, &[5, 16]);
    run.assert_ends_as(&unbroken, &END);
    let refused = message(run.train(&["optimizer.kind=muon"]));
    assert!(refused.contains("[optimizer] is not what the run began with"), "{refused}");
}

#[test]
fn only_what_cannot_change_the_weights_may_change_on_the_way() {
    let run = TinyRun::new();
    run.train(&["training.steps=4"]).unwrap();
    let run = run.resumed();
    for (change, section) in [
        ("run.seed=4", "run"),
        ("model.hidden_size=18", "model"),
        ("model.rms_norm_eps=1e-5", "model"),
        ("data.seq_len=23", "data"),
        ("data.mask_documents=false", "data"),
        ("optimizer.lr=0.02", "optimizer"),
        ("optimizer.grad_clip=2.0", "optimizer"),
        ("optimizer.kind=muon", "optimizer"),
        ("lr_scheduler.warmup_steps=4", "lr_scheduler"),
        ("training.batch_size=9", "training"),
        ("training.micro_batch_size=3", "training"),
        ("training.threads=1", "training"),
    ] {
        let message = message(run.train(&["training.steps=8", change]));
        assert!(message.contains(&format!("[{section}] is not what the run began with")), "{change}: {message}");
    }
    assert_eq!(run.metrics().len(), 4, "a refused run changes nothing");
    let free =
        ["eval.every=2", "eval.prompts=[]", "checkpoint.keep=5", "metrics.every=2", "run.name=other", "run.device=cpu"];
    run.train(&[&["training.steps=8"], &free[..]].concat()).unwrap();
    assert_eq!(run.metrics().last().unwrap().step, 8);
}

#[test]
fn the_number_of_threads_stays_that_of_the_first_session() {
    let run = TinyRun::new();
    let text = std::fs::read_to_string(run.file()).unwrap().replace("threads = 2\n", "");
    std::fs::write(run.file(), text).unwrap();
    let threads = |run: &TinyRun| RunConfig::load(&run.out().join("run.toml"), &[]).unwrap().training.threads;
    run.train(&["training.steps=2", "training.threads=3"]).unwrap();
    assert_eq!(threads(&run), Some(3));
    let run = run.resumed();
    run.train(&["training.steps=4"]).unwrap();
    assert_eq!(threads(&run), Some(3));
    let fresh = TinyRun { overwrite: true, resume: false, ..run };
    fresh.train(&["training.steps=2"]).unwrap();
    assert_eq!(threads(&fresh), Some(available_threads()));
}

#[test]
fn a_run_is_not_lost_by_accident() {
    let run = TinyRun::new();
    run.train(&["training.steps=4"]).unwrap();
    let before = weights(&run.checkpoint(4));
    std::fs::create_dir(run.out().join("checkpoints/.tmp-step-000008")).unwrap();
    let refused = message(run.train(&["training.steps=2"]));
    assert!(refused.contains("--resume") && refused.contains("--overwrite") && refused.contains("--out"), "{refused}");
    assert!(run.out().join("checkpoints/.tmp-step-000008").exists(), "another process may be writing it");

    // What cannot start replaces nothing.
    let run = TinyRun { overwrite: true, ..run };
    assert!(run.train(&["data.path=absent.txt"]).is_err());
    assert!(run.train(&["data.seq_len=100000"]).is_err());
    assert_eq!(weights(&run.checkpoint(4)), before);

    run.train(&["training.steps=2", "run.seed=9"]).unwrap();
    assert_eq!(names(&run.out().join("checkpoints")), ["best", "step-000002"]);
    assert_eq!(run.metrics().len(), 2);
    assert_ne!(weights(&run.checkpoint(2)), before);

    // A checkpoint that is damaged is a run all the same.
    std::fs::write(run.checkpoint(2).join("config.json"), "{}").unwrap();
    let run = TinyRun { overwrite: false, ..run };
    assert!(message(run.train(&[])).contains("this run is already here"));
}

#[test]
fn a_resumed_run_steps_over_a_damaged_checkpoint() {
    let unbroken = TinyRun::new();
    unbroken.train(&["training.steps=24"]).unwrap();
    let run = TinyRun::new();
    run.train(&["training.steps=24"]).unwrap();
    std::fs::write(run.checkpoint(24).join("model.safetensors"), "cut").unwrap();
    let mut notes = Vec::new();
    let mut first = None;
    let run = run.resumed();
    run.watch(&["training.steps=24"], &AtomicBool::new(false), &mut |event| match event {
        Event::Note(note) => notes.push(note),
        Event::Ready { step, .. } => first = Some(step),
        _ => {}
    })
    .unwrap();
    assert_eq!(first, Some(20));
    assert!(notes.len() == 1 && notes[0].contains("damaged") && notes[0].contains("step-000024"), "{notes:?}");
    assert_eq!(weights(&run.checkpoint(24)), weights(&unbroken.checkpoint(24)));
    assert_eq!(run.metrics().len(), 24);
}

#[test]
fn a_run_can_start_from_a_checkpoint() {
    let base = TinyRun::new();
    let finished = base.train(&["training.steps=20"]).unwrap().evaluation.unwrap();
    let from = base.checkpoint(20);
    let start = weights(&from);

    let run = TinyRun::new();
    let text = std::fs::read_to_string(run.file()).unwrap();
    let (head, tail) = (text.find("[model]").unwrap(), text.find("[data]").unwrap());
    std::fs::write(run.file(), format!("{}[init]\nfrom = {:?}\n{}", &text[..head], from, &text[tail..])).unwrap();

    // A step too small to change a number: the model is measured as it came.
    let still = ["training.steps=1", "optimizer.lr=1e-30", "optimizer.weight_decay=0.0", "lr_scheduler.warmup_steps=0"];
    let outcome = run.train(&still).unwrap();
    assert_eq!(weights(&run.checkpoint(1)), start);
    assert_eq!(outcome.evaluation.unwrap().loss.to_bits(), finished.loss.to_bits());

    // The loss before the first step is that of the checkpoint on the first batch.
    let config = run.config(&still);
    let Setup { model, data, .. } = setup(&config, &run.options(), &mut |_| {}).unwrap();
    assert_eq!(model, ModelConfig::read(&from.join("config.json")).unwrap());
    let batch = data.batches(&config.data, 8, 3).unwrap().batch(0).unwrap();
    let model = CausalLm::load(&from, &Device::flex()).unwrap();
    let workers = Workers::new(2, 8).unwrap();
    let lengths = data.tokenizer.unwrap().byte_lengths();
    let measured = evaluate(&model, &Held::Batches(vec![batch]), &lengths, &workers, &Device::flex()).unwrap();
    let first = run.metrics()[0].train_loss;
    assert!((first / measured.loss - 1.0).abs() < 1e-6, "{first} for {}", measured.loss);

    // What a checkpoint's files do not say is not trained on.
    let mut bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(from.join("model.safetensors"), bytes).unwrap();
    let run = TinyRun { overwrite: true, ..run };
    assert!(message(run.train(&[])).contains("SHA-256"));
}

#[test]
fn a_loss_that_is_no_number_stops_the_run_before_the_step() {
    let run = TinyRun::new();
    let wild = [
        "optimizer.lr=1e15",
        "lr_scheduler.warmup_steps=0",
        "lr_scheduler.kind=constant",
        "checkpoint.every=1",
        "eval.every=0",
    ];
    let mut saved = BTreeMap::new();
    let error = run
        .watch(&wild, &AtomicBool::new(false), &mut |event| {
            if let Event::Saved { path, .. } = event {
                saved.insert(path.to_path_buf(), weights(path));
            }
        })
        .unwrap_err();
    let Error::NonFinite { step, value, first_row, last_row, .. } = error else { panic!("{error}") };
    assert!(!value.is_finite());
    assert_eq!((first_row, last_row), ((step - 1) * 8, step * 8 - 1));
    assert!(step >= 2, "the first loss is that of an untrained model");
    let last = run.checkpoint(step - 1);
    assert_eq!(checkpoint::newest(&run.out().join("checkpoints")).unwrap(), Some(last.clone()));
    checkpoint::verify(&last).unwrap();
    assert_eq!(saved.get(&last), Some(&weights(&last)));
    assert_eq!(run.metrics().len() as u64, step - 1);
}

#[test]
fn weights_that_are_no_numbers_are_not_saved() {
    let run = TinyRun::new();
    let wild = ["optimizer.lr=1e38", "lr_scheduler.warmup_steps=0", "checkpoint.every=1", "eval.every=0"];
    let error = run.train(&wild).unwrap_err();
    assert!(matches!(error, Error::Diverged { step: 1, .. }), "{error}");
    assert_eq!(names(&run.out().join("checkpoints")), [""; 0]);
}

#[test]
fn what_would_fail_at_the_first_evaluation_fails_at_once() {
    let run = TinyRun::new();
    let long = format!("eval.prompts=[\"{}\"]", "x".repeat(24));
    for (prompts, expected) in [("eval.prompts=[\"the \", \"\"]", "no token"), (long.as_str(), "24 positions")] {
        let message = message(run.train(&[prompts]));
        assert!(message.starts_with("eval.prompts = ") && message.contains(expected), "{message}");
    }
    assert!(!run.out().join("metrics.jsonl").exists());
    let longest = format!("eval.prompts=[\"{}\"]", "x".repeat(23));
    run.train(&["training.steps=1", &longest]).unwrap();
}

#[test]
fn the_cpu_trains_in_no_other_format() {
    for dtype in ["tf32", "f16"] {
        let run = TinyRun::new();
        let message = message(run.train(&[&format!("training.dtype={dtype}"), "run.device=cpu"]));
        assert!(message.starts_with(&format!("training.dtype = {dtype}: the CPU trains in f32 and bf16")), "{message}");
        assert!(!run.out().exists());
    }
}

#[test]
fn a_device_that_is_not_built_in_is_refused() {
    for name in ["auto", "cpu"] {
        crate::setup::device(name).unwrap();
    }
    for (name, expected) in [
        ("cuda", "build with `cargo build --release --features cuda`"),
        ("cuda:1", "this build has no `cuda` devices"),
        ("wgpu", "build with `cargo build --release --features wgpu`"),
        ("tpu", "known are auto"),
    ] {
        let message = crate::setup::device(name).unwrap_err().to_string();
        assert!(message.starts_with("run.device = ") && message.contains(expected), "{message}");
    }
}
