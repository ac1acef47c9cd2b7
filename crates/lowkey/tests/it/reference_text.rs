//! Agreement with the tokenizers library of Python on tokenizers of every kind of decoder: ids with and without special tokens, the
//! text of ids, and the same text when it comes token by token.

use lowkey_data::Tokenizer;
use serde_json::Value;

use crate::reference::{announce, own};

/// One for each kind of decoder.
const TOKENIZERS: usize = 6;

#[test]
fn every_tokenizer_reads_and_writes_as_in_python() {
    let mut folders: Vec<_> =
        std::fs::read_dir(own().join("tokenizers")).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    assert_eq!(folders.len(), TOKENIZERS, "{folders:?}");
    let mut texts = 0;
    for folder in &folders {
        let name = folder.file_name().unwrap().to_string_lossy();
        let tokenizer = Tokenizer::from_file(&folder.join("tokenizer.json")).unwrap();
        let rows: Vec<Value> =
            serde_json::from_str(&std::fs::read_to_string(folder.join("expected.json")).unwrap()).unwrap();
        assert!(rows.len() >= 15, "{name}: {}", rows.len());
        for row in rows {
            let text = row["text"].as_str().unwrap();
            let ids = |key: &str| -> Vec<u32> { serde_json::from_value(row[key].clone()).unwrap() };
            let (expected, decoded) = (ids("ids"), row["decoded"].as_str().unwrap());
            assert_eq!(tokenizer.encode(text).unwrap(), expected, "{name}: {text:?}");
            let around = [tokenizer.text_start(), &expected, tokenizer.after_text()].concat();
            assert_eq!(around, ids("ids_with_special_tokens"), "{name}: {text:?} with special tokens");
            assert_eq!(tokenizer.decode(&expected).unwrap(), decoded, "{name}: the ids of {text:?}");
            for cut in 0..=expected.len() {
                let (before, after) = expected.split_at(cut);
                let begun = tokenizer.decode(before).unwrap();
                // In the middle of a character there is no text of the first part.
                let Some(rest) = decoded.strip_prefix(&begun) else { continue };
                let mut stream = tokenizer.stream(before);
                let mut came = String::new();
                for id in after {
                    came += &stream.push(*id).unwrap();
                }
                came += &stream.finish().unwrap();
                assert_eq!(came, rest, "{name}: {text:?} after {cut} tokens");
            }
            texts += 1;
        }
    }
    announce(&format!("reference: {texts} texts through {TOKENIZERS} tokenizers compared with Python's"));
}
