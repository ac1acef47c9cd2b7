//! What stands before the weights of a file, compared with what its source gives.

use std::collections::BTreeMap;

use super::*;
use crate::{Options, Source, Target, Text, export, verify};

/// A model of bytes with its tokenizer, as a file; and where its data begin.
fn written(folder: &Folder) -> (PathBuf, CausalLm, Tokenizer) {
    let path = folder.file("model.gguf");
    let config = config_with(|c, _| {
        (c.vocab_size, c.eos_token_id) = (259, vec![256]);
        c.layers.resize(1).unwrap();
    });
    let (model, tokenizer) = (random_model(&config, 1), Tokenizer::bytes());
    write(&path, &model, Some(&tokenizer), TensorType::F32).unwrap();
    (path, model, tokenizer)
}

#[test]
fn every_bit_of_the_header_counts() {
    let folder = Folder::new();
    let (path, model, tokenizer) = written(&folder);
    let found = || differences(&path, &model, Some(&tokenizer), TensorType::F32);
    assert_eq!(found().unwrap(), [""; 0]);
    let bytes = std::fs::read(&path).unwrap();
    let size = |info: &TensorInfo| (4 * info.shape.iter().product::<usize>()).next_multiple_of(ALIGNMENT);
    let header = bytes.len() - read(&path).unwrap().tensors().map(size).sum::<usize>();
    let mut seed = 7;
    for at in 0..header {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1 << (next(&mut seed) % 8);
        std::fs::write(&path, &damaged).unwrap();
        // A file that cannot be read is as good as one that differs.
        assert!(found().map_or(true, |lines| !lines.is_empty()), "byte {at} of {header}");
    }
}

#[test]
fn a_header_that_differs_says_where() {
    let folder = Folder::new();
    let (path, model, tokenizer) = written(&folder);
    let file = read(&path).unwrap();
    let with = |change: &dyn Fn(&mut BTreeMap<String, Value>)| {
        let mut keys: BTreeMap<String, Value> =
            file.metadata().iter().map(|(key, value)| (key.to_owned(), value.clone())).collect();
        change(&mut keys);
        let mut metadata = Metadata::default();
        keys.into_iter().for_each(|(key, value)| metadata.set(key, value));
        let copy = folder.file("copy");
        std::fs::create_dir_all(&copy).unwrap();
        let copy = copy.join("model.gguf");
        let tensors: Vec<TensorInfo> = file.tensors().cloned().collect();
        write_container(&copy, &metadata, &tensors, &mut |info| Ok(file.values(&info.name).unwrap())).unwrap();
        differences(&copy, &model, Some(&tokenizer), TensorType::F32).unwrap().join("\n")
    };
    let key = |key: &str| format!("tokenizer.ggml.{key}");
    for (found, expected) in [
        // Their order means nothing.
        (with(&|_| ()), ""),
        (
            with(&|keys| {
                let Some(Value::Array(Array::String(texts))) = keys.get_mut(&key("tokens")) else { panic!() };
                texts[65] = "\u{1b}[2J".into();
            }),
            "tokenizer.ggml.tokens[65] is \"\\u{1b}[2J\", its source gives \"A\"",
        ),
        (
            with(&|keys| {
                let Some(Value::Array(Array::I32(types))) = keys.get_mut(&key("token_type")) else { panic!() };
                types[256] = 1;
            }),
            "tokenizer.ggml.token_type[256] is 1, its source gives 3",
        ),
        (
            with(&|keys| drop(keys.insert(key("merges"), Value::from(vec!["A B".to_owned()])))),
            "tokenizer.ggml.merges has 1 elements, its source gives 0",
        ),
        (with(&|keys| drop(keys.remove(&key("eos_token_id")))), "the key tokenizer.ggml.eos_token_id is missing"),
        (
            with(&|keys| drop(keys.insert("tokenizer.chat\ttemplate".into(), Value::from("{{ x }}")))),
            "the key tokenizer.chat\\ttemplate is none that its source gives",
        ),
        (
            with(&|keys| drop(keys.insert("general.name".into(), Value::from("other")))),
            "general.name is String(\"other\"), its source gives String(\"model\")",
        ),
    ] {
        assert_eq!(found, expected);
    }
    let fewer = differences(&path, &model, Some(&tokenizer), TensorType::F16).unwrap().join("\n");
    assert!(
        fewer.contains("tensor token_embd.weight is [259, 12] in f32, its source gives [259, 12] in f16"),
        "{fewer}"
    );
}

#[test]
fn verify_compares_the_tokenizer_with_the_source() {
    let folder = Folder::new();
    let dir = folder.file("model");
    let (_, model, tokenizer) = written(&folder);
    model.save(&dir, lowkey_model::checkpoint::WeightDtype::F32, usize::MAX).unwrap();
    tokenizer.save(&dir).unwrap();
    let mut source = Source::open(&dir, &Device::flex()).unwrap();
    let target = Target::parse("gguf", "f32").unwrap();
    let mut options = Options {
        bounds: target.bounds(),
        target,
        out: folder.file("out"),
        overwrite: false,
        form: None,
        context: None,
        text: Text { description: "a few".into(), sequences: vec![vec![72, 101, 108, 108, 111]] },
        max_shard_bytes: usize::MAX,
    };
    export(&source, &options, &Device::flex(), &mut |_| {}).unwrap();
    let failures = |source: &Source| verify(&options.out, Some(source), &Device::flex(), &mut |_| {}).unwrap().failures;
    assert_eq!(failures(&source), [""; 0]);
    source.tokenizer = Some(Tokenizer::chars("other letters").unwrap());
    let found = failures(&source).join("\n");
    assert!(found.contains("model.gguf: tokenizer.ggml.tokens[0]"), "{found}");
    source.tokenizer = None;
    let found = failures(&source).join("\n");
    assert!(found.contains("tokenizer.ggml.model is String(\"gpt2\")"), "{found}");
    // The folder that holds the file is not named as the file.
    options.out = folder.file("tiny.GGUF");
    let error = export(&source, &options, &Device::flex(), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("names a folder") && error.ends_with("tiny"), "{error}");
}
