//! Products of operands rounded to bf16, with sums in f32.
//!
//! Intel's AMX multiplies tiles: 16 rows of 32 numbers by 32 rows of 16, added to 16 × 16 sums in f32 that stay in a register, which
//! is some ten times what its vectors of f32 do in that time. AVX512-BF16, which AMD has from Zen 4 on, adds two products to each sum of a
//! vector. Both read pairs of neighbours along the inner dimension, so that operands are packed first ([`Packed`]), and rounded while
//! they are. A [`Core`] is a thread that has the unit in its hands, and what it multiplies is packed; [`multiply`] does both for
//! matrices of any size, on several threads.
//!
//! Each sum runs over the inner dimension in one order, however the rest is cut: any number of threads gives the same bits. The
//! units differ in how they add a pair (and those of x86 take numbers below 1e-38 for 0), so that two kinds of processors agree to the
//! rounding of an f32 sum.

mod core;
mod kernels;
mod pack;
mod product;
mod take;
#[cfg(test)]
mod tests;
mod unit;

pub(crate) use self::core::{Core, Window};
pub(crate) use self::kernels::BLOCK;
pub(crate) use self::pack::{Packed, Side};
pub(crate) use self::product::{Product, multiply};
pub(crate) use self::unit::Unit;
