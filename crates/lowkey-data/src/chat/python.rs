//! Values written as Python writes them, which is what models were trained on.

use std::fmt::Write as _;

use minijinja::value::{ObjectRepr, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

/// Levels of lists in lists that are written. Python gives up after about a thousand.
const DEEPEST: usize = 200;

/// Text that grows up to a limit: a value that holds another twice, and that one another twice, has no end to speak of.
pub(super) struct Writer {
    pub(super) out: String,
    limit: usize,
}

impl Writer {
    /// As much as the fuel that is left would pay for.
    pub(super) fn new(state: &State) -> Self {
        /// Bytes that one fuel stands for in minijinja.
        const BYTES: u64 = 64;
        let left = state.fuel_levels().map_or(u64::MAX, |(_, left)| left);
        Self { out: String::new(), limit: usize::try_from(left.saturating_mul(BYTES)).unwrap_or(usize::MAX) }
    }

    pub(super) fn push(&mut self, text: &str) -> Result<(), Error> {
        if text.len() > self.limit - self.out.len() {
            return Err(Error::from(ErrorKind::OutOfFuel));
        }
        self.out.push_str(text);
        Ok(())
    }
}

/// Python's `str(value)`; nothing for what is undefined, as in Jinja.
pub(super) fn text(state: &State, value: &Value) -> Result<String, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    let mut writer = Writer::new(state);
    if !value.is_undefined() {
        repr(&mut writer, value, 0)?;
    }
    Ok(writer.out)
}

/// Python's `repr(value)`.
pub(super) fn repr(writer: &mut Writer, value: &Value, depth: usize) -> Result<(), Error> {
    if depth > DEEPEST {
        return Err(too_deep());
    }
    match value.kind() {
        ValueKind::Undefined => writer.push("Undefined"),
        ValueKind::String => writer.push(&quoted(value.as_str().unwrap_or_default())),
        ValueKind::Number if !value.is_integer() => writer.push(&float(f64::try_from(value.clone())?)),
        ValueKind::Seq | ValueKind::Iterable => {
            let tuple = value.is_tuple();
            writer.push(if tuple { "(" } else { "[" })?;
            let mut count = 0;
            for item in value.try_iter()? {
                writer.push(if count > 0 { ", " } else { "" })?;
                repr(writer, &item, depth + 1)?;
                count += 1;
            }
            writer.push(match (tuple, count) {
                (true, 1) => ",)",
                (true, _) => ")",
                _ => "]",
            })
        }
        ValueKind::Map => {
            writer.push("{")?;
            for (i, (key, value)) in pairs(value).enumerate() {
                writer.push(if i > 0 { ", " } else { "" })?;
                repr(writer, &key, depth + 1)?;
                writer.push(": ")?;
                repr(writer, &value, depth + 1)?;
            }
            writer.push("}")
        }
        _ => writer.push(&value.to_string()),
    }
}

/// The entries of a map, in order.
pub(super) fn pairs(value: &Value) -> impl Iterator<Item = (Value, Value)> {
    let object = value.as_object().filter(|object| object.repr() == ObjectRepr::Map).cloned();
    object.and_then(|object| object.try_iter_pairs()).into_iter().flatten()
}

/// Python's `repr` of a float: the shortest digits that give it back, with an exponent from 1e16 on and below 1e-4.
pub(super) fn float(number: f64) -> String {
    if number.is_nan() {
        return "nan".to_owned();
    }
    if number.is_infinite() {
        return if number > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if number != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.unsigned_abs());
    }
    let plain = number.to_string();
    if plain.contains('.') { plain } else { plain + ".0" }
}

/// Python's `repr` of a string.
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::with_capacity(text.len() + 2);
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            // Writing to a string cannot fail.
            c if c.is_control() && u32::from(c) < 0x100 => {
                let _ = write!(out, "\\x{:02x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// What `str.strip` takes away where it is not told what.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

pub(super) fn too_deep() -> Error {
    Error::new(ErrorKind::InvalidOperation, "lists or objects are nested too deep")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_python_writes_them() {
        for (number, text) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.25e-10, "1.25e-10"),
            (f64::NEG_INFINITY, "-inf"),
        ] {
            assert_eq!(float(number), text);
        }
    }

    #[test]
    fn strings_are_quoted_as_python_quotes_them() {
        for (text, quotes) in
            [("a", "'a'"), ("it's", "\"it's\""), ("\"it's\"", "'\"it\\'s\"'"), ("a\n\t\\\x07é", "'a\\n\\t\\\\\\x07é'")]
        {
            assert_eq!(quoted(text), quotes);
        }
    }
}
