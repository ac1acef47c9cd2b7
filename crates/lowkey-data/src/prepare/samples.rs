//! The records of a dataset as documents of which some tokens are learnt, with their split.

use rayon::prelude::*;

use super::parts::{Parts, Side};
use super::{Progress, Share, Skipped, SourceFile, Watch};
use crate::dataset::{DatasetConfig, Source, SplitBy, StorybookForm};
use crate::documents::{self, Found, Meter};
use crate::error::{Error, Result};
use crate::oracle;
use crate::records::Records;
use crate::samples::{Document, Method, conversation, documents as documents_of};
use crate::shard::ShardWriter;
use crate::storybook::{exchange, pair};
use crate::tokenizer::Tokenizer;

use super::corpus::{head_length, is_held};

/// Records between two reports.
const REPORT: u64 = 1024;

/// Tokenises the records that are not in the parts yet, and says which were left out.
pub(super) fn tokenize(
    config: &DatasetConfig,
    files: &[SourceFile],
    tokenizer: &Tokenizer,
    method: &Method,
    mut parts: Parts,
    watch: &mut Watch,
) -> Result<Skipped> {
    let mut skipped = parts.skipped();
    let push = |writer: &mut ShardWriter, documents: Vec<Document>| {
        documents.iter().try_for_each(|d| writer.push_learnt(&d.ids, &d.learnt, d.bytes))
    };
    if let Source::Storybook { seed, documents, validation_documents, form } = config.source {
        let training = documents;
        for (count, held) in [(documents, false), (validation_documents, true)] {
            let made = |index: u64| {
                let story = |index: u64| {
                    if held { oracle::validation_story(seed, index) } else { oracle::training_story(seed, index) }
                };
                // A story has other answers than most: the first of the next hundred is far from the last.
                let chats = match form {
                    StorybookForm::Pairs => {
                        pair(&story(index), (index + 1..index + 100).map(story)).map(Vec::from).unwrap_or_default()
                    }
                    StorybookForm::Chat | StorybookForm::Text => vec![exchange(&story(index)).chat],
                };
                let of = |chat: &_| conversation(chat, method, tokenizer);
                let told: std::result::Result<Vec<Document>, String> = chats.iter().map(of).collect();
                told.map_err(|why| config.error(format!("story {index}: {why}"))).map(|told| (index, told))
            };
            for made in many(0..count, || false, made) {
                let (index, told) = made?;
                push(parts.writer(if held { Side::Validation } else { Side::Train }), told)?;
                let read = if held { training + index } else { index };
                let share = || Share { read, of: training + validation_documents };
                report(index, &parts, share, watch)?;
            }
        }
    }
    let Some(records) = config.records() else {
        parts.finish(0, &skipped)?;
        return Ok(skipped);
    };
    let fraction = config.split.validation_fraction;
    let head = match config.split.by {
        SplitBy::Tail if fraction > 0.0 => head_length(count(config, files, watch)?, fraction),
        _ => u64::MAX,
    };
    let (mut index, meter) = (0, Meter::default());
    let made = |found: Result<Found>| -> Result<_> {
        let Found { unit, number, value } = found?;
        let record = value.and_then(|object| records.read(&object, config.list()));
        Ok((unit, number, record.and_then(|record| documents_of(record, method, tokenizer))))
    };
    for file in files {
        let mut records = found(config, file, &meter);
        while index < parts.items()
            && let Some(passed) = records.next()
        {
            passed?;
            index += 1;
            report(index, &parts, || Share::of_files(&meter, files), watch)?;
        }
        for made in many(records, weighed(&meter), made) {
            let (unit, number, documents) = made?;
            match documents {
                Ok(documents) => {
                    let held = match config.split.by {
                        SplitBy::Tail => index >= head,
                        SplitBy::Documents => is_held(index, fraction),
                    };
                    push(parts.writer(if held { Side::Validation } else { Side::Train }), documents)?;
                }
                Err(message) if config.chat.skip_bad => {
                    let name = &file.name;
                    skipped.first.get_or_insert_with(|| format!("{name}: {unit} {number}: {message}"));
                    skipped.records += 1;
                }
                Err(message) => return Err(Error::Record { path: file.path.clone(), unit, number, message }),
            }
            index += 1;
            parts.reached(index, &skipped)?;
            report(index, &parts, || Share::of_files(&meter, files), watch)?;
        }
    }
    check(config, &parts, &skipped)?;
    parts.finish(index, &skipped)?;
    Ok(skipped)
}

/// What `make` makes of each item, in their order: of some at once, as many threads as there are. Asked after each, `full` says whether those
/// that wait are enough.
fn many<T: Send, R: Send>(
    items: impl Iterator<Item = T>,
    mut full: impl FnMut() -> bool,
    make: impl Fn(T) -> R + Sync,
) -> impl Iterator<Item = R> {
    /// Enough for all threads of a large machine.
    const AT_ONCE: usize = 256;
    let mut items = items;
    std::iter::from_fn(move || {
        let mut some = Vec::new();
        while some.len() < AT_ONCE
            && let Some(item) = items.next()
        {
            some.push(item);
            if full() {
                break;
            }
        }
        (!some.is_empty()).then(|| some.into_par_iter().map(&make).collect::<Vec<R>>())
    })
    .flatten()
}

/// Says each time that so much of the source has been read that its records are enough to hold at once.
fn weighed(meter: &Meter) -> impl FnMut() -> bool {
    /// Bytes on the disk.
    const HELD: u64 = 8 << 20;
    let (meter, mut from) = (meter.clone(), meter.bytes());
    move || {
        let full = meter.bytes() - from >= HELD;
        from = if full { meter.bytes() } else { from };
        full
    }
}

/// The records of one file.
fn found(config: &DatasetConfig, file: &SourceFile, meter: &Meter) -> documents::FoundRecords {
    let fields = config.records().map(|records| records.fields(config.list())).unwrap_or_default();
    match config.format() {
        Some(format) => documents::records(&file.path, &format, &fields, meter),
        None => Box::new(std::iter::empty()),
    }
}

/// How many records there are, those that cannot be used included: what is left out moves no other to the other side.
fn count(config: &DatasetConfig, files: &[SourceFile], watch: &mut Watch) -> Result<u64> {
    let (mut count, meter) = (0, Meter::default());
    for file in files {
        for found in found(config, file, &meter) {
            found?;
            count += 1;
            if count % REPORT == 0 {
                let share = Share::of_files(&meter, files);
                watch.tell(Progress::Counting { file: file.name.clone(), share })?;
            }
        }
    }
    Ok(count)
}

fn report(index: u64, parts: &Parts, share: impl FnOnce() -> Share, watch: &mut Watch) -> Result<()> {
    if !index.is_multiple_of(REPORT) {
        return Ok(());
    }
    let (documents, tokens) = (parts.documents(), parts.tokens());
    watch.tell(Progress::Tokenizing { documents, tokens, share: share() })
}

/// Refuses a split without records where the dataset file asks for some. A single record is no reason to.
fn check(config: &DatasetConfig, parts: &Parts, skipped: &Skipped) -> Result<()> {
    let documents = parts.documents();
    let left_out = match &skipped.first {
        Some(first) => format!(" ({} were left out; the first: {first})", skipped.records),
        None => String::new(),
    };
    let one = if config.records() == Some(Records::Preference) { 2 } else { 1 };
    match (parts.tokens_of(Side::Train), parts.tokens_of(Side::Validation)) {
        (0, 0) => Err(config.empty(&format!("the source holds no record that can be used{left_out}"))),
        (0, _) => Err(config.empty(&format!(
            "the split leaves no record for training{left_out}; add some, or lower split.validation_fraction"
        ))),
        (_, 0) if config.split.validation_fraction > 0.0 && documents > one => Err(config.empty(&format!(
            "the split holds no record out{left_out}; raise split.validation_fraction, set split.by = \"tail\", or \
             split.validation_fraction = 0 to hold nothing out"
        ))),
        _ => Ok(()),
    }
}
