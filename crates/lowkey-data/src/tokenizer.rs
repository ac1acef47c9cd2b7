//! Text to token ids and back.
//!
//! Four kinds behind one type: the built-in byte vocabulary, a character vocabulary, byte-level BPE trained here, and
//! whatever a Hugging Face `tokenizer.json` describes. The first two have a fast path of their own, yet all four save
//! a `tokenizer.json` that transformers loads to the same ids, and are recognised when such a file is read back.

mod build;
mod grow;
mod pattern;
mod place;
mod special;
mod spell;
mod stream;
mod table;
mod vet;
mod words;

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use lowkey_files::companions::{self, COMPANIONS, Companion};
use rayon::prelude::*;
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokenizers::PostProcessorWrapper;
use tokenizers::tokenizer::Tokenizer as HfTokenizer;

use crate::documents;
use crate::error::{Error, Result};
pub use build::byte_character;
pub use place::Token;
use special::{Around, RECORD, named};
pub use spell::Part;
pub use stream::TextStream;
use table::WordTable;
pub(crate) use words::WordCounts;

/// The end-of-document token of every tokenizer built here.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// Names under which a `tokenizer.json` that comes without a configuration may declare its end-of-document token.
const KNOWN_ENDS: [&str; 4] = [END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>"];

/// What `tokenizer.json` means: its special tokens, and whether documents had them around them.
const CONFIG: &str = "tokenizer_config.json";
/// Where a chat template stands beside a tokenizer.
const CHAT_TEMPLATE: &str = "chat_template.jinja";

/// Bytes of text that are encoded at a time. An encoding takes some hundred times the room of its text.
const AT_ONCE: usize = 8 << 20;

/// Bytes that a text may become on its way through a tokenizer that makes it longer.
const MOST_GROWN: usize = 1 << 26;

/// A tokenizer; cheap to clone.
#[derive(Clone)]
pub struct Tokenizer {
    model: Model,
    /// The `tokenizer.json` as read or as built, kept verbatim: its hash is the tokenizer's identity.
    json: Arc<str>,
    companions: Arc<[(String, String)]>,
    vocabulary: Arc<Vocabulary>,
    eos: Option<u32>,
    around: Around,
    /// Whether `around` is added; where nobody has said, it is.
    special: Option<bool>,
}

#[derive(Clone)]
enum Model {
    Bytes,
    Chars(Arc<HashMap<char, u32>>),
    Hf(Arc<HfPair>),
}

/// One loaded tokenizer and, made on demand, its twin that reads special tokens in a text as plain text.
struct HfPair {
    special: HfTokenizer,
    ordinary: OnceLock<HfTokenizer>,
    /// What stands in for both where they are a byte-level BPE.
    table: OnceLock<Option<WordTable>>,
    /// How many times longer the file's own strings can make a text.
    growth: usize,
}

/// What each id stands for.
struct Vocabulary {
    tokens: Vec<Entry>,
    /// Whether decoding is nothing but joining the entries' bytes. Otherwise `bytes` are an estimate, good for counting.
    bytewise: bool,
}

#[derive(Clone)]
enum Entry {
    Text(Box<[u8]>),
    Special,
    /// A hole in the vocabulary.
    Unused,
}

impl Tokenizer {
    /// The built-in byte tokenizer: ids 0 to 255 are the bytes, 256 is [`END_OF_TEXT`].
    pub fn bytes() -> Self {
        let mut tokens: Vec<Entry> = (0..=255u8).map(|byte| Entry::Text(Box::new([byte]))).collect();
        tokens.push(Entry::Special);
        Self::assemble(Model::Bytes, build::pretty(&build::bytes_json()), tokens, true, Some(256))
    }

    /// A character tokenizer over the distinct characters of `text`, in code point order, then [`END_OF_TEXT`].
    pub fn chars(text: &str) -> Result<Self> {
        Self::from_alphabet(&text.chars().collect())
    }

    /// A character tokenizer over `alphabet`.
    pub(crate) fn from_alphabet(alphabet: &BTreeSet<char>) -> Result<Self> {
        if alphabet.is_empty() {
            return Err(Error::tokenizer("chars", "there is no text to take the alphabet from"));
        }
        let alphabet: Vec<char> = alphabet.iter().copied().collect();
        let json = build::pretty(&build::chars_json(&alphabet));
        Ok(Self::from_chars(&alphabet, json))
    }

    fn from_chars(alphabet: &[char], json: String) -> Self {
        let mut tokens: Vec<Entry> = alphabet.iter().map(|c| Entry::Text(c.to_string().into_bytes().into())).collect();
        let eos = tokens.len() as u32;
        tokens.push(Entry::Special);
        let ids = alphabet.iter().zip(0u32..).map(|(&c, id)| (c, id)).collect();
        Self::assemble(Model::Chars(Arc::new(ids)), json, tokens, true, Some(eos))
    }

    /// A vocabulary of whole words, which a text separates by white space; without an end of document.
    pub(crate) fn words(words: &[String]) -> Result<Self> {
        Self::from_json(build::pretty(&build::words_json(words)), "words")
    }

    /// Trains a byte-level BPE vocabulary of at most `vocab_size` entries, [`END_OF_TEXT`] included; a small corpus
    /// may yield fewer.
    pub fn train_bpe(texts: impl Iterator<Item = String>, vocab_size: usize) -> Result<Self> {
        let mut words = WordCounts::default();
        texts.for_each(|text| words.add(&text));
        Self::from_words(words, vocab_size)
    }

    /// [`Tokenizer::train_bpe`] from words that have been counted.
    pub(crate) fn from_words(words: WordCounts, vocab_size: usize) -> Result<Self> {
        Self::from_json(words.train(vocab_size)?, "bpe")
    }

    /// Reads any `tokenizer.json`. The end-of-document token is the first of `<|endoftext|>`, `</s>`,
    /// `<|end_of_text|>` and `<eos>` that the file declares as special; [`Tokenizer::from_model_dir`] knows better.
    pub fn from_file(path: &Path) -> Result<Self> {
        let json = read_text(path)?;
        Self::from_json(json, &path.display().to_string())
    }

    /// Reads `DIR/tokenizer.json` with the end-of-document token that the model declares: `eos_token` of
    /// `tokenizer_config.json`, else `eos_token_id` of `generation_config.json` or `config.json` (the first where it is
    /// a list), else as [`Tokenizer::from_file`].
    pub fn from_model_dir(dir: &Path) -> Result<Self> {
        let mut tokenizer = Self::from_file(&dir.join("tokenizer.json"))?;
        let mut companions = Vec::new();
        for Companion { name, .. } in COMPANIONS.iter().filter(|companion| companion.of_tokenizer) {
            let path = dir.join(name);
            // What is there and is no file is refused.
            if path.symlink_metadata().is_ok() {
                let text = read_text(&path)?;
                companions.push(((*name).to_owned(), text));
            }
        }
        tokenizer.companions = companions.into();
        for name in [CONFIG, "generation_config.json", "config.json"] {
            let path = dir.join(name);
            if path.symlink_metadata().is_err() {
                continue;
            }
            let text = read_text(&path)?;
            let config: Value = serde_json::from_str(&text)
                .map_err(|e| Error::tokenizer(path.display().to_string(), format!("not valid JSON: {e}")))?;
            if name == CONFIG {
                let id = |key: &str| named(&config, key).and_then(|token| tokenizer.token_to_id(token));
                tokenizer.around = tokenizer.around.clone().configured(&config, id);
                tokenizer.special = config.get(RECORD).and_then(Value::as_bool);
            }
            if let Some(id) = tokenizer.declared_eos(&config) {
                tokenizer.eos = Some(id);
                break;
            }
        }
        Ok(tokenizer)
    }

    /// The end-of-document id that a configuration names, if this vocabulary has it.
    fn declared_eos(&self, config: &Value) -> Option<u32> {
        if let Some(id) = named(config, "eos_token").and_then(|token| self.token_to_id(token)) {
            return Some(id);
        }
        let id = match config.get("eos_token_id")? {
            Value::Array(ids) => ids.first()?.as_u64()?,
            id => id.as_u64()?,
        };
        u32::try_from(id).ok().filter(|&id| (id as usize) < self.vocab_size())
    }

    fn from_json(json: String, origin: &str) -> Result<Self> {
        let value: Value =
            serde_json::from_str(&json).map_err(|e| Error::tokenizer(origin, format!("not valid JSON: {e}")))?;
        match build::recognise(&value) {
            Some(build::Known::Bytes) => {
                return Ok(Self { json: json.into(), ..Self::bytes() });
            }
            Some(build::Known::Chars(alphabet)) => return Ok(Self::from_chars(&alphabet, json)),
            None => {}
        }
        let growth = vet::vet(&value).map_err(|e| Error::tokenizer(origin, e))?;
        // From the value and not from the text, which may give a key twice: what was looked at is what is parsed.
        let mut hf = guarded(origin, || {
            HfTokenizer::deserialize(&value).map_err(|e| format!("not a tokenizer.json that this build can read: {e}"))
        })?;
        // Some files carry the truncation and padding of the run that saved them. A corpus must not be cut by them.
        hf.with_padding(None);
        hf.with_truncation(None).map_err(|e| Error::tokenizer(origin, e))?;
        let around = guarded(origin, || Around::of_post_processor(&hf))?;
        // Where its tokens stand is decided here and not text by text: a corpus is encoded in parts, a prompt has no end.
        hf.with_post_processor(None::<PostProcessorWrapper>);
        let (tokens, bytewise) = build::entries(&hf).map_err(|e| Error::tokenizer(origin, e))?;
        let added = hf.get_added_tokens_decoder();
        let eos = KNOWN_ENDS.iter().find_map(|name| {
            let id = hf.token_to_id(name)?;
            added.get(&id).is_some_and(|token| token.special).then_some(id)
        });
        let pair = HfPair { special: hf, ordinary: OnceLock::new(), table: OnceLock::new(), growth };
        Ok(Self { around, ..Self::assemble(Model::Hf(Arc::new(pair)), json, tokens, bytewise, eos) })
    }

    fn assemble(model: Model, json: String, tokens: Vec<Entry>, bytewise: bool, eos: Option<u32>) -> Self {
        let vocabulary = Arc::new(Vocabulary { tokens, bytewise });
        let (companions, around) = (Arc::new([]), Around::default());
        Self { model, json: json.into(), companions, vocabulary, eos, around, special: None }
    }

    /// The same tokenizer, with the special tokens that belong around a text (`<s>` before it, say) or without; `None` leaves
    /// it as it is, which is with them unless its model was trained without.
    #[must_use]
    pub fn with_special_tokens(mut self, add: Option<bool>) -> Self {
        self.special = add.or(self.special);
        self
    }

    /// The same tokenizer with another chat template beside it.
    #[must_use]
    pub fn with_chat_template(mut self, template: &str) -> Self {
        let name = CHAT_TEMPLATE.to_owned();
        let others = self.companions.iter().filter(|(known, _)| *known != name).cloned();
        self.companions = others.chain([(name.clone(), template.to_owned())]).collect();
        self
    }

    /// Whether it puts special tokens around a text.
    pub fn adds_special_tokens(&self) -> bool {
        !self.around.is_empty() && self.special != Some(false)
    }

    /// Whether it could, and was told not to.
    pub fn omits_special_tokens(&self) -> bool {
        !self.around.is_empty() && self.special == Some(false)
    }

    /// Whether it adds special tokens only because its own files say so, and not because its model is known to have been
    /// trained with them.
    pub fn special_tokens_are_assumed(&self) -> bool {
        !self.around.is_empty() && self.special.is_none()
    }

    /// What every text begins with: a token such as `<s>`, or nothing.
    pub fn text_start(&self) -> &[u32] {
        if self.special == Some(false) { &[] } else { &self.around.before }
    }

    /// What the tokenizer puts after a text. Documents end with it, prompts do not: it would stand before their continuation.
    pub fn after_text(&self) -> &[u32] {
        if self.special == Some(false) { &[] } else { &self.around.after }
    }

    /// What ends a whole document: [`Tokenizer::after_text`], and the end-of-document token if it is not the last of it already.
    pub(crate) fn text_end(&self) -> Vec<u32> {
        let mut end = self.after_text().to_vec();
        if end.last() != self.eos.as_ref() {
            end.extend(self.eos);
        }
        end
    }

    /// Token ids of a text that is to be continued: [`Tokenizer::text_start`], then [`Tokenizer::encode`]. A prompt that spells
    /// its beginning out, as rendered chat templates do, is not given a second one, which no model has seen.
    ///
    /// What the tokenizer puts after a text is left out, although transformers adds it here, too: it would stand between the
    /// prompt and its continuation, and a model goes on after an end with another text.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.encode(text)?;
        let start = self.text_start();
        Ok(if ids.starts_with(start) { ids } else { [start, &ids].concat() })
    }

    /// Token ids of `text`. No token is added, and a special token spelled out in the text becomes its id, as in
    /// transformers without special tokens: this is for a part of a text. [`Tokenizer::encode_prompt`] is for a prompt.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        if let Model::Hf(pair) = &self.model {
            return self.run(pair, text, true);
        }
        let mut ids = Vec::with_capacity(text.len());
        for (i, part) in text.split(END_OF_TEXT).enumerate() {
            if i > 0 {
                ids.extend(self.eos);
            }
            self.extend_plain(part, &mut ids)?;
        }
        Ok(ids)
    }

    /// Token ids of `text` in which a spelled-out special token is plain text: this is for a corpus, whose documents
    /// must not be able to forge an end of document.
    pub fn encode_ordinary(&self, text: &str) -> Result<Vec<u32>> {
        if let Model::Hf(pair) = &self.model {
            return self.run(pair, text, false);
        }
        let mut ids = Vec::with_capacity(text.len());
        self.extend_plain(text, &mut ids)?;
        Ok(ids)
    }

    /// [`Tokenizer::encode_ordinary`] of many texts, none of which is long, in parallel where the tokenizer is slow enough to
    /// need it.
    pub(crate) fn encode_documents(&self, texts: &[String]) -> Result<Vec<Vec<u32>>> {
        let Model::Hf(pair) = &self.model else {
            return texts.iter().map(|text| self.encode_ordinary(text)).collect();
        };
        if texts.iter().all(|text| pair.table(text).is_some()) {
            return texts.par_iter().map(|text| self.encode_ordinary(text)).collect();
        }
        // Where the tokenizer's own steps make a text longer, less of it is read at once.
        let most = AT_ONCE / pair.growth;
        let all: Vec<(usize, &str)> =
            (0..).zip(texts).flat_map(|(i, text)| bounded(text, most).into_iter().map(move |part| (i, part))).collect();
        let mut held = 0;
        let together = |(_, part): &(usize, &str), _: &(usize, &str)| {
            held = if held > most { 0 } else { held + part.len() };
            held > 0
        };
        let mut ids = vec![Vec::new(); texts.len()];
        for group in all.chunk_by(together) {
            let inputs: Vec<&str> = group.iter().map(|(_, part)| *part).collect();
            let encodings = guarded(self.name(), || pair.ordinary().encode_batch_fast(inputs, false))?;
            for ((i, _), encoding) in group.iter().zip(encodings) {
                ids[*i].extend_from_slice(encoding.get_ids());
            }
        }
        Ok(ids)
    }

    fn run(&self, pair: &HfPair, text: &str, special: bool) -> Result<Vec<u32>> {
        if let Some(table) = pair.table(text) {
            return guarded(self.name(), || table.encode(pair.special.get_model(), text, special));
        }
        self.fits(pair, text)?;
        let hf = if special { &pair.special } else { pair.ordinary() };
        let encoding = guarded(self.name(), || hf.encode_fast(text, false))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Refuses a text that the tokenizer's own steps could make too long.
    fn fits(&self, pair: &HfPair, text: &str) -> Result<()> {
        if text.len().saturating_mul(pair.growth) <= MOST_GROWN {
            return Ok(());
        }
        let message = format!(
            "a text of {} bytes is too long for it: its own steps can make it {} times longer",
            text.len(),
            pair.growth
        );
        Err(Error::tokenizer(self.name(), message))
    }

    fn extend_plain(&self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        match &self.model {
            Model::Chars(alphabet) => {
                for character in text.chars() {
                    let id = alphabet
                        .get(&character)
                        .ok_or(Error::UnknownCharacter { character, alphabet: alphabet.len() })?;
                    ids.push(*id);
                }
            }
            Model::Bytes | Model::Hf(_) => ids.extend(text.bytes().map(u32::from)),
        }
        Ok(())
    }

    /// Text of `ids`, special tokens skipped. Bytes that are not UTF-8 become U+FFFD, and so does an id past the
    /// vocabulary, which a model with a padded embedding can emit.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        if let Model::Hf(pair) = &self.model
            && !self.vocabulary.bytewise
        {
            let known = |id: &u32| !matches!(self.vocabulary.get(*id), Entry::Unused);
            // Some decoders fail on a text of no token, which special ones alone are.
            let join = |ids: &[u32]| match ids.iter().all(|id| matches!(self.vocabulary.get(*id), Entry::Special)) {
                true => Ok(String::new()),
                false => guarded(self.name(), || pair.special.decode(ids, true)),
            };
            let (mut text, mut seen) = (String::new(), Vec::new());
            for chunk in ids.chunk_by(|a, b| known(a) && known(b)) {
                if chunk.first().is_some_and(known) {
                    // Most decoders have a rule for the first token of a text, which is not that of a chunk.
                    let before = join(&seen)?;
                    seen.extend_from_slice(chunk);
                    match join(&seen)?.strip_prefix(&before) {
                        Some(part) => text.push_str(part),
                        None => text.push_str(&join(chunk)?),
                    }
                } else {
                    text.push(char::REPLACEMENT_CHARACTER);
                }
            }
            return Ok(text);
        }
        let mut bytes = Vec::with_capacity(ids.len());
        ids.iter().for_each(|&id| self.vocabulary.append(id, &mut bytes));
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Text of `ids` where they go on from `before`: what is appended to the text of `before`, space and all.
    pub fn decode_after(&self, before: &[u32], ids: &[u32]) -> Result<String> {
        let mut stream = self.stream(before);
        let mut text = String::new();
        for &id in ids {
            text.push_str(&stream.push(id)?);
        }
        Ok(text + &stream.finish()?)
    }

    /// For every id the number of text bytes that it stands for; special tokens count 0.
    ///
    /// Exact for the tokenizers built here and for every byte-level one. For a vocabulary that rewrites the text
    /// (SentencePiece, WordPiece) it is a close estimate; over a whole split, [`crate::Shard::bytes`] is always exact.
    pub fn byte_lengths(&self) -> Vec<u32> {
        let length = |entry: &Entry| if let Entry::Text(bytes) = entry { bytes.len() as u32 } else { 0 };
        self.vocabulary.tokens.iter().map(length).collect()
    }

    /// The bytes that `id` stands for; empty for a special token or an id past the vocabulary. Exact and estimated as
    /// [`Tokenizer::byte_lengths`].
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        if let Entry::Text(bytes) = self.vocabulary.get(id) { bytes } else { &[] }
    }

    /// The id of a token by its spelling in the vocabulary, special tokens included.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        match &self.model {
            Model::Hf(pair) => pair.special.token_to_id(token),
            _ if token == END_OF_TEXT => self.eos,
            Model::Chars(alphabet) => {
                let mut chars = token.chars();
                let first = chars.next()?;
                chars.next().is_none().then(|| alphabet.get(&first).copied())?
            }
            Model::Bytes => None,
        }
    }

    /// One more than the largest id, which is what an embedding needs at least.
    pub fn vocab_size(&self) -> usize {
        self.vocabulary.tokens.len()
    }

    /// The id that ends a document, where the tokenizer has one.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos
    }

    /// The kind: `bytes`, `chars`, or the model in the `tokenizer.json`: `bpe`, `unigram`, `wordpiece`, `wordlevel`.
    pub fn name(&self) -> &'static str {
        use tokenizers::ModelWrapper as M;
        match &self.model {
            Model::Bytes => "bytes",
            Model::Chars(_) => "chars",
            Model::Hf(pair) => match pair.special.get_model() {
                M::BPE(_) => "bpe",
                M::Unigram(_) => "unigram",
                M::WordPiece(_) => "wordpiece",
                M::WordLevel(_) => "wordlevel",
            },
        }
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json` into `dir`, and what else came with the tokenizer from a
    /// model's folder; each file appears whole or not at all.
    pub fn save(&self, dir: &Path) -> Result<()> {
        lowkey_files::write::create_dir(dir)?;
        write_atomically(&dir.join("tokenizer.json"), self.json.as_bytes())?;
        for (name, text) in self.companions.iter().filter(|(name, _)| name != CONFIG) {
            write_atomically(&dir.join(name), text.as_bytes())?;
        }
        write_atomically(&dir.join(CONFIG), self.config_json()?.as_bytes())
    }

    /// `tokenizer_config.json`: the one that came with the tokenizer, if it names our end-of-document token and says whether
    /// documents had special tokens around them (where it can have any, and this is known), else one made to say so.
    pub(crate) fn config_json(&self) -> Result<String> {
        let record = if self.around.is_empty() { None } else { self.special };
        let given = self.companions.iter().find(|(name, _)| name == CONFIG);
        let mut config = match given {
            Some((_, text)) => {
                let config: Value = serde_json::from_str(text).map_err(|e| Error::tokenizer(CONFIG, e))?;
                let recorded = record.is_none() || config.get(RECORD).and_then(Value::as_bool) == record;
                if recorded && (self.eos.is_none() || self.declared_eos(&config) == self.eos) {
                    return Ok(text.clone());
                }
                config
            }
            None => serde_json::json!({
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": false,
            }),
        };
        let eos = match &self.model {
            Model::Hf(pair) => self.eos.and_then(|id| pair.special.id_to_token(id)),
            Model::Bytes | Model::Chars(_) => Some(END_OF_TEXT.to_owned()),
        };
        if let (Some(eos), Some(config)) = (eos, config.as_object_mut()) {
            config.insert("eos_token".to_owned(), Value::String(eos));
        }
        if let (Some(record), Some(config)) = (record, config.as_object_mut()) {
            config.insert(RECORD.to_owned(), Value::Bool(record));
            for key in ["add_bos_token", "add_eos_token"].into_iter().filter(|_| !record) {
                // For transformers, which knows no such record.
                config.insert(key.to_owned(), Value::Bool(false));
            }
        }
        Ok(build::pretty(&config))
    }

    /// SHA-256 of the saved `tokenizer.json`, in hex.
    pub fn fingerprint(&self) -> String {
        lowkey_files::hash::hex(&Sha256::digest(self.json.as_bytes()))
    }

    /// The `tokenizer.json`, as read or as built.
    pub fn json(&self) -> &str {
        &self.json
    }

    /// A file that came with the tokenizer from a model's folder: `tokenizer_config.json`, `special_tokens_map.json`,
    /// `chat_template.jinja` or `chat_template.json`.
    pub fn companion(&self, name: &str) -> Option<&str> {
        self.companions.iter().find(|(known, _)| known == name).map(|(_, text)| text.as_str())
    }

    /// An incremental detokenizer of what comes after `before`.
    pub fn stream(&self, before: &[u32]) -> TextStream {
        TextStream::new(self.clone(), before)
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokenizer({}, vocab_size = {}, eos = {:?})", self.name(), self.vocab_size(), self.eos)
    }
}

impl HfPair {
    fn ordinary(&self) -> &HfTokenizer {
        self.ordinary.get_or_init(|| {
            let mut twin = self.special.clone();
            twin.set_encode_special_tokens(true);
            twin
        })
    }

    /// What reads a text in their place, where anything does.
    fn table(&self, text: &str) -> Option<&WordTable> {
        self.table.get_or_init(|| WordTable::of(&self.special)).as_ref().filter(|table| table.reads(text))
    }
}

impl Vocabulary {
    fn get(&self, id: u32) -> &Entry {
        self.tokens.get(id as usize).unwrap_or(&Entry::Unused)
    }

    fn append(&self, id: u32, bytes: &mut Vec<u8>) {
        match self.get(id) {
            Entry::Text(text) => bytes.extend_from_slice(text),
            Entry::Special => {}
            Entry::Unused => bytes.extend_from_slice("\u{FFFD}".as_bytes()),
        }
    }
}

/// Runs the tokenizers crate, which panics on some files where it should return an error: when it parses them, or only when
/// a text meets a step that cannot be (a fixed length of 0, a table whose entries point past its end).
fn guarded<T, E: fmt::Display>(origin: &str, run: impl FnOnce() -> std::result::Result<T, E>) -> Result<T> {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(|e| Error::tokenizer(origin, e)),
        Err(_) => Err(Error::tokenizer(origin, "its parts contradict each other; save or fetch tokenizer.json again")),
    }
}

/// Bytes of a file that is none of a model's companions, at most.
const LARGEST_FILE: u64 = 1 << 30;

/// The text of a regular file.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    Ok(lowkey_files::read_text(path, companions::largest(&name).unwrap_or(LARGEST_FILE))?)
}

/// A text as it is, or in parts where it is longer than `most` bytes.
fn bounded(text: &str, most: usize) -> Vec<&str> {
    if text.len() <= most { vec![text] } else { documents::parts(text, most.max(1)) }
}

/// Replaces `path` by `bytes` in one step: a reader sees the old file or the new one.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    Ok(lowkey_files::write(path, bytes)?)
}

#[cfg(test)]
mod tests;
