//! Parts of HTML pages: text from elsewhere, which is shown and never read as markup, and tables.

use lowkey_files::{printable, printable_lines};

/// Text as HTML shows it, between tags and in an attribute's quotes.
pub(crate) fn escaped(text: &str) -> String {
    marked(&printable(text))
}

/// The same for text of several lines.
pub(crate) fn escaped_lines(text: &str) -> String {
    marked(&printable_lines(text))
}

fn marked(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A table, which scrolls where it is too wide.
pub(crate) fn table(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let cells = |tag: &str, cells: &mut dyn Iterator<Item = String>| {
        let cells: String = cells.map(|cell| format!("<{tag}>{}</{tag}>", escaped(&cell))).collect();
        format!("<tr>{cells}</tr>\n")
    };
    let mut out = String::from("<div class=\"scroll\"><table>\n");
    out += &cells("th", &mut header.iter().map(|cell| (*cell).to_string()));
    rows.for_each(|row| out += &cells("td", &mut row.into_iter()));
    out + "</table></div>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_shown_and_not_read_as_markup() {
        assert_eq!(escaped("<script>&\"\u{1b}[2J"), "&lt;script&gt;&amp;&quot;\\x1b[2J");
        assert_eq!(escaped_lines("<b>\n\u{202e}"), "&lt;b&gt;\n\\u{202e}");
        let table = table(&["<a>"], [vec!["&".to_string()]].into_iter());
        assert!(table.contains("<th>&lt;a&gt;</th>") && table.contains("<td>&amp;</td>"), "{table}");
    }
}
