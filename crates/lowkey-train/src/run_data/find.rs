//! Where the datasets of a run file lie, and what it says of them.

use std::path::{Path, PathBuf};

use lowkey_data::{DatasetConfig, Tokenizer};

use crate::error::{Error, Result};
use crate::run_config::DataSection;

/// The dataset of a run file, of a mixture the first.
///
/// # Errors
/// As [`datasets`].
pub fn dataset(section: &DataSection, run_file: &Path) -> Result<DatasetConfig> {
    let first = datasets(section, run_file)?.into_iter().next();
    Ok(first.ok_or_else(|| Error::config("data.dataset", "(absent)", "set it to a dataset file"))?.0)
}

/// Finds the datasets of a run file: relative to the current folder, else to the run file's. What the run file says of records holds for
/// each that has some.
///
/// # Errors
/// [`Error::File`] naming both places, [`Error::Config`] for keys that have no meaning for them.
pub fn datasets(section: &DataSection, run_file: &Path) -> Result<Vec<(DatasetConfig, f64)>> {
    let find = |path: &Path| -> Result<PathBuf> {
        let beside = run_file.parent().unwrap_or(Path::new("")).join(path);
        [path.to_path_buf(), beside.clone()].into_iter().find(|p| p.exists()).ok_or_else(|| {
            let why =
                format!("does not exist, and neither does {}; paths count from the current folder", beside.display());
            Error::file(path, why)
        })
    };
    let files = section.dataset_files();
    let mut datasets = match &section.path {
        Some(path) if files.is_empty() => vec![(DatasetConfig::from_text_file(&find(path)?)?, 1.0)],
        _ => {
            let load = |(file, weight): &(&Path, f64)| Ok((DatasetConfig::load(&find(file)?)?, *weight));
            files.iter().map(load).collect::<Result<Vec<_>>>()?
        }
    };
    for (dataset, _) in &mut datasets {
        dataset.add_special_tokens = section.add_special_tokens.or(dataset.add_special_tokens);
        if dataset.is_chat() {
            dataset.chat.train_on = section.train_on.or(dataset.chat.train_on);
            if let Some(template) = &section.chat_template {
                // What is no file is the name of a built-in one.
                let file = find(Path::new(template)).ok().and_then(|file| std::path::absolute(file).ok());
                dataset.chat.template = Some(file.map_or_else(|| template.clone(), |file| file.display().to_string()));
            }
        }
    }
    if let Some((key, value)) = records_key(section)
        && !datasets.iter().any(|(dataset, _)| dataset.is_chat())
    {
        let why = "the dataset has no records (source.records of its file), so that all of it is learnt as it is; leave the key out";
        return Err(Error::config(key, value, why));
    }
    let mut names: Vec<&str> = datasets.iter().map(|(dataset, _)| dataset.name.as_str()).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        let why = "two datasets have this name, and are told apart by it; give one of them another";
        return Err(Error::config("data.mixture", twice[0], why));
    }
    Ok(datasets)
}

/// A key that has a meaning for records alone, if one is set.
fn records_key(section: &DataSection) -> Option<(&'static str, String)> {
    let template = section.chat_template.as_ref().map(|template| ("data.chat_template", template.clone()));
    let train_on = section.train_on.map(|on| ("data.train_on", on.name().to_owned()));
    template.or(train_on).or(section.too_long.map(|long| ("data.too_long", format!("{long:?}").to_lowercase())))
}

/// Where a dataset's tokens are kept: beside its file, or in the run's folder for a plain text file.
pub fn prepared_dir(
    dataset: &DatasetConfig,
    section: &DataSection,
    run_dir: &Path,
    tokenizer: Option<&Tokenizer>,
) -> PathBuf {
    if section.path.is_some() {
        return run_dir.join("data");
    }
    dataset.prepared_dir(tokenizer)
}
