//! `lowkey data prepare` and `lowkey data info`.

use std::path::{Path, PathBuf};

use lowkey_data::{DatasetConfig, Prepared, Tokenizer};

use crate::cli::{DataInfoArguments, DataPrepareArguments};
use crate::output::{bytes, count, pairs, say, say_json, table};
use crate::progress::show_preparation;

/// A dataset file by its extension, else a text file.
pub(crate) fn dataset(path: &Path) -> lowkey_data::Result<DatasetConfig> {
    if path.extension().is_some_and(|extension| extension == "toml") {
        DatasetConfig::load(path)
    } else {
        DatasetConfig::from_text_file(path)
    }
}

pub(crate) fn prepare(arguments: &DataPrepareArguments) -> anyhow::Result<()> {
    let dataset = dataset(&arguments.dataset)?;
    let tokenizer = arguments.tokenizer.as_deref().map(Tokenizer::from_file).transpose()?;
    let beside = || {
        let base = arguments.dataset.parent().map_or_else(PathBuf::new, Path::to_path_buf);
        base.join("prepared").join(&dataset.name)
    };
    let out = arguments.out.clone().unwrap_or_else(beside);
    let prepared = lowkey_data::prepare(&dataset, &out, tokenizer, &mut |progress| show_preparation(&progress))?;
    describe(&prepared);
    Ok(())
}

pub(crate) fn info(arguments: &DataInfoArguments) -> anyhow::Result<()> {
    let prepared = lowkey_data::open(&arguments.dir)?;
    if arguments.json {
        return say_json(&prepared.manifest);
    }
    describe(&prepared);
    for i in 0..arguments.show {
        let Some(ids) = prepared.train.document(i) else { break };
        say(&format!("\n[{i}] {}", prepared.tokenizer.decode(&ids)?));
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
    let row = |name: &str, split: &lowkey_data::SplitSummary| {
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
}
