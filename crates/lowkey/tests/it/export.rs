//! Exports as a user makes them, and of the reference checkpoints.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::Device;
use lowkey_export::{Options, Source, Target, Text, export, plan::LayerForm, source::canonical, verify};
use lowkey_model::CausalLm;

use crate::commands::{best, json, lowkey, succeed, text};
use crate::reference::{announce, cases, integers, own_cases};

#[test]
fn every_layout_is_made_verified_and_generates() {
    let dir = tempfile::tempdir().unwrap();
    let model = best();
    let ids = |model: &Path, form: &str| {
        let found = json(&[
            "generate",
            text(model),
            "--prompt",
            "The cat",
            "--temperature",
            "0",
            "--max-new-tokens",
            "20",
            "--decode",
            form,
            "--json",
        ]);
        found["ids"].clone()
    };
    let expected = ids(&model, "expanded");
    for (to, form) in [("hf", "auto"), ("absorbed", "absorbed"), ("fused", "fused"), ("gguf", "")] {
        let out = dir.path().join(to);
        let mut arguments = vec!["export", text(&model), "--to", to, "--out", text(&out)];
        if to == "fused" {
            arguments.extend(["--form", "fused"]);
        }
        let printed = succeed(&arguments);
        assert!(printed.contains("perplexity") && printed.contains(&format!("{to} in f32")), "{printed}");
        let page = std::fs::read_to_string(out.join("CERTIFICATE.md")).unwrap();
        assert!(page.contains("held-out split of story"), "{page}");
        assert!(succeed(&["verify", text(&out), "--source", text(&model)]).contains("the certificate holds"));
        if to == "gguf" {
            let (code, _, message) = lowkey(&["verify", text(&out)]);
            assert!(code == 1 && message.contains("--source"), "{message}");
        } else {
            assert_eq!(ids(&out, form), expected, "{to}");
            let card = std::fs::read_to_string(out.join("README.md")).unwrap();
            assert!(card.contains("| optimiser steps | 12 |"), "{card}");
        }
        let (code, _, message) = lowkey(&arguments);
        assert!(code == 1 && message.contains("--overwrite"), "{message}");
    }
    let verdict = json(&["verify", text(&dir.path().join("hf")), "--json"]);
    assert!(verdict["holds"].as_bool().unwrap() && verdict["evidence"]["logits"]["positions"].is_u64());

    let side = dir.path().join("fused/fused.safetensors");
    let mut bytes = std::fs::read(&side).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&side, bytes).unwrap();
    let (code, _, message) = lowkey(&["verify", text(&dir.path().join("fused"))]);
    assert!(code == 1 && message.contains("fused.safetensors: SHA-256"), "{message}");
    let (code, _, message) = lowkey(&["generate", text(&model), "--decode", "fused", "--prompt", "a"]);
    assert!(code != 0 && message.contains("export"), "{message}");
}

#[test]
fn wrong_use_of_export_says_what_is_right() {
    let model = best();
    for (more, code, part) in [
        (&["--to", "onnx"][..], 2, "gguf"),
        (&["--to", "hf", "--dtype", "q8_0"][..], 2, "GGUF"),
        (&["--to", "gguf", "--out", "model.gguf"][..], 2, "names a folder"),
        (&["--to", "hf", "--form", "fused"][..], 2, "--to fused"),
        (&["--to", "fused", "--form", "latent"][..], 2, "absorbed"),
        (&["--to", "hf", "--bound", "speed=3"][..], 2, "perplexity"),
        (&["--to", "hf", "--context", "0"][..], 2, "at least 1"),
    ] {
        let (found, _, message) = lowkey(&[&["export", text(&model)], more].concat());
        assert!(found == code && message.contains(part), "{more:?}: {found} {message}");
    }
    let (code, _, message) = lowkey(&["verify", text(&model)]);
    assert!(code == 1 && message.contains("certificate.json"), "{message}");
}

/// Every dense case of transformers, in every layout that can hold it: identical greedy tokens to its last position, under YaRN
/// past the original context; and import, export, import keeps every bit.
#[test]
fn reference_checkpoints_export_to_every_layout() {
    let device = Device::flex();
    // Of how many checkpoints each layout was made.
    let mut made: BTreeMap<&str, usize> = BTreeMap::new();
    let mut refused = Vec::new();
    for case in cases() {
        let Ok(source) = Source::open(&case, &device) else { continue };
        let (ids, shape) = integers(&case, "input_ids");
        let rows = ids.chunks(shape[1]).map(|row| row.iter().take(24).map(|id| *id as u32).collect());
        let sequences: Vec<Vec<u32>> = rows.collect();
        for to in ["hf", "absorbed", "fused", "gguf"] {
            let out = tempfile::tempdir().unwrap();
            let target = Target::parse(to, "f32").unwrap();
            let options = Options {
                bounds: target.bounds(),
                target,
                out: out.path().join("out"),
                overwrite: false,
                form: (to == "fused").then_some(LayerForm::Fused),
                context: None,
                text: Text { description: "the case's".into(), sequences: sequences.clone() },
                max_shard_bytes: 20_000,
            };
            let certificate = match export(&source, &options, &device, &mut |_| {}) {
                Ok(certificate) => certificate,
                Err(e) => {
                    let mla = source.model.config.attention().latent().is_some();
                    let expected = matches!(e, lowkey_export::Error::Unsupported { .. }) && (!mla || to == "gguf");
                    assert!(expected, "{}, {to}: {e}", case.display());
                    println!("{} {to}: {e}", case.display());
                    refused.push(format!("{to} {}", case.file_name().unwrap().to_string_lossy()));
                    continue;
                }
            };
            for greedy in &certificate.evidence.greedy {
                assert_eq!(greedy.source, greedy.export, "{}, {to}", case.display());
                assert_eq!(
                    greedy.prompt.len() + greedy.source.len(),
                    source.model.config.max_position_embeddings.min(80)
                );
            }
            let verdict = verify(&options.out, Some(&source), &device, &mut |_| {}).unwrap();
            assert!(verdict.failures.is_empty(), "{}, {to}: {:?}", case.display(), verdict.failures);
            if to == "hf" {
                let again = CausalLm::load(&options.out, &device).unwrap();
                let source = canonical(&source.model).unwrap();
                assert_eq!(again.config, source.config, "{}", case.display());
                for (a, b) in again.parameters().into_iter().zip(source.parameters()) {
                    let bits = |p: lowkey_model::Parameter| -> Vec<u32> {
                        p.value.try_into_vec_as::<f32>().unwrap().iter().map(|x| x.to_bits()).collect()
                    };
                    assert_eq!((&a.name, bits(a.clone())), (&b.name, bits(b.clone())), "{}", case.display());
                }
            }
            *made.entry(to).or_default() += 1;
        }
    }
    let second = cases().len() > own_cases().len();
    // Four have no latent to absorb.
    let expected = |own: usize, of_second: usize| own + if second { of_second } else { 0 };
    assert_eq!(made["hf"], expected(19, 15));
    assert_eq!(made["absorbed"], expected(15, 12));
    assert_eq!(made["fused"], expected(15, 12));
    // GGUF has no place for biases beside a latent, in the feed-forward layers, or for another ε of the latent's norm.
    let mut of_gguf: Vec<&String> = refused.iter().filter(|name| name.starts_with("gguf")).collect();
    of_gguf.sort();
    let mut known = vec!["gguf llama_biases", "gguf v2_mlp_bias", "gguf v3_biases"];
    if second {
        known.extend(["gguf minicpm3", "gguf v3_attn_bias", "gguf v3_eps"]);
    }
    known.sort();
    assert_eq!(of_gguf, known);
    announce(&format!(
        "export: {} exports of {} reference checkpoints certified",
        made.values().sum::<usize>(),
        made["hf"]
    ));
}
