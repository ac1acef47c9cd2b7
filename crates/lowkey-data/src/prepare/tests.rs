mod chat;
mod parts;

use super::corpus::head_length;
use super::*;
use crate::hub::tests::{hub, serve};
use std::io::Write;

impl DatasetConfig {
    /// The same corpus under another tokenizer.
    fn with_tokenizer(self, tokenizer: TokenizerConfig) -> Self {
        Self { tokenizer, ..self }
    }
}

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
        prepare(&self.config(), &self.out(), None, &mut go_on)
    }
}

fn go_on(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn texts(prepared: &Prepared, shard: &Shard) -> Vec<String> {
    let text = |i| prepared.tokenizer.decode(&shard.document(i).unwrap().unwrap()).unwrap();
    (0..shard.documents()).map(text).collect()
}

/// What stands in a folder, by name.
fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
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

    let bytes = prepare(&config, &dir.path().join("bytes"), None, &mut go_on).unwrap();
    assert_eq!(texts(&bytes, &bytes.train), [head.as_str()]);
    assert_eq!(texts(&bytes, &bytes.validation), [tail.as_str()]);
    assert_eq!((bytes.train.len(), bytes.train.bytes()), (head.len(), head.len() as u64));

    let config = config.with_tokenizer(TokenizerConfig::Chars);
    let chars = prepare(&config, &dir.path().join("chars"), None, &mut go_on).unwrap();
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
    assert_eq!(prepared.train.document(1).unwrap().unwrap(), [98, 98, 256]);
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
fn what_is_told_of_a_pass_grows_to_the_whole_of_the_source() {
    let line = "a line of some words, one of many that are all alike\n";
    let text = line.repeat((12 << 20) / line.len());
    let json = format!("{{\"text\": \"{}\", \"beside\": \"what is read and no text\"}}\n", line.trim()).repeat(150_000);
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(text.as_bytes()).unwrap();
    let gz = gz.finish().unwrap();
    let of = |kind: &str, paths: &str| {
        format!("[source]\nkind = \"{kind}\"\npaths = [{paths}]\n[tokenizer]\nkind = \"bpe\"\nvocab_size = 300\n")
    };
    let lines = of("text", "\"a.txt\"").replace("]\n[tok", "]\nseparator = \"\\n\"\n[tok");
    let stories = "[source]\nkind = \"storybook\"\nseed = 1\ndocuments = 20000\nvalidation_documents = 100\n";
    for (files, toml, passes) in [
        (vec![("a.txt", text.as_bytes())], of("text", "\"a.txt\""), 3),
        (vec![("a.txt", text.as_bytes())], lines, 3),
        (vec![("a.txt.gz", &gz[..]), ("b.txt", line.as_bytes())], of("text", "\"*.gz\", \"b.txt\""), 3),
        (vec![("a.jsonl", json.as_bytes())], of("jsonl", "\"a.jsonl\""), 3),
        (Vec::new(), stories.to_owned(), 1),
    ] {
        let whole = match files.iter().map(|(_, bytes)| bytes.len() as u64).sum() {
            0 => 20_100,
            bytes => bytes,
        };
        let fixture = Fixture::new(&files, &toml);
        let mut told: Vec<(std::mem::Discriminant<Progress>, Share)> = Vec::new();
        let prepared = prepare(&fixture.config(), &fixture.out(), None, &mut |progress| {
            if let Progress::Counting { share, .. }
            | Progress::BuildingTokenizer { share, .. }
            | Progress::Tokenizing { share, .. } = progress
            {
                told.push((std::mem::discriminant(&progress), share));
            }
            ControlFlow::Continue(())
        });
        prepared.unwrap();
        let pass: Vec<_> = told.chunk_by(|a, b| a.0 == b.0).collect();
        assert_eq!(pass.len(), passes, "{toml}: {told:?}");
        for pass in pass {
            assert!(pass.iter().all(|(_, share)| share.of == whole), "{toml}: {pass:?}");
            assert!(pass.windows(2).all(|pair| pair[0].1.read <= pair[1].1.read), "{toml}: {pass:?}");
            let last = pass.last().unwrap().1;
            assert!(last.read <= whole && last.read > whole / 2, "{toml}: {last:?}");
        }
    }
}

#[test]
fn the_same_is_opened_and_anything_else_is_made_again() {
    let fixture = Fixture::new(&[("a.jsonl", LINES.as_bytes())], JSONL);
    let run = |config: &DatasetConfig, tokenizer| {
        let mut tokenized = false;
        let prepared = prepare(config, &fixture.out(), tokenizer, &mut |progress| {
            tokenized |= matches!(progress, Progress::Tokenizing { .. });
            ControlFlow::Continue(())
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
fn a_failed_or_stopped_preparation_leaves_the_folder_as_it_was() {
    let fixture = Fixture::new(&[("a.jsonl", LINES.as_bytes())], JSONL);
    let good = fixture.prepare().unwrap().manifest;
    let files = [
        "lowkey.json",
        "manifest.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "train.tokens",
        "validation.tokens",
    ];
    assert_eq!(names(&fixture.out()), files);
    std::fs::write(fixture.dir.path().join("a.jsonl"), format!("{LINES}{{broken\n")).unwrap();
    let failed = message(fixture.prepare());
    assert!(failed.contains("line 6") && failed.contains("a.jsonl"), "{failed}");
    assert_eq!(open(&fixture.out()).unwrap().manifest, good);

    std::fs::write(fixture.dir.path().join("a.jsonl"), LINES.repeat(2)).unwrap();
    let bpe = fixture.config().with_tokenizer(TokenizerConfig::Bpe { vocab_size: 300 });
    for stop in 0.. {
        let mut told = 0;
        let result = prepare(&bpe, &fixture.out(), None, &mut |_| {
            told += 1;
            if told > stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        match result {
            Err(Error::Stopped) => assert_eq!(open(&fixture.out()).unwrap().manifest, good),
            other => {
                assert!(other.is_ok() && stop >= 4, "hashing, building, merging and tokenizing can each be stopped");
                break;
            }
        }
    }
    assert_eq!(
        (names(&fixture.out()), names(fixture.dir.path())),
        (files.map(String::from).to_vec(), ["a.jsonl", "d.toml", "out"].map(String::from).to_vec())
    );
}

#[test]
fn what_lowkey_did_not_prepare_is_not_replaced() {
    let fixture = Fixture::new(&[("a.jsonl", LINES.as_bytes())], JSONL);
    let out = fixture.out();
    let model = [("tokenizer.json", "a model's"), ("tokenizer_config.json", "{}")];
    for foreign in [&[("train.tokens", "mine")][..], &[("manifest.json", "{}")], &model, &[("notes.txt", "mine")]] {
        std::fs::create_dir(&out).unwrap();
        foreign.iter().for_each(|(name, text)| std::fs::write(out.join(name), text).unwrap());
        let refused = message(fixture.prepare());
        assert!(refused.contains("move it away, or give another --out"), "{refused}");
        assert!(foreign.iter().all(|(name, text)| std::fs::read_to_string(out.join(name)).unwrap() == *text));
        assert_eq!(names(&out).len(), foreign.len());
        std::fs::remove_dir_all(&out).unwrap();
    }
    // Ours, with something of somebody's, or changed by somebody.
    fixture.prepare().unwrap();
    std::fs::write(fixture.dir.path().join("a.jsonl"), LINES.repeat(2)).unwrap();
    std::fs::write(out.join("notes.txt"), "mine").unwrap();
    assert!(message(fixture.prepare()).contains("notes.txt"));
    std::fs::remove_file(out.join("notes.txt")).unwrap();
    let tokenizer = std::fs::read_to_string(out.join("tokenizer.json")).unwrap();
    std::fs::write(out.join("tokenizer.json"), tokenizer.clone() + "\n").unwrap();
    assert!(message(fixture.prepare()).contains("tokenizer.json: has been changed"));
    std::fs::write(out.join("tokenizer.json"), tokenizer).unwrap();
    // From before there were marks.
    std::fs::remove_file(out.join("lowkey.json")).unwrap();
    std::fs::write(out.join(".train.tokens.Ab12"), "left by a kill").unwrap();
    assert_eq!(fixture.prepare().unwrap().manifest.train.documents, 6);
    assert!(!out.join(".train.tokens.Ab12").exists());
}

#[test]
fn a_run_that_goes_on_keeps_its_tokens_when_the_text_has_changed() {
    let fixture = Fixture::new(&[("a.jsonl", LINES.as_bytes())], JSONL);
    let begun = fixture.prepare().unwrap();
    let expected = Expected { train: begun.train.checksum(), validation: Some(begun.validation.checksum()) };
    let again = || prepare_expecting(&fixture.config(), &fixture.out(), None, &expected, &mut go_on);
    again().unwrap();
    for (from, to, split) in [("bb", "xx", "training"), ("eeeee", "eeexe", "held-out")] {
        std::fs::write(fixture.dir.path().join("a.jsonl"), LINES.replace(from, to)).unwrap();
        let refused = message(again());
        assert!(refused.contains(split) && refused.contains("not those this run began with"), "{refused}");
        assert_eq!(open(&fixture.out()).unwrap().manifest, begun.manifest);
    }
    std::fs::write(fixture.dir.path().join("a.jsonl"), LINES).unwrap();
    again().unwrap();
    // A folder that was lost is made again, if it comes out the same.
    std::fs::remove_dir_all(fixture.out()).unwrap();
    again().unwrap();
    let other = Expected { train: expected.validation.clone().unwrap(), validation: None };
    assert!(
        message(prepare_expecting(&fixture.config(), &fixture.out(), None, &other, &mut go_on)).contains("training")
    );
}

#[test]
fn processes_that_prepare_the_same_folder_do_it_once() {
    let fixture = Fixture::new(&[("a.jsonl", LINES.repeat(50).as_bytes())], JSONL);
    let tokenized = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let prepared = prepare(&fixture.config(), &fixture.out(), None, &mut |progress| {
                    if matches!(progress, Progress::Tokenizing { .. }) {
                        tokenized.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        std::thread::sleep(std::time::Duration::from_millis(50));
                    }
                    ControlFlow::Continue(())
                });
                assert_eq!(prepared.unwrap().train.documents(), 150);
            });
        }
    });
    assert_eq!(tokenized.into_inner(), 1);
}

#[test]
fn a_reader_keeps_the_tokens_that_it_opened() {
    let fixture = Fixture::new(&[("a.jsonl", LINES.as_bytes())], JSONL);
    let reader = fixture.prepare().unwrap();
    std::fs::write(fixture.dir.path().join("a.jsonl"), LINES.replace('a', "x")).unwrap();
    assert_eq!(texts(&fixture.prepare().unwrap(), &fixture.prepare().unwrap().train)[0], "x");
    assert_eq!(texts(&reader, &reader.train), ["a", "bb", "ccc"]);
}

#[test]
fn what_a_killed_preparation_left_is_cleared_by_the_next() {
    let fixture = Fixture::new(&[("a.jsonl", LINES.as_bytes())], JSONL);
    let left = fixture.dir.path().join(".out.lowkey-new");
    std::fs::create_dir(&left).unwrap();
    std::fs::write(left.join(".train.tokens.lowkey-new"), [0; 1000]).unwrap();
    std::fs::write(fixture.dir.path().join(".out.lowkey-lock"), "").unwrap();
    fixture.prepare().unwrap();
    assert_eq!(names(fixture.dir.path()), ["a.jsonl", "d.toml", "out"]);
}

#[test]
fn a_single_document_is_for_training_and_nothing_is_held_out() {
    for split in
        ["", "[split]\nvalidation_fraction = 0.0001", "[split]\nvalidation_fraction = 0", "[split]\nby = \"documents\""]
    {
        let toml = format!("[source]\nkind = \"jsonl\"\npaths = [\"a.jsonl\"]\n{split}\n");
        let prepared = Fixture::new(&[("a.jsonl", b"{\"text\":\"one document\"}\n")], &toml).prepare().unwrap();
        assert_eq!(texts(&prepared, &prepared.train), ["one document"], "{split}");
        assert!(prepared.validation.is_empty());
    }
    let letter =
        Fixture::new(&[("a.txt", b"x")], "[source]\nkind = \"text\"\npaths = [\"a.txt\"]\n").prepare().unwrap();
    assert_eq!((texts(&letter, &letter.train), letter.validation.is_empty()), (vec!["x".to_owned()], true));
}

#[test]
fn a_text_file_that_is_to_be_split_by_documents_says_what_to_set() {
    let toml = "[source]\nkind = \"text\"\npaths = [\"a.txt\"]\n[split]\nby = \"documents\"\n";
    let refused = message(Fixture::new(&[("a.txt", b"a long text")], toml).prepare());
    assert!(refused.contains("set split.by = \"tail\"") && refused.contains("source.separator"), "{refused}");
}

#[test]
fn a_separator_of_other_line_ends_is_named() {
    let with = |text: &str, separator: &str, split: &str| {
        let toml =
            format!("[source]\nkind = \"text\"\npaths = [\"a.txt\"]\nseparator = {separator:?}\n[split]\n{split}\n");
        Fixture::new(&[("a.txt", text.as_bytes())], &toml).prepare()
    };
    let windows = "one\r\n\r\ntwo\r\n\r\nthree";
    for split in ["", "validation_fraction = 0.0", "by = \"documents\""] {
        let refused = message(with(windows, "\n\n", split));
        assert!(
            refused.contains("never found") && refused.contains(r#"set source.separator = "\r\n\r\n""#),
            "{refused}"
        );
    }
    let refused = message(with("one\n--\ntwo", "\r\n--\r\n", ""));
    assert!(refused.contains(r#"set source.separator = "\n--\n""#), "{refused}");
    assert_eq!(with(windows, "\r\n\r\n", "").unwrap().train.documents(), 2);
    // One document, and nothing that looks like its end.
    assert_eq!(with("one text", "\n\n", "").unwrap().train.documents(), 1);
}

#[test]
fn a_long_document_is_learnt_and_tokenized_in_pieces() {
    let text = "fn main() {\n    let x = 1;\n\n\n}\n".repeat(100_000);
    let line = format!("{}\n", serde_json::json!({ "text": text }));
    let toml = "[source]\nkind = \"jsonl\"\npaths = [\"a.jsonl\"]\n[tokenizer]\nkind = \"bpe\"\nvocab_size = 280\n";
    let prepared = Fixture::new(&[("a.jsonl", line.as_bytes())], toml).prepare().unwrap();
    assert_eq!((prepared.train.documents(), prepared.train.bytes()), (1, text.len() as u64));
    assert!(texts(&prepared, &prepared.train) == [text]);
    assert!(prepared.tokenizer.token_to_id("\u{10a}\u{10a}").is_some(), "line breaks merge");
}

#[test]
fn another_tokenizer_has_a_folder_of_its_own() {
    let fixture = Fixture::new(&[("a.jsonl", LINES.as_bytes())], JSONL);
    let config = fixture.config();
    let plain = config.prepared_dir(None);
    assert_eq!(plain, fixture.dir.path().join("prepared").join("d"));
    let own = config.prepared_dir(Some(&Tokenizer::bytes()));
    assert!(own != plain && own.starts_with(fixture.dir.path().join("prepared")));
    let text = fixture.dir.path().join("a.txt");
    std::fs::write(&text, "x").unwrap();
    let text = DatasetConfig::from_text_file(&text).unwrap();
    assert_eq!(text.prepared_dir(None), fixture.dir.path().join("prepared").join("a"));
}

#[test]
fn parts_of_two_folders_do_not_open_as_one() {
    let fixture = Fixture::new(&[("a.jsonl", LINES.as_bytes())], JSONL);
    let out = fixture.out();
    let other = fixture.dir.path().join("other");
    fixture.prepare().unwrap();
    let chars = fixture.config().with_tokenizer(TokenizerConfig::Chars);
    prepare(&chars, &other, None, &mut go_on).unwrap();
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
    assert_eq!(prepared.train.document(0).unwrap().unwrap().last().copied(), prepared.tokenizer.eos_id());

    let broken = format!("{lines}{{oops\n");
    assert!(message(Fixture::new(&[("a.jsonl", broken.as_bytes())], &toml).prepare()).contains("line 61"));
}

#[test]
fn a_tokenizer_file_or_folder_can_be_named() {
    let fixture = Fixture::new(&[("a.jsonl", LINES.as_bytes())], JSONL);
    Tokenizer::chars("abcde").unwrap().save(&fixture.dir.path().join("model")).unwrap();
    for path in ["model", "model/tokenizer.json"] {
        let config = fixture.config().with_tokenizer(TokenizerConfig::File { path: path.into() });
        let prepared = prepare(&config, &fixture.out(), None, &mut go_on).unwrap();
        assert_eq!((prepared.tokenizer.name(), prepared.train.document(1).unwrap().unwrap()), ("chars", vec![1, 1, 5]));
    }
    let config = fixture.config().with_tokenizer(TokenizerConfig::File { path: "none.json".into() });
    assert!(message(prepare(&config, &fixture.out(), None, &mut go_on)).contains("none.json"));
}

#[test]
fn pinned_digests_are_checked() {
    let (_, digest) = {
        let fixture = Fixture::new(&[("a.jsonl", LINES.as_bytes())], JSONL);
        hash_file(&fixture.dir.path().join("a.jsonl"), &mut || Ok(())).unwrap()
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
    let by = "[split]\nvalidation_fraction = 0.01\nby = \"documents\"";
    let none = with("{\"text\":\"a\"}\n{\"text\":\"b\"}\n", by);
    assert!(none.contains("none of 2 documents falls to it") && none.contains("by = \"tail\""), "{none}");
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
    let oracle = crate::oracle::oracle_documents(&fixture.config(), &prepared.tokenizer, 5).unwrap().unwrap();
    for (i, document) in oracle.iter().enumerate() {
        assert_eq!(Some(&document.ids), prepared.validation.document(i).unwrap().as_ref());
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
    let run = |token| {
        let hub = hub(&server, &cache, token);
        prepare_from(&fixture.config(), &fixture.out(), None, None, &hub, super::parts::PART, &mut go_on)
    };
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
    shard.copy_range(0..shard.len(), &mut all).unwrap();
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
    let plain = prepare(&plain, &fixture.out(), None, &mut go_on).unwrap();
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
        prepare(&config, &fixture.out(), None, &mut go_on).unwrap().manifest.fingerprint
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
        split: crate::dataset::Split { validation_fraction: 0.0, by: crate::dataset::SplitBy::Tail },
        ..fixture.config()
    };
    let prepared = prepare(&whole, &fixture.out(), None, &mut go_on).unwrap();
    assert_eq!(ids(&prepared.train), [1, 3, 4, 4, 3, 2]);
}
