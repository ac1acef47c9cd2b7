//! Names that come from a file or a peer: which may be used as a path, and how they are shown.

use std::borrow::Cow;
use std::fmt::Write;

/// Whether `name` is the name of one entry of a folder, on any system: no separator, no `.` or `..`, no drive, no control
/// character, and neither empty nor longer than file systems take.
pub fn is_plain_name(name: &str) -> bool {
    const LONGEST: usize = 255;
    !name.is_empty()
        && name.len() <= LONGEST
        && name != "."
        && name != ".."
        && !name.contains(['/', '\\', ':'])
        && !name.chars().any(is_unprintable)
}

/// Text from elsewhere as a line of a message shows it: control characters, line breaks among them, and those that turn the
/// direction of writing are escaped, so that it can neither steer a terminal nor forge a line.
pub fn printable(text: &str) -> Cow<'_, str> {
    escape(text, is_unprintable)
}

/// As [`printable`], for text of several lines: line breaks and tabs stay.
pub fn printable_lines(text: &str) -> Cow<'_, str> {
    escape(text, |c| is_unprintable(c) && c != '\n' && c != '\t')
}

fn escape(text: &str, is_escaped: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&is_escaped) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            '\n' if is_escaped(c) => out.push_str("\\n"),
            '\r' if is_escaped(c) => out.push_str("\\r"),
            '\t' if is_escaped(c) => out.push_str("\\t"),
            c if is_escaped(c) && u32::from(c) < 0x100 => {
                // Writing to a string cannot fail.
                let _ = write!(out, "\\x{:02x}", u32::from(c));
            }
            c if is_escaped(c) => {
                let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    Cow::Owned(out)
}

/// Control characters, line and paragraph separators, and marks that turn the direction of writing.
fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{2028}' | '\u{2029}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_entry_of_a_folder() {
        for name in ["config.json", "model-00001-of-00002.safetensors", "ü", ".hidden", "a b", "..."] {
            assert!(is_plain_name(name), "{name}");
        }
        let long = "x".repeat(256);
        for name in
            ["", ".", "..", "/", "a/b", "../a", "/etc/hostname", "a\\b", "C:a", "a\0", "a\n", "\u{1b}[2J", &long]
        {
            assert!(!is_plain_name(name), "{name:?}");
        }
    }

    #[test]
    fn what_could_steer_a_terminal_is_escaped() {
        assert_eq!(printable("a\u{1b}[31mb\nOK"), "a\\x1b[31mb\\nOK");
        assert_eq!(printable("\u{9b}1m\u{202e}abc"), "\\x9b1m\\u{202e}abc");
        assert_eq!(printable_lines("a\tb\nc\r\u{7}"), "a\tb\nc\\r\\x07");
        assert!(matches!(printable("grün ▁x"), Cow::Borrowed("grün ▁x")));
    }
}
