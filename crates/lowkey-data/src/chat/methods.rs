//! Methods of Python's strings, dictionaries and lists that templates call. None of them changes what it is called on.

use minijinja::formatting::{self, FormatStyle};
use minijinja::value::{Kwargs, Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};

use super::python::{is_space, pairs};

/// Called for each method that minijinja itself does not know.
pub(super) fn call(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::String => {
            let subject = value.as_str().unwrap_or_default();
            // minijinja charges for what comes out, not for the search.
            state.consume_fuel(1 + subject.len() as u64 / 64)?;
            of_string(state, subject, method, args)
        }
        ValueKind::Map => of_map(value, method, args),
        ValueKind::Seq | ValueKind::Iterable => of_list(value, method, args),
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

/// Arguments by their place or their name; `None` for what is not given.
pub(super) fn arguments<const N: usize>(args: &[Value], names: [&str; N]) -> Result<[Option<Value>; N], Error> {
    let (positional, keywords): (&[Value], Kwargs) = from_args(args)?;
    if positional.len() > N {
        return Err(ErrorKind::TooManyArguments.into());
    }
    let mut found = [const { None }; N];
    for (i, name) in names.iter().enumerate() {
        let by_name: Option<Value> = if keywords.has(name) { Some(keywords.get(name)?) } else { None };
        if by_name.is_some() && i < positional.len() {
            return Err(wrong(format!("{name} is given twice")));
        }
        found[i] = positional.get(i).cloned().or(by_name);
    }
    keywords.assert_all_used()?;
    Ok(found)
}

fn wrong(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// The text of an argument that must be there.
fn word<'a>(argument: &'a Option<Value>, method: &str) -> Result<&'a str, Error> {
    argument.as_ref().and_then(Value::as_str).ok_or_else(|| wrong(format!("{method} needs a text")))
}

/// The number of an argument that may be absent or none.
fn number(argument: Option<Value>) -> Result<Option<i64>, Error> {
    argument.filter(|value| !value.is_none()).map(i64::try_from).transpose()
}

/// One text, or any of several.
fn any(argument: &Option<Value>, method: &str, is: impl Fn(&str) -> bool) -> Result<bool, Error> {
    let argument = argument.as_ref().ok_or_else(|| Error::from(ErrorKind::MissingArgument))?;
    if let Some(text) = argument.as_str() {
        return Ok(is(text));
    }
    if !argument.is_tuple() {
        return Err(wrong(format!("{method} needs a text or a tuple of texts")));
    }
    for one in argument.try_iter()? {
        if is(one.as_str().ok_or_else(|| wrong(format!("{method} needs a tuple of texts")))?) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The text from one character to another, either of which may count from the end, and how many characters come before it.
fn part(subject: &str, start: Option<Value>, end: Option<Value>) -> Result<(&str, usize), Error> {
    let (start, end) = (number(start)?, number(end)?);
    if start.is_none() && end.is_none() {
        return Ok((subject, 0));
    }
    let len = subject.chars().count() as i64;
    let place = |at: i64| if at < 0 { (len + at).max(0) } else { at.min(len) } as usize;
    let (start, end) = (place(start.unwrap_or(0)), place(end.unwrap_or(len)));
    let byte = |at: usize| subject.char_indices().nth(at).map_or(subject.len(), |(byte, _)| byte);
    if start > end { Ok(("", start)) } else { Ok((&subject[byte(start)..byte(end)], start)) }
}

fn of_string(state: &mut State, subject: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let none = || arguments(args, []).map(|[]: [Option<Value>; 0]| ());
    // Whether there is a letter (or what else is asked for) and none of another kind.
    let all = |is: fn(char) -> bool| !subject.is_empty() && subject.chars().all(is);
    let cased = |is: fn(char) -> bool, isnt: fn(char) -> bool| subject.chars().any(is) && !subject.chars().any(isnt);
    Ok(match method {
        "strip" | "lstrip" | "rstrip" => {
            let [chars] = arguments(args, ["chars"])?;
            let chars = chars.filter(|chars| !chars.is_none());
            let set: Option<Vec<char>> = match &chars {
                None => None,
                Some(chars) => Some(chars.as_str().ok_or_else(|| wrong("strip needs a text"))?.chars().collect()),
            };
            let away = |c: char| set.as_ref().map_or_else(|| is_space(c), |set| set.contains(&c));
            let rest = if method == "rstrip" { subject } else { subject.trim_start_matches(away) };
            if method == "lstrip" { rest } else { rest.trim_end_matches(away) }.into()
        }
        "split" | "rsplit" => {
            let [mark, most] = arguments(args, ["sep", "maxsplit"])?;
            let most = number(most)?.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
            match mark.filter(|mark| !mark.is_none()) {
                None => split_at_space(subject, most, method == "rsplit").into_iter().map(Value::from).collect(),
                Some(mark) => {
                    let mark = mark
                        .as_str()
                        .filter(|mark| !mark.is_empty())
                        .ok_or_else(|| wrong("split needs a text that is not empty"))?;
                    let parts = most.saturating_add(1);
                    if method == "split" {
                        subject.splitn(parts, mark).map(Value::from).collect()
                    } else {
                        let mut found: Vec<&str> = subject.rsplitn(parts, mark).collect();
                        found.reverse();
                        found.into_iter().map(Value::from).collect()
                    }
                }
            }
        }
        "partition" | "rpartition" => {
            let [mark] = arguments(args, ["sep"])?;
            let mark = word(&mark, method)?;
            let three = |a: &str, b: &str, c: &str| Value::from(Tuple::from([a, b, c].map(Value::from)));
            match if method == "partition" { subject.split_once(mark) } else { subject.rsplit_once(mark) } {
                Some((before, after)) => three(before, mark, after),
                None if method == "partition" => three(subject, "", ""),
                None => three("", "", subject),
            }
        }
        "splitlines" => {
            let [keep] = arguments(args, ["keepends"])?;
            let keep = keep.is_some_and(|keep| keep.is_true());
            lines(subject)
                .map(|(line, end)| Value::from(if keep { &subject[line.start..end] } else { &subject[line] }))
                .collect()
        }
        "replace" => {
            let [old, new, count] = arguments(args, ["old", "new", "count"])?;
            let (old, new) = (word(&old, method)?, word(&new, method)?);
            let count = number(count)?.and_then(|count| usize::try_from(count).ok()).unwrap_or(usize::MAX);
            // The engine sees how large the result is when it is there.
            let found = subject.matches(old).take(count).count() as u64;
            state.consume_fuel(found.saturating_mul(new.len() as u64) / 64)?;
            subject.replacen(old, new, count).into()
        }
        "startswith" | "endswith" => {
            let [what, start, end] = arguments(args, ["prefix", "start", "end"])?;
            let (within, _) = part(subject, start, end)?;
            let is =
                |text: &str| if method == "startswith" { within.starts_with(text) } else { within.ends_with(text) };
            any(&what, method, is)?.into()
        }
        "find" | "rfind" | "index" | "rindex" => {
            let [what, start, end] = arguments(args, ["sub", "start", "end"])?;
            let (within, before) = part(subject, start, end)?;
            let what = word(&what, method)?;
            let found = if method.starts_with('r') { within.rfind(what) } else { within.find(what) };
            match found {
                Some(byte) => (before + within[..byte].chars().count()).into(),
                None if method.ends_with("find") => (-1).into(),
                None => return Err(wrong("substring not found")),
            }
        }
        "count" => {
            let [what, start, end] = arguments(args, ["sub", "start", "end"])?;
            part(subject, start, end)?.0.matches(word(&what, method)?).count().into()
        }
        "join" => {
            let [items] = arguments(args, ["iterable"])?;
            let items = items.filter(|items| !items.is_none()).ok_or_else(|| wrong("join needs a list"))?;
            let mut out = String::new();
            for (i, item) in items.try_iter()?.enumerate() {
                let item = item.as_str().map(str::to_owned).ok_or_else(|| wrong("join needs a list of texts"))?;
                state.consume_fuel(1 + (subject.len() + item.len()) as u64 / 64)?;
                out.push_str(if i > 0 { subject } else { "" });
                out.push_str(&item);
            }
            out.into()
        }
        "removeprefix" | "removesuffix" => {
            let [what] = arguments(args, ["prefix"])?;
            let what = word(&what, method)?;
            let cut = if method == "removeprefix" { subject.strip_prefix(what) } else { subject.strip_suffix(what) };
            cut.unwrap_or(subject).into()
        }
        "zfill" | "ljust" | "rjust" | "center" => {
            let [width, fill] = arguments(args, ["width", "fillchar"])?;
            let width = usize::try_from(number(width)?.unwrap_or(0)).unwrap_or(0);
            let fill = fill.as_ref().and_then(Value::as_str).unwrap_or(if method == "zfill" { "0" } else { " " });
            let missing = width.saturating_sub(subject.chars().count());
            state.consume_fuel((missing as u64).saturating_mul(fill.len() as u64) / 64)?;
            let left = match method {
                "ljust" => 0,
                // As Python shares an odd one.
                "center" => missing / 2 + (missing & width & 1),
                _ => missing,
            };
            let (sign, rest) = match subject.strip_prefix(['+', '-']) {
                Some(rest) if method == "zfill" => (&subject[..1], rest),
                _ => ("", subject),
            };
            [sign, &fill.repeat(left), rest, &fill.repeat(missing - left)].concat().into()
        }
        "format" => {
            // A width is room that the engine sees when it is taken.
            let fields = subject.split('{').skip(1).map(|rest| rest.split('}').next().unwrap_or_default());
            let wide = |field: &str| field.split(|c: char| !c.is_ascii_digit()).any(|digits| digits.len() > 4);
            if fields.clone().any(wide) || fields.clone().any(|field| field.ends_with(':')) && subject.contains(":{") {
                return Err(wrong("format: such a width is not known"));
            }
            formatting::format(FormatStyle::StrFormat, subject, args)?.into()
        }
        "upper" => none().map(|()| subject.to_uppercase().into())?,
        "lower" | "casefold" => none().map(|()| subject.to_lowercase().into())?,
        "capitalize" => {
            none()?;
            let mut chars = subject.chars();
            let first: String = chars.next().into_iter().flat_map(char::to_uppercase).collect();
            (first + &chars.as_str().to_lowercase()).into()
        }
        "title" => {
            none()?;
            let mut out = String::with_capacity(subject.len());
            let mut inside = false;
            for c in subject.chars() {
                if inside {
                    out.extend(c.to_lowercase());
                } else {
                    out.extend(c.to_uppercase());
                }
                inside = c.is_alphabetic();
            }
            out.into()
        }
        "isspace" => none().map(|()| all(is_space).into())?,
        "isdigit" | "isnumeric" | "isdecimal" => none().map(|()| all(char::is_numeric).into())?,
        "isalpha" => none().map(|()| all(char::is_alphabetic).into())?,
        "isalnum" => none().map(|()| all(char::is_alphanumeric).into())?,
        "isascii" => none().map(|()| subject.is_ascii().into())?,
        "islower" => none().map(|()| cased(char::is_lowercase, char::is_uppercase).into())?,
        "isupper" => none().map(|()| cased(char::is_uppercase, char::is_lowercase).into())?,
        _ => return Err(Error::new(ErrorKind::UnknownMethod, format!("a text has no method {method}"))),
    })
}

/// Python's `split` without a mark: words, with what is left where there are more than `most` marks.
fn split_at_space(subject: &str, most: usize, from_end: bool) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = if from_end { subject.trim_end_matches(is_space) } else { subject.trim_start_matches(is_space) };
    while !rest.is_empty() {
        let at = if from_end { rest.rfind(is_space) } else { rest.find(is_space) };
        let Some(at) = at.filter(|_| found.len() < most) else {
            found.push(if from_end { rest.trim_start_matches(is_space) } else { rest.trim_end_matches(is_space) });
            break;
        };
        let width = rest[at..].chars().next().map_or(1, char::len_utf8);
        if from_end {
            found.push(&rest[at + width..]);
            rest = rest[..at].trim_end_matches(is_space);
        } else {
            found.push(&rest[..at]);
            rest = rest[at + width..].trim_start_matches(is_space);
        }
    }
    if from_end {
        found.reverse();
    }
    found
}

/// Lines without what ends them, and where the next begins. Python breaks lines at more than line feeds.
pub(super) fn lines(text: &str) -> impl Iterator<Item = (std::ops::Range<usize>, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = text.get(at..).filter(|rest| !rest.is_empty())?;
        let breaks =
            |c: char| matches!(c, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}');
        let start = at;
        let end = rest.find(breaks).map_or(text.len(), |byte| start + byte);
        let width = match text[end..].chars().next() {
            Some('\r') if text[end..].starts_with("\r\n") => 2,
            Some(c) => c.len_utf8(),
            None => 0,
        };
        at = end + width;
        Some((start..end, at))
    })
}

fn of_map(value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    if method == "get" {
        let [key, default] = arguments(args, ["key", "default"])?;
        let key = key.ok_or_else(|| Error::from(ErrorKind::MissingArgument))?;
        let found = value.as_object().and_then(|object| object.get_value(&key));
        return Ok(found.or(default).unwrap_or_else(|| ().into()));
    }
    if !["keys", "values", "items", "copy"].contains(&method) {
        // minijinja then looks for a function under this name.
        return Err(unknown(value, method, &["clear", "pop", "popitem", "setdefault", "update"], "an object"));
    }
    let []: [Option<Value>; 0] = arguments(args, [])?;
    Ok(match method {
        "keys" => pairs(value).map(|(key, _)| key).collect(),
        "values" => pairs(value).map(|(_, value)| value).collect(),
        "items" => pairs(value).map(|(key, value)| Value::from(Tuple::from([key, value]))).collect(),
        _ => value.clone(),
    })
}

fn of_list(value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    match method {
        "count" | "index" => {
            let [what] = arguments(args, ["value"])?;
            let what = what.ok_or_else(|| Error::from(ErrorKind::MissingArgument))?;
            let mut items = value.try_iter()?;
            if method == "count" {
                return Ok(items.filter(|item| *item == what).count().into());
            }
            items.position(|item| item == what).map(Value::from).ok_or_else(|| wrong("the list does not hold it"))
        }
        "copy" => Ok(value.clone()),
        _ => {
            let changing = ["append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"];
            Err(unknown(value, method, &changing, "a list"))
        }
    }
}

fn unknown(value: &Value, method: &str, changing: &[&str], what: &str) -> Error {
    let held = value.as_object().and_then(|object| object.get_value(&method.into())).is_some();
    if changing.contains(&method) && !held {
        return wrong(format!("a template may not change {what}: {method}"));
    }
    Error::new(ErrorKind::UnknownMethod, format!("{what} has no method {method}"))
}
