//! What of a source file is compiled into the product: all but what stands behind `#[cfg(test)]`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A source file.
pub(super) struct Source {
    pub(super) path: PathBuf,
    /// Its text without comments, and without the items behind `#[cfg(test)]`; line for line.
    pub(super) code: String,
    /// How many lines it has outside those items, comments included.
    pub(super) lines: usize,
}

impl Source {
    /// The crate that it belongs to.
    pub(super) fn package(&self) -> String {
        let parts: Vec<_> = self.path.components().map(|part| part.as_os_str().to_string_lossy()).collect();
        let crates = parts.iter().rposition(|part| part == "crates");
        crates.and_then(|at| parts.get(at + 1)).map(|part| part.to_string()).unwrap_or_default()
    }
}

/// Every file of the product below `crates`: neither those of test folders, nor those that a `mod` behind `#[cfg(test)]` names.
pub(super) fn sources(crates: &Path) -> Vec<Source> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    let mut paths = Vec::new();
    for package in std::fs::read_dir(crates).unwrap() {
        walk(&package.unwrap().path().join("src"), &mut paths);
    }
    let texts: Vec<(PathBuf, String)> =
        paths.into_iter().map(|path| (path.clone(), std::fs::read_to_string(path).unwrap())).collect();
    let tests: BTreeSet<PathBuf> = texts.iter().flat_map(|(path, text)| test_modules(path, text)).collect();
    let of_tests = |path: &Path| {
        let stem = path.with_extension("");
        stem.ancestors().any(|at| tests.contains(at))
    };
    texts
        .into_iter()
        .filter(|(path, _)| !of_tests(path))
        .map(|(path, text)| {
            let (code, lines) = product(&text);
            Source { path, code, lines }
        })
        .collect()
}

/// Where the modules of a file lie that are behind `#[cfg(test)]`, without an ending.
fn test_modules(path: &Path, text: &str) -> Vec<PathBuf> {
    let is_root = path.file_name().is_some_and(|name| ["lib.rs", "main.rs", "mod.rs"].iter().any(|root| name == *root));
    let below = if is_root { path.parent().unwrap().to_path_buf() } else { path.with_extension("") };
    let blank = blanked(text);
    items(&blank)
        .into_iter()
        .filter_map(|(from, to)| {
            let item = blank[from..to].split_once("mod ")?.1;
            let name = item.strip_suffix(';')?;
            Some(below.join(name.trim()))
        })
        .collect()
}

/// The text without comments and without what stands behind `#[cfg(test)]`, and how many lines it has without the latter.
pub(super) fn product(text: &str) -> (String, usize) {
    let blank = blanked(text);
    let mut code: Vec<u8> = without_comments(text).into_bytes();
    let mut lines = text.lines().count();
    for (from, to) in items(&blank) {
        lines -= text[from..to].matches('\n').count() + 1;
        for byte in &mut code[from..to] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
    }
    (String::from_utf8(code).unwrap(), lines)
}

/// The spans of the items behind `#[cfg(test)]`, attributes included, in a text without comments and strings.
fn items(blank: &str) -> Vec<(usize, usize)> {
    const ATTRIBUTE: &str = "#[cfg(test)]";
    let mut found: Vec<(usize, usize)> = Vec::new();
    let mut at = 0;
    while let Some(start) = blank[at..].find(ATTRIBUTE).map(|i| at + i) {
        let mut depth = 0usize;
        let mut end = blank.len();
        // An item ends with a semicolon, or with the brace that closes its body.
        for (i, c) in blank[start + ATTRIBUTE.len()..].char_indices() {
            let i = start + ATTRIBUTE.len() + i;
            match c {
                '{' | '(' | '[' => depth += 1,
                ')' | ']' => depth = depth.saturating_sub(1),
                '}' => {
                    depth = depth.saturating_sub(1);
                    if depth == 0 {
                        end = i + 1;
                        break;
                    }
                }
                ';' if depth == 0 => {
                    end = i + 1;
                    break;
                }
                _ => {}
            }
        }
        found.push((start, end));
        at = end;
    }
    found
}

/// The text with its comments made of blanks, byte for byte as long.
fn without_comments(text: &str) -> String {
    lex(text, |kind| kind == Token::Comment)
}

/// The text with its comments and literals made of blanks, byte for byte as long.
fn blanked(text: &str) -> String {
    lex(text, |kind| kind != Token::Code)
}

#[derive(Clone, Copy, PartialEq)]
enum Token {
    Comment,
    Literal,
    Code,
}

/// Cuts a text into comments, literals of strings and characters, and what lies between, and makes blanks of some.
fn lex(text: &str, is_blank: impl Fn(Token) -> bool) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let mut before = ' ';
    while let Some(c) = rest.chars().next() {
        let word = before.is_alphanumeric() || before == '_';
        let (length, kind) = if rest.starts_with("//") {
            (rest.find('\n').unwrap_or(rest.len()), Token::Comment)
        } else if rest.starts_with("/*") {
            (block_comment(rest), Token::Comment)
        } else if let Some(length) = (!word).then(|| raw_string(rest)).flatten() {
            (length, Token::Literal)
        } else if c == '"' {
            (quoted(rest, '"'), Token::Literal)
        } else if c == '\'' && is_character(rest) {
            (quoted(rest, '\''), Token::Literal)
        } else {
            (c.len_utf8(), Token::Code)
        };
        let (token, after) = rest.split_at(length);
        if is_blank(kind) {
            out.extend(token.bytes().map(|byte| if byte == b'\n' { '\n' } else { ' ' }));
        } else {
            out.push_str(token);
        }
        before = token.chars().next_back().unwrap_or(' ');
        rest = after;
    }
    out
}

fn block_comment(text: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        if text[at..].starts_with("/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if text[at..].starts_with("*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

/// The length of `r"…"`, `r#"…"#` and their like with a `b` or `c` before.
fn raw_string(text: &str) -> Option<usize> {
    let body = text.strip_prefix(['b', 'c']).unwrap_or(text).strip_prefix('r')?;
    let hashes = body.len() - body.trim_start_matches('#').len();
    let content = body[hashes..].strip_prefix('"')?;
    let end = content.find(&format!("\"{}", "#".repeat(hashes)))?;
    Some(text.len() - content.len() + end + 1 + hashes)
}

/// Whether a quote begins a character and not a lifetime.
fn is_character(text: &str) -> bool {
    let mut chars = text.chars().skip(1);
    match chars.next() {
        Some('\\') => true,
        Some(_) => chars.next() == Some('\''),
        None => false,
    }
}

fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (i, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == quote => return i + c.len_utf8(),
            _ => {}
        }
    }
    text.len()
}

#[test]
fn what_is_behind_cfg_test_is_left_out_and_nothing_else() {
    let text = r##"//! println!("doc")
#[cfg(test)]
use std::fs;
fn a() { let s = "#[cfg(test)] { \" } // no comment"; let c = '{'; let l: &'static str = r#"} " {"#; one(); }
#[cfg(test)]
#[allow(unused)]
mod tests {
    fn b() { let brace = "}"; two(); }
}
/* #[cfg(test)] /* nested */ } */
fn c<'a>(x: &'a u8) { three(); }
#[cfg(test)]
mod more;
fn d() { four(); }
"##;
    let (code, lines) = product(text);
    for kept in ["one()", "three()", "four()", "// no comment", "'{'"] {
        assert!(code.contains(kept), "{kept}: {code}");
    }
    for gone in ["two()", "println", "use std::fs", "nested", "mod more"] {
        assert!(!code.contains(gone), "{gone}: {code}");
    }
    assert_eq!(code.lines().count(), text.lines().count());
    assert_eq!(lines, text.lines().count() - 2 - 5 - 2);
    assert_eq!(test_modules(Path::new("src/lib.rs"), text), [Path::new("src/more")]);
    assert_eq!(test_modules(Path::new("src/x.rs"), text), [Path::new("src/x/more")]);
}
