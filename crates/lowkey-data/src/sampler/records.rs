//! Documents of which only some tokens are learnt: whole in a row, or left out.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Crop, Order, Piece, Sampler, check_sizes};
use crate::error::{Error, Result};
use crate::shard::Shard;

/// What happens to a record that is longer than a training sequence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TooLong {
    /// It is left out, of a pair the other one, too.
    #[default]
    Drop,
    /// Its end is left out; all of it where nothing to learn is left.
    Cut,
}

/// Records that a sampler has not as they are: of pairs the number of pairs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Left out.
    pub dropped: u64,
    /// Without their end.
    pub cut: u64,
}

impl Sampler {
    /// A sampler over records, of which only some tokens are learnt.
    ///
    /// A row holds whole documents, drawn in another order each epoch; one that does not fit any more begins the next row, and the rest is
    /// padded. Of pairs every document has a row to itself, and `batch_size` must be even: row 2i is the chosen answer, row 2i + 1 the
    /// rejected one.
    ///
    /// # Errors
    /// [`Error::Sampler`] where nothing is left to learn, or a batch would part a pair. [`Error::Shard`] and [`Error::Io`] as
    /// [`Sampler::batch`].
    pub fn of_records(
        shard: Arc<Shard>,
        seq_len: usize,
        batch_size: usize,
        seed: u64,
        too_long: TooLong,
        mask_documents: bool,
    ) -> Result<Self> {
        check_sizes(&shard, seq_len, batch_size)?;
        let refuse = |message: String| Err(Error::Sampler { path: shard.path().to_path_buf(), message });
        if shard.is_pairs() && batch_size % 2 == 1 {
            return refuse(format!("its documents are pairs: batch_size = {batch_size} must be even"));
        }
        let (pairs, singles, left_out) = if shard.is_pairs() {
            let (pairs, left_out) = pairs(&shard, seq_len, too_long)?;
            (pairs, Vec::new(), left_out)
        } else {
            let mut left_out = LeftOut::default();
            let mut singles = Vec::new();
            for i in 0..shard.documents() {
                singles.extend(fitting(&shard, i, seq_len, too_long, &mut left_out)?);
            }
            (Vec::new(), singles, left_out)
        };
        if pairs.is_empty() && singles.is_empty() {
            let what = if left_out.dropped > 0 {
                format!("all of its {} records are longer than seq_len = {seq_len} tokens: raise it", left_out.dropped)
            } else {
                "it has no record".to_owned()
            };
            return refuse(what);
        }
        let order =
            if shard.is_pairs() { Order::Pairs { pairs } } else { Order::documents(singles, seq_len, Crop::No, seed) };
        Ok(Self { shard, seq_len, batch_size, seed, mask_documents, order, left_out })
    }

    /// Records that were too long for a row.
    pub fn left_out(&self) -> LeftOut {
        self.left_out
    }
}

/// Document `i` as what of it fits a row; none where it is to be left out.
fn fitting(
    shard: &Shard,
    i: usize,
    seq_len: usize,
    too_long: TooLong,
    left_out: &mut LeftOut,
) -> Result<Option<Piece>> {
    let Some(range) = shard.document_range(i) else { return Ok(None) };
    let positions = range.len() - 1;
    if positions <= seq_len {
        return Ok((positions > 0).then_some(Piece { start: range.start, len: positions as u32 }));
    }
    let piece = Piece { start: range.start, len: seq_len as u32 };
    if too_long == TooLong::Cut && has_target(shard, piece)? {
        left_out.cut += 1;
        return Ok(Some(piece));
    }
    left_out.dropped += 1;
    Ok(None)
}

/// Both documents of each pair, where both may stay.
pub(super) fn pairs(shard: &Shard, seq_len: usize, too_long: TooLong) -> Result<(Vec<[Piece; 2]>, LeftOut)> {
    let (mut pairs, mut all) = (Vec::new(), LeftOut::default());
    for first in (0..shard.documents()).step_by(2) {
        let mut own = LeftOut::default();
        let chosen = fitting(shard, first, seq_len, too_long, &mut own)?;
        let rejected = fitting(shard, first + 1, seq_len, too_long, &mut own)?;
        match chosen.zip(rejected) {
            Some((chosen, rejected)) => {
                all.cut += own.cut.min(1);
                pairs.push([chosen, rejected]);
            }
            None => all.dropped += 1,
        }
    }
    Ok((pairs, all))
}

/// The pieces in which something is to be predicted.
pub(super) fn with_targets(shard: &Shard, pieces: Vec<Piece>) -> Result<Vec<Piece>> {
    let mut kept = Vec::with_capacity(pieces.len());
    for piece in pieces {
        if has_target(shard, piece)? {
            kept.push(piece);
        }
    }
    Ok(kept)
}

/// Whether a token that follows a position of the piece is learnt.
fn has_target(shard: &Shard, piece: Piece) -> Result<bool> {
    let (range, mut learnt) = (piece.range(), Vec::new());
    shard.copy_learnt(range.start + 1..range.end + 1, &mut learnt)?;
    Ok(learnt.contains(&true))
}
