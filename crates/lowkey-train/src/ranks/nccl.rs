//! NCCL, as far as training needs it: gradients from GPU to GPU, and all that ranks say to each other where there is no MPI.
//!
//! NCCL works on the memory of GPUs alone. Numbers of the host are copied there and back; those of a tensor stay where they are, and are
//! sent from its own memory to that of another rank's tensor. Everything runs on one stream, and the host looks at it until it is over,
//! so that a rank that never comes ends the job instead of being waited for.
//!
//! A communicator cannot be used once a call has failed, and the others wait in that call: so a failure here ends the process, and whoever
//! started it ends the rest.

use std::ffi::c_char;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use burn::tensor::{Device, Tensor};
use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, DriverError, ValidAsZeroBits,
};
use cudarc::nccl::result::{self as calls, NcclError, NcclStatus};
use cudarc::nccl::sys::{self, ncclDataType_t, ncclRedOp_t};
use lowkey_kernels::device::{CudaMemory, cuda_memory};

use super::comm::{Wire, gather_texts};
use super::launched::{Launched, Rendezvous};
use super::parts::{add_up, in_rounds};
use super::seat::Seat;
use crate::error::{Error, Result};
use crate::run_config::RankSum;

/// Numbers of the host that are summed at once: their copies on the GPU are to stay small beside a model.
const AT_ONCE: usize = 1 << 24;

/// Numbers of the host that are gathered at once, for the same reason.
const MOST: usize = 1 << 25;

/// The bytes of what names a communicator, `NCCL_UNIQUE_ID_BYTES`.
const NAME: usize = 128;

type Called = std::result::Result<NcclStatus, NcclError>;

/// The GPUs of all ranks, seen from that of one of them.
#[derive(Debug)]
pub(crate) struct Gpus {
    comm: Mutex<Communicator>,
    stream: Arc<CudaStream>,
    seat: Seat,
}

#[derive(Debug)]
struct Communicator(sys::ncclComm_t);

// SAFETY: NCCL lets any thread use a communicator, one at a time, which the mutex around it sees to.
unsafe impl Send for Communicator {}

/// Ranks that know nothing of each other but where to meet ([`Rendezvous`]), which the environment says, and their GPUs.
///
/// # Errors
/// [`Error::Launch`] where there is no NCCL, no GPU, or no place to meet; [`Error::Transfer`].
pub(super) fn join(launched: &Launched, last_words: fn(&str)) -> Result<(Box<dyn Wire>, Arc<Gpus>)> {
    check_libraries()?;
    let refused = |why: String| Error::Launch { why };
    let Some(Rendezvous { local_rank, .. }) = Rendezvous::read() else {
        let why = "torchrun has not said where ranks meet: MASTER_ADDR, MASTER_PORT and LOCAL_RANK are missing";
        return Err(refused(why.into()));
    };
    let count = CudaContext::device_count().map_err(|e| refused(format!("no NVIDIA driver answers: {e}")))?;
    // A job manager may show each rank its own GPU alone.
    let ordinal = if count == 1 { 0 } else { local_rank };
    if i32::try_from(ordinal).is_ok_and(|ordinal| ordinal >= count) {
        let why = format!("rank {local_rank} of this machine has no GPU of its own: there are {count}");
        return Err(refused(why));
    }
    let gpus = Gpus::meet(ordinal, (launched.rank, launched.size), name()?, last_words)?;
    let machine = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_else(|_| "?".into());
    let gpus = Arc::new(gpus);
    gpus.seat.set_machines(gather_texts(&gpus, machine.trim())?);
    Ok((Box::new(Arc::clone(&gpus)), gpus))
}

/// Says where ranks that `torchrun` has started meet, which NCCL reads in the environment. To be called before anything else is done.
pub fn say_where_to_meet() {
    const PLACE: &str = "NCCL_COMM_ID";
    if let Some(place) = Rendezvous::read().filter(|_| std::env::var_os(PLACE).is_none()) {
        // SAFETY: the program has one thread yet, so nobody reads the environment.
        unsafe { std::env::set_var(PLACE, place.for_nccl()) };
    }
}

/// What a communicator is known by. Where the environment says where ranks meet, it is the same on all of them.
pub(super) fn name() -> Result<Vec<u8>> {
    let name = calls::get_uniqueid().map_err(|error| Error::Transfer { call: "ncclGetUniqueId", why: said(&error) })?;
    Ok(name.internal.iter().map(|byte| byte.to_ne_bytes()[0]).collect())
}

/// What tells the GPU of a device from all others.
///
/// # Errors
/// [`Error::Launch`] where it is none of NVIDIA's, or NCCL is not here.
pub(super) fn serial_number(device: &Device) -> Result<Vec<u8>> {
    check_libraries()?;
    let refused = |e: DriverError| Error::Transfer { call: "cuDeviceGetUuid", why: e.to_string() };
    cudarc::driver::result::init().map_err(refused)?;
    let gpu = cudarc::driver::result::device::get(ordinal(device)? as i32).map_err(refused)?;
    let serial = cudarc::driver::result::device::get_uuid(gpu).map_err(refused)?;
    Ok(serial.bytes.iter().map(|byte| byte.to_ne_bytes()[0]).collect())
}

/// The number of a device's GPU.
fn ordinal(device: &Device) -> Result<usize> {
    let probe = Tensor::<1>::zeros([1], &device.clone().without_autodiff());
    cuda_memory(&probe).map(|memory| memory.ordinal()).ok_or_else(|| {
        let why = "NCCL moves the gradients of NVIDIA's GPUs alone; write run.device = \"cuda\", or [ranks] transport = \"mpi\"";
        Error::Launch { why: why.into() }
    })
}

fn check_libraries() -> Result<()> {
    // SAFETY: both look for a library, and load one that is found, whose start is trusted as that of any that a program is linked to.
    let (driver, nccl) = unsafe { (cudarc::driver::sys::is_culib_present(), sys::is_culib_present()) };
    match (driver, nccl) {
        (true, true) => Ok(()),
        (false, _) => Err(Error::Launch { why: "no NVIDIA driver answers: libcuda was not found".into() }),
        (true, false) => {
            let why = "NCCL was not found: libnccl.so is in no folder that LD_LIBRARY_PATH names (packages of the library alone call it \
                       libnccl.so.2; that of its headers, libnccl-dev, has the link)";
            Err(Error::Launch { why: why.into() })
        }
    }
}

/// What NCCL says against a call.
fn said(error: &NcclError) -> String {
    use sys::ncclResult_t::{ncclInvalidUsage, ncclRemoteError, ncclSystemError, ncclUnhandledCudaError};
    let hint = match error.0 {
        ncclInvalidUsage => "; each rank needs a GPU of its own",
        ncclRemoteError => "; another rank has ended",
        ncclSystemError | ncclUnhandledCudaError => "; NCCL_DEBUG=WARN says more",
        _ => "",
    };
    format!("{:?}{hint}", error.0)
}

impl Gpus {
    /// Meets the other ranks, which all come here with the same `name`.
    ///
    /// # Errors
    /// [`Error::Transfer`] where they cannot meet.
    fn meet(ordinal: usize, (rank, size): (usize, usize), name: Vec<u8>, last_words: fn(&str)) -> Result<Self> {
        let driver = |e: DriverError| Error::Transfer { call: "cuDevicePrimaryCtxRetain", why: e.to_string() };
        let stream = CudaContext::new(ordinal).map_err(driver)?.default_stream();
        let bytes: [u8; NAME] = name.try_into().map_err(|_| {
            let why = "rank 0 has not said what the communicator is called".into();
            Error::Transfer { call: "ncclCommInitRank", why }
        })?;
        let name = sys::ncclUniqueId { internal: bytes.map(|byte| c_char::from_ne_bytes([byte])) };
        let (count, own) = (size.try_into().unwrap_or(i32::MAX), rank.try_into().unwrap_or(i32::MAX));
        let mut comm = std::ptr::null_mut();
        // SAFETY: `comm` is a place of this frame, and the context of the GPU is that of this thread.
        let met = unsafe { calls::comm_init_rank(&mut comm, count, name, own) };
        met.map_err(|error| Error::Transfer { call: "ncclCommInitRank", why: said(&error) })?;
        Ok(Self { comm: Mutex::new(Communicator(comm)), stream, seat: Seat::new(rank, size, last_words) })
    }

    /// The same for ranks that know each other already, and have told each other the `name`. Nobody can be told of a failure: it ends all.
    pub(super) fn link(device: &Device, ranks: (usize, usize), name: Vec<u8>, last_words: fn(&str)) -> Self {
        let met = ordinal(device).and_then(|ordinal| Self::meet(ordinal, ranks, name, last_words));
        met.unwrap_or_else(|error| end_all(last_words, &error.to_string()))
    }

    /// Refuses a device that is not this rank's GPU.
    pub(super) fn check_is_of(&self, device: &Device) -> Result<()> {
        let (own, its) = (self.stream.context().ordinal(), ordinal(device)?);
        if own == its {
            return Ok(());
        }
        let why = format!(
            "this rank meets the others with cuda:{own}, and computes on cuda:{its}; write run.device = \"cuda\""
        );
        Err(Error::Launch { why })
    }

    /// The sum of a tensor of all ranks, on all of them, which have as many numbers each.
    ///
    /// In order: each rank receives a slice from each, adds up in the order of the ranks, and sends the sum to all. Twice (n − 1)/n of the
    /// numbers leave and reach each GPU, as in a ring.
    pub(crate) fn sum_tensor(&self, numbers: Tensor<1>, order: RankSum) -> Tensor<1> {
        let (device, [length]) = (numbers.device(), numbers.dims());
        let zeros = |length: usize| Tensor::<1>::zeros([length], &device);
        let ready = |tensors: [&Tensor<1>; 2]| {
            let memory = tensors.map(|tensor| self.memory(tensor));
            if let Err(error) = device.sync() {
                self.lost(&format!("the device could not compute gradients: {error:?}"));
            }
            memory
        };
        if order == RankSum::Fastest {
            let sum = zeros(length);
            let [from, to] = ready([&numbers, &sum]);
            self.all_reduce(from.address(), to.address(), length);
            return sum;
        }
        let slice = length.div_ceil(self.seat.size);
        let parts = zeros(slice * self.seat.size);
        let [from, to] = ready([&numbers, &parts]);
        self.exchange(from.address(), length, to.address());
        drop((from, to));
        let total = added_up(&parts, slice);
        let whole = zeros(slice * self.seat.size);
        let [from, to] = ready([&total, &whole]);
        self.all_gather_at(from.address(), slice * size_of::<f32>(), to.address());
        whole.narrow(0, 0, length)
    }

    /// Where a tensor's numbers lie, one after the other.
    fn memory(&self, tensor: &Tensor<1>) -> CudaMemory {
        let memory = cuda_memory(tensor).filter(|memory| memory.bytes() >= tensor.dims()[0] * size_of::<f32>());
        memory.unwrap_or_else(|| self.lost("gradients do not lie in the memory of the GPU as they should"))
    }

    /// Adds up `length` numbers of all ranks in an order of NCCL's own.
    fn all_reduce(&self, from: u64, to: u64, length: usize) {
        self.transfer("ncclAllReduce", |comm, stream| {
            let (kind, sum) = (ncclDataType_t::ncclFloat32, ncclRedOp_t::ncclSum);
            // SAFETY: both places hold `length` numbers, and stay until the transfer is over.
            unsafe { calls::all_reduce(from as _, to as _, length, kind, sum, comm, stream) }
        });
    }

    /// Sends to each rank its slice of `length` numbers, and receives this one's from each, one after the other.
    fn exchange(&self, from: u64, length: usize, to: u64) {
        let (slice, wide) = (length.div_ceil(self.seat.size), size_of::<f32>());
        let start = |rank: usize| (rank * slice).min(length);
        let own = start(self.seat.rank + 1) - start(self.seat.rank);
        self.transfer("ncclSend and ncclRecv", |comm, stream| {
            let kind = ncclDataType_t::ncclFloat32;
            calls::group_start()?;
            for rank in 0..self.seat.size {
                let (at, count) = (start(rank), start(rank + 1) - start(rank));
                let (source, place) = (from + (at * wide) as u64, to + (rank * slice * wide) as u64);
                let peer = i32::try_from(rank).unwrap_or(i32::MAX);
                // SAFETY: `from` holds `length` numbers, `to` a slice of each rank, and both stay until the transfer is over. All ranks know
                // how long the slices are, so that none is sent or awaited alone.
                unsafe {
                    if count > 0 {
                        calls::send(source as _, count, kind, peer, comm, stream)?;
                    }
                    if own > 0 {
                        calls::recv(place as _, own, kind, peer, comm, stream)?;
                    }
                }
            }
            calls::group_end()
        });
    }

    /// As many bytes of each rank, one after the other.
    fn all_gather_at(&self, from: u64, bytes: usize, to: u64) {
        self.transfer("ncclAllGather", |comm, stream| {
            let kind = ncclDataType_t::ncclUint8;
            // SAFETY: `from` holds as many bytes, `to` those of all ranks, and both stay until the transfer is over.
            unsafe { calls::all_gather(from as _, to as _, bytes, kind, comm, stream) }
        });
    }

    /// As many numbers of the host of each rank, one after the other.
    fn all_gather_of<T: DeviceRepr + ValidAsZeroBits + Default + Copy>(&self, own: &[T]) -> Vec<T> {
        if own.is_empty() {
            return Vec::new();
        }
        let (from, mut to) = (self.sent(own), self.room(own.len() * self.seat.size));
        let (source, _read) = from.device_ptr(&self.stream);
        let (place, written) = to.device_ptr_mut(&self.stream);
        self.all_gather_at(source, size_of_val(own), place);
        drop(written);
        self.received(&to)
    }

    /// Parts of known lengths, one after the other.
    fn all_gather_parts<T: DeviceRepr + ValidAsZeroBits + Default + Copy>(
        &self,
        own: &[T],
        lengths: &[usize],
    ) -> Result<Vec<T>> {
        let mut all = vec![T::default(); lengths.iter().sum()];
        in_rounds(self.seat.rank, own, &mut all, lengths, MOST, |own, all, lengths| {
            let longest = lengths.iter().max().copied().unwrap_or_default();
            let mut padded = own.to_vec();
            padded.resize(longest, T::default());
            let (got, mut rest) = (self.all_gather_of(&padded), all);
            for (part, length) in got.chunks_exact(longest.max(1)).zip(lengths) {
                let (first, more) = rest.split_at_mut(*length);
                first.copy_from_slice(&part[..*length]);
                rest = more;
            }
            Ok(())
        })?;
        Ok(all)
    }

    fn sum_in_order(&self, numbers: &mut [f32]) {
        let (length, slice) = (numbers.len(), numbers.len().div_ceil(self.seat.size));
        let (from, mut to) = (self.sent(numbers), self.room(slice * self.seat.size));
        let (source, _read) = from.device_ptr(&self.stream);
        let (place, written) = to.device_ptr_mut(&self.stream);
        self.exchange(source, length, place);
        drop(written);
        let mut parts = self.received(&to);
        add_up(&mut parts, slice);
        let whole = self.all_gather_of(&parts[..slice]);
        numbers.copy_from_slice(&whole[..length]);
    }

    fn sum_as_nccl_likes(&self, numbers: &mut [f32]) {
        let mut there = self.sent(numbers);
        let (place, written) = there.device_ptr_mut(&self.stream);
        self.all_reduce(place, place, numbers.len());
        drop(written);
        numbers.copy_from_slice(&self.received(&there));
    }

    /// Numbers of the host, on the GPU.
    fn sent<T: DeviceRepr>(&self, numbers: &[T]) -> CudaSlice<T> {
        self.sure("cuMemcpyHtoD", self.stream.clone_htod(numbers))
    }

    /// Room for so many.
    fn room<T: DeviceRepr + ValidAsZeroBits>(&self, count: usize) -> CudaSlice<T> {
        self.sure("cuMemAlloc", self.stream.alloc_zeros(count))
    }

    /// Numbers of the GPU, on the host.
    fn received<T: DeviceRepr>(&self, numbers: &CudaSlice<T>) -> Vec<T> {
        self.sure("cuMemcpyDtoH", self.stream.clone_dtoh(numbers))
    }

    /// Begins a transfer and waits until it is over. One that fails, or that somebody does not come to, ends the process: so this returns
    /// only once NCCL has let go of the memory that `begin` has given it, which has to live no longer than the call.
    fn transfer(&self, call: &str, begin: impl FnOnce(sys::ncclComm_t, sys::cudaStream_t) -> Called) {
        let comm = self.comm.lock().unwrap_or_else(PoisonError::into_inner);
        self.sure(call, self.stream.context().bind_to_thread());
        if let Err(error) = begin(comm.0, self.stream.cu_stream().cast()) {
            self.lost(&format!("{call}: {}", said(&error)));
        }
        let (over, begun) = (self.sure(call, self.stream.record_event(None)), Instant::now());
        while !self.sure(call, over.try_is_complete()) {
            // Another rank may have ended because it is over for it, and so it is here.
            if let Err(error) = state(&comm)
                && !self.sure(call, over.try_is_complete())
            {
                self.lost(&format!("{call}: {}", said(&error)));
            }
            let waited = begun.elapsed();
            if let Some(patience) = self.seat.patience().filter(|patience| waited > *patience) {
                self.lost(&format!(
                    "{call} was not over within {} s ([ranks] patience_s): a rank has not come, or the network is too slow",
                    patience.as_secs_f64().round()
                ));
            }
            match waited {
                waited if waited > Duration::from_millis(100) => std::thread::sleep(Duration::from_millis(1)),
                waited if waited > Duration::from_millis(2) => std::thread::sleep(Duration::from_micros(50)),
                _ => std::thread::yield_now(),
            }
        }
    }

    /// What a call has given; it must not fail, as the others go on.
    fn sure<T>(&self, call: &str, given: std::result::Result<T, DriverError>) -> T {
        given.unwrap_or_else(|e| self.lost(&format!("{call}: {e}")))
    }

    pub(super) fn seat(&self) -> &Seat {
        &self.seat
    }

    /// Gives up the communicator, once the ranks have parted.
    pub(super) fn leave(&self) {
        let mut comm = self.comm.lock().unwrap_or_else(PoisonError::into_inner);
        let comm = std::mem::replace(&mut comm.0, std::ptr::null_mut());
        if !comm.is_null() {
            // SAFETY: no transfer is open: each was waited for; and nothing uses the communicator afterwards. What it says is of no use: the
            // work is done.
            let _ = unsafe { calls::comm_destroy(comm) };
        }
    }

    fn lost(&self, why: &str) -> ! {
        end_all(self.seat.last_words, why)
    }
}

/// The sum of equal parts that lie one after the other, in their order, in a tensor of its own.
fn added_up(parts: &Tensor<1>, length: usize) -> Tensor<1> {
    let part = |i: usize| parts.clone().narrow(0, i * length, length);
    (1..parts.dims()[0] / length.max(1)).fold(part(0), |total, i| total + part(i))
}

/// What has befallen a communicator since, such as the end of another rank.
fn state(comm: &Communicator) -> Called {
    let mut state = sys::ncclResult_t::ncclSuccess;
    // SAFETY: the communicator is one that was begun, and `state` a place of this frame.
    unsafe { sys::ncclCommGetAsyncError(comm.0, &mut state) }.result()?;
    state.result()
}

/// Says why, and ends this process, and with it all: where MPI has started them, through it. Never unwinds: that would free memory which
/// NCCL still writes to.
fn end_all(last_words: fn(&str), why: &str) -> ! {
    let _ = std::panic::catch_unwind(|| last_words(why));
    super::Ranks::abandon();
    std::process::abort()
}

impl Wire for Arc<Gpus> {
    fn seat(&self) -> &Seat {
        Gpus::seat(self)
    }

    fn all_gather(&self, own: &[u8]) -> Result<Vec<u8>> {
        Ok(self.all_gather_of(own))
    }

    fn gather(&self, own: &[u8], lengths: &[usize]) -> Result<Vec<u8>> {
        self.all_gather_parts(own, lengths)
    }

    fn gather_numbers(&self, own: &[f32], lengths: &[usize]) -> Result<Vec<f32>> {
        self.all_gather_parts(own, lengths)
    }

    fn gather_numbers_to_first(&self, own: &[f32], lengths: &[usize]) -> Result<Vec<f32>> {
        let all = self.all_gather_parts(own, lengths)?;
        Ok(if self.seat.rank == 0 { all } else { Vec::new() })
    }

    fn sum(&self, numbers: &mut [f32], order: RankSum) -> Result<()> {
        numbers.chunks_mut(AT_ONCE).for_each(|numbers| match order {
            RankSum::Fastest => self.sum_as_nccl_likes(numbers),
            RankSum::Ordered => self.sum_in_order(numbers),
        });
        Ok(())
    }

    fn reducer(&self, order: RankSum) -> &'static str {
        match order {
            RankSum::Fastest => "NCCL, through the hosts, in its own order",
            RankSum::Ordered => "NCCL, through the hosts, in the order of the ranks",
        }
    }

    fn leave(&self) {
        Gpus::leave(self);
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::TensorData;

    use super::*;

    #[test]
    fn tensors_are_added_up_as_numbers_of_the_host_are() {
        let numbers: Vec<f32> = (0..21u16).map(|i| (f32::from(i) * 0.7).sin() * 10f32.powi(i32::from(i % 9))).collect();
        let tensor = Tensor::from_data(TensorData::new(numbers.clone(), [21]), &Device::flex());
        for slice in [7, 3] {
            let mut of_host = numbers.clone();
            add_up(&mut of_host, slice);
            let bits = |sums: &[f32]| sums.iter().map(|sum| sum.to_bits()).collect::<Vec<_>>();
            let sums = added_up(&tensor, slice).into_data().try_to_vec::<f32>().unwrap();
            assert_eq!(bits(&sums), bits(&of_host[..slice]));
        }
    }
}
