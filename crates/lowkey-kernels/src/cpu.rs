//! What several operations share on the CPU: products, tiles and rows of plain f32 slices, and the way there from a tensor.
//!
//! Loops are written so that the compiler vectorises them, and run through `pulp`, which picks the widest instructions that
//! the processor has when the program runs: one binary serves every machine. Matrix products are those of the `gemm` crate in f32, and
//! of [`bf16`] where a run asks for that.

pub(crate) mod awake;
pub(crate) mod bf16;
pub(crate) mod gemm;
pub(crate) mod linear;
pub(crate) mod narrow;
pub(crate) mod parts;
pub(crate) mod tensors;
pub(crate) mod tile;
pub(crate) mod transpose;
pub(crate) mod vector;
