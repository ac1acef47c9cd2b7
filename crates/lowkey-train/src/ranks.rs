//! Processes that train together: one rank each, started by `mpirun`, `srun` or `torchrun`.
//!
//! Every rank holds the whole model and takes the same steps. What they say to each other is said at *meetings*, which all of them come
//! to in the same order: each brings a word, or the error that it has met, and all leave with the words of all, or with the same error.
//! So an error on one rank ends all of them at their next meeting, with its message said once, and nothing that several do together
//! begins before all are known to be able to. Data (`Ranks::gather`, `Ranks::sum`) travels only behind a meeting that went well.
//!
//! Meetings are the same whatever carries them (`comm.rs`): MPI, for ranks that its starter has brought together, or NCCL, for those that
//! only know where to meet. Gradients of GPUs travel through NCCL where it is asked for, whoever carries the rest.
//!
//! A process that was started by itself is a world of one, for which a meeting is nothing at all.

mod comm;
mod launched;
#[cfg_attr(not(feature = "mpi"), path = "ranks/mpi/absent.rs")]
mod mpi;
#[cfg_attr(not(feature = "nccl"), path = "ranks/nccl/absent.rs")]
mod nccl;
mod packed;
#[cfg(any(test, feature = "mpi", feature = "nccl"))]
mod parts;
mod seat;
pub(crate) mod start;

pub use launched::Launched;
pub use nccl::say_where_to_meet;
pub use start::{Task, compare_job};

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use burn::tensor::Device;
use sha2::{Digest, Sha256};

use self::comm::Comm;
use self::launched::TORCHRUN;
pub(crate) use self::nccl::Gpus;
use crate::error::{Error, Result};
use crate::run_config::RankSum;
pub(crate) use packed::Packed;

/// The ranks of a run, seen from one of them.
#[derive(Clone, Debug, Default)]
pub struct Ranks {
    world: World,
}

#[derive(Clone, Debug, Default)]
enum World {
    /// A process by itself.
    #[default]
    Alone,
    /// One of several.
    Several(Arc<Comm>),
}

/// Where ranks meet: a rank that is elsewhere is told of as out of step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meeting {
    /// Nothing has been opened yet.
    Begin = 1,
    /// Bytes are exchanged while a run is set up.
    SetUp,
    /// Before a step: whether it is to be taken.
    Step,
    /// Gradients are there.
    Gradients,
    /// Figures of a part of what is held out are there.
    Figures,
    /// Before a checkpoint: whether all have the same weights.
    Weights,
    /// The work is done.
    End,
}

/// So many ranks leave the sum to MPI where its order is free. With fewer of them, Open MPI (as of 4.1) sends all numbers to one rank and
/// back, one way after the other; the sum in order uses both ways of every link at once.
pub(crate) const LEFT_TO_MPI: usize = 4;

/// What a rank brings to a meeting.
pub(crate) type Word = [u8; 32];

/// The word for a short text: its hash.
pub(crate) fn word_of(bytes: &[u8]) -> Word {
    Sha256::digest(bytes).into()
}

impl Ranks {
    /// The world that this process was started in. Called once, from the thread that will train. `last_words` says why all ranks end at
    /// once: that one of them does not answer, or that the network fails.
    ///
    /// # Errors
    /// [`Error::Launch`] where it is one of several and this build has nothing that carries what they say, or where that and whoever
    /// started them do not know each other; [`Error::Transfer`].
    pub fn join(last_words: fn(&str)) -> Result<Self> {
        let Some(launched @ Launched { size: 2.., .. }) = Launched::read() else { return Ok(Self::default()) };
        let (wire, gpus) = match launched.by {
            TORCHRUN => nccl::join(&launched, last_words).map(|(wire, gpus)| (wire, Some(gpus)))?,
            _ => (mpi::join(&launched, last_words)?, None),
        };
        Ok(Self { world: World::Several(Arc::new(Comm::new(wire, gpus))) })
    }

    /// Which of them this is, from 0.
    pub fn rank(&self) -> usize {
        match &self.world {
            World::Alone => 0,
            World::Several(comm) => comm.seat().rank,
        }
    }

    /// How many there are.
    pub fn size(&self) -> usize {
        match &self.world {
            World::Alone => 1,
            World::Several(comm) => comm.seat().size,
        }
    }

    /// The machine that this one runs on, where there are several.
    pub(crate) fn machine(&self) -> &str {
        match &self.world {
            World::Alone => "",
            World::Several(comm) => comm.seat().machine(comm.seat().rank),
        }
    }

    /// How many of them, this one included, run on its machine.
    pub fn here(&self) -> usize {
        match &self.world {
            World::Alone => 1,
            World::Several(comm) => comm.seat().of_this_machine(comm.seat().size),
        }
    }

    /// How many of those on its machine come before it.
    pub fn place(&self) -> usize {
        match &self.world {
            World::Alone => 0,
            World::Several(comm) => comm.seat().of_this_machine(comm.seat().rank),
        }
    }

    /// Whether there are others.
    pub fn are_several(&self) -> bool {
        self.size() > 1
    }

    /// Whether this is the one that writes and speaks.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// How it is called in messages.
    pub fn name(&self) -> String {
        format!("rank {} of {}", self.rank(), self.size())
    }

    /// A result that all ranks have, or the error that any of them has met.
    ///
    /// # Errors
    /// Its own where all have met the same; else [`Error::Rank`], that of the lowest rank that has met one, on all of them.
    pub fn agree<T>(&self, own: Result<T>) -> Result<T> {
        let (own, word) = apart(own, |_| Word::default());
        self.meet(Meeting::Begin, word)?;
        own.ok_or_else(|| unreachable!("a meeting with an error ends with one"))
    }

    /// The last meeting: tells the others how it ended here, unless they know already, and takes leave of them.
    ///
    /// # Errors
    /// As [`Ranks::agree`].
    pub fn end<T>(&self, own: Result<T>) -> Result<T> {
        if self.is_over() {
            return own;
        }
        let (own, word) = apart(own, |_| Word::default());
        self.meet(Meeting::End, word)?;
        own.ok_or_else(|| unreachable!("a meeting with an error ends with one"))
    }

    /// Whether all ranks know how it ended: then the first one says it for all.
    pub fn is_over(&self) -> bool {
        match &self.world {
            World::Alone => false,
            World::Several(comm) => comm.is_over(),
        }
    }

    /// Leaves what all ranks leave; to be called last, once [`Ranks::is_over`].
    pub fn leave(&self) {
        if let World::Several(comm) = &self.world {
            comm.leave();
        }
    }

    /// Ends all ranks at once, this one with them, where MPI has joined this process with others and it has not taken leave of them. Those
    /// that `torchrun` has started it ends itself, once one has failed.
    pub fn abandon() {
        mpi::abandon();
    }

    /// The MPI that this build calls; none where it has none.
    pub fn library() -> Option<String> {
        mpi::library()
    }

    /// From now on a rank that does not come to a meeting for so long is named, and the run ends.
    pub fn be_patient_for(&self, patience: Duration) {
        if let World::Several(comm) = &self.world {
            comm.be_patient_for(patience);
        }
    }

    /// The words of all ranks, in their order.
    ///
    /// # Errors
    /// As [`Ranks::agree`].
    pub(crate) fn meet(&self, at: Meeting, own: Result<Word>) -> Result<Vec<Word>> {
        match &self.world {
            World::Alone => own.map(|word| vec![word]),
            World::Several(comm) => comm.meet(at, own),
        }
    }

    /// Whether any rank says so.
    ///
    /// # Errors
    /// As [`Ranks::agree`].
    pub(crate) fn any(&self, at: Meeting, own: bool) -> Result<bool> {
        let mut word = Word::default();
        word[0] = own.into();
        Ok(self.meet(at, Ok(word))?.iter().any(|word| word[0] != 0))
    }

    /// The first rank that says something else than rank 0, told by hashes; none where all say the same.
    ///
    /// # Errors
    /// As [`Ranks::agree`].
    pub(crate) fn other_than_first(&self, at: Meeting, own: Result<Word>) -> Result<Option<usize>> {
        let words = self.meet(at, own)?;
        Ok(words.iter().position(|word| *word != words[0]))
    }

    /// Refuses ranks that do not have the same `what`, told by the hash of `own`. All of them meet here.
    ///
    /// # Errors
    /// [`Error::Launch`] naming the first rank that has another; as [`Ranks::agree`].
    pub fn all_have(&self, what: &str, own: &[u8]) -> Result<()> {
        let Some(rank) = self.other_than_first(Meeting::SetUp, Ok(word_of(own)))? else { return Ok(()) };
        let why =
            format!("rank {rank} of {} has other {what} than rank 0; let all ranks read the same files", self.size());
        Err(Error::Launch { why })
    }

    /// The bytes of all ranks, in their order.
    ///
    /// # Errors
    /// As [`Ranks::agree`].
    pub(crate) fn gather(&self, at: Meeting, own: Result<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        let (own, word) = apart(own, |bytes| length_word(bytes.len()));
        let lengths = self.meet(at, word)?;
        let own = own.unwrap_or_default();
        match &self.world {
            World::Alone => Ok(vec![own]),
            World::Several(comm) => {
                let lengths: Vec<usize> = lengths.iter().map(word_length).collect();
                Ok(comm::apart(&comm.wire().gather(&own, &lengths)?, &lengths))
            }
        }
    }

    /// What rank 0 says, on all of them.
    ///
    /// # Errors
    /// As [`Ranks::agree`].
    pub(crate) fn told(&self, own: Result<Vec<u8>>) -> Result<Vec<u8>> {
        let own = if self.is_first() { own } else { own.map(|_| Vec::new()) };
        Ok(self.gather(Meeting::SetUp, own)?.swap_remove(0))
    }

    /// Adds up the numbers of all ranks, on all of them. All have met just now, and have as many.
    ///
    /// # Errors
    /// [`Error::Transfer`].
    pub(crate) fn sum(&self, numbers: &mut [f32], order: RankSum) -> Result<()> {
        match &self.world {
            World::Alone => Ok(()),
            World::Several(comm) => comm.wire().sum(numbers, order),
        }
    }

    /// Lets gradients travel from GPU to GPU; `device` is that of this rank. All of them meet here.
    ///
    /// # Errors
    /// [`Error::Launch`] where a rank has no GPU of NVIDIA's, no NCCL, or a GPU that another has, too; as [`Ranks::agree`].
    pub(crate) fn link_gpus(&self, device: &Device) -> Result<()> {
        let World::Several(comm) = &self.world else { return Ok(()) };
        let own = nccl::serial_number(device).and_then(|serial| {
            comm.of_wire().map_or(Ok(()), |gpus| gpus.check_is_of(device))?;
            Ok(serial)
        });
        let serials = self.gather(Meeting::SetUp, own)?;
        if let Some(rank) = (0..serials.len()).find(|rank| serials[..*rank].contains(&serials[*rank])) {
            let first = serials.iter().position(|serial| *serial == serials[rank]).unwrap_or_default();
            let why = format!(
                "ranks {first} and {rank} are on one GPU, and NCCL takes a GPU of its own for each; start fewer, or write [ranks] \
                 transport = \"mpi\""
            );
            return Err(Error::Launch { why });
        }
        if let Some(gpus) = comm.of_wire() {
            comm.link(Arc::clone(gpus));
            return Ok(());
        }
        let name = self.told(if self.is_first() { nccl::name() } else { Ok(Vec::new()) })?;
        comm.link(Arc::new(Gpus::link(device, (self.rank(), self.size()), name, comm.seat().last_words)));
        Ok(())
    }

    /// Whether ranks have met through their GPUs, and have nothing else to meet through.
    pub(crate) fn meet_on_gpus(&self) -> bool {
        matches!(&self.world, World::Several(comm) if comm.of_wire().is_some())
    }

    /// The GPUs of the ranks, where gradients travel from one to another.
    pub(crate) fn gpus(&self) -> Option<&Gpus> {
        match &self.world {
            World::Alone => None,
            World::Several(comm) => comm.linked().map(Arc::as_ref),
        }
    }

    /// What adds up, in words; none where there is nobody else.
    pub(crate) fn reducer(&self, order: RankSum) -> Option<&'static str> {
        match &self.world {
            World::Alone => None,
            World::Several(comm) => Some(comm.reducer(order)),
        }
    }

    /// The numbers of each rank, of which each knows how many they are, one after the other. All have met just now.
    ///
    /// # Errors
    /// [`Error::Transfer`].
    pub(crate) fn gather_numbers(&self, own: Vec<f32>, lengths: &[usize]) -> Result<Vec<f32>> {
        match &self.world {
            World::Alone => Ok(own),
            World::Several(comm) => comm.wire().gather_numbers(&own, lengths),
        }
    }

    /// The numbers of each rank, one after the other, on the first one; the others have none.
    ///
    /// # Errors
    /// As [`Ranks::agree`].
    pub(crate) fn gather_numbers_to_first(&self, at: Meeting, own: Result<Vec<f32>>) -> Result<Vec<f32>> {
        let (own, word) = apart(own, |numbers| length_word(numbers.len()));
        let lengths = self.meet(at, word)?;
        let own = own.unwrap_or_default();
        match &self.world {
            World::Alone => Ok(own),
            World::Several(comm) => {
                comm.wire().gather_numbers_to_first(&own, &lengths.iter().map(word_length).collect::<Vec<_>>())
            }
        }
    }

    /// The results of a job for each item, the items shared among the ranks; all of them have all results, in order. `run` does the
    /// job for those that are this rank's.
    ///
    /// # Errors
    /// The job's, and as [`Ranks::agree`].
    pub(crate) fn share<T, R: Packed>(&self, items: &[T], run: impl FnOnce(&[T]) -> Result<Vec<R>>) -> Result<Vec<R>> {
        if !self.are_several() {
            return run(items);
        }
        let (rank, size) = (self.rank(), self.size());
        let own = &items[items.len() * rank / size..items.len() * (rank + 1) / size];
        let packed = run(own).map(|results| {
            let mut bytes = Vec::new();
            results.iter().for_each(|result| result.pack(&mut bytes));
            bytes
        });
        let mut all = Vec::with_capacity(items.len());
        for bytes in self.gather(Meeting::Figures, packed)? {
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let broken =
                    || Error::Transfer { call: "gather", why: "figures of another rank cannot be read".into() };
                all.push(R::unpack(&mut rest).ok_or_else(broken)?);
            }
        }
        Ok(all)
    }

    /// Refuses a folder that is not the same one for all ranks. All of them meet here.
    ///
    /// # Errors
    /// [`Error::Rank`] with the first one that sees another; [`Error::Io`].
    pub(crate) fn check_shared(&self, dir: &Path) -> Result<()> {
        /// How long a shared disk may take to show a new file.
        const SHOWS_WITHIN: Duration = Duration::from_secs(10);
        if !self.are_several() {
            return Ok(());
        }
        let path = dir.join(".ranks");
        let own = || -> Result<Vec<u8>> {
            let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            let mark = format!("{} {}", std::process::id(), since.as_nanos());
            lowkey_files::write(&path, mark.as_bytes())?;
            Ok(mark.into_bytes())
        };
        let mark = self.told(if self.is_first() { own() } else { Ok(Vec::new()) })?;
        let begun = std::time::Instant::now();
        let seen = || lowkey_files::read(&path, 1 << 10).is_ok_and(|found| found == mark);
        while !seen() && begun.elapsed() < SHOWS_WITHIN {
            std::thread::sleep(Duration::from_millis(20));
        }
        let own = if seen() {
            Ok(())
        } else {
            let why =
                "is not the folder that rank 0 sees here: all ranks need one disk, as by NFS; give --out on such a one";
            Err(Error::file(dir, why))
        };
        let agreed = self.agree(own);
        if self.is_first() {
            lowkey_files::write::remove(&path)?;
        }
        agreed
    }
}

/// A value, and what is said of it at a meeting.
fn apart<T>(own: Result<T>, word: impl FnOnce(&T) -> Word) -> (Option<T>, Result<Word>) {
    match own {
        Ok(value) => {
            let word = word(&value);
            (Some(value), Ok(word))
        }
        Err(error) => (None, Err(error)),
    }
}

fn length_word(length: usize) -> Word {
    let mut word = Word::default();
    word[..8].copy_from_slice(&(length as u64).to_le_bytes());
    word
}

fn word_length(word: &Word) -> usize {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&word[..8]);
    u64::from_le_bytes(bytes) as usize
}

#[cfg(test)]
mod tests;
