//! A tokenizer with more special tokens than it had.

use serde_json::{Value, json};

use super::{CONFIG, Tokenizer, build};
use crate::error::{Error, Result};

/// Where lists of further special tokens stand beside a tokenizer, each in its own file.
const LISTED: &str = "additional_special_tokens";

impl Tokenizer {
    /// The same tokenizer with further special tokens behind all that it has: a text in which none of them is spelled out has the ids
    /// that it had. Those that are there already are left as they are.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] for a token without a character, and for files to which none can be added.
    pub fn with_new_tokens(&self, tokens: &[String]) -> Result<Self> {
        if tokens.iter().any(String::is_empty) {
            return Err(Error::tokenizer(self.name(), "a new token has at least one character"));
        }
        let mut new: Vec<&str> = Vec::new();
        for token in tokens {
            if self.token_to_id(token).is_none() && !new.contains(&token.as_str()) {
                new.push(token);
            }
        }
        if new.is_empty() {
            return Ok(self.clone());
        }
        let first = self.vocab_size() as u32;
        let ids = |first: u32| new.iter().zip(first..).map(|(token, id)| (*token, id)).collect::<Vec<_>>();
        let mut placed = ids(first);
        let mut grown = self.grown(&placed)?;
        // Ids are given in order behind the last that is taken, whatever a file says; where a vocabulary has a hole at its end, that is
        // earlier.
        if let Some(found) = grown.token_to_id(new[0]).filter(|found| *found != first) {
            placed = ids(found);
            grown = self.grown(&placed)?;
        }
        if let Some((token, id)) = placed.iter().find(|(token, id)| grown.token_to_id(token) != Some(*id)) {
            let why = format!("the new token {token:?} does not get the id {id}, which is the next one");
            return Err(Error::tokenizer(self.name(), why));
        }
        let companions = self.companions.iter().map(|(name, text)| Ok((name.clone(), listed(name, text, &placed)?)));
        Ok(Self {
            companions: companions.collect::<Result<_>>()?,
            eos: self.eos,
            around: self.around.clone(),
            special: self.special,
            ..grown
        })
    }

    /// The tokenizer of the same file with these tokens added to it.
    fn grown(&self, tokens: &[(&str, u32)]) -> Result<Self> {
        let wrong = |why: &str| Error::tokenizer(self.name(), why.to_owned());
        let mut json: Value = serde_json::from_str(self.json()).map_err(|e| Error::tokenizer(self.name(), e))?;
        let file = json.as_object_mut().ok_or_else(|| wrong("tokenizer.json is no object"))?;
        let added = file.entry("added_tokens").or_insert_with(|| json!([]));
        if added.is_null() {
            *added = json!([]);
        }
        let added = added.as_array_mut().ok_or_else(|| wrong("added_tokens of tokenizer.json is no list"))?;
        added.extend(tokens.iter().map(|(token, id)| {
            let mut declared = declaration(token);
            declared["id"] = json!(id);
            declared
        }));
        Self::from_json(build::pretty(&json), self.name())
    }
}

/// A special token as `tokenizer.json` and `tokenizer_config.json` declare it.
fn declaration(token: &str) -> Value {
    json!({ "content": token, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": true })
}

/// A file beside a tokenizer that has tables of special tokens, with further ones in them; another as it is.
fn listed(name: &str, text: &str, tokens: &[(&str, u32)]) -> Result<String> {
    if ![CONFIG, "special_tokens_map.json"].contains(&name) {
        return Ok(text.to_owned());
    }
    let mut json: Value = serde_json::from_str(text).map_err(|e| Error::tokenizer(name, e))?;
    if let Some(list) = json.get_mut(LISTED).and_then(Value::as_array_mut) {
        list.extend(tokens.iter().map(|(token, _)| json!(token)));
    }
    if let Some(table) = json.get_mut("added_tokens_decoder").and_then(Value::as_object_mut) {
        table.extend(tokens.iter().map(|(token, id)| (id.to_string(), declaration(token))));
    }
    Ok(build::pretty(&json))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::END_OF_TEXT;

    fn strings(tokens: &[&str]) -> Vec<String> {
        tokens.iter().map(|token| (*token).to_owned()).collect()
    }

    fn all() -> Vec<(&'static str, Tokenizer)> {
        let text = "the cat sees the hen.\nthe hen sees the fox, and the fox likes the cat.\n";
        vec![
            ("bytes", Tokenizer::bytes()),
            ("chars", Tokenizer::chars(text).unwrap()),
            ("bpe", Tokenizer::train_bpe([text.repeat(20)].into_iter(), 280).unwrap()),
        ]
    }

    #[test]
    fn new_tokens_stand_behind_the_others_and_old_texts_keep_their_ids() {
        for (name, old) in all() {
            let tokens = strings(&["<|user|>", "<|bot|>", "<|user|>", END_OF_TEXT]);
            let new = old.with_new_tokens(&tokens).unwrap();
            let size = old.vocab_size();
            assert_eq!(new.vocab_size(), size + 2, "{name}");
            assert_eq!(new.token_to_id("<|user|>"), Some(size as u32), "{name}");
            assert_eq!(new.token_to_id("<|bot|>"), Some(size as u32 + 1), "{name}");
            assert_eq!(new.eos_id(), old.eos_id(), "{name}");
            for text in ["the cat sees", "the hen.\n", "", "the <|endoftext|>the fox"] {
                assert_eq!(new.encode(text).unwrap(), old.encode(text).unwrap(), "{name}: {text}");
                let plain = old.encode_ordinary(text).map_err(|e| e.to_string());
                assert_eq!(new.encode_ordinary(text).map_err(|e| e.to_string()).ok(), plain.ok(), "{name}: {text}");
            }
            let ids = new.encode("<|user|>the cat<|bot|>").unwrap();
            assert_eq!(ids.first(), Some(&(size as u32)), "{name}");
            assert_eq!(ids.last(), Some(&(size as u32 + 1)), "{name}");
            assert_eq!(new.decode(&ids).unwrap(), "the cat", "{name}");
            assert_eq!(new.byte_lengths()[..size], old.byte_lengths(), "{name}");
            assert!(new.token_bytes(size as u32).is_empty(), "{name}");
            // As anybody reads it back, and once more nothing changes.
            let dir = tempfile::tempdir().unwrap();
            new.save(dir.path()).unwrap();
            let back = Tokenizer::from_model_dir(dir.path()).unwrap();
            assert_eq!((back.fingerprint(), back.eos_id()), (new.fingerprint(), new.eos_id()), "{name}");
            assert_eq!(back.encode("<|user|>the cat<|bot|>").unwrap(), ids, "{name}");
            assert_eq!(back.with_new_tokens(&tokens).unwrap().fingerprint(), new.fingerprint(), "{name}");
            assert!(old.with_new_tokens(&strings(&[""])).is_err());
        }
    }

    #[test]
    fn the_files_beside_a_tokenizer_say_what_was_added() {
        let dir = tempfile::tempdir().unwrap();
        Tokenizer::bytes().save(dir.path()).unwrap();
        let config = r#"{ "eos_token": "<|endoftext|>", "added_tokens_decoder": { "256": { "content": "<|endoftext|>", "special": true } },
            "additional_special_tokens": ["<|a|>"], "model_max_length": 7 }"#;
        std::fs::write(dir.path().join(CONFIG), config).unwrap();
        std::fs::write(dir.path().join("chat_template.jinja"), "{{ messages }}").unwrap();
        let new = Tokenizer::from_model_dir(dir.path()).unwrap().with_new_tokens(&strings(&["<|user|>"])).unwrap();
        let written = tempfile::tempdir().unwrap();
        new.save(written.path()).unwrap();
        let text = std::fs::read_to_string(written.path().join(CONFIG)).unwrap();
        let config: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(config[LISTED], json!(["<|a|>", "<|user|>"]));
        assert_eq!(config["added_tokens_decoder"]["257"]["content"], json!("<|user|>"));
        assert_eq!(config["model_max_length"], json!(7));
        assert_eq!(new.companion("chat_template.jinja"), Some("{{ messages }}"));
    }
}
