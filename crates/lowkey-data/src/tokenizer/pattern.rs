//! The patterns by which published tokenizers divide texts, without looking ahead.
//!
//! Most of them end in `|\s+(?!\S)|\s+`: white space before a word leaves its last character to the word. An engine that looks ahead
//! tries every alternative at every place, and that takes half a microsecond a word. Without those seven characters the rest is a
//! regular language, which an automaton reads at once; what they ask for is one character less at the end of a match.

use std::ops::Range;

use regex_automata::{
    Anchored, Input,
    meta::{Cache, Regex},
    util::syntax,
};
use regex_syntax::ast::{self, Ast};
use tokenizers::utils::SysRegex;

/// What white space that is no part of anything else ends in, as patterns write it. Both say the same: the last alternative is only
/// asked for a single character.
const BLANKS: [&str; 2] = [r"|\s+(?!\S)|\s+", r"|\s+(?!\S)|\s"];

/// A pattern that divides a text.
pub(super) enum Pattern {
    /// Without looking ahead, its last alternative being white space where the flag is set.
    Automaton { regex: Regex, blanks: bool },
    /// Any other pattern.
    Backtracking(SysRegex),
}

/// What a search writes down as it goes; each thread needs its own.
#[derive(Default)]
pub(super) struct Notes(Option<Cache>);

impl Pattern {
    /// None for a pattern that the tokenizers crate does not read either.
    pub(super) fn of(pattern: &str) -> Option<Self> {
        let automaton = match BLANKS.iter().find_map(|blanks| pattern.strip_suffix(blanks)) {
            Some(head) => automaton(&[head, r"\s+"]).map(|regex| Self::Automaton { regex, blanks: true }),
            None => automaton(&[pattern]).map(|regex| Self::Automaton { regex, blanks: false }),
        };
        automaton.or_else(|| SysRegex::new(pattern).ok().map(Self::Backtracking))
    }

    /// Hands on the matches in a text, in order.
    ///
    /// # Errors
    /// Those of `found`.
    pub(super) fn each<E>(
        &self,
        text: &str,
        notes: &mut Notes,
        mut found: impl FnMut(Range<usize>) -> Result<(), E>,
    ) -> Result<(), E> {
        let (regex, blanks) = match self {
            Self::Automaton { regex, blanks } => (regex, *blanks),
            Self::Backtracking(regex) => return regex.find_iter(text).try_for_each(|(start, end)| found(start..end)),
        };
        let cache = notes.0.get_or_insert_with(|| regex.create_cache());
        let mut at = 0;
        while at < text.len() {
            let input = Input::new(text).span(at..text.len());
            // Matches mostly follow each other. Where one begins is known then, and need not be found by reading backwards.
            let here = regex.search_with(cache, &input.clone().anchored(Anchored::Yes));
            let Some(matched) = here.or_else(|| regex.search_with(cache, &input)) else { break };
            let mut end = matched.end();
            if blanks && matched.pattern().as_usize() == 1 && end < text.len() {
                // What follows is no white space, since a match has all of it.
                let last = text[matched.range()].char_indices().next_back().map_or(0, |(last, _)| last);
                end = if last > 0 { matched.start() + last } else { end };
            }
            found(matched.start()..end)?;
            at = end;
        }
        Ok(())
    }
}

/// An automaton for patterns of which the first that matches counts; none where one of them asks for more than that, or may match nothing.
fn automaton(patterns: &[&str]) -> Option<Regex> {
    let parsed: Option<Vec<_>> = patterns
        .iter()
        .map(|pattern| {
            let parsed = same_to_both(pattern).then(|| syntax::parse(pattern).ok()).flatten()?;
            parsed.properties().minimum_len().is_some_and(|least| least > 0).then_some(parsed)
        })
        .collect();
    Regex::builder().build_many_from_hir(&parsed?).ok()
}

/// Whether a pattern means the same to both engines: flags do nothing but to leave case aside within a group, and no repetition keeps
/// what it has. (`a++` does for an engine that goes back; for the other one it is a repetition of a repetition.)
fn same_to_both(pattern: &str) -> bool {
    ast::parse::Parser::new().parse(pattern).is_ok_and(|ast| ast::visit(&ast, SameToBoth).is_ok())
}

struct SameToBoth;

impl ast::Visitor for SameToBoth {
    type Output = ();
    type Err = ();

    fn finish(self) -> Result<(), ()> {
        Ok(())
    }

    fn visit_pre(&mut self, ast: &Ast) -> Result<(), ()> {
        let only_case = |flags: &ast::Flags| {
            flags.items.iter().all(|item| item.kind == ast::FlagsItemKind::Flag(ast::Flag::CaseInsensitive))
        };
        let same = match ast {
            Ast::Flags(_) => false,
            Ast::Repetition(repetition) => !matches!(*repetition.ast, Ast::Repetition(_)),
            Ast::Group(group) => match &group.kind {
                ast::GroupKind::CaptureIndex(_) => true,
                ast::GroupKind::CaptureName { .. } => false,
                ast::GroupKind::NonCapturing(flags) => only_case(flags),
            },
            _ => true,
        };
        if same { Ok(()) } else { Err(()) }
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng, seq::IndexedRandom};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn divided(pattern: &Pattern, text: &str) -> Vec<(usize, usize)> {
        let mut all = vec![];
        pattern
            .each(text, &mut Notes::default(), |range| {
                all.push((range.start, range.end));
                Ok::<(), ()>(())
            })
            .unwrap();
        all
    }

    /// Alternatives as published patterns have them: words with a character before them, contractions, digits, lines, other scripts.
    const HEADS: [&str; 10] = [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+",
        r"[!%()*+,\-./?+{|}+~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+",
        r"\s?\p{L}+|\s?\p{P}+",
        r"\bx\b|\w+(?:-\w+)?",
        r"\s{3}|\t",
        r"ſ|(?i:k)+",
        r"[一-龥ぁ-ん]+",
        r"龥+|(ab|a)c?|\*+\p{Lu}{2}?",
    ];

    #[test]
    fn an_automaton_divides_as_looking_ahead_does() {
        let pieces = [
            "a", "bc", "Dé", "e\u{301}", "12", "9½", " ", "  ", "\t", "\n", "\r\n", "\u{a0}", "\u{3000}", "\u{b}",
            "\u{85}", "'s", "'RE", "'ſ", "K", "K", "x", "-", "_", "!?", "漢字", "かな", "🦀", "\u{200d}", "٣", "(",
            "/",
        ];
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let texts: Vec<String> = (0..2000)
            .map(|_| (0..rng.random_range(0..24)).filter_map(|_| pieces.choose(&mut rng)).copied().collect())
            .collect();
        for head in HEADS {
            for tail in ["", r"|\s+(?!\S)|\s+", r"|\s+(?!\S)|\s"] {
                let written = format!("{head}{tail}");
                let (ours, theirs) = (Pattern::of(&written).unwrap(), SysRegex::new(&written).unwrap());
                assert!(matches!(ours, Pattern::Automaton { .. }), "{written}");
                for text in &texts {
                    let expected: Vec<_> = theirs.find_iter(text).collect();
                    assert_eq!(divided(&ours, text), expected, "{written} of {text:?}");
                }
            }
        }
    }

    #[test]
    fn what_no_automaton_can_do_goes_back() {
        for pattern in [
            r"a(?=b)",
            r"a*",
            r"\w++b",
            r"(\w)\1",
            r"(?<=a)b",
            r"(?>ab?)b",
            r"x|\s+(?!\S)",
            r"\d{2}+3",
            r"(?s)x|\s+(?!\S)|\s+",
        ] {
            assert!(matches!(Pattern::of(pattern), Some(Pattern::Backtracking(_))), "{pattern}");
        }
        assert!(Pattern::of("(").is_none());
        // Kept by a repetition, the b is nobody's; an automaton would find it.
        assert!(divided(&Pattern::of(r"\w++b").unwrap(), "ab").is_empty());
    }
}
