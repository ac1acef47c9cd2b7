//! Runs that change the shape of the model they start from, and adapters that leave numbers out.

use lowkey_data::Tokenizer;
use lowkey_model::{ModelDir, adapter::Draws};

use super::adapters::{ADAPTER, beside};
use super::*;
use crate::fixtures::{passes, uneven_batch};
use crate::workers::PassSettings;

const TOKENS: &str = "new_tokens = [\"<|user|>\", \"<|bot|>\", \"<|endoftext|>\"]\n";

/// The notes of a run.
fn notes(run: &TinyRun, overrides: &[&str]) -> Vec<String> {
    let mut notes = Vec::new();
    run.watch(overrides, &AtomicBool::new(false), &mut |event| {
        if let Event::Note(note) = event {
            notes.push(note);
        }
    })
    .unwrap();
    notes
}

fn vocabulary(checkpoint: &Path) -> (usize, usize, Option<u32>) {
    let model = ModelDir::open(checkpoint).unwrap().load(&Device::flex()).unwrap();
    let [rows, _] = model.model.embed_tokens.table().dims();
    assert_eq!(rows, model.config.vocab_size);
    let tokenizer = Tokenizer::from_model_dir(checkpoint).unwrap();
    (model.config.vocab_size, tokenizer.vocab_size(), tokenizer.token_to_id("<|bot|>"))
}

#[test]
fn new_tokens_come_into_tokenizer_model_and_checkpoints_and_are_told() {
    let (run, base) = beside("", TOKENS);
    let told = notes(&run, &["training.steps=8", "eval.every=0"]);
    assert!(told.iter().any(|note| note.contains("\"<|endoftext|>\" (id 256)")), "{told:?}");
    assert!(told.iter().any(|note| note.contains("2 new tokens, ids 257 to 258")), "{told:?}");
    assert_eq!(vocabulary(&base), (257, 257, None));
    assert_eq!(vocabulary(&run.checkpoint(8)), (259, 259, Some(258)));
    // Before its first step such a run says of old tokens what its base says, to the bit.
    let (still, _) = beside("", TOKENS);
    let config = still.config(&[]);
    let setup = setup(&config, &still.options(), &mut |_| {}).unwrap();
    let device = Device::flex();
    let grown =
        first_model(&config, &setup.model, setup.init.as_ref(), setup.new_tokens.clone(), None, &device).unwrap();
    let old = ModelDir::open(&base).unwrap().load(&device).unwrap();
    let ids = lowkey_model::ids_tensor(&[116, 104, 101, 32, 99, 97, 116], 1, 7, &device);
    let [of_grown, of_old] = [&grown, &old].map(|model| model.forward(ids.clone()).narrow(2, 0, 257));
    let bits = |x: burn::tensor::Tensor<3>| x.try_into_vec_as::<f32>().unwrap();
    assert_eq!(bits(of_grown), bits(of_old));
}

#[test]
fn a_run_with_new_tokens_goes_on_to_the_same_bits_and_with_the_same_tokens_alone() {
    for adapter in
        ["", "[adapter]\ntarget_modules = \"all-linear\"\nr = 3\nmodules_to_save = [\"embed_tokens\", \"lm_head\"]\n"]
    {
        let (unbroken, _) = beside(adapter, TOKENS);
        unbroken.train(&["training.steps=12"]).unwrap();
        let (mut run, _) = beside(adapter, TOKENS);
        let interrupt = AtomicBool::new(false);
        run.watch(&["training.steps=12"], &interrupt, &mut |event| {
            if matches!(event, Event::Step(metrics) if metrics.step == 5) {
                interrupt.store(true, Ordering::Relaxed);
            }
        })
        .unwrap();
        run = run.resumed();
        let other = message(run.train(&["training.steps=12", "init.new_tokens=[\"<|user|>\"]"]));
        assert!(other.contains("[init] is not what the run began with"), "{other}");
        run.train(&["training.steps=12"]).unwrap();
        let weights = |run: &TinyRun| {
            let name = if adapter.is_empty() { "model.safetensors" } else { "adapter_model.safetensors" };
            std::fs::read(run.checkpoint(12).join(name)).unwrap()
        };
        assert!(weights(&run) == weights(&unbroken), "{adapter}");
        assert_eq!(vocabulary(&run.checkpoint(12)), (259, 259, Some(258)), "{adapter}");
    }
}

#[test]
fn another_run_goes_on_with_an_adapter_that_brought_tokens_and_positions() {
    let saved = "[adapter]\ntarget_modules = [\"o_proj\"]\nmodules_to_save = [\"embed_tokens\", \"lm_head\"]\n";
    let positions = "max_position_embeddings = 96\nrope_parameters = { rope_type = \"yarn\", factor = 4 }\n";
    let (first, _) = beside(saved, &format!("{TOKENS}{positions}"));
    first.train(&["training.steps=8", "data.seq_len=40"]).unwrap();
    let adapter = first.checkpoint(8);
    let of = |checkpoint: &Path| ModelDir::open(checkpoint).unwrap().config().unwrap();
    assert_eq!((of(&adapter).max_position_embeddings, of(&adapter).vocab_size), (96, 259));
    let init = format!("adapter = {:?}\n", adapter.display().to_string());
    let (second, _) = beside("", &init);
    second.train(&["training.steps=8", "data.seq_len=48"]).unwrap();
    assert_eq!(of(&second.checkpoint(8)), of(&adapter));
    assert_eq!(vocabulary(&second.checkpoint(8)), (259, 259, Some(258)));
    let (third, _) = beside("", &format!("{init}new_tokens = [\"<|third|>\"]\n"));
    assert!(message(third.train(&[])).contains("init.new_tokens"));
}

#[test]
fn what_cannot_be_added_or_would_be_lost_is_refused_before_anything_is_prepared() {
    let refused = |adapter: &str, init: &str, overrides: &[&str]| {
        let (run, _) = beside(adapter, init);
        let texts: Vec<String> = overrides.iter().map(|o| (*o).to_string()).collect();
        match RunConfig::load(&run.file(), &texts) {
            Err(e) => e.to_string(),
            Ok(_) => message(run.train(overrides)),
        }
    };
    let why = refused(ADAPTER, TOKENS, &[]);
    assert!(why.contains("modules_to_save = [\"embed_tokens\", \"lm_head\"]"), "{why}");
    assert!(refused("", "new_tokens = [\"a\", \"a\"]\n", &[]).contains("twice"));
    assert!(refused("", "new_tokens = [\" \"]\n", &[]).contains("init.new_tokens"));
    assert!(refused("", "max_position_embeddings = 20\n", &[]).contains("data.seq_len = 24"));
    let short = refused("", "", &["data.seq_len=40"]);
    assert!(short.contains("init.max_position_embeddings"), "{short}");
    let closer = refused("", "rope_parameters = { rope_type = \"yarn\", factor = 0.5 }\n", &[]);
    assert!(closer.contains("rope_parameters.factor"), "{closer}");
    assert!(refused("", "rope_parameters = { rope_type = \"dynamic\" }\n", &[]).contains("rope"));
    let wrong = refused("[adapter]\ntarget_modules = \"all-linear\"\nlora_dropout = 1.0\n", "", &[]);
    assert!(wrong.contains("adapter.lora_dropout"), "{wrong}");
}

#[test]
fn positions_of_the_run_file_are_trained_saved_and_kept_in_its_own_file() {
    let positions = "max_position_embeddings = 96\nrope_parameters = { rope_type = \"yarn\", factor = 4 }\n";
    let (run, base) = beside("", positions);
    run.train(&["training.steps=4", "data.seq_len=80", "eval.every=0"]).unwrap();
    let config = |dir: &Path| ModelConfig::read(&dir.join("config.json")).unwrap();
    let (old, new) = (config(&base), config(&run.checkpoint(4)));
    assert_eq!((old.max_position_embeddings, new.max_position_embeddings), (24, 96));
    assert_eq!(new.rope.original_max_position_embeddings, Some(24));
    assert_eq!((new.rope.rope_theta, new.rope.factor), (old.rope.rope_theta, Some(4.0)));
    let kept = RunConfig::load(&run.out().join("run.toml"), &[]).unwrap();
    assert_eq!(kept.init.unwrap().rope_parameters, run.config(&[]).init.unwrap().rope_parameters);
}

/// A row's loss depends on what is left out of it, whoever computes it; sums of several rows are taken in another order.
#[test]
fn what_adapters_leave_out_is_the_same_for_any_number_of_threads_and_any_share_of_rows() {
    let (run, _) = beside("[adapter]\ntarget_modules = \"everything\"\nr = 3\nlora_dropout = 0.4\n", "");
    let config = run.config(&[]);
    let setup = setup(&config, &run.options(), &mut |_| {}).unwrap();
    let device = Device::flex().autodiff();
    let model = first_model(&config, &setup.model, setup.init.as_ref(), 0..0, None, &device).unwrap();
    // B is zero at first, which no dropout shows.
    let values = model.parameters().into_iter().map(|p| if p.role.is_adapter() { p.value + 0.1 } else { p.value });
    let values: Vec<_> = values.collect();
    let model = model.clone().with_values(values);
    let batch = uneven_batch(4, 11, 29, 3);
    let losses = |threads: usize, micro_batch: usize, step: u64| {
        let settings = PassSettings { seed: 5, step, ..passes(micro_batch) };
        let found = Workers::new(threads, micro_batch).unwrap().gradients(&model, &batch, settings, &device);
        found.losses.try_into_vec_as::<f32>().unwrap()
    };
    let alone = losses(1, 1, 2);
    assert_eq!(alone.len(), 4);
    assert_eq!(losses(4, 4, 2), alone);
    assert_eq!(losses(2, 2, 2), alone);
    assert_ne!(losses(1, 1, 3), alone);
    let sober = model.clone().with_draws(None);
    let whole: Vec<f32> =
        (0..4).map(|row| sober.loss(batch.rows(row..row + 1), 0.0, &device).nats.into_scalar::<f32>()).collect();
    assert!(whole.iter().zip(&alone).all(|(a, b)| a != b), "{whole:?} {alone:?}");
    let first = model.with_draws(Some(Draws { seed: 5, step: 2, first_row: 0 }));
    let of_first = first.loss(batch.rows(0..1), 0.0, &device).nats.into_scalar::<f32>();
    assert!((of_first / alone[0] - 1.0).abs() < 1e-5, "{of_first} {}", alone[0]);
}

#[test]
fn an_adapter_with_dropout_goes_on_to_the_same_bits_and_is_measured_without() {
    let adapter = "[adapter]\ntarget_modules = \"everything\"\nr = 3\nlora_dropout = 0.3\n";
    let (unbroken, _) = beside(adapter, "");
    unbroken.train(&["training.steps=16"]).unwrap();
    let (mut run, _) = beside(adapter, "");
    for stop in [3, 11] {
        let interrupt = AtomicBool::new(false);
        run.watch(&["training.steps=16"], &interrupt, &mut |event| {
            if matches!(event, Event::Step(metrics) if metrics.step == stop) {
                interrupt.store(true, Ordering::Relaxed);
            }
        })
        .unwrap();
        run = run.resumed();
    }
    run.train(&["training.steps=16"]).unwrap();
    for file in ["adapter_model.safetensors", "trainer.safetensors"] {
        let read = |run: &TinyRun| std::fs::read(run.checkpoint(16).join(file)).unwrap();
        assert!(read(&run) == read(&unbroken), "{file} differs");
    }
    let keys = std::fs::read_to_string(run.checkpoint(16).join("adapter_config.json")).unwrap();
    assert_eq!(serde_json::from_str::<serde_json::Value>(&keys).unwrap()["lora_dropout"], 0.3);
    let (sober, _) = beside(&adapter.replace("0.3", "0.0"), "");
    sober.train(&["training.steps=16"]).unwrap();
    let first = |run: &TinyRun| run.metrics()[1].train_loss;
    assert_ne!(first(&run), first(&sober), "the second step has something to leave out");
}
