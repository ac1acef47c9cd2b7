//! Printing: what happens where standard output fails, and tables.
//!
//! A command whose work is what it prints ends where nobody can read it. One whose work is files, a training run above all,
//! goes on without its display ([`work_goes_on`]).

use std::io::{ErrorKind, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use lowkey_data::tokenizer::Part;
use lowkey_files::printable_lines;
pub(crate) use lowkey_lab::units::{bytes, count, duration};

/// Whether this command's work is more than what it prints.
static WORK_GOES_ON: AtomicBool = AtomicBool::new(false);

/// Whether standard output has failed, so that nothing more is written to it.
static SILENT: AtomicBool = AtomicBool::new(false);

/// Whether another process speaks for this one.
static QUIET: AtomicBool = AtomicBool::new(false);

/// Says nothing from now on, as another process does the same work and speaks for this one. What only this one has met,
/// [`complain_all_the_same`] says.
pub(crate) fn be_quiet() {
    SILENT.store(true, Ordering::Relaxed);
    QUIET.store(true, Ordering::Relaxed);
}

/// The end of a command whose standard output failed: the payload that unwinds to `main`, so that temporary files go.
pub(crate) enum OutputFailed {
    /// Nobody reads on (`lowkey info … | head`): no error.
    Closed,
    /// Why what was printed is lost.
    Lost(std::io::Error),
}

/// Says that this command does work which is kept in files, so that it goes on where standard output fails.
pub(crate) fn work_goes_on() {
    WORK_GOES_ON.store(true, Ordering::Relaxed);
}

/// Writes a line to standard output, control characters escaped: names come from files.
pub(crate) fn say(text: &str) {
    write(&printable_lines(text), "\n");
}

/// Writes the parts of a text to standard output, and a line end: those that are learnt in green on a terminal, between `[[` and `]]`
/// elsewhere. Control characters are escaped.
pub(crate) fn say_parts(parts: &[Part]) {
    let coloured = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    write(&marked(parts, coloured), "\n");
}

/// A text with its learnt parts marked.
fn marked(parts: &[Part], coloured: bool) -> String {
    let (on, off) = if coloured { ("\x1b[32m", "\x1b[0m") } else { ("[[", "]]") };
    let mark = |part: &Part| {
        let text = printable_lines(&part.text);
        if part.learnt { format!("{on}{text}{off}") } else { text.into_owned() }
    };
    parts.iter().map(mark).collect()
}

/// Writes text that a model or a user made up to standard output, without a line end, at once. A terminal would obey the control
/// characters in it, so it is shown them; a file or a pipe gets every byte as it is.
pub(crate) fn stream(text: &str) {
    if std::io::stdout().is_terminal() { write(&printable_lines(text), "") } else { write(text, "") }
}

fn write(text: &str, end: &str) {
    if SILENT.load(Ordering::Relaxed) {
        return;
    }
    let Err(e) = try_write(text, end) else { return };
    SILENT.store(true, Ordering::Relaxed);
    if WORK_GOES_ON.load(Ordering::Relaxed) {
        complain(&format!("note: standard output cannot be written ({e}); the work goes on without its display"));
        return;
    }
    let failed = if e.kind() == ErrorKind::BrokenPipe { OutputFailed::Closed } else { OutputFailed::Lost(e) };
    std::panic::resume_unwind(Box::new(failed));
}

fn try_write(text: &str, end: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    write!(out, "{text}{end}").and_then(|()| out.flush())
}

/// Writes a line to standard error, as well as it can be, control characters escaped.
pub(crate) fn complain(text: &str) {
    if !QUIET.load(Ordering::Relaxed) {
        complain_all_the_same(text);
    }
}

/// [`complain`], also of a process that is to be quiet.
pub(crate) fn complain_all_the_same(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{}", printable_lines(text));
}

/// A value as pretty JSON on standard output. Whoever asked for it wants all of it: that it cannot be written is an error,
/// whatever else the command has done.
pub(crate) fn say_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    if SILENT.load(Ordering::Relaxed) {
        anyhow::bail!("standard output could not be written");
    }
    match try_write(&text, "\n") {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == ErrorKind::BrokenPipe => std::panic::resume_unwind(Box::new(OutputFailed::Closed)),
        Err(e) => anyhow::bail!("standard output could not be written: {e}"),
    }
}

/// A word of a command line that a shell takes as it stands.
pub(crate) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./:,=+@%".contains(c);
    let harmless = |c: char| plain(c) || " !?;'()<>|&*#~".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else if word.chars().all(harmless) && !word.contains('!') {
        format!("\"{word}\"")
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

/// Two columns, the first padded to the widest label.
pub(crate) fn pairs(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(label, _)| label.chars().count()).max().unwrap_or(0);
    rows.iter().map(|(label, value)| format!("  {label:<width$}  {value}")).collect::<Vec<_>>().join("\n")
}

/// A table with a header; the first column is flush left, the others flush right.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let widths: Vec<usize> = header
        .iter()
        .enumerate()
        .map(|(i, title)| {
            let cells = rows.iter().filter_map(|row| row.get(i)).map(|cell| cell.chars().count());
            cells.chain([title.chars().count()]).max().unwrap_or(0)
        })
        .collect();
    let line = |cells: &[String]| {
        let cells = cells.iter().zip(&widths).enumerate().map(|(i, (cell, width))| match i {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        format!("  {}", cells.collect::<Vec<_>>().join("  ")).trim_end().to_string()
    };
    let header: Vec<String> = header.iter().map(|title| (*title).to_string()).collect();
    std::iter::once(line(&header)).chain(rows.iter().map(|row| line(row))).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_takes_a_word_as_it_stands() {
        for (word, expected) in [
            ("runs/a/best", "runs/a/best"),
            ("", "\"\""),
            ("my runs/best", "\"my runs/best\""),
            ("it's", "\"it's\""),
            ("$HOME `x`", "'$HOME `x`'"),
            ("say \"it's!\"", "'say \"it'\\''s!\"'"),
        ] {
            assert_eq!(quoted(word), expected);
        }
    }

    #[test]
    fn what_is_learnt_is_marked_and_no_control_character_passes() {
        let part = |text: &str, learnt| Part { text: text.to_owned(), learnt };
        let parts = [part("ask\n", false), part("say\u{1b}[2J", true)];
        assert!(marked(&parts, false).starts_with("ask\n[[say") && marked(&parts, false).ends_with("]]"));
        assert!(!marked(&parts, false).contains('\u{1b}'));
        assert!(marked(&parts, true).contains("\u{1b}[32msay") && !marked(&parts, true).contains("\u{1b}[2J"));
    }

    #[test]
    fn a_table_aligns() {
        let text = table(&["class", "n"], &[vec!["a".into(), "10".into()], vec!["2 × 3".into(), "7".into()]]);
        assert_eq!(text, "  class   n\n  a      10\n  2 × 3   7");
    }
}
