//! Runs on several ranks, under the `mpirun` of this machine (Open MPI or MPICH): the bits of one process, and how they end.
//!
//! ```sh
//! cargo test --release --workspace --features lowkey/mpi,lowkey/nccl --test ranks
//! ```
//!
//! With `lowkey/nccl`, those, too, that `torchrun` would start, on what stands in for NCCL.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod bits;
mod endings;
#[cfg(any(feature = "cuda", feature = "metal", feature = "vulkan", feature = "wgpu"))]
mod gpu;
mod job;
#[cfg(feature = "nccl")]
mod nccl;
mod recipes;
mod refusals;
mod shared;
