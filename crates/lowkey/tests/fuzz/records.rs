//! What lowkey itself writes beside weights and tokens, and others may change: checksums, certificates, marks, manifests.

use std::path::Path;

use burn::tensor::Device;
use lowkey_data::{DatasetConfig, Packing, sampler::validation_batches};
use lowkey_export::{Options, Source, Text, export, verify};
use lowkey_files::mark::{Kind, MARK, Mark};
use lowkey_model::{
    CausalLm, ModelDir,
    checkpoint::WeightDtype,
    checksums::{CHECKSUMS, write_checksums},
};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use crate::driver::{Entry, Input, Target};
use crate::models::{MODEL, config, folder, json_limit, saved};
use crate::mutate::{self, below, once_in, one_of};

const CERTIFICATE: &str = "certificate.json";
const MANIFEST: &str = "manifest.json";

/// What is read of a file at a time to hash it.
const HASHED: usize = 1 << 20;

/// Names that lead out of a folder or to no file, and a hash of nothing.
fn known() -> Vec<Value> {
    let names =
        ["../outside", "/etc/passwd", "a/../b", "", ".", "C:\\x", "model.safetensors", "folder", "a|b`\u{202e}"];
    let hash = json!("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    names.into_iter().map(Value::from).chain([hash]).collect()
}

/// Damages one of these files, and now and then what lies beside it.
fn damage(input: &mut Input, files: &[&str], random: &mut ChaCha8Rng) {
    if let Some(Entry::File(file)) = input.get_mut(one_of(random, files)) {
        mutate::json(file, &known(), random);
    }
    if once_in(random, 8) {
        let names: Vec<String> = input.keys().cloned().collect();
        let name = one_of(random, &names);
        match below(random, 4) {
            0 => drop(input.remove(&name)),
            1 => drop(input.insert(name, Entry::Link("nowhere".into()))),
            2 => drop(input.insert("folder".into(), Entry::Folder)),
            _ => {
                if let Some(Entry::File(file)) = input.get_mut(&name) {
                    mutate::bytes(file, random);
                }
            }
        }
    }
}

/// A model directory with checksums.
pub(crate) struct Checksums;

impl Target for Checksums {
    fn name(&self) -> &'static str {
        "checksums"
    }

    fn seeds(&self) -> Vec<Input> {
        let whole = |changes: Value| {
            let dir = tempfile::tempdir().unwrap();
            for (name, entry) in saved(&config(changes), WeightDtype::F32, usize::MAX) {
                let Entry::File(bytes) = entry else { panic!("{name} is no file") };
                std::fs::write(dir.path().join(name), bytes).unwrap();
            }
            write_checksums(dir.path()).unwrap();
            folder(dir.path())
        };
        vec![whole(json!({})), whole(json!({ "tie_word_embeddings": true }))]
    }

    fn main_file(&self) -> &'static str {
        CHECKSUMS
    }

    fn damage(&self, input: &mut Input, random: &mut ChaCha8Rng) {
        damage(input, &[CHECKSUMS], random);
    }

    fn read(&self, dir: &Path) -> Result<(), String> {
        let model = ModelDir::open(dir).map_err(|e| e.to_string())?;
        model.load(&Device::flex()).map(drop).map_err(|e| e.to_string())
    }

    fn is_deep(&self, refusal: &str) -> bool {
        !refusal.contains("not a table of checksums")
    }

    /// Files are hashed by a mebibyte at a time.
    fn limit(&self, bytes: usize) -> usize {
        MODEL + HASHED + json_limit(bytes)
    }

    fn inputs(&self) -> u64 {
        20_000
    }
}

/// An export, with its certificate and its mark.
pub(crate) struct Export;

impl Target for Export {
    fn name(&self) -> &'static str {
        "export"
    }

    fn seeds(&self) -> Vec<Input> {
        let exported = |to: &str, dtype: &str| {
            let root = tempfile::tempdir().unwrap();
            let (model, out) = (root.path().join("model"), root.path().join("out"));
            std::fs::create_dir(&model).unwrap();
            let config = lowkey_model::ModelConfig::from_json(config(json!({})).as_object().unwrap()).unwrap();
            CausalLm::init(&config, 1, &Device::flex()).save(&model, WeightDtype::F32, usize::MAX).unwrap();
            let target = lowkey_export::Target::parse(to, dtype).unwrap();
            let options = Options {
                bounds: target.bounds(),
                target,
                out: out.clone(),
                overwrite: false,
                form: None,
                context: None,
                text: Text { description: "numbers".into(), sequences: vec![(0..12).collect()] },
                max_shard_bytes: usize::MAX,
            };
            let source = Source::open(&model, &Device::flex()).unwrap();
            export(&source, &options, &Device::flex(), &mut |_| {}).unwrap();
            folder(&out)
        };
        vec![exported("hf", "f32"), exported("fused", "bf16")]
    }

    fn main_file(&self) -> &'static str {
        CERTIFICATE
    }

    fn damage(&self, input: &mut Input, random: &mut ChaCha8Rng) {
        damage(input, &[CERTIFICATE, CERTIFICATE, MARK], random);
    }

    fn read(&self, dir: &Path) -> Result<(), String> {
        let vouched = Mark::vouch(dir, Kind::Export).map_err(|e| e.to_string());
        let verdict = verify(dir, None, &Device::flex(), &mut |_| {}).map_err(|e| e.to_string())?;
        // What has been changed in any way does not hold.
        if verdict.failures.is_empty() { vouched } else { Err(format!("{}: {:?}", dir.display(), verdict.failures)) }
    }

    fn is_deep(&self, refusal: &str) -> bool {
        !refusal.contains("is no certificate")
    }

    fn limit(&self, bytes: usize) -> usize {
        2 * MODEL + HASHED + json_limit(bytes)
    }

    fn inputs(&self) -> u64 {
        10_000
    }
}

/// A prepared dataset: its manifest and its token files.
pub(crate) struct Prepared;

impl Target for Prepared {
    fn name(&self) -> &'static str {
        "prepared"
    }

    fn seeds(&self) -> Vec<Input> {
        let prepared = |lines: usize| {
            let root = tempfile::tempdir().unwrap();
            let (path, out) = (root.path().join("text.txt"), root.path().join("tokens"));
            let text: String = (0..lines).map(|i| format!("Line {i} of a small text.\n\n")).collect();
            std::fs::write(&path, text).unwrap();
            let dataset = DatasetConfig::from_text_file(&path).unwrap();
            lowkey_data::prepare(&dataset, &out, None, &mut |_| std::ops::ControlFlow::Continue(())).unwrap();
            folder(&out)
        };
        vec![prepared(3), prepared(40)]
    }

    fn main_file(&self) -> &'static str {
        MANIFEST
    }

    fn damage(&self, input: &mut Input, random: &mut ChaCha8Rng) {
        if once_in(random, 2) {
            return damage(input, &[MANIFEST], random);
        }
        if let Some(Entry::File(file)) = input.get_mut(one_of(random, &["train.tokens", "validation.tokens"])) {
            mutate::bytes(file, random);
        }
    }

    fn read(&self, dir: &Path) -> Result<(), String> {
        let prepared = lowkey_data::open(dir).map_err(|e| e.to_string())?;
        for shard in [&prepared.train, &prepared.validation] {
            for batch in validation_batches(shard, 8, 2, None, Packing::Stream, false) {
                batch.map_err(|e| e.to_string())?;
            }
        }
        Ok(())
    }

    fn is_deep(&self, refusal: &str) -> bool {
        !refusal.contains("not a manifest")
    }

    /// The tokenizer of bytes has the same tables whatever the size of its file.
    fn limit(&self, bytes: usize) -> usize {
        (8 << 20) + HASHED + json_limit(bytes)
    }

    fn inputs(&self) -> u64 {
        10_000
    }
}
