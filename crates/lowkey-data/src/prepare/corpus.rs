//! The text of a dataset as documents with their split, and the tokens made of it.

use std::collections::BTreeSet;

use super::parts::{Parts, Side};
use super::{Progress, Share, Skipped, SourceFile, Watch};
use crate::dataset::{DatasetConfig, Source, SplitBy, TokenizerConfig};
use crate::documents::{self, Format, Meter, Piece};
use crate::error::{Error, Result};
use crate::oracle::{training_story, validation_story};
use crate::sampler::mix;
use crate::tokenizer::{Tokenizer, WordCounts};

/// Text to hand to the tokenizer at a time: enough for its threads, little enough to hold.
const CHUNK_BYTES: usize = 4 << 20;

/// Text between two reports of a pass over the source.
const REPORT_BYTES: u64 = 4 << 20;

/// A piece of a document, or of one part of a document that the split cuts in two.
struct Item {
    side: Side,
    text: String,
    /// Whether the text is a document from its start.
    begins: bool,
    /// Whether the text is a document to its end. Of a text cut in two neither part is: the head does not end where it
    /// is cut, and the end of the tail is one that training never shows.
    whole: bool,
    /// Whether the next piece belongs to another document, or part.
    last: bool,
}

/// Where the held-out part begins, for a split by tail.
enum Heads {
    /// Elsewhere: the split is not by tail, or nothing is held out.
    None,
    /// Every file is one document, of which so many characters are for training.
    Characters(Vec<u64>),
    /// So many documents are for training.
    Documents(u64),
}

/// The text of a dataset, cut into splits.
pub(super) struct Corpus<'a> {
    config: &'a DatasetConfig,
    files: &'a [SourceFile],
    format: Option<Format>,
    heads: Heads,
}

impl<'a> Corpus<'a> {
    pub(super) fn new(config: &'a DatasetConfig, files: &'a [SourceFile], watch: &mut Watch) -> Result<Self> {
        let mut corpus = Self { config, files, format: config.format(), heads: Heads::None };
        let fraction = config.split.validation_fraction;
        if config.split.by != SplitBy::Tail || fraction == 0.0 || corpus.format.is_none() {
            return Ok(corpus);
        }
        let meter = Meter::default();
        // Where the tail begins is known only when all has been counted, hence a pass over the source.
        corpus.heads = if corpus.whole_files() {
            let heads = files.iter().map(|file| {
                let mut counting = || {
                    let share = Share::of_files(&meter, files);
                    watch.tell(Progress::Counting { file: file.name.clone(), share })
                };
                let count = documents::characters(&file.path, &meter, &mut counting)?;
                Ok(head_length(count, fraction))
            });
            Heads::Characters(heads.collect::<Result<_>>()?)
        } else {
            let (mut count, mut bytes) = (0, 0);
            for piece in corpus.pieces(&meter) {
                let (file, piece) = piece?;
                count += u64::from(piece.begins);
                bytes += piece.text.len() as u64;
                if bytes > REPORT_BYTES {
                    bytes = 0;
                    let share = Share::of_files(&meter, files);
                    watch.tell(Progress::Counting { file: file.name.clone(), share })?;
                }
            }
            Heads::Documents(head_length(count, fraction))
        };
        Ok(corpus)
    }

    /// Whether every file is one document, which a split by tail cuts in two.
    fn whole_files(&self) -> bool {
        matches!(self.format, Some(Format::Text { separator: None }))
    }

    /// The pieces of all documents of all files in order.
    fn pieces(&self, meter: &Meter) -> impl Iterator<Item = Result<(&'a SourceFile, Piece)>> + Send + use<'a> {
        let meter = meter.clone();
        let format = self.format.clone();
        let heads = if let Heads::Characters(heads) = &self.heads { heads.clone() } else { Vec::new() };
        self.files.iter().enumerate().flat_map(move |(i, file)| {
            let pieces = format.as_ref().map(|format| match heads.get(i) {
                Some(head) => documents::read_cut(&file.path, *head, &meter),
                None => documents::read(&file.path, format, &meter),
            });
            pieces.into_iter().flatten().map(move |piece| Ok((file, piece?)))
        })
    }

    /// How much of the source was read, of which `documents` were begun.
    fn share(&self, meter: &Meter, documents: u64) -> Share {
        match self.config.source {
            Source::Storybook { documents: train, validation_documents, .. } => {
                Share { read: documents, of: train + validation_documents }
            }
            _ => Share::of_files(meter, self.files),
        }
    }

    /// All documents with their split.
    fn items(&self, meter: &Meter) -> Box<dyn Iterator<Item = Result<Item>> + Send + 'a> {
        if let Source::Storybook { seed, documents, validation_documents, .. } = self.config.source {
            let item = |side, text| Ok(Item { side, text, begins: true, whole: true, last: true });
            let train = (0..documents).map(move |i| item(Side::Train, training_story(seed, i).text));
            let held = (0..validation_documents).map(move |i| item(Side::Validation, validation_story(seed, i).text));
            return Box::new(train.chain(held));
        }
        if let Heads::Characters(_) = self.heads {
            return Box::new(self.pieces(meter).map(|piece| {
                let (_, Piece { text, begins, ends, tail }) = piece?;
                let side = if tail { Side::Validation } else { Side::Train };
                Ok(Item { side, text, begins: begins && !tail, whole: false, last: ends })
            }));
        }
        let split = self.config.split.clone();
        let head = if let Heads::Documents(head) = self.heads { head } else { u64::MAX };
        let mut begun = 0;
        Box::new(self.pieces(meter).map(move |piece| {
            let (_, Piece { text, begins, ends, .. }) = piece?;
            begun += u64::from(begins);
            let index = begun - 1;
            let held = match split.by {
                SplitBy::Tail => index >= head,
                SplitBy::Documents => is_held(index, split.validation_fraction),
            };
            let side = if held { Side::Validation } else { Side::Train };
            Ok(Item { side, text, begins, whole: ends, last: ends })
        }))
    }

    /// The tokenizer that the dataset file asks to be built from the text itself.
    pub(super) fn build_tokenizer(&self, watch: &mut Watch) -> Result<Tokenizer> {
        let bpe = if let TokenizerConfig::Bpe { vocab_size } = self.config.tokenizer { Some(vocab_size) } else { None };
        let (mut words, mut alphabet) = (WordCounts::default(), BTreeSet::new());
        let (mut bytes, mut reported, mut documents) = (0, 0, 0);
        let meter = Meter::default();
        watch.tell(Progress::BuildingTokenizer { bytes, share: self.share(&meter, documents) })?;
        for item in self.items(&meter) {
            let item = item?;
            documents += u64::from(item.begins);
            match bpe {
                Some(_) if item.side == Side::Train => words.add(&item.text),
                Some(_) => continue,
                None => alphabet.extend(item.text.chars()),
            }
            bytes += item.text.len() as u64;
            if bytes - reported > REPORT_BYTES {
                reported = bytes;
                watch.tell(Progress::BuildingTokenizer { bytes, share: self.share(&meter, documents) })?;
            }
        }
        if bytes == 0 {
            return Err(self.no_text());
        }
        match bpe {
            Some(vocab_size) => {
                watch.tell(Progress::LearningMerges { words: words.len() as u64 })?;
                Tokenizer::from_words(words, vocab_size)
            }
            None => Tokenizer::from_alphabet(&alphabet),
        }
    }

    /// Tokenises what is not in the parts yet.
    pub(super) fn tokenize(&self, tokenizer: &Tokenizer, mut parts: Parts, watch: &mut Watch) -> Result<()> {
        let meter = Meter::default();
        let mut items = self.items(&meter);
        let end = tokenizer.text_end();
        let mut done = 0;
        let mut passed = 0;
        while done < parts.items() {
            let Some(item) = items.next() else { break };
            passed += item?.text.len() as u64;
            done += 1;
            if passed > REPORT_BYTES {
                passed = 0;
                self.report(&parts, &meter, watch)?;
            }
        }
        loop {
            let (mut texts, mut rest, mut bytes) = (Vec::new(), Vec::new(), 0);
            for item in items.by_ref() {
                let item = item?;
                bytes += item.text.len();
                rest.push((item.side, item.begins, item.whole, item.last));
                texts.push(item.text);
                if bytes >= CHUNK_BYTES {
                    break;
                }
            }
            if texts.is_empty() {
                break;
            }
            done += texts.len() as u64;
            let encoded = tokenizer.encode_documents(&texts)?;
            for ((mut ids, text), (side, begins, whole, last)) in encoded.into_iter().zip(&texts).zip(rest) {
                if begins {
                    ids.splice(0..0, tokenizer.text_start().iter().copied());
                }
                if whole {
                    ids.extend(&end);
                }
                let writer = parts.writer(side);
                writer.extend(&ids, text.len() as u64)?;
                if last {
                    writer.end_document();
                }
            }
            parts.reached(done, &Skipped::default())?;
            self.report(&parts, &meter, watch)?;
        }
        self.check_splits(&parts)?;
        parts.finish(done, &Skipped::default())
    }

    fn report(&self, parts: &Parts, meter: &Meter, watch: &mut Watch) -> Result<()> {
        let (documents, tokens) = (parts.documents(), parts.tokens());
        watch.tell(Progress::Tokenizing { documents, tokens, share: self.share(meter, documents) })
    }

    /// Refuses a split without text where the dataset file asks for some. A single document is no reason to: where nothing can
    /// be held out, nothing is.
    fn check_splits(&self, parts: &Parts) -> Result<()> {
        let documents = parts.documents();
        let uncut = match &self.format {
            Some(Format::Text { separator: Some(separator) }) if documents <= self.files.len() as u64 => {
                self.check_line_ends(separator)?;
                format!(" (source.separator = {separator:?} cuts none of the source's files in two)")
            }
            _ => String::new(),
        };
        let wanted = self.format.is_some() && self.config.split.validation_fraction > 0.0;
        let by_documents = self.config.split.by == SplitBy::Documents;
        match (parts.tokens_of(Side::Train), parts.tokens_of(Side::Validation)) {
            (0, 0) => Err(self.no_text()),
            (0, _) => Err(self.empty(&format!(
                "the split leaves none of {documents} documents for training{uncut}; add text, or lower \
                 split.validation_fraction"
            ))),
            (_, 0) if wanted && by_documents && self.whole_files() => Err(self.empty(&format!(
                "split.by = \"documents\" holds whole documents out, and here a file is one ({documents} in all): set \
                 split.by = \"tail\" to hold out the end of each file, or name the string between its documents with \
                 source.separator"
            ))),
            (_, 0) if wanted && documents > 1 => Err(self.empty(&format!(
                "the split holds no text out: none of {documents} documents falls to it{uncut}; raise \
                 split.validation_fraction, set split.by = \"tail\", or split.validation_fraction = 0 to hold nothing out"
            ))),
            _ => Ok(()),
        }
    }

    /// Refuses a separator of line ends that a file has in the other spelling only.
    fn check_line_ends(&self, separator: &str) -> Result<()> {
        let other =
            if separator.contains("\r\n") { separator.replace("\r\n", "\n") } else { separator.replace('\n', "\r\n") };
        if other == separator {
            return Ok(());
        }
        for file in self.files {
            if !documents::holds(&file.path, separator)? && documents::holds(&file.path, &other)? {
                let name = lowkey_files::printable(&file.name).into_owned();
                let (ends, written) = if other.contains('\r') { ("\\r\\n", "") } else { ("\\n", " alone") };
                return Err(self.config.error(format!(
                    "source.separator = {separator:?} is never found, because the lines of {name} end in {ends}{written}: \
                     set source.separator = {other:?}"
                )));
            }
        }
        Ok(())
    }

    /// All files are there, and empty.
    fn no_text(&self) -> Error {
        let names: Vec<&str> = self.files.iter().take(3).map(|file| file.name.as_str()).collect();
        let more = if self.files.len() > names.len() { " …" } else { "" };
        let named = if names.is_empty() { String::new() } else { format!(" ({}{more})", names.join(", ")) };
        self.empty(&format!("the source holds no text; check its paths{named}"))
    }

    fn empty(&self, message: &str) -> Error {
        self.config.empty(message)
    }
}

/// Whether document `index` falls to the held-out part of a split by documents.
pub(super) fn is_held(index: u64, fraction: f64) -> bool {
    // 2^64 as a float: the hash is uniform below it. That of the first document lies above one half, so that a single one is for
    // training.
    (mix(index) as f64) < fraction * 18_446_744_073_709_551_616.0
}

/// How many of `count` are not held out, as `int(n * 0.9)` has it elsewhere; at least one, if there is one.
pub(super) fn head_length(count: u64, fraction: f64) -> u64 {
    ((count as f64 * (1.0 - fraction)) as u64).max(1)
}
