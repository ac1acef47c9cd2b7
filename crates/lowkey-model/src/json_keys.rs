//! What `config.json` says under a key, checked: who reads a key names what it wants, and a wrong type is told by the key's name.

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Typed access to the keys of a JSON object; `null` counts as absent.
pub(crate) struct Keys<'a>(pub(crate) &'a Map<String, Value>);

impl Keys<'_> {
    pub(crate) fn get<T>(
        &self,
        key: &'static str,
        want: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| Error::config(key, value, format!("must be {want}"))),
        }
    }

    pub(crate) fn size(&self, key: &'static str) -> Result<Option<usize>> {
        self.get(key, "a whole number ≥ 0", |v| v.as_u64().and_then(|n| usize::try_from(n).ok()))
    }

    pub(crate) fn sizes(&self, key: &'static str) -> Result<Option<Vec<usize>>> {
        self.get(key, "a list of whole numbers", |v| {
            v.as_array()?.iter().map(|n| usize::try_from(n.as_u64()?).ok()).collect()
        })
    }

    pub(crate) fn need(&self, key: &'static str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| Error::MissingKey { key, why: "config.json must give it".into() })
    }

    pub(crate) fn number(&self, key: &'static str) -> Result<Option<f64>> {
        self.get(key, "a number", Value::as_f64)
    }

    pub(crate) fn flag(&self, key: &'static str) -> Result<Option<bool>> {
        self.get(key, "true or false", Value::as_bool)
    }

    pub(crate) fn text(&self, key: &'static str) -> Result<Option<&str>> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(Error::config(key, other, "must be a string")),
        }
    }
}
