//! What transformers adds to Jinja and minijinja does not know, written in what it knows.
//!
//! `{% generation %}` and `{% endgeneration %}` mark what the assistant says. In their place stand two variables, whose values
//! are marks that are cut out of the rendered text again. A loop over nothing (`none`) is an error in Python. And what is kept
//! in a variable is looked at, so that it cannot grow past all bounds.

use minijinja::Value;
use minijinja::value::ValueKind;

use crate::error::{Error, Result};

/// The variables that stand where the assistant's words begin and end, and the function around what a loop goes over.
pub(super) const BEGIN: &str = "_generation_begin";
pub(super) const END: &str = "_generation_end";
pub(super) const EACH: &str = "_each";

/// The function around what a variable is set to.
pub(super) const KEEP: &str = "_keep";

/// Words and signs of one tag at most: the parser's own depth grows with them.
const LONGEST_TAG: usize = 2_000;

/// Branches of a template at most, for the same reason.
const MOST_BRANCHES: usize = 2_000;

/// A template in minijinja's words.
pub(super) struct Rewritten {
    pub(super) text: String,
    /// Whether it marks what the assistant says.
    pub(super) marks: bool,
}

/// Rewrites the tags of a template. Lines stay lines, so that errors name the right one.
pub(super) fn rewrite(name: &str, source: &str) -> Result<Rewritten> {
    let mut out = String::with_capacity(source.len() + 64);
    let (mut at, mut open, mut marks, mut branches) = (0, 0_usize, false, 0_usize);
    let fail = |at: usize, message: &str| Error::Template {
        name: name.to_owned(),
        message: format!("line {}: {message}", source[..at].lines().count().max(1)),
    };
    while let Some(start) = source[at..].find('{').map(|i| at + i) {
        out.push_str(&source[at..start]);
        let rest = &source[start..];
        let len = match rest.as_bytes().get(1) {
            // What is not closed is for the parser to complain of.
            Some(b'#') => rest[2..].find("#}").map_or(rest.len(), |i| i + 4),
            Some(b'{') => end_of(rest, "}}").unwrap_or(rest.len()),
            Some(b'%') => end_of(rest, "%}").unwrap_or(rest.len()),
            _ => 1,
        };
        let whole = &rest[..len];
        at = start + len;
        let is_comment = whole.starts_with("{#");
        if !is_comment && pieces(whole).filter(|(_, piece)| !piece.trim().is_empty()).count() > LONGEST_TAG {
            return Err(fail(start, "an expression longer than any template needs"));
        }
        let Some(tag) = Tag::read(whole) else {
            out.push_str(whole);
            continue;
        };
        branches += usize::from(tag.word == "elif");
        if branches > MOST_BRANCHES {
            return Err(fail(start, "more {% elif %} than any template needs"));
        }
        match tag.word {
            "raw" => {
                out.push_str(whole);
                let raw = end_of_raw(&source[at..]);
                out.push_str(&source[at..at + raw]);
                at += raw;
            }
            "generation" => {
                (open, marks) = (open + 1, true);
                out.push_str(&format!(
                    "{{%{} with _in_generation = 1 %}}{{{{ {BEGIN} }}}}{{% if true {}%}}",
                    tag.left, tag.right
                ));
            }
            "endgeneration" => {
                open =
                    open.checked_sub(1).ok_or_else(|| fail(start, "{% endgeneration %} without {% generation %}"))?;
                out.push_str(&format!("{{%{} endif %}}{{{{ {END} }}}}{{% endwith {}%}}", tag.left, tag.right));
            }
            "for" => match over(tag.rest) {
                Some((before, list, after)) => {
                    out.push_str(&format!("{{%{} for{before} {EACH}({list}){after}{}%}}", tag.left, tag.right));
                }
                None => out.push_str(whole),
            },
            "set" => match assigned(tag.rest) {
                Some((before, value)) => {
                    out.push_str(&format!("{{%{} set{before} {KEEP}({value}) {}%}}", tag.left, tag.right));
                }
                None => out.push_str(whole),
            },
            "macro" => {
                // The last of the tags carries the whitespace control of the right side.
                let parameters = parameters(tag.rest);
                let right = if parameters.is_empty() { tag.right } else { "" };
                out.push_str(&format!("{{%{} macro{}{right}%}}", tag.left, tag.rest));
                for (i, parameter) in parameters.iter().enumerate() {
                    let right = if i + 1 == parameters.len() { tag.right } else { "" };
                    out.push_str(&format!("{{% set {parameter} = {KEEP}({parameter}) {right}%}}"));
                }
            }
            _ => out.push_str(whole),
        }
    }
    if open > 0 {
        return Err(fail(source.len(), "{% generation %} without {% endgeneration %}"));
    }
    out.push_str(&source[at..]);
    Ok(Rewritten { text: out, marks })
}

/// A block tag: its whitespace control, its first word, and what follows.
struct Tag<'a> {
    left: &'a str,
    word: &'a str,
    rest: &'a str,
    right: &'a str,
}

impl<'a> Tag<'a> {
    fn read(whole: &'a str) -> Option<Self> {
        let inner = whole.strip_prefix("{%")?.strip_suffix("%}")?;
        let left = if inner.starts_with(['-', '+']) { 1 } else { 0 };
        let right = usize::from(inner.len() > left && inner.ends_with(['-', '+']));
        let (left, inner) = inner.split_at(left);
        let (inner, right) = inner.split_at(inner.len() - right);
        let begin = inner.trim_start();
        let end = begin.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(begin.len());
        let (word, rest) = begin.split_at(end);
        Some(Self { left, word, rest, right })
    }
}

/// The pieces of an expression: quoted texts whole, words whole, everything else character by character; with where each begins.
fn pieces(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = text.get(at..).filter(|rest| !rest.is_empty())?;
        let first = rest.chars().next()?;
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let len = if first == '"' || first == '\'' {
            let mut escaped = false;
            let close = rest.char_indices().skip(1).find(|(_, c)| {
                let closes = *c == first && !escaped;
                escaped = *c == '\\' && !escaped;
                closes
            });
            close.map_or(rest.len(), |(i, _)| i + 1)
        } else if is_word(first) {
            rest.find(|c| !is_word(c)).unwrap_or(rest.len())
        } else {
            first.len_utf8()
        };
        let start = at;
        at += len;
        Some((start, &rest[..len]))
    })
}

/// Where a tag ends, which begins with two characters and ends with `mark` outside of quotes and brackets.
fn end_of(tag: &str, mark: &str) -> Option<usize> {
    let mut depth = 0_usize;
    for (at, piece) in pieces(&tag[2..]) {
        if depth == 0 && tag[2 + at..].starts_with(mark) {
            return Some(2 + at + mark.len());
        }
        match piece {
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    None
}

/// Bytes up to the end of a raw section, its end tag included.
fn end_of_raw(text: &str) -> usize {
    let mut at = 0;
    while let Some(start) = text[at..].find("{%").map(|i| at + i) {
        let end = text[start..].find("%}").map_or(text.len(), |i| start + i + 2);
        if Tag::read(&text[start..end]).is_some_and(|tag| tag.word == "endraw") {
            return end;
        }
        at = start + 2;
    }
    text.len()
}

/// What stands after `for`: the names with `in`, what is looped over, and what follows it.
fn over(rest: &str) -> Option<(&str, String, &str)> {
    let (mut depth, mut begin, mut end, mut several) = (0_usize, None, rest.len(), false);
    for (at, piece) in pieces(rest) {
        match piece {
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => depth = depth.saturating_sub(1),
            "in" if depth == 0 && begin.is_none() => begin = Some(at + 2),
            "if" | "recursive" if depth == 0 && begin.is_some() => {
                end = at;
                break;
            }
            "," if depth == 0 && begin.is_some() => several = true,
            _ => {}
        }
    }
    let (before, list) = (&rest[..begin?], rest[begin?..end].trim());
    let list = if several { format!("({list})") } else { list.to_owned() };
    Some((before, list, &rest[end..]))
}

/// What stands after `set`, where it is set to a value: the names with `=`, and the value.
fn assigned(rest: &str) -> Option<(&str, String)> {
    let (mut depth, mut begin, mut several) = (0_usize, None, false);
    for (at, piece) in pieces(rest) {
        match piece {
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => depth = depth.saturating_sub(1),
            "=" if depth == 0 && begin.is_none() => begin = Some(at + 1),
            "," if depth == 0 && begin.is_some() => several = true,
            _ => {}
        }
    }
    let value = rest[begin?..].trim();
    Some((&rest[..begin?], if several { format!("({value})") } else { value.to_owned() }))
}

/// Names of a macro's parameters.
fn parameters(rest: &str) -> Vec<&str> {
    let (mut depth, mut next, mut found) = (0_usize, false, Vec::new());
    for (_, piece) in pieces(rest).filter(|(_, piece)| !piece.trim().is_empty()) {
        match piece {
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => depth = depth.saturating_sub(1),
            name if next && name.starts_with(|c: char| c.is_alphabetic() || c == '_') => found.push(name),
            _ => {}
        }
        next = depth == 1 && matches!(piece, "(" | ",");
    }
    found
}

/// Two characters that stand nowhere in `texts`: from the private use area, where nobody should write any.
pub(super) fn marks<'a>(texts: impl Iterator<Item = &'a str> + Clone) -> Option<(char, char)> {
    let free = |c: &char| texts.clone().all(|text| !text.contains(*c));
    let mut candidates = ('\u{10FF00}'..='\u{10FFFD}').filter(free);
    candidates.next().zip(candidates.next())
}

/// What stands between the marks, and the text without them; `None` where they do not come in pairs.
pub(super) fn cut(marked: &str, (begin, end): (char, char)) -> Option<(String, Vec<std::ops::Range<usize>>)> {
    let mut text = String::with_capacity(marked.len());
    let (mut spans, mut open) = (Vec::new(), Vec::new());
    for part in marked.split_inclusive([begin, end]) {
        let stem = part.trim_end_matches([begin, end]);
        text.push_str(stem);
        match part[stem.len()..].chars().next() {
            Some(c) if c == begin => open.push(text.len()),
            Some(_) => {
                let from = open.pop()?;
                // What is marked twice counts once.
                if open.is_empty() {
                    spans.push(from..text.len());
                }
            }
            None => {}
        }
    }
    open.is_empty().then_some((text, spans))
}

/// The texts in a value, names of fields included.
pub(super) fn texts(value: &serde_json::Value, into: &mut Vec<String>) {
    match value {
        serde_json::Value::String(text) => into.push(text.clone()),
        serde_json::Value::Array(items) => items.iter().for_each(|item| texts(item, into)),
        serde_json::Value::Object(fields) => fields.iter().for_each(|(name, value)| {
            into.push(name.clone());
            texts(value, into);
        }),
        _ => {}
    }
}

/// The function around what a loop goes over.
pub(super) fn each(value: &Value) -> std::result::Result<Value, minijinja::Error> {
    if value.is_none() {
        return Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, "a loop over none"));
    }
    Ok(value.clone())
}

/// The function around what a variable is set to: lists that hold a list twice, and that one another twice, or a list in a list
/// in a list, grow past all bounds in a few steps, and whoever walks them never comes back.
pub(super) fn keep(state: &minijinja::State, value: &Value) -> std::result::Result<Value, minijinja::Error> {
    // A view of a view of a view is as deep as lists in lists.
    if value.kind() == ValueKind::Iterable {
        let items: Vec<Value> = value
            .try_iter()?
            .map(|item| state.consume_fuel(1).map(|()| item))
            .collect::<std::result::Result<_, _>>()?;
        items.iter().try_for_each(|item| walk(state, item, 1))?;
        return Ok(items.into());
    }
    walk(state, value, 0)?;
    Ok(value.clone())
}

/// Pays for each item within a value.
fn walk(state: &minijinja::State, value: &Value, depth: usize) -> std::result::Result<(), minijinja::Error> {
    /// JSON is read to 128 levels.
    const DEEPEST: usize = 200;
    /// Items that one fuel pays for.
    const ITEMS: usize = 16;
    if !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::Map) {
        return Ok(());
    }
    if depth > DEEPEST {
        return Err(super::python::too_deep());
    }
    let map = value.kind() == ValueKind::Map;
    for (i, item) in value.try_iter()?.enumerate() {
        if i % ITEMS == 0 {
            state.consume_fuel(1)?;
        }
        let item = if map { value.get_item(&item)? } else { item };
        walk(state, &item, depth + 1)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_found_outside_of_comments_quotes_and_raw_sections() {
        let source = "{# {% generation %} #}{{ '{% generation %}' }}{% raw %}{% generation %}{% endraw %}{% if '%}' == {'a': {}} %}{% endif %}";
        let rewritten = rewrite("t", source).unwrap();
        assert_eq!(rewritten.text, source);
        assert!(!rewritten.marks);
    }

    #[test]
    fn a_generation_tag_keeps_its_whitespace_control() {
        let rewritten = rewrite("t", "a {%- generation +%} b {%+ endgeneration -%} c").unwrap();
        let expected = "a {%- with _in_generation = 1 %}{{ _generation_begin }}{% if true +%} b \
                        {%+ endif %}{{ _generation_end }}{% endwith -%} c";
        assert_eq!(rewritten.text, expected);
        assert!(rewritten.marks);
        for (source, word) in [("a\n{% generation %}", "without {% endgeneration"), ("\n{% endgeneration %}", "line 1")]
        {
            assert!(rewrite("t", source).err().unwrap().to_string().contains(word));
        }
    }

    #[test]
    fn what_a_loop_goes_over_is_found() {
        for (source, expected) in [
            ("{% for a in b %}", "{% for a in _each(b) %}"),
            (
                "{%- for a, b in c.items() if a in d recursive -%}",
                "{%- for a, b in _each(c.items())if a in d recursive -%}",
            ),
            ("{% for a in (b if c else d) %}", "{% for a in _each((b if c else d)) %}"),
            ("{% for a in 1, ' if ' %}", "{% for a in _each((1, ' if ')) %}"),
        ] {
            let text = rewrite("t", source).unwrap().text;
            assert_eq!(text.replace(' ', ""), expected.replace(' ', ""), "{source}");
        }
    }

    #[test]
    fn what_is_kept_is_looked_at() {
        for (source, expected) in [
            ("{%- set a.b = c == d -%}", "{%- set a.b = _keep(c == d) -%}"),
            ("{% set a, b = 1, 2 %}", "{% set a, b = _keep((1, 2)) %}"),
            ("{% set a | upper %}", "{% set a | upper %}"),
            ("{% macro f(a, b='x, y') -%}", "{% macro f(a, b='x, y') %}{% set a = _keep(a) %}{% set b = _keep(b) -%}"),
            ("{% macro f() -%}", "{% macro f() -%}"),
        ] {
            assert_eq!(rewrite("t", source).unwrap().text, expected);
        }
    }

    #[test]
    fn marks_are_cut_out() {
        let (text, spans) = cut("a<é><b<c>d>", ('<', '>')).unwrap();
        assert_eq!((text.as_str(), spans), ("aébcd", vec![1..3, 3..6]));
        assert!(cut("a>b<", ('<', '>')).is_none());
        assert_eq!(marks(["\u{10FF00}", "x"].into_iter()), Some(('\u{10FF01}', '\u{10FF02}')));
    }
}
