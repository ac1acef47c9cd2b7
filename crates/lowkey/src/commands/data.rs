//! `lowkey data prepare` and `lowkey data info`.

use std::path::Path;

use anyhow::bail;
use lowkey_data::tasks::TaskCorpus;
use lowkey_data::{DatasetConfig, Prepared, Tokenizer};

use crate::cli::{DataInfoArguments, DataPrepareArguments};
use crate::output::{bytes, count, pairs, say, say_json, say_parts, table};
use crate::progress::Preparation;

/// A dataset file by its extension, else a text file.
pub(crate) fn dataset(path: &Path) -> lowkey_data::Result<DatasetConfig> {
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("toml")) {
        DatasetConfig::load(path)
    } else {
        DatasetConfig::from_text_file(path)
    }
}

pub(crate) fn prepare(arguments: &DataPrepareArguments) -> anyhow::Result<()> {
    let dataset = dataset(&arguments.dataset)?;
    let read = |path: &Path| if path.is_dir() { Tokenizer::from_model_dir(path) } else { Tokenizer::from_file(path) };
    let tokenizer = arguments.tokenizer.as_deref().map(read).transpose()?;
    let out = arguments.out.clone().unwrap_or_else(|| dataset.prepared_dir(tokenizer.as_ref()));
    let prepared = lowkey_data::prepare(&dataset, &out, tokenizer, &mut Preparation::new().observer())?;
    describe(&prepared);
    Ok(())
}

pub(crate) fn info(arguments: &DataInfoArguments) -> anyhow::Result<()> {
    if arguments.dir.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("toml")) {
        return task_info(arguments);
    }
    show(arguments, &lowkey_data::open(&arguments.dir)?)
}

fn show(arguments: &DataInfoArguments, prepared: &Prepared) -> anyhow::Result<()> {
    if arguments.json {
        return say_json(&prepared.manifest);
    }
    describe(prepared);
    for i in 0..arguments.show {
        let Some(ids) = prepared.train.document(i)? else { break };
        if let (true, Some(parts)) = (prepared.train.is_masked(), prepared.example(i)?) {
            say(&format!("\n[{i}]"));
            say_parts(&parts);
            continue;
        }
        say(&format!("\n[{i}] {}", prepared.tokenizer.decode(&ids)?));
    }
    Ok(())
}

/// A dataset file: of what was prepared of it, or of a task, of which nothing is.
fn task_info(arguments: &DataInfoArguments) -> anyhow::Result<()> {
    let config = DatasetConfig::load(&arguments.dir)?;
    let Some(corpus) = TaskCorpus::new(&config)? else {
        let dir = config.prepared_dir(None);
        if dir.is_dir() {
            return show(arguments, &lowkey_data::open(&dir)?);
        }
        let file = arguments.dir.display();
        bail!(
            "{file}: nothing has been prepared of it alone; write `lowkey data prepare {file}`, or name a folder that a run prepared"
        );
    };
    let summary = corpus.summary();
    if arguments.json {
        return say_json(&summary);
    }
    let (reads, chance) = match summary.output_width {
        Some(width) => (
            format!("{} numbers a position, answers of {width}", summary.width),
            format!("{} (mean squared error of an answer of 0)", summary.chance),
        ),
        None => (format!("one of {} words a position", summary.width), format!("{:.2} %", 100.0 * summary.chance)),
    };
    say(&pairs(&[
        ("task", config.name.clone()),
        ("description", config.description.clone()),
        ("example", format!("{} positions, {} answers", summary.positions, summary.answers)),
        ("reads", reads),
        ("chance", chance),
        ("held out", format!("{} examples", summary.validation_examples)),
        ("fingerprint", summary.fingerprint.chars().take(16).collect()),
    ]));
    for index in 0..arguments.show as u64 {
        let Some(words) = corpus.show(index)? else {
            bail!("--show: the examples of this task are vectors, not words")
        };
        say(&format!("\n[{index}] {words}"));
    }
    Ok(())
}

fn describe(prepared: &Prepared) {
    let manifest = &prepared.manifest;
    say(&pairs(&[
        ("dataset", manifest.dataset.name.clone()),
        ("folder", prepared.dir.display().to_string()),
        ("license", manifest.dataset.license.clone()),
        ("tokenizer", format!("{}, {} tokens", manifest.tokenizer, manifest.vocab_size)),
        ("fingerprint", manifest.fingerprint.chars().take(16).collect()),
    ]));
    let row = |name: &str, split: &lowkey_data::prepare::SplitSummary| {
        vec![
            name.to_string(),
            split.documents.to_string(),
            count(split.tokens as f64),
            bytes(split.bytes as usize),
            split.sha256.chars().take(16).collect(),
        ]
    };
    let rows = [row("train", &manifest.train), row("validation", &manifest.validation)];
    say(&format!("\n{}", table(&["split", "documents", "tokens", "text", "sha256"], &rows)));
    if let Some(chat) = &manifest.chat {
        let learnt = chat.learnt.map(|learnt| count(learnt as f64));
        let mut rows = vec![
            ("learnt", chat.train_on.name().to_owned()),
            ("tokens learnt", format!("{} for training, {} held out", learnt[0], learnt[1])),
        ];
        if let Some(first) = &chat.skipped.first {
            rows.push(("left out", format!("{} records; the first: {first}", chat.skipped.records)));
        }
        say(&format!("\n{}", pairs(&rows)));
    }
}
