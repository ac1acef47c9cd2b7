//! What a rank knows of itself and of the others, whatever carries their words.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A rank among others.
#[derive(Debug)]
pub(super) struct Seat {
    /// Which one this is.
    pub(super) rank: usize,
    /// How many there are.
    pub(super) size: usize,
    /// Says why all ranks end at once.
    pub(super) last_words: fn(&str),
    /// The machines of the ranks.
    machines: OnceLock<Vec<String>>,
    /// How long a transfer may take, in milliseconds; 0: as long as it takes.
    patience: AtomicU64,
}

impl Seat {
    /// The machine of a rank, as far as it is known.
    pub(super) fn machine(&self, rank: usize) -> &str {
        self.machines.get().and_then(|machines| machines.get(rank)).map_or("?", String::as_str)
    }

    /// How many of the first `ranks` run on this one's machine.
    pub(super) fn of_this_machine(&self, ranks: usize) -> usize {
        (0..ranks).filter(|rank| self.machine(*rank) == self.machine(self.rank)).count()
    }

    /// From now on all ranks end where one does not come for so long.
    pub(super) fn be_patient_for(&self, patience: Duration) {
        self.patience.store(u64::try_from(patience.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

#[cfg(any(test, feature = "mpi", feature = "nccl"))]
impl Seat {
    pub(super) fn new(rank: usize, size: usize, last_words: fn(&str)) -> Self {
        Self { rank, size, last_words, machines: OnceLock::new(), patience: AtomicU64::new(0) }
    }

    /// The machines of all ranks are these.
    pub(super) fn set_machines(&self, machines: Vec<String>) {
        self.machines.get_or_init(|| machines);
    }
}

#[cfg(any(feature = "mpi", feature = "nccl"))]
impl Seat {
    /// How long a transfer may take.
    pub(super) fn patience(&self) -> Option<Duration> {
        let patience = self.patience.load(Ordering::Relaxed);
        (patience > 0).then_some(Duration::from_millis(patience))
    }
}
