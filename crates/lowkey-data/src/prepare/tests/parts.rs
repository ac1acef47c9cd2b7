//! Preparations that are stopped, and go on where they were.

use std::collections::BTreeMap;

use super::super::parts::PART;
use super::*;

/// Lines of words that are not all the same.
fn text(bytes: usize) -> String {
    let mut text = String::with_capacity(bytes + 100);
    let mut i = 0usize;
    while text.len() < bytes {
        i += 1;
        let word = ["lamp", "the", "river", "naïve", "x"][i * i % 5];
        text.push_str(word);
        text.push_str(if i.is_multiple_of(97) { "\n\n" } else { " " });
    }
    text
}

fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    names(dir).into_iter().map(|name| (name.clone(), std::fs::read(dir.join(name)).unwrap())).collect()
}

fn begun(fixture: &Fixture) -> PathBuf {
    lowkey_files::staging::begun(&fixture.out()).unwrap()
}

/// Prepares in parts of so many bytes, stopped at the report of this number where there is one; what was reported.
fn run(fixture: &Fixture, part: u64, stop: Option<usize>) -> (Result<Prepared>, Vec<Progress>) {
    let mut told = Vec::new();
    let mut tokenizing = 0;
    let mut watch = |progress: Progress| {
        tokenizing += usize::from(matches!(progress, Progress::Tokenizing { .. }));
        told.push(progress);
        if stop == Some(tokenizing) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let hub = HubConfig::from_env();
    let prepared = prepare_from(&fixture.config(), &fixture.out(), None, None, &hub, part, &mut watch);
    (prepared, told)
}

/// Holds what comes of a preparation that is stopped at several places to what comes of one that is not.
fn check(files: &[(&str, &[u8])], toml: &str, part: u64, stops: &[usize]) {
    let whole = Fixture::new(files, toml);
    run(&whole, PART, None).0.unwrap();
    assert!(!begun(&whole).exists(), "a short one has no parts");
    let stopped = Fixture::new(files, toml);
    let mut documents = 0;
    for stop in stops {
        let (result, told) = run(&stopped, part, Some(*stop));
        assert!(matches!(result, Err(Error::Stopped)) && !stopped.out().exists());
        assert!(begun(&stopped).join("state.json").exists());
        let done = |progress: &Progress| match progress {
            Progress::Tokenizing { documents, .. } => Some(*documents),
            _ => None,
        };
        let first = told.iter().find_map(done).unwrap();
        assert!(first >= documents, "begins with what was done: {first} after {documents}");
        documents = first;
    }
    let (result, told) = run(&stopped, part, None);
    result.unwrap();
    assert!(!told.iter().any(|progress| matches!(progress, Progress::LearningMerges { .. })), "learnt again");
    let (found, mut expected) = (contents(&stopped.out()), contents(&whole.out()));
    // The mark has the time of its writing.
    let mark = lowkey_files::mark::MARK;
    expected.insert(mark.to_owned(), found[mark].clone());
    for (name, bytes) in &found {
        assert!(*bytes == expected[name], "{name} differs");
    }
    assert_eq!(found.len(), expected.len());
    assert!(!begun(&stopped).exists());
}

#[test]
fn documents_go_on_to_the_same_bytes() {
    let text = text(20 << 20);
    let toml = "source = { kind = \"text\", paths = [\"a.txt\"], separator = \"\\n\\n\" }\ntokenizer = { kind = \"bpe\", vocab_size = 300 }\n\
                [split]\nby = \"documents\"";
    check(&[("a.txt", text.as_bytes())], toml, 1, &[2, 3]);
}

#[test]
fn a_single_document_goes_on_within_it() {
    let text = text(14 << 20);
    let toml = "source = { kind = \"text\", paths = [\"a.txt\", \"b.txt\"] }\ntokenizer = { kind = \"bytes\" }";
    check(&[("a.txt", text.as_bytes()), ("b.txt", b"short")], toml, 1, &[2, 3]);
}

#[test]
fn records_go_on_with_what_was_left_out() {
    let record = |i: usize| match i {
        1500 => "{\"messages\": 7}\n".to_owned(),
        _ => format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"What is {i}?\"}}, {{\"role\": \"assistant\", \"content\": \"{}\"}}]}}\n",
            i * 7
        ),
    };
    let lines: String = (0..6000).map(record).collect();
    let toml = "[source]\nkind = \"jsonl\"\npaths = [\"a.jsonl\"]\nrecords = \"messages\"\n[tokenizer]\nkind = \"bytes\"\n[chat]\n\
                template = \"plain\"\nskip_bad = true";
    check(&[("a.jsonl", lines.as_bytes())], toml, 40_000, &[3, 4]);
}

#[test]
fn what_belongs_to_another_text_or_is_damaged_is_made_again() {
    let text = text(14 << 20);
    let toml =
        "source = { kind = \"text\", paths = [\"a.txt\"], separator = \"\\n\\n\" }\ntokenizer = { kind = \"bytes\" }";
    let fixture = Fixture::new(&[("a.txt", text.as_bytes())], toml);
    let stop = || assert!(matches!(run(&fixture, 1, Some(3)).0, Err(Error::Stopped)));
    let first = |told: &[Progress]| {
        told.iter().find_map(|progress| match progress {
            Progress::Tokenizing { tokens, .. } => Some(*tokens),
            _ => None,
        })
    };
    stop();
    let part = begun(&fixture).join("00000.train.tokens");
    let mut bytes = std::fs::read(&part).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&part, bytes).unwrap();
    // The first report is of the first chunk.
    assert!(first(&run(&fixture, 1, Some(2)).1).unwrap() < 6 << 20);
    stop();
    std::fs::write(fixture.dir.path().join("a.txt"), format!("other {text}")).unwrap();
    let (result, _) = run(&fixture, 1, None);
    let again = Fixture::new(&[("a.txt", format!("other {text}").as_bytes())], toml);
    assert_eq!(result.unwrap().manifest.train, run(&again, PART, None).0.unwrap().manifest.train);
}

/// Whoever opens a folder that is whole does not take away what another preparation has begun for the same place.
#[test]
fn what_another_has_begun_stays() {
    let text = text(14 << 20);
    let source = |separator: &str| {
        format!("source = {{ kind = \"text\", paths = [\"a.txt\"]{separator} }}\ntokenizer = {{ kind = \"bytes\" }}")
    };
    let whole = source("");
    let fixture = Fixture::new(&[("a.txt", text.as_bytes())], &whole);
    let first = run(&fixture, PART, None).0.unwrap();
    let write =
        |toml: &str| std::fs::write(fixture.dir.path().join("d.toml"), format!("name = \"d\"\n{toml}\n")).unwrap();
    write(&source(", separator = \"\\n\\n\""));
    assert!(matches!(run(&fixture, 1, Some(3)).0, Err(Error::Stopped)));
    write(&whole);
    assert_eq!(run(&fixture, PART, None).0.unwrap().manifest, first.manifest);
    assert!(begun(&fixture).join("state.json").exists());
    write(&source(", separator = \"\\n\\n\""));
    assert!(run(&fixture, PART, None).0.is_ok() && !begun(&fixture).exists());
}
