//! Tokens with the place in the text that each was made of.

use std::ops::Range;

use super::{END_OF_TEXT, Model, Tokenizer, guarded};
use crate::error::Result;

/// A token of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// The bytes of the text that it was made of. Tokens that are parts of one character each have the whole of it, and one that
    /// the tokenizer adds of itself has none.
    pub bytes: Range<usize>,
}

impl Tokenizer {
    /// [`Tokenizer::encode`] with the place of each token: nothing is added, and a special token spelled out becomes its id.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_placed(&self, text: &str) -> Result<Vec<Token>> {
        if let Model::Hf(pair) = &self.model {
            // Where a vocabulary is not known to spell bytes, the crate knows where a token's lie.
            if let Some(table) = pair.table(text).filter(|_| self.vocabulary.bytewise) {
                let ids = self.encode(text)?;
                return Ok(self.placed(text, ids, |id| table.added_length(id)));
            }
            self.fits(pair, text)?;
            let encoding = guarded(self.name(), || pair.special.encode(text, false))?;
            let token = |(id, (start, end)): (&u32, &(usize, usize))| {
                let (start, end) = (text.floor_char_boundary(*start), text.ceil_char_boundary(*end));
                Token { id: *id, bytes: start..end.max(start) }
            };
            return Ok(encoding.get_ids().iter().zip(encoding.get_offsets()).map(token).collect());
        }
        let mut tokens = Vec::with_capacity(text.len());
        let mut at = 0;
        for (i, part) in text.split(END_OF_TEXT).enumerate() {
            if i > 0 {
                tokens.extend(self.eos_id().map(|id| Token { id, bytes: at..at + END_OF_TEXT.len() }));
                at += END_OF_TEXT.len();
            }
            for (start, character) in part.char_indices() {
                let mut ids = Vec::new();
                self.extend_plain(&part[start..start + character.len_utf8()], &mut ids)?;
                let bytes = at + start..at + start + character.len_utf8();
                tokens.extend(ids.into_iter().map(|id| Token { id, bytes: bytes.clone() }));
            }
            at += part.len();
        }
        Ok(tokens)
    }

    /// Tokens that lie one behind the other, as many bytes as each stands for.
    fn placed(&self, text: &str, ids: Vec<u32>, added_length: impl Fn(u32) -> Option<usize>) -> Vec<Token> {
        let mut at = 0;
        let place = |id: u32| {
            let start = at;
            at += added_length(id).unwrap_or_else(|| self.token_bytes(id).len());
            Token { id, bytes: text.floor_char_boundary(start)..text.ceil_char_boundary(at) }
        };
        ids.into_iter().map(place).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(tokenizer: &Tokenizer, text: &str) -> Vec<(u32, String)> {
        let tokens = tokenizer.encode_placed(text).unwrap();
        let ids: Vec<u32> = tokens.iter().map(|token| token.id).collect();
        assert_eq!(ids, tokenizer.encode(text).unwrap());
        tokens.into_iter().map(|token| (token.id, text[token.bytes].to_owned())).collect()
    }

    #[test]
    fn bytes_of_one_character_each_have_the_whole_of_it() {
        let found = placed(&Tokenizer::bytes(), "aé<|endoftext|>b");
        let texts: Vec<&str> = found.iter().map(|(_, text)| text.as_str()).collect();
        assert_eq!(texts, ["a", "é", "é", END_OF_TEXT, "b"]);
    }

    #[test]
    fn characters_have_their_place() {
        let tokenizer = Tokenizer::chars("aé漢").unwrap();
        let found = placed(&tokenizer, "漢aé<|endoftext|>é");
        let texts: Vec<&str> = found.iter().map(|(_, text)| text.as_str()).collect();
        assert_eq!(texts, ["漢", "a", "é", END_OF_TEXT, "é"]);
    }

    #[test]
    fn tokens_of_byte_level_bpe_have_the_characters_that_they_are_parts_of() {
        let corpus = "the cat and the hat and the naïve bat";
        let tokenizer = Tokenizer::train_bpe([corpus.to_owned()].into_iter(), 275).unwrap();
        let text = "the 漢 naïve😀<|endoftext|> hat";
        let tokens = tokenizer.encode_placed(text).unwrap();
        assert_eq!(tokens.iter().map(|token| token.id).collect::<Vec<_>>(), tokenizer.encode(text).unwrap());
        let mut reached = 0;
        for token in &tokens {
            // In order, without a gap, and a character that several tokens share in each of them.
            assert!(token.bytes.start <= reached && token.bytes.end >= reached, "{token:?}");
            assert!(text.get(token.bytes.clone()).is_some_and(|part| !part.is_empty()), "{token:?}");
            reached = token.bytes.end;
        }
        assert_eq!(reached, text.len());
        let parts = tokens.iter().filter(|token| &text[token.bytes.clone()] == "😀").count();
        assert_eq!(parts, 4);
    }
}
