//! From a shard to batches, as a pure function of (seed, step).
//!
//! Nothing is drawn from a generator that has a state: which row comes when is computed from the seed and the row's
//! number. So a run resumed at step 1000 sees what an unbroken one would, on any machine, and a row can be asked for
//! twice or out of order.

mod mixture;
mod permutation;
mod records;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use lowkey_batch::{Batch, IGNORE};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::shard::Shard;
pub use mixture::Mixture;
use permutation::Permutation;
pub(crate) use permutation::mix;
pub use records::{LeftOut, TooLong};

/// How rows are cut from the documents.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Packing {
    /// Windows cut anywhere from the stream of all documents: for one long text. The stream is taken as a ring and
    /// starts each epoch at another place, so that the few tokens that fill no window are others each time.
    #[default]
    Stream,
    /// A row starts at a document's start and holds whole documents, drawn in another order each epoch, the last one
    /// cropped at the row's end (what is cropped is left out for this epoch). A document longer than a row is cut into
    /// pieces first. The last row of an epoch is padded.
    Documents,
}

/// Appends the tokens in `range` as positions, each predicting the token after it, if the shard has one. Every
/// document bound inside starts a new document.
fn segment(batch: &mut Batch, shard: &Shard, range: Range<usize>, mask: bool) -> Result<()> {
    let first = batch.column();
    let mut tokens = Vec::with_capacity(range.len() + 1);
    shard.copy_range(range.start..range.end + 1, &mut tokens)?;
    batch.input_ids.extend(&tokens[..range.len().min(tokens.len())]);
    if shard.is_masked() {
        let mut learnt = Vec::with_capacity(range.len());
        shard.copy_learnt(range.start + 1..range.end + 1, &mut learnt)?;
        let target = |(&token, learnt)| if learnt { i64::from(token) } else { IGNORE };
        batch.targets.extend(tokens.iter().skip(1).zip(learnt).map(target));
    } else {
        batch.targets.extend(tokens.iter().skip(1).map(|&token| i64::from(token)));
    }
    batch.targets.resize(batch.input_ids.len(), IGNORE);
    if !mask {
        batch.document_starts.resize(batch.input_ids.len(), 0);
        return Ok(());
    }
    let mut document = shard.document_at(range.start);
    let mut at = range.start;
    while at < range.end {
        let bounds = document.and_then(|i| shard.document_range(i));
        let end = bounds.map_or(range.end, |bounds| bounds.end.min(range.end));
        let start = first + (at - range.start);
        batch.document_starts.resize(batch.document_starts.len() + (end - at), start as u32);
        at = end;
        document = document.map(|i| i + 1);
    }
    Ok(())
}

/// A part of one document that fits a row: input positions, each of which has a next token in the document.
#[derive(Debug, Clone, Copy)]
struct Piece {
    start: usize,
    len: u32,
}

impl Piece {
    fn range(self) -> Range<usize> {
        self.start..self.start + self.len as usize
    }
}

/// All documents as pieces of at most `seq_len` positions. A document's last token is no input: nothing follows it.
fn pieces(shard: &Shard, seq_len: usize) -> Vec<Piece> {
    let documents = (0..shard.documents()).filter_map(|i| shard.document_range(i));
    documents
        .flat_map(|range| {
            let last = range.end - 1;
            let len = move |start: usize| (last - start).min(seq_len) as u32;
            (range.start..last).step_by(seq_len).map(move |start| Piece { start, len: len(start) })
        })
        .collect()
}

/// Cuts training batches from a shard.
pub struct Sampler {
    shard: Arc<Shard>,
    seq_len: usize,
    batch_size: usize,
    seed: u64,
    mask_documents: bool,
    order: Order,
    left_out: LeftOut,
}

enum Order {
    Stream {
        windows: u64,
    },
    Documents {
        pieces: Vec<Piece>,
        plans: Mutex<Plans>,
        crop: Crop,
    },
    /// A document a row, and both of a pair one after the other.
    Pairs {
        pairs: Vec<[Piece; 2]>,
    },
}

/// What happens to a document that does not fit behind those which stand in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Crop {
    /// Its end is left out.
    Yes,
    /// It begins the next row.
    No,
}

/// How many rows an epoch of packed documents has depends on its order, so epochs are laid end to end. This is a cache
/// and no state: it can be thrown away at any time.
struct Plans {
    /// Row number at which each epoch seen so far ends.
    ends: Vec<u64>,
    latest: Arc<Plan>,
}

/// One epoch of packed documents.
struct Plan {
    first_row: u64,
    order: Permutation,
    /// Position in the order at which each row starts, and the number of pieces at the end.
    starts: Vec<u64>,
}

impl Plan {
    fn new(pieces: &[Piece], seq_len: usize, crop: Crop, key: u64, first_row: u64) -> Self {
        let order = Permutation::new(pieces.len() as u64, key);
        let mut starts = Vec::new();
        let mut filled = seq_len;
        for position in 0..pieces.len() as u64 {
            let len = pieces[order.apply(position) as usize].len as usize;
            let full = match crop {
                Crop::Yes => filled >= seq_len,
                Crop::No => filled + len > seq_len,
            };
            if full {
                starts.push(position);
                filled = 0;
            }
            filled += len;
        }
        starts.push(pieces.len() as u64);
        Self { first_row, order, starts }
    }

    fn rows(&self) -> u64 {
        self.starts.len() as u64 - 1
    }

    fn contains(&self, row: u64) -> bool {
        (self.first_row..self.first_row + self.rows()).contains(&row)
    }
}

impl Order {
    fn documents(pieces: Vec<Piece>, seq_len: usize, crop: Crop, seed: u64) -> Self {
        let latest = Arc::new(Plan::new(&pieces, seq_len, crop, epoch_key(seed, 0), 0));
        let plans = Mutex::new(Plans { ends: vec![latest.rows()], latest });
        Self::Documents { pieces, plans, crop }
    }
}

fn check_sizes(shard: &Shard, seq_len: usize, batch_size: usize) -> Result<()> {
    if seq_len > 0 && batch_size > 0 && u32::try_from(seq_len).is_ok() {
        return Ok(());
    }
    let message = format!("seq_len = {seq_len} and batch_size = {batch_size} must both be at least 1");
    Err(Error::Sampler { path: shard.path().to_path_buf(), message })
}

impl Sampler {
    /// A sampler over `shard`. With `mask_documents` off, every position may attend to the whole row before it.
    ///
    /// Documents of which only some tokens are learnt are never cut and fill rows as [`Sampler::of_records`] says, those that are
    /// longer than a row being left out.
    pub fn new(
        shard: Arc<Shard>,
        seq_len: usize,
        batch_size: usize,
        seed: u64,
        packing: Packing,
        mask_documents: bool,
    ) -> Result<Self> {
        if shard.is_masked() && packing == Packing::Documents {
            return Self::of_records(shard, seq_len, batch_size, seed, TooLong::Drop, mask_documents);
        }
        check_sizes(&shard, seq_len, batch_size)?;
        let refuse = |message: String| Err(Error::Sampler { path: shard.path().to_path_buf(), message });
        let order = match packing {
            Packing::Stream => {
                if shard.is_masked() {
                    return refuse(
                        "its documents are records, which are not cut: packing must be \"documents\"".to_owned(),
                    );
                }
                if shard.len() <= seq_len {
                    let tokens = shard.len();
                    return refuse(format!("it has {tokens} tokens, too few for seq_len = {seq_len}: lower it"));
                }
                Order::Stream { windows: (shard.len() / seq_len) as u64 }
            }
            Packing::Documents => {
                let pieces = pieces(&shard, seq_len);
                if pieces.is_empty() {
                    return refuse("no document has two tokens, so there is nothing to predict".to_owned());
                }
                Order::documents(pieces, seq_len, Crop::Yes, seed)
            }
        };
        Ok(Self { shard, seq_len, batch_size, seed, mask_documents, order, left_out: LeftOut::default() })
    }

    /// The batch of a step: rows `step * batch_size` and on.
    ///
    /// # Errors
    /// [`Error::Shard`] where the shard is no longer what was opened, [`Error::Io`] from the disk.
    pub fn batch(&self, step: u64) -> Result<Batch> {
        self.rows(step.saturating_mul(self.batch_size as u64), self.batch_size)
    }

    /// `count` consecutive rows from number `first` on, epoch after epoch without a seam; a part of a step's batch, for
    /// one that is worked through in several.
    ///
    /// # Errors
    /// [`Error::Shard`] where the shard is no longer what was opened, [`Error::Io`] from the disk.
    pub fn rows(&self, first: u64, count: usize) -> Result<Batch> {
        let mut batch = Batch { pairs: self.is_pairs(), ..Batch::with_capacity(self.seq_len, count) };
        for row in (0..count as u64).map(|i| first.saturating_add(i)) {
            self.append(row, &mut batch)?;
        }
        Ok(batch)
    }

    /// Appends a row.
    fn append(&self, row: u64, batch: &mut Batch) -> Result<()> {
        match &self.order {
            Order::Stream { windows } => self.window(*windows, row, batch)?,
            Order::Documents { pieces, plans, crop } => {
                let (_, plan) = self.plan(pieces, plans, *crop, row);
                self.packed(pieces, &plan, row, batch)?;
            }
            Order::Pairs { pairs } => {
                let (count, pair) = (pairs.len() as u64, row / 2);
                let order = Permutation::new(count, epoch_key(self.seed, pair / count));
                self.segment(batch, pairs[order.apply(pair % count) as usize][(row % 2) as usize].range())?;
            }
        }
        batch.end_row(self.mask_documents);
        Ok(())
    }

    /// Whether rows 2i and 2i + 1 are an answer that was chosen and one that was rejected.
    pub fn is_pairs(&self) -> bool {
        matches!(self.order, Order::Pairs { .. })
    }

    /// How many epochs have been seen before `step`, as 1.5 for one and a half.
    pub fn epoch(&self, step: u64) -> f64 {
        self.epoch_at(step.saturating_mul(self.batch_size as u64))
    }

    /// How many epochs have been seen before a row.
    fn epoch_at(&self, row: u64) -> f64 {
        match &self.order {
            Order::Stream { windows } => row as f64 / *windows as f64,
            Order::Documents { pieces, plans, crop } => {
                let (epoch, plan) = self.plan(pieces, plans, *crop, row);
                epoch as f64 + (row - plan.first_row) as f64 / plan.rows() as f64
            }
            Order::Pairs { pairs } => row as f64 / (2 * pairs.len()) as f64,
        }
    }

    fn window(&self, windows: u64, row: u64, batch: &mut Batch) -> Result<()> {
        let key = epoch_key(self.seed, row / windows);
        let tokens = self.shard.len();
        let phase = (mix(key ^ 1) % tokens as u64) as usize;
        let window = Permutation::new(windows, key).apply(row % windows) as usize;
        let start = (phase + window * self.seq_len) % tokens;
        let end = (start + self.seq_len).min(tokens);
        self.segment(batch, start..end)?;
        // Where the ring closes nothing is predicted: the shard's last token has no successor.
        let wrapped = self.seq_len - (end - start);
        if wrapped > 0 {
            self.segment(batch, 0..wrapped)?;
        }
        Ok(())
    }

    fn packed(&self, pieces: &[Piece], plan: &Plan, row: u64, batch: &mut Batch) -> Result<()> {
        let row = (row - plan.first_row) as usize;
        for position in plan.starts[row]..plan.starts[row + 1] {
            let range = pieces[plan.order.apply(position) as usize].range();
            let room = self.seq_len - batch.column();
            self.segment(batch, range.start..range.end.min(range.start + room))?;
        }
        Ok(())
    }

    fn segment(&self, batch: &mut Batch, range: Range<usize>) -> Result<()> {
        segment(batch, &self.shard, range, self.mask_documents)
    }

    /// The epoch that `row` falls in.
    fn plan(&self, pieces: &[Piece], plans: &Mutex<Plans>, crop: Crop, row: u64) -> (u64, Arc<Plan>) {
        // A poisoned lock holds a whole cache all the same: it is only ever replaced in one assignment.
        let mut plans = plans.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let epoch = plans.ends.partition_point(|&end| end <= row);
            if plans.latest.contains(row) {
                return (epoch as u64, Arc::clone(&plans.latest));
            }
            let epoch = epoch.min(plans.ends.len());
            let first_row = if epoch == 0 { 0 } else { plans.ends[epoch - 1] };
            let key = epoch_key(self.seed, epoch as u64);
            plans.latest = Arc::new(Plan::new(pieces, self.seq_len, crop, key, first_row));
            if epoch == plans.ends.len() {
                let end = first_row + plans.latest.rows();
                plans.ends.push(end);
            }
        }
    }
}

fn epoch_key(seed: u64, epoch: u64) -> u64 {
    mix(mix(seed) ^ epoch)
}

/// The whole of a held-out shard once and in order, for a loss that can be compared between runs: every token that a
/// training row could predict is a target exactly once.
///
/// A stream is cut into consecutive windows, and its one first token is no target. Documents are laid into rows one
/// after the other without cropping, a row being padded where the next piece would not fit. Of documents of which only some tokens are
/// learnt those are the targets, and a piece without any is left out. Pairs have a document a row, and those longer than a row
/// are left out. The last batch may have fewer rows. `max_batches` keeps only the first ones. An error is [`Error::Shard`] or
/// [`Error::Io`], as of [`Shard::document`].
pub fn validation_batches(
    shard: &Shard,
    seq_len: usize,
    batch_size: usize,
    max_batches: Option<usize>,
    packing: Packing,
    mask_documents: bool,
) -> impl Iterator<Item = Result<Batch>> + use<'_> {
    let (seq_len, batch_size) =
        (seq_len.max(1), batch_size.max(1).next_multiple_of(if shard.is_pairs() { 2 } else { 1 }));
    let (windows, mut failed) = match held_out(shard, seq_len, packing) {
        Ok(windows) => (windows, None),
        Err(error) => (Vec::new(), Some(error)),
    };
    let mut next = 0;
    let batches = std::iter::from_fn(move || {
        if let Some(error) = failed.take() {
            return Some(Err(error));
        }
        let mut batch = Batch { pairs: shard.is_pairs(), ..Batch::with_capacity(seq_len, batch_size) };
        while batch.rows < batch_size && next < windows.len() {
            while let Some(piece) = windows.get(next)
                && batch.column() + piece.len as usize <= seq_len
                && (batch.column() == 0 || !shard.is_pairs())
            {
                if let Err(error) = segment(&mut batch, shard, piece.range(), mask_documents) {
                    next = windows.len();
                    return Some(Err(error));
                }
                next += 1;
            }
            batch.end_row(mask_documents);
        }
        (batch.rows > 0).then_some(Ok(batch))
    });
    batches.take(max_batches.unwrap_or(usize::MAX))
}

/// The pieces of a held-out shard.
fn held_out(shard: &Shard, seq_len: usize, packing: Packing) -> Result<Vec<Piece>> {
    match packing {
        _ if shard.is_pairs() => Ok(records::pairs(shard, seq_len, TooLong::Drop)?.0.concat()),
        _ if shard.is_masked() => records::with_targets(shard, pieces(shard, seq_len)),
        Packing::Documents => Ok(pieces(shard, seq_len)),
        Packing::Stream => {
            let last = shard.len().saturating_sub(1);
            let window = |start: usize| Piece { start, len: (last - start).min(seq_len) as u32 };
            Ok((0..last).step_by(seq_len).map(window).collect())
        }
    }
}

#[cfg(test)]
mod tests;
