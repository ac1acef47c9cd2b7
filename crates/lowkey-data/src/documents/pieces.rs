//! Where a long text may be cut.

/// Length, in bytes, from which on a text is cut. An encoding takes some hundred times the room of its text.
pub(crate) const PART: usize = 1 << 20;

/// How many times as long a part may become where no line ends.
const LONGEST: usize = 4;

/// How much of a text decides where its first part of about `size` bytes ends.
fn looked_at(size: usize) -> usize {
    // And the character after it.
    LONGEST * size + 8
}

/// Where the first part of a text of about `size` bytes ends; `None` where the whole text is one part. Looks at no more than
/// the first [`looked_at`] bytes.
///
/// A part ends after a line end that stands alone between two lines of text, which no usual pre-tokenizer joins with either;
/// where there is none soon, after any line end; where a line is longer than [`LONGEST`] parts, between two words of it; and
/// where it has no words, anywhere.
fn first_end(text: &str, size: usize) -> Option<usize> {
    if text.len() <= size {
        return None;
    }
    let end = text.floor_char_boundary(LONGEST * size);
    let bytes = &text.as_bytes()[..end];
    let lines = || bytes.iter().enumerate().skip(size).filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1);
    let text_follows = |at: &usize| text[*at..].starts_with(|c: char| !c.is_whitespace());
    let alone = |at: &usize| text_follows(at) && text[..*at - 1].ends_with(|c: char| !c.is_whitespace());
    let near = lines().take_while(|at| *at < size + size / 8).find(alone);
    if let Some(at) = near.or_else(|| lines().find(text_follows)) {
        return Some(at);
    }
    if text.len() <= LONGEST * size {
        return None;
    }
    let from = text.floor_char_boundary(size);
    let mut word = false;
    let between = text[from..end].char_indices().find(|(_, c)| {
        let found = word && c.is_whitespace();
        word = c.is_alphanumeric();
        found
    });
    Some(between.map_or(from, |(at, _)| from + at))
}

/// A text in parts of about `size` bytes.
pub(crate) fn parts(text: &str, size: usize) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    while let Some(end) = first_end(rest, size) {
        let (part, after) = rest.split_at(end);
        parts.push(part);
        rest = after;
    }
    parts.push(rest);
    parts
}

/// Cuts a text that comes bit by bit as [`parts`] cuts it whole.
pub(super) struct Cutter {
    held: String,
    size: usize,
}

impl Cutter {
    pub(super) fn new(size: usize) -> Self {
        Self { held: String::new(), size }
    }

    /// Takes more of the text.
    pub(super) fn push(&mut self, text: &str) {
        self.held.push_str(text);
    }

    /// The next part, if enough of the text is there to know where it ends.
    pub(super) fn next(&mut self) -> Option<String> {
        if self.held.len() < looked_at(self.size) {
            return None;
        }
        self.take()
    }

    /// The next part of a text that has ended; the last one is what [`Cutter::rest`] returns.
    pub(super) fn take(&mut self) -> Option<String> {
        let end = first_end(&self.held, self.size)?;
        let rest = self.held.split_off(end);
        Some(std::mem::replace(&mut self.held, rest))
    }

    /// What is left, for which the cutter is then ready to begin another text.
    pub(super) fn rest(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Texts with line ends alone, in rows, at the end, and with none.
    fn texts() -> Vec<String> {
        let line = "some words of a línе";
        vec![
            String::new(),
            "short".to_owned(),
            format!("{line}\n").repeat(40),
            format!("{line}\n\n\n{line} ").repeat(40),
            format!("{line} ").repeat(60),
            "ACGT".repeat(300),
            "\n".repeat(900),
            "ü".repeat(700),
            format!("{}\n{}", "x".repeat(330), format!("{line}. ").repeat(40)),
        ]
    }

    #[test]
    fn a_text_that_comes_bit_by_bit_is_cut_as_the_whole_is() {
        for (i, text) in texts().iter().enumerate() {
            for size in [16, 64, 100] {
                let whole = parts(text, size);
                assert_eq!(&whole.concat(), text);
                assert!(whole.iter().all(|part| part.len() <= LONGEST * size), "text {i}");
                for step in [1, 7, 1000] {
                    let mut cutter = Cutter::new(size);
                    let mut found: Vec<String> = Vec::new();
                    for bit in text.chars().collect::<Vec<_>>().chunks(step) {
                        cutter.push(&bit.iter().collect::<String>());
                        found.extend(std::iter::from_fn(|| cutter.next()));
                    }
                    found.extend(std::iter::from_fn(|| cutter.take()));
                    found.push(cutter.rest());
                    assert_eq!(found, whole, "text {i} by {step}");
                }
            }
        }
    }

    #[test]
    fn a_cut_stands_between_lines_else_between_words_else_anywhere() {
        let lines = format!("{}\n{}\n{}", "a".repeat(12), "b".repeat(12), "c".repeat(12));
        assert_eq!(parts(&lines, 16)[0].len(), 26);
        let words = "word ".repeat(100);
        assert!(parts(&words, 16).iter().skip(1).all(|part| part.starts_with(" word")));
        assert!(parts(&"x".repeat(100), 16).iter().all(|part| part.len() <= 64));
    }
}
