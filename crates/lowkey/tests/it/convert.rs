//! Latents looked at, turned and cut, on a model of a second and on the reference checkpoints.

use std::path::PathBuf;

use burn::tensor::Device;
use lowkey_convert::Rotated;
use lowkey_model::{CausalLm, attention::AttentionConfig, ids_tensor};

use crate::commands::{best, best_of, fixture, json, lowkey, succeed, text};

/// The widest distance of two models' logits over the largest logit.
fn apart(a: &CausalLm, b: &CausalLm, ids: &[u32]) -> f32 {
    let device = Device::flex();
    let logits =
        |model: &CausalLm| model.forward(ids_tensor(ids, 1, ids.len(), &device)).try_into_vec_as::<f32>().unwrap();
    let (a, b) = (logits(a), logits(b));
    let most = a.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    a.iter().zip(&b).fold(0.0f32, |worst, (a, b)| worst.max((a - b).abs())) / most
}

#[test]
fn a_model_is_narrowed_and_runs_on() {
    let dir = tempfile::tempdir().unwrap();
    let mut losses = Vec::new();
    // Two layers with 10 directions each.
    for (budget, kept) in [("4", 4), ("10", 10), ("80%", 16), ("100%", 20)] {
        let out = dir.path().join(format!("kv{kept}"));
        let report = json(&["convert", text(&best()), "--kv-rank-budget", budget, "--out", text(&out), "--json"]);
        let ranks: Vec<u64> =
            report["report"]["kept"].as_array().unwrap().iter().map(|rank| rank.as_u64().unwrap()).collect();
        assert_eq!(ranks.iter().sum::<u64>(), kept, "{report}");
        losses.push(report["report"]["calibration"]["loss_after"].as_f64().unwrap());
        let info = json(&["info", text(&out), "--json"]);
        // In bf16, with the two rotated keys of 4.
        assert_eq!(info["cache_bytes_per_token_bf16"], 2 * (kept + 8), "{info}");
        let greedy = ["generate", text(&out), "--prompt", "The cat", "--temperature", "0", "--max-new-tokens", "20"];
        let expanded = succeed(&[&greedy[..], &["--decode", "expanded"]].concat());
        assert_eq!(succeed(&[&greedy[..], &["--decode", "absorbed"]].concat()), expanded);
    }
    // A model of twelve steps hardly uses its latents, and losing what is only noise may even help it a little.
    assert!(losses.windows(2).all(|pair| pair[0] > pair[1] - 2e-4) && losses[0] > losses[3] + 1e-3, "{losses:?}");
    // All directions: only rotated.
    let (before, after) = (
        CausalLm::load(&best(), &Device::flex()).unwrap(),
        CausalLm::load(&dir.path().join("kv20"), &Device::flex()).unwrap(),
    );
    let ids: Vec<u32> = (0..32).map(|i| (i * 5) % 60).collect();
    assert!(apart(&before, &after, &ids) < 1e-5);
    // A cut model leaves as a plain one that computes the same.
    let (cut, export) = (dir.path().join("kv10"), dir.path().join("export"));
    succeed(&["export", text(&cut), "--to", "hf", "--out", text(&export)]);
    let load = |dir: &PathBuf| CausalLm::load(dir, &Device::flex()).unwrap();
    assert!(apart(&load(&cut), &load(&export), &ids) < 1e-5);
    assert_eq!(load(&export).config.cache_numbers(), 28);
    let (code, _, message) = lowkey(&["convert", text(&best()), "--kv-rank-budget", "10", "--out", text(&cut)]);
    assert!(code == 1 && message.contains("--overwrite"), "{message}");
    let (code, _, message) = lowkey(&["convert", text(&cut), "--kv-rank-budget", "4", "--data", "none.txt"]);
    assert!(code == 1 && message.contains("none.txt"), "{message}");
    for budget in ["0", "21", "1", "110%", "half", "0%"] {
        let (code, _, message) = lowkey(&["convert", text(&best()), "--kv-rank-budget", budget]);
        assert!(code == 2 && message.contains("budget"), "{budget}: {message}");
    }
}

#[test]
fn spectra_are_told_and_need_a_latent() {
    let table = succeed(&["info", text(&best()), "--spectrum"]);
    assert!(table.contains("recommended") && table.contains("of 20 in all"), "{table}");
    assert!(table.lines().all(|line| line.chars().count() <= 100 || line.contains('/')), "{table}");
    let found = json(&["info", text(&best()), "--spectrum", "--energy", "0.9", "--json"]);
    let layers = found["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 2);
    for layer in layers {
        assert_eq!((layer["kv_lora_rank"].as_u64(), layer["covariance"].as_array().unwrap().len()), (Some(10), 10));
        let share: f64 = layer["readout"].as_array().unwrap().iter().map(|share| share.as_f64().unwrap()).sum();
        assert!((share - 1.0).abs() < 1e-9);
        assert!((1..=10).contains(&layer["recommended_rank"].as_u64().unwrap()));
    }
    let grouped = best_of("grouped-spectrum", &["model.attention=gqa"]);
    let (code, _, message) = lowkey(&["info", text(&grouped), "--spectrum"]);
    assert!(code == 1 && message.contains("no latent"), "{message}");
}

#[test]
fn full_keys_and_values_become_a_latent() {
    let grouped = best_of("grouped-latent", &["model.attention=gqa"]);
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    let report = json(&["convert", text(&grouped), "--to", "mla", "--out", text(&whole), "--json"]);
    let report = &report["report"];
    assert!(report["exact"]["max_logit_difference"].as_f64().unwrap() < 1e-4, "{report}");
    assert_eq!((report["cache_numbers_before"].as_u64(), report["cache_numbers"].as_u64()), (Some(48), Some(48)));
    let load = |dir: &PathBuf| CausalLm::load(dir, &Device::flex()).unwrap();
    let ids: Vec<u32> = (0..32).map(|i| (i * 5) % 60).collect();
    assert!(apart(&load(&grouped), &load(&whole), &ids) < 1e-5);
    let greedy = |model: &PathBuf, form| {
        let prompt = ["generate", text(model), "--prompt", "The cat", "--temperature", "0", "--max-new-tokens", "20"];
        succeed(&[&prompt[..], &["--decode", form]].concat())
    };
    let expected = greedy(&grouped, "auto");
    for form in ["expanded", "absorbed"] {
        assert_eq!(greedy(&whole, form), expected);
    }
    for budget in ["25%", "36", "100%"] {
        let out = dir.path().join(budget);
        let asked = ["convert", text(&grouped), "--to", "mla", "--kv-rank-budget", budget, "--tokens", "2000"];
        let made = json(&[&asked[..], &["--out", text(&out), "--json"]].concat());
        let most = if budget == "25%" {
            12
        } else if budget == "36" {
            36
        } else {
            48
        };
        assert!(made["report"]["cache_numbers"].as_u64().unwrap() <= most, "{made}");
        assert_eq!(load(&out).config.cache_numbers() as u64, made["report"]["cache_numbers"].as_u64().unwrap());
        // A model that has learnt little loses little; what is kept whole loses nothing.
        let [before, after] =
            ["loss_before", "loss_after"].map(|key| made["report"]["calibration"][key].as_f64().unwrap());
        assert!(after - before < if budget == "100%" { 1e-4 } else { 0.1 }, "{made}");
        assert!(out.join("tokenizer.json").is_file());
        greedy(&out, "absorbed");
    }
    let table = dir.path().join("table");
    let asked = ["convert", text(&grouped), "--to", "mla", "--kv-rank", "6", "--rope-dim", "4", "--tokens", "2000"];
    let table = succeed(&[&asked[..], &["--importance", "weights", "--out", text(&table)]].concat());
    assert!(table.contains("GQA-2 as MLA") && table.contains("perplexity"), "{table}");
    for (arguments, code, fragment) in [
        (&["--to", "mla", "--kv-rank", "40", "--out", "x"][..], 2, "for a latent to hold"),
        (&["--to", "mla", "--kv-rank-budget", "1", "--out", "x"], 2, "numbers per token"),
        (&["--to", "mla", "--kv-rank-budget", "20", "--rope-dim", "10", "--out", "x"], 2, "10 that turn"),
        (&["--to", "mla", "--kv-rank-budget", "110%", "--out", "x"], 2, "share such as 50%"),
        (&["--to", "mla", "--rope-dim", "4", "--out", "x"], 2, "--kv-rank"),
        (&["--rope-dim", "4"], 2, "--to"),
        (&[], 2, "--to mla"),
        (&["--kv-rank-budget", "4", "--out", "x"], 1, "no latent; --to mla"),
    ] {
        let (found, _, message) = lowkey(&[&["convert", text(&grouped)][..], arguments].concat());
        assert!(found == code && message.contains(fragment), "{arguments:?}: {found} {message}");
    }
    let (code, _, message) = lowkey(&["convert", text(&best()), "--to", "mla", "--out", "x"]);
    assert!(code == 1 && message.contains("latents already"), "{message}");
    let (code, _, message) = lowkey(&["export", text(&whole), "--to", "hf", "--out", "x"]);
    assert!(code == 1 && message.contains("rope_pairs"), "{message}");
    // Of one key head the frequencies are those that DeepSeek's attention chooses, and a norm that does nothing stands for none.
    let single = best_of("single-latent", &["model.attention=mqa"]);
    let (latent, export) = (dir.path().join("latent"), dir.path().join("export"));
    succeed(&["convert", text(&single), "--to", "mla", "--out", text(&latent)]);
    succeed(&["export", text(&latent), "--to", "hf", "--out", text(&export)]);
    assert_eq!(load(&export).config.family.model_type(), "deepseek_v3");
    assert!(apart(&load(&single), &load(&export), &ids) < 1e-5);
    assert!(!std::path::Path::new("x").exists());
}

/// Layer by layer comes to what the whole model comes to, in files as in the report.
#[test]
fn a_model_is_converted_one_layer_at_a_time() {
    let grouped = best_of("grouped-by-layer", &["model.attention=gqa"]);
    let dir = tempfile::tempdir().unwrap();
    let convert = |name: &str, more: &[&str]| {
        let out = dir.path().join(name);
        let asked = ["convert", text(&grouped), "--to", "mla", "--out", text(&out), "--json"];
        (json(&[&asked[..], more].concat())["report"].clone(), out)
    };
    let load = |dir: &PathBuf| CausalLm::load(dir, &Device::flex()).unwrap();
    let ids: Vec<u32> = (0..32).map(|i| (i * 5) % 60).collect();
    let (report, exact) = convert("exact", &["--by-layer"]);
    assert!(report["exact"]["max_logit_difference"].as_f64().unwrap() < 1e-4, "{report}");
    assert!(apart(&load(&grouped), &load(&exact), &ids) < 1e-5);
    assert!(exact.join("tokenizer.json").is_file() && exact.join("model.safetensors.index.json").is_file());
    let fixed =
        ["--kv-rank", "6", "--rope-dim", "4", "--tokens", "2000", "--rope-keep", "energy", "--importance", "readers"];
    let (whole, of_whole) = convert("whole", &fixed);
    let (parts, of_parts) = convert("parts", &[&fixed[..], &["--by-layer"]].concat());
    assert!(apart(&load(&of_whole), &load(&of_parts), &ids) < 1e-4);
    let stages = |report: &serde_json::Value| -> Vec<(String, f64, f64)> {
        let number = |stage: &serde_json::Value, key: &str| stage[key].as_f64().unwrap();
        let of_stage = |stage: &serde_json::Value| {
            (stage["stage"].as_str().unwrap().to_owned(), number(stage, "calibration"), number(stage, "held_out"))
        };
        report["stages"].as_array().unwrap().iter().map(of_stage).collect()
    };
    let (found, expected) = (stages(&parts), stages(&whole));
    let names: Vec<&str> = found.iter().map(|(name, ..)| name.as_str()).collect();
    assert_eq!(names, ["source", "rotated_keys_narrowed", "latents_cut"]);
    for ((name, a, b), (same, c, d)) in found.iter().zip(&expected) {
        assert!(name == same && (a - c).abs() < 1e-5 && (b - d).abs() < 1e-5, "{found:?} {expected:?}");
    }
    // Half of 48 numbers per token, in bytes of bf16; two frequencies for one, in bf16.
    let more =
        ["--kv-rank-budget", "48B", "--rope-dim", "4", "--rope-fold", "2", "--tokens", "2000", "--dtype", "bf16"];
    for (name, more) in [("whole of bytes", &more[..]), ("parts of bytes", &[&more[..], &["--by-layer"]].concat())] {
        let (report, out) = convert(name, more);
        assert_eq!(
            (report["cache_numbers"].as_u64(), report["qk_rope_head_dim"].as_u64()),
            (Some(24), Some(4)),
            "{report}"
        );
        let config = std::fs::read_to_string(out.join("config.json")).unwrap();
        assert!(config.contains("\"bfloat16\""), "{config}");
        assert_eq!(load(&out).config.cache_numbers(), 24);
    }
    for (arguments, fragment) in [
        (&["--to", "mha", "--by-layer"][..], "--by-layer goes with --to mla"),
        (&["--by-layer"], "--to"),
        (&["--to", "mla", "--by-layer", "--kv-rank", "40"], "for a latent to hold"),
        (&["--to", "mla", "--kv-rank-budget", "manyB"], "bytes per token in bf16 such as 512B"),
    ] {
        let (code, _, message) = lowkey(&[&["convert", text(&grouped), "--out", "x"][..], arguments].concat());
        assert!(code == 2 && message.contains(fragment), "{arguments:?}: {code} {message}");
    }
    assert!(!std::path::Path::new("x").exists());
}

#[test]
fn a_latent_becomes_full_keys_and_values_again() {
    let grouped = best_of("grouped-latent-again", &["model.attention=gqa"]);
    let dir = tempfile::tempdir().unwrap();
    let [latent, back, one] = ["latent", "back", "one"].map(|name| dir.path().join(name));
    let load = |dir: &PathBuf| CausalLm::load(dir, &Device::flex()).unwrap();
    let ids: Vec<u32> = (0..32).map(|i| (i * 5) % 60).collect();
    succeed(&["convert", text(&grouped), "--to", "mla", "--out", text(&latent)]);
    let report = json(&["convert", text(&latent), "--to", "mha", "--out", text(&back), "--json"]);
    let report = &report["report"];
    assert_eq!((report["to"].as_str(), report["model_type"].as_str()), (Some("GQA-2"), Some("llama")), "{report}");
    assert!(report["exact"]["max_logit_difference"].as_f64().unwrap() < 1e-4, "{report}");
    assert_eq!(report["greedy_tokens"]["same"], report["greedy_tokens"]["of"], "{report}");
    assert!(apart(&load(&grouped), &load(&back), &ids) < 1e-5);
    assert_eq!(load(&back).config.rope, load(&grouped).config.rope);
    assert!(back.join("tokenizer.json").is_file());
    let table = succeed(&["convert", text(&latent), "--to", "mqa", "--out", text(&one)]);
    assert!(table.contains("MLA as MQA (llama)") && table.contains("tokens the same"), "{table}");
    assert!(apart(&load(&grouped), &load(&one), &ids) < 1e-5);
    for (model, to) in [(&back, "hf"), (&back, "gguf"), (&one, "hf"), (&one, "gguf")] {
        let out = dir.path().join(format!("export-{}-{to}", model.file_name().unwrap().to_str().unwrap()));
        succeed(&["export", text(model), "--to", to, "--out", text(&out)]);
        succeed(&["verify", text(&out), "--source", text(model)]);
    }
    // A latent that is normalised has no such form; a text finds the nearest model, and what it loses is told.
    let story = fixture().join("story.txt");
    let near = dir.path().join("near");
    let made = json(&["convert", text(&best()), "--to", "mha", "--data", text(&story), "--out", text(&near), "--json"]);
    let made = &made["report"];
    assert_eq!((made["latent_norms_absorbed"].as_bool(), made["exact"].is_null()), (Some(true), true), "{made}");
    let [before, after] = ["loss_before", "loss_after"].map(|key| made["calibration"][key].as_f64().unwrap());
    assert!(before.is_finite() && after.is_finite() && before != after, "{made}");
    for (model, arguments, code, fragment) in [
        (best(), &["--to", "mha", "--out", "x"][..], 1, "layer 0 normalises its latent"),
        (best(), &["--to", "mqa", "--kv-rank", "4", "--out", "x"], 2, "width of a latent"),
        (grouped, &["--to", "mha", "--out", "x"], 1, "GQA-2 attention has them already"),
    ] {
        let (found, _, message) = lowkey(&[&["convert", text(&model)][..], arguments].concat());
        assert!(found == code && message.contains(fragment), "{arguments:?}: {found} {message}");
    }
    assert!(!std::path::Path::new("x").exists());
}

/// Every dense reference checkpoint with full keys and values is the same model with latents.
#[test]
fn reference_checkpoints_with_full_keys_and_values_become_latent_exactly() {
    let device = Device::flex();
    let (mut turned, mut refused) = (0, 0);
    for case in crate::reference::cases() {
        let Ok(model) = CausalLm::load(&case, &device) else { continue };
        let AttentionConfig::Grouped(grouped) = model.config.attention() else { continue };
        let converted = lowkey_convert::to_mla::exact(&model, &device);
        if grouped.qk_norm {
            assert!(converted.unwrap_err().to_string().contains("qk_norm"));
            refused += 1;
            continue;
        }
        let converted = converted.unwrap();
        let vocab = model.config.vocab_size as u32;
        let ids: Vec<u32> = (0..48).map(|i| (i * i + 7 * i + 1) % vocab).collect();
        let worst = apart(&model, &converted, &ids);
        println!("{}: {worst:.1e}", case.display());
        assert!(worst <= 1e-5, "{}: {worst}", case.display());
        let back = lowkey_convert::to_mha::exact(&converted, lowkey_convert::to_mha::Form::Heads, &device).unwrap();
        let worst = apart(&model, &back, &ids);
        assert!(worst <= 1e-5, "{}, there and back: {worst}", case.display());
        turned += 1;
    }
    assert!(turned >= 3 && refused >= 1, "{turned} and {refused} checkpoints");
}

/// Rotation at full rank on every dense reference checkpoint with MLA.
#[test]
fn reference_checkpoints_are_rotated_without_a_change() {
    let device = Device::flex();
    let mut turned = 0;
    for case in crate::reference::cases() {
        let Ok(model) = CausalLm::load(&case, &device) else { continue };
        if model.config.attention().latent().is_none() {
            continue;
        }
        let vocab = model.config.vocab_size as u32;
        let text: Vec<Vec<u32>> =
            (1..5).map(|row| (0..24).map(|i| (i * i * row + 7 * i + row) % vocab).collect()).collect();
        let rotated = Rotated::new(&model, &text, &device, &mut |_| {}).unwrap();
        let worst = text.iter().map(|ids| apart(&model, &rotated.model, ids)).fold(0.0f32, f32::max);
        println!("{}: {worst:.1e}", case.display());
        assert!(worst <= 1e-5, "{}: {worst}", case.display());
        turned += 1;
    }
    assert!(turned >= 15, "only {turned} checkpoints with MLA");
}
