//! Jinja as transformers sets it up, on minijinja.

use std::fmt;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State, Value, filters};

use super::time::DateTime;
use super::{json, methods, python, tags};

/// The variable that holds the present.
pub(super) const NOW: &str = "_now";

/// What a template says where it refuses a conversation.
#[derive(Debug)]
pub(super) struct Refusal(pub(super) String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

/// An environment without templates.
pub(super) fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_formatter(|out, state, value| Ok(out.write_str(&python::text(state, value)?)?));
    environment.set_unknown_method_callback(methods::call);
    environment.remove_global("debug");
    environment.add_function(tags::EACH, tags::each);
    environment.add_function(tags::KEEP, tags::keep);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    set_filters(&mut environment);
    set_tests(&mut environment);
    Ok(environment)
}

fn raise_exception(message: &Value) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "refused").with_source(Refusal(message.to_string())))
}

fn strftime_now(state: &State, format: &str) -> Result<String, Error> {
    state.consume_fuel(format.len() as u64)?;
    let now = state.lookup(NOW).and_then(|now| now.as_str()?.parse::<DateTime>().ok());
    let now =
        now.ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "strftime_now: the template hides the present"))?;
    Ok(now.strftime(format))
}

fn set_filters(environment: &mut Environment<'static>) {
    environment.add_filter("tojson", |state: &mut State, value: &Value, rest: Rest<ValueOrKwargs>| {
        json::tojson(state, value, &values(rest))
    });
    environment.add_filter("string", |state: &mut State, value: &Value| python::text(state, value));
    environment.add_filter("trim", |state: &mut State, value: &Value, chars: Option<&str>| -> Result<Value, Error> {
        let text = python::text(state, value)?;
        Ok(match chars {
            Some(chars) => text.trim_matches(|c| chars.contains(c)),
            None => text.trim_matches(python::is_space),
        }
        .into())
    });
    // What is no number is the default in Jinja, and an error in minijinja.
    for (name, default) in [("int", Value::from(0)), ("float", Value::from(0.0))] {
        let filter =
            if name == "int" { Value::from_function(filters::int) } else { Value::from_function(filters::float) };
        environment.add_filter(name, move |state: &mut State, value: &Value, rest: Rest<ValueOrKwargs>| {
            let [given] = methods::arguments(&values(rest), ["default"])?;
            let number = filter.call(state, std::slice::from_ref(value));
            number.or_else(|_| Ok::<_, Error>(given.unwrap_or_else(|| default.clone())))
        });
    }
    environment.add_filter("indent", indent);
    environment.add_filter("join", join);
    for name in ["e", "escape", "forceescape"] {
        environment.add_filter(name, |state: &mut State, value: &Value| -> Result<String, Error> {
            let text = python::text(state, value)?;
            // Five characters for one at most.
            state.consume_fuel(text.len() as u64 / 16)?;
            let escaped = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
            Ok(escaped.replace('\'', "&#39;").replace('"', "&#34;"))
        });
    }
}

/// Arguments that may have names.
fn values(rest: Rest<ValueOrKwargs>) -> Vec<Value> {
    rest.0.into_iter().map(ValueOrKwargs::into_value).collect()
}

/// `indent(width=4, first=False, blank=False)`.
fn indent(state: &mut State, value: &Value, rest: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let [width, first, blank] = methods::arguments(&values(rest), ["width", "first", "blank"])?;
    let truth = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let (first, blank) = (truth(first), truth(blank));
    let text = python::text(state, value)?;
    let count = text.matches('\n').count() as u64 + 1;
    let indentation = match &width {
        None => " ".repeat(4),
        Some(width) if width.as_str().is_some() => width.as_str().unwrap_or_default().to_owned(),
        Some(width) => {
            let width = usize::try_from(i64::try_from(width.clone())?).unwrap_or_default();
            state.consume_fuel(width as u64 / 64)?;
            " ".repeat(width)
        }
    };
    state.consume_fuel(count.saturating_mul(indentation.len() as u64) / 64)?;
    let mut out = if first { indentation.clone() } else { String::new() };
    // A last line that is empty is a line, too.
    for (i, (line, _)) in methods::lines(&(text.clone() + "\n")).enumerate() {
        let line = text.get(line).unwrap_or_default();
        if i > 0 {
            out.push('\n');
            out.push_str(if blank || !line.is_empty() { &indentation } else { "" });
        }
        out.push_str(line);
    }
    Ok(out)
}

/// `join(d='', attribute=None)`.
fn join(state: &mut State, value: &Value, rest: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let [between, attribute] = methods::arguments(&values(rest), ["d", "attribute"])?;
    let between = between.map(|between| python::text(state, &between)).transpose()?.unwrap_or_default();
    let items = tags::each(value)?;
    let items = match attribute.filter(|attribute| !attribute.is_none()) {
        None => items,
        Some(attribute) => state.apply_filter("map", &[items, Kwargs::from_iter([("attribute", attribute)]).into()])?,
    };
    let mut out = String::new();
    for (i, item) in items.try_iter()?.enumerate() {
        let item = python::text(state, &item)?;
        state.consume_fuel(1 + (between.len() + item.len()) as u64 / 64)?;
        out.push_str(if i > 0 { &between } else { "" });
        out.push_str(&item);
    }
    Ok(out)
}

/// Jinja's tests where it and minijinja differ.
fn set_tests(environment: &mut Environment<'static>) {
    let is_list = |value: &Value| matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable);
    environment.add_test("sequence", move |value: &Value| {
        is_list(value) || matches!(value.kind(), ValueKind::String | ValueKind::Map | ValueKind::Undefined)
    });
    environment.add_test("iterable", move |value: &Value| {
        is_list(value) || matches!(value.kind(), ValueKind::String | ValueKind::Map | ValueKind::Undefined)
    });
    environment.add_test("number", |value: &Value| matches!(value.kind(), ValueKind::Number | ValueKind::Bool));
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
}
