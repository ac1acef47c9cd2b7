use super::*;
use crate::dataset::{Records, TrainOn};
use crate::oracle::oracle_documents;
use crate::tokenizer::Part;

const TALK: &str = r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}"#;

fn chat_toml(records: &str, chat: &str) -> String {
    format!(
        "[source]\nkind = \"jsonl\"\npaths = [\"a.jsonl\"]\nrecords = \"{records}\"\n[chat]\ntemplate = \"chatml\"\n{chat}\n[split]\n\
         validation_fraction = 0.0\n"
    )
}

fn learnt(prepared: &Prepared, i: usize) -> String {
    let parts = prepared.example(i).unwrap().unwrap();
    parts.into_iter().filter(|part: &Part| part.learnt).map(|part| part.text).collect()
}

#[test]
fn every_kind_of_record_is_prepared_and_opened_again() {
    let user = r#"{"role": "user", "content": "hi"}"#;
    let answer = r#"{"role": "assistant", "content": "ho"}"#;
    for (records, line, expected) in [
        ("messages", TALK.to_owned(), "ho<|im_end|>"),
        ("completion", r#"{"prompt": "hi ", "completion": "ho"}"#.to_owned(), "ho<|endoftext|>"),
        ("completion", format!(r#"{{"prompt": [{user}], "completion": [{answer}]}}"#), "ho<|im_end|>"),
        (
            "sharegpt",
            r#"{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}"#.to_owned(),
            "ho<|im_end|>",
        ),
        ("alpaca", r#"{"instruction": "hi", "input": "", "output": "ho"}"#.to_owned(), "ho<|im_end|>"),
        (
            "preference",
            format!(
                r#"{{"chosen": [{user}, {answer}], "rejected": [{user}, {{"role": "assistant", "content": "no"}}]}}"#
            ),
            "ho<|im_end|>",
        ),
        ("preference", r#"{"prompt": "hi ", "chosen": "ho", "rejected": "no"}"#.to_owned(), "ho<|endoftext|>"),
    ] {
        let fixture = Fixture::new(&[("a.jsonl", format!("{line}\n").as_bytes())], &chat_toml(records, ""));
        let prepared = fixture.prepare().unwrap();
        assert_eq!(learnt(&prepared, 0).trim_end(), expected, "{line}");
        let pairs = records == "preference";
        assert_eq!((prepared.train.is_pairs(), prepared.train.documents()), (pairs, if pairs { 2 } else { 1 }));
        let chat = prepared.manifest.chat.clone().unwrap();
        assert_eq!(chat.learnt, [prepared.train.learnt_tokens().unwrap(), 0]);
        assert!(chat.learnt[0] > 0 && chat.skipped.records == 0);
        assert_eq!(open(&fixture.out()).unwrap().manifest, prepared.manifest);
        let again = fixture.prepare().unwrap();
        assert_eq!(again.manifest, prepared.manifest);
        assert!(again.tokenizer.companion("chat_template.jinja").unwrap().contains("im_start"));
    }
}

#[test]
fn a_record_that_cannot_be_used_is_named_or_left_out_and_counted() {
    for (bad, expected) in [
        ("{oops", "line 3: not valid JSON"),
        ("[1]", "line 3: not a JSON object"),
        (
            r#"{"messages": [{"role": "robot", "content": "x"}]}"#,
            "line 3: message 1 of \"messages\" has the unknown role \"robot\"",
        ),
        (r#"{"messages": [{"role": "user", "content": "x"}]}"#, "line 3: no token of it is learnt"),
        (r#"{"text": "x"}"#, "line 3: no field \"messages\""),
        (
            r#"{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0.5}]}"#,
            "weight = 0.5",
        ),
    ] {
        let lines = format!("{TALK}\n\n{bad}\n{TALK}\n");
        let files = [("a.jsonl", lines.as_bytes())];
        let why = message(Fixture::new(&files, &chat_toml("messages", "")).prepare());
        assert!(why.contains(expected) && why.contains("a.jsonl"), "{why}");
        let prepared = Fixture::new(&files, &chat_toml("messages", "skip_bad = true")).prepare().unwrap();
        let skipped = prepared.manifest.chat.unwrap().skipped;
        assert_eq!((skipped.records, prepared.train.documents()), (1, 2));
        assert!(skipped.first.as_ref().unwrap().contains(expected), "{skipped:?}");
    }
    let fixture = Fixture::new(&[("a.jsonl", b"{}\n{}\n")], &chat_toml("messages", "skip_bad = true"));
    let why = message(fixture.prepare());
    assert!(why.contains("no record that can be used (2 were left out; the first: a.jsonl: line 1"), "{why}");
}

#[test]
fn what_is_left_out_moves_no_other_record_to_the_other_side() {
    let line = |i: u32| TALK.replace("ho", &format!("answer {i}"));
    let all: Vec<String> = (0..40).map(line).collect();
    let mut some = all.clone();
    some[3] = "{}".into();
    for by in ["tail", "documents"] {
        let toml = chat_toml("messages", "skip_bad = true").replace("0.0", &format!("0.3\nby = \"{by}\""));
        let held = |lines: &[String]| {
            let prepared = Fixture::new(&[("a.jsonl", lines.join("\n").as_bytes())], &toml).prepare().unwrap();
            (prepared.validation.documents(), texts(&prepared, &prepared.validation))
        };
        let (whole, fewer) = (held(&all), held(&some));
        assert!(whole.0 > 3);
        assert!(fewer.1.iter().all(|text| whole.1.contains(text)) && whole.0 - fewer.0 <= 1, "{by}");
    }
}

#[test]
fn tokens_lie_in_a_folder_for_each_template_and_way_to_learn() {
    let fixture = Fixture::new(
        &[("a.jsonl", TALK.as_bytes()), ("t.jinja", b"{% for m in messages %}{{ m.content }}.{% endfor %}")],
        &chat_toml("messages", ""),
    );
    let config = fixture.config();
    let with = |change: &dyn Fn(&mut DatasetConfig)| {
        let mut config = config.clone();
        change(&mut config);
        (config.prepared_dir(None), prepare(&config, &fixture.out(), None, &mut go_on).unwrap().manifest.fingerprint)
    };
    let same = with(&|_| {});
    assert_eq!(with(&|_| {}), same);
    let all = with(&|config| config.chat.train_on = Some(TrainOn::All));
    let other = with(&|config| config.chat.template = Some("t.jinja".into()));
    assert!(same.0 != all.0 && same.0 != other.0 && all.0 != other.0);
    assert!(same.1 != all.1 && same.1 != other.1 && all.1 != other.1);
    // What is in the template counts, wherever it lies.
    std::fs::write(fixture.dir.path().join("t.jinja"), "{% for m in messages %}{{ m.content }}!{% endfor %}").unwrap();
    let changed = with(&|config| config.chat.template = Some("t.jinja".into()));
    assert!(changed.0 == other.0 && changed.1 != other.1);
}

#[test]
fn rows_of_parquet_are_records_with_lists_in_them() {
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::writer::SerializedFileWriter;
    let schema = "message m { optional int64 id; optional group messages (LIST) { repeated group list { optional group element { \
                  optional binary role (UTF8); optional binary content (UTF8); } } } }";
    let schema = std::sync::Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
    let fixture = Fixture::new(&[], &chat_toml("messages", "").replace("jsonl", "parquet"));
    let file = std::fs::File::create(fixture.dir.path().join("a.parquet")).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Default::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<parquet::data_type::Int64Type>().write_batch(&[1, 2], Some(&[1, 1]), None).unwrap();
    column.close().unwrap();
    for texts in [["user", "assistant", "user", "robot"], ["hi", "ho", "x", "y"]] {
        let mut column = group.next_column().unwrap().unwrap();
        let values = texts.map(ByteArray::from);
        column.typed::<ByteArrayType>().write_batch(&values, Some(&[4, 4, 4, 4]), Some(&[0, 1, 0, 1])).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
    let why = message(fixture.prepare());
    assert!(why.contains("a.parquet: row 2: message 2") && why.contains("robot"), "{why}");
    let toml = chat_toml("messages", "skip_bad = true").replace("jsonl", "parquet");
    std::fs::write(fixture.dir.path().join("d.toml"), format!("name = \"d\"\n{toml}")).unwrap();
    let prepared = fixture.prepare().unwrap();
    assert_eq!(learnt(&prepared, 0).trim_end(), "ho<|im_end|>");
    assert_eq!(prepared.manifest.chat.unwrap().skipped.records, 1);
}

#[test]
fn mistakes_of_a_dataset_of_records_are_named() {
    let jsonl = "[source]\nkind = \"jsonl\"\npaths = [\"a.jsonl\"]\n";
    for (toml, expected) in [
        (format!("{jsonl}records = \"chats\""), "chats"),
        (format!("{jsonl}[chat]\ntemplate = \"chatml\""), "[chat] has a meaning for records alone"),
        (
            format!("{jsonl}records = \"messages\"\n[chat]\ntrain_on = \"completion\""),
            "needs records that say what their prompt is",
        ),
        (format!("{jsonl}records = \"preference\"\n[chat]\ntrain_on = \"all\""), "answers alone are compared"),
        (format!("{jsonl}records = \"alpaca\"\nfield = \"x\""), "has no meaning for these records"),
        (format!("{jsonl}records = \"messages\"\n[tokenizer]\nkind = \"chars\""), "tokenizer.kind must be"),
        (format!("{jsonl}records = \"messages\"\n[chat]\ntrain = \"all\""), "train"),
        (
            "[source]\nkind = \"hub\"\nrepo = \"a/b\"\nfiles = [\"x\"]\nformat = \"text\"\nrecords = \"messages\""
                .to_owned(),
            "source.records has no meaning",
        ),
    ] {
        let fixture = Fixture::new(&[("a.jsonl", TALK.as_bytes())], &toml);
        let why = DatasetConfig::load(&fixture.dir.path().join("d.toml")).unwrap_err().to_string();
        assert!(why.contains(expected) && why.contains("d.toml"), "{expected}: {why}");
    }
    let config = Fixture::new(&[], &format!("{jsonl}records = \"sharegpt\"\nfield = \"dialog\"")).config();
    assert_eq!((config.records(), config.list()), (Some(Records::ShareGpt), "dialog"));
    let why =
        message(Fixture::new(&[("a.jsonl", TALK.as_bytes())], &format!("{jsonl}records = \"messages\"")).prepare());
    assert!(why.contains("line 1") && why.contains("there is no chat template"), "{why}");
}

#[test]
fn a_storybook_told_as_conversations_has_certain_answers() {
    let toml = "[source]\nkind = \"storybook\"\nseed = 5\ndocuments = 20\nvalidation_documents = 6\nform = \"chat\"\n[chat]\n\
                template = \"chatml\"\n";
    let fixture = Fixture::new(&[], toml);
    let prepared = fixture.prepare().unwrap();
    assert_eq!((prepared.train.documents(), prepared.validation.documents()), (20, 6));
    let parts = prepared.example(0).unwrap().unwrap();
    assert!(!parts[0].learnt && parts[0].text.starts_with("<|im_start|>") && parts[0].text.contains('?'));
    assert!(parts[1].learnt && parts[1].text.trim_end().ends_with(".<|im_end|>"), "{parts:?}");
    let documents = oracle_documents(&fixture.config(), &prepared.tokenizer, 10).unwrap().unwrap();
    assert_eq!(documents.len(), 6);
    for (i, document) in documents.iter().enumerate() {
        assert_eq!(prepared.validation.document(i).unwrap().as_ref(), Some(&document.ids));
        assert_eq!(prepared.validation.learnt(i).unwrap().as_ref(), Some(&document.learnt));
        let truth = document.log_probs.iter().zip(&document.learnt).filter(|(_, learnt)| **learnt);
        assert!(truth.map(|(log_prob, _)| *log_prob).all(|log_prob| log_prob == 0.0));
        // The answers and their ends have classes of their own.
        use crate::storybook::Class;
        let answers = document.classes.iter().filter(|class| **class == Class::Answer).count();
        let ends = document.classes.iter().filter(|class| **class == Class::End).count();
        assert!(answers > 2 && ends > 2, "{answers} {ends}");
    }
}

#[test]
fn the_conversations_that_ship_fit_the_context_of_their_run_files() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/storybook-chat.toml");
    let mut config = DatasetConfig::load(&file).unwrap();
    if let Source::Storybook { documents, validation_documents, .. } = &mut config.source {
        (*documents, *validation_documents) = (100, 2);
    }
    let dir = tempfile::tempdir().unwrap();
    let prepared = prepare(&config, &dir.path().join("out"), None, &mut go_on).unwrap();
    let longest = (0..100).map(|i| prepared.train.document(i).unwrap().unwrap().len()).max().unwrap();
    assert!((400..=512).contains(&longest), "{longest}");
    let parts = prepared.example(0).unwrap().unwrap();
    assert!(parts.len() >= 2 && parts[0].text.ends_with('?') && !parts[0].learnt, "{parts:?}");
    assert!(
        parts[1].text.starts_with(' ') && parts[1].text.ends_with(".<|endoftext|>") && parts[1].learnt,
        "{parts:?}"
    );
}
