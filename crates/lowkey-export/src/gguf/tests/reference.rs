//! The reference checkpoints that lie outside the project (`../shared/reference/cases` from its root), where they are there.

use super::*;

#[test]
fn reference_checkpoints_compute_the_same_or_are_refused() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/reference/cases");
    let Ok(entries) = std::fs::read_dir(&root) else {
        println!("{} is not there: nothing compared", root.display());
        return;
    };
    let folder = Folder::new();
    let path = folder.file("x.gguf");
    let (mut same, mut refused) = (Vec::new(), Vec::new());
    for entry in entries {
        let dir = entry.unwrap().path();
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
    assert_eq!(refused, ["v3_attn_bias", "v3_eps"]);
    assert!(same.len() >= 12, "{same:?}");
}
