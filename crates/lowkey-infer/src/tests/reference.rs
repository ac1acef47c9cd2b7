//! Greedy continuations that transformers computed: those of the project's reference checkpoints, and of a second judge's where they
//! lie beside the project.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;

use super::*;
use crate::{GenerateConfig, Weights, generate_batch};

/// Checkpoints of the project.
const OWN: usize = 19;

/// Cases of the second judge whose model this program computes; the others must say why not.
const SECOND: usize = 15;

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

fn folders(root: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
    let mut dirs: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect();
    dirs.sort();
    dirs
}

#[test]
fn greedy_continuations_of_transformers_are_reproduced() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let own = folders(&here.join("../../tests/reference/cases"));
    assert_eq!(own.len(), OWN, "{own:?}");
    for dir in &own {
        check(dir, &CausalLm::load(dir, &Device::flex()).unwrap_or_else(|e| panic!("{}: {e}", dir.display())));
    }
    let second = here.join("../../../shared/reference/cases");
    if !second.is_dir() {
        return;
    }
    let mut accepted = 0;
    for dir in folders(&second) {
        match CausalLm::load(&dir, &Device::flex()) {
            Ok(model) => {
                check(&dir, &model);
                accepted += 1;
            }
            Err(error) => {
                let text = error.to_string();
                let known = text.contains("mixture-of-experts") || text.contains("model_type");
                assert!(known, "{}: refused for another reason: {text}", dir.display());
            }
        }
    }
    assert_eq!(accepted, SECOND);
}
