use super::corpus::head_length;
use super::*;
use crate::hub::tests::{hub, serve};
use std::io::Write;

/// A folder with a dataset file and the files beside it.
struct Fixture {
    dir: tempfile::TempDir,
}

impl Fixture {
    fn new(files: &[(&str, &[u8])], toml: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            std::fs::write(dir.path().join(name), bytes).unwrap();
        }
        std::fs::write(dir.path().join("d.toml"), format!("name = \"d\"\n{toml}\n")).unwrap();
        Self { dir }
    }

    fn config(&self) -> DatasetConfig {
        DatasetConfig::load(&self.dir.path().join("d.toml")).unwrap()
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("out")
    }

    fn prepare(&self) -> Result<Prepared> {
        prepare(&self.config(), &self.out(), None, &mut |_| {})
    }
}

fn texts(prepared: &Prepared, shard: &Shard) -> Vec<String> {
    (0..shard.documents()).map(|i| prepared.tokenizer.decode(&shard.document(i).unwrap()).unwrap()).collect()
}

fn message(result: Result<Prepared>) -> String {
    result.unwrap_err().to_string()
}

const LINES: &str =
    "{\"text\":\"a\"}\n{\"text\":\"bb\"}\n{\"text\":\"ccc\"}\n{\"text\":\"dddd\"}\n{\"text\":\"eeeee\"}\n";
const JSONL: &str = "[source]\nkind = \"jsonl\"\npaths = [\"a.jsonl\"]\n[split]\nvalidation_fraction = 0.4\n";

#[test]
fn a_text_file_is_cut_where_nanogpt_cuts_it() {
    // int(1115394 * 0.9), Tiny Shakespeare's numbers; characters, not bytes.
    assert_eq!(head_length(1_115_394, 0.1), 1_003_854);
    let text: String = (0..1237).map(|i| if i % 3 == 0 { 'é' } else { char::from(b'a' + (i % 26) as u8) }).collect();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("input.txt");
    std::fs::write(&path, &text).unwrap();
    let config = DatasetConfig::from_text_file(&path).unwrap();
    let boundary = (1237.0f64 * 0.9) as usize;
    let (head, tail): (String, String) = (text.chars().take(boundary).collect(), text.chars().skip(boundary).collect());

    let bytes = prepare(&config, &dir.path().join("bytes"), None, &mut |_| {}).unwrap();
    assert_eq!(texts(&bytes, &bytes.train), [head.as_str()]);
    assert_eq!(texts(&bytes, &bytes.validation), [tail.as_str()]);
    assert_eq!((bytes.train.len(), bytes.train.bytes()), (head.len(), head.len() as u64));

    let config = config.with_tokenizer(TokenizerConfig::Chars);
    let chars = prepare(&config, &dir.path().join("chars"), None, &mut |_| {}).unwrap();
    assert_eq!((chars.train.len(), chars.validation.len()), (boundary, 1237 - boundary));
    assert_eq!((texts(&chars, &chars.train), texts(&chars, &chars.validation)), (vec![head], vec![tail]));
    assert_eq!(chars.validation.bytes() + chars.train.bytes(), text.len() as u64);
}

#[test]
fn documents_end_with_eos_and_the_tail_is_held_out() {
    let fixture = Fixture::new(&[("a.jsonl", LINES.as_bytes())], JSONL);
    let prepared = fixture.prepare().unwrap();
    assert_eq!(texts(&prepared, &prepared.train), ["a", "bb", "ccc"]);
    assert_eq!(texts(&prepared, &prepared.validation), ["dddd", "eeeee"]);
    assert_eq!(prepared.train.document(1).unwrap(), [98, 98, 256]);
    assert_eq!((prepared.train.bytes(), prepared.train.len()), (6, 9));
    let manifest = &prepared.manifest;
    assert_eq!((manifest.files[0].name.as_str(), manifest.files[0].bytes), ("a.jsonl", LINES.len() as u64));
    assert_eq!((manifest.vocab_size, manifest.eos_id, manifest.tokenizer.as_str()), (257, Some(256), "bytes"));
    assert_eq!(open(&fixture.out()).unwrap().manifest, *manifest);
}

#[test]
fn a_split_by_documents_is_stable_and_about_right() {
    let lines: String = (0..400).map(|i| format!("{{\"text\":\"{i}\"}}\n")).collect();
    let toml = JSONL.replace("0.4", "0.25\nby = \"documents\"");
    let prepared = Fixture::new(&[("a.jsonl", lines.as_bytes())], &toml).prepare().unwrap();
    let held = prepared.validation.documents();
    assert!((70..130).contains(&held), "{held} of 400 where 100 are expected");
    assert_eq!(prepared.train.documents() + held, 400);
    let (train, held) = (texts(&prepared, &prepared.train), texts(&prepared, &prepared.validation));
    assert!(held.iter().all(|text| !train.contains(text)));
    // More text at the end moves no earlier document to the other side.
    let more: String = (0..500).map(|i| format!("{{\"text\":\"{i}\"}}\n")).collect();
    let larger = Fixture::new(&[("a.jsonl", more.as_bytes())], &toml).prepare().unwrap();
    assert_eq!(texts(&larger, &larger.validation)[..held.len()], held);
}

#[test]
fn the_same_is_opened_and_anything_else_is_made_again() {
    let fixture = Fixture::new(&[("a.jsonl", LINES.as_bytes())], JSONL);
    let run = |config: &DatasetConfig, tokenizer| {
        let mut tokenized = false;
        let prepared = prepare(config, &fixture.out(), tokenizer, &mut |progress| {
            tokenized |= matches!(progress, Progress::Tokenizing { .. });
        });
        (prepared.unwrap(), tokenized)
    };
    let config = fixture.config();
    assert!(run(&config, None).1);
    let (prepared, again) = run(&config, None);
    assert!(!again, "the folder should have been opened");
    // A description changes no token.
    assert!(!run(&DatasetConfig { description: "new".into(), ..config.clone() }, None).1);

    let chars = config.clone().with_tokenizer(TokenizerConfig::Chars);
    assert!(run(&chars, None).1 && !run(&chars, None).1);
    assert!(run(&config, Some(Tokenizer::chars("abcde").unwrap())).1);
    assert_eq!(run(&config, Some(Tokenizer::chars("abcde").unwrap())).0.tokenizer.name(), "chars");
    assert!(run(&config, None).1);

    // The same length, another letter.
    let path = fixture.dir.path().join("a.jsonl");
    std::fs::write(&path, LINES.replace('a', "x")).unwrap();
    let (changed, again) = run(&config, None);
    assert!(again && changed.manifest.fingerprint != prepared.manifest.fingerprint);

    // A damaged token file, and a lost manifest, are repaired.
    let tokens = fixture.out().join("train.tokens");
    drop(changed);
    let mut bytes = std::fs::read(&tokens).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&tokens, bytes).unwrap();
    assert!(open(&fixture.out()).unwrap_err().to_string().contains("damaged"));
    assert!(run(&config, None).1);
    std::fs::remove_file(fixture.out().join("manifest.json")).unwrap();
    assert!(open(&fixture.out()).is_err());
    assert!(run(&config, None).1);
}

#[test]
fn a_failed_run_leaves_nothing_that_opens_and_nothing_else_touched() {
    let fixture = Fixture::new(&[("a.jsonl", LINES.as_bytes())], JSONL);
    std::fs::create_dir(fixture.out()).unwrap();
    std::fs::write(fixture.out().join("notes.txt"), "mine").unwrap();
    fixture.prepare().unwrap();
    std::fs::write(fixture.dir.path().join("a.jsonl"), format!("{LINES}{{broken\n")).unwrap();
    let failed = message(fixture.prepare());
    assert!(failed.contains("line 6") && failed.contains("a.jsonl"), "{failed}");
    assert!(open(&fixture.out()).is_err());
    let mut names: Vec<String> = std::fs::read_dir(fixture.out())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    let expected = ["notes.txt", "tokenizer.json", "tokenizer_config.json", "train.tokens", "validation.tokens"];
    assert_eq!(names, expected);
}

#[test]
fn parts_of_two_folders_do_not_open_as_one() {
    let fixture = Fixture::new(&[("a.jsonl", LINES.as_bytes())], JSONL);
    let out = fixture.out();
    let other = fixture.dir.path().join("other");
    fixture.prepare().unwrap();
    let chars = fixture.config().with_tokenizer(TokenizerConfig::Chars);
    prepare(&chars, &other, None, &mut |_| {}).unwrap();
    for name in ["train.tokens", "validation.tokens", "tokenizer.json"] {
        let good = std::fs::read(out.join(name)).unwrap();
        std::fs::copy(other.join(name), out.join(name)).unwrap();
        let error = message(open(&out));
        assert!(error.contains(name) && error.contains("data prepare"), "{error}");
        std::fs::write(out.join(name), good).unwrap();
        open(&out).unwrap();
    }
    // The same vocabulary, but the other split's tokens.
    let good = std::fs::read(out.join("train.tokens")).unwrap();
    std::fs::copy(out.join("validation.tokens"), out.join("train.tokens")).unwrap();
    assert!(message(open(&out)).contains("train.tokens"));
    std::fs::write(out.join("train.tokens"), good).unwrap();
    let manifest = std::fs::read_to_string(out.join("manifest.json")).unwrap();
    for (from, to) in [("\"format\": 1", "\"format\": 2"), ("\"eos_id\": 256", "\"eos_id\": 255"), ("{", "")] {
        assert!(manifest.contains(from));
        std::fs::write(out.join("manifest.json"), manifest.replacen(from, to, 1)).unwrap();
        assert!(open(&out).is_err(), "{to}");
    }
}

#[test]
fn compressed_and_separated_sources_prepare() {
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all("one|two|three|".as_bytes()).unwrap();
    let zst = zstd::encode_all("four|five".as_bytes(), 1).unwrap();
    let toml = "[source]\nkind = \"text\"\npaths = [\"*.gz\", \"*.zst\"]\nseparator = \"|\"\n[split]\nvalidation_fraction = 0.2\n";
    let prepared = Fixture::new(&[("a.txt.gz", &gz.finish().unwrap()), ("b.txt.zst", &zst)], toml).prepare().unwrap();
    assert_eq!(texts(&prepared, &prepared.train), ["one", "two", "three", "four"]);
    assert_eq!(texts(&prepared, &prepared.validation), ["five"]);
    assert_eq!(prepared.manifest.files.len(), 2);
}

#[test]
fn bpe_learns_from_the_training_split_only() {
    let lines: String = (0..60)
        .map(|i| format!("{{\"text\":\"{}\"}}\n", if i < 48 { "hello hello world" } else { "zqzqzq zqzqzq" }))
        .collect();
    let toml = format!("{}[tokenizer]\nkind = \"bpe\"\nvocab_size = 300\n", JSONL.replace("0.4", "0.2"));
    let prepared = Fixture::new(&[("a.jsonl", lines.as_bytes())], &toml).prepare().unwrap();
    assert_eq!((prepared.train.documents(), prepared.validation.documents()), (48, 12));
    assert!(prepared.tokenizer.token_to_id("hello").is_some());
    assert!(prepared.tokenizer.token_to_id("zq").is_none());
    assert_eq!(texts(&prepared, &prepared.validation)[0], "zqzqzq zqzqzq");
    assert_eq!(prepared.train.document(0).unwrap().last().copied(), prepared.tokenizer.eos_id());

    let broken = format!("{lines}{{oops\n");
    assert!(message(Fixture::new(&[("a.jsonl", broken.as_bytes())], &toml).prepare()).contains("line 61"));
}

#[test]
fn a_tokenizer_file_or_folder_can_be_named() {
    let fixture = Fixture::new(&[("a.jsonl", LINES.as_bytes())], JSONL);
    Tokenizer::chars("abcde").unwrap().save(&fixture.dir.path().join("model")).unwrap();
    for path in ["model", "model/tokenizer.json"] {
        let config = fixture.config().with_tokenizer(TokenizerConfig::File { path: path.into() });
        let prepared = prepare(&config, &fixture.out(), None, &mut |_| {}).unwrap();
        assert_eq!((prepared.tokenizer.name(), prepared.train.document(1).unwrap()), ("chars", vec![1, 1, 5]));
    }
    let config = fixture.config().with_tokenizer(TokenizerConfig::File { path: "none.json".into() });
    assert!(message(prepare(&config, &fixture.out(), None, &mut |_| {})).contains("none.json"));
}

#[test]
fn pinned_digests_are_checked() {
    let (_, digest) = {
        let fixture = Fixture::new(&[("a.jsonl", LINES.as_bytes())], JSONL);
        hash_file(&fixture.dir.path().join("a.jsonl")).unwrap()
    };
    let with = |name: &str, digest: &str| {
        Fixture::new(&[("a.jsonl", LINES.as_bytes())], &format!("{JSONL}[sha256]\n\"{name}\" = \"{digest}\"\n"))
            .prepare()
    };
    with("a.jsonl", &digest.to_uppercase()).unwrap();
    let wrong = "0".repeat(64);
    let error = message(with("a.jsonl", &wrong));
    assert!(error.contains("a.jsonl") && error.contains(&digest) && error.contains(&wrong), "{error}");
    assert!(message(with("b.jsonl", &digest)).contains("names no file"));
}

#[test]
fn sources_and_splits_without_text_are_refused() {
    let with = |text: &str, split: &str| {
        let toml = format!("[source]\nkind = \"jsonl\"\npaths = [\"a.jsonl\"]\n{split}\n");
        message(Fixture::new(&[("a.jsonl", text.as_bytes())], &toml).prepare())
    };
    assert!(with("", "").contains("holds no text; check its paths"));
    assert!(with("{\"text\":\"\"}\n", "[tokenizer]\nkind = \"chars\"").contains("holds no text"));
    assert!(with("{\"text\":\"a\"}\n", "").contains("no text for training"));
    let by = "[split]\nvalidation_fraction = 0.01\nby = \"documents\"";
    assert!(with("{\"text\":\"a\"}\n", by).contains("holds no text out"));
    let all = "[source]\nkind = \"jsonl\"\npaths = [\"a.jsonl\"]\n[split]\nvalidation_fraction = 0.0\n";
    let prepared = Fixture::new(&[("a.jsonl", LINES.as_bytes())], all).prepare().unwrap();
    assert_eq!((prepared.train.documents(), prepared.validation.documents()), (5, 0));
}

#[test]
fn a_storybook_prepares_its_own_splits() {
    let toml = "[source]\nkind = \"storybook\"\nseed = 7\ndocuments = 30\nvalidation_documents = 5\n";
    let fixture = Fixture::new(&[], toml);
    let prepared = fixture.prepare().unwrap();
    let train: Vec<String> = (0..30).map(|i| crate::storybook::story(7, i).text).collect();
    assert_eq!(texts(&prepared, &prepared.train), train);
    assert_eq!(prepared.validation.documents(), 5);
    let oracle = crate::oracle_documents(&fixture.config(), &prepared.tokenizer, 5).unwrap().unwrap();
    for (i, document) in oracle.iter().enumerate() {
        assert_eq!(Some(&document.ids), prepared.validation.document(i).as_ref());
    }
}

#[test]
fn a_hub_source_is_fetched_and_prepared() {
    let url = |file: &str| format!("/datasets/owner/stories/resolve/v1/{file}");
    let (a, b) = (url("data/a.jsonl"), url("b.jsonl"));
    let server = serve(&[(&a, LINES.as_bytes()), (&b, b"{\"text\":\"last\"}\n")], Some("hf_t"));
    let toml = "[source]\nkind = \"hub\"\nrepo = \"owner/stories\"\nrevision = \"v1\"\nformat = \"jsonl\"\n\
                files = [\"data/a.jsonl\", \"b.jsonl\"]\n";
    let fixture = Fixture::new(&[], toml);
    let cache = fixture.dir.path().join("cache");
    let run = |token| prepare_from(&fixture.config(), &fixture.out(), None, &hub(&server, &cache, token), &mut |_| {});
    assert!(message(run(None)).contains("HF_TOKEN"));
    let prepared = run(Some("hf_t")).unwrap();
    assert_eq!(texts(&prepared, &prepared.train), ["a", "bb", "ccc", "dddd", "eeeee"]);
    assert_eq!(texts(&prepared, &prepared.validation), ["last"]);
    assert_eq!(prepared.manifest.files[0].name, "data/a.jsonl");
}

/// Words between white space, `<s>` before a text and `</s>` after it.
const FRAMED: &str = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[
    {"id":0,"content":"<unk>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true},
    {"id":1,"content":"<s>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true},
    {"id":2,"content":"</s>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],
    "normalizer":null,"pre_tokenizer":{"type":"WhitespaceSplit"},"post_processor":{"type":"TemplateProcessing",
    "single":[{"SpecialToken":{"id":"<s>","type_id":0}},{"Sequence":{"id":"A","type_id":0}},{"SpecialToken":{"id":"</s>","type_id":0}}],
    "pair":[{"Sequence":{"id":"A","type_id":0}},{"Sequence":{"id":"B","type_id":1}}],
    "special_tokens":{"<s>":{"id":"<s>","ids":[1],"tokens":["<s>"]},"</s>":{"id":"</s>","ids":[2],"tokens":["</s>"]}}},
    "decoder":null,"model":{"type":"WordLevel","vocab":{"<unk>":0,"<s>":1,"</s>":2,"a":3,"b":4},"unk_token":"<unk>"}}"#;

fn ids(shard: &Shard) -> Vec<u32> {
    let mut all = Vec::new();
    shard.copy_range(0..shard.len(), &mut all);
    all
}

#[test]
fn documents_begin_and_end_as_the_tokenizer_frames_a_text() {
    let lines = "{\"text\":\"a\"}\n{\"text\":\"b a\"}\n{\"text\":\"b\"}\n";
    let toml = JSONL.to_owned() + "[tokenizer]\nkind = \"file\"\npath = \"t.json\"\n";
    let fixture = Fixture::new(&[("a.jsonl", lines.as_bytes()), ("t.json", FRAMED.as_bytes())], &toml);
    let prepared = fixture.prepare().unwrap();
    // The end that the tokenizer adds is the document's own, once.
    assert_eq!(ids(&prepared.train), [1, 3, 2]);
    assert_eq!(ids(&prepared.validation), [1, 4, 3, 2, 1, 4, 2]);
    assert!(prepared.manifest.special_tokens && prepared.tokenizer.adds_special_tokens());
    let again = open(&fixture.out()).unwrap();
    assert_eq!((again.tokenizer.text_start(), again.tokenizer.special_tokens_are_assumed()), (&[1][..], false));

    // Who wants none has none, in other tokens under another fingerprint.
    let plain = DatasetConfig { add_special_tokens: Some(false), ..fixture.config() };
    let plain = prepare(&plain, &fixture.out(), None, &mut |_| {}).unwrap();
    assert_eq!((ids(&plain.train), ids(&plain.validation)), (vec![3, 2], vec![4, 3, 2, 4, 2]));
    assert_ne!(plain.manifest.fingerprint, prepared.manifest.fingerprint);
    assert!(open(&fixture.out()).unwrap().tokenizer.omits_special_tokens());
    // A folder from before there was the choice says nothing of it, and its documents have none.
    assert!(!std::fs::read_to_string(fixture.out().join("manifest.json")).unwrap().contains("special_tokens\": true"));
}

#[test]
fn a_tokenizer_that_frames_nothing_keeps_its_fingerprint() {
    let fixture = Fixture::new(&[("a.jsonl", LINES.as_bytes())], JSONL);
    let fingerprints = [None, Some(true), Some(false)].map(|add_special_tokens| {
        let config = DatasetConfig { add_special_tokens, ..fixture.config() };
        prepare(&config, &fixture.out(), None, &mut |_| {}).unwrap().manifest.fingerprint
    });
    assert!(fingerprints.iter().all(|fingerprint| *fingerprint == fingerprints[0]));
}

#[test]
fn the_held_out_tail_of_a_text_is_no_beginning() {
    let toml = "[source]\nkind = \"text\"\npaths = [\"a.txt\"]\n[split]\nvalidation_fraction = 0.5\n[tokenizer]\nkind = \"file\"\npath = \"t.json\"\n";
    let fixture = Fixture::new(&[("a.txt", b"a b b a "), ("t.json", FRAMED.as_bytes())], toml);
    let prepared = fixture.prepare().unwrap();
    assert_eq!((ids(&prepared.train), ids(&prepared.validation)), (vec![1, 3, 4], vec![4, 3]));
    // All of it is a whole document.
    let whole = DatasetConfig {
        split: crate::Split { validation_fraction: 0.0, by: crate::SplitBy::Tail },
        ..fixture.config()
    };
    let prepared = prepare(&whole, &fixture.out(), None, &mut |_| {}).unwrap();
    assert_eq!(ids(&prepared.train), [1, 3, 4, 4, 3, 2]);
}
