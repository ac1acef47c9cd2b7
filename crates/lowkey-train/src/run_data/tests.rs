use std::ops::ControlFlow;
use std::path::PathBuf;

use lowkey_data::Tokenizer;

use super::*;
use crate::evaluate::Held;
use crate::fixtures::TinyRun;

fn storybook(run: &TinyRun) -> PathBuf {
    let text = "name = \"s\"\n[source]\nkind = \"storybook\"\nseed = 5\ndocuments = 4\nvalidation_documents = 3\n";
    let path = run.dir.path().join("s.toml");
    std::fs::write(&path, text).unwrap();
    path
}

fn opened(section: &DataSection, run: &TinyRun, rows: usize) -> RunData {
    let dataset = dataset(section, &run.file()).unwrap();
    let dir = prepared_dir(&dataset, section, &run.out(), None);
    open(&dataset, section, rows, &dir, None, None, &mut |_| ControlFlow::Continue(())).unwrap()
}

#[test]
fn held_out_documents_are_no_longer_than_a_sequence() {
    let run = TinyRun::new();
    let text = run.config(&[]).data;
    let section = |seq_len: usize| DataSection {
        dataset: Some(storybook(&run)),
        path: None,
        seq_len,
        packing: None,
        ..text.clone()
    };
    let documents = |seq_len: usize| match opened(&section(seq_len), &run, 4).held {
        Held::Documents(documents) => documents,
        _ => panic!("a storybook knows its entropy"),
    };
    let (whole, short) = (documents(256), documents(40));
    assert_eq!((whole.len(), short.len()), (3, 3));
    for (whole, short) in whole.iter().zip(&short) {
        assert!(whole.ids.len() > 41, "must be long enough to be cropped");
        assert_eq!(short.ids, whole.ids[..41]);
        assert_eq!(short.log_probs, whole.log_probs[..41]);
        assert_eq!(short.classes, whole.classes[..41]);
    }
}

#[test]
fn held_out_text_comes_in_the_passes_asked_for() {
    let run = TinyRun::new();
    let section = run.config(&[]).data;
    let rows = |rows: usize| match opened(&section, &run, rows).held {
        Held::Batches(batches) => batches.iter().map(|batch| batch.rows).collect::<Vec<_>>(),
        _ => panic!("a text file knows no entropy"),
    };
    let (ones, threes) = (rows(1), rows(3));
    assert!(ones.iter().all(|rows| *rows == 1));
    assert_eq!(threes.iter().sum::<usize>(), ones.len());
    assert_eq!(*threes.iter().max().unwrap(), 3);
}

#[test]
fn a_file_is_found_beside_the_run_file_or_both_places_are_named() {
    let run = TinyRun::new();
    let mut section = run.config(&[]).data;
    assert_eq!(dataset(&section, &run.file()).unwrap().origin, run.dir.path().join("text.txt"));
    section.path = Some("no-such.txt".into());
    let message = dataset(&section, &run.file()).unwrap_err().to_string();
    assert!(message.contains("no-such.txt: does not exist"), "{message}");
    assert!(message.contains(&*run.dir.path().join("no-such.txt").to_string_lossy()), "{message}");
}

#[test]
fn tokens_of_another_tokenizer_lie_apart() {
    let run = TinyRun::new();
    let text = run.config(&[]).data;
    let section = DataSection { dataset: Some(storybook(&run)), path: None, ..text.clone() };
    let own = Tokenizer::chars("abc").unwrap();
    let story = dataset(&section, &run.file()).unwrap();
    let plain = prepared_dir(&story, &section, &run.out(), None);
    assert_eq!(plain, run.dir.path().join("prepared/s"));
    assert_ne!(prepared_dir(&story, &section, &run.out(), Some(&own)), plain);
    let file = dataset(&text, &run.file()).unwrap();
    assert_eq!(prepared_dir(&file, &text, &run.out(), None), run.out().join("data"));
}
