//! A byte-level BPE, word by word: what a word became once is looked up from then on.
//!
//! Such a tokenizer divides a text into words and merges the bytes of each by itself, and most words of a corpus have been met before.
//! The tokenizers crate keeps for every character where it came from, which costs ten times what the merges do and which nobody
//! asks for of a corpus. Here the crate's own model merges the words, its patterns divide the text, and no more is done than that.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Mutex, PoisonError};

use ahash::AHashMap;
use aho_corasick::{AhoCorasick, MatchKind};
use compact_str::CompactString;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::split::SplitPattern;
use tokenizers::tokenizer::{AddedToken, SplitDelimiterBehavior, Tokenizer as HfTokenizer};
use tokenizers::{Model, ModelWrapper, NormalizerWrapper, PreTokenizerWrapper};

use super::byte_character;
use super::pattern::{Notes, Pattern};
use super::words::words;

/// Words that a thread remembers at most.
const MOST_WORDS: usize = 1 << 17;

/// Bytes of a word that is remembered at most: longer ones seldom come again.
const LONGEST_WORD: usize = 64;

/// Bytes of all tokens that are looked for before anything else, at most: what finds them takes some forty times as many. Published
/// tokenizers have some thousand such tokens.
const MOST_ADDED: usize = 1 << 20;

/// How a tokenizer divides texts, and what words became.
pub(super) struct WordTable {
    /// What finds the tokens that come before anything else.
    finder: AhoCorasick,
    added: Vec<Added>,
    /// Bytes of each.
    lengths: AHashMap<u32, usize>,
    steps: Vec<Step>,
    /// Whether a normaliser stands before them that leaves ASCII alone, and other text perhaps not.
    ascii_only: bool,
    /// The character that stands for each byte.
    alphabet: Vec<char>,
    /// What each thread has met.
    met: Vec<Mutex<Met>>,
}

/// A step that divides each part of a text further.
enum Step {
    /// The matches of a pattern are parts, and so is what lies between them.
    Pattern(Pattern),
    /// Digits are parts, each by itself or as many as stand together.
    Digits { each: bool },
    /// As GPT-2 does.
    Words,
}

/// Words and what they became.
#[derive(Default)]
struct Met {
    /// Where the ids of each word lie.
    words: AHashMap<CompactString, (u32, u32)>,
    ids: Vec<u32>,
    /// A word as the model reads it.
    spelled: String,
    /// What the patterns of the steps write down.
    notes: Vec<Notes>,
}

impl WordTable {
    /// For a tokenizer that is one of bytes; none for another kind.
    pub(super) fn of(hf: &HfTokenizer) -> Option<Self> {
        let ModelWrapper::BPE(bpe) = hf.get_model() else { return None };
        let of_chance = bpe.dropout.is_some_and(|dropout| dropout > 0.0);
        let affixes = [&bpe.continuing_subword_prefix, &bpe.end_of_word_suffix];
        if of_chance || affixes.into_iter().flatten().any(|affix| !affix.is_empty()) {
            return None;
        }
        let alphabet: Vec<char> = (0..=255).map(byte_character).collect();
        // With all of them, nothing is ever unknown.
        if alphabet.iter().any(|c| bpe.token_to_id(c.encode_utf8(&mut [0; 4])).is_none()) {
            return None;
        }
        let ascii_only = match hf.get_normalizer() {
            None => false,
            Some(
                NormalizerWrapper::NFC(_)
                | NormalizerWrapper::NFD(_)
                | NormalizerWrapper::NFKC(_)
                | NormalizerWrapper::NFKD(_),
            ) => true,
            Some(_) => return None,
        };
        let steps = match hf.get_pre_tokenizer()? {
            PreTokenizerWrapper::Sequence(steps) => steps.as_ref(),
            one => std::slice::from_ref(one),
        };
        let (PreTokenizerWrapper::ByteLevel(bytes), before) = steps.split_last()? else { return None };
        let ByteLevel { add_prefix_space: false, use_regex, .. } = *bytes else { return None };
        let mut steps = before.iter().map(Step::of).collect::<Option<Vec<_>>>()?;
        if use_regex {
            steps.push(Step::Words);
        }
        let (finder, added, lengths) = added(hf)?;
        let met = (0..rayon::current_num_threads().max(1)).map(|_| Mutex::default()).collect();
        Some(Self { finder, added, lengths, steps, ascii_only, alphabet, met })
    }

    /// Whether it can be asked for this text.
    pub(super) fn reads(&self, text: &str) -> bool {
        !self.ascii_only || text.is_ascii()
    }

    /// The ids of a text; `model` is that of the tokenizer. Special tokens are found in it, or read as text.
    ///
    /// # Errors
    /// Those of the model.
    pub(super) fn encode(&self, model: &ModelWrapper, text: &str, special: bool) -> tokenizers::Result<Vec<u32>> {
        let ModelWrapper::BPE(bpe) = model else { unreachable!("a table is made for a BPE") };
        // A thread comes to its own, which nobody else holds unless there are threads besides those of the pool.
        let own = rayon::current_thread_index().unwrap_or(0) % self.met.len();
        let mut met = self.met[own].lock().unwrap_or_else(PoisonError::into_inner);
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut notes = std::mem::take(&mut met.notes);
        notes.resize_with(self.steps.len(), Notes::default);
        let mut read = |part: &str, ids: &mut Vec<u32>| {
            divide(&self.steps, &mut notes, part, &mut |word| met.look_up(word, bpe, &self.alphabet, ids))
        };
        let mut at = 0;
        for found in self.finder.find_iter(text) {
            let token = &self.added[found.pattern()];
            if special || !token.special {
                read(&text[at..found.start()], &mut ids)?;
                ids.push(token.id);
                at = found.end();
            }
        }
        read(&text[at..], &mut ids)?;
        met.notes = notes;
        Ok(ids)
    }

    /// Bytes of a token that is looked for before anything else; none for another one.
    pub(super) fn added_length(&self, id: u32) -> Option<usize> {
        self.lengths.get(&id).copied()
    }
}

/// A token that is looked for before anything else.
struct Added {
    id: u32,
    special: bool,
}

/// What finds the added tokens, which they are, and the bytes of each; none where more is asked of them than to stand there.
fn added(hf: &HfTokenizer) -> Option<(AhoCorasick, Vec<Added>, AHashMap<u32, usize>)> {
    let all: BTreeMap<_, _> =
        hf.get_added_tokens_decoder().into_iter().filter(|(_, t)| !t.content.is_empty()).collect();
    let plain = |token: &AddedToken| !(token.single_word || token.lstrip || token.rstrip);
    // Those of the text as it is are found before those of the normalised one.
    let at_once = all.values().all(|t| t.normalized) && hf.get_normalizer().is_none();
    let distinct: HashSet<&str> = all.values().map(|token| &*token.content).collect();
    let bytes = all.values().map(|token| token.content.len()).sum::<usize>();
    if bytes > MOST_ADDED
        || !all.values().all(plain)
        || distinct.len() < all.len()
        || !(at_once || all.values().all(|t| !t.normalized))
    {
        return None;
    }
    let contents = all.values().map(|token| &token.content);
    let finder = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(contents).ok()?;
    let added = all.iter().map(|(id, token)| Added { id: *id, special: token.special }).collect();
    let lengths = all.iter().map(|(id, token)| (*id, token.content.len())).collect();
    Some((finder, added, lengths))
}

impl Step {
    /// None for a step that does more than to divide.
    fn of(step: &PreTokenizerWrapper) -> Option<Self> {
        match step {
            PreTokenizerWrapper::Split(split)
                if split.behavior == SplitDelimiterBehavior::Isolated && !split.invert =>
            {
                let SplitPattern::Regex(pattern) = &split.pattern else { return None };
                Pattern::of(pattern).map(Self::Pattern)
            }
            PreTokenizerWrapper::Digits(digits) => Some(Self::Digits { each: digits.individual_digits }),
            _ => None,
        }
    }
}

/// Hands on the words of a text, in order.
fn divide<'t, E>(
    steps: &[Step],
    notes: &mut [Notes],
    text: &'t str,
    word: &mut impl FnMut(&'t str) -> Result<(), E>,
) -> Result<(), E> {
    let (Some((step, steps)), Some((own, notes))) = (steps.split_first(), notes.split_first_mut()) else {
        return if text.is_empty() { Ok(()) } else { word(text) };
    };
    match step {
        Step::Words => words(text).try_for_each(|part| divide(steps, notes, part, word)),
        Step::Pattern(pattern) => {
            let mut at = 0;
            pattern.each(text, own, |found| {
                divide(steps, notes, &text[at..found.start], word)?;
                at = found.end;
                divide(steps, notes, &text[found], word)
            })?;
            divide(steps, notes, &text[at..], word)
        }
        Step::Digits { each } => {
            let mut parts = text;
            while let Some(start) = parts.find(char::is_numeric) {
                let digits = &parts[start..];
                let end = match each {
                    true => digits.chars().next().map_or(0, char::len_utf8),
                    false => digits.find(|c: char| !c.is_numeric()).unwrap_or(digits.len()),
                };
                divide(steps, notes, &parts[..start], word)?;
                divide(steps, notes, &digits[..end], word)?;
                parts = &digits[end..];
            }
            divide(steps, notes, parts, word)
        }
    }
}

impl Met {
    fn look_up(&mut self, word: &str, bpe: &BPE, alphabet: &[char], ids: &mut Vec<u32>) -> tokenizers::Result<()> {
        if let Some((start, end)) = self.words.get(word) {
            ids.extend_from_slice(&self.ids[*start as usize..*end as usize]);
            return Ok(());
        }
        self.spelled.clear();
        self.spelled.extend(word.bytes().map(|byte| alphabet[usize::from(byte)]));
        let first = ids.len();
        ids.extend(bpe.tokenize(&self.spelled)?.into_iter().map(|token| token.id));
        if word.len() <= LONGEST_WORD {
            if self.words.len() == MOST_WORDS {
                self.words.clear();
                self.ids.clear();
            }
            let start = self.ids.len() as u32;
            self.ids.extend_from_slice(&ids[first..]);
            self.words.insert(word.into(), (start, self.ids.len() as u32));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::tokenizer::{Model, Tokenizer};

    /// Patterns in the manner of published tokenizers.
    const CASELESS: &str =
        r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

    const TEXTS: [&str; 8] = [
        "",
        "The cat and the hat and the naïve bat, it's WE'RE 12345 and 9½.",
        "  two  blanks\n\n\n\tand a tab \r\n  ",
        "a <|endoftext|> spelled out, <|plain|> too",
        "漢字かな交じり文 123漢456 🦀👩\u{200d}👩 e\u{301}\u{a0}\u{3000}x",
        "é ﬁ Å \u{1e9b}\u{323}",
        "٣٤٥ १२३ ⅷ²",
        "x",
    ];

    /// A BPE with another way to divide texts.
    fn tokenizer(change: impl FnOnce(&mut Value)) -> Tokenizer {
        let corpus = "the cat and the hat and the naïve bat 123 1234 it's we're\n\n\n  and  and";
        let trained = Tokenizer::train_bpe([corpus.repeat(3)].into_iter(), 300).unwrap();
        let mut json: Value = serde_json::from_str(trained.json()).unwrap();
        change(&mut json);
        Tokenizer::from_json(json.to_string(), "changed").unwrap()
    }

    fn split(pattern: &str) -> Value {
        json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false })
    }

    fn byte_level(use_regex: bool) -> Value {
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex })
    }

    fn sequence(steps: Vec<Value>) -> Value {
        json!({ "type": "Sequence", "pretokenizers": steps })
    }

    /// The ids of a text as the tokenizers crate has them.
    fn expected(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
        let Model::Hf(pair) = &tokenizer.model else { panic!("a tokenizer of the crate") };
        pair.ordinary().encode_fast(text, false).unwrap().get_ids().to_vec()
    }

    /// Refuses a text that is read otherwise than the tokenizers crate reads it, in any of the ways in which a text is read.
    fn check(tokenizer: &Tokenizer, text: &str) {
        let Model::Hf(pair) = &tokenizer.model else { panic!("a tokenizer of the crate") };
        assert_eq!(tokenizer.encode_ordinary(text).unwrap(), expected(tokenizer, text), "{text:?}");
        let encoding = pair.special.encode(text, false).unwrap();
        assert_eq!(tokenizer.encode(text).unwrap(), encoding.get_ids(), "{text:?}");
        let placed = tokenizer.encode_placed(text).unwrap();
        assert!(placed.iter().map(|token| token.id).eq(encoding.get_ids().iter().copied()), "{text:?}");
        for (token, (start, end)) in placed.iter().zip(encoding.get_offsets()) {
            let whole = text.floor_char_boundary(*start)..text.ceil_char_boundary(*end);
            assert_eq!(token.bytes, whole, "{text:?}");
        }
    }

    fn has_table(tokenizer: &Tokenizer, text: &str) -> bool {
        let Model::Hf(pair) = &tokenizer.model else { panic!("a tokenizer of the crate") };
        pair.table(text).is_some()
    }

    #[test]
    fn looked_up_words_are_what_the_tokenizer_makes_of_them() {
        let digits = |each: bool| json!({ "type": "Digits", "individual_digits": each });
        let ways = [
            byte_level(true),
            sequence(vec![split(CASELESS), byte_level(false)]),
            sequence(vec![split(r"\p{N}{1,3}"), split("[一-龥ぁ-ん]+"), split(CASELESS), byte_level(false)]),
            sequence(vec![digits(true), byte_level(true)]),
            sequence(vec![digits(false), byte_level(true)]),
            // A pattern that matches nothing at some places.
            sequence(vec![split("a*"), byte_level(false)]),
            byte_level(false),
        ];
        for way in ways {
            let tokenizer = tokenizer(|json| json["pre_tokenizer"] = way.clone());
            // Twice: when all is new, and when all has been met.
            for text in TEXTS.iter().chain(&TEXTS) {
                assert!(has_table(&tokenizer, text), "{way}");
                check(&tokenizer, text);
            }
            let texts = TEXTS.map(str::to_owned);
            let all = tokenizer.encode_documents(&texts).unwrap();
            assert!(all.iter().zip(TEXTS).all(|(ids, text)| *ids == expected(&tokenizer, text)), "{way}");
        }
    }

    #[test]
    fn a_normaliser_is_asked_about_what_it_may_change() {
        let tokenizer = tokenizer(|json| json["normalizer"] = json!({ "type": "NFKC" }));
        for text in TEXTS {
            assert_eq!(has_table(&tokenizer, text), text.is_ascii());
            check(&tokenizer, text);
        }
        assert_ne!(tokenizer.encode_ordinary("ﬁ").unwrap(), self::tokenizer(|_| ()).encode_ordinary("ﬁ").unwrap());
    }

    #[test]
    fn other_kinds_have_no_table() {
        let prefixed =
            json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true });
        let removed = json!({ "type": "Split", "pattern": { "Regex": " " }, "behavior": "Removed", "invert": false });
        let others = [
            tokenizer(|json| json["added_tokens"][0]["lstrip"] = true.into()),
            tokenizer(|json| {
                json["model"]["vocab"]["zz"] = json["model"]["vocab"].as_object_mut().unwrap().remove("z").unwrap();
            }),
            tokenizer(|json| json["pre_tokenizer"] = prefixed),
            tokenizer(|json| json["pre_tokenizer"] = sequence(vec![removed, byte_level(false)])),
            tokenizer(|json| json["pre_tokenizer"] = split("a")),
            tokenizer(|json| json["normalizer"] = json!({ "type": "Lowercase" })),
            tokenizer(|json| json["model"]["end_of_word_suffix"] = "</w>".into()),
            tokenizer(|json| json["model"]["dropout"] = 0.5.into()),
        ];
        for (i, tokenizer) in others.iter().enumerate() {
            assert!(!has_table(tokenizer, "a"), "{i}");
            if i < others.len() - 1 {
                check(tokenizer, TEXTS[3]);
            }
        }
    }

    #[test]
    fn places_do_not_need_a_decoder() {
        let tokenizer = tokenizer(|json| json["decoder"] = Value::Null);
        TEXTS.iter().for_each(|text| check(&tokenizer, text));
    }

    #[test]
    fn tokens_that_are_added_are_found_first() {
        let token = |id: u64, content: &str, special: bool| {
            json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": special })
        };
        let size = tokenizer(|_| ()).vocab_size() as u64;
        let added = [("<|plain|>", false), ("<|plain|>more", true), (" the", false), ("é", true), ("he", true)];
        let tokenizer = tokenizer(|json| {
            let all = json["added_tokens"].as_array_mut().unwrap();
            all.extend((size..).zip(added).map(|(id, (content, special))| token(id, content, special)));
        });
        for text in TEXTS.into_iter().chain(["a<|plain|><|plain|>more the the é", "<|plain|>m", " thé<|endoftext|>"])
        {
            assert!(has_table(&tokenizer, text));
            check(&tokenizer, text);
        }
    }

    #[test]
    fn more_words_than_are_remembered() {
        let tokenizer = tokenizer(|_| ());
        let many: String = (0..MOST_WORDS + 1000).map(|i| format!(" {i:x}")).collect();
        let text = format!("{many}{}", "long".repeat(40));
        assert!(tokenizer.encode_ordinary(&text).unwrap() == expected(&tokenizer, &text));
        assert!(tokenizer.encode_ordinary(&text).unwrap() == expected(&tokenizer, &text));
    }
}
