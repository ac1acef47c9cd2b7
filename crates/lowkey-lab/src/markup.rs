//! Text from an experiment file as tables take it: a name is shown, and neither read as markup nor as a formula.

use lowkey_files::printable;

/// In a line or a cell of Markdown.
pub(crate) fn markdown(text: &str) -> String {
    let text = printable(text);
    let mut out = String::with_capacity(text.len());
    let chars: Vec<char> = text.chars().collect();
    let is_word = |i: Option<usize>| i.and_then(|i| chars.get(i)).is_some_and(|c| c.is_alphanumeric());
    for (i, c) in chars.iter().enumerate() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\\' | '`' | '*' | '[' | ']' | '|' | '~' => out.extend(['\\', *c]),
            // Within a word it is no emphasis, as in most keys.
            '_' if !(is_word(i.checked_sub(1)) && is_word(Some(i + 1))) => out.extend(['\\', '_']),
            // What would begin a heading or a list.
            '#' | '-' | '+' | '=' if i == 0 => out.extend(['\\', *c]),
            '.' | ')' if i > 0 && chars[..i].iter().all(char::is_ascii_digit) => out.extend(['\\', *c]),
            c => out.push(*c),
        }
    }
    out
}

/// Between backticks in Markdown: JSON, in which a backtick may be written as its number.
pub(crate) fn json_in_backticks(json: &str) -> String {
    printable(json).replace('`', "\\u0060")
}

/// A cell of a CSV file (RFC 4180). A program for tables takes text that begins like a formula for one; an apostrophe before it
/// makes it text, as such programs have it.
pub(crate) fn csv(text: &str) -> String {
    let is_formula = text.starts_with(['=', '+', '-', '@', '\t', '\r']) && text.parse::<f64>().is_err();
    let text = if is_formula { format!("'{text}") } else { text.to_string() };
    if text.contains([',', '"', '\n', '\r']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_shown_and_not_read_as_markup() {
        for (text, shown) in [
            ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
            ("kv_lora_rank-4", "kv_lora_rank-4"),
            ("_a_ *b* [c](d) | `e`", "\\_a\\_ \\*b\\* \\[c\\](d) \\| \\`e\\`"),
            ("# one", "\\# one"),
            ("- two", "\\- two"),
            ("12. three", "12\\. three"),
            ("a + b modulo 31. Is it - so?", "a + b modulo 31. Is it - so?"),
            ("two\nlines", "two\\\\nlines"),
            ("&amp;", "&amp;amp;"),
        ] {
            assert_eq!(markdown(text), shown);
        }
        assert_eq!(json_in_backticks("{\"name\":\"a`b\"}"), "{\"name\":\"a\\u0060b\"}");
    }

    #[test]
    fn a_cell_that_begins_like_a_formula_is_text() {
        for (text, cell) in [
            ("=HYPERLINK(1)", "'=HYPERLINK(1)"),
            ("+a", "'+a"),
            ("-x", "'-x"),
            ("@SUM(A1,A2)", "\"'@SUM(A1,A2)\""),
            ("-0.5", "-0.5"),
            ("+3", "+3"),
            ("a, \"b\"", "\"a, \"\"b\"\"\""),
            ("mha", "mha"),
        ] {
            assert_eq!(csv(text), cell);
        }
    }
}
