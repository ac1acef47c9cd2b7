//! Runs that train adapters beside a frozen model.

use std::collections::BTreeMap;
use std::path::PathBuf;

use lowkey_model::{ModelDir, adapter::AdapterDir};

use super::*;
use crate::plan::train_bytes;

pub(super) const ADAPTER: &str = "[adapter]\ntarget_modules = \"all-linear\"\nr = 3\nmodules_to_save = [\"norm\"]\n";

/// A model that was trained for a while, and a run beside it on another text.
pub(super) fn beside(adapter: &str, init: &str) -> (TinyRun, PathBuf) {
    let first = TinyRun::new();
    first.train(&["training.steps=8", "eval.every=0"]).unwrap();
    let base = first.checkpoint(8);
    // The run's folder keeps the base: it ends with it.
    let kept = base.to_path_buf();
    let run = TinyRun::new();
    let moved = run.dir.path().join("base");
    copy(&kept, &moved);
    std::fs::write(run.dir.path().join("text.txt"), text().replace("cat", "cow").replace("sees", "meets")).unwrap();
    let file = std::fs::read_to_string(run.file()).unwrap();
    let (head, rest) = file.split_once("[model]").unwrap();
    let (_, tail) = rest.split_once("[data]").unwrap();
    let from = moved.display().to_string();
    std::fs::write(run.file(), format!("{head}[init]\nfrom = {from:?}\n{init}{adapter}[data]{tail}")).unwrap();
    (run, moved)
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for name in names(from) {
        std::fs::copy(from.join(&name), to.join(&name)).unwrap();
    }
}

fn tensors(checkpoint: &Path) -> BTreeMap<String, Vec<f32>> {
    let model = ModelDir::open(checkpoint).unwrap().load(&Device::flex()).unwrap();
    let value = |tensor: burn::tensor::Tensor<1>| tensor.try_into_vec_as::<f32>().unwrap();
    model.trained_parameters().into_iter().map(|parameter| (parameter.name, value(parameter.value))).collect()
}

#[test]
fn an_adapter_learns_and_its_base_stays_as_it_was() {
    for more in ["", "use_dora = true\n", "use_rslora = true\n"] {
        let (run, base) = beside(&format!("{ADAPTER}{more}"), "");
        let files = |dir: &Path| -> Vec<Vec<u8>> {
            names(dir).iter().map(|name| std::fs::read(dir.join(name)).unwrap()).collect()
        };
        let before = files(&base);
        let outcome = run.train(&["training.steps=24"]).unwrap();
        assert!(files(&base) == before, "{more}: the base is another");
        let losses: Vec<f64> = run.metrics().into_iter().filter_map(|m| m.val_loss).collect();
        assert!(losses.last() < losses.first(), "{more}: {losses:?}");
        let step = run.checkpoint(24);
        assert_eq!(
            names(&step)
                .into_iter()
                .filter(|name| name.contains("model") || name.contains("config"))
                .collect::<Vec<_>>(),
            ["adapter_config.json", "adapter_model.safetensors", "generation_config.json", "tokenizer_config.json"],
            "{more}"
        );
        let found = tensors(&step);
        let moved = |name: &str, values: &Vec<f32>| !name.contains("lora_B") || values.iter().any(|x| *x != 0.0);
        assert!(found.iter().all(|(name, values)| moved(name, values)), "{more}: a B stands still");
        assert!(found.contains_key("model.norm.weight"), "{more}");
        assert_eq!(found.keys().any(|name| name.contains("magnitude")), more.contains("dora"));
        // The optimiser remembers what is trained and nothing else.
        let state = std::fs::read(step.join("trainer.safetensors")).unwrap();
        let state = safetensors::SafeTensors::deserialize(&state).unwrap();
        assert_eq!(state.names().len(), 2 * found.len());
        // What is measured again is what the run measured.
        let again = ModelDir::open(&step).unwrap();
        assert_eq!(again.adapter().map(|adapter| adapter.config.r), Some(3));
        assert!(outcome.evaluation.is_some());
    }
}

#[test]
fn an_interrupted_adapter_goes_on_to_the_same_bits() {
    let (unbroken, _) = beside(ADAPTER, "");
    unbroken.train(&[]).unwrap();
    let run = beside(ADAPTER, "").0.interrupted(&[], &[5, 16, 21]);
    run.assert_ends_as(&unbroken, &["adapter_model.safetensors", "trainer.safetensors"]);
}

#[test]
fn an_adapter_is_averaged_without_its_base_and_its_layers_have_rates_of_their_own() {
    let overrides = ["training.ema_decay=0.9", "optimizer.layer_lr_decay=0.5"];
    let (unbroken, _) = beside(ADAPTER, "");
    let evaluation = unbroken.train(&overrides).unwrap().evaluation.unwrap();
    let run = beside(ADAPTER, "").0.interrupted(&overrides, &[5, 16]);
    run.assert_ends_as(
        &unbroken,
        &["adapter_model.safetensors", "ema/adapter_model.safetensors", "trainer.safetensors"],
    );
    let last = unbroken.checkpoint(STEPS);
    let (own, averaged) = (tensors(&last), tensors(&last.join("ema")));
    assert_eq!(own.keys().collect::<Vec<_>>(), averaged.keys().collect::<Vec<_>>());
    assert!(own.iter().all(|(name, values)| averaged[name] != *values));
    assert!(evaluation.ema.unwrap().loss != evaluation.loss);
    // The first step of AdamW is as large as its rate: of the first of two layers half that of the second.
    let (run, _) = beside(ADAPTER, "");
    let once = [
        "training.steps=1",
        "optimizer.layer_lr_decay=0.5",
        "lr_scheduler.warmup_steps=0",
        "lr_scheduler.kind=constant",
    ];
    run.train(&once).unwrap();
    let largest = |layer: &str| {
        let of_layer =
            tensors(&run.checkpoint(1)).into_iter().filter(|(name, _)| name.contains(layer) && name.contains("lora_B"));
        of_layer.flat_map(|(_, values)| values).fold(0.0f32, |most, x| most.max(x.abs()))
    };
    let (first, second) = (largest("layers.0."), largest("layers.1."));
    assert!((second / 1e-2 - 1.0).abs() < 1e-3 && (first / 5e-3 - 1.0).abs() < 1e-3, "{first} {second}");
}

#[test]
fn the_plan_of_an_adapter_counts_its_base_without_gradients_and_moments() {
    for more in ["", "use_dora = true\n"] {
        let (run, base) = beside(&format!("{ADAPTER}{more}"), "");
        let config = run.config(&["training.steps=2"]);
        let model = ModelConfig::read(&base.join("config.json")).unwrap();
        run.train(&["training.steps=2", "eval.every=0"]).unwrap();
        let trained = ModelDir::open(&run.checkpoint(2)).unwrap().load(&Device::flex()).unwrap();
        let count = |keep: &dyn Fn(&Parameter) -> bool| -> usize {
            trained.parameters().iter().filter(|p| keep(p)).map(|p| p.shape.iter().product::<usize>()).sum()
        };
        let (frozen, added) = (count(&|p| !p.trainable), count(&|p| p.role.is_adapter()));
        let weights = config.weights(&model);
        assert_eq!((weights.frozen, weights.added), (frozen, added), "{more}");
        // In a model as small as this what layers keep is the most of what gradients follow on.
        let bytes = |config: &RunConfig| train_bytes(config, &model, 2) as i64;
        let whole = RunConfig { adapter: None, ..config.clone() };
        let less = 4.0 * (2.2 * frozen as f64 - 3.2 * added as f64);
        assert!((bytes(&whole) - bytes(&config) - less as i64).abs() <= 1, "{more}");
        let patterns = |patterns: &[&str]| {
            let mut config = whole.clone();
            config.training.trainable = Some(patterns.iter().map(|pattern| (*pattern).to_owned()).collect());
            bytes(&config)
        };
        let norms = count(&|p| !p.role.is_adapter() && p.name.contains("norm"));
        let others = count(&|p| !p.role.is_adapter()) - norms;
        let without = 4.0 * 2.2 * others as f64;
        // And the inputs of frozen maps are not kept.
        let spared = (bytes(&whole) - patterns(&["*norm.weight"])) as f64 - without;
        assert!(spared > -1.0 && spared < 0.4 * bytes(&whole) as f64, "{more}: {spared}");
        assert_eq!(patterns(&["*"]), bytes(&whole));
    }
}

#[test]
fn another_run_goes_on_with_an_adapter_and_what_does_not_go_together_is_refused() {
    let (first, base) = beside(ADAPTER, "");
    first.train(&["training.steps=8"]).unwrap();
    let adapter = first.checkpoint(8);
    let init = format!("adapter = {:?}\n", adapter.display().to_string());
    let (second, _) = beside("", &init);
    second.train(&["training.steps=8", "eval.every=0"]).unwrap();
    let (before, after) = (tensors(&adapter), AdapterDir::open(&second.checkpoint(8)).unwrap());
    assert_eq!(after.config, AdapterDir::open(&adapter).unwrap().config);
    assert_ne!(tensors(&second.checkpoint(8)), before);
    // Beside a base in few bits it goes on, too, to other numbers.
    let (packed, _) = beside("", &format!("{init}quantization = \"int8\"\n"));
    packed.train(&["training.steps=8", "eval.every=0"]).unwrap();
    assert!(packed.out().join(run_dir::QUANTIZATION).is_file());
    assert_eq!(AdapterDir::open(&packed.checkpoint(8)).unwrap().config, after.config);
    assert_ne!(tensors(&packed.checkpoint(8)), tensors(&second.checkpoint(8)));
    drop(base);

    let refused = |adapter: &str, init: &str, overrides: &[&str]| {
        let (run, _) = beside(adapter, init);
        let overrides: Vec<String> = overrides.iter().map(|o| (*o).to_string()).collect();
        match RunConfig::load(&run.file(), &overrides) {
            Err(e) => e.to_string(),
            Ok(_) => message(run.train(&overrides.iter().map(String::as_str).collect::<Vec<_>>())),
        }
    };
    assert!(refused(ADAPTER, &init, &[]).contains("init.adapter"));
    assert!(refused("", "quantization = \"nf4\"\n", &[]).contains("init.quantization"));
    assert!(refused(ADAPTER, "", &["optimizer.kind=muon"]).contains("optimizer.kind"));
    assert!(refused(ADAPTER, "", &["training.trainable=[\"*norm*\"]"]).contains("training.trainable"));
    let unknown = "[adapter]\ntarget_modules = [\"k_proj\"]\n";
    assert!(refused(unknown, "", &[]).contains("their names end in"), "{}", refused(unknown, "", &[]));
}

#[test]
fn an_adapter_beside_packed_matrices_learns_and_goes_on_to_the_same_bits() {
    let adapter = format!("{ADAPTER}use_dora = true\n");
    let init = |quantization: &str| format!("quantization = \"{quantization}\"\n");
    // Where the key stood before.
    let old = |quantization: &str| format!("{adapter}{}", init(quantization));
    for quantization in ["int8", "int4", "nf4"] {
        let (unbroken, base) = beside(&adapter, &init(quantization));
        let mut notes = Vec::new();
        let outcome = unbroken.watch(&[], &AtomicBool::new(false), &mut |event| {
            if let Event::Note(note) = event {
                notes.push(note);
            }
        });
        outcome.unwrap();
        assert!(notes.iter().any(|note| note.contains(&format!("packed as {quantization}"))), "{notes:?}");
        let losses: Vec<f64> = unbroken.metrics().into_iter().filter_map(|m| m.val_loss).collect();
        assert!(losses.last() < losses.first(), "{quantization}: {losses:?}");
        let text = std::fs::read_to_string(unbroken.out().join(run_dir::QUANTIZATION)).unwrap();
        let layers: serde_json::Value = serde_json::from_str(&text).unwrap();
        let layers = layers.as_array().unwrap();
        assert!(layers.iter().all(|layer| layer["error"].as_f64().is_some_and(|e| e > 0.0 && e < 0.2)), "{text}");
        assert!(layers.iter().any(|layer| layer["name"] == "model.layers.0.mlp.up_proj"), "{text}");

        let (mut run, _) = beside(&old(quantization), "");
        let interrupt = AtomicBool::new(false);
        run.watch(&[], &interrupt, &mut |event| {
            if matches!(event, Event::Step(metrics) if metrics.step == 7) {
                interrupt.store(true, Ordering::Relaxed);
            }
        })
        .unwrap();
        run = run.resumed();
        let mut told = false;
        run.watch(&[], &AtomicBool::new(false), &mut |event| {
            told |= matches!(event, Event::Note(note) if note.contains("adapter.quantization: the key stands in [init] now"));
        })
        .unwrap();
        assert!(told, "{quantization}");
        for file in ["adapter_model.safetensors", "trainer.safetensors"] {
            let read = |run: &TinyRun| std::fs::read(run.checkpoint(STEPS).join(file)).unwrap();
            assert!(read(&run) == read(&unbroken), "{quantization}: {file} differs");
        }
        // What it is packed as is part of what the run began with.
        let other = if quantization == "nf4" { "int4" } else { "nf4" };
        let other = format!("init.quantization={other}");
        let refused = RunConfig::load(&run.file(), std::slice::from_ref(&other)).unwrap_err().to_string();
        assert!(refused.contains("adapter.quantization = ") && refused.contains("says otherwise"), "{refused}");
        let unbroken = unbroken.resumed();
        let refused = message(unbroken.train(&[&other]));
        assert!(refused.contains("[init] is not what the run began with"), "{refused}");
        let config = std::fs::read_to_string(unbroken.checkpoint(STEPS).join("adapter_config.json")).unwrap();
        assert!(!config.contains("quantization"), "{config}");
        drop(base);
    }
    // A plan counts what packing spares.
    let bytes = |init: &str| {
        let (run, _) = beside(ADAPTER, init);
        let config = RunConfig::load(&run.file(), &[]).unwrap();
        let model = ModelDir::open(&config.init.as_ref().unwrap().from).unwrap().config().unwrap();
        train_bytes(&config, &model, 1)
    };
    let (whole, packed) = (bytes(""), bytes(&init("nf4")));
    assert!(packed < whole, "{packed} of {whole}");
}
