//! The operations on plain f32 slices, for the CPU.
//!
//! Loops are written so that the compiler vectorises them, and run through `pulp`, which picks the widest instructions that
//! the processor has when the program runs: one binary serves every machine. Matrix products are those of the `gemm` crate.

pub(crate) mod absorbed;
pub(crate) mod attention;
pub(crate) mod cached;
pub(crate) mod cross_entropy;
mod gemm;
pub(crate) mod latent;
pub(crate) mod linear;
pub(crate) mod mlp;
pub(crate) mod muon;
pub(crate) mod optim;
mod parts;
pub(crate) mod pointwise;
mod tile;
mod vector;
