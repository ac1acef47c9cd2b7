use std::path::Path;

use super::*;
use crate::error::Result;
use crate::fixtures::MODEL;

/// A run file with nothing in it that could be left out.
pub(super) fn minimal() -> String {
    format!(
        "[run]\nname = \"small\"\n[model]{MODEL}[data]\npath = \"text.txt\"\nseq_len = 24\n[optimizer]\nlr = 1e-2\n\
         [training]\nsteps = 100\nbatch_size = 8\n"
    )
}

/// A run file with every key, each at another value than its default.
fn full() -> String {
    format!(
        "[run]\nname = \"full-1.a_b\"\nseed = 7\ndevice = \"cpu\"\n[model]{MODEL}\
         [model.rope_parameters]\nrope_theta = 5e4\n\
         [data]\ndataset = \"datasets/storybook.toml\"\nseq_len = 24\npacking = \"documents\"\nmask_documents = false\n\
         [optimizer]\nkind = \"muon\"\nlr = 3e-3\nmomentum = 0.9\nbetas = [0.8, 0.99]\neps = 1e-6\nweight_decay = 0.1\ngrad_clip = 0.3\n\
         [lr_scheduler]\nkind = \"wsd\"\nwarmup_steps = 50\ndecay_fraction = 0.3\nmin_lr_ratio = 0.1\n\
         [training]\nsteps = 600\nbatch_size = 16\nmicro_batch_size = 5\ndtype = \"f32\"\nthreads = 3\n\
         [eval]\nevery = 100\nbatches = 7\nprompts = [\"Once\", \"say \\\"hi\\\"\\n\"]\nsample_tokens = 9\ntemperature = 0.0\n\
         [checkpoint]\nevery = 200\nkeep = 4\n[metrics]\ntensorboard = true\nevery = 5\n"
    )
}

pub(super) fn load(text: &str, overrides: &[&str]) -> Result<RunConfig> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    std::fs::write(&path, text).unwrap();
    RunConfig::load(&path, &overrides.iter().map(|o| (*o).to_string()).collect::<Vec<_>>())
}

pub(super) fn refusal(text: &str, overrides: &[&str]) -> String {
    load(text, overrides).expect_err(&format!("{overrides:?} must be refused")).to_string()
}

#[test]
fn what_is_written_reads_back_the_same() {
    for text in [minimal(), full(), minimal().replace(&format!("[model]{MODEL}"), "[init]\nfrom = \"some/model\"\n")] {
        let config = load(&text, &[]).unwrap();
        let written = config.to_toml().unwrap();
        let again = load(&written, &[]).unwrap();
        assert_eq!(format!("{again:?}"), format!("{config:?}"));
        assert_eq!(again.to_toml().unwrap(), written);
    }
}

#[test]
fn every_key_of_a_file_arrives() {
    let text = full();
    let (written, given): (toml::Table, toml::Table) =
        (toml::from_str(&load(&text, &[]).unwrap().to_toml().unwrap()).unwrap(), toml::from_str(&text).unwrap());
    for (section, keys) in &given {
        for (key, value) in keys.as_table().unwrap() {
            let found = &written[section][key];
            match value.as_table() {
                Some(inner) => {
                    assert!(inner.iter().all(|(k, v)| found.get(k) == Some(v)), "{section}.{key}");
                }
                None => assert_eq!(found, value, "{section}.{key}"),
            }
        }
    }
}

#[test]
fn defaults_are_these() {
    let config = load(&minimal(), &[]).unwrap();
    let mut table: toml::Table = toml::from_str(&config.to_toml().unwrap()).unwrap();
    table.remove("model");
    let expected = "
        run = { name = \"small\", seed = 0, device = \"auto\" }
        data = { path = \"text.txt\", seq_len = 24, mask_documents = true }
        optimizer = { kind = \"adamw\", lr = 1e-2, betas = [0.9, 0.95], eps = 1e-8, weight_decay = 0.0 }
        lr_scheduler = { kind = \"constant\", warmup_steps = 0, decay_fraction = 0.2, min_lr_ratio = 0.0 }
        training = { steps = 100, batch_size = 8, recompute = \"none\", z_loss = 0.0, distillation = 0.5, elastic_start = 0.3, dtype = \"f32\" }
        eval = { every = 0, batches = 16, prompts = [], sample_tokens = 200, temperature = 0.8 }
        checkpoint = { every = 0, keep = 2 }
        metrics = { tensorboard = false, every = 1 }
    ";
    assert!(config.history.is_empty(), "and so it is not written");
    assert_eq!(table, toml::from_str::<toml::Table>(expected).unwrap());
    assert_eq!(config.optimizer.momentum(), 0.95);
    // What stands in no file: one thread per core, the whole batch at once, no clipping.
    assert_eq!((config.training.threads, config.micro_batch_size(), config.optimizer.grad_clip), (None, 8, None));
}

#[test]
fn an_empty_section_is_an_absent_one() {
    let empty = minimal() + "[lr_scheduler]\n[eval]\n[checkpoint]\n[metrics]\n";
    assert_eq!(load(&empty, &[]).unwrap().to_toml().unwrap(), load(&minimal(), &[]).unwrap().to_toml().unwrap());
}

#[test]
fn passes_are_no_larger_than_the_batch() {
    for (micro, expected) in [(1, 1), (8, 8), (100, 8)] {
        let config = load(&minimal(), &[&format!("training.micro_batch_size={micro}")]).unwrap();
        assert_eq!(config.micro_batch_size(), expected);
    }
}

#[test]
fn overrides_replace_and_add_keys() {
    let config = load(
        &minimal(),
        &[
            "optimizer.lr=0.5",
            " run.device = cpu ",
            "run.name=\"quoted\"",
            "optimizer.betas=[0.5, 0.6]",
            "eval.prompts=[\"a=b\", \"c\"]",
            "metrics.tensorboard=true",
            "data.path=dir/with=sign.txt",
            "model.rope_parameters.rope_theta=1e6",
            "training.steps=3",
            "training.steps=4",
        ],
    )
    .unwrap();
    assert_eq!(config.optimizer.lr, 0.5);
    assert_eq!((config.run.device.as_str(), config.run.name.as_str()), ("cpu", "quoted"));
    assert_eq!(config.optimizer.betas, [0.5, 0.6]);
    assert_eq!(config.eval.prompts, ["a=b", "c"]);
    assert!(config.metrics.tensorboard);
    assert_eq!(config.data.path.as_deref(), Some(Path::new("dir/with=sign.txt")));
    assert!(config.to_toml().unwrap().contains("rope_theta = 1000000.0"));
    assert_eq!(config.training.steps, 4, "the last one wins");
}

#[test]
fn where_a_text_belongs_any_word_is_one() {
    for word in ["42", "1e5", "true", "1979-05-27", "18446744073709551615", "0x2a"] {
        let config = load(&minimal(), &[&format!("run.name={word}")]).unwrap();
        assert_eq!(config.run.name, word);
        let config = load(&minimal(), &[&format!("data.path = {word}"), "run.device = 7"]).unwrap();
        assert_eq!((config.data.path.as_deref(), config.run.device.as_str()), (Some(Path::new(word)), "7"));
    }
    for quoted in ["\"42\"", "'42'"] {
        assert_eq!(load(&minimal(), &[&format!("run.name={quoted}")]).unwrap().run.name, "42");
    }
    // Every key that holds a text, wherever it stands.
    let files = [full(), minimal().replace(&format!("[model]{MODEL}"), "[init]\nfrom = \"m\"\n"), minimal()];
    for text in files {
        for (section, keys) in toml::from_str::<toml::Table>(&text).unwrap() {
            for (key, _) in keys.as_table().unwrap().iter().filter(|(_, value)| value.is_str()) {
                let loaded = load(&text, &[&format!("{section}.{key}=42")]);
                // Some take one of a few words only.
                let said = loaded.err().map(|e| e.to_string()).unwrap_or_default();
                assert!(
                    !said.contains("expected a string") && !said.contains("expected path"),
                    "{section}.{key}: {said}"
                );
            }
        }
    }
}

#[test]
fn a_model_to_start_from_brings_its_own_sizes() {
    let init = minimal().replace(&format!("[model]{MODEL}"), "[init]\nfrom = \"some/model\"\n");
    for (text, key, mend) in [
        (&init, "model.max_position_embeddings=512", "leave out --set model.…"),
        (&init, "model.rope_parameters.rope_theta=1e6", "leave out --set model.…"),
        (&minimal(), "init.from=m", "remove the [model] section"),
    ] {
        let message = refusal(text, &[key]);
        assert!(message.starts_with("model = (set): [init] from brings its own configuration"), "{key}: {message}");
        assert!(message.contains(mend) && message.contains("max_position_embeddings"), "{key}: {message}");
    }
    let message = refusal(&init.replace("[data]", "[model]\nattention = \"mla\"\n[data]"), &[]);
    assert!(message.starts_with("model = (set)") && message.contains("remove the [model] section"), "{message}");
}

#[test]
fn fewer_steps_than_the_warm_up_are_refused_with_what_to_set() {
    let warm = minimal() + "[lr_scheduler]\nwarmup_steps = 40\n";
    let message = refusal(&warm, &["training.steps=20"]);
    assert!(message.contains("lr_scheduler.warmup_steps = 40: must not exceed training.steps = 20"), "{message}");
    let (_, advised) = message.split_once("--set ").unwrap();
    load(&warm, &["training.steps=20", advised]).unwrap();
}

#[test]
fn a_history_rises_and_ends_before_the_run_does() {
    let plan = |until: u64, steps: u64| format!("[[history]]\nuntil = {until}\nsteps = {steps}\n");
    let text = minimal() + &plan(40, 50) + &plan(60, 70);
    assert_eq!(load(&text, &[]).unwrap().history.len(), 2);
    for (text, key) in [
        (minimal() + &plan(60, 70) + &plan(40, 50), "history.until = 40"),
        (minimal() + &plan(0, 70), "history.until = 0"),
        (minimal() + &plan(5, 0), "history.until = 5"),
        (minimal() + &plan(101, 200), "training.steps = 100"),
    ] {
        assert!(refusal(&text, &[]).starts_with(key));
    }
}

#[test]
fn overrides_that_say_nothing_are_refused() {
    for (expression, expected) in [
        ("training.steps", "must look like section.key=value"),
        ("=3", "names no key"),
        ("training.=3", "names no key"),
        ("run.name.first=x", "name is not a section"),
        ("training.steps=many", "invalid type: string \"many\""),
        ("training.steps=", "invalid type: string \"\""),
        ("training.steps=-1", "invalid value: integer `-1`"),
        ("training.steps=18446744073709551615", "must lie between -9223372036854775808 and 9223372036854775807"),
        ("training.steps=-99999999999999999999", "must lie between -9223372036854775808 and"),
        ("optimizer.kind=sgd", "unknown variant `sgd`, expected `adamw` or `muon`"),
        ("optimizer.betas=[0.9, 0.95, 0.99]", "invalid length 3, expected an array of length 2"),
        ("optimizer.betas=[0.9]", "invalid length 1, expected an array of length 2"),
    ] {
        let message = refusal(&minimal(), &[expression]);
        assert!(message.contains(expected), "{expression}: {message}");
    }
}

#[test]
fn unknown_keys_are_refused_wherever_they_stand() {
    let sections =
        ["run", "model", "data", "optimizer", "lr_scheduler", "training", "eval", "checkpoint", "metrics", "init"];
    for section in sections {
        let message = refusal(&minimal(), &[&format!("{section}.stpes=1")]);
        assert!(message.contains("unknown field `stpes`"), "{section}: {message}");
    }
    assert!(refusal(&minimal(), &["trainign.steps=1"]).contains("unknown field `trainign`"));
    let message = refusal(&minimal().replace("batch_size", "batchsize"), &[]);
    assert!(message.contains("run.toml: ") && message.contains("unknown field `batchsize`"), "{message}");
    assert!(message.contains("line ") && message.contains("column "), "{message}");
}

#[test]
fn what_is_missing_or_no_toml_is_said_with_its_place() {
    for (text, expected) in [
        (minimal().replace("lr = 1e-2\n", ""), "missing field `lr`"),
        (minimal().replace("[run]\nname = \"small\"\n", ""), "missing field `run`"),
        (minimal().replace("steps = 100", "steps = = 100"), "line "),
        (minimal() + "[training]\n", "duplicate key"),
    ] {
        let message = refusal(&text, &[]);
        assert!(message.contains(expected), "{message}");
    }
    let message = RunConfig::load(Path::new("no/such.toml"), &[]).unwrap_err().to_string();
    assert!(message.starts_with("no/such.toml: "), "{message}");
}

#[test]
fn every_rule_refuses_what_breaks_it_and_names_the_key() {
    let too_many_steps = format!("training.steps={}", (1u64 << 40) + 1);
    for (expression, key) in [
        ("run.name=\"\"", "run.name"),
        ("run.name=\"a/b\"", "run.name"),
        ("run.name=\"..\"", "run.name"),
        ("run.name=\"a b\"", "run.name"),
        ("data.dataset=\"d.toml\"", "data.path"),
        ("data.seq_len=0", "data.seq_len"),
        ("data.seq_len=1048577", "data.seq_len"),
        ("init.from=\"m\"", "model"),
        ("training.steps=9223372036854775807", "training.steps"),
        ("training.steps=0", "training.steps"),
        (&too_many_steps, "training.steps"),
        ("training.batch_size=0", "training.batch_size"),
        ("training.batch_size=1048577", "training.batch_size"),
        ("training.micro_batch_size=0", "training.micro_batch_size"),
        ("training.threads=0", "training.threads"),
        ("training.threads=1025", "training.threads"),
        ("training.z_loss=2", "training.z_loss"),
        ("optimizer.lr=0.0", "optimizer.lr"),
        ("optimizer.lr=-1.0", "optimizer.lr"),
        ("optimizer.lr=nan", "optimizer.lr"),
        ("optimizer.lr=inf", "optimizer.lr"),
        ("optimizer.betas=[1.0, 0.9]", "optimizer.betas"),
        ("optimizer.betas=[0.9, -0.1]", "optimizer.betas"),
        ("optimizer.betas=[0.9, nan]", "optimizer.betas"),
        ("optimizer.eps=0.0", "optimizer.eps"),
        ("optimizer.eps=inf", "optimizer.eps"),
        ("optimizer.weight_decay=-0.1", "optimizer.weight_decay"),
        ("optimizer.weight_decay=nan", "optimizer.weight_decay"),
        ("optimizer.grad_clip=0.0", "optimizer.grad_clip"),
        ("optimizer.grad_clip=inf", "optimizer.grad_clip"),
        ("lr_scheduler.decay_fraction=1.1", "lr_scheduler.decay_fraction"),
        ("lr_scheduler.decay_fraction=nan", "lr_scheduler.decay_fraction"),
        ("lr_scheduler.min_lr_ratio=-0.1", "lr_scheduler.min_lr_ratio"),
        ("lr_scheduler.warmup_steps=101", "lr_scheduler.warmup_steps"),
        ("eval.batches=0", "eval.batches"),
        ("eval.sample_tokens=0", "eval.sample_tokens"),
        ("eval.sample_tokens=1048577", "eval.sample_tokens"),
        ("eval.temperature=-1.0", "eval.temperature"),
        ("eval.temperature=nan", "eval.temperature"),
        ("checkpoint.keep=0", "checkpoint.keep"),
        ("metrics.every=0", "metrics.every"),
    ] {
        let message = refusal(&minimal(), &[expression]);
        assert!(message.starts_with(&format!("{key} = ")), "{expression}: {message}");
    }
    for momentum in ["1.0", "-0.1", "nan"] {
        let message = refusal(&minimal(), &["optimizer.kind=muon", &format!("optimizer.momentum={momentum}")]);
        assert!(message.starts_with("optimizer.momentum = ") && message.contains("0 ≤ μ < 1"), "{message}");
    }
    let message = refusal(&minimal(), &["optimizer.momentum=0.9"]);
    assert!(message.contains("optimizer.momentum = 0.9: kind = \"adamw\" has none"), "{message}");
    let without = |part: &str| refusal(&minimal().replace(part, ""), &[]);
    assert!(without("path = \"text.txt\"\n").starts_with("data.dataset = (absent)"));
    assert!(without(&format!("[model]{MODEL}")).starts_with("model = (absent)"));
}

#[test]
fn values_on_the_edge_of_a_rule_pass() {
    for expression in [
        "run.name=\"A-1_b.c\"",
        "data.seq_len=1048576",
        "training.steps=1099511627776",
        "training.threads=1024",
        "optimizer.betas=[0.0, 0.0]",
        "lr_scheduler.decay_fraction=1.0",
        "lr_scheduler.min_lr_ratio=1",
        "lr_scheduler.warmup_steps=100",
        "eval.temperature=0",
        "optimizer.lr=1",
    ] {
        load(&minimal(), &[expression]).unwrap_or_else(|e| panic!("{expression}: {e}"));
    }
}

#[test]
fn keys_that_change_nothing_are_named() {
    for (kind, elastic, expected) in [
        ("constant", false, &["lr_scheduler.min_lr_ratio", "lr_scheduler.decay_fraction", "training."][..]),
        ("linear", true, &["lr_scheduler.decay_fraction"]),
        ("cosine", true, &["lr_scheduler.decay_fraction"]),
        ("wsd", true, &[]),
        ("wsd", false, &["training.distillation", "training.elastic_start"]),
    ] {
        let kind = format!("lr_scheduler.kind={kind}");
        let set = ["lr_scheduler.min_lr_ratio=0.1", "lr_scheduler.decay_fraction=0.3"];
        let training = ["training.distillation=0.7", "training.elastic_start=0.1"];
        let config = load(&minimal(), &[&set[..], &training, &[&kind]].concat()).unwrap();
        let notes = config.without_effect(elastic);
        for key in [
            "lr_scheduler.min_lr_ratio",
            "lr_scheduler.decay_fraction",
            "training.distillation",
            "training.elastic_start",
        ] {
            let told =
                notes.iter().any(|note| note.starts_with(&format!("{key} = 0.")) && note.contains("has no effect"));
            assert_eq!(
                told,
                expected.iter().any(|start| key.starts_with(start)),
                "{kind}, {elastic}: {key} in {notes:?}"
            );
        }
        // What a run writes out, defaults and all, says nothing of the kind.
        let written = load(&load(&minimal(), &[kind.as_str()]).unwrap().to_toml().unwrap(), &[]).unwrap();
        assert!(written.without_effect(elastic).is_empty(), "{kind}");
    }
}

#[test]
fn what_is_trained_is_named_by_patterns_that_names_match() {
    let model = || {
        let (config, _) = toml::from_str::<ModelSection>(MODEL).unwrap().resolve(11, 24).unwrap();
        lowkey_model::CausalLm::init(&config, 1, &burn::tensor::Device::flex())
    };
    assert!(refusal(&minimal(), &["training.trainable=[]"]).contains("nothing would be trained"));
    assert!(refusal(&minimal(), &["training.trainable=[\"a[b\"]"]).contains("is no pattern"));
    let config = load(&minimal(), &["training.trainable=[\"*norm.weight\", \"*q_prj*\"]"]).unwrap();
    let why = config.frozen(model()).map(|_| ()).unwrap_err().to_string();
    assert!(why.contains("*q_prj*") && why.contains("model.embed_tokens.weight"), "{why}");

    let config = load(&minimal(), &["training.trainable=[\"*norm.weight\"]"]).unwrap();
    let frozen = config.frozen(model()).unwrap();
    let trained = frozen.trained_parameters();
    assert!(!trained.is_empty() && trained.iter().all(|p| p.name.ends_with("norm.weight")));
    assert_eq!(trained.len(), model().parameters().iter().filter(|p| p.name.ends_with("norm.weight")).count());
    // Every product with a weight loses the one that would give that weight's gradient.
    let all = model().config.matrix_weights();
    assert_eq!(config.flops_beside(&model().config), -2.0 * all as f64);
}
