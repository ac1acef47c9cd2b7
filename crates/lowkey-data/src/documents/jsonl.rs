//! JSONL files: one JSON object a line, read as Python's `json` reads them.

use std::fmt;
use std::io::{BufRead, Read};
use std::path::Path;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Map;

use super::meter::Meter;
use super::open::open;
use super::text::BOM;
use super::{Found, LARGEST_RECORD, Pieces, pieces_of};
use crate::error::{Error, Result};

/// Field names that an error lists at most.
const MOST_NAMES: usize = 32;

/// The texts of a JSONL file.
pub(super) fn read(path: &Path, field: &str, meter: &Meter) -> Result<Pieces> {
    let field = field.to_owned();
    let texts = lines(path, meter, move |_, line| text_of(line, &field))?;
    Ok(Box::new(texts.flat_map(|text| match text {
        Ok(text) => pieces_of(text).into_iter().map(Ok).collect(),
        Err(error) => vec![Err(error)],
    })))
}

/// The objects of a JSONL file, each with its line; what is none is said in its place.
pub(super) fn objects(path: &Path, meter: &Meter) -> Result<impl Iterator<Item = Result<Found>> + Send + use<>> {
    lines(path, meter, |number, line| Ok(Some(Found { unit: "line", number, value: object_of(line) })))
}

/// What `parse` makes of each line that is not empty, given its number from 1; a message of it becomes an error that names the line.
fn lines<T, F>(path: &Path, meter: &Meter, mut parse: F) -> Result<impl Iterator<Item = Result<T>> + Send + use<T, F>>
where
    F: FnMut(u64, &str) -> Result<Option<T>, String> + Send,
{
    let mut reader = open(path, meter)?;
    let path = path.to_path_buf();
    let (mut number, mut offset) = (0u64, 0u64);
    let mut line = Vec::new();
    Ok(std::iter::from_fn(move || {
        loop {
            line.clear();
            // A long line leaves no room behind that no other needs.
            line.shrink_to(1 << 20);
            let length = match (&mut reader).take(LARGEST_RECORD as u64 + 1).read_until(b'\n', &mut line) {
                Ok(0) => return None,
                Ok(length) => length as u64,
                Err(reason) => return Some(Err(Error::io("read", &path)(reason))),
            };
            number += 1;
            if line.len() > LARGEST_RECORD {
                let message = format!(
                    "is longer than {} MiB, the most that is read: write its text as several documents",
                    LARGEST_RECORD >> 20
                );
                return Some(Err(Error::Record { path: path.clone(), unit: "line", number, message }));
            }
            let start = offset;
            offset += length;
            let bytes = if number == 1 { line.strip_prefix(BOM).unwrap_or(&line) } else { &line };
            let text = match std::str::from_utf8(bytes) {
                Ok(line) => line.trim(),
                Err(e) => {
                    let skipped = (line.len() - bytes.len()) as u64;
                    let offset = start + skipped + e.valid_up_to() as u64;
                    return Some(Err(Error::Utf8 { path: path.clone(), offset }));
                }
            };
            if text.is_empty() {
                continue;
            }
            match parse(number, text) {
                Ok(Some(found)) => return Some(Ok(found)),
                Ok(None) => {}
                Err(message) => {
                    return Some(Err(Error::Record { path: path.clone(), unit: "line", number, message }));
                }
            }
        }
    }))
}

/// Refuses a line that is no object.
fn check_object(line: &str) -> Result<(), String> {
    if line.starts_with('{') {
        return Ok(());
    }
    let array = if line.starts_with('[') { " (`jq -c '.[]'` writes the items of an array so)" } else { "" };
    Err(format!("not a JSON object; every line must be one{array}"))
}

/// All of one line.
fn object_of(line: &str) -> Result<Map<String, serde_json::Value>, String> {
    check_object(line)?;
    let object = serde_json::from_str(line).or_else(|e| match without_constants(line) {
        Some(plain) => serde_json::from_str(&plain),
        None => Err(e),
    });
    object.map_err(|e| format!("not valid JSON: {e}"))
}

/// The text of one line; none where it is null.
fn text_of(line: &str, field: &str) -> Result<Option<String>, String> {
    check_object(line)?;
    let object = parse(line, field).or_else(|e| match without_constants(line) {
        Some(plain) => parse(&plain, field),
        None => Err(e),
    });
    let object = object.map_err(|e| format!("not valid JSON: {e}"))?;
    match object.found {
        Some(Value::Text(text)) => Ok(Some(text)),
        Some(Value::Null) => Ok(None),
        Some(Value::Other) => Err(format!("field {field:?} is not a string")),
        None => Err(format!("no field {field:?}; the object has {:?}: set `field` to one of them", object.names)),
    }
}

fn parse(line: &str, field: &str) -> serde_json::Result<Object> {
    let mut json = serde_json::Deserializer::from_str(line);
    let object = Field(field).deserialize(&mut json)?;
    json.end()?;
    Ok(object)
}

/// The line with 0 for each `NaN`, `Infinity` and `-Infinity`, which Python writes for numbers and JSON does not know; none
/// where it has none.
fn without_constants(line: &str) -> Option<String> {
    let mut plain = String::new();
    let (mut copied, mut at, mut quoted) = (0, 0, false);
    let bytes = line.as_bytes();
    while let Some(byte) = bytes.get(at) {
        let constant =
            ["NaN", "Infinity", "-Infinity"].into_iter().find(|word| bytes[at..].starts_with(word.as_bytes()));
        match (byte, constant) {
            (b'\\', _) if quoted => at += 1,
            (b'"', _) => quoted = !quoted,
            (_, Some(word)) if !quoted => {
                plain.push_str(&line[copied..at]);
                plain.push('0');
                at += word.len();
                copied = at;
                continue;
            }
            _ => {}
        }
        at += 1;
    }
    (copied > 0).then(|| plain + &line[copied..])
}

/// What a line holds: the value of the field that was asked for, and the names of the others.
struct Object {
    found: Option<Value>,
    names: Vec<String>,
}

/// Reads an object but for all that nobody asked for, which is checked and thrown away.
struct Field<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for Field<'_> {
    type Value = Object;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Object, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Field<'_> {
    type Value = Object;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
        let mut object = Object { found: None, names: Vec::new() };
        while let Some(name) = map.next_key::<String>()? {
            if name == self.0 {
                object.found = Some(map.next_value()?);
            } else {
                map.next_value::<IgnoredAny>()?;
                if object.names.len() < MOST_NAMES {
                    object.names.push(name);
                }
            }
        }
        Ok(object)
    }
}

/// The value of the field.
enum Value {
    Text(String),
    Null,
    Other,
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Text(text.to_owned()))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Value, E> {
        Ok(Value::Other)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Value, E> {
        Ok(Value::Other)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Value, E> {
        Ok(Value::Other)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Value, E> {
        Ok(Value::Other)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Value::Other)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        while items.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Value::Other)
    }
}
