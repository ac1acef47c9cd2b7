//! MPI, as far as training needs it: `MPI_COMM_WORLD`, and a few collective calls on it.
//!
//! All calls come from the thread that has joined (`MPI_THREAD_FUNNELED`). None of them blocks: every transfer is begun, and looked at
//! until it is over, so that a rank that never comes can be told of by name instead of being waited for.

use std::ffi::{c_int, c_void};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use mpi_sys as raw;

use super::comm::{Wire, gather_texts};
use super::parts::{add_up, in_rounds, places};
use super::seat::Seat;
use super::{LEFT_TO_MPI, Launched};
use crate::error::{Error, Result};
use crate::run_config::RankSum;

/// Numbers that are summed at once: counts of MPI are 32 bits wide, and buffers are to stay small beside a model.
const AT_ONCE: usize = 1 << 24;

/// Numbers that are gathered at once: their places are counts of MPI, too.
const MOST: usize = c_int::MAX as usize;

/// Tag of the only messages that go from one rank to another by themselves.
const ROLL_CALL: c_int = 19;

/// `MPI_COMM_WORLD`.
#[derive(Debug)]
pub(super) struct Mpi {
    seat: Seat,
    thread: ThreadId,
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
    Err(Error::Transfer { call, why })
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

/// The name and version of the library; none where there is none.
pub(super) fn library() -> Option<String> {
    let said = text(|text, length| {
        // SAFETY: may be called at any time; the text has room for the longest answer.
        unsafe { raw::MPI_Get_library_version(text, length) }
    });
    Some(said.lines().next().unwrap_or_default().split(", package").next().unwrap_or_default().to_owned())
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
    n.try_into().map_err(|_| Error::Transfer { call: "a transfer", why: format!("{n} is more than is sent at once") })
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

/// A part of `length` numbers for each of `size` ranks.
fn slices(length: usize, size: usize) -> Vec<usize> {
    (0..size).map(|rank| length * (rank + 1) / size - length * rank / size).collect()
}

/// The ranks that whoever started this process tells MPI of.
///
/// # Errors
/// [`Error::Launch`] where MPI and whoever started it do not know each other; [`Error::Transfer`].
pub(super) fn join(launched: &Launched, last_words: fn(&str)) -> Result<Box<dyn Wire>> {
    let mpi = Mpi::begin(last_words)?;
    if mpi.seat.size != launched.size {
        let why = format!(
            "{} has started {} processes, and MPI knows of {}: this lowkey was built with another MPI than that of its starter. Use that \
             one's mpirun, or srun --mpi=pmix or --mpi=pmi2 as your cluster has it",
            launched.by, launched.size, mpi.seat.size
        );
        return Err(Error::Launch { why });
    }
    Ok(Box::new(mpi))
}

impl Mpi {
    /// Begins MPI.
    ///
    /// # Errors
    /// [`Error::Transfer`].
    fn begin(last_words: fn(&str)) -> Result<Self> {
        let (mut provided, mut rank, mut size) = (0, 0, 0);
        // SAFETY: the arguments may be null since MPI 2; every pointer is to a number of this frame; the communicator is there once
        // MPI is.
        unsafe {
            if is_up() {
                return Err(Error::Transfer { call: "MPI_Init_thread", why: "MPI is up already".into() });
            }
            let (null, funneled) = (std::ptr::null_mut(), raw::RSMPI_THREAD_FUNNELED);
            checked("MPI_Init_thread", raw::MPI_Init_thread(null, std::ptr::null_mut(), funneled, &mut provided))?;
            let world = raw::RSMPI_COMM_WORLD;
            checked("MPI_Comm_set_errhandler", raw::MPI_Comm_set_errhandler(world, raw::RSMPI_ERRORS_RETURN))?;
            checked("MPI_Comm_rank", raw::MPI_Comm_rank(world, &mut rank))?;
            checked("MPI_Comm_size", raw::MPI_Comm_size(world, &mut size))?;
            if provided < funneled {
                let why = "this MPI serves programs of one thread alone (MPI_THREAD_FUNNELED is needed)".into();
                return Err(Error::Transfer { call: "MPI_Init_thread", why });
            }
        }
        let (rank, size) = (usize::try_from(rank).unwrap_or_default(), usize::try_from(size).unwrap_or(1));
        let mpi = Self { seat: Seat::new(rank, size, last_words), thread: std::thread::current().id() };
        let machine = text(|text, length| {
            // SAFETY: the text has room for `MPI_MAX_PROCESSOR_NAME`.
            unsafe { raw::MPI_Get_processor_name(text, length) }
        });
        mpi.seat.set_machines(gather_texts(&mpi, &machine)?);
        Ok(mpi)
    }

    /// Parts of known lengths, one after the other; `own` has the length of this rank's.
    fn all_gather_parts<T: Number>(&self, own: &[T], all: &mut [T], lengths: &[usize]) -> Result<()> {
        in_rounds(self.seat.rank, own, all, lengths, MOST, |own, all, lengths| self.all_gather_once(own, all, lengths))
    }

    fn all_gather_once<T: Number>(&self, own: &[T], all: &mut [T], lengths: &[usize]) -> Result<()> {
        let (count, counts, at) = (int(own.len())?, ints(lengths.iter().copied())?, ints(places(lengths))?);
        assert!(lengths.len() == self.seat.size && lengths.iter().sum::<usize>() == all.len());
        assert!(lengths[self.seat.rank] == own.len());
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
        assert!(lengths.len() == self.seat.size && lengths[self.seat.rank] == own.len());
        assert!(self.seat.rank != 0 || lengths.iter().sum::<usize>() == all.len());
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

    /// Each rank adds up a slice of the numbers, in the order of the ranks, and has the sums of the other slices from the others: as
    /// many bytes as a ring takes, and the same bits for every speed of the network.
    fn sum_in_order(&self, numbers: &mut [f32]) -> Result<()> {
        let lengths = slices(numbers.len(), self.seat.size);
        let own = lengths[self.seat.rank];
        let mut parts = vec![0f32; own * self.seat.size];
        let (counts, at) = (ints(lengths.iter().copied())?, ints(places(&lengths))?);
        let (own_counts, own_at) = (vec![int(own)?; self.seat.size], ints((0..self.seat.size).map(|rank| rank * own))?);
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
            return Err(Error::Transfer { call, why: "only the thread that has joined MPI may call it".into() });
        }
        // SAFETY: the null request is a constant.
        let mut request = unsafe { raw::RSMPI_REQUEST_NULL };
        if let Err(why) = checked(call, begin(&mut request)) {
            self.lost(&format!("{why}"));
        }
        let patience = self.seat.patience();
        match self.over_within(&mut request, waiting, patience) {
            Ok(true) => Ok(()),
            Ok(false) => self.call_the_roll(patience.unwrap_or_default()),
            Err(why) => self.lost(&format!("{call}: {why}")),
        }
    }

    /// Whether a transfer is over before that much time is.
    ///
    /// # Errors
    /// [`Error::Transfer`] where it has failed; its buffers may still be written to.
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
        let named = |rank: usize| format!("rank {rank} of {} (on {})", self.seat.size, self.seat.machine(rank));
        if self.seat.rank != 0 {
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
            std::thread::sleep(patience + Duration::from_secs(10 * self.seat.rank as u64));
            self.lost(&format!("{} has not answered {waited}", named(0)));
        }
        let mut heard = vec![0u8; self.seat.size];
        let mut requests = Vec::with_capacity(self.seat.size);
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
        let _ = std::panic::catch_unwind(|| (self.seat.last_words)(why));
        abandon();
        // What stays where MPI is in no state to.
        std::process::abort()
    }
}

impl Wire for Mpi {
    fn seat(&self) -> &Seat {
        &self.seat
    }

    fn all_gather(&self, own: &[u8]) -> Result<Vec<u8>> {
        let (count, mut all) = (int(own.len())?, vec![0; own.len() * self.seat.size]);
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

    fn gather(&self, own: &[u8], lengths: &[usize]) -> Result<Vec<u8>> {
        let mut all = vec![0; lengths.iter().sum()];
        if !all.is_empty() {
            self.all_gather_parts(own, &mut all, lengths)?;
        }
        Ok(all)
    }

    fn gather_numbers(&self, own: &[f32], lengths: &[usize]) -> Result<Vec<f32>> {
        let mut all = vec![0.0; lengths.iter().sum()];
        self.all_gather_parts(own, &mut all, lengths)?;
        Ok(all)
    }

    fn gather_numbers_to_first(&self, own: &[f32], lengths: &[usize]) -> Result<Vec<f32>> {
        let mut all = vec![0.0; if self.seat.rank == 0 { lengths.iter().sum() } else { 0 }];
        in_rounds(self.seat.rank, own, &mut all, lengths, MOST, |own, all, lengths| {
            self.gather_once(own, all, lengths)
        })?;
        Ok(all)
    }

    fn sum(&self, numbers: &mut [f32], order: RankSum) -> Result<()> {
        numbers.chunks_mut(AT_ONCE).try_for_each(|numbers| match order {
            RankSum::Fastest if self.seat.size >= LEFT_TO_MPI => self.sum_as_mpi_likes(numbers),
            RankSum::Ordered | RankSum::Fastest => self.sum_in_order(numbers),
        })
    }

    fn reducer(&self, order: RankSum) -> &'static str {
        match order {
            RankSum::Fastest if self.seat.size >= LEFT_TO_MPI => "MPI, in its own order",
            RankSum::Ordered | RankSum::Fastest => "MPI, in the order of the ranks",
        }
    }

    /// Only the thread that has joined MPI may leave it; from any other this does nothing.
    fn leave(&self) {
        if is_up() && std::thread::current().id() == self.thread {
            // SAFETY: MPI is up, and no transfer is open: each was waited for. What it says is of no use: the work is done.
            unsafe { raw::MPI_Finalize() };
        }
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
