//! Reading a run file, with keys replaced on the command line.

use std::path::Path;

use super::RunConfig;
use crate::error::{Error, Result};

/// Far more than any run file needs, in bytes.
const LARGEST: u64 = 16 << 20;

/// Keys whose value is a text. What stands behind `=` is that text, whether or not it would also be a number, a date or a truth value.
const TEXTS: [&str; 6] = ["run.name", "run.device", "init.from", "data.dataset", "data.path", "data.chat_template"];

impl RunConfig {
    /// Reads a run file and applies `key.path=value` overrides, whose values are TOML (a bare word counts as a string, and where a
    /// text belongs so does anything).
    ///
    /// # Errors
    /// [`Error::RunFile`] with line and column for a file that does not parse or has an unknown key, [`Error::Config`] for a
    /// value out of range, [`Error::Io`] or [`Error::File`] for one that cannot be read.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        let fail = |why: String| Error::RunFile { path: path.to_path_buf(), why };
        let text = String::from_utf8(lowkey_files::read(path, LARGEST)?).map_err(|e| {
            fail(format!("invalid UTF-8 at byte {}; a run file is TOML text in UTF-8", e.utf8_error().valid_up_to()))
        })?;
        let mut table: toml::Table = toml::from_str(&text).map_err(|e| fail(e.to_string()))?;
        let written = table.contains_key("model");
        for expression in overrides {
            set(&mut table, expression)?;
        }
        if table.get("init").is_some_and(|init| init.get("from").is_some()) && table.contains_key("model") {
            return Err(two_models(written));
        }
        // Straight from the text where that is all, so that a message can point at line and column.
        let mut config: Self = if overrides.is_empty() {
            toml::from_str(&text).map_err(|e| fail(e.to_string()))?
        } else {
            toml::Value::Table(table).try_into().map_err(|e| fail(e.to_string()))?
        };
        config.take_packing()?;
        config.check()?;
        Ok(config)
    }
}

/// `[init]` and `[model]` at once; `written`: the section stands in the run file.
fn two_models(written: bool) -> Error {
    let remove = if written { "remove the [model] section" } else { "leave out --set model.…" };
    let why = format!(
        "[init] from brings its own configuration; {remove}. To go on at other lengths, write max_position_embeddings (and \
         rope_parameters, such as YaRN's) into [init]"
    );
    Error::config("model", "(set)", why)
}

fn set(table: &mut toml::Table, expression: &str) -> Result<()> {
    let fail = |why: &str| Error::RunFile { path: format!("--set {expression}").into(), why: why.into() };
    let (path, value) = expression.split_once('=').ok_or_else(|| fail("must look like section.key=value"))?;
    let (path, value) = (path.trim(), value.trim());
    let mut keys: Vec<&str> = path.split('.').map(str::trim).collect();
    let is_text = TEXTS.contains(&keys.join(".").as_str());
    let parsed = toml::from_str::<toml::Table>(&format!("v = {value}")).ok().and_then(|mut table| table.remove("v"));
    let value = match parsed {
        Some(text @ toml::Value::String(_)) => text,
        Some(other) if !is_text => other,
        None if !is_text && is_whole_number(value) => {
            let why = format!("must lie between {} and {}, as whole numbers of TOML do", i64::MIN, i64::MAX);
            return Err(fail(&why));
        }
        // A bare word is a string: `--set run.device=cpu` reads better than nested quotes.
        Some(_) | None => toml::Value::String(value.to_string()),
    };
    let last = keys.pop().filter(|key| !key.is_empty()).ok_or_else(|| fail("names no key"))?;
    let mut at = table;
    for key in keys {
        let entry = at.entry(key).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        at = entry.as_table_mut().ok_or_else(|| fail(&format!("{key} is not a section")))?;
    }
    at.insert(last.to_string(), value);
    Ok(())
}

fn is_whole_number(text: &str) -> bool {
    let digits = text.trim_start_matches(['+', '-']);
    !digits.is_empty() && digits.chars().all(|c| c.is_ascii_digit() || c == '_')
}
