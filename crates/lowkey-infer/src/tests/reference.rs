//! Greedy continuations that transformers computed, where the reference checkpoints lie beside the repository.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;

use super::*;
use crate::{GenerateConfig, Weights, generate_batch};

/// A case whose model this program computes must load; the others must say why not.
const ACCEPTED: usize = 14;

/// A tensor of 64-bit integers as rows.
fn id_rows(file: &SafeTensors, name: &str) -> Vec<Vec<u32>> {
    let tensor = file.tensor(name).unwrap();
    let ids: Vec<u32> = tensor
        .data()
        .chunks_exact(8)
        .map(|bytes| u32::try_from(i64::from_le_bytes(bytes.try_into().unwrap())).unwrap())
        .collect();
    ids.chunks(tensor.shape()[1]).map(<[u32]>::to_vec).collect()
}

fn check(dir: &Path, model: &CausalLm) {
    let name = dir.display();
    let bytes = std::fs::read(dir.join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (prompts, expected) = (id_rows(&file, "input_ids"), id_rows(&file, "greedy_ids"));
    let count = expected[0].len();
    for (prompt, expected) in prompts.iter().zip(&expected) {
        assert_eq!(greedy_uncached(model, prompt, count), *expected, "{name}, without a cache");
    }
    let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let fused = fused_layers(model);
    let weights = Weights { model, fused: &fused };
    for form in FORMS {
        for prefill_chunk in [4, 512] {
            let config = GenerateConfig { max_new_tokens: count, form, prefill_chunk, ..GenerateConfig::default() };
            let mut go_on = |_, _| ControlFlow::Continue(());
            let found = generate_batch(weights, &prompts, &config, &Device::flex(), &mut go_on).unwrap();
            let found: Vec<Vec<u32>> = found.into_iter().map(|generation| generation.ids).collect();
            assert_eq!(found, expected, "{name}, {form}, chunk {prefill_chunk}");
        }
    }
}

#[test]
fn greedy_continuations_of_transformers_are_reproduced() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/reference/cases");
    let Ok(entries) = std::fs::read_dir(&root) else {
        println!("no reference cases at {}: skipped", root.display());
        return;
    };
    let mut dirs: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect();
    dirs.sort();
    let mut accepted = 0;
    for dir in &dirs {
        match CausalLm::load(dir, &Device::flex()) {
            Ok(model) => {
                check(dir, &model);
                accepted += 1;
                println!("{}: reproduced", dir.display());
            }
            Err(error) => {
                let text = error.to_string();
                assert!(
                    text.contains("mixture-of-experts") || text.contains("model_type"),
                    "{}: refused for another reason: {text}",
                    dir.display()
                );
                println!("{}: refused", dir.display());
            }
        }
    }
    assert!(accepted >= ACCEPTED, "only {accepted} of {} cases ran", dirs.len());
}
