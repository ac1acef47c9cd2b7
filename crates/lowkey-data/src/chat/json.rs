//! JSON as Python's `json.dumps` writes it: models were trained on its blanks.

use std::fmt::Write as _;

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, State, Value};

use super::python::{self, Writer, pairs, too_deep};

/// Levels of lists in lists that are written. Python gives up after about a thousand.
const DEEPEST: usize = 200;

/// How the filter `tojson` was asked to write.
struct Style {
    ascii: bool,
    /// What one level is indented by, where each item has a line of its own.
    indent: Option<String>,
    item: String,
    key: String,
    sorted: bool,
}

/// The filter `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)` of transformers.
pub(super) fn tojson(state: &mut State, value: &Value, arguments: &[Value]) -> Result<Value, Error> {
    let [ascii, indent, separators, sorted] =
        super::methods::arguments(arguments, ["ensure_ascii", "indent", "separators", "sort_keys"])?;
    let indent = match indent.filter(|indent| !indent.is_none()) {
        None => None,
        Some(indent) => Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(usize::try_from(i64::try_from(indent)?.clamp(0, 64)).unwrap_or_default()),
        }),
    };
    let (mut item, mut key) = (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned());
    if let Some(separators) = separators.filter(|separators| !separators.is_none()) {
        let given: Vec<Value> = separators.try_iter()?.take(3).collect();
        let [Some(first), Some(second)] = [0, 1].map(|i| given.get(i).and_then(Value::as_str)) else {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators must be two texts"));
        };
        (item, key) = (first.to_owned(), second.to_owned());
    }
    let truth = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let style = Style { ascii: truth(ascii), indent, item, key, sorted: truth(sorted) };
    let mut writer = Writer::new(state);
    write(&mut writer, &style, value, 0)?;
    Ok(Value::from(writer.out))
}

fn write(writer: &mut Writer, style: &Style, value: &Value, depth: usize) -> Result<(), Error> {
    if depth > DEEPEST {
        return Err(too_deep());
    }
    match value.kind() {
        ValueKind::None => writer.push("null"),
        ValueKind::Bool => writer.push(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number if value.is_integer() => writer.push(&value.to_string()),
        ValueKind::Number => writer.push(&number(f64::try_from(value.clone())?)),
        ValueKind::String => string(writer, style, value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable => {
            let mut count = 0;
            writer.push("[")?;
            for item in value.try_iter()? {
                separate(writer, style, count, depth + 1)?;
                write(writer, style, &item, depth + 1)?;
                count += 1;
            }
            close(writer, style, count, depth, "]")
        }
        ValueKind::Map => {
            let mut entries = Vec::new();
            for (name, value) in pairs(value) {
                entries.push((key(&name)?, value));
            }
            if style.sorted {
                entries.sort_by(|a, b| a.0.cmp(&b.0));
            }
            writer.push("{")?;
            for (count, (name, value)) in entries.iter().enumerate() {
                separate(writer, style, count, depth + 1)?;
                string(writer, style, name)?;
                writer.push(&style.key)?;
                write(writer, style, value, depth + 1)?;
            }
            close(writer, style, entries.len(), depth, "}")
        }
        ValueKind::Undefined => Err(no_json("what is undefined")),
        _ => Err(no_json("a function")),
    }
}

fn no_json(what: &str) -> Error {
    Error::new(ErrorKind::BadSerialization, format!("tojson: {what} cannot be written as JSON"))
}

fn separate(writer: &mut Writer, style: &Style, before: usize, depth: usize) -> Result<(), Error> {
    if before > 0 {
        writer.push(&style.item)?;
    }
    line(writer, style, depth)
}

fn line(writer: &mut Writer, style: &Style, depth: usize) -> Result<(), Error> {
    let Some(indent) = &style.indent else { return Ok(()) };
    writer.push("\n")?;
    (0..depth).try_for_each(|_| writer.push(indent))
}

fn close(writer: &mut Writer, style: &Style, count: usize, depth: usize, end: &str) -> Result<(), Error> {
    if count > 0 {
        line(writer, style, depth)?;
    }
    writer.push(end)
}

fn number(number: f64) -> String {
    if number.is_nan() {
        "NaN".to_owned()
    } else if number.is_infinite() {
        if number > 0.0 { "Infinity" } else { "-Infinity" }.to_owned()
    } else {
        python::float(number)
    }
}

/// Keys are texts; Python makes texts of numbers, truths and nothing.
fn key(name: &Value) -> Result<String, Error> {
    match name.kind() {
        ValueKind::String => Ok(name.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(if name.is_true() { "true" } else { "false" }.to_owned()),
        ValueKind::Number if name.is_integer() => Ok(name.to_string()),
        ValueKind::Number => Ok(number(f64::try_from(name.clone())?)),
        _ => Err(no_json("a list or an object as a key")),
    }
}

fn string(writer: &mut Writer, style: &Style, text: &str) -> Result<(), Error> {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\x08' => out.push_str("\\b"),
            '\x0c' => out.push_str("\\f"),
            c if u32::from(c) < 0x20 || (style.ascii && !c.is_ascii()) => {
                let mut units = [0; 2];
                for unit in c.encode_utf16(&mut units) {
                    // Writing to a string cannot fail.
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
    writer.push(&out)
}
