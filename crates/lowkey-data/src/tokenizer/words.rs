//! Training a byte-level BPE from the words of a text, however long the text and its words are.

use std::sync::LazyLock;

use ahash::AHashMap;
use compact_str::CompactString;
use regex::Regex;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::tokenizer::{AddedToken, Tokenizer as HfTokenizer};

use super::{END_OF_TEXT, byte_character};
use crate::error::{Error, Result};

/// Bytes of a word at most; a longer one counts as several. The trainer takes time with the square of a word's length, and no
/// text has words of this length whose ends a token should reach over.
const LONGEST_WORD: usize = 256;

/// What the trainer takes, in bytes, for each byte of a distinct word, and besides for each word.
const ROOM: (usize, usize) = (64, 256);

/// What the distinct words may make the trainer take, in bytes. Past it the rarest are forgotten.
const MOST_ROOM: usize = 1 << 30;

/// Sum of all pairs that the trainer can count. (It counts in 32 bits.)
const MOST_PAIRS: u64 = 1 << 30;

/// What the `ByteLevel` pre-tokenizer calls a word, but for white space before one, of which it leaves the last to the word.
static WORD: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+").ok());

/// The distinct words of a text, and how often each is in it.
pub(crate) struct WordCounts {
    counts: AHashMap<CompactString, u64>,
    /// What the trainer would take for them.
    room: usize,
    most: usize,
}

impl Default for WordCounts {
    fn default() -> Self {
        Self { counts: AHashMap::new(), room: 0, most: MOST_ROOM }
    }
}

impl WordCounts {
    /// Number of distinct words.
    pub(crate) fn len(&self) -> usize {
        self.counts.len()
    }

    /// Counts the words of a text, or of a part of one.
    pub(crate) fn add(&mut self, text: &str) {
        for word in words(text) {
            let mut rest = word;
            while !rest.is_empty() {
                let (word, after) = rest.split_at(rest.floor_char_boundary(LONGEST_WORD));
                self.count(word);
                rest = after;
            }
        }
    }

    fn count(&mut self, word: &str) {
        if let Some(count) = self.counts.get_mut(word) {
            *count += 1;
            return;
        }
        self.counts.insert(word.into(), 1);
        self.room += room(word);
        // Half the room at once, so that this is seldom.
        let mut rare = 0;
        while self.room > if rare == 0 { self.most } else { self.most / 2 } {
            rare += 1;
            self.counts.retain(|word, count| {
                let keep = *count > rare;
                self.room -= if keep { 0 } else { room(word) };
                keep
            });
        }
    }

    /// Trains a vocabulary of at most `vocab_size` entries and returns its `tokenizer.json`.
    pub(super) fn train(self, vocab_size: usize) -> Result<String> {
        if vocab_size < 257 {
            let message =
                format!("vocab_size = {vocab_size} is too small: 256 bytes and {END_OF_TEXT} need at least 257");
            return Err(Error::tokenizer("bpe", message));
        }
        let fail = |e: tokenizers::Error| Error::tokenizer("bpe", e);
        let trainer = BpeTrainer::builder()
            .vocab_size(vocab_size)
            .show_progress(false)
            // The whole alphabet, so that any text can be encoded and not only what the corpus happened to contain.
            .initial_alphabet((0..=255u8).map(byte_character).collect())
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true).normalized(false)])
            .build();
        let pairs: u64 = self.counts.iter().map(|(word, count)| count.saturating_mul(word.len() as u64)).sum();
        let divisor = pairs / MOST_PAIRS + 1;
        let alphabet: Vec<char> = (0..=255u8).map(byte_character).collect();
        let spelled = |word: &str| word.bytes().map(|byte| alphabet[usize::from(byte)]).collect();
        let counts = self.counts.into_iter().map(|(word, count)| (spelled(&word), count.div_ceil(divisor))).collect();
        let mut model = BPE::default();
        let special = trainer.do_train(&counts, &mut model).map_err(fail)?;
        let mut tokenizer = HfTokenizer::new(model);
        tokenizer.add_special_tokens(special).map_err(fail)?;
        tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        tokenizer.with_decoder(Some(ByteLevel::new(false, true, true)));
        tokenizer.to_string(true).map_err(fail)
    }
}

/// What the trainer takes for a word.
fn room(word: &str) -> usize {
    ROOM.0 * word.len() + ROOM.1
}

/// The words of a text as the `ByteLevel` pre-tokenizer divides it.
pub(super) fn words(text: &str) -> impl Iterator<Item = &str> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = at;
        at = match ascii_end(text.as_bytes(), start) {
            Some(end) => end,
            None => unicode_end(text, start)?,
        };
        (at > start).then(|| &text[start..at])
    })
}

/// Where the word that begins at a place ends; none where there is none.
fn unicode_end(text: &str, start: usize) -> Option<usize> {
    let found = WORD.as_ref()?.find_at(text, start)?;
    let (word, end) = (&text[start..found.end()], found.end());
    // White space before a word leaves its last character to it, unless that is all of it.
    match word.char_indices().next_back() {
        Some((last, c)) if end < text.len() && last > 0 && c.is_whitespace() => Some(start + last),
        _ => Some(end),
    }
}

/// The same where ASCII decides it, a quarter of the time.
fn ascii_end(text: &[u8], start: usize) -> Option<usize> {
    let rest = text.get(start..)?;
    match rest {
        [b'\'', b's' | b't' | b'm' | b'd', ..] => return Some(start + 2),
        [b'\'', b'r' | b'v', b'e', ..] | [b'\'', b'l', b'l', ..] => return Some(start + 3),
        _ => {}
    }
    let first = match rest {
        [b' ', next, ..] if !next.is_ascii_whitespace() && *next != VERTICAL_TAB => 1,
        _ => 0,
    };
    let kind = Kind::of(*rest.get(first)?)?;
    let mut end = first + 1;
    let next = loop {
        match rest.get(end) {
            None => break None,
            // What lies past ASCII may belong to it.
            Some(byte) => match Kind::of(*byte)? {
                same if same == kind => end += 1,
                other => break Some(other),
            },
        }
    };
    let leaves_one = kind == Kind::Space && next.is_some() && end > 1;
    Some(start + end - usize::from(leaves_one))
}

/// White space of Unicode which Rust does not count as that of ASCII.
const VERTICAL_TAB: u8 = 0x0B;

/// What words are made of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Letter,
    Digit,
    Space,
    Other,
}

impl Kind {
    /// That of a byte of ASCII.
    fn of(byte: u8) -> Option<Self> {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' => Some(Self::Letter),
            b'0'..=b'9' => Some(Self::Digit),
            b' ' | b'\t'..=b'\r' => Some(Self::Space),
            0..=0x7F => Some(Self::Other),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    #[test]
    fn words_are_those_of_the_pre_tokenizer() {
        let texts = [
            "",
            " ",
            "it's we're I'll 'tis  two   spaces\n\n\n\tand a tab \n",
            "fn main() {\n    let x = 12345;\n\n\n    if x > 3 {\n\t\treturn;\n    }\n}\n",
            "Grüße,\u{a0}\u{a0}Καλημέρα 你好\u{3000}\u{3000}三 🦀👩\u{200d}👩 ½ ² \u{85}x \u{2028}\u{2029}y\r\n\r\nz  ",
            "e\u{301}x ١٢٣ __init__ <|endoftext|> a\u{0}b \u{1c}\u{1d} c",
            "'s 't're've'm'll'd 'S '' ' 'é  é \u{b}\u{b}x \u{b} \u{c}\u{a0}y ' ",
        ];
        // Whatever stands beside whatever.
        let marks: Vec<char> = "as'relvd 19.-\n\r\t\u{b}\u{85}\u{a0}éß٣½漢🦀\u{301}\u{1c}\0".chars().collect();
        let mixed = (0..20_000u64).map(|i| marks[crate::sampler::mix(i) as usize % marks.len()]);
        let mixed: Vec<char> = mixed.collect();
        let mixed = mixed.chunks(7).map(String::from_iter).collect::<Vec<_>>();
        for text in texts.into_iter().chain(mixed.iter().map(String::as_str)) {
            let mut expected = PreTokenizedString::from(text);
            // Without the byte alphabet, which `words` leaves to the end.
            ByteLevel::new(false, true, true).pre_tokenize(&mut expected).unwrap();
            let expected: Vec<&str> = expected
                .get_splits(OffsetReferential::Original, OffsetType::Byte)
                .into_iter()
                .map(|(_, (start, end), _)| &text[start..end])
                .collect();
            assert_eq!(words(text).collect::<Vec<_>>(), expected, "{text:?}");
        }
    }

    #[test]
    fn a_vocabulary_learns_across_line_ends() {
        let mut counts = WordCounts::default();
        let code = "if a:\n        b = c\n\n\n    d\n".repeat(50);
        counts.add(&code);
        let tokenizer = super::super::Tokenizer::from_words(counts, 300).unwrap();
        let ids = tokenizer.encode(&code).unwrap();
        let joined = ids.iter().filter(|id| {
            let bytes = tokenizer.token_bytes(**id);
            bytes.contains(&b'\n') && bytes.len() > 1
        });
        // Two in each round: a line end with eight blanks, and three with four.
        assert!(joined.count() >= 100, "line ends and the indentation behind them should be tokens");
    }

    #[test]
    fn a_line_without_spaces_is_learnt_in_time_that_grows_with_its_length() {
        let dna: String = (0..400_000u64).map(|i| ['A', 'C', 'G', 'T'][crate::sampler::mix(i) as usize % 4]).collect();
        let started = std::time::Instant::now();
        let mut counts = WordCounts::default();
        counts.add(&dna);
        let tokenizer = super::super::Tokenizer::from_words(counts, 300).unwrap();
        // The whole line as one word takes minutes.
        assert!(started.elapsed().as_secs() < 30, "{:?}", started.elapsed());
        assert_eq!(tokenizer.vocab_size(), 300);
        let ids = tokenizer.encode(&dna[..3000]).unwrap();
        assert!(ids.len() < 1800, "{} tokens for 3,000 letters", ids.len());
    }

    #[test]
    fn rare_words_are_forgotten_before_there_are_too_many() {
        let mut counts = WordCounts { most: 100_000, ..WordCounts::default() };
        for i in 0..20_000 {
            counts.add(&format!("word{i} often"));
        }
        assert!(counts.room <= 100_000 && counts.len() < 400);
        assert_eq!(counts.room, counts.counts.keys().map(|word| room(word)).sum::<usize>());
        assert_eq!(counts.counts.get(" often"), Some(&20_000));
    }

    #[test]
    fn more_pairs_than_the_trainer_can_count_are_scaled_down() {
        let mut counts = WordCounts::default();
        counts.counts.insert("aa".into(), 1 << 40);
        counts.counts.insert("bb".into(), 3);
        let tokenizer = super::super::Tokenizer::from_words(counts, 259).unwrap();
        assert!(tokenizer.token_to_id("aa").is_some() && tokenizer.token_to_id("bb").is_some());
    }
}
