//! What ranks say to each other at meetings, whatever carries it.

use std::fmt::Debug;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::nccl::Gpus;
use super::seat::Seat;
use super::{Meeting, Word};
use crate::error::{Error, Result};
use crate::run_config::RankSum;

/// What a rank says at a meeting: where it is, or 0 where it has met an error, and its word.
const MESSAGE: usize = 1 + size_of::<Word>();

/// The status of a rank that has met an error.
const FAILED: u8 = 0;

/// How bytes and numbers get from rank to rank. All ranks call the same in the same order.
pub(super) trait Wire: Debug + Send + Sync {
    /// This rank among the others.
    fn seat(&self) -> &Seat;
    /// As many bytes of each rank, one after the other. Others may be far behind.
    fn all_gather(&self, own: &[u8]) -> Result<Vec<u8>>;
    /// Bytes of each rank, one after the other, whose numbers are known.
    fn gather(&self, own: &[u8], lengths: &[usize]) -> Result<Vec<u8>>;
    /// The same of numbers.
    fn gather_numbers(&self, own: &[f32], lengths: &[usize]) -> Result<Vec<f32>>;
    /// The same on the first rank alone; the others have none.
    fn gather_numbers_to_first(&self, own: &[f32], lengths: &[usize]) -> Result<Vec<f32>>;
    /// Adds up the numbers of all ranks, on all of them.
    fn sum(&self, numbers: &mut [f32], order: RankSum) -> Result<()>;
    /// How it adds up, in words.
    fn reducer(&self, order: RankSum) -> &'static str;
    /// Takes leave where all do.
    fn leave(&self);
}

/// All ranks of a job, seen from one of them.
#[derive(Debug)]
pub(super) struct Comm {
    wire: Box<dyn Wire>,
    /// The GPUs that the wire goes over, where it does,
    of_wire: Option<Arc<Gpus>>,
    /// and those that gradients go over.
    linked: OnceLock<Arc<Gpus>>,
    /// All ranks know that it is over.
    over: AtomicBool,
}

impl Comm {
    pub(super) fn new(wire: Box<dyn Wire>, of_wire: Option<Arc<Gpus>>) -> Self {
        Self { wire, of_wire, linked: OnceLock::new(), over: AtomicBool::new(false) }
    }

    pub(super) fn wire(&self) -> &dyn Wire {
        &*self.wire
    }

    pub(super) fn seat(&self) -> &Seat {
        self.wire.seat()
    }

    pub(super) fn of_wire(&self) -> Option<&Arc<Gpus>> {
        self.of_wire.as_ref()
    }

    pub(super) fn linked(&self) -> Option<&Arc<Gpus>> {
        self.linked.get()
    }

    /// From now on gradients go over these.
    pub(super) fn link(&self, gpus: Arc<Gpus>) {
        self.linked.get_or_init(|| gpus);
    }

    /// What adds up gradients, in words.
    pub(super) fn reducer(&self, order: RankSum) -> &'static str {
        match (self.linked(), order) {
            (None, order) => self.wire.reducer(order),
            (Some(_), RankSum::Ordered) => "NCCL, in the order of the ranks",
            (Some(_), RankSum::Fastest) => "NCCL, in its own order",
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    pub(super) fn be_patient_for(&self, patience: Duration) {
        self.seat().be_patient_for(patience);
        self.linked().into_iter().for_each(|gpus| gpus.seat().be_patient_for(patience));
    }

    pub(super) fn leave(&self) {
        self.linked().into_iter().for_each(|gpus| gpus.leave());
        self.wire.leave();
    }

    /// The words of all ranks.
    pub(super) fn meet(&self, at: Meeting, own: Result<Word>) -> Result<Vec<Word>> {
        if self.is_over() {
            let over = || Error::Transfer { call: "a meeting", why: "the ranks have parted".into() };
            return own.and_then(|_| Err(over()));
        }
        let mut message = [0; MESSAGE];
        message[0] = own.as_ref().map_or(FAILED, |_| at as u8);
        message[1..].copy_from_slice(own.as_ref().unwrap_or(&Word::default()));
        let all = self.wire.all_gather(&message)?;
        let all: Vec<&[u8]> = all.chunks_exact(MESSAGE).collect();
        if all.iter().any(|message| message[0] == FAILED) {
            return Err(self.failed(own.err()));
        }
        if let Some(rank) = all.iter().position(|message| message[0] != at as u8) {
            self.over.store(true, Ordering::Relaxed);
            let (met, here) = (all[rank][0], self.seat().rank);
            return Err(
                self.error_of(rank, format!("is out of step: it has come to meeting {met}, and rank {here} to {at:?}"))
            );
        }
        if at == Meeting::End {
            self.over.store(true, Ordering::Relaxed);
        }
        let word = |message: &&[u8]| {
            let mut word = Word::default();
            word.copy_from_slice(&message[1..]);
            word
        };
        Ok(all.iter().map(word).collect())
    }

    fn error_of(&self, rank: usize, why: String) -> Error {
        Error::Rank { rank, size: self.seat().size, machine: self.seat().machine(rank).to_owned(), why }
    }

    /// The error that a run ends with once one rank has met one.
    fn failed(&self, own: Option<Error>) -> Error {
        let told = own.as_ref().map(ToString::to_string);
        let all = match gather_texts(&*self.wire, &told.map(|told| format!("!{told}")).unwrap_or_default()) {
            Ok(all) => all,
            Err(error) => return error,
        };
        self.over.store(true, Ordering::Relaxed);
        match (own, all.iter().position(|text| !text.is_empty())) {
            // It is everybody's.
            (Some(own), _) if all.iter().all(|text| *text == all[0]) => own,
            (_, Some(rank)) => self.error_of(rank, all[rank].trim_start_matches('!').to_owned()),
            (Some(own), None) => own,
            (None, None) => Error::Transfer { call: "a meeting", why: "a rank has failed and does not say why".into() },
        }
    }
}

/// Bytes of parts of these lengths, each by itself.
pub(super) fn apart(mut all: &[u8], lengths: &[usize]) -> Vec<Vec<u8>> {
    let part = |length: &usize| {
        let (part, more) = all.split_at(*length);
        all = more;
        part.to_vec()
    };
    lengths.iter().map(part).collect()
}

/// A text of each rank.
pub(super) fn gather_texts(wire: &dyn Wire, own: &str) -> Result<Vec<String>> {
    let lengths = wire.all_gather(&(own.len() as u64).to_le_bytes())?;
    let lengths: Vec<usize> = lengths.as_chunks().0.iter().map(|length| u64::from_le_bytes(*length) as usize).collect();
    let texts = apart(&wire.gather(own.as_bytes(), &lengths)?, &lengths);
    Ok(texts.iter().map(|text| String::from_utf8_lossy(text).into_owned()).collect())
}
