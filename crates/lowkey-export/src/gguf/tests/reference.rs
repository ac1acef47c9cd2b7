//! The reference checkpoints of the project, and those of a second judge where they lie beside it.

use super::*;

fn folders(root: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
    entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect()
}

#[test]
fn reference_checkpoints_compute_the_same_or_are_refused() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut dirs = folders(&here.join("../../tests/reference/cases"));
    assert_eq!(dirs.len(), 19, "{dirs:?}");
    let second = here.join("../../../shared/reference/cases");
    let both = second.is_dir();
    if both {
        dirs.extend(folders(&second));
    }
    let folder = Folder::new();
    let path = folder.file("x.gguf");
    let (mut same, mut refused) = (Vec::new(), Vec::new());
    for dir in dirs {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let Ok(model) = CausalLm::load(&dir, &Device::flex()) else { continue };
        match write(&path, &model, None, TensorType::F32) {
            Ok(_) => {
                let again = read_model(&path, &Device::flex()).unwrap();
                let ids: Vec<u32> = (0..40).map(|i| (7 * i + 2) % model.config.vocab_size as u32).collect();
                let off = distance(&logits(&again, &ids), &logits(&model, &ids));
                assert!(off <= 2e-5, "{name}: {off:e}");
                same.push(name);
            }
            Err(Error::Unsupported { .. }) => refused.push(name),
            Err(other) => panic!("{name}: {other}"),
        }
    }
    refused.sort();
    let mut expected = vec!["llama_biases", "v2_mlp_bias", "v3_biases"];
    if both {
        expected.extend(["minicpm3", "v3_attn_bias", "v3_eps"]);
    }
    expected.sort_unstable();
    assert_eq!(refused, expected);
    assert_eq!(same.len(), 16 + if both { 12 } else { 0 }, "{same:?}");
}
