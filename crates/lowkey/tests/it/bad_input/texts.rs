//! Dataset files, the texts and tokenizers that they name, and prepared shards.

use std::fs;
use std::path::Path;

use super::fixture::{edit, edit_json, source};
use super::{Case, case};

/// `lowkey data prepare d.toml` on this dataset file, whose keys are right.
fn dataset(name: &str, text: &str) -> Case {
    case(name, &["data", "prepare", "d.toml"]).file("d.toml", text)
}

/// The same with a wrong key or value. Wrong use.
fn wrong(name: &str, text: &str, fragments: &[&str]) -> Case {
    dataset(name, text).code(2).says(&["d.toml"]).says(fragments)
}

/// A dataset of one damaged or unusable file.
fn unreadable(name: &str, kind: &str, file: &'static str, bytes: impl Into<Vec<u8>>, fragments: &[&str]) -> Case {
    dataset(name, &source(kind, file)).file(file, bytes).says(&[file]).says(fragments)
}

fn tokenizer(name: &str, json: impl Into<Vec<u8>>, fragments: &[&str]) -> Case {
    dataset(name, &format!("{}[tokenizer]\nkind = \"file\"\npath = \"t.json\"\n", source("text", "text.txt")))
        .file("t.json", json)
        .says(&["t.json"])
        .says(fragments)
}

/// `lowkey data info prepared` on a damaged copy of prepared shards.
fn shards(name: &str, damage: impl Fn(&Path) + Send + Sync + 'static, fragments: &[&str]) -> Case {
    case(name, &["data", "info", "prepared"])
        .with(move |fixture, dir| {
            fixture.give(dir, &["prepared"]);
            damage(&dir.join("prepared"));
        })
        .says(fragments)
}

/// The first bytes of the gzip file of a longer text.
const CUT_GZIP: [u8; 22] =
    [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 0x2b, 0xc9, 0x48, 0x55, 0x28, 0x2c, 0xcd, 0x4c, 0xce, 0x56, 0x48, 0x2a];

pub(super) fn cases() -> Vec<Case> {
    let text = source("text", "text.txt");
    let word =
        r#"{"version":"1.0","added_tokens":[],"model":{"type":"WordLevel","vocab":{"a":0,"b":IDS},"unk_token":"a"}}"#;
    let mut cases = vec![
        wrong("unknown source", "name = \"d\"\n[source]\nkind = \"carrier-pigeon\"\n", &["carrier-pigeon", "expected one of", "`jsonl`"]),
        wrong("unknown dataset key", &text.replace("paths", "path"), &["line", "path"]),
        wrong("split out of range", &format!("{text}[split]\nvalidation_fraction = 0.9\n"), &["split.validation_fraction = 0.9 must lie between 0 and 0.5"]),
        wrong("dataset name a path", &text.replace("\"d\"", "\"../d\""), &["name = \"../d\" must be a folder name"]),
        wrong("dataset syntax", "name = ", &["line 1"]),
        wrong("no file matches", &source("text", "chapters/*.txt"), &["source.paths: nothing matches", "chapters"]),
        wrong("digest of a wrong length", &format!("{text}[sha256]\n\"text.txt\" = \"12\"\n"), &["sha256.\"text.txt\"", "not 64 hex digits"]),
        wrong("huge BPE vocabulary", &format!("{text}[tokenizer]\nkind = \"bpe\"\nvocab_size = 1000000000000000000\n"), &["tokenizer.vocab_size = 1000000000000000000", "at most"]),
        dataset("another digest", &format!("{text}[sha256]\n\"text.txt\" = \"{}\"\n", "0".repeat(64)))
            .says(&["text.txt", "sha256 is", "expects 0000", "fetch the file again, or correct"]),
        dataset("dataset not UTF-8", "").file("d.toml", b"name = \"caf\xe9\"".to_vec()).says(&["d.toml", "invalid UTF-8 at byte 11"]),
        case("dataset missing", &["data", "prepare", "absent.toml"]).says(&["cannot read absent.toml", "No such file"]),
        case("text missing", &["data", "prepare", "absent.txt"]).says(&["cannot read absent.txt", "No such file"]),
        unreadable("bad JSONL line", "jsonl", "a.jsonl", "{\"text\":\"x\"}\n{oops\n", &["line 2: not valid JSON"]),
        unreadable("JSONL without the field", "jsonl", "a.jsonl", "{\"body\":\"x\"}\n", &["line 1: no field \"text\"", "[\"body\"]", "set `field`"]),
        unreadable("cut gzip", "text", "a.txt.gz", CUT_GZIP.to_vec(), &["cannot read"]),
        unreadable("no gzip", "jsonl", "a.jsonl.gz", "plain text", &["cannot read"]),
        unreadable("bad zstd", "text", "a.txt.zst", [&[0x28, 0xb5, 0x2f, 0xfd][..], &[0xff; 40]].concat(), &["cannot read"]),
        unreadable("bad Parquet", "parquet", "a.parquet", [&b"PAR1"[..], &[7; 60], &[40, 0, 0, 0], b"PAR1"].concat(), &["not a readable Parquet file"]),
        unreadable("empty Parquet", "parquet", "a.parquet", "", &["not a readable Parquet file"]),
        unreadable("latin-1 text", "text", "a.txt", b"caf\xe9 au lait".to_vec(), &["invalid UTF-8 at byte 3", "convert the file to UTF-8"]),
        unreadable("empty text", "text", "a.txt", "", &["text"]),
        case("text of one token", &["train", "run.toml", "--out", "new"]).file("text.txt", "a").says(&["train.tokens", "too few for seq_len"]),
        tokenizer("broken tokenizer", "{\"version\":", &["not valid JSON"]),
        tokenizer("not a tokenizer", "{\"version\":\"1.0\"}", &["not a tokenizer.json"]),
        tokenizer("tokenizer a list", "[]", &["not a tokenizer.json"]),
        tokenizer("stray token id", word.replace("IDS", "4294967295"), &["its largest id is 4294967295", "2 tokens"]),
        dataset("no tokenizer", &format!("{text}[tokenizer]\nkind = \"file\"\npath = \"absent.json\"\n")).says(&["absent.json", "No such file"]),
        dataset(
            "hub out of reach",
            "name = \"d\"\n[source]\nkind = \"hub\"\nrepo = \"owner/stories\"\nfiles = [\"a.txt\"]\nformat = \"text\"\n",
        )
        .variable("HF_ENDPOINT", "http://127.0.0.1:1")
        .variable("HF_HOME", "hub-cache")
        .says(&["owner/stories", "a.txt", "http://127.0.0.1:1", "check the network and HF_ENDPOINT"]),
        case("no prepared folder", &["data", "info", "absent"]).says(&["absent", "manifest.json"]),
        case("folder that is not prepared", &["data", "info", "."]).says(&["manifest.json", "run `lowkey data prepare` again"]),
        shards("manifest missing", |dir| fs::remove_file(dir.join("manifest.json")).unwrap(), &["manifest.json", "run `lowkey data prepare`"]),
        shards("manifest cut", |dir| edit(&dir.join("manifest.json"), |b| b.truncate(40)), &["manifest.json", "run `lowkey data prepare`"]),
        shards(
            "manifest of another version",
            |dir| edit_json(&dir.join("manifest.json"), |v| v["format"] = 9.into()),
            &["manifest.json: format 9", "run `lowkey data prepare`"],
        ),
        shards("shard cut", |dir| edit(&dir.join("train.tokens"), |b| b.truncate(1000)), &["train.tokens", "1000 bytes long", "cut short"]),
        shards("shard almost empty", |dir| edit(&dir.join("train.tokens"), |b| b.truncate(10)), &["train.tokens", "prepare the data again"]),
        shards("shard with a flipped bit", |dir| edit(&dir.join("train.tokens"), |b| b[200] ^= 1), &["train.tokens", "checksum", "prepare the data again"]),
        shards("no shard", |dir| edit(&dir.join("train.tokens"), |b| b[0] = b'X'), &["train.tokens", "not a lowkey token file"]),
        shards("shards of two corpora", |dir| {
            fs::copy(dir.join("validation.tokens"), dir.join("train.tokens")).unwrap();
        }, &["train.tokens", "not the token file that manifest.json describes", "run `lowkey data prepare`"]),
        shards("another tokenizer", |dir| edit(&dir.join("tokenizer.json"), |b| b.push(b' ')), &["tokenizer.json", "run `lowkey data prepare`"]),
    ];
    // Damaged shards whose text is still there are made again.
    for (name, at) in [("mended: a flipped bit", 300), ("mended: no shard at all", 0)] {
        let mended = case(name, &["train", "chars-run.toml", "--out", "new"])
            .with(move |fixture, dir| {
                fixture.give(dir, &["chars.toml", "chars-run.toml"]);
                fs::create_dir(dir.join("prepared")).unwrap();
                fixture.give(
                    dir,
                    &[
                        "prepared/manifest.json",
                        "prepared/train.tokens",
                        "prepared/validation.tokens",
                        "prepared/tokenizer.json",
                        "prepared/tokenizer_config.json",
                    ],
                );
                fs::create_dir(dir.join("prepared/chars")).unwrap();
                for name in
                    ["manifest.json", "train.tokens", "validation.tokens", "tokenizer.json", "tokenizer_config.json"]
                {
                    fs::rename(dir.join("prepared").join(name), dir.join("prepared/chars").join(name)).unwrap();
                }
                edit(&dir.join("prepared/chars/train.tokens"), |b| b[at] ^= 1);
            })
            .code(0)
            .says(&["preparing the corpus", "done"])
            .may_change(&["prepared/chars/train.tokens", "prepared/chars/manifest.json", "prepared/chars/lowkey.json"])
            .then(&["data", "info", "prepared/chars"]);
        cases.push(mended);
    }
    cases.push(
        case(
            "character that the tokenizer lacks",
            &["data", "prepare", "text.txt", "--tokenizer", "t.json", "--out", "new"],
        )
        .file("text.txt", "the quick brown fox is naïve")
        .with(|fixture, dir| {
            fixture.give(dir, &["prepared"]);
            fs::rename(dir.join("prepared/tokenizer.json"), dir.join("t.json")).unwrap();
        })
        .says(&["'ï' (U+00EF)", "not in this tokenizer's alphabet"]),
    );
    cases
}
