//! What the files of a model say about generating with it: which tokens end a text, which begins one, how tokens are chosen.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::tokenizer::{Tokenizer, read_text};

const FILE: &str = "generation_config.json";

/// `generation_config.json` and what other files of a model add to it.
///
/// **Where a text ends.** Three files may name end tokens, and in published models they contradict each other: `eos_token` of
/// `tokenizer_config.json`, `eos_token_id` of `config.json` (and of its `text_config`), and `eos_token_id` of
/// `generation_config.json`, a number or a list. transformers' `generate` stops at those of `generation_config.json` alone, and
/// looks at `config.json` only without it; vLLM stops at the same ones and at the tokenizer's. Here a text ends at **each** of
/// them: every one of these files calls its token an end, and to miss one is to run on into the next text, while no published
/// model goes on after any of its ends. The first is the one that ended the documents in training here.
///
/// **How tokens are chosen.** A number that the file gives is in force, one that it leaves out is not, as in vLLM. `do_sample =
/// false` takes the most likely token, as in transformers; `do_sample = true` without a temperature means one of 1.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Generation {
    /// Tokens that end a text, the one that ended documents in training first.
    pub ends: Vec<u32>,
    /// The token that begins a text, where a file names one.
    pub begin: Option<u32>,
    /// Divides the logits; 0 takes the most likely token each time.
    pub temperature: Option<f64>,
    /// Only the so many most likely tokens.
    pub top_k: Option<usize>,
    /// Only the fewest most likely tokens that together have this probability.
    pub top_p: Option<f64>,
    /// Only tokens with this fraction of the largest probability.
    pub min_p: Option<f64>,
    /// Above 1: tokens that have occurred become less likely.
    pub repetition_penalty: Option<f64>,
    /// The file as it stands; empty where there is none.
    file: Map<String, Value>,
}

impl Generation {
    /// For a model that has no files yet.
    pub fn new(tokenizer: Option<&Tokenizer>) -> Self {
        let begin = match tokenizer.map(Tokenizer::text_start) {
            Some([begin]) => Some(*begin),
            _ => None,
        };
        Self { ends: tokenizer.and_then(Tokenizer::eos_id).into_iter().collect(), begin, ..Self::default() }
    }

    /// Reads `generation_config.json` and `config.json` of a model directory, whose tokenizer has been read already.
    ///
    /// # Errors
    /// [`Error::Model`] naming the file, the key and its value, for what means nothing.
    pub fn from_model_dir(dir: &Path, tokenizer: Option<&Tokenizer>) -> Result<Self> {
        let mut found = Self::new(tokenizer);
        let config = Keys::read(dir.join("config.json"))?;
        let declared = Keys::read(dir.join(FILE))?;
        for file in [&config, &config.part("text_config"), &declared] {
            for id in file.ids("eos_token_id")? {
                if !found.ends.contains(&id) {
                    found.ends.push(id);
                }
            }
        }
        let begins = [declared.ids("bos_token_id")?, config.ids("bos_token_id")?].concat();
        found.begin = begins.first().copied().or(found.begin);
        let temperature = declared.number("temperature", "a number ≥ 0", |t| t >= 0.0)?;
        found.temperature = match declared.flag("do_sample")? {
            Some(false) => Some(0.0),
            Some(true) => temperature.or(Some(1.0)),
            None => temperature,
        };
        found.top_p = declared.number("top_p", "greater than 0 and at most 1", |p| p > 0.0 && p <= 1.0)?;
        found.min_p = declared.number("min_p", "between 0 and 1", |p| (0.0..=1.0).contains(&p))?;
        found.repetition_penalty = declared.number("repetition_penalty", "a number > 0", |r| r > 0.0)?;
        // All of them are written as 0 or −1.
        let top_k = declared.number("top_k", "a whole number", |k| k.fract() == 0.0 && k < 1e9)?;
        found.top_k = top_k.filter(|k| *k >= 1.0).map(|k| k as usize);
        found.file = declared.map;
        Ok(found)
    }

    /// Sampling at this temperature, where no file says otherwise.
    #[must_use]
    pub fn or_sampling(mut self, temperature: f64) -> Self {
        if self.file.is_empty() {
            self.file.insert("do_sample".to_owned(), json!(true));
            self.file.insert("temperature".to_owned(), json!(temperature));
            self.temperature = Some(temperature);
        }
        self
    }

    /// Ending at another token as well, behind those that it ends at already.
    #[must_use]
    pub fn ending_at(mut self, id: Option<u32>) -> Self {
        self.ends.extend(id.filter(|id| !self.ends.contains(id)));
        self
    }

    /// What to write as `generation_config.json` beside a model: all that the file said, and every token that ends a text, so
    /// that programs that look at this file alone stop where this one does.
    pub fn to_json(&self) -> Value {
        let mut out = Map::new();
        out.insert("bos_token_id".to_owned(), json!(self.begin));
        // null where there is none: an empty list would stop transformers' own generation.
        out.insert("eos_token_id".to_owned(), json!((!self.ends.is_empty()).then_some(&self.ends)));
        let same = |ids: &[u32]| ids.len() == self.ends.len() && ids.iter().all(|id| self.ends.contains(id));
        for (key, value) in &self.file {
            let replaced = key == "eos_token_id" && !ids(value).is_some_and(|ids| same(&ids));
            let filled = key == "bos_token_id" && value.is_null();
            if !replaced && !filled {
                out.insert(key.clone(), value.clone());
            }
        }
        Value::Object(out)
    }
}

/// Token ids, as one number or several. Negative ones mean that there is none.
fn ids(value: &Value) -> Option<Vec<u32>> {
    match value {
        Value::Null => Some(Vec::new()),
        Value::Array(several) => several.iter().map(ids).collect::<Option<Vec<_>>>().map(|ids| ids.concat()),
        one => match one.as_i64()? {
            ..0 => Some(Vec::new()),
            id => u32::try_from(id).ok().map(|id| vec![id]),
        },
    }
}

/// The object in a JSON file, with typed access to its keys; `null` counts as absent, and a file that is not there is empty.
struct Keys {
    path: PathBuf,
    map: Map<String, Value>,
}

impl Keys {
    fn read(path: PathBuf) -> Result<Self> {
        if !path.is_file() {
            return Ok(Self { path, map: Map::new() });
        }
        let text = read_text(&path)?;
        let fail = |message: String| Error::Model { path: path.clone(), message };
        match serde_json::from_str(&text).map_err(|e| fail(format!("not valid JSON: {e}")))? {
            Value::Object(map) => Ok(Self { path, map }),
            _ => Err(fail("must hold a JSON object".to_owned())),
        }
    }

    /// The object under a key; empty where there is none.
    fn part(&self, key: &str) -> Self {
        let map = self.map.get(key).and_then(Value::as_object).cloned().unwrap_or_default();
        Self { path: self.path.clone(), map }
    }

    fn get<T>(&self, key: &str, allowed: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| Error::Model {
                path: self.path.clone(),
                message: format!("{key} = {value}: must be {allowed}; correct it, or remove the key"),
            }),
        }
    }

    fn ids(&self, key: &str) -> Result<Vec<u32>> {
        Ok(self.get(key, "a token id or a list of them", ids)?.unwrap_or_default())
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, "true or false", Value::as_bool)
    }

    fn number(&self, key: &str, allowed: &str, fits: impl Fn(f64) -> bool) -> Result<Option<f64>> {
        self.get(key, allowed, |value| value.as_f64().filter(|number| fits(*number)))
    }
}

#[cfg(test)]
mod tests;
