//! MPI, as far as training needs it: `MPI_COMM_WORLD`, and a few collective calls on it.
//!
//! All calls come from the thread that has joined (`MPI_THREAD_FUNNELED`). None of them blocks: every transfer is begun, and looked at
//! until it is over, so that a rank that never comes can be told of by name instead of being waited for.

use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use mpi_sys as raw;
use rayon::prelude::*;

use super::{LEFT_TO_MPI, Meeting, Word};
use crate::error::{Error, Result};
use crate::run_config::RankSum;

/// Numbers that are summed at once: counts of MPI are 32 bits wide, and buffers are to stay small beside a model.
const AT_ONCE: usize = 1 << 24;

/// Numbers that are gathered at once: their places are counts of MPI, too.
const MOST: usize = c_int::MAX as usize;

/// What a rank says at a meeting: where it is, or 0 where it has met an error, and its word.
const MESSAGE: usize = 1 + size_of::<Word>();

/// The status of a rank that has met an error.
const FAILED: u8 = 0;

/// Tag of the only messages that go from one rank to another by themselves.
const ROLL_CALL: c_int = 19;

/// `MPI_COMM_WORLD`.
#[derive(Debug)]
pub(super) struct Comm {
    rank: usize,
    size: usize,
    thread: ThreadId,
    /// All ranks know that it is over.
    over: AtomicBool,
    /// How long a transfer may take, in milliseconds; 0: as long as it takes.
    patience: AtomicU64,
    /// The machines of the ranks.
    machines: OnceLock<Vec<String>>,
    /// Says why all ranks end at once.
    last_words: fn(&str),
}

/// What MPI says against a call.
fn checked(call: &'static str, code: c_int) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    let why = text(|text, length| {
        // SAFETY: `text` has room for the longest message of any MPI, and `length` is a place for a number.
        unsafe { raw::MPI_Error_string(code, text, length) }
    });
    Err(Error::Mpi { call, why })
}

/// A text that MPI writes.
fn text(write: impl FnOnce(*mut std::ffi::c_char, *mut c_int) -> c_int) -> String {
    /// `MPI_MAX_LIBRARY_VERSION_STRING` of MPICH, the longest text of all.
    const LONGEST: usize = 8192;
    let (mut bytes, mut length) = (vec![0u8; LONGEST + 1], 0);
    write(bytes.as_mut_ptr().cast(), &mut length);
    bytes.truncate(usize::try_from(length).unwrap_or_default().min(LONGEST));
    String::from_utf8_lossy(&bytes).trim_end_matches('\0').trim().to_owned()
}

/// The name and version of the library.
pub(super) fn library() -> String {
    let said = text(|text, length| {
        // SAFETY: may be called at any time; the text has room for the longest answer.
        unsafe { raw::MPI_Get_library_version(text, length) }
    });
    said.lines().next().unwrap_or_default().split(", package").next().unwrap_or_default().to_owned()
}

/// Whether MPI is up in this process.
fn is_up() -> bool {
    let (mut begun, mut ended) = (0, 0);
    // SAFETY: both may be called at any time, and write a number.
    unsafe {
        raw::MPI_Initialized(&mut begun);
        raw::MPI_Finalized(&mut ended);
    }
    begun != 0 && ended == 0
}

/// Ends all ranks, where MPI is up.
pub(super) fn abandon() {
    if is_up() {
        // SAFETY: MPI is up. The call returns only where it fails, and whoever called this then ends by itself, which its starter sees.
        unsafe { raw::MPI_Abort(raw::RSMPI_COMM_WORLD, 1) };
    }
}

/// A count or a place as MPI takes it; what is sent at once is bounded.
fn int(n: usize) -> Result<c_int> {
    n.try_into().map_err(|_| Error::Mpi { call: "a transfer", why: format!("{n} is more than is sent at once") })
}

/// What stands for a buffer of no bytes: an empty slice lies at an address that is no place, and MPI gives such ones a meaning of their
/// own (`MPI_IN_PLACE` is 1 in Open MPI).
static NOTHING: u64 = 0;

fn address<T>(from: &[T]) -> *const c_void {
    if from.is_empty() { std::ptr::from_ref(&NOTHING).cast() } else { from.as_ptr().cast() }
}

/// Of an empty one nothing is ever written to.
fn address_mut<T>(to: &mut [T]) -> *mut c_void {
    if to.is_empty() { std::ptr::from_ref(&NOTHING).cast_mut().cast() } else { to.as_mut_ptr().cast() }
}

fn ints(numbers: impl IntoIterator<Item = usize>) -> Result<Vec<c_int>> {
    numbers.into_iter().map(int).collect()
}

/// Where parts of these lengths begin when they lie one after the other.
fn places(lengths: &[usize]) -> impl Iterator<Item = usize> {
    lengths.iter().scan(0, |at, length| {
        let here = *at;
        *at += length;
        Some(here)
    })
}

/// A part of `length` numbers for each of `size` ranks.
fn slices(length: usize, size: usize) -> Vec<usize> {
    (0..size).map(|rank| length * (rank + 1) / size - length * rank / size).collect()
}

/// What of each part of these lengths is sent in each of several rounds, of which none has more than `most` numbers in all.
fn rounds(lengths: &[usize], most: usize) -> Vec<Vec<Range<usize>>> {
    let longest = lengths.iter().max().copied().unwrap_or_default();
    let each = if lengths.iter().sum::<usize>() <= most { longest.max(1) } else { (most / lengths.len()).max(1) };
    let round = |i: usize| {
        let piece = |length: &usize| (i * each).min(*length)..((i + 1) * each).min(*length);
        lengths.iter().map(piece).collect()
    };
    (0..longest.div_ceil(each).max(1)).map(round).collect()
}

/// The sum of equal parts that lie one after the other, in their order, in the first of them.
pub(super) fn add_up(parts: &mut [f32], length: usize) {
    let (total, others) = parts.split_at_mut(length);
    for part in others.chunks_exact(length.max(1)) {
        total.par_iter_mut().with_min_len(1 << 14).zip(part).for_each(|(total, x)| *total += x);
    }
}

impl Comm {
    /// Begins MPI.
    ///
    /// # Errors
    /// [`Error::Mpi`].
    pub(super) fn join(last_words: fn(&str)) -> Result<Self> {
        let (mut provided, mut rank, mut size) = (0, 0, 0);
        // SAFETY: the arguments may be null since MPI 2; every pointer is to a number of this frame; the communicator is there once
        // MPI is.
        unsafe {
            if is_up() {
                return Err(Error::Mpi { call: "MPI_Init_thread", why: "MPI is up already".into() });
            }
            let (null, funneled) = (std::ptr::null_mut(), raw::RSMPI_THREAD_FUNNELED);
            checked("MPI_Init_thread", raw::MPI_Init_thread(null, std::ptr::null_mut(), funneled, &mut provided))?;
            let world = raw::RSMPI_COMM_WORLD;
            checked("MPI_Comm_set_errhandler", raw::MPI_Comm_set_errhandler(world, raw::RSMPI_ERRORS_RETURN))?;
            checked("MPI_Comm_rank", raw::MPI_Comm_rank(world, &mut rank))?;
            checked("MPI_Comm_size", raw::MPI_Comm_size(world, &mut size))?;
            if provided < funneled {
                let why = "this MPI serves programs of one thread alone (MPI_THREAD_FUNNELED is needed)".into();
                return Err(Error::Mpi { call: "MPI_Init_thread", why });
            }
        }
        let comm = Self {
            rank: usize::try_from(rank).unwrap_or_default(),
            size: usize::try_from(size).unwrap_or(1),
            thread: std::thread::current().id(),
            over: AtomicBool::new(false),
            patience: AtomicU64::new(0),
            machines: OnceLock::new(),
            last_words,
        };
        let machine = text(|text, length| {
            // SAFETY: the text has room for `MPI_MAX_PROCESSOR_NAME`.
            unsafe { raw::MPI_Get_processor_name(text, length) }
        });
        let machines = comm.gather_texts(&machine)?;
        Ok(Self { machines: machines.into(), ..comm })
    }

    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }

    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// The machine of a rank.
    pub(super) fn machine(&self, rank: usize) -> &str {
        self.machines.get().and_then(|machines| machines.get(rank)).map_or("?", String::as_str)
    }

    /// How many ranks run on this one's machine.
    pub(super) fn here(&self) -> usize {
        self.of_this_machine(self.size)
    }

    /// How many of them come before this one.
    pub(super) fn place(&self) -> usize {
        self.of_this_machine(self.rank)
    }

    /// How many of the first `ranks` run on this one's machine.
    fn of_this_machine(&self, ranks: usize) -> usize {
        (0..ranks).filter(|rank| self.machine(*rank) == self.machine(self.rank)).count()
    }

    pub(super) fn be_patient_for(&self, patience: Duration) {
        self.patience.store(u64::try_from(patience.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Leaves MPI; only the thread that has joined it may, and from any other this does nothing.
    pub(super) fn leave(&self) {
        if is_up() && std::thread::current().id() == self.thread {
            // SAFETY: MPI is up, and no transfer is open: each was waited for. What it says is of no use: the work is done.
            unsafe { raw::MPI_Finalize() };
        }
    }

    /// The words of all ranks.
    pub(super) fn meet(&self, at: Meeting, own: Result<Word>) -> Result<Vec<Word>> {
        if self.is_over() {
            let over = || Error::Mpi { call: "a meeting", why: "the ranks have parted".into() };
            return own.and_then(|_| Err(over()));
        }
        let mut message = [0; MESSAGE];
        message[0] = own.as_ref().map_or(FAILED, |_| at as u8);
        message[1..].copy_from_slice(own.as_ref().unwrap_or(&Word::default()));
        let all = self.all_gather(&message)?;
        let all: Vec<&[u8]> = all.chunks_exact(MESSAGE).collect();
        if all.iter().any(|message| message[0] == FAILED) {
            return Err(self.failed(own.err()));
        }
        if let Some(rank) = all.iter().position(|message| message[0] != at as u8) {
            self.over.store(true, Ordering::Relaxed);
            let why =
                format!("is out of step: it has come to meeting {}, and rank {} to {at:?}", all[rank][0], self.rank);
            return Err(Error::Rank { rank, size: self.size, machine: self.machine(rank).to_owned(), why });
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

    /// The error that a run ends with once one rank has met one.
    fn failed(&self, own: Option<Error>) -> Error {
        let told = own.as_ref().map(ToString::to_string);
        let all = match self.gather_texts(&told.map(|told| format!("!{told}")).unwrap_or_default()) {
            Ok(all) => all,
            Err(error) => return error,
        };
        self.over.store(true, Ordering::Relaxed);
        match (own, all.iter().position(|text| !text.is_empty())) {
            // It is everybody's.
            (Some(own), _) if all.iter().all(|text| *text == all[0]) => own,
            (_, Some(rank)) => {
                let why = all[rank].trim_start_matches('!').to_owned();
                Error::Rank { rank, size: self.size, machine: self.machine(rank).to_owned(), why }
            }
            (Some(own), None) => own,
            (None, None) => Error::Mpi { call: "a meeting", why: "a rank has failed and does not say why".into() },
        }
    }

    /// A text of each rank.
    fn gather_texts(&self, own: &str) -> Result<Vec<String>> {
        let lengths = self.all_gather(&(own.len() as u64).to_le_bytes())?;
        let lengths: Vec<usize> =
            lengths.as_chunks().0.iter().map(|length| u64::from_le_bytes(*length) as usize).collect();
        let texts = self.gather(own.as_bytes(), &lengths)?;
        Ok(texts.iter().map(|text| String::from_utf8_lossy(text).into_owned()).collect())
    }

    /// As many bytes of each rank, one after the other.
    fn all_gather(&self, own: &[u8]) -> Result<Vec<u8>> {
        let (count, mut all) = (int(own.len())?, vec![0; own.len() * self.size]);
        let begin = |request: *mut raw::MPI_Request| {
            // SAFETY: both buffers outlive the transfer, see there; `all` holds `count` bytes for each rank.
            unsafe {
                let bytes = raw::RSMPI_UINT8_T;
                let (from, to) = (address(own), address_mut(&mut all));
                raw::MPI_Iallgather(from, count, bytes, to, count, bytes, raw::RSMPI_COMM_WORLD, request)
            }
        };
        self.transfer("MPI_Iallgather", Waiting::ForARank, begin)?;
        Ok(all)
    }

    /// Bytes of each rank, whose numbers are known.
    pub(super) fn gather(&self, own: &[u8], lengths: &[usize]) -> Result<Vec<Vec<u8>>> {
        let mut all = vec![0; lengths.iter().sum()];
        if !all.is_empty() {
            self.all_gather_parts(own, &mut all, lengths)?;
        }
        let mut rest = &all[..];
        let parts = lengths.iter().map(|length| {
            let (part, more) = rest.split_at(*length);
            rest = more;
            part.to_vec()
        });
        Ok(parts.collect())
    }

    /// The numbers of each rank, one after the other, on all of them.
    pub(super) fn gather_numbers(&self, own: &[f32], lengths: &[usize]) -> Result<Vec<f32>> {
        let mut all = vec![0.0; lengths.iter().sum()];
        self.all_gather_parts(own, &mut all, lengths)?;
        Ok(all)
    }

    /// The same on the first rank alone; the others have none.
    pub(super) fn gather_numbers_to_first(&self, own: &[f32], lengths: &[usize]) -> Result<Vec<f32>> {
        let mut all = vec![0.0; if self.rank == 0 { lengths.iter().sum() } else { 0 }];
        self.in_rounds(own, &mut all, lengths, Self::gather_once)?;
        Ok(all)
    }

    /// Parts of known lengths, one after the other; `own` has the length of this rank's.
    fn all_gather_parts<T: Number>(&self, own: &[T], all: &mut [T], lengths: &[usize]) -> Result<()> {
        self.in_rounds(own, all, lengths, Self::all_gather_once)
    }

    /// Gathers parts that may be more than MPI counts at once: all at once where it can, else in pieces. `all` is empty on a rank that
    /// receives nothing.
    fn in_rounds<T: Number>(
        &self,
        own: &[T],
        all: &mut [T],
        lengths: &[usize],
        gather: impl Fn(&Self, &[T], &mut [T], &[usize]) -> Result<()>,
    ) -> Result<()> {
        let (at, rounds): (Vec<usize>, _) = (places(lengths).collect(), rounds(lengths, MOST));
        if let [_] = rounds[..] {
            return gather(self, own, all, lengths);
        }
        for round in rounds {
            let pieces: Vec<usize> = round.iter().map(ExactSizeIterator::len).collect();
            let mut got = vec![T::default(); if all.is_empty() { 0 } else { pieces.iter().sum() }];
            gather(self, &own[round[self.rank].clone()], &mut got, &pieces)?;
            let mut rest = &got[..];
            for (at, piece) in at.iter().zip(&round).take(if all.is_empty() { 0 } else { self.size }) {
                let (first, more) = rest.split_at(piece.len());
                all[at + piece.start..at + piece.end].copy_from_slice(first);
                rest = more;
            }
        }
        Ok(())
    }

    fn all_gather_once<T: Number>(&self, own: &[T], all: &mut [T], lengths: &[usize]) -> Result<()> {
        let (count, counts, at) = (int(own.len())?, ints(lengths.iter().copied())?, ints(places(lengths))?);
        assert!(lengths.len() == self.size && lengths.iter().sum::<usize>() == all.len());
        assert!(lengths[self.rank] == own.len());
        let begin = |request: *mut raw::MPI_Request| {
            // SAFETY: all buffers outlive the transfer, see there, and are of numbers of this kind; `all` holds all parts, see above.
            unsafe {
                let (from, to, kind) = (address(own), address_mut(all), T::kind());
                let (counts, at) = (counts.as_ptr(), at.as_ptr());
                raw::MPI_Iallgatherv(from, count, kind, to, counts, at, kind, raw::RSMPI_COMM_WORLD, request)
            }
        };
        self.transfer("MPI_Iallgatherv", Waiting::ForBytes, begin)
    }

    fn gather_once<T: Number>(&self, own: &[T], all: &mut [T], lengths: &[usize]) -> Result<()> {
        let (count, counts, at) = (int(own.len())?, ints(lengths.iter().copied())?, ints(places(lengths))?);
        assert!(lengths.len() == self.size && lengths[self.rank] == own.len());
        assert!(self.rank != 0 || lengths.iter().sum::<usize>() == all.len());
        let begin = |request: *mut raw::MPI_Request| {
            // SAFETY: all buffers outlive the transfer, see there, and are of numbers of this kind; on rank 0, the only one that
            // receives, `all` holds all parts, see above.
            unsafe {
                let (from, to, kind) = (address(own), address_mut(all), T::kind());
                let (counts, at) = (counts.as_ptr(), at.as_ptr());
                raw::MPI_Igatherv(from, count, kind, to, counts, at, kind, 0, raw::RSMPI_COMM_WORLD, request)
            }
        };
        self.transfer("MPI_Igatherv", Waiting::ForBytes, begin)
    }

    /// Adds up the numbers of all ranks.
    pub(super) fn sum(&self, numbers: &mut [f32], order: RankSum) -> Result<()> {
        numbers.chunks_mut(AT_ONCE).try_for_each(|numbers| match order {
            RankSum::Fastest if self.size >= LEFT_TO_MPI => self.sum_as_mpi_likes(numbers),
            RankSum::Ordered | RankSum::Fastest => self.sum_in_order(numbers),
        })
    }

    /// Each rank adds up a slice of the numbers, in the order of the ranks, and has the sums of the other slices from the others: as
    /// many bytes as a ring takes, and the same bits for every speed of the network.
    fn sum_in_order(&self, numbers: &mut [f32]) -> Result<()> {
        let lengths = slices(numbers.len(), self.size);
        let own = lengths[self.rank];
        let mut parts = vec![0f32; own * self.size];
        let (counts, at) = (ints(lengths.iter().copied())?, ints(places(&lengths))?);
        let (own_counts, own_at) = (vec![int(own)?; self.size], ints((0..self.size).map(|rank| rank * own))?);
        let begin = |request: *mut raw::MPI_Request| {
            // SAFETY: all buffers outlive the transfer, see there; `lengths` add up to `numbers`, and `parts` has room for this rank's
            // slice of each rank.
            unsafe {
                let (float, world) = (raw::RSMPI_FLOAT, raw::RSMPI_COMM_WORLD);
                let (from, to) = (address(numbers), address_mut(&mut parts));
                let (counts, at) = (counts.as_ptr(), at.as_ptr());
                let (own_counts, own_at) = (own_counts.as_ptr(), own_at.as_ptr());
                raw::MPI_Ialltoallv(from, counts, at, float, to, own_counts, own_at, float, world, request)
            }
        };
        self.transfer("MPI_Ialltoallv", Waiting::ForBytes, begin)?;
        add_up(&mut parts, own);
        self.all_gather_parts(&parts[..own], numbers, &lengths)
    }

    fn sum_as_mpi_likes(&self, numbers: &mut [f32]) -> Result<()> {
        let (own, count) = (numbers.to_vec(), int(numbers.len())?);
        let begin = |request: *mut raw::MPI_Request| {
            // SAFETY: both buffers have `count` numbers, and outlive the transfer, see there.
            unsafe {
                let (from, to) = (address(&own), address_mut(numbers));
                let (float, sum) = (raw::RSMPI_FLOAT, raw::RSMPI_SUM);
                raw::MPI_Iallreduce(from, to, count, float, sum, raw::RSMPI_COMM_WORLD, request)
            }
        };
        self.transfer("MPI_Iallreduce", Waiting::ForBytes, begin)
    }

    /// Begins a transfer and waits until it is over. One that fails, or that somebody does not come to, ends the process and all ranks
    /// with it: its buffers may still be written to, and the others wait in it. So this returns, or unwinds, only once MPI has let go of
    /// the buffers that `begin` has given it; they have to live no longer than the call.
    fn transfer(
        &self,
        call: &'static str,
        waiting: Waiting,
        begin: impl FnOnce(*mut raw::MPI_Request) -> c_int,
    ) -> Result<()> {
        if std::thread::current().id() != self.thread {
            return Err(Error::Mpi { call, why: "only the thread that has joined MPI may call it".into() });
        }
        // SAFETY: the null request is a constant.
        let mut request = unsafe { raw::RSMPI_REQUEST_NULL };
        if let Err(why) = checked(call, begin(&mut request)) {
            self.lost(&format!("{why}"));
        }
        let patience = self.patience();
        match self.over_within(&mut request, waiting, patience) {
            Ok(true) => Ok(()),
            Ok(false) => self.call_the_roll(patience.unwrap_or_default()),
            Err(why) => self.lost(&format!("{call}: {why}")),
        }
    }

    /// Whether a transfer is over before that much time is.
    ///
    /// # Errors
    /// [`Error::Mpi`] where it has failed; its buffers may still be written to.
    fn over_within(&self, request: &mut raw::MPI_Request, waiting: Waiting, most: Option<Duration>) -> Result<bool> {
        let begun = Instant::now();
        loop {
            let mut over = 0;
            // SAFETY: the request is one that was begun, or null, and `over` a number of this frame; there is no status to be written.
            let code = unsafe { raw::MPI_Test(request, &mut over, raw::RSMPI_STATUS_IGNORE) };
            checked("MPI_Test", code)?;
            if over != 0 {
                return Ok(true);
            }
            let waited = begun.elapsed();
            if most.is_some_and(|most| waited > most) {
                return Ok(false);
            }
            match waiting.pause_after(waited) {
                Some(pause) => std::thread::sleep(pause),
                None => std::thread::yield_now(),
            }
        }
    }

    /// Somebody does not come: finds out who, says it, and ends all ranks. Those that wait tell rank 0 that they are there; it names
    /// the others. Where that one is silent, they name it.
    fn call_the_roll(&self, patience: Duration) -> ! {
        let waited = format!("within {} s ([ranks] patience_s)", patience.as_secs_f64().round());
        let named = |rank: usize| format!("rank {rank} of {} (on {})", self.size, self.machine(rank));
        if self.rank != 0 {
            let here = [1u8];
            // SAFETY: one byte, which lives as long as the process: this function neither returns nor unwinds.
            unsafe {
                let mut request = raw::RSMPI_REQUEST_NULL;
                let (byte, world) = (raw::RSMPI_UINT8_T, raw::RSMPI_COMM_WORLD);
                // Where it cannot be sent, rank 0 takes this one for missing, and ends all.
                if raw::MPI_Isend(here.as_ptr().cast(), 1, byte, 0, ROLL_CALL, world, &mut request) == 0 {
                    // Ended from here by rank 0, if that is alive; it may have come later than this one. The first one speaks.
                    let _ = self.over_within(&mut request, Waiting::ForARank, Some(patience));
                }
            }
            std::thread::sleep(patience + Duration::from_secs(10 * self.rank as u64));
            self.lost(&format!("{} has not answered {waited}", named(0)));
        }
        let mut heard = vec![0u8; self.size];
        let mut requests = Vec::with_capacity(self.size);
        for (rank, heard) in heard.iter_mut().enumerate().skip(1) {
            // SAFETY: each byte lives as long as the process: this function neither returns nor unwinds.
            unsafe {
                let mut request = raw::RSMPI_REQUEST_NULL;
                let (byte, world) = (raw::RSMPI_UINT8_T, raw::RSMPI_COMM_WORLD);
                let from = c_int::try_from(rank).unwrap_or_default();
                let to = std::ptr::from_mut(heard).cast();
                // Whoever cannot be asked has not answered.
                let asked = raw::MPI_Irecv(to, 1, byte, from, ROLL_CALL, world, &mut request) == 0;
                requests.push((rank, asked.then_some(request)));
            }
        }
        // Others may have come later than this one, and are as patient.
        let until = Instant::now() + patience / 2 + Duration::from_secs(2);
        while !requests.is_empty() && Instant::now() < until {
            requests.retain_mut(|(_, request)| {
                let Some(asked) = request else { return true };
                match self.over_within(asked, Waiting::ForARank, Some(Duration::ZERO)) {
                    Ok(answered) => !answered,
                    Err(_) => {
                        // A request that has failed is no request any more, and would seem to be answered.
                        *request = None;
                        true
                    }
                }
            });
            std::thread::sleep(Duration::from_millis(10));
        }
        let missing: Vec<String> = requests.iter().map(|(rank, _)| named(*rank)).collect();
        match missing.is_empty() {
            true => self
                .lost(&format!("all ranks answer, and yet a transfer was not over {waited}: the network is too slow")),
            false => self.lost(&format!("{} has not answered {waited}", missing.join(", "))),
        }
    }

    /// Says why, and ends all ranks. Never unwinds: that would free buffers which MPI still writes to.
    fn lost(&self, why: &str) -> ! {
        let _ = std::panic::catch_unwind(|| (self.last_words)(why));
        abandon();
        // What stays where MPI is in no state to.
        std::process::abort()
    }

    fn patience(&self) -> Option<Duration> {
        let patience = self.patience.load(Ordering::Relaxed);
        (patience > 0).then_some(Duration::from_millis(patience))
    }
}

/// What a transfer waits for.
#[derive(Clone, Copy)]
enum Waiting {
    /// A rank may be far behind: its machine is not to be kept busy by those that wait.
    ForARank,
    /// All are there; whoever sleeps makes it longer.
    ForBytes,
}

impl Waiting {
    /// How long to sleep once so much time has passed.
    fn pause_after(self, waited: Duration) -> Option<Duration> {
        match self {
            Self::ForARank if waited > Duration::from_millis(100) => Some(Duration::from_millis(1)),
            Self::ForARank if waited > Duration::from_millis(2) => Some(Duration::from_micros(50)),
            Self::ForARank | Self::ForBytes => None,
        }
    }
}

/// What can be sent: plain numbers, of which every pattern of bits is one.
trait Number: Copy + Default {
    /// MPI's name for it.
    fn kind() -> raw::MPI_Datatype;
}

impl Number for u8 {
    fn kind() -> raw::MPI_Datatype {
        // SAFETY: a constant, which may be read from the start of MPI on.
        unsafe { raw::RSMPI_UINT8_T }
    }
}

impl Number for f32 {
    fn kind() -> raw::MPI_Datatype {
        // SAFETY: a constant, which may be read from the start of MPI on.
        unsafe { raw::RSMPI_FLOAT }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_that_are_more_than_is_counted_go_in_pieces() {
        assert_eq!(rounds(&[3, 0, 4], 7), [[0..3, 0..0, 0..4]]);
        assert_eq!(rounds(&[0, 0], 7), [[0..0, 0..0]]);
        assert_eq!(rounds(&[3, 0, 4], 6), [[0..2, 0..0, 0..2], [2..3, 0..0, 2..4]]);
        for (lengths, most) in [(&[5, 1, 9][..], 4), (&[5, 1, 9], 3), (&[5, 1, 9], 1), (&[100], 33)] {
            let rounds = rounds(lengths, most);
            for (i, length) in lengths.iter().enumerate() {
                let all: Vec<usize> = rounds.iter().flat_map(|round| round[i].clone()).collect();
                assert_eq!(all, (0..*length).collect::<Vec<_>>());
            }
            let largest = rounds.iter().map(|round| round.iter().map(ExactSizeIterator::len).sum::<usize>()).max();
            assert!(largest.unwrap() <= most.max(lengths.len()), "{lengths:?} {most}");
        }
    }
}
