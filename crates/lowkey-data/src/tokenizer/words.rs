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
fn words(text: &str) -> impl Iterator<Item = &str> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let found = WORD.as_ref()?.find_at(text, at)?;
        let mut end = found.end();
        let word = &text[found.start()..end];
        // White space before a word leaves its last character to it, unless that is all of it.
        if end < text.len()
            && word.ends_with(char::is_whitespace)
            && let Some((last, _)) = word.char_indices().next_back()
            && last > 0
        {
            end = found.start() + last;
        }
        at = end;
        Some(&text[found.start()..end])
    })
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
        ];
        for text in texts {
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
