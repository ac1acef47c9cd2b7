//! The text of a dataset as documents with their split, and the tokens made of it.

use std::collections::BTreeSet;
use std::path::Path;

use super::{Progress, SourceFile};
use crate::dataset::{DatasetConfig, Source, SplitBy, TokenizerConfig};
use crate::documents::{self, Format};
use crate::error::{Error, Result};
use crate::oracle::{training_story, validation_story};
use crate::sampler::mix;
use crate::shard::ShardWriter;
use crate::tokenizer::Tokenizer;

/// Text to hand to the tokenizer at a time: enough for its threads, little enough to hold.
const CHUNK_BYTES: usize = 8 << 20;

/// Which split a document belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Train,
    Validation,
}

/// One document, or one part of a document that the split cuts in two.
struct Item {
    side: Side,
    text: String,
    /// Whether the text is a document from its start.
    begins: bool,
    /// Whether the text is a document to its end. Of a text cut in two neither part is: the head does not end where it
    /// is cut, and the end of the tail is one that training never shows.
    whole: bool,
}

/// The text of a dataset, cut into splits.
pub(super) struct Corpus<'a> {
    config: &'a DatasetConfig,
    files: &'a [SourceFile],
    format: Option<Format>,
    /// For a split by tail over many documents: how many of them are for training.
    head: u64,
}

impl<'a> Corpus<'a> {
    pub(super) fn new(config: &'a DatasetConfig, files: &'a [SourceFile]) -> Result<Self> {
        let mut corpus = Self { config, files, format: config.format(), head: u64::MAX };
        let fraction = config.split.validation_fraction;
        if config.split.by == SplitBy::Tail && fraction > 0.0 && !corpus.whole_files() && corpus.format.is_some() {
            // Where the tail begins is known only when all have been counted, hence a pass over the source.
            let count = corpus.documents().try_fold(0u64, |count, document| document.map(|_| count + 1))?;
            corpus.head = head_length(count, fraction);
        }
        Ok(corpus)
    }

    /// Whether every file is one document, which a split by tail cuts in two.
    fn whole_files(&self) -> bool {
        matches!(self.format, Some(Format::Text { separator: None }))
    }

    /// All documents of all files in order.
    fn documents(&self) -> impl Iterator<Item = Result<String>> + Send + use<'a> {
        let format = self.format.clone();
        self.files.iter().flat_map(move |file| {
            let documents = format.as_ref().map(|format| documents::read(&file.path, format));
            documents.into_iter().flatten()
        })
    }

    /// All documents with their split.
    fn items(&self) -> Box<dyn Iterator<Item = Result<Item>> + Send + 'a> {
        if let Source::Storybook { seed, documents, validation_documents } = self.config.source {
            let item = |side, text| Ok(Item { side, text, begins: true, whole: true });
            let train = (0..documents).map(move |i| item(Side::Train, training_story(seed, i).text));
            let held = (0..validation_documents).map(move |i| item(Side::Validation, validation_story(seed, i).text));
            return Box::new(train.chain(held));
        }
        let split = self.config.split.clone();
        let fraction = split.validation_fraction;
        if self.whole_files() && split.by == SplitBy::Tail && fraction > 0.0 {
            return Box::new(self.documents().flat_map(move |document| match document {
                Err(error) => vec![Err(error)],
                Ok(text) => {
                    let head = head_length(text.chars().count() as u64, fraction) as usize;
                    let cut = text.char_indices().nth(head).map_or(text.len(), |(at, _)| at);
                    let part = |side, text: &str| {
                        Ok(Item { side, text: text.to_owned(), begins: side == Side::Train, whole: false })
                    };
                    vec![part(Side::Train, &text[..cut]), part(Side::Validation, &text[cut..])]
                }
            }));
        }
        let head = self.head;
        Box::new((0..).zip(self.documents()).map(move |(index, document)| {
            let held = match split.by {
                SplitBy::Tail => index >= head,
                // 2^64 as a float: the hash is uniform below it.
                SplitBy::Documents => (mix(index) as f64) < fraction * 18_446_744_073_709_551_616.0,
            };
            let side = if held { Side::Validation } else { Side::Train };
            Ok(Item { side, text: document?, begins: true, whole: true })
        }))
    }

    /// The tokenizer that the dataset file asks to be built from the text itself.
    pub(super) fn build_tokenizer(&self) -> Result<Tokenizer> {
        if let TokenizerConfig::Bpe { vocab_size } = self.config.tokenizer {
            let mut failed = None;
            let texts = self.items().map_while(|item| item.map_err(|error| failed = Some(error)).ok());
            let texts = texts.filter(|item| item.side == Side::Train).map(|item| item.text);
            let tokenizer = Tokenizer::train_bpe(texts, vocab_size);
            return failed.map_or(tokenizer, Err);
        }
        let mut alphabet = BTreeSet::new();
        for item in self.items() {
            alphabet.extend(item?.text.chars());
        }
        if alphabet.is_empty() {
            return Err(self.empty("the source holds no text; check its paths"));
        }
        Tokenizer::from_alphabet(&alphabet)
    }

    pub(super) fn tokenize(
        &self,
        tokenizer: &Tokenizer,
        train: &Path,
        validation: &Path,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<()> {
        let mut train = ShardWriter::create(train, tokenizer.vocab_size())?;
        let mut validation = ShardWriter::create(validation, tokenizer.vocab_size())?;
        let mut items = self.items();
        let end = tokenizer.text_end();
        loop {
            let (mut texts, mut rest, mut bytes) = (Vec::new(), Vec::new(), 0);
            for item in items.by_ref() {
                let item = item?;
                bytes += item.text.len();
                rest.push((item.side, item.begins, item.whole));
                texts.push(item.text);
                if bytes >= CHUNK_BYTES {
                    break;
                }
            }
            if texts.is_empty() {
                break;
            }
            let encoded = tokenizer.encode_documents(&texts)?;
            for ((mut ids, text), (side, begins, whole)) in encoded.into_iter().zip(&texts).zip(rest) {
                if begins && !text.is_empty() {
                    ids.splice(0..0, tokenizer.text_start().iter().copied());
                }
                if whole && !text.is_empty() {
                    ids.extend(&end);
                }
                let writer = if side == Side::Train { &mut train } else { &mut validation };
                writer.push(&ids, text.len() as u64)?;
            }
            let documents = train.documents() + validation.documents();
            progress(Progress::Tokenizing { documents, tokens: train.tokens() + validation.tokens() });
        }
        let wanted = match self.config.source {
            Source::Storybook { validation_documents, .. } => validation_documents > 0,
            _ => self.config.split.validation_fraction > 0.0,
        };
        match (train.tokens(), validation.tokens()) {
            (0, 0) => return Err(self.empty("the source holds no text; check its paths")),
            (0, _) => {
                return Err(
                    self.empty("the split leaves no text for training; add text, or lower split.validation_fraction")
                );
            }
            (_, 0) if wanted => {
                let mend = "raise split.validation_fraction, or set it to 0 to hold nothing out";
                return Err(self.empty(&format!("the split holds no text out; {mend}")));
            }
            _ => {}
        }
        train.finish()?;
        validation.finish()
    }

    fn empty(&self, message: &str) -> Error {
        let origin = &self.config.origin;
        let name = if origin.as_os_str().is_empty() { self.config.name.clone() } else { origin.display().to_string() };
        Error::Empty { name, message: message.to_owned() }
    }
}

/// How many of `count` are not held out, as `int(n * 0.9)` has it elsewhere.
pub(super) fn head_length(count: u64, fraction: f64) -> u64 {
    (count as f64 * (1.0 - fraction)) as u64
}
